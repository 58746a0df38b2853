# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12.1", "mujoco>=3.3",
#                 "tyro>=0.9", "safetensors>=0.5", "tqdm>=4.66"]
# ///
"""Export the sparse network of a finished run to C and to a compact file of weights.

    python export.py RUN_DIR          # into RUN_DIR/export
    python export.py RUN_DIR --out breakout --int8

It needs only RUN_DIR/model.safetensors and writes
  agent.h, agent.c  C99 without dependencies: no allocation, no system calls, no globals that change
  agent.bin         the weights, compact; every byte is described in docs/export.md
  agent_weights.c   the same bytes as a table to compile in, for machines without files
  agent.py          an agent for Python without torch: it compiles agent.c, or uses NumPy alone
and checks them against torch on observations of the environment.

What never has an effect is left out: units that nothing reads, units that are zero for any input,
and SAC's log standard deviations.
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
from dataclasses import dataclass, field
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
TANH, Q, DISTRIBUTION, NORMALISED_Q = range(4)  # what is computed from the last layer
ROWS, COLUMNS, DENSE_ROWS, DENSE_COLUMNS, FLOAT_ROWS = range(5)  # convolutions use the row forms
KERNELS = ("sparse rows", "sparse columns", "dense rows", "dense columns", "float rows")
TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
SLACK = 10 * 16  # floats that a convolution may touch past a plane: ten vectors of 16, at most


@dataclass
class Args:
    """Flags."""

    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of a finished run
    out: Path | None = None  # folder to write agent.* into; default: RUN_DIR/export
    int8: bool = False  # the smallest file: weights of 8 to 13 bits, with a scale per row
    fp16: bool = False  # weights of two bytes
    onnx: bool = False  # write agent.onnx too, dense fp32 (needs the package onnx)
    observations: int = 1000  # observations to compare with torch on; 0: none
    seed: int = 0  # seed of the episodes they come from

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        require(not (self.int8 and self.fp16), "--int8, --fp16: choose one")
        require(self.observations >= 0, f"--observations {self.observations}: must be at least 0")
        require(self.seed >= 0, f"--seed {self.seed}: must be at least 0")


@dataclass
class Layer:
    """A layer to write; weights are [out, in] or [out, in, kernel, kernel]."""

    name: str
    weight: np.ndarray
    bias: np.ndarray
    relu: bool = True
    stride: int = 1
    pad: int = 0  # zeros above and to the left; below and to the right as many as needed
    side: int = 0  # of a convolution's output
    kernel: int = ROWS
    entries: int = 0  # stored values
    groups: int = 0  # runs of lines of equal length
    bits: int = 8  # of the distance between two entries of a sparse matrix
    at: int = 0  # offset of its data in agent.bin
    parts: dict[str, int] = field(default_factory=dict)  # offset of each part of its data
    bytes: int = 0

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
    """The network to export."""

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
    """Return Q-values [B, actions] for stacked frames obs [B, 4, 84, 84], floats in [0, 1], or for
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
    if x.shape[1] > 18 or "value.weight" in weights:  # more outputs than a game has actions
        # Logits of 51 returns from -10 to 10; dueling networks add a state value to advantages.
        returns = torch.linspace(-10, 10, 51, device=x.device)
        x = x.unflatten(1, (-1, 51))
        if "value.weight" in weights:
            x = x - x.mean(1, keepdim=True) + F.linear(features, *parameters("value"))[:, None]
        return (x.softmax(2) * returns).sum(2)
    return x


# <<< shared: forward
# >>> shared: agents
def mean_actions(weights: dict[str, Tensor], obs: Tensor) -> Tensor:
    """Return a policy's mean actions [B, A] in [-1, 1] for obs [B, O]."""
    x, i = obs, 1
    while f"actor.dense{i}.weight" in weights:
        x = F.relu(F.linear(x, weights[f"actor.dense{i}.weight"], weights[f"actor.dense{i}.bias"]))
        i += 1
    x = F.linear(x, weights["actor.output.weight"], weights["actor.output.bias"])
    return x.chunk(2, 1)[0].tanh()  # the other half is log standard deviations


def load_agent(folder: Path, use_c: bool = True) -> Any:
    """Return the agent in a folder that export.py wrote, loaded by its agent.py."""
    spec = importlib.util.spec_from_file_location("agent", folder / "agent.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Agent(folder, use_c)


# <<< shared: agents
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
        actions, obs = len(layers[-1].bias) // 2, (layers[0].weight.shape[1], 1)
        layers[-1].weight, layers[-1].bias = layers[-1].weight[:actions], layers[-1].bias[:actions]
        return Network(ACTOR, TANH, layers, actions, obs, flags["env_id"])
    head, actions, layers, obs = Q, len(found["output.bias"]), list[Layer](), (4, 84)
    if "conv.weight" in found:
        family, obs = MINATAR, (found["conv.weight"].shape[1], 10)
        layers = [layer("conv", side=8)]
    elif "conv1.weight" in found:
        family = CNN
        layers = [
            layer("conv1", stride=4, pad=2, side=21),
            layer("conv2", stride=2, pad=1, side=11),
        ]
        layers += [layer("conv3", pad=1, side=11)]
    else:
        family = IMPALA
        for i, side in ((1, 84), (2, 42), (3, 21)):
            layers += [layer(f"stack{i}.entry", False, pad=1, side=side)]
            for j in range(4):
                name = f"stack{i}.blocks.{j}"
                layers += [layer(name, j % 2 == 0, pad=1, side=(side + 1) // 2)]
    dense, side = layer("dense"), layers[-1].side
    if family != MINATAR:  # columns in the order channel, y, x, as all planes are stored
        columns = dense.weight.reshape(-1, side, side, len(layers[-1].bias))
        dense.weight = columns.transpose(0, 3, 1, 2).reshape(len(columns), -1)
    if actions > 18 or dueling:  # more than a game has
        head, actions = DISTRIBUTION, actions // 51
    if flags.get("regulariser") == "l2-features":
        head = NORMALISED_Q
    layers += [dense, layer("output", False)]
    return Network(family, head, layers, actions, obs, flags["env_id"])


def largest_outputs(layer: Layer, low: float, high: np.ndarray) -> np.ndarray:
    """Return each unit's largest possible output [out], for inputs in [low, high [in]]."""
    weight = layer.weight.reshape(len(layer.bias), len(high), -1)
    with np.errstate(invalid="ignore"):  # 0 * inf, which is not used
        most = np.where(weight > 0, weight * high[:, None], 0)
        most += np.where(weight < 0, weight * low, 0)
    return np.maximum(most.sum((1, 2)) + layer.bias, 0)


def drop_units(network: Network) -> int:
    """Leave out units that never fire or that nothing reads; return how many.

    In Impala only units of each block's first convolution and of the dense layer are read by just
    one layer.
    """
    dropped, before = 0, -1
    while before != dropped:  # dropping units may leave others unread
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
            reader = after.weight.reshape(len(after.bias), len(this.bias), -1)
            read = (reader != 0).any((0, 2))
            if after.name == "output" and network.head == NORMALISED_Q:
                read[:] = True  # by the norm
            keep = read & (most > 0)
            keep[0] |= not keep.any()
            dropped += int((~keep).sum())
            after.weight = reader[:, keep].reshape(len(reader), -1, *after.weight.shape[2:])
            this.weight, this.bias = this.weight[keep], this.bias[keep]
            low, high = 0.0, most[keep]
    return dropped


def choose_kernel(layer: Layer, first: bool, last: bool, int8: bool, actor: bool) -> int:
    """Return the fastest kernel, by cycles per action as fitted to measurements (docs/export.md).

    A dense kernel stores all weights, so it must be much faster. Dense int8 would change actions:
    the last layer is fp32, and small layers are sparse if that takes at most 15 % more bytes,
    because sparse entries have more than eight bits. Of an actor any layer may be sparse for that,
    and otherwise the first is fp32 too: its inputs are not between 0 and 1.
    """
    size, entries = layer.weight.size, np.count_nonzero(layer.weight)
    compact = 2 * entries <= 1.15 * size
    edge = (first or last) and not compact if actor else last
    if int8 and edge and size <= 16384:
        return FLOAT_ROWS
    if layer.weight.ndim == 4:
        kernel = DENSE_ROWS if layer.density > 0.6 else ROWS
    else:
        outputs, inputs = layer.weight.shape
        active = 1.0 if first else 0.5  # about half of the units fire
        cycles = {
            ROWS: 1.25 * entries + 10 * outputs,
            COLUMNS: 3 * inputs + active * (6 * inputs + 1.25 * entries),
            DENSE_ROWS: outputs * (inputs / 8 + 8) / 0.6,
            DENSE_COLUMNS: inputs * (3 + active * (outputs / 8 + 5)) / 0.6,
        }
        kernel = min(cycles, key=lambda kernel: cycles[kernel])
        if int8 and actor and compact:
            return min((ROWS, COLUMNS), key=lambda kernel: cycles[kernel])
    small = size <= 1024 or (size <= 32768 and compact)
    return ROWS if int8 and small and kernel >= DENSE_ROWS else kernel


def gaps_of(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return line, index and distance to the previous entry (or to 0) of every nonzero value."""
    line, index = np.nonzero(lines)
    gaps = np.where(np.diff(line, prepend=-1) > 0, index, np.diff(index, prepend=0))
    return line, index, gaps


def encode(layer: Layer, kind: str) -> list[tuple[str, np.ndarray]]:
    """Return the parts of a layer's data by name and set its counts. See docs/export.md."""
    matrix = layer.weight.reshape(len(layer.bias), -1)
    dense = layer.kernel in (DENSE_ROWS, DENSE_COLUMNS, FLOAT_ROWS)
    columns = layer.kernel in (COLUMNS, DENSE_COLUMNS)
    scale = np.ones(len(matrix), np.float32)
    kind = "fp32" if layer.kernel == FLOAT_ROWS else kind
    most = 127
    if kind == "int8" and not dense:  # the value gets the bits that the distance leaves of 16
        gaps = gaps_of(matrix.T if columns else matrix)[2]
        counts = [np.sum((np.maximum(gaps, 1) - 1) // (2**n - 1) + 1) for n in range(3, 9)]
        layer.bits = 3 + int(np.argmax(np.array(counts) <= 1.01 * counts[-1]))
        most = 2 ** (15 - layer.bits) - 1
    if kind == "int8":
        scale = np.abs(matrix).max(1) / np.float32(most)
        scale[scale == 0] = 1
        matrix = np.rint(matrix / scale[:, None])
    parts = [("bias", layer.bias.astype(np.float32)), ("scale", scale)]
    matrix = matrix.astype(np.int16 if kind == "int8" and not dense else TYPES[kind])
    matrix = matrix.T if columns else matrix
    if dense:
        layer.entries, layer.groups = matrix.size, 0
        return [*parts, ("values", matrix)]
    line, index, gaps = gaps_of(matrix)
    bridges = (np.maximum(gaps, 1) - 1) // (2**layer.bits - 1)  # extra zeros that a wide gap needs
    ends = np.cumsum(bridges + 1) - 1
    line = np.repeat(line, bridges + 1)
    steps = np.full(len(line), 2**layer.bits - 1)
    steps[ends] = gaps - bridges * (2**layer.bits - 1)
    values = np.zeros(len(line), matrix.dtype)
    values[ends] = matrix[line[ends], index]
    lengths = np.bincount(line, minlength=len(matrix))
    order = np.arange(len(matrix))
    if layer.kernel == COLUMNS:  # by length, without empty ones
        order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]
        place = np.lexsort((line, lengths[line]))
        steps, values = steps[place], values[place]
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    layer.entries, layer.groups = len(values), len(starts)
    groups = np.stack([lengths[order][starts], np.diff(starts, append=len(order))], 1)
    parts.append(("groups", groups.astype(np.uint16)))
    if layer.kernel == COLUMNS:
        parts.append(("order", order.astype(np.uint16)))
    if kind == "int8":
        return [*parts, ("values", (values << layer.bits | steps).astype(np.uint16))]
    return [*parts, ("gaps", steps.astype(np.uint8)), ("values", values)]


HEADER = struct.Struct("<4sHBBIIHHHHBB6x32s")  # 64 bytes
LAYER = struct.Struct("<16sBBBBHHIIIII")  # 44 bytes, one for each layer after the header


def write_weights(network: Network, kind: str) -> bytes:
    """Return the bytes of agent.bin; set the layers' kernels and offsets."""
    place = HEADER.size + LAYER.size * len(network.layers)
    heads, data = b"", bytearray()
    for i, layer in enumerate(network.layers):
        most = max(len(layer.bias), layer.weight[0].size)
        require(most < 65536, f"{layer.name}: {most:,} inputs or outputs; must be at most 65,535")
        last, actor = layer is network.layers[-1], network.family == ACTOR
        layer.kernel = choose_kernel(layer, i == 0, last, kind == "int8", actor)
        layer.at, layer.parts = place + len(data), {}
        for name, part in encode(layer, kind):
            data += bytes(-len(data) % part.itemsize)  # NumPy's views must be aligned
            layer.parts[name] = place + len(data)
            data += part.astype(part.dtype.newbyteorder("<")).tobytes()
        data += bytes(-len(data) % 4)
        layer.bytes = place + len(data) - layer.at
        outputs, inputs = layer.weight.shape[:2]
        size = layer.weight.shape[2] if layer.weight.ndim == 4 else 0
        kernel = layer.kernel | (layer.bits << 4 if layer.bits != 8 else 0)
        form = (size, kernel, layer.relu, layer.stride, layer.pad, layer.side)
        counts = (outputs, inputs, layer.entries, layer.groups, layer.at)
        heads += LAYER.pack(layer.name.encode(), *form, *counts)
    env_id, size = network.env_id.encode()[:32], HEADER.size + len(heads) + len(data) + 64
    begin = (b"CRSA", 1, network.family, network.head, size)
    rest = (len(network.layers), network.actions, *network.obs, list(TYPES).index(kind), 0, env_id)
    body = heads + bytes(data) + bytes(64)  # vectors may read that far past the end
    head = HEADER.pack(*begin, 0, *rest)
    crc = zlib.crc32(head[16:] + body, zlib.crc32(head[:12]))  # of all but itself
    return HEADER.pack(*begin, crc, *rest) + body


C_KERNELS = r"""
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tables are little-endian"
#endif

#ifndef LANES /* floats that a vector has: as many as the machine takes at once */
#if !defined(__GNUC__) || !(defined(__SSE2__) || defined(__ARM_NEON))
#define LANES 1
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if LANES > 1
#define VECTOR(type, n) __attribute__((vector_size(sizeof(type) * (n)))) type
#define AS(type, n, v) __builtin_convertvector(v, VECTOR(type, n))
typedef VECTOR(float, LANES) vec;
typedef VECTOR(float, 4) quad;
#else
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

KERNEL vec load(const void *from)
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

/* value(): a dense table's i-th weight; values(): LANES of them. entry(): a sparse one's, four():
   4 of them. gap(): its distance from the entry before; GAP(): of one of four that lie in `gaps`.
   Distances have so many bits. */
@VALUE@
#if LANES == 1
#define values value
#endif

/* Lines (rows or columns) of a sparse matrix, in groups of one length. */
typedef struct {
    const unsigned char *groups, *gaps, *entries;
    int bits, length, left; /* entries of the next line; lines like it that are left */
} lines;

KERNEL void next_group(lines *t)
{
    t->length = count(t->groups, 0);
    t->left = count(t->groups, 1);
    t->groups += 4;
}

KERNEL void skip(lines *t, int n) /* n lines of this group */
{
    t->left -= n;
    t->gaps += n * t->length * GAP_BYTES;
    t->entries += n * t->length * ENTRY_BYTES;
}

/* y += A x, A in sparse rows. */
KERNEL void sparse_rows(lines t, const float *x, float *y, int outputs)
{
    int i, j, k;
    for (i = 0; i < outputs; i++) {
        const float *at = x;
        float sum[4] = {0};
        if (t.left == 0)
            next_group(&t);
        for (k = 0; k + 4 <= t.length; k += 4) { /* four sums, of which none waits for another */
            const gaps four_gaps = load_gaps(t.gaps + k * GAP_BYTES);
            UNROLL
            for (j = 0; j < 4; j++) {
                at += GAP(four_gaps, j, t.bits);
                sum[j] += *at * entry(t.entries, k + j, t.bits);
            }
        }
        for (; k < t.length; k++) {
            at += gap(t.gaps, k, t.bits);
            sum[0] += *at * entry(t.entries, k, t.bits);
        }
        y[i] += sum[0] + sum[1] + (sum[2] + sum[3]);
        skip(&t, 1);
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
            const unsigned char *step = t.gaps + list[i] * t.length * GAP_BYTES;
            const unsigned char *weight = t.entries + list[i] * t.length * ENTRY_BYTES;
            const float input = x[count(order, list[i])];
            float *at = y;
            k = 0;
#if LANES > 1
            for (; k + 4 <= t.length; k += 4) {
                const gaps four_gaps = load_gaps(step + k * GAP_BYTES);
                const quad product = input * four(weight, k, t.bits);
                int j;
                UNROLL
                for (j = 0; j < 4; j++) {
                    at += GAP(four_gaps, j, t.bits);
                    *at += product[j];
                }
            }
#endif
            for (; k < t.length; k++) {
                at += gap(step, k, t.bits);
                *at += input * entry(weight, k, t.bits);
            }
        }
        order += 2 * t.left;
        skip(&t, t.left);
    }
}

/* y += A x, A dense in rows; of `floats`, 32-bit ones whatever type the other layers have. */
KERNEL void dense_rows(const unsigned char *table, const float *x, float *y, int outputs,
                       int inputs, int floats)
{
    int i, k;
    for (i = 0; i < outputs; i++, table += inputs * (floats ? 4 : VALUE_BYTES)) {
        vec sum = {0};
        float part[LANES];
        for (k = 0; k + LANES <= inputs; k += LANES)
            sum += load(x + k) * (floats ? load(table + 4 * k) : values(table, k));
        memcpy(part, &sum, sizeof part);
        for (; k < inputs; k++)
            part[0] += x[k] * (floats ? number(table, k) : value(table, k));
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

/* Scale, add the bias, and cut at 0 if that is wanted: a channel, or outputs one by one. */
KERNEL void finish_channel(float *y, int n, float scale, float bias, int relu)
{
    int i;
    for (i = 0; i < n; i++) {
        const float sum = y[i] * scale + bias;
        y[i] = relu && sum < 0 ? 0 : sum;
    }
}

KERNEL void finish(float *y, int n, const unsigned char *scale, const unsigned char *bias, int relu)
{
    int i;
    for (i = 0; i < n; i++)
        finish_channel(y + i, 1, number(scale, i), number(bias, i), relu);
}
"""

C_CONV = r"""
/* A convolution reads planes. An image is padded and split into stride x stride phases, of which
   phase (y, x) has the pixels (y + i stride, x + j stride): so each tap reads pixels that lie
   side by side. Its output has the pitch of these planes. */

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
#define SPLIT(name, type, PIXEL) \
    KERNEL void name(const type *image, int pitch, int n, float *phases, int stride, int pad, \
                     int side) \
    { \
        int y, x, i; \
        for (y = 0; y < n; y++) { \
            UNROLL \
            for (x = 0; x < stride; x++) { \
                const int top = y + pad, left = x + pad; \
                const int phase = top % stride * stride + left % stride; \
                float *to = phases + (phase * side + top / stride) * side + left / stride; \
                const type *from = image + y * pitch + x; \
                for (i = 0; i < (n - x + stride - 1) / stride; i++) { \
                    const type pixel = from[i * stride]; \
                    to[i] = PIXEL; \
                } \
            } \
        } \
    }
SPLIT(split, float, pixel)
SPLIT(split_relu, float, pixel < 0 ? 0 : pixel)
SPLIT(split_bytes, unsigned char, (float)pixel * @UNIT@)

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
        tap += gap(t->gaps, k, t->bits);
        s->offset[k] = offsets[tap];
        s->weight[k] = entry(t->entries, k, t->bits);
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
    skip(t, 1);
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

C_APART = r"""#define GAP_BYTES 1
#define ENTRY_BYTES VALUE_BYTES
#define gap(table, i, bits) (table)[i]
#define entry(table, i, bits) value(table, i)
#define four(table, i, bits) quads(table, i)
typedef uint32_t gaps; /* four */
#define GAP(four, i, bits) ((four) >> 8 * (i) & 255)

KERNEL gaps load_gaps(const unsigned char *table)
{
    gaps four;
    memcpy(&four, table, 4);
    return four;
}
"""
C_TOGETHER = r"""#define GAP_BYTES 2 /* distance and value share 16 bits */
#define ENTRY_BYTES 2
#define gap(table, i, bits) (count(table, i) & ((1 << (bits)) - 1))
#define entry(table, i, bits) (float)((int16_t)count(table, i) >> (bits))
typedef const unsigned char *gaps; /* here four loads are faster */
#define GAP gap
#define load_gaps(table) (table)
"""
C_VALUES = {
    "fp32": r"""#define VALUE_BYTES 4
#define value number

#if LANES > 1
#define values(table, i) load((table) + 4 * (i))

KERNEL quad quads(const unsigned char *table, int i)
{
    quad v;
    memcpy(&v, table + 4 * i, sizeof v);
    return v;
}
#endif
"""
    + C_APART,
    "fp16": r"""#define VALUE_BYTES 2

KERNEL float value(const unsigned char *table, int i)
{
    const uint32_t half = (uint32_t)count(table, i);
    const uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f * 0x1p112f; /* from the exponents of 32 bits to those of 16 */
}

#if LANES > 1
#define VALUES(name, type, n) \
    KERNEL type name(const unsigned char *table, int i) \
    { \
        VECTOR(uint16_t, n) half; \
        VECTOR(uint32_t, n) bits; \
        type v; \
        memcpy(&half, table + 2 * i, sizeof half); \
        bits = AS(uint32_t, n, half); \
        bits = (bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13; \
        memcpy(&v, &bits, sizeof v); \
        return v * 0x1p112f; \
    }
VALUES(values, vec, LANES)
VALUES(quads, quad, 4)
#endif
"""
    + C_APART,
    "int8": r"""#define VALUE_BYTES 1

KERNEL float value(const unsigned char *table, int i)
{
    return (signed char)table[i];
}

#if LANES > 1
KERNEL vec values(const unsigned char *table, int i) /* in steps, which compilers do well */
{
    VECTOR(signed char, LANES) v;
    memcpy(&v, table + i, sizeof v);
    return AS(float, LANES, AS(int32_t, LANES, AS(int16_t, LANES, v)));
}

KERNEL quad four(const unsigned char *table, int i, int bits)
{
    VECTOR(int16_t, 4) v;
    memcpy(&v, table + 2 * i, sizeof v);
    return AS(float, 4, AS(int32_t, 4, v) >> bits);
}
#endif
"""
    + C_TOGETHER,
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

/* to += an image of n x n pixels. */
KERNEL void add(const float *image, int pitch, int n, float *to)
{
    int y, x;
    for (y = 0; y < n; y++)
        for (x = 0; x < n; x++)
            to[y * n + x] += image[y * pitch + x];
}
"""

C_INIT = r"""
static uint32_t crc32(uint32_t crc, const unsigned char *bytes, size_t size)
{
    int bit;
    for (crc = ~crc; size > 0; size--, bytes++) {
        crc ^= *bytes;
        for (bit = 0; bit < 8; bit++)
            crc = (crc & 1 ? 0xedb88320u : 0) ^ crc >> 1;
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

C_ACTOR = r"""
void agent_act(agent_state *s, const float *observation, float *action)
{
    const unsigned char *w = s->weights;
    int a;
@BODY@
    for (a = 0; a < AGENT_ACTIONS; a++)
        action[a] = tanhf(s->output[a]);
}
"""

C_Q = r"""
const float *agent_q_values(agent_state *s, const unsigned char *observation)
{
    const unsigned char *w = s->weights;
    float *plane;
    int c;
@BODY@
    return s->@Q@;
}

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
    for (c = 0; c < AGENT_ACTIONS; c++) {
        const float *logits = s->output + 51 * c;
        float most = logits[0], total = 0, mean = 0;
        int i;
        for (i = 1; i < 51; i++)
            if (logits[i] > most)
                most = logits[i];
        for (i = 0; i < 51; i++) {
            const float share = expf(logits[i] - most);
            total += share;
            mean += share * (0.4f * (float)i - 10);
        }
        s->q[c] = mean / total;
    }"""

C_NORM = r"""
    /* Features of length 1. */
    {
        float norm = 0;
        for (c = 0; c < @UNITS@; c++)
            norm += s->dense[c] * s->dense[c];
        norm = 1 / (sqrtf(norm) > 1e-12f ? sqrtf(norm) : 1e-12f);
        for (c = 0; c < @UNITS@; c++)
            s->dense[c] *= norm;
    }"""


def fill(template: str, **texts: object) -> str:
    """Return a template with each @NAME@ replaced by its text."""
    return re.sub("@([A-Z]+)@", lambda match: str(texts[match[1].lower()]), template)


class Program:
    """Writes agent.h and agent.c for a network, and notes the buffers that they need."""

    def __init__(self, network: Network, kind: str, blob: bytes) -> None:
        self.network, self.kind, self.blob = network, kind, blob
        self.convs = [layer for layer in network.layers if layer.weight.ndim == 4]
        self.buffers: dict[str, tuple[str, int]] = {}
        self.taps, self.body = list[str](), list[str]()

    def buffer(self, name: str, size: int, of: str = "float") -> str:
        """Reserve a buffer in the state; return the C expression for it."""
        name = name.replace(".", "_")
        known = self.buffers.get(name, (of, 0))[1]
        self.buffers[name] = (of, max(size, known))
        return f"s->{name}"

    def table(self, layer: Layer) -> str:
        """Return the C expression for a sparse layer's lines."""
        groups, values = layer.parts["groups"], layer.parts["values"]
        gaps = layer.parts.get("gaps", values)
        return f"(lines){{w + {groups}, w + {gaps}, w + {values}, {layer.bits}, 0, 0}}"

    def matrix(self, layer: Layer, source: str) -> str:
        """Write the product with a matrix; return the C expression for the outputs."""
        parts, (outputs, inputs) = layer.parts, layer.weight.shape
        to = self.buffer(layer.name, outputs)
        if layer.kernel == COLUMNS:
            order = self.buffer("list", inputs, "uint16_t")
            call = f"sparse_columns({self.table(layer)},\n                   {layer.groups}, "
            call += f"w + {parts['order']}, {source}, {to}, {order})"
        elif layer.kernel == ROWS:
            call = f"sparse_rows({self.table(layer)}, {source}, {to}, {outputs})"
        else:
            name = "dense_columns" if layer.kernel == DENSE_COLUMNS else "dense_rows"
            call = f"{name}(w + {parts['values']}, {source}, {to}, {outputs}, {inputs}"
            call += f", {int(layer.kernel == FLOAT_ROWS)})" if name == "dense_rows" else ")"
        ends = f"w + {parts['scale']}, w + {parts['bias']}, {int(layer.relu)}"
        self.body += [
            f"\n    /* {layer.name}: {inputs} to {outputs}, {layer.density:.1%} dense */",
            f"    memset({to}, 0, sizeof {to});",
            f"    {call};",
            f"    finish({to}, {outputs}, {ends});",
        ]
        return to

    def conv(self, layer: Layer, sink: str) -> None:
        """Write a convolution; `sink` is the statement that consumes the plane of channel c."""
        parts, (channels, inputs, size, _) = layer.parts, layer.weight.shape
        taps, source = inputs * size**2, self.phases(layer)[0]
        length = (layer.side - 1) * layer.pitch + layer.side
        offsets = self.buffer(f"{layer.name}_taps", taps, "int")
        shape = f"{inputs}, {size}, {layer.stride}, {layer.pitch}"
        self.taps.append(f"    tap_offsets({offsets}, {shape});\n")
        rest = f"{source}, {offsets}, {length}, &s->scratch"
        title = f"{channels} channels of {size}x{size}x{inputs} taps"
        self.body.append(f"\n    /* {layer.name}: {title}, {layer.density:.1%} dense */")
        if layer.kernel == ROWS:
            name = layer.name.replace(".", "_")
            self.body.append(f"    lines {name} = {self.table(layer)};")
            call = f"sparse_conv(&{name}, {rest})"
        else:
            call = f"dense_conv(w + {parts['values']}, c, {channels}, {taps},\n"
            call += f"                           {rest})"
        scale = f"number(w + {parts['scale']}, c), number(w + {parts['bias']}, c)"
        self.body += [
            f"    for (c = 0; c < {channels}; c++) {{",
            f"        plane = {call};",
            f"        finish_channel(plane, {length}, {scale}, {int(layer.relu)});",
            f"        {sink}",
            "    }",
        ]

    def phases(self, layer: Layer) -> tuple[str, str]:
        """Return the buffer that a convolution reads, and split()'s last arguments."""
        channels, area = layer.weight.shape[1], (layer.pitch * layer.stride) ** 2
        name = self.buffer(f"{layer.name}_in", channels * area + SLACK)
        return name, f"{name} + c * {area}, {layer.stride}, {layer.pad}, {layer.pitch}"

    def spread(self, split: str, image: str, side: int, layer: Layer) -> None:
        """Write the copy of an image into the buffer that a convolution reads."""
        channels, phases = layer.weight.shape[1], self.phases(layer)[1]
        self.body += [
            f"\n    for (c = 0; c < {channels}; c++)",
            f"        {split}({image} + c * {side**2}, {side}, {side}, {phases});",
        ]

    def forward(self) -> None:
        """Write the whole network, from `observation` on."""
        network, convs, source = self.network, self.convs, "observation"
        if convs:
            self.spread("split_bytes", source, network.obs[1], convs[0])
        plain = [] if network.family == IMPALA else network.layers[: len(convs) + 1]
        for layer, after in pairwise(plain):
            to = self.phases(after)[1] if after in convs else ""
            if after not in convs:
                source = self.buffer("features", len(layer.bias) * layer.side**2)
                to = f"{source} + c * {layer.side**2}, 1, 0, {layer.side}"
            self.conv(layer, f"split(plane, {layer.pitch}, {layer.side}, {to});")
        if network.family == IMPALA:
            source = self.impala()
        for layer in network.layers[len(convs) :]:
            if layer is network.layers[-1] and network.head == NORMALISED_Q:
                self.body.append(fill(C_NORM, units=layer.weight.shape[1]))
            source = self.matrix(layer, source)
        if network.head == DISTRIBUTION:
            self.body.append(C_DISTRIBUTION)
            self.buffer("q", network.actions)

    def impala(self) -> str:
        """Write the three stacks; return the C expression for the features."""
        for i in range(3):
            entry, *blocks = self.convs[5 * i : 5 * i + 5]
            side = blocks[0].side
            trunk = self.buffer(f"trunk{i + 1}", len(entry.bias) * side**2)
            here = f"{trunk} + c * {side**2}"
            pad = int(i == 2)
            self.conv(entry, f"pool(plane, {entry.pitch}, {entry.side}, {here}, {side}, {pad});")
            for first, second in (blocks[:2], blocks[2:]):
                self.spread("split_relu", trunk, side, first)
                self.conv(first, f"split(plane, {side + 2}, {side}, {self.phases(second)[1]});")
                self.conv(second, f"add(plane, {second.pitch}, {side}, {here});")
            if i < 2:
                self.spread("split", trunk, side, self.convs[5 * i + 5])
        self.body.append(f"    finish_channel({trunk}, {len(entry.bias) * side**2}, 1, 0, 1);")
        return trunk

    def write(self, out: Path) -> None:
        """Write agent.h, agent.c and agent_weights.c."""
        network, convs, (channels, side) = self.network, self.convs, self.network.obs
        actor, atari = network.head == TANH, side == 84
        self.forward()
        buffers = [f"    {of} {name}[{size}];\n" for name, (of, size) in self.buffers.items()]
        defines: dict[str, object] = {
            "ACTIONS": network.actions,
            "OBSERVATION": channels * side * side,
        }
        defines |= {"FRAMES": channels} if atari else {}
        scratch = ""
        if convs:
            planes = [(c.side - 1) * c.pitch + c.side + SLACK for c in convs]
            defines |= {"PLANE": max(planes)}
            scratch = fill(C_SCRATCH, taps=max(layer.weight[0].size for layer in convs))
            buffers.append("    agent_scratch scratch;\n")
        if atari:
            buffers.append(f"    unsigned char frames[{channels * side * side}];\n")
        crc = struct.unpack_from("<I", self.blob, 12)[0]
        defines |= {"WEIGHTS_BYTES": len(self.blob), "CRC": f"0x{crc:08x}u"}
        title = f"{network.env_id or 'agent'}, {self.kind}"
        texts: dict[str, str] = {
            "defines": "".join(f"#define AGENT_{k} {v}\n" for k, v in defines.items()),
            "act": C_ACTOR_API if actor else C_Q_API,
            "frames": C_FRAMES_API if atari else "",
        }
        header = fill(C_HEADER, title=title, scratch=scratch, state="".join(buffers), **texts)
        code = f'/* {title}. Generated by export.py. */\n\n#include "agent.h"\n\n'
        code += "#include <math.h>\n#include <string.h>\n"
        code += fill(C_KERNELS, value=C_VALUES[self.kind])
        code += fill(C_CONV, unit="(1 / 255.0f)" if atari else "1") if convs else ""
        code += C_POOL if network.family == IMPALA else ""
        code += fill(C_INIT, taps="".join(self.taps)) + (C_FRAMES if atari else "")
        q = "q" if network.head == DISTRIBUTION else "output"
        code += fill(C_ACTOR if actor else C_Q, body="\n".join(self.body), q=q)
        (out / "agent.h").write_text(header)
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

@DEFINES@@SCRATCH@
typedef struct {
    const unsigned char *weights;
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
C_SCRATCH = r"""
/* Room for one convolution at a time. */
typedef struct {
    int offset[@TAPS@];
    float weight[4 * @TAPS@], plane[4 * AGENT_PLANE];
} agent_scratch;
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
    """Return C with these bytes as string literals, which compile far faster than numbers."""
    plain = [32 <= i < 127 and i not in b'"\\?' for i in range(256)]  # ?: trigraphs
    text = [chr(i) if plain[i] else f"\\{i:03o}" for i in range(256)]
    lines = ["".join(text[i] for i in blob[at : at + 64]) for at in range(0, len(blob), 64)]
    rows = ['"\n     "'.join(lines[i : i + 63]) for i in range(0, len(lines), 63)]
    return fill(C_TABLE, count=len(rows), rows=",\n    ".join(f'"{row}"' for row in rows))


C_TABLE = r"""/* The content of agent.bin. */

#include "agent.h"

#if defined(__GNUC__) && __GNUC__ >= 15
#define BYTES __attribute__((nonstring))
#else
#define BYTES
#endif

/* Rows, because C99 promises no string longer than 4,095; without closing zeros. */
static const char table[@COUNT@][4032] BYTES = {
    @ROWS@};

const unsigned char *const agent_weights = (const unsigned char *)table;
"""

PY_AGENT = r'''"""An exported agent without torch: by agent.c where there is a compiler, else NumPy.

    agent = Agent()                   # of the folder that this file is in
    action = agent.act(observation)   # [4, 84, 84] uint8; MinAtar [C, 10, 10]; an actor: [O] floats

An agent may be shared by threads; they compute in turn. Generated by export.py; docs/export.md
describes agent.bin, which it reads.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
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
        self.path = self.folder / "agent.bin"
        self.data = np.fromfile(self.path, np.uint8)
        if len(self.data) < HEADER.size:
            raise ValueError(f"{self.path}: too short")
        magic, version, self.family, self.head, size, crc, *rest = HEADER.unpack(self.data[:64])
        self.num_layers, self.actions, channels, side, kind, _, env_id = rest
        if magic != b"CRSA" or version != 1:
            raise ValueError(f"{self.path}: not of version 1, which this agent.py reads")
        if size != len(self.data) or zlib.crc32(self.data[16:], zlib.crc32(self.data[:12])) != crc:
            raise ValueError(f"{self.path}: damaged (its CRC does not fit)")
        if self.family > 3 or self.head > 3 or kind > 2:
            raise ValueError(f"{self.path}: unknown network, output or type of weights")
        self.env_id, self.type = env_id.rstrip(b"\0").decode(), TYPES[kind]
        self.shape = (channels, side, side) if self.family != ACTOR else (channels,)
        self.unit = np.float32(1 / 255 if side == 84 else 1)
        self._layers, self._library, self._lock = None, None, threading.Lock()
        try:
            self._library = compiled(self.folder) if use_c else None
        except OSError as error:
            print(f"agent.py: NumPy computes, which is slower: {error}", file=sys.stderr)
        if self._library:
            self._state = ctypes.create_string_buffer(self._library.agent_state_size())
            table = ctypes.c_void_p(self.data.ctypes.data)
            self._observation = np.zeros(self.shape, np.uint8 if self.family else np.float32)
            self._values = np.zeros(self.actions, np.float32)
            arrays = [self._observation] if self.family else [self._observation, self._values]
            self._arguments = [ctypes.byref(self._state)]
            self._arguments += [ctypes.c_void_p(array.ctypes.data) for array in arrays]
            if self._library.agent_init(self._state, table, ctypes.c_size_t(size)):
                raise ValueError(f"{self.folder / 'agent.c'}: made for another agent.bin")
            self._compute = self._library.agent_act
            if self.family:
                self._compute = self._library.agent_q_values
                place = self._compute(*self._arguments)  # in the state, always the same
                self._values = np.ctypeslib.as_array(place, (self.actions,))

    def act(self, observation):
        """Return the greedy action, or the action vector [actions] of an actor, in [-1, 1]."""
        if self.family == ACTOR or not self._library:
            values = self.q_values(observation)
            return values if self.family == ACTOR else int(values.argmax())
        self._check(observation)
        with self._lock:
            self._observation[...] = observation
            return self._library.agent_act(*self._arguments)

    def q_values(self, observation):
        """Return the Q-values [actions] (an actor: its action vector)."""
        self._check(observation)
        if not self._library:
            return self._forward(np.asarray(observation, np.float32))
        with self._lock:
            self._observation[...] = observation
            self._compute(*self._arguments)
            return self._values.copy()

    def _check(self, observation):
        """Refuse what NumPy would stretch to the right shape, scaled pixels, cells not 0 or 1."""
        if np.shape(observation) != self.shape:
            raise ValueError(f"observation {np.shape(observation)}: must be {self.shape}")
        x = np.asarray(observation)
        if self.unit != 1 and x.dtype != np.uint8:
            raise ValueError(f"observation of {x.dtype}: must be uint8, grays from 0 to 255")
        if self.family == MINATAR and x.dtype != bool and (x != (x != 0)).any():
            raise ValueError("observation: its cells must be 0 or 1")

    def layers(self):
        """Return the layers as dictionaries, with dense `weight` and `bias`."""
        if self._layers is None:
            heads = [self.data[64 + 44 * i :][:44].tobytes() for i in range(self.num_layers)]
            try:
                self._layers = [self._decode(dict(zip(FIELDS, LAYER.unpack(h)))) for h in heads]
            except (IndexError, MemoryError, ValueError, struct.error) as error:
                raise ValueError(f"{self.path}: no network of export.py ({error})") from error
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
            kind = np.dtype(kind).newbyteorder("<")
            place += -place % kind.itemsize
            start, place = place, place + count * kind.itemsize
            return self.data[start:place].view(kind)

        bits, layer["kernel"] = divmod(layer["kernel"], 16)
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
            if self.type is np.int8:  # distance and value share 16 bits
                values = take(layer["entries"], np.int16)
                gaps, values = values & ((1 << (bits or 8)) - 1), values >> (bits or 8)
            else:
                gaps, values = take(layer["entries"], np.uint8), take(layer["entries"], self.type)
            index = np.cumsum(gaps, dtype=int)
            base = np.concatenate([[0], index])[np.cumsum(lengths) - lengths]
            weight = np.zeros(shape, np.float32)
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
    """Return agent.c as a library, compiled once into the user's cache; OSError says why not."""
    try:
        compiler = shlex.split(os.environ.get("CC", ""))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    except (ValueError, RuntimeError) as error:  # a quotation without an end; a user without home
        raise OSError(f"CC, XDG_CACHE_HOME: {error}") from error
    compiler = compiler or [x for x in map(shutil.which, ("cc", "gcc", "clang")) if x][:1]
    if not compiler:
        raise OSError("no C compiler")
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = [x for x in lines if x.startswith(("flags", "Feat"))]
    sources = {name: (folder / name).read_bytes() for name in ("agent.h", "agent.c")}
    text = repr([platform.machine(), compiler, FLAGS, features, sources])
    cache /= "cleanrl-sparse"
    library = cache / f"agent-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        cache.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:  # another process may do the same
            for name, source in sources.items():  # the files may change meanwhile
                Path(place, name).write_bytes(source)
            for extra in (["-march=native"], []):
                command = [*compiler, *FLAGS, *extra, f"{place}/agent.c"]
                command += ["-o", f"{place}/agent.so", "-lm"]
                result = subprocess.run(command, capture_output=True, text=True, errors="replace")
                if result.returncode == 0:
                    break
            else:
                reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
                raise OSError(f"{shlex.join(compiler)} cannot compile agent.c: {reason}")
            os.replace(f"{place}/agent.so", library)
    if library.stat().st_uid != os.getuid():
        raise OSError(f"{library} is another user's")
    try:
        found = ctypes.CDLL(str(library))
        found.agent_state_size.restype = ctypes.c_size_t
    except (OSError, AttributeError) as error:  # damaged: the next time it is compiled anew
        library.unlink(missing_ok=True)
        raise OSError(f"{library}: {error}") from error
    if hasattr(found, "agent_q_values"):
        found.agent_q_values.restype = ctypes.POINTER(ctypes.c_float)
    return found
'''


def observations(network: Network, count: int, seed: int, act: Any) -> np.ndarray:
    """Return `count` different observations, or fewer if 20 * count steps do not show as many.

    8 episodes run side by side; a tenth of their actions is random. `act` maps observations
    [8, ...] to actions [8] or [8, A].
    """
    rng, found = np.random.default_rng(seed), dict[bytes, np.ndarray]()
    envs: Any
    if network.family == MINATAR:
        return minatar_observations(network, count, seed, act)
    if network.family == ACTOR:
        import mujoco

        mujoco.set_mju_user_warning(lambda x: "deprecated" in x or sys.stderr.write(f"{x}\n"))
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
    envs.action_space.seed(int(rng.integers(2**31)))  # not the numbers that rng draws
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
    """Return the same for MinAtar, from one episode after another."""
    logging.disable()  # else it warns that it cannot draw without seaborn
    from minatar import Environment

    logging.disable(logging.NOTSET)
    name = re.sub(r"^MinAtar/|-v[01]$|_", "", network.env_id).lower()
    env = Environment(name.replace("spaceinvaders", "space_invaders"))
    env.seed(seed)
    env.reset()
    rng, moves, found = np.random.default_rng(seed), env.minimal_action_set(), {}
    for _ in range(20 * count):
        obs = env.state().transpose(2, 0, 1).astype(bool)
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
    """Write all files of an agent; return the network, the units dropped, and agent.bin."""
    network = network_of(flags, weights)
    long = f"{network.env_id}: the environment's name must have at most 32 bytes"
    require(len(network.env_id.encode()) <= 32, long)
    finite = all(
        np.isfinite(x).all() for layer in network.layers for x in (layer.weight, layer.bias)
    )
    require(finite, "the network has weights that are not finite")
    largest = max(float(np.abs(layer.weight).max()) for layer in network.layers)
    require(kind != "fp16" or largest < 65504, f"--fp16: a weight of {largest:.3g} is too large")
    dropped = drop_units(network)
    blob = write_weights(network, kind)
    out.mkdir(parents=True, exist_ok=True)
    (out / "agent.bin").write_bytes(blob)
    (out / "agent.py").write_text(PY_AGENT)
    (out / "agent.onnx").unlink(missing_ok=True)  # an earlier export's
    Program(network, kind, blob).write(out)
    return network, dropped, blob


def write_onnx(flags: dict[str, Any], weights: dict[str, Tensor], path: Path) -> None:
    """Write the dense network as ONNX: `observation` [1, ...] float32, pixels from 0 to 255."""

    class Whole(torch.nn.Module):
        """The network with the scaling of its input."""

        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                self.register_buffer(name.replace(".", "/"), weight)

        def forward(self, obs: Tensor) -> Tensor:
            """Return Q-values or mean actions."""
            own = {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}
            return mean_actions(own, obs) if actor else q_values(own, flags, obs / unit)

    network = network_of(flags, weights)
    channels, side = network.obs
    actor, unit = network.family == ACTOR, 255 if side == 84 else 1
    obs = torch.zeros(1, channels) if actor else torch.zeros(1, channels, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = ["action" if actor else "q_values"]
        names: Any = {"input_names": ["observation"], "output_names": outputs}
        torch.onnx.export(Whole(), (obs,), path, dynamo=False, opset_version=17, **names)


def require(accepted: bool, line: str, status: int = 2) -> None:
    """Unless `accepted`, exit with a line that names the flag or file and what is accepted."""
    if not accepted:
        tqdm.write(f"{Path(__file__).name}: {line}", sys.stderr)
        sys.exit(status)


@torch.no_grad()
def main(args: Args) -> None:
    """Export, compare and print."""
    out = args.out or args.run_dir / "export"
    kind = "int8" if args.int8 else "fp16" if args.fp16 else "fp32"
    installed = not args.onnx or importlib.util.find_spec("onnx")
    require(bool(installed), "--onnx: needs the package onnx (pip install onnx)")
    try:
        flags, weights = load_model(args.run_dir)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        line = f"no finished run is there ({str(error).splitlines()[0]})"
        require(False, f"{args.run_dir}: {line}")
    require(out.resolve() != args.run_dir.resolve(), f"--out {out}: is RUN_DIR; give another")
    try:
        network, dropped, blob = export(flags, weights, out, kind)
    except OSError as error:
        require(False, f"--out {out}: cannot be written ({error})")
    except KeyError as error:
        require(False, f"{args.run_dir}: no network of these scripts ({error} is missing)")

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
    print(f"agent.bin ({kind}): {size:,} bytes; the network dense and in fp32:")
    print(f"{len(dense):,} ({len(dense) / size:.1f}x), zipped {zipped:,} ({zipped / size:.1f}x)")
    if args.onnx:
        write_onnx(flags, weights, out / "agent.onnx")
    if args.observations:
        act = outputs if network.family == ACTOR else lambda obs: outputs(obs).argmax(1)
        try:
            obs = observations(network, args.observations, args.seed, act)
        except Exception as error:  # of any kind: a missing package, a removed environment
            reason = " ".join(str(error).split())
            hint = f"{out} is written; --observations 0 skips the comparison"
            require(False, f"{network.env_id} cannot be played: {reason} ({hint})")
        parts = np.array_split(obs, -(-len(obs) // 50))
        expected, rounding = np.concatenate([outputs(part) for part in parts]), 0.0
        if network.family == ACTOR:  # torch's own error: some observations are in the thousands
            double = {name: weights[name].double() for name in names}
            exact = mean_actions(double, torch.from_numpy(obs).double()).numpy()
            rounding = float(np.abs(expected - exact).max())
        for use_c in (True, False):
            agent = load_agent(out, use_c)
            found = np.array([agent.q_values(x) for x in obs])
            largest = float(np.abs(found - expected).max())
            agree = np.sum(found.argmax(1) == expected.argmax(1))
            if network.family == ACTOR:
                agree = np.sum(np.abs(found - expected).max(1) <= 0.01)
            times = []
            for x in obs:
                start = time.perf_counter()
                agent.act(x)
                times.append(time.perf_counter() - start)
            how = "C" if agent._library else "NumPy"
            what = "within 0.01" if network.family == ACTOR else "as torch's"
            text = f"{how}: {agree} of {len(obs)} actions {what}, differences up to {largest:.0e}"
            print(f"{text}, {np.median(times) * 1e6:.1f} us each")
            close = largest <= max(10 * rounding, 1e-5 * max(1, float(np.abs(expected).max())))
            line = f"{out}: {how} and torch disagree; this is a fault of export.py"
            require(kind != "fp32" or close, line, 1)
        if agree < 0.99 * len(obs) and kind != "fp32":
            print(f"{kind} changes more than 1 % of the actions: try without --{kind}")
    print(f"written to {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently at `| head`
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
