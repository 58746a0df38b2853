# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12.1", "mujoco>=3.3",
#                 "tyro>=0.9", "safetensors>=0.5", "tqdm>=4.66"]
# ///
"""Export the sparse network of a finished run to C and to a compact file of weights.

    python export.py RUN_DIR          # into RUN_DIR/export
    python export.py RUN_DIR --out breakout --int8

It needs RUN_DIR/model.safetensors only and writes
  agent.h, agent.c  C99 without dependencies: no allocation, no system calls, no globals that change
  agent.bin         the weights, compact; every byte is described in docs/export.md
  agent_weights.c   the same bytes as a table to compile in, for machines without files
  agent.py          an agent for Python without torch: it compiles agent.c, or uses NumPy alone
and checks them against torch on observations of the environment.

What never has an effect is left out first: units that nothing reads, units that are zero whatever
the input, and SAC's log standard deviations.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import signal
import struct
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

ACTOR, CNN, IMPALA, MINATAR = range(4)  # families of networks
TANH, Q, DISTRIBUTION, NORMALISED_Q = range(4)  # what is made of the last layer
ROWS, COLUMNS, DENSE_ROWS, DENSE_COLUMNS, FLOAT_ROWS = range(5)  # convolutions have forms of rows
KERNELS = ("sparse rows", "sparse columns", "dense rows", "dense columns", "float rows")
TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


@dataclass
class Args:
    """Flags."""

    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of a finished run
    out: Path | None = None  # folder to write into; default: RUN_DIR/export
    int8: bool = False  # weights of one byte, with a scale per row
    fp16: bool = False  # weights of two bytes
    onnx: bool = False  # write agent.onnx too, dense fp32 (needs the package onnx)
    observations: int = 1000  # observations on which it is compared with torch; 0: none
    seed: int = 0  # seed of the episodes that they come from

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        require(not (self.int8 and self.fp16), "--int8, --fp16: choose one")
        require(self.observations >= 0, f"--observations {self.observations}: must be at least 0")
        require(self.seed >= 0, f"--seed {self.seed}: must be at least 0")


@dataclass
class Layer:
    """A layer as it is written; weights are [out, in] or [out, in, kernel, kernel]."""

    name: str
    weight: np.ndarray
    bias: np.ndarray
    relu: bool = True
    stride: int = 1
    pad: int = 0  # zeros above and to the left; as many as are needed below and to the right
    side: int = 0  # of the output of a convolution
    kernel: int = ROWS
    entries: int = 0  # values that are stored
    groups: int = 0  # runs of lines of one length
    at: int = 0  # where its data begin in agent.bin
    parts: dict[str, int] | None = None  # where each part of its data begins
    bytes: int = 0

    @property
    def id(self) -> str:
        """Return the name as C accepts it."""
        return self.name.replace(".", "_")

    @property
    def density(self) -> float:
        """Return the share of the weights that is not zero."""
        return float((self.weight != 0).mean())

    @property
    def pitch(self) -> int:
        """Return the side of the planes that a convolution reads: a phase of its padded input."""
        return self.side - 1 + -(-self.weight.shape[2] // self.stride)


@dataclass
class Network:
    """What is exported."""

    family: int
    head: int
    layers: list[Layer]
    actions: int
    obs: tuple[int, int]  # channels and side of an image, or numbers and 1
    env_id: str


# >>> shared: forward
def load_model(run_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the flags ("script" among them) and the tensors of RUN_DIR/model.safetensors."""
    with safe_open(run_dir / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["flags"]), weights


def q_values(weights: dict[str, Tensor], flags: dict[str, Any], obs: Tensor) -> Tensor:
    """Return Q-values [B, actions] of stacked frames obs [B, 4, 84, 84], floats in [0, 1], or of
    MinAtar's cells [B, C, 10, 10], 0 or 1.
    """

    def parameters(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    if "conv.weight" in weights:  # MinAtar
        x = F.relu(F.conv2d(obs, *parameters("conv"))).flatten(1)
        return F.linear(F.relu(F.linear(x, *parameters("dense"))), *parameters("output"))
    if "conv1.weight" in weights:
        x = F.relu(F.conv2d(obs, *parameters("conv1"), stride=4, padding=2))
        x = F.relu(F.conv2d(F.pad(x, (1, 2, 1, 2)), *parameters("conv2"), stride=2))
        x = F.relu(F.conv2d(x, *parameters("conv3"), padding=1))
    else:  # Impala
        x = obs
        for i, padding in ((1, 0), (2, 0), (3, 1)):
            x = F.conv2d(x, *parameters(f"stack{i}.entry"), padding=1)
            x = F.max_pool2d(x, 3, 2, padding, ceil_mode=True)
            for first in (0, 2):
                y = F.conv2d(F.relu(x), *parameters(f"stack{i}.blocks.{first}"), padding=1)
                y = F.conv2d(F.relu(y), *parameters(f"stack{i}.blocks.{first + 1}"), padding=1)
                x = x + y
        x = F.relu(x)
    x = F.relu(F.linear(x.permute(0, 2, 3, 1).flatten(1), *parameters("dense")))
    if flags.get("regulariser") == "l2-features":
        x = F.normalize(x, dim=1)
    features, x = x, F.linear(x, *parameters("output"))
    if flags["script"] == "rainbow_resnet_gmp.py" or "value.weight" in weights:
        # Probabilities of 51 returns from -10 to 10, for some of a state value and advantages.
        returns = torch.linspace(-10, 10, 51, device=x.device)
        x = x.unflatten(1, (-1, 51))
        if "value.weight" in weights:
            x = x - x.mean(1, keepdim=True) + F.linear(features, *parameters("value"))[:, None]
        return (x.softmax(2) * returns).sum(2)
    return x


def mean_actions(weights: dict[str, Tensor], obs: Tensor) -> Tensor:
    """Return a policy's mean actions [B, A] in [-1, 1] for obs [B, O]."""
    x, i = obs, 1
    while f"actor.dense{i}.weight" in weights:
        x = F.relu(F.linear(x, weights[f"actor.dense{i}.weight"], weights[f"actor.dense{i}.bias"]))
        i += 1
    x = F.linear(x, weights["actor.output.weight"], weights["actor.output.bias"])
    return x.chunk(2, 1)[0].tanh()  # the other half: log standard deviations


def load_agent(folder: Path, use_c: bool = True) -> Any:
    """Return the agent of a folder that export.py wrote, by the agent.py in it."""
    spec = importlib.util.spec_from_file_location("agent", folder / "agent.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Agent(folder, use_c)


# <<< shared: forward


def network_of(flags: dict[str, Any], weights: dict[str, Tensor]) -> Network:
    """Return the acting network of a run."""
    found = {name: tensor.float().numpy() for name, tensor in weights.items()}
    dueling = "value.weight" in found
    for end in ("weight", "bias") if dueling else ():  # state value and advantages in one layer
        advantages = found[f"output.{end}"].reshape(-1, 51, *found[f"output.{end}"].shape[1:])
        both = advantages - advantages.mean(0) + found[f"value.{end}"]
        found[f"output.{end}"] = both.reshape(found[f"output.{end}"].shape)

    def layer(name: str, relu: bool = True, prefix: str = "", **geometry: Any) -> Layer:
        weight, bias = found[f"{prefix}{name}.weight"], found[f"{prefix}{name}.bias"]
        return Layer(name, weight, bias, relu, **geometry)

    if "actor.output.weight" in found:
        names = [f"dense{i}" for i in range(1, 99) if f"actor.dense{i}.weight" in found]
        layers = [*(layer(n, prefix="actor.") for n in names), layer("output", False, "actor.")]
        actions = len(layers[-1].bias) // 2
        layers[-1].weight, layers[-1].bias = layers[-1].weight[:actions], layers[-1].bias[:actions]
        obs = (layers[0].weight.shape[1], 1)
        return Network(ACTOR, TANH, layers, actions, obs, flags["env_id"])
    if "conv.weight" in found:
        layers = [layer("conv", side=8), layer("dense"), layer("output", False)]
        obs, actions = (layers[0].weight.shape[1], 10), len(layers[-1].bias)
        return Network(MINATAR, Q, layers, actions, obs, flags["env_id"])
    family = CNN if "conv1.weight" in found else IMPALA
    layers, side = [], 84
    if family == CNN:
        layers += [
            layer("conv1", stride=4, pad=2, side=21),
            layer("conv2", stride=2, pad=1, side=11),
        ]
        layers += [layer("conv3", pad=1, side=11)]
    else:
        for i, side in ((1, 84), (2, 42), (3, 21)):
            layers += [layer(f"stack{i}.entry", False, pad=1, side=side)]
            for j in range(4):
                name = f"stack{i}.blocks.{j}"
                layers += [layer(name, j % 2 == 0, pad=1, side=(side + 1) // 2)]
    layers += [layer("dense"), layer("output", False)]
    dense, side = layers[-2], layers[-3].side
    units = len(dense.bias)  # columns in the order channel, y, x, as all planes are stored
    dense.weight = dense.weight.reshape(units, side, side, -1).transpose(0, 3, 1, 2)
    dense.weight = dense.weight.reshape(units, -1)
    head, actions = Q, len(layers[-1].bias)
    if flags["script"] == "rainbow_resnet_gmp.py" or dueling:
        head, actions = DISTRIBUTION, actions // 51
    if flags.get("regulariser") == "l2-features":
        head = NORMALISED_Q
    return Network(family, head, layers, actions, (4, 84), flags["env_id"])


def largest_outputs(layer: Layer, low: float, high: np.ndarray) -> np.ndarray:
    """Return bounds of what each unit [out] can give, for inputs in [low, high [in]]."""
    weight = layer.weight.reshape(len(layer.bias), len(high), -1)
    with np.errstate(invalid="ignore"):  # 0 * inf, which is not used
        most = np.where(weight > 0, weight * high[:, None], 0)
        most += np.where(weight < 0, weight * low, 0)
    return np.maximum(most.sum((1, 2)) + layer.bias, 0)


def drop_units(network: Network) -> int:
    """Leave out units that never fire or that nothing reads; return how many.

    In Impala only the first convolution of each block and the dense layer have units that one
    layer alone reads.
    """
    dropped, before = 0, -1
    while before != dropped:  # what is dropped may leave others unread
        before = dropped
        actor = network.family == ACTOR
        low, high = (-np.inf if actor else 0.0), np.full(network.obs[0], np.inf if actor else 1.0)
        for this, after in pairwise(network.layers):
            if network.family == IMPALA:
                low, high = 0.0, np.full(this.weight.shape[1], np.inf)
                if not this.relu:
                    continue
            if this.name == "dense" and this.weight.shape[1] != len(high):
                high = np.repeat(high, this.weight.shape[1] // len(high))
            most = largest_outputs(this, low, high)
            units = len(this.bias)
            read = (after.weight.reshape(len(after.bias), units, -1) != 0).any((0, 2))
            if after.name == "output" and network.head == NORMALISED_Q:
                read[:] = True  # by the norm
            keep = read & (most > 0)
            keep[0] |= not keep.any()
            dropped += int((~keep).sum())
            shape = (len(after.bias), units, -1)
            kept = after.weight.reshape(shape)[:, keep]
            after.weight = kept.reshape(len(kept), -1, *after.weight.shape[2:])
            this.weight, this.bias = this.weight[keep], this.bias[keep]
            low, high = 0.0, most[keep]
    return dropped


def choose_kernel(layer: Layer, first: bool) -> int:
    """Return the fastest kernel, by cycles per action as fitted to measurements (docs/export.md).

    A dense one needs the room of all weights: it must be much faster.
    """
    if layer.weight.ndim == 4:
        return DENSE_ROWS if layer.density > 0.6 else ROWS
    (outputs, inputs), entries = layer.weight.shape, np.count_nonzero(layer.weight)
    active = 1.0 if first else 0.5  # about half of the units fire
    cycles = {
        ROWS: 1.25 * entries + 10 * outputs,
        COLUMNS: 3 * inputs + active * (6 * inputs + 1.25 * entries),
        DENSE_ROWS: outputs * (inputs / 8 + 8) / 0.6,
        DENSE_COLUMNS: inputs * (3 + active * (outputs / 8 + 5)) / 0.6,
    }
    return min(cycles, key=lambda kernel: cycles[kernel])


def encode(layer: Layer, kind: str) -> list[tuple[str, np.ndarray]]:
    """Return the parts of a layer's data by name; sets its kernel's counts. See docs/export.md."""
    matrix = layer.weight.reshape(len(layer.bias), -1)
    scale = np.ones(len(matrix), np.float32)
    kind = "fp32" if layer.kernel == FLOAT_ROWS else kind
    if kind == "int8":
        scale = np.abs(matrix).max(1) / np.float32(127)
        scale[scale == 0] = 1
        matrix = np.rint(matrix / scale[:, None])
    parts = [("bias", layer.bias.astype(np.float32)), ("scale", scale)]
    matrix = matrix.astype(TYPES[kind])
    if layer.kernel in (COLUMNS, DENSE_COLUMNS):
        matrix = matrix.T
    if layer.kernel in (DENSE_ROWS, DENSE_COLUMNS, FLOAT_ROWS):
        layer.entries, layer.groups = matrix.size, 0
        return [*parts, ("values", matrix)]
    deltas, values, none = [], [], np.zeros(0, np.uint8)
    for line in matrix:
        (index,) = np.nonzero(line)
        gaps = np.diff(index, prepend=0)
        ends = np.cumsum(np.maximum(gaps - 1, 0) // 255 + 1)  # gaps over 255: zeros between
        steps = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
        steps[ends - 1] = gaps - np.maximum(gaps - 1, 0) // 255 * 255
        stored = np.zeros(len(steps), line.dtype)
        stored[ends - 1] = line[index]
        deltas.append(steps)
        values.append(stored)
    order = np.arange(len(matrix))
    lengths = np.array([len(steps) for steps in deltas])
    if layer.kernel == COLUMNS:  # by length, without the empty ones
        order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]
    ordered = lengths[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(starts, append=len(ordered))
    layer.entries, layer.groups = int(ordered.sum()), len(starts)
    parts.append(("groups", np.stack([ordered[starts], counts], 1).astype(np.uint16)))
    if layer.kernel == COLUMNS:
        parts.append(("order", order.astype(np.uint16)))
    parts.append(("deltas", np.concatenate([*(deltas[i] for i in order), none])))
    parts.append(("values", np.concatenate([*(values[i] for i in order), matrix[:0, 0]])))
    return parts


HEADER = struct.Struct("<4sHBBIIHHHHBB6x32s")  # 64 bytes
LAYER = struct.Struct("<16sBBBBHHIIIII")  # 44 bytes, one for each layer after the header


def write_weights(network: Network, kind: str) -> bytes:
    """Return agent.bin; sets kernels and places of the layers."""
    place = HEADER.size + LAYER.size * len(network.layers)
    heads, data = b"", bytearray()
    for i, layer in enumerate(network.layers):
        most = max(len(layer.bias), layer.weight[0].size)
        require(most < 65536, f"{layer.name}: {most:,} inputs or outputs; at most 65,535 go")
        layer.kernel = choose_kernel(layer, i == 0)
        answers = layer is network.layers[-1] and network.head != TANH
        if kind == "int8" and answers and layer.weight.size <= 16384:
            layer.kernel = FLOAT_ROWS  # bytes here would cost most of the actions that change
        layer.at, layer.parts = place + len(data), {}
        for name, part in encode(layer, kind):
            data += bytes(-len(data) % part.itemsize)  # aligned, for machines that want it
            layer.parts[name] = place + len(data)
            data += part.astype(part.dtype.newbyteorder("<")).tobytes()
        data += bytes(-len(data) % 4)
        layer.bytes = place + len(data) - layer.at
        outputs, inputs = layer.weight.shape[:2]
        size = layer.weight.shape[2] if layer.weight.ndim == 4 else 0
        form = (size, layer.kernel, layer.relu, layer.stride, layer.pad, layer.side)
        counts = (outputs, inputs, layer.entries, layer.groups, layer.at)
        heads += LAYER.pack(layer.name.encode(), *form, *counts)
    env_id, size = network.env_id.encode()[:32], HEADER.size + len(heads) + len(data) + 64
    first = (b"CRSA", 1, network.family, network.head, size)
    last = (len(network.layers), network.actions, *network.obs, list(TYPES).index(kind), 0, env_id)
    body = heads + bytes(data) + bytes(64)  # vectors may read that far past the end
    head = HEADER.pack(*first, 0, *last)
    crc = zlib.crc32(head[16:] + body, zlib.crc32(head[:12]))  # of all but itself
    return HEADER.pack(*first, crc, *last) + body


C_KERNELS = r"""
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tables are little-endian"
#endif

/* vec: as many floats as the machine takes at once; one where there are no vectors. */
#if defined(__GNUC__) && (defined(__SSE2__) || defined(__ARM_NEON))
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
#else
#define LANES 1
typedef float vec;
#endif

#if defined(__GNUC__)
#define KERNEL static inline __attribute__((always_inline, unused))
#else
#define KERNEL static inline
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

KERNEL vec load(const float *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

KERNEL void store(float *to, vec v)
{
    memcpy(to, &v, sizeof v);
}

KERNEL float number(const unsigned char *table, int i) /* the table's i-th float */
{
    float f;
    memcpy(&f, table + 4 * i, 4);
    return f;
}

KERNEL int count(const unsigned char *table, int i) /* the table's i-th 16-bit integer */
{
    return table[2 * i] | table[2 * i + 1] << 8;
}

/* value(): the i-th weight of a table; values(), four(): LANES or 4 of them from the i-th on. */
@VALUE@
#if LANES == 1
KERNEL float values(const unsigned char *table, int i)
{
    return value(table, i);
}
#endif

KERNEL uint32_t word(const unsigned char *from) /* four bytes in one load */
{
    uint32_t bytes;
    memcpy(&bytes, from, 4);
    return bytes;
}

/* Lines (rows or columns) of a sparse matrix, in groups of one length. */
typedef struct {
    const unsigned char *groups, *deltas, *values;
    int length, left; /* entries of the next line; lines like it that are left */
} lines;

KERNEL void next_group(lines *t)
{
    t->length = count(t->groups, 0);
    t->left = count(t->groups, 1);
    t->groups += 4;
}

/* y += A x, A in sparse rows. */
KERNEL void sparse_rows(lines t, const float *x, float *y, int outputs)
{
    int i, k;
    for (i = 0; i < outputs; i++) {
        const float *at = x;
        float sum[4] = {0};
        if (t.left == 0)
            next_group(&t);
        for (k = 0; k + 4 <= t.length; k += 4) { /* four sums, of which none waits for another */
            const uint32_t step = word(t.deltas + k);
            at += step & 255;
            sum[0] += *at * value(t.values, k);
            at += step >> 8 & 255;
            sum[1] += *at * value(t.values, k + 1);
            at += step >> 16 & 255;
            sum[2] += *at * value(t.values, k + 2);
            at += step >> 24;
            sum[3] += *at * value(t.values, k + 3);
        }
        for (; k < t.length; k++) {
            at += t.deltas[k];
            sum[0] += *at * value(t.values, k);
        }
        y[i] += sum[0] + sum[1] + (sum[2] + sum[3]);
        t.left--;
        t.deltas += t.length;
        t.values += t.length * VALUE_BYTES;
    }
}

/* y += A x, A in sparse columns, those of zero inputs skipped. A list of the others, made without
   a branch, and lines of one length together spare the processor wrong guesses. */
KERNEL void sparse_columns(lines t, int groups, const unsigned char *order, const float *x,
                           float *y, uint16_t *list)
{
    for (; groups > 0; groups--) {
        int i, k, active = 0;
        next_group(&t);
        for (i = 0; i < t.left; i++) {
            list[active] = (uint16_t)i;
            active += x[count(order, i)] != 0;
        }
        for (i = 0; i < active; i++) {
            const unsigned char *delta = t.deltas + list[i] * t.length;
            const unsigned char *weight = t.values + list[i] * t.length * VALUE_BYTES;
            const float input = x[count(order, list[i])];
            float *at = y;
            k = 0;
#if LANES > 1
            for (; k + 4 <= t.length; k += 4) {
                const uint32_t step = word(delta + k);
                const quad product = input * four(weight, k);
                at += step & 255;
                *at += product[0];
                at += step >> 8 & 255;
                *at += product[1];
                at += step >> 16 & 255;
                *at += product[2];
                at += step >> 24;
                *at += product[3];
            }
#endif
            for (; k < t.length; k++) {
                at += delta[k];
                *at += input * value(weight, k);
            }
        }
        order += 2 * t.left;
        t.deltas += t.left * t.length;
        t.values += t.left * t.length * VALUE_BYTES;
    }
}

/* y += A x, A dense in rows. */
KERNEL void dense_rows(const unsigned char *table, const float *x, float *y, int outputs,
                       int inputs)
{
    int i, k;
    for (i = 0; i < outputs; i++, table += inputs * VALUE_BYTES) {
        vec sum = {0};
        float part[LANES];
        for (k = 0; k + LANES <= inputs; k += LANES)
            sum += load(x + k) * values(table, k);
        memcpy(part, &sum, sizeof part);
        for (; k < inputs; k++)
            part[0] += x[k] * value(table, k);
        for (k = 0; k < LANES; k++)
            y[i] += part[k];
    }
}

/* y += A x, A dense in columns, those of zero inputs skipped. */
KERNEL void dense_columns(const unsigned char *table, const float *x, float *y, int outputs,
                          int inputs)
{
    int i, k;
    for (i = 0; i < inputs; i++, table += outputs * VALUE_BYTES) {
        const float input = x[i];
        if (input == 0)
            continue;
        for (k = 0; k + LANES <= outputs; k += LANES)
            store(y + k, load(y + k) + input * values(table, k));
        for (; k < outputs; k++)
            y[k] += input * value(table, k);
    }
}

/* y += A x, A dense in rows of 32-bit floats, whatever type the other layers have. */
KERNEL void float_rows(const unsigned char *table, const float *x, float *y, int outputs,
                       int inputs)
{
    int i, k;
    for (i = 0; i < outputs; i++, table += 4 * inputs)
        for (k = 0; k < inputs; k++)
            y[i] += x[k] * number(table, k);
}

/* Scale, add the bias, and cut at 0 if that is wanted. */
KERNEL void finish(float *y, int n, const unsigned char *scale, const unsigned char *bias, int relu)
{
    int i;
    for (i = 0; i < n; i++) {
        const float sum = y[i] * number(scale, i) + number(bias, i);
        y[i] = relu && sum < 0 ? 0 : sum;
    }
}
"""

C_CONV = r"""
/* A convolution reads planes. An image is padded and split into stride x stride phases, of which
   phase (y, x) has the pixels (y + i stride, x + j stride): so each tap reads pixels that lie
   side by side. Its output has the pitch of these planes. */

KERNEL void finish_channel(float *y, int n, float scale, float bias, int relu)
{
    int i;
    for (i = 0; i < n; i++) {
        const float sum = y[i] * scale + bias;
        y[i] = relu && sum < 0 ? 0 : sum;
    }
}

/* Put the offsets of all taps, in the order channel, y, x, into a table. */
static void tap_offsets(int *table, int channels, int size, int stride, int pitch)
{
    int c, y, x;
    for (c = 0; c < channels; c++)
        for (y = 0; y < size; y++)
            for (x = 0; x < size; x++)
                *table++ = ((c * stride + y % stride) * stride + x % stride) * pitch * pitch
                           + y / stride * pitch + x / stride;
}

/* Copy an image of n x n pixels to its padded phases. */
KERNEL void split(const float *image, int pitch, int n, float *phases, int stride, int pad,
                  int side)
{
    int y, x, i;
    for (y = 0; y < n; y++) {
        UNROLL
        for (x = 0; x < stride; x++) {
            const int phase = (y + pad) % stride * stride + (x + pad) % stride;
            float *to = phases + (phase * side + (y + pad) / stride) * side + (x + pad) / stride;
            const float *from = image + y * pitch + x;
            for (i = 0; i < (n - x + stride - 1) / stride; i++)
                to[i] = from[i * stride];
        }
    }
}

/* One channel's sums over its taps, for `length` pixels. TILE vectors stay in registers. */
#define VECTORS(length) (((length) + LANES - 1) / LANES)
#define TILES(length) ((VECTORS(length) + 9) / 10)
#define TILE(length) ((VECTORS(length) + TILES(length) - 1) / TILES(length))

KERNEL float *sparse_conv(lines *t, const float *in, const int *offsets, int length,
                                agent_scratch *s)
{
    int v, i, k, tap = 0;
    if (t->left == 0)
        next_group(t);
    for (k = 0; k < t->length; k++) {
        tap += t->deltas[k];
        s->offset[k] = offsets[tap];
        s->weight[k] = value(t->values, k);
    }
    for (v = 0; v < VECTORS(length); v += TILE(length)) {
        const vec zero = {0};
        vec sum[10];
        UNROLL
        for (i = 0; i < TILE(length); i++)
            sum[i] = zero;
        for (k = 0; k < t->length; k++) {
            const float *from = in + s->offset[k] + v * LANES;
            const float weight = s->weight[k];
            UNROLL
            for (i = 0; i < TILE(length); i++)
                sum[i] += weight * load(from + i * LANES);
        }
        UNROLL
        for (i = 0; i < TILE(length); i++)
            store(s->plane + (v + i) * LANES, sum[i]);
    }
    t->left--;
    t->deltas += t->length;
    t->values += t->length * VALUE_BYTES;
    return s->plane;
}

/* The same where most weights are there: four channels share what they load. */
KERNEL float *dense_conv(const unsigned char *table, int channel, int channels, int taps,
                               const float *in, const int *offsets, int length, agent_scratch *s)
{
    int v, i, j, k;
    if (channel % 4 != 0)
        return s->plane + channel % 4 * AGENT_PLANE;
    for (j = 0; j < 4; j++)
        for (k = 0; k < taps; k++)
            s->weight[4 * k + j] =
                channel + j < channels ? value(table, (channel + j) * taps + k) : 0;
    for (v = 0; v < VECTORS(length); v += 3) {
        const vec zero = {0};
        vec sum[4][3];
        UNROLL
        for (j = 0; j < 12; j++)
            sum[j / 3][j % 3] = zero;
        for (k = 0; k < taps; k++) {
            const float *from = in + offsets[k] + v * LANES;
            const vec a = load(from), b = load(from + LANES), c = load(from + 2 * LANES);
            UNROLL
            for (j = 0; j < 4; j++) {
                const float weight = s->weight[4 * k + j];
                sum[j][0] += weight * a;
                sum[j][1] += weight * b;
                sum[j][2] += weight * c;
            }
        }
        UNROLL
        for (j = 0; j < 4; j++)
            UNROLL
            for (i = 0; i < 3; i++)
                store(s->plane + j * AGENT_PLANE + (v + i) * LANES, sum[j][i]);
    }
    return s->plane;
}
"""

C_VALUES = {
    "fp32": """#define VALUE_BYTES 4

KERNEL float value(const unsigned char *table, int i)
{
    return number(table, i);
}

#if LANES > 1
#define VALUES(name, type, n) \\
    KERNEL type name(const unsigned char *table, int i) \\
    { \\
        type v; \\
        memcpy(&v, table + 4 * i, sizeof v); \\
        return v; \\
    }
VALUES(values, vec, LANES)
VALUES(four, quad, 4)
#endif
""",
    "fp16": """#define VALUE_BYTES 2

KERNEL float value(const unsigned char *table, int i)
{
    const uint32_t half = (uint32_t)count(table, i);
    const uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f * 0x1p112f; /* from the exponents of 32 bits to those of 16 */
}

#if LANES > 1
#define VALUES(name, type, n) \\
    typedef uint16_t name##_halves __attribute__((vector_size(2 * n))); \\
    typedef uint32_t name##_words __attribute__((vector_size(4 * n))); \\
    KERNEL type name(const unsigned char *table, int i) \\
    { \\
        name##_halves half; \\
        name##_words bits; \\
        type v; \\
        memcpy(&half, table + 2 * i, sizeof half); \\
        bits = __builtin_convertvector(half, name##_words); \\
        bits = (bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13; \\
        memcpy(&v, &bits, sizeof v); \\
        return v * 0x1p112f; \\
    }
VALUES(values, vec, LANES)
VALUES(four, quad, 4)
#endif
""",
    "int8": """#define VALUE_BYTES 1

KERNEL float value(const unsigned char *table, int i)
{
    return (signed char)table[i];
}

#if LANES > 1
typedef signed char bytes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t four_ints __attribute__((vector_size(16)));

KERNEL vec values(const unsigned char *table, int i) /* in steps, which compilers do well */
{
    bytes v;
    memcpy(&v, table + i, sizeof v);
    return __builtin_convertvector(
        __builtin_convertvector(__builtin_convertvector(v, shorts), ints), vec);
}

KERNEL quad four(const unsigned char *table, int i)
{
    int32_t w;
    memcpy(&w, table + i, 4);
    return __builtin_convertvector(
        (four_ints){w, w, w, w} << (four_ints){24, 16, 8, 0} >> (four_ints){24, 24, 24, 24}, quad);
}
#endif
""",
}
C_POOL = r"""
/* The largest of 3 x 3 pixels, at every second one, of an image of n x n pixels, n at most 84.
   Beyond an edge the pixel at the edge stands: it is in the window anyway. */
KERNEL void pool(const float *image, int pitch, int n, float *to, int side, int pad)
{
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define INSIDE(i) ((i) < 0 ? 0 : (i) < n ? (i) : n - 1)
    int y, x;
    for (y = 0; y < side; y++) {
        const float *a = image + INSIDE(2 * y - pad) * pitch;
        const float *b = image + (2 * y - pad + 1) * pitch;
        const float *c = image + INSIDE(2 * y - pad + 2) * pitch;
        float row[84];
        for (x = 0; x < n; x++) {
            const float most = LARGER(a[x], b[x]);
            row[x] = LARGER(most, c[x]);
        }
        for (x = 0; x < side; x++) {
            const int i = 2 * x - pad;
            const float most = LARGER(row[INSIDE(i)], row[i + 1]);
            to[y * side + x] = LARGER(most, row[INSIDE(i + 2)]);
        }
    }
}

/* to = max(from, 0), n numbers. */
KERNEL void relu(const float *from, float *to, int n)
{
    int i;
    for (i = 0; i < n; i++)
        to[i] = from[i] < 0 ? 0 : from[i];
}

/* to += an image of n x n pixels. */
KERNEL void add(const float *image, int pitch, int n, float *to)
{
    int y, x;
    for (y = 0; y < n; y++)
        for (x = 0; x < n; x++)
            to[y * n + x] += image[y * pitch + x];
}
"""

C_PIXELS = r"""
/* The same for a frame of n x n bytes, times a unit. */
KERNEL void split_frame(const unsigned char *frame, int n, float unit, float *phases, int stride,
                        int pad, int side)
{
    int y, x, i;
    for (y = 0; y < n; y++) {
        UNROLL
        for (x = 0; x < stride; x++) {
            const int phase = (y + pad) % stride * stride + (x + pad) % stride;
            float *to = phases + (phase * side + (y + pad) / stride) * side + (x + pad) / stride;
            const unsigned char *from = frame + y * n + x;
            for (i = 0; i < (n - x + stride - 1) / stride; i++)
                to[i] = (float)from[i * stride] * unit;
        }
    }
}
"""

C_INIT = r"""
static uint32_t crc32(uint32_t crc, const unsigned char *bytes, size_t size)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
        0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
        0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    crc = ~crc;
    for (; size > 0; size--, bytes++) {
        crc = table[(crc ^ *bytes) & 15] ^ crc >> 4;
        crc = table[(crc ^ (uint32_t)*bytes >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

int agent_init(agent_state *s, const unsigned char *weights, size_t size)
{
    memset(s, 0, sizeof *s);
    if (size != AGENT_WEIGHTS_BYTES
        || crc32(crc32(0, weights, 12), weights + 16, size - 16) != AGENT_CRC)
        return -1;
    s->weights = weights;
@TAPS@    return 0;
}

size_t agent_state_size(void)
{
    return sizeof(agent_state);
}
"""

C_FRAMES = r"""
void agent_new_episode(agent_state *s)
{
    memset(s->frames, 0, sizeof s->frames);
}

const unsigned char *agent_push_frame(agent_state *s, const unsigned char *frame)
{
    const size_t one = sizeof s->frames / AGENT_FRAMES;
    memmove(s->frames, s->frames + one, sizeof s->frames - one);
    memcpy(s->frames + sizeof s->frames - one, frame, one);
    return s->frames;
}
"""

C_GREEDY = r"""
int agent_act(agent_state *s, const unsigned char *observation)
{
    const float *q = agent_q_values(s, observation);
    int a, best = 0;
    for (a = 1; a < AGENT_ACTIONS; a++)
        if (q[a] > q[best])
            best = a;
    return best;
}
"""

C_DISTRIBUTION = r"""
    /* The mean of a distribution of 51 returns from -10 to 10, for each action. */
    for (a = 0; a < AGENT_ACTIONS; a++) {
        const float *logits = s->output + 51 * a;
        float most = logits[0], total = 0, mean = 0;
        for (i = 1; i < 51; i++)
            if (logits[i] > most)
                most = logits[i];
        for (i = 0; i < 51; i++) {
            const float share = expf(logits[i] - most);
            total += share;
            mean += share * (0.4f * (float)i - 10);
        }
        s->q[a] = mean / total;
    }
    return s->q;
"""

C_NORM = r"""
    /* Features of length 1. */
    norm = 0;
    for (i = 0; i < @UNITS@; i++)
        norm += s->dense[i] * s->dense[i];
    norm = 1 / (sqrtf(norm) > 1e-12f ? sqrtf(norm) : 1e-12f);
    for (i = 0; i < @UNITS@; i++)
        s->dense[i] *= norm;
"""


class Program:
    """Writes agent.h and agent.c for a network; buffers are noted as they are needed."""

    def __init__(self, network: Network, kind: str, blob: bytes) -> None:
        self.network, self.kind, self.blob = network, kind, blob
        self.buffers: dict[str, tuple[str, int]] = {}
        self.taps, self.lines = list[str](), list[str]()

    def buffer(self, name: str, size: int, of: str = "float") -> str:
        """Note a buffer of the state; return the C expression for it."""
        known = self.buffers.get(name, (of, 0))[1]
        self.buffers[name] = (of, max(size, known))
        return f"s->{name}"

    def table(self, layer: Layer) -> str:
        """Return the C expression for a sparse layer's lines."""
        parts = layer.parts or {}
        return (
            "(lines){"
            + ", ".join(f"w + {parts[k]}" for k in ("groups", "deltas", "values"))
            + ", 0, 0}"
        )

    def matrix(self, layer: Layer, source: str) -> str:
        """Write a matrix's product; return where the outputs are."""
        parts, (outputs, inputs) = layer.parts or {}, layer.weight.shape
        to = self.buffer(layer.id, outputs)
        name = KERNELS[layer.kernel].replace(" ", "_")
        if layer.kernel == COLUMNS:
            table = f"{self.table(layer)},\n                   {layer.groups}, w + {parts['order']}"
            rest = self.buffer("list", inputs, "uint16_t")
        elif layer.kernel == ROWS:
            table, rest = self.table(layer), str(outputs)
        else:
            table, rest = f"w + {parts['values']}", f"{outputs}, {inputs}"
        text = f"{name}({table}, {source}, {to}, {rest})"
        self.lines += [
            f"\n    /* {layer.name}: {inputs} to {outputs}, {layer.density:.1%} dense */",
            f"    memset({to}, 0, sizeof {to});",
            f"    {text};",
            f"    finish({to}, {outputs}, w + {parts['scale']}, w + {parts['bias']}, "
            f"{int(layer.relu)});",
        ]
        return to

    def conv(self, layer: Layer, source: str, sink: list[str]) -> None:
        """Write a convolution; `sink` are the statements that take each channel c's plane."""
        parts, shape = layer.parts or {}, layer.weight.shape
        channels, taps, pitch = shape[0], shape[1] * shape[2] ** 2, layer.pitch
        length = (layer.side - 1) * pitch + layer.side
        offsets = self.buffer(f"{layer.id}_taps", taps, "int")
        self.taps.append(
            f"    tap_offsets({offsets}, {shape[1]}, {shape[2]}, {layer.stride}, {pitch});\n"
        )
        title = f"{channels} channels of {shape[2]}x{shape[2]}x{shape[1]} taps"
        self.lines.append(f"\n    /* {layer.name}: {title}, {layer.density:.1%} dense */")
        if layer.kernel == ROWS:
            self.lines.append(f"    t = {self.table(layer)};")
            call = f"sparse_conv(&t, {source}, {offsets}, {length}, &s->scratch)"
        else:
            call = f"dense_conv(w + {parts['values']}, c, {channels}, {taps}, {source},\n"
            call += f"                           {offsets}, {length}, &s->scratch)"
        scale = f"number(w + {parts['scale']}, c), number(w + {parts['bias']}, c)"
        self.lines += [
            f"    for (c = 0; c < {channels}; c++) {{",
            f"        plane = {call};",
            f"        finish_channel(plane, {length}, {scale}, {int(layer.relu)});",
            *(f"        {line}" for line in sink),
            "    }",
        ]

    def phases(self, layer: Layer) -> tuple[str, str]:
        """Return the buffer that a convolution reads, and split()'s last arguments."""
        channels, area = layer.weight.shape[1], (layer.pitch * layer.stride) ** 2
        name = self.buffer(f"{layer.id}_in", channels * area + 256)
        return name, f"{name} + c * {area}, {layer.stride}, {layer.pad}, {layer.pitch}"

    def forward(self) -> None:
        """Write the whole network, from `observation` on."""
        network, layers = self.network, self.network.layers
        channels, side = network.obs
        convs = [layer for layer in layers if layer.weight.ndim == 4]
        if not convs:
            source = "observation"
        else:
            unit = "1 / 255.0f" if side == 84 else "1"
            _, to = self.phases(layers[0])
            self.lines += [
                f"    for (c = 0; c < {channels}; c++)",
                f"        split_frame(observation + c * {side * side}, {side}, {unit},\n"
                f"                    {to});",
            ]
        if network.family == IMPALA:
            source = self.impala(convs)
        else:
            for layer, after in pairwise(layers):
                if layer in convs:
                    plane = f"split(plane, {layer.pitch}, {layer.side}, "
                    if after in convs:
                        sink = plane + self.phases(after)[1] + ");"
                    else:
                        area, count = layer.side**2, len(layer.bias)
                        source = self.buffer("features", count * area)
                        sink = plane + f"{source} + c * {area}, 1, 0, {layer.side});"
                    self.conv(layer, self.phases(layer)[0], [sink])
        for layer in layers[len(convs) :]:
            if layer is layers[-1] and network.head == NORMALISED_Q:
                units = str(layer.weight.shape[1])
                self.lines.append(C_NORM.replace("@UNITS@", units).rstrip())
            source = self.matrix(layer, source)

    def impala(self, convs: list[Layer]) -> str:
        """Write the three stacks; return where the features are."""
        for i in range(3):
            entry, *blocks = convs[5 * i : 5 * i + 5]
            channels, side = len(entry.bias), blocks[0].side
            area, pad = side * side, int(i == 2)
            trunk = self.buffer(f"trunk{i + 1}", channels * area)
            pooled = (
                f"pool(plane, {entry.pitch}, {entry.side}, {trunk} + c * {area}, {side}, {pad});"
            )
            self.conv(entry, self.phases(entry)[0], [pooled])
            after = [blocks[0], blocks[2], convs[5 * i + 5] if i < 2 else None]
            for turn in range(2):
                self.spread(trunk, channels, side, blocks[2 * turn], True)
                second = blocks[2 * turn + 1]
                inner = f"split(plane, {second.pitch}, {side}, {self.phases(second)[1]});"
                self.conv(blocks[2 * turn], self.phases(blocks[2 * turn])[0], [inner])
                added = f"add(plane, {second.pitch}, {side}, {trunk} + c * {area});"
                self.conv(second, self.phases(second)[0], [added])
            if (following := after[2]) is not None:
                self.spread(trunk, channels, side, following, False)
        self.lines.append(f"    relu({trunk}, {trunk}, {channels * area});")
        return trunk

    def spread(self, trunk: str, channels: int, side: int, to: Layer, relu: bool) -> None:
        """Write the copy of an image to what a convolution reads."""
        image, area = f"{trunk} + c * {side * side}", side * side
        self.lines.append(f"\n    for (c = 0; c < {channels}; c++) {{")
        if relu:
            self.lines.append(f"        relu({image}, s->scratch.plane, {area});")
            image = "s->scratch.plane"
        self.lines += [f"        split({image}, {side}, {side}, {self.phases(to)[1]});", "    }"]

    def write(self, out: Path) -> None:
        """Write agent.h, agent.c and agent_weights.c."""
        network, actor = self.network, self.network.head == TANH
        self.forward()
        convs = [layer for layer in network.layers if layer.weight.ndim == 4]
        plane = max([(c.side - 1) * c.pitch + c.side + 192 for c in convs], default=0)
        most = max([layer.weight[0].size for layer in convs], default=0)
        scratch = f"""/* Room for one convolution at a time. */
typedef struct {{
    int offset[{most}];
    float weight[4 * {most}], plane[4 * AGENT_PLANE];
}} agent_scratch;

"""
        buffers = "".join(
            f"    {of} {name}[{size}];\n" for name, (of, size) in self.buffers.items()
        )
        channels, side = network.obs
        size = channels * side * side
        state = f"    const unsigned char *weights;\n{buffers}"
        if not actor:
            state += "    float q[AGENT_ACTIONS];\n"
            state += f"    unsigned char frames[{size}];\n" if side == 84 else ""
        if convs:
            state += "    agent_scratch scratch;\n"
        crc = struct.unpack_from("<I", self.blob, 12)[0]
        title = f"{network.env_id or 'agent'}, {self.kind}"
        frames = f"#define AGENT_FRAMES {channels}\n" if side == 84 else ""
        header = C_HEADER.replace("@TITLE@", title).replace("@STATE@", state)
        header = header.replace("@SCRATCH@", scratch if convs else "")
        header = header.replace("@ACT@", C_ACTOR_API if actor else C_Q_API)
        header = header.replace("@FRAMES@", C_FRAMES_API if side == 84 else "")
        defines = (
            f"#define AGENT_ACTIONS {network.actions}\n#define AGENT_OBSERVATION {size}\n{frames}"
        )
        defines += f"#define AGENT_PLANE {plane}\n" if convs else ""
        defines += f"#define AGENT_WEIGHTS_BYTES {len(self.blob)}\n#define AGENT_CRC 0x{crc:08x}u\n"
        (out / "agent.h").write_text(header.replace("@DEFINES@", defines))
        code = (
            f'/* {title}. Generated by export.py. */\n\n#include "agent.h"\n\n#include <math.h>\n'
        )
        code += "#include <string.h>\n" + C_KERNELS.replace("@VALUE@", C_VALUES[self.kind])
        code += C_CONV + C_PIXELS if convs else ""
        code += C_POOL if network.family == IMPALA else ""
        code += C_INIT.replace("@TAPS@", "".join(self.taps))
        code += C_FRAMES if side == 84 else ""
        body = "\n".join(self.lines)
        declare = "    const unsigned char *w = s->weights;\n"
        declare += "    float *plane;\n    int c;\n" if convs else ""
        declare += "    lines t;\n" if any(c.kernel == ROWS for c in convs) else ""
        if actor:
            code += "\nvoid agent_act(agent_state *s, const float *observation, float *action)\n{\n"
            code += f"{declare}    int a;\n{body}\n    for (a = 0; a < AGENT_ACTIONS; a++)\n"
            code += "        action[a] = tanhf(s->output[a]);\n}\n"
        else:
            head = network.head
            extra = {DISTRIBUTION: "    int a, i;\n", NORMALISED_Q: "    float norm;\n    int i;\n"}
            end = "    memcpy(s->q, s->output, sizeof s->q);\n    return s->q;\n"
            end = C_DISTRIBUTION if head == DISTRIBUTION else end
            code += "\nconst float *agent_q_values(agent_state *s, "
            code += "const unsigned char *observation)\n{\n"
            code += f"{declare}{extra.get(head, '')}{body}\n{end}}}\n{C_GREEDY}"
        (out / "agent.c").write_text(code)
        (out / "agent_weights.c").write_text(weights_table(self.blob))


C_HEADER = r"""/* @TITLE@: generated by export.py.

   static agent_state state;
   if (agent_init(&state, agent_weights, AGENT_WEIGHTS_BYTES) != 0) ...
   then agent_act() as often as you like. The names begin with agent_ or AGENT_. */

#ifndef AGENT_H
#define AGENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

@DEFINES@
@SCRATCH@typedef struct {
@STATE@} agent_state;

/* The content of agent.bin, in agent_weights.c; or read the file. */
extern const unsigned char *const agent_weights;

/* Prepare a state. The weights must stay in place. -1: they are damaged, or another agent's. */
int agent_init(agent_state *s, const unsigned char *weights, size_t size);
size_t agent_state_size(void);
@ACT@@FRAMES@
#ifdef __cplusplus
}
#endif

#endif
"""
C_Q_API = r"""
/* Return the Q-values of AGENT_OBSERVATION bytes; they are valid until the next call. */
const float *agent_q_values(agent_state *s, const unsigned char *observation);

/* Return the action with the largest of them. */
int agent_act(agent_state *s, const unsigned char *observation);
"""
C_ACTOR_API = r"""
/* Fill action [AGENT_ACTIONS], in [-1, 1], for an observation [AGENT_OBSERVATION]. */
void agent_act(agent_state *s, const float *observation, float *action);
"""
C_FRAMES_API = r"""
/* The stack of frames: forget it at an episode's start; put a new one of 84 x 84 grays at its end,
   and get the observation for agent_act(). */
void agent_new_episode(agent_state *s);
const unsigned char *agent_push_frame(agent_state *s, const unsigned char *frame);
"""


def weights_table(blob: bytes) -> str:
    """Return C that has these bytes as string literals, which compile far faster than numbers."""
    plain = [32 <= i < 127 and i not in b'"\\?' for i in range(256)]  # ?: trigraphs
    short = [chr(i) if plain[i] else f"\\{i:o}" for i in range(256)]
    long = [chr(i) if plain[i] else f"\\{i:03o}" for i in range(256)]
    rows = []
    for start in range(0, len(blob), 4032):
        row = blob[start : start + 4032]
        digits = [48 <= byte < 56 for byte in row[1:]] + [False]  # would continue an octal number
        text = [(long if digit else short)[byte] for byte, digit in zip(row, digits)]
        lines = ["".join(text[i : i + 64]) for i in range(0, len(row), 64)]
        rows.append("\n     ".join(f'"{line}"' for line in lines))
    return C_TABLE.replace("@COUNT@", str(len(rows))).replace("@ROWS@", ",\n    ".join(rows))


C_TABLE = r"""/* The content of agent.bin. */

#include "agent.h"

#if defined(__GNUC__) && __GNUC__ >= 15
#define BYTES __attribute__((nonstring))
#else
#define BYTES
#endif

/* Rows, because C99 promises no string longer than 4,095; without closing zeros. */
static const union {
    char rows[@COUNT@][4032] BYTES;
    uint32_t aligned;
} table = {{
    @ROWS@}};

const unsigned char *const agent_weights = (const unsigned char *)table.rows;
"""

PY_AGENT = r'''"""An exported agent without torch: by agent.c where there is a compiler, else NumPy.

    agent = Agent()                   # of the folder that this file is in
    action = agent.act(observation)   # [4, 84, 84] uint8, or [O] float32 for an actor

Generated by export.py; docs/export.md describes agent.bin, which it reads.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np

HEADER, LAYER = struct.Struct("<4sHBBIIHHHHBB6x32s"), struct.Struct("<16sBBBBHHIIIII")
FIELDS = "name size kernel relu stride pad side outputs inputs entries groups at".split()
ACTOR, IMPALA, MINATAR, TYPES = 0, 2, 3, (np.float32, np.float16, np.int8)
FLAGS = ["-std=c99", "-O3", "-ffp-contract=fast", "-shared", "-fPIC"]


class Agent:
    """A greedy agent. `env_id` says where it plays, `actions` how many actions it has."""

    def __init__(self, folder=None, use_c=True):
        self.folder = Path(folder or Path(__file__).parent)
        self.data = np.fromfile(self.folder / "agent.bin", np.uint8)
        if len(self.data) < HEADER.size:
            raise ValueError(f"{self.folder / 'agent.bin'}: too short")
        magic, version, self.family, self.head, size, crc, *rest = HEADER.unpack(self.data[:64])
        self.num_layers, self.actions, channels, side, kind, _, env_id = rest
        if magic != b"CRSA" or version != 1:
            raise ValueError(f"{self.folder / 'agent.bin'}: no agent of version 1")
        if size != len(self.data) or zlib.crc32(self.data[16:], zlib.crc32(self.data[:12])) != crc:
            raise ValueError(f"{self.folder / 'agent.bin'}: damaged (its CRC does not fit)")
        self.env_id, self.type = env_id.rstrip(b"\0").decode(), TYPES[kind]
        self.shape = (channels, side, side) if self.family != ACTOR else (channels,)
        self.unit = np.float32(1 / 255 if side == 84 else 1)
        self._layers = None
        self._library = compiled(self.folder) if use_c else None
        if self._library:
            self._state = ctypes.create_string_buffer(self._library.agent_state_size())
            table = ctypes.c_void_p(self.data.ctypes.data)
            self._observation = np.zeros(self.shape, np.uint8 if self.family else np.float32)
            self._action = np.zeros(self.actions, np.float32)
            arrays = [self._observation] if self.family else [self._observation, self._action]
            self._arguments = [ctypes.byref(self._state)]
            self._arguments += [ctypes.c_void_p(array.ctypes.data) for array in arrays]
            if self._library.agent_init(self._state, table, ctypes.c_size_t(size)):
                raise ValueError(f"{self.folder / 'agent.c'}: made for another agent.bin")

    def act(self, observation):
        """Return the greedy action, or the action vector of an actor."""
        self._check(observation)
        if not self._library:
            values = self.q_values(observation)
            return values if self.family == ACTOR else int(values.argmax())
        self._observation[...] = observation
        action = self._library.agent_act(*self._arguments)
        return action if self.family else self._action.copy()

    def q_values(self, observation):
        """Return the Q-values [actions] (an actor: its action vector)."""
        self._check(observation)
        if not self._library:
            return self._forward(np.asarray(observation, np.float32))
        if self.family == ACTOR:
            return self.act(observation)
        self._observation[...] = observation
        values = self._library.agent_q_values(*self._arguments)
        return np.ctypeslib.as_array(values, (self.actions,)).copy()

    def _check(self, observation):
        """Refuse what NumPy would stretch to the right shape: a single frame, a number."""
        if np.shape(observation) != self.shape:
            raise ValueError(f"observation {np.shape(observation)}: must be {self.shape}")

    def layers(self):
        """Return the layers as dictionaries, with dense `weight` and `bias`."""
        if self._layers is None:
            heads = [self.data[64 + 44 * i :][:44].tobytes() for i in range(self.num_layers)]
            self._layers = [self._decode(dict(zip(FIELDS, LAYER.unpack(h)))) for h in heads]
        return self._layers

    def describe(self):
        """Return what evaluate.py wants to know: flags, and the weights by name."""
        kind = {ACTOR: "actor", MINATAR: "minatar"}.get(self.family, "atari")
        prefix = "actor." if self.family == ACTOR else ""
        weights = {f"{prefix}{layer['name']}.weight": layer["weight"] for layer in self.layers()}
        return {"env_id": self.env_id, "script": kind}, weights

    def _decode(self, layer):
        """Read the data of a layer."""
        place, out, size = layer["at"], layer["outputs"], layer["size"]

        def take(count, kind):
            nonlocal place
            place += -place % np.dtype(kind).itemsize
            start, place = place, place + count * np.dtype(kind).itemsize
            return self.data[start:place].view(kind)

        layer["name"], columns = layer["name"].rstrip(b"\0").decode(), layer["kernel"] in (1, 3)
        layer["bias"] = take(out, np.float32)
        scale = take(out, np.float32)
        inputs = layer["inputs"] * max(1, size) ** 2
        shape = (inputs, out) if columns else (out, inputs)
        if layer["kernel"] >= 2:  # dense
            kind = np.float32 if layer["kernel"] == 4 else self.type
            weight = take(layer["entries"], kind).astype(np.float32).reshape(shape)
        else:
            length, count = take(2 * layer["groups"], np.uint16).astype(int).reshape(-1, 2).T
            lengths = np.repeat(length, count)
            lines = take(count.sum(), np.uint16) if columns else np.arange(out)
            index = np.cumsum(take(layer["entries"], np.uint8), dtype=int)
            base = np.concatenate([[0], index])[np.cumsum(lengths) - lengths]
            weight = np.zeros(shape, np.float32)
            values = take(layer["entries"], self.type)
            np.add.at(weight, (np.repeat(lines, lengths), index - np.repeat(base, lengths)), values)
        weight = (weight.T if columns else weight) * scale[:, None]
        layer["weight"] = weight.reshape(out, -1, size, size) if size else weight
        return layer

    def _forward(self, x):
        """Return what agent.c would, by NumPy."""
        layers = iter(self.layers())
        if self.family != ACTOR:
            x = x * self.unit
        if self.family == IMPALA:
            for _ in range(3):
                x = pooled(convolved(next(layers), x))
                for _ in range(2):
                    y = convolved(next(layers), np.maximum(x, 0))
                    x = x + convolved(next(layers), y)
            x = np.maximum(x, 0)
        for layer in layers:
            if layer["size"]:
                x = convolved(layer, x)
                continue
            if layer["name"] == "output" and self.head == 3:
                x = x / max(np.linalg.norm(x), 1e-12)
            x = layer["weight"] @ x.ravel() + layer["bias"]
            x = np.maximum(x, 0) if layer["relu"] else x
        if self.head == 2:
            x = x.reshape(-1, 51)
            x = np.exp(x - x.max(1, keepdims=True))
            x = (x / x.sum(1, keepdims=True)) @ np.linspace(-10, 10, 51, dtype=np.float32)
        return np.tanh(x) if self.family == ACTOR else x


def convolved(layer, x):
    """Return a convolution's output [out, side, side] of x [in, H, H]."""
    size, stride, side, pad = (layer[key] for key in ("size", "stride", "side", "pad"))
    end = max(0, (side - 1) * stride + size - pad - x.shape[1])
    x = np.pad(x, ((0, 0), (pad, end), (pad, end)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    windows = windows[:, ::stride, ::stride][:, :side, :side]
    y = np.tensordot(layer["weight"], windows, ([1, 2, 3], [0, 3, 4]))
    y += layer["bias"][:, None, None]
    return np.maximum(y, 0) if layer["relu"] else y


def pooled(x):
    """Return the largest of 3 x 3 pixels at every second one; 21 pixels have one more before."""
    before = x.shape[1] % 2
    x = np.pad(x, ((0, 0), (before, 1), (before, 1)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))


def compiled(folder):
    """Return agent.c as a library, compiled once into the user's cache; None without a compiler."""
    found = [os.environ.get("CC"), *map(shutil.which, ("cc", "gcc", "clang"))]
    compiler = next(filter(None, found), None)
    if not compiler or not (folder / "agent.c").exists():
        return None
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = [x for x in lines if x.startswith(("flags", "Feat"))]
    text = repr([platform.machine(), compiler, FLAGS, features]).encode()
    text += (folder / "agent.h").read_bytes() + (folder / "agent.c").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanrl-sparse"
    library = cache / f"agent-{hashlib.sha256(text).hexdigest()[:32]}.so"
    if not library.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as place:
                for extra in (["-march=native"], []):
                    command = [*shlex.split(compiler), *FLAGS, *extra, str(folder / "agent.c")]
                    command += ["-o", f"{place}/agent.so", "-lm"]
                    if subprocess.run(command, capture_output=True).returncode == 0:
                        os.replace(f"{place}/agent.so", library)
                        break
        except OSError:
            return None
        if not library.exists():
            return None
    try:
        found = ctypes.CDLL(str(library))
    except OSError:  # damaged: the next time it is compiled anew
        library.unlink(missing_ok=True)
        return None
    found.agent_state_size.restype = ctypes.c_size_t
    if hasattr(found, "agent_q_values"):
        found.agent_q_values.restype = ctypes.POINTER(ctypes.c_float)
    return found
'''


def observations(network: Network, count: int, seed: int, act: Any) -> np.ndarray:
    """Return `count` different observations of 8 episodes side by side, fewer if they do not show
    as many in 20 * count steps; a tenth of the actions is random.

    act maps observations [8, ...] to actions [8] or [8, A].
    """
    rng, found = np.random.default_rng(seed), dict[bytes, np.ndarray]()
    envs: Any
    if network.family == MINATAR:
        return minatar_observations(network, count, seed, act)
    if network.family == ACTOR:
        known = network.env_id in gym.registry
        name = network.env_id if known else f"{network.env_id}-v5"
        mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        envs = gym.make_vec(name, 8, vectorization_mode="sync", vector_kwargs=mode)
        middle = (envs.action_space.high + envs.action_space.low) / 2
        half = (envs.action_space.high - envs.action_space.low) / 2
    else:
        titles = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
        name = re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", network.env_id).lower()
        options: Any = {"repeat_action_probability": 0.25, "noop_max": 0, "use_fire_reset": False}
        envs = AtariVectorEnv(titles[name], 8, **options)
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(int(rng.integers(2**31)))  # not the numbers that rng gives
    for _ in range(20 * count):
        obs = np.array(obs, np.float32 if network.family == ACTOR else np.uint8)
        found |= {x.tobytes(): x for x in obs}
        if len(found) >= count:
            break
        actions = act(obs)
        actions = middle + half * actions if network.family == ACTOR else actions
        random = rng.random(8) < 0.1
        actions[random] = envs.action_space.sample()[random]
        obs, *_ = envs.step(actions)
    return np.stack([*found.values()][:count])


def minatar_observations(network: Network, count: int, seed: int, act: Any) -> np.ndarray:
    """Return the same of MinAtar, of one episode after another."""
    logging.disable()  # it warns that without seaborn it cannot draw
    from minatar import Environment

    logging.disable(logging.NOTSET)
    name = re.sub(r"^MinAtar/|-v[01]$|_", "", network.env_id).lower()
    env = Environment(name.replace("spaceinvaders", "space_invaders"))
    env.seed(seed)
    env.reset()
    rng, moves, found = np.random.default_rng(seed), env.minimal_action_set(), {}
    for _ in range(20 * count):
        obs = env.state().transpose(2, 0, 1).astype(np.uint8)
        found[obs.tobytes()] = obs
        if len(found) == count:
            break
        explore = rng.random() < 0.1
        action = rng.integers(len(moves)) if explore else act(obs[None])[0]
        if env.act(moves[action])[1]:
            env.reset()
    return np.stack([*found.values()])


def export(
    flags: dict[str, Any], weights: dict[str, Tensor], out: Path, kind: str
) -> tuple[Network, int, bytes]:
    """Write all files of an agent; return what was exported, units dropped, and agent.bin."""
    network = network_of(flags, weights)
    require(len(network.env_id.encode()) <= 32, f"{network.env_id}: longer than 32 bytes")
    dropped = drop_units(network)
    blob = write_weights(network, kind)
    out.mkdir(parents=True, exist_ok=True)
    (out / "agent.bin").write_bytes(blob)
    (out / "agent.py").write_text(PY_AGENT)
    (out / "agent.onnx").unlink(missing_ok=True)  # of what was exported here before
    Program(network, kind, blob).write(out)
    return network, dropped, blob


def compare(agent: Any, obs: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """Return how many actions agree, and the largest difference of Q-values or actions."""
    found = np.array([agent.q_values(x) for x in obs])
    largest = float(np.abs(found - expected).max())
    if agent.family == ACTOR:
        return int((np.abs(found - expected).max(1) <= 0.01).sum()), largest
    return int((found.argmax(1) == expected.argmax(1)).sum()), largest


def write_onnx(flags: dict[str, Any], weights: dict[str, Tensor], path: Path) -> None:
    """Write the dense network as ONNX: `observation` [1, ...] float32, pixels from 0 to 255."""

    class Whole(torch.nn.Module):
        """The network with its input's division."""

        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                self.register_buffer(name.replace(".", "/"), weight)

        def forward(self, obs: Tensor) -> Tensor:
            """Return Q-values or mean actions."""
            own = {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}
            return mean_actions(own, obs) if actor else q_values(own, flags, obs / unit)

    actor = "actor.output.weight" in weights
    firsts = ("actor.dense1", "conv", "conv1", "stack1.entry", "actor.output")
    first = next(weights[f"{n}.weight"] for n in firsts if f"{n}.weight" in weights)
    size: tuple[int, ...] = (10, 10) if "conv.weight" in weights else () if actor else (84, 84)
    unit = 255 if 84 in size else 1
    obs = torch.zeros(1, first.shape[1], *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: Any = {
            "input_names": ["observation"],
            "output_names": ["action" if actor else "q_values"],
        }
        torch.onnx.export(Whole(), (obs,), path, dynamo=False, opset_version=17, **names)


def require(accepted: bool, line: str, status: int = 2) -> None:
    """Refuse bad input, with a line that names the flag or file and what is accepted."""
    if not accepted:
        tqdm.write(f"{Path(__file__).name}: {line}", sys.stderr)
        sys.exit(status)


@torch.no_grad()
def main(args: Args) -> None:
    """Export, compare and print."""
    out = args.out or args.run_dir / "export"
    kind = "int8" if args.int8 else "fp16" if args.fp16 else "fp32"
    found = not args.onnx or importlib.util.find_spec("onnx")
    require(bool(found), "--onnx: it needs the package onnx (pip install onnx)")
    try:
        flags, weights = load_model(args.run_dir)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        line = f"no finished run is there ({str(error).splitlines()[0]})"
        require(False, f"{args.run_dir}: {line}")
    try:
        network, dropped, blob = export(flags, weights, out, kind)
    except OSError as error:
        require(False, f"--out {out}: cannot be written ({error})")

    def outputs(obs: np.ndarray) -> np.ndarray:
        """Return torch's Q-values or mean actions."""
        if network.family == ACTOR:
            return mean_actions(weights, torch.from_numpy(obs)).numpy()
        pixels = torch.from_numpy(obs) / (1 if network.family == MINATAR else 255)
        return q_values(weights, flags, pixels).numpy()

    print(f"{'layer':16} {'shape':>14} {'density':>8}  {'kernel':15} {'bytes':>9}")
    for layer in network.layers:
        shape = "x".join(map(str, layer.weight.shape))
        row = f"{layer.name:16} {shape:>14} {layer.density:8.2%}  {KERNELS[layer.kernel]:15}"
        print(f"{row} {layer.bytes:9,}")
    names = [n for n in weights if n.startswith("actor.") or network.family != ACTOR]
    dense = b"".join(weights[name].float().numpy().tobytes() for name in names)
    print(f"units left out, without effect: {dropped}")
    size, zipped = len(blob), len(zlib.compress(dense, 6))
    print(f"agent.bin ({kind}): {size:,} bytes; the network dense {len(dense):,} ", end="")
    print(f"({len(dense) / size:.1f}x), zipped {zipped:,} ({zipped / size:.1f}x)")
    if args.onnx:
        write_onnx(flags, weights, out / "agent.onnx")
    if args.observations:
        act = outputs if network.family == ACTOR else lambda obs: outputs(obs).argmax(1)
        try:
            obs = observations(network, args.observations, args.seed, act)
        except Exception as error:  # of many kinds: a missing package, an environment that is gone
            text = " ".join(str(error).split())
            hint = f"{out} is written; --observations 0 does without the comparison"
            require(False, f"{network.env_id} cannot be played: {text} ({hint})")
        expected = np.concatenate(
            [outputs(part) for part in np.array_split(obs, -(-len(obs) // 50))]
        )
        for use_c in (True, False):
            agent = load_agent(out, use_c)
            agree, largest = compare(agent, obs, expected)
            start = time.perf_counter()
            for x in obs:
                agent.act(x)
            took = (time.perf_counter() - start) / len(obs)
            how = "C" if agent._library else "NumPy"
            what = "actions within 0.01" if network.family == ACTOR else "actions as torch's"
            print(
                f"{how}: {agree} of {len(obs)} {what}, largest difference {largest:.1e}, ", end=""
            )
            print(f"{took * 1e6:.1f} us per action, through Python")
            close = largest <= 1e-4 * max(1, float(np.abs(expected).max()))
            text = f"{out}: {how} computes something else than torch; this is a fault of export.py"
            require(kind != "fp32" or close, text, 1)
    print(f"written to {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # at `| head` it ends in silence
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
