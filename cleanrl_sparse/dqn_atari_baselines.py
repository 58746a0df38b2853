# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "ale-py>=0.12.1", "gymnasium>=1.2", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""DQN on Atari with the baselines that gradual magnitude pruning is compared with.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned
network is a good network", ICML 2024, arXiv 2402.12479, figures 12, 13, 22 and 24 to 27. The agent
is the one in dqn_atari_gmp.py.

    python dqn_atari_baselines.py --sparsity 0 --regulariser redo --network impala --width 3
    python dqn_atari_baselines.py --pruner rigl --prune-every 5000 --network impala --width 3
    python dqn_atari_baselines.py --pruner lottery --lottery-mask RUN_DIR --network impala --width 3
    python dqn_atari_baselines.py --resume RUN_DIR

Sparse training (--pruner), all at --sparsity: gmp, gradual magnitude pruning; static, random masks
from the start; set (Mocanu et al. 2018) and rigl (Evci et al. 2020), which start like static and
every --prune-every gradient steps replace the smallest weights by random ones or by those with the
largest gradients; lottery (Frankle and Carbin 2019), the final mask of another run on that run's
initial weights.

Regularisation (--regulariser): weight-decay, within Adam; l2-features, features of length 1 (Kumar
et al. 2021); redo, dormant units are reinitialised (Sokar et al. 2023); reset, the last layers are
reinitialised (Nikishin et al. 2022).

Differences from the papers, and guesses ([C] read in the paper, [I] inferred, [D] our decision):
 1. [C] RigL and SET first replace 0.3 of a layer's weights, then fewer along a cosine until
    --prune-end.
 2. [D] RigL takes the gradients from a batch drawn for it; a regrown weight starts at 0 with
    moments of 0.
 3. [I] ReDo acts every 1,000 gradient steps, with a threshold of 0.1 [C], on 64 states; [D] on
    units between exactly two layers: in the ResNet those inside its blocks and the dense ones.
 4. [D] A reset, every 100,000 gradient steps [C], also zeroes Adam's moments and is applied to the
    target network.
 5. [D] Masks, schedule, width and environments are as in dqn_atari_gmp.py.

Figures: benchmark/gmp_figure12.sh, 13, 22, 24 to 27. More: docs/dqn_atari_baselines.md.
"""

from __future__ import annotations

import copy
import ctypes
import difflib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, make_dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class Training:
    """The agent and its game. A step is one decision in one environment: 4 frames."""

    env_id: str = "Breakout"  # game, e.g. MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4
    seed: Index = 1  # random seed
    total_timesteps: Count = 10_000_000  # total steps, summed over all environments
    learning_starts: Count = 20_000  # steps of random play before the first gradient step
    buffer_size: Count = 1_000_000  # transitions in the replay, each 7.1 KB of memory
    batch_size: Count = 32  # transitions per gradient step
    learning_rate: Rate = 6.25e-5  # Adam's step size
    adam_eps: Rate = 1.5e-4  # Adam's epsilon
    gamma: Share = 0.99  # discount factor
    n_step: Count = 1  # rewards summed before bootstrapping
    replay_ratio: Rate = 0.25  # gradient steps per environment step
    target_every: Count = 8_000  # steps between target updates
    epsilon_end: Share = 0.01  # final probability of a random action
    epsilon_steps: Count = 250_000  # steps over which epsilon decays from 1, after the random play
    epoch_steps: Count = 250_000  # steps per epoch; the mean return of each is reported
    num_envs: Count = 1  # environments; if several, they step while the agent learns
    network: Literal["cnn", "impala"] = "cnn"  # DQN's convolutions or the 15-layer ResNet
    width: Count = 1  # factor on the convolutions' channels; the paper: 1 to 5, mainly 3
    feature_size: Count = 512  # units of the dense layer
    eval_episodes: Index = 10  # episodes of the final evaluation, at epsilon 0.001; 0: none
    eval_steps: Count = 27_000  # steps after which an evaluation episode is cut off


Regulariser = Literal["none", "weight-decay", "l2-features", "redo", "reset"]


@dataclass
class Method:
    """The baselines; their defaults are the paper's."""

    pruner: Literal["gmp", "rigl", "set", "static", "lottery"] = "gmp"  # sparse training method
    regulariser: Regulariser = "none"  # regularisation method
    lottery_mask: str = ""  # lottery: folder of a finished run with this seed, network and sizes
    sparsity: Share = 0.95  # share of the prunable weights that are zero; lottery: the mask's
    prune_start: Share = 0.2  # gmp: share of the run's gradient steps before pruning begins
    prune_end: Share = 0.8  # gmp, rigl, set: share after which the masks are fixed
    prune_every: Count = 1000  # gmp, rigl, set: gradient steps between mask updates; RigL: 5,000
    weight_decay: Amount = 1e-5  # weight-decay: factor in Adam
    redo_threshold: Share = 0.1  # redo: a unit is dormant up to this share of its layer's mean
    reset_every: Count = 100_000  # reset: gradient steps between resets
    reset_layers: Literal["last", "penultimate", "both"] = "last"  # reset: layers to reinitialise


# >>> forked: networks (features of length 1)
class Stack(nn.Module):
    """A convolution, a pooling and two residual blocks of Impala (Espeholt et al. 2018)."""

    def __init__(self, c_in: int, c_out: int, padding: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=padding, ceil_mode=True)
        self.blocks = nn.ModuleList(nn.Conv2d(c_out, c_out, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor, hidden: list[Tensor]) -> Tensor:
        """Halve the sides of x [B, c_in, H, H]; append each ReLU's output to `hidden`."""
        x = self.pool(self.entry(x))
        for first, second in (self.blocks[:2], self.blocks[2:]):
            hidden.append(torch.relu(x))
            hidden.append(torch.relu(first(hidden[-1])))
            x = x + second(hidden[-1])
        return x


class QNetwork(nn.Module):
    """Q-values of stacked frames, in Dopamine's form; convolutions of DQN or of Impala."""

    def __init__(self, num_actions: int, args: Args) -> None:
        super().__init__()
        self.network, c = args.network, 32 * args.width
        self.normalise = args.regulariser == "l2-features"
        if args.network == "cnn":  # Mnih et al. 2015
            self.conv1 = nn.Conv2d(4, c, 8, stride=4, padding=2)  # 84 -> 21
            self.conv2 = nn.Conv2d(c, 2 * c, 4, stride=2)  # 21 -> 11
            self.conv3 = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        else:  # 15 layers without normalisation
            self.stack1 = Stack(4, c // 2, 0)  # 84 -> 42
            self.stack2 = Stack(c // 2, c, 0)  # 42 -> 21
            self.stack3 = Stack(c, c, 1)  # 21 -> 11
        channels = 2 * c if args.network == "cnn" else c
        self.dense = nn.Linear(11 * 11 * channels, args.feature_size)
        self.output = nn.Linear(args.feature_size, num_actions)
        for name, p in self.named_parameters():
            std = math.sqrt(p.shape[0] / p.numel()) / 0.87962566
            if p.ndim == 1:
                nn.init.zeros_(p)
            elif "blocks" in name:  # LeCun normal, truncated at two standard deviations
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.xavier_uniform_(p)

    def hidden(self, obs: Tensor) -> list[Tensor]:
        """Return the outputs of the hidden ReLUs for obs [B, 4, 84, 84], floats in [0, 1].

        The last are the features [B, feature_size]. The ReLU after Impala's last block is not
        among them: dormant units are counted as in ReDo's own code (Sokar et al. 2023).
        """
        hidden = list[Tensor]()
        if self.network == "cnn":
            hidden.append(torch.relu(self.conv1(obs)))
            x = nn.functional.pad(hidden[0], (1, 2, 1, 2))  # as XLA's SAME: odd pixel at the end
            hidden.append(torch.relu(self.conv2(x)))
            hidden.append(torch.relu(self.conv3(hidden[1])))
            x = hidden[2]
        else:
            x = self.stack1(obs, hidden)
            x = self.stack2(x, hidden)
            x = torch.relu(self.stack3(x, hidden))
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels-last order needs no copy
        return [*hidden, torch.relu(self.dense(x))]

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions]."""
        x = self.hidden(obs)[-1]
        x = nn.functional.normalize(x, dim=1) if self.normalise else x
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to rank actions
            return self.output(x.to(self.output.weight.dtype))


# <<< forked: networks
# >>> shared: sparsity
def prunable(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that may be pruned, by layer: matrices and kernels."""
    return {k.removesuffix(".weight"): p for k, p in network.named_parameters() if p.ndim >= 2}


def add_masks(network: nn.Module) -> None:
    """Give each prunable weight a mask (1: kept), a buffer and so part of state_dict()."""
    for i, weight in enumerate(prunable(network).values()):
        network.register_buffer(f"mask{i}", torch.ones_like(weight))


def sparsity_report(network: nn.Module) -> dict[str, float]:
    """Return the sparsity of network and layers, and how many parameters are left."""
    weights, total = prunable(network), sum(p.numel() for p in network.parameters())
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    pruned, size = sum(zeros.values()), sum(weight.numel() for weight in weights.values())
    report = {"prunable": pruned / size, "total": pruned / total, "active_params": total - pruned}
    report |= {f"layer/{name}": zeros[name] / w.numel() for name, w in weights.items()}
    return {f"sparsity/{key}": float(value) for key, value in report.items()}


# <<< shared: sparsity
# >>> shared: pruning
def pruning_scores(network: nn.Module, rng: np.random.Generator) -> list[Tensor]:
    """Return a score, of any sign, for each prunable weight; the lowest are pruned first.

    Put your own criterion here (docs/pruning_criterion.md); draw random numbers from `rng` only.
    """
    return [weight.abs() for weight in prunable(network).values()]


def erk_densities(network: nn.Module, sparsity: float) -> list[float]:
    """Return the share of each prunable tensor to keep, for a total sparsity in [0, 1].

    The Erdos-Renyi-Kernel rule (Evci et al. 2020): eps * sum(shape) / prod(shape), with eps chosen
    to meet the total; a tensor whose share would exceed 1 stays dense, and eps is solved for again.
    """
    sizes = np.array([weight.numel() for weight in prunable(network).values()])
    sums = np.array([sum(weight.shape) for weight in prunable(network).values()])
    dense = np.zeros(len(sizes), bool)
    for _ in sizes:  # each pass may make another tensor dense
        left = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        eps = left / max(1, sums[~dense].sum())
        dense |= eps * sums >= sizes
    return np.where(dense, 1.0, eps * sums / sizes).tolist()


@torch.no_grad()
def prune(network: nn.Module, densities: list[float], rng: np.random.Generator) -> None:
    """Shrink the masks, the network's only buffers, to these densities; the weights do not change.

    Counts are exact, ties keep the lower index, every tensor keeps a weight. What is pruned already
    scores -inf and stays pruned; no score may be NaN.
    """
    for score, mask, density in zip(pruning_scores(network, rng), network.buffers(), densities):
        flat = torch.where(mask > 0, score, -math.inf).flatten().cpu().numpy()
        count = max(1, round(len(flat) * density))
        threshold = np.partition(flat, -count)[-count]  # far faster than sorting
        keep = flat > threshold
        keep[np.flatnonzero(flat == threshold)[: count - keep.sum()]] = True
        mask.mul_(torch.from_numpy(keep).view(mask.shape).to(mask.device))


# <<< shared: pruning
# >>> shared: schedule
def pruning_progress(step: int, start: int, end: int) -> float:
    """Return the share of the final sparsity due at a gradient step, in [0, 1].

    1 - (1 - (t - t0) / (t1 - t0)) ** 3
    """
    if not start <= step < end:
        return float(step >= end)
    return 1 - (1 - (step - start) / (end - start)) ** 3


# <<< shared: schedule
def largest(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` largest scores, ties broken by lower index."""
    flat = scores.flatten().cpu().numpy()
    threshold = np.partition(flat, -count)[-count]
    keep = flat > threshold
    keep[np.flatnonzero(flat == threshold)[: count - keep.sum()]] = True
    return torch.from_numpy(keep).view(scores.shape).to(scores.device)


class DQN(nn.Module):
    """The online network with its masks, and the target network."""

    def __init__(self, args: Args, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.num_actions, self.device = args, num_actions, device
        torch.manual_seed(args.seed)
        self.online = QNetwork(num_actions, args)
        add_masks(self.online)
        self.online.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.target = copy.deepcopy(self.online)
        self.weights = list(prunable(self.online).values())
        self.masks = list(self.online.buffers())
        adam: Any = {"lr": args.learning_rate, "eps": args.adam_eps, "capturable": args.compile}
        decays = args.regulariser == "weight-decay"
        adam["weight_decay"] = args.weight_decay if decays else 0.0
        self.optimizer = torch.optim.Adam(self.online.parameters(), fused=True, **adam)
        self.latest = nn.Buffer(torch.zeros(2, device=device))  # loss and mean Q-value
        self.gradient_step, self.sparsity = 0, 0.0  # the schedule's sparsity
        steps = math.ceil(args.total_timesteps / args.num_envs) * args.num_envs
        updates = max(1, self.updates_by(steps))  # of the whole run
        self.start = min(updates - 1, round(args.prune_start * updates))
        self.end = min(updates - 1, round(args.prune_end * updates))
        # A generator for each use of randomness; SET, ReDo and resets get a new one each time.
        uses = ("act", "score")
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.graph: torch.cuda.CUDAGraph | None = None
        begun = args.resume and any(Path(args.resume, "checkpoint").glob("[0-9]*"))
        if not begun and args.pruner != "gmp":  # else they are in the checkpoint
            self.start_sparse()

    @torch.no_grad()
    def start_sparse(self) -> None:
        """Set the first masks: random ones with exact counts, or those of --lottery-mask."""
        args, generator = self.args, torch.Generator().manual_seed(self.args.seed)
        if args.pruner == "lottery":
            masks = self.lottery_masks()
        else:
            densities = erk_densities(self.online, args.sparsity)
            counts = [max(1, round(w.numel() * d)) for w, d in zip(self.weights, densities)]
            scores = [torch.rand(weight.shape, generator=generator) for weight in self.weights]
            masks = [largest(score, count) for score, count in zip(scores, counts)]
        for weight, mask, new in zip(self.weights, self.masks, masks):
            weight.mul_(mask.copy_(new))
        self.target.load_state_dict(self.online.state_dict())
        zeros = sum(int((mask == 0).sum()) for mask in self.masks)
        self.sparsity = zeros / sum(mask.numel() for mask in self.masks)

    def lottery_masks(self) -> list[Tensor]:
        """Return where the weights of the --lottery-mask run are not zero."""
        folder, names = Path(self.args.lottery_mask), prunable(self.online)
        try:
            with safe_open(folder / "model.safetensors", "pt") as file:
                flags = json.loads(file.metadata()["flags"])
                masks = [file.get_tensor(f"{name}.weight") != 0 for name in names]
        except (OSError, TypeError, KeyError, ValueError, SafetensorError) as error:
            require(False, f"--lottery-mask {folder}: holds no finished run ({error})")
        same = [mask.shape for mask in masks] == [weight.shape for weight in self.weights]
        same = same and flags.get("seed") == self.args.seed
        line = f"must be a run with this one's --seed {self.args.seed}, network and sizes"
        require(same, f"--lottery-mask {folder}: {line}")
        return masks

    def loss(self, obs: Any, next_obs: Any, actions: Any, rewards: Any, discounts: Any) -> Any:
        """Return the squared TD error and Q(s, a) of each transition of a batch, both [B]."""
        with torch.no_grad(), self.autocast:
            td_target = rewards + discounts * self.target(next_obs).max(1).values
        with self.autocast:
            q_values = self.online(obs).gather(1, actions[:, None])[:, 0]
        return (q_values - td_target).square(), q_values

    def update(self, *batch: Tensor) -> None:
        """Take one gradient step on a batch, without waiting for the device."""
        losses, q_values = self.loss(*batch)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.latest.copy_(torch.stack([losses.mean(), q_values.mean()]))

    def learn(self, replay: FrameReplay, step: int) -> None:
        """Prune, regularise and take the gradient steps due by `step`."""
        while self.gradient_step < self.updates_by(step):
            now, regulariser = self.gradient_step, self.args.regulariser
            if self.args.pruner == "gmp":
                self.prune_if_due()
            elif self.args.pruner in ("rigl", "set"):
                self.regrow_if_due(replay)
            if regulariser == "redo" and now > 0 and now % 1000 == 0:
                self.recycle(replay)
            if regulariser == "reset" and now > 0 and now % self.args.reset_every == 0:
                self.reset()
            self.gradient_step += 1
            if self.graph:
                self.graph.replay()
            else:
                self.update(*replay.sample(self.args.batch_size))
            if self.args.compile and not self.graph:  # the update above has loaded the kernels
                self.graph = torch.cuda.CUDAGraph()
                self.graph.register_generator_state(replay.generator)
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.update(*replay.sample(self.args.batch_size))

    def regrow_if_due(self, replay: FrameReplay) -> None:
        """SET and RigL: in each layer drop weights and regrow as many."""
        args, step = self.args, self.gradient_step
        if step % args.prune_every or not 0 < step < self.end:
            return
        rng = np.random.default_rng((args.seed, step))
        grow = [torch.from_numpy(rng.random(weight.shape)) for weight in self.weights]
        if args.pruner == "rigl":
            losses, _ = self.loss(*replay.sample(args.batch_size))
            gradients = torch.autograd.grad(losses.mean(), self.weights)
            grow = [gradient.abs() for gradient in gradients]
        share = 0.3 * (1 + math.cos(math.pi * step / self.end)) / 2
        with torch.no_grad():
            for weight, mask, score in zip(self.weights, self.masks, grow):
                count = int(mask.sum())
                magnitude = torch.where(mask > 0, weight.abs(), -1.0)
                kept = largest(magnitude, count - round(share * count))
                new = largest(torch.where(kept, math.inf, score.to(weight)), count)
                state = self.optimizer.state[weight]
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    moment.mul_(~new | (mask > 0))  # if dropped and regrown, it stays
                weight.mul_(mask.copy_(new))

    @torch.no_grad()
    def recycle(self, replay: FrameReplay) -> None:
        """ReDo: reinitialise dormant units' incoming weights, set their outgoing ones to 0.

        A unit is dormant if its mean output over 64 states is at most --redo-threshold times its
        layer's mean.
        """
        names = [("conv1", "conv2"), ("conv2", "conv3"), ("conv3", "dense")]
        if self.args.network == "impala":
            blocks = [(f"stack{i}.blocks.{b}", b) for i in (1, 2, 3) for b in (0, 2)]
            names = [(name, f"{name[:-1]}{b + 1}") for name, b in blocks]
        names.append(("dense", "output"))
        fresh, inputs, dead = self.fresh(), dict[nn.Module, Tensor](), list[Tensor]()
        layers: list[Any] = [tuple(map(self.online.get_submodule, pair)) for pair in names]
        hooks = [
            after.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0]}))
            for _, after in layers
        ]
        rng = np.random.default_rng((self.args.seed, self.gradient_step))
        draws = torch.from_numpy(rng.integers(replay.count, size=64)).to(self.device)
        with self.autocast:
            self.online(replay.gather((draws + replay.range[0]) % replay.slots)[0])
        for (before, after), (name, _) in zip(layers, names):
            outputs = by_unit(inputs[after].float(), len(before.weight))
            score = outputs.transpose(0, 1).flatten(1).abs().mean(1)
            dead.append(score <= self.args.redo_threshold * (score.mean() + 1e-9))
            new: Any = fresh.get_submodule(name)
            for old, values in ((before.weight, new.weight[dead[-1]]), (before.bias, 0.0)):
                old[dead[-1]] = values
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[old][moment][dead[-1]] = 0
        for (_, after), units in zip(layers, dead):
            state = self.optimizer.state[after.weight]
            for outgoing in (after.weight, state["exp_avg"], state["exp_avg_sq"]):
                by_unit(outgoing, len(units))[:, units] = 0
        torch._foreach_mul_(self.weights, self.masks)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def reset(self) -> None:
        """Reinitialise the --reset-layers, in the target network too, and zero their moments."""
        fresh, layers = self.fresh(), {"last": ["output"], "penultimate": ["dense"]}
        for name in layers.get(self.args.reset_layers, ["dense", "output"]):
            layer = self.online.get_submodule(name)
            layer.load_state_dict(fresh.get_submodule(name).state_dict())
            for tensor in layer.parameters():
                self.optimizer.state[tensor]["exp_avg"].zero_()
                self.optimizer.state[tensor]["exp_avg_sq"].zero_()
            torch._foreach_mul_(self.weights, self.masks)
            self.target.get_submodule(name).load_state_dict(layer.state_dict())

    def fresh(self) -> QNetwork:
        """Return a new network, drawn with the seed and the gradient step."""
        torch.manual_seed(self.args.seed * 1_000_003 + self.gradient_step)
        return QNetwork(self.num_actions, self.args).to(self.device)

    # >>> shared: gmp-agent
    @torch.no_grad()
    def prune_if_due(self) -> None:
        """Shrink the masks along the schedule, every --prune-every gradient steps and at its end.

        As in JaxPruner the weights before this gradient step decide, and its gradient ignores the
        new masks: update() applies them after Adam's step.
        """
        step, start, end = self.gradient_step, self.start, self.end
        due = (step - start) % self.args.prune_every == 0 or step == end
        if due and start <= step <= end:
            progress = pruning_progress(step, start, end)
            final = erk_densities(self.online, self.args.sparsity)
            prune(self.online, [1 - progress * (1 - d) for d in final], self.rng["score"])
            self.sparsity = progress * self.args.sparsity

    def update_target(self) -> None:
        """Copy the online network, zeros included."""
        self.target.load_state_dict(self.online.state_dict())

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the online network."""
        record = sparsity_report(self.online) | {"sparsity/target": self.sparsity}
        if self.gradient_step > 0:
            loss, q_value = self.latest.tolist()
            record |= {"losses/td_loss": loss, "losses/q_values": q_value}
        return record

    @torch.no_grad()
    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """Return epsilon-greedy actions [N] for obs [N, 4, 84, 84]."""
        explore = self.rng["act"].random(len(obs)) < epsilon
        actions = self.rng["act"].integers(self.num_actions, size=len(obs))
        if not explore.all():
            with self.autocast:
                q_values = self.online(torch.from_numpy(obs[~explore]).to(self.device) / 255)
            actions[~explore] = q_values.argmax(1).cpu().numpy()
        return actions

    def updates_by(self, step: int) -> int:
        """Return the number of gradient steps due by `step`."""
        ratio = self.args.replay_ratio
        return math.floor(step * ratio) - math.floor(self.args.learning_starts * ratio)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() holds besides networks and masks."""
        rng = {use: rng.bit_generator.state for use, rng in self.rng.items()}
        counters = (self.gradient_step, self.sparsity)
        return {"optimizer": self.optimizer.state_dict(), "rng": rng, "counters": counters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what get_extra_state() returned."""
        self.gradient_step, self.sparsity = state["counters"]
        self.optimizer.load_state_dict(state["optimizer"])
        for use, rng in self.rng.items():
            rng.bit_generator.state = state["rng"][use]

    # <<< shared: gmp-agent


def by_unit(weight: Tensor, units: int) -> Tensor:
    """View [out, in, ...] as [out, units, ...]; dense inputs are in channels-last order."""
    return weight.view(len(weight), -1, units).transpose(1, 2) if weight.ndim == 2 else weight


def main(args: Args) -> None:
    """Train, evaluate the network, and write the results."""
    device, rom = find_device(args), find_rom(args.env_id)
    require(device.type != "cpu" or not args.compile, "--compile: only with --device cuda")
    envs = AtariEnvs(rom, args.num_envs, args.seed)
    agent = DQN(args, envs.num_actions, device)
    replay = FrameReplay(args, device, envs.obs[:, -1])
    run = Run(args, rom.title().replace("_", ""))
    step, returns, epoch_return = 0, list[float](), None  # returns: this epoch's episodes
    if saved := run.load():
        step, returns, epoch_return = saved["progress"]
        play_again(envs, replay, saved["games"], run)
        agent.load_state_dict(saved["agent"])
        replay.generator.set_state(saved["sampling"])
    # >>> shared: gmp-loop
    bar = progress_bar(args.total_timesteps, step, "step")

    def passed(period: int) -> bool:
        """Return whether this step reached or crossed a multiple of `period`."""
        return step // period > previous // period

    while step < args.total_timesteps:
        previous, step = step, step + args.num_envs
        ended, trained = step >= args.total_timesteps, agent.gradient_step > 0
        # Act and step.
        decay = min(1.0, max(0.0, (previous - args.learning_starts) / args.epsilon_steps))
        epsilon = 1 + (args.epsilon_end - 1) * decay
        actions = agent.act(envs.obs, epsilon)
        envs.send(actions)
        if args.num_envs > 1:  # they step meanwhile; a single one keeps the paper's order
            agent.learn(replay, step)
        # Store.
        replay.add(actions, envs.recv(), envs.obs[:, -1])
        for score, length in envs.episodes:
            run.log(step, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns.append(score)
            bar.set_postfix_str(f"return {score:g}, sparsity {agent.sparsity:.3f}", False)
        # Learn and prune.
        if args.num_envs == 1:
            agent.learn(replay, step)
        if not math.isfinite(agent.latest[0]):
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.latest[:1].tolist()}; {kept}", 1)
        # Target.
        if trained and passed(args.target_every) and not ended:
            agent.update_target()
        # Log.
        bar.update(min(step, args.total_timesteps) - previous)
        if ended or passed(args.epoch_steps) or passed(max(args.target_every, 1000)):
            record = agent.report() | {
                "charts/SPS": (bar.n - bar.initial) / bar.format_dict["elapsed"],
                "charts/epsilon": epsilon,
                "charts/learning_rate": args.learning_rate,
                "charts/buffer_size": replay.count,
                "memory/replay_bytes": replay.nbytes,
                "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if passed(args.epoch_steps):
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
            run.log(step, record)
        # <<< shared: gmp-loop
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"progress": (step, returns, epoch_return), "agent": agent.state_dict()}
            games = [bytes(envs.actions), envs.seeded, torch.from_numpy(envs.obs.copy())]
            state |= {"games": games, "sampling": replay.generator.get_state()}
            run.save(step, state)

    bar.close()
    scores = evaluate(agent.online, rom, run)
    run.finish(step, agent.online, scores, epoch_return=epoch_return)


# >>> shared: atari-env
def find_rom(env_id: str) -> str:
    """Return the ROM (ms_pacman) of MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4."""
    known = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    name = re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", env_id).lower()
    near = " ".join(difflib.get_close_matches(name, known, cutoff=0.3)) or "none"
    require(name in known, f"--env-id {env_id}: no such Atari game; the nearest are: {near}")
    return known[name]


class AtariEnvs:
    """N copies of a game under Dopamine's protocol (Machado et al. 2018).

    Sticky actions 0.25, frameskip 4 with the maximum over two frames, 84x84 grayscale, minimal
    action set, no no-op start, no FIRE reset; losing a life does not end an episode, `max_steps`
    truncate it. `obs` [N, 4, 84, 84] uint8 is the current observation: after an episode has ended,
    the first of the next. Seeds and actions determine everything, so a resumed run can replay it.
    """

    RESEED_AFTER = 25_000  # steps; seeding reloads the ROM, so it is rare

    def __init__(self, rom: str, num_envs: int, seed: int, max_steps: int = 27_000) -> None:
        protocol: dict[str, Any] = {"repeat_action_probability": 0.25, "noop_max": 0}
        protocol |= {"use_fire_reset": False, "reward_clipping": False}
        protocol |= {"max_num_frames_per_episode": 4 * max_steps, "autoreset_mode": "SameStep"}
        threads = min(num_envs, os.cpu_count() or 1)
        self.envs = AtariVectorEnv(rom, num_envs, num_threads=threads, **protocol)
        self.num_actions = len(self.envs.ale.get_action_set())
        self.seed, self.step, self.actions = seed, 0, bytearray()  # all actions so far, N per step
        self.seeded = [list[int]() for _ in range(num_envs)]  # at which steps, for each one
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.begin(np.ones(num_envs, bool))

    def begin(self, which: np.ndarray) -> None:
        """Reseed the environments in the mask `which` [N] and start their episodes."""
        rows = np.flatnonzero(which).tolist()
        keys = [np.random.SeedSequence((self.seed, i, self.step)) for i in rows]
        seeds = np.array([key.generate_state(1)[0] >> 1 for key in keys], np.int64)
        for i in rows:
            self.seeded[i].append(self.step)
        options = {} if which.all() else {"reset_mask": which}
        self.obs, _ = self.envs.reset(seed=seeds, options=options)
        self.returns[which] = self.lengths[which] = 0

    def send(self, actions: np.ndarray) -> None:
        """Start a step with actions [N] int64; threads run it until recv()."""
        self.actions += actions.astype(np.uint8).tobytes()
        self.step += 1
        self.envs.send(actions)

    def recv(self) -> tuple[np.ndarray, ...]:
        """Return rewards, terminated, truncated [N] and the newest frames [N, 84, 84] of the step.

        `episodes` has the undiscounted return and the length of each episode that ended.
        """
        self.obs, rewards, terminated, truncated, info = self.envs.recv()
        ended, frames = terminated | truncated, self.obs[:, -1].copy()
        self.returns += rewards
        self.lengths += 1
        self.episodes = list(zip(self.returns[ended].tolist(), self.lengths[ended].tolist()))
        if ended.any():
            frames[ended] = info["final_obs"][ended, -1]
            self.returns[ended] = self.lengths[ended] = 0
            due = [self.step - steps[-1] >= self.RESEED_AFTER for steps in self.seeded]
            if (ended & due).any():
                self.begin(ended & due)
        return rewards, terminated, truncated & ~terminated, frames


def play_again(envs: AtariEnvs, replay: FrameReplay, games: list[Any], run: Run) -> None:
    """Replay a checkpoint's games, each from its last seeding before the oldest transition."""
    past, seeded, obs = games
    actions = np.frombuffer(past, np.uint8).reshape(-1, replay.num_envs)
    first = max(0, len(actions) - replay.rows)
    begins = np.array([max(step for step in steps if step <= first) for steps in seeded])
    envs.step = replay.step = int(begins.min())
    envs.actions = bytearray(actions[: envs.step].tobytes())
    bar = progress_bar(len(actions), envs.step, "step", "playing again")
    for row in actions[envs.step :]:
        if (begins == envs.step).any():  # until now these played other games
            envs.begin(begins == envs.step)
        envs.send(row.astype(np.int64))
        replay.add(row, envs.recv(), envs.obs[:, -1])
        bar.update()
        require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    bar.close()
    envs.seeded = seeded
    same = np.array_equal(envs.obs, obs.numpy())
    require(same, "--resume: the games went differently; install the ale-py in versions.json")


@torch.no_grad()
def evaluate(network: nn.Module, rom: str, run: Run) -> dict[str, float]:
    """Play --eval-episodes side by side at epsilon 0.001; return the values to log."""
    n, seed = run.args.eval_episodes, run.args.seed + 1_000_000  # apart from training's seeds
    if n == 0:
        return {}
    envs, rng = AtariEnvs(rom, n, seed, run.args.eval_steps), np.random.default_rng(seed)
    device, scores = next(network.parameters()).device, dict[int, float]()
    with progress_bar(n, 0, "episode", "evaluating") as bar:
        while len(scores) < n:
            greedy = network(torch.from_numpy(envs.obs).to(device) / 255).argmax(1).cpu().numpy()
            explore = rng.random(n) < 0.001
            envs.send(np.where(explore, rng.integers(envs.num_actions, size=n), greedy))
            _, terminated, truncated, _ = envs.recv()
            ended = np.flatnonzero(terminated | truncated).tolist()
            for i, (score, _) in zip(ended, envs.episodes):
                scores.setdefault(i, score)  # later episodes do not count
            bar.set_postfix_str(f"step {envs.step} of at most {run.args.eval_steps}", False)
            bar.update(len(scores) - bar.n)
            require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    return {"eval/episodic_return": sum(scores.values()) / n, "eval/episodes": n}


# <<< shared: atari-env
# >>> shared: n-step-replay
class FrameReplay:
    """Uniform replay of the last --buffer-size transitions, on the device; frames are stored once.

    A ring of rows, one per step of all N environments: slot row * N + i holds the newest frame of
    environment i, the action taken on it, and the positions in `frames` of its transition's frames:
    -1 is the black frame before an episode. Truncated episodes' last frames lie behind the slots.
    Transitions of --n-step steps, or fewer if an episode ends, are assembled when drawn.
    """

    EPISODE = 27_000  # steps after which an episode is truncated

    def __init__(self, args: Args, device: torch.device, first_frames: np.ndarray) -> None:
        self.num_envs = n = args.num_envs
        self.n_step = args.n_step
        self.capacity = math.ceil(args.buffer_size / n)  # rows to draw from
        self.rows = self.capacity + 3 + args.n_step  # plus three older frames and n newer ones
        self.slots, self.extra = self.rows * n, (self.rows // self.EPISODE + 2) * n
        shape = (self.slots + self.extra + 1, *first_frames.shape[1:])
        self.frames = torch.empty(shape, dtype=torch.uint8, device=device)
        self.frames[-1] = 0
        # Per slot: action, clipped reward (a whole number), terminated, positions of 4 + 1 frames.
        self.table = torch.zeros(self.slots, 8, dtype=torch.int32, device=device)
        self.ahead = torch.arange(args.n_step, device=device) * n
        self.powers = args.gamma ** torch.arange(args.n_step + 1, device=device)
        self.range = torch.zeros(2, dtype=torch.long, device=device)  # oldest transition, count
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.nbytes = self.frames.nbytes + self.table.nbytes
        self.step = self.truncations = self.count = 0
        self.stacks = np.column_stack([np.full((n, 3), -1), np.arange(n)])  # the current ones
        self.frames[:n] = torch.from_numpy(first_frames)

    def add(self, actions: np.ndarray, step: tuple[np.ndarray, ...], frames: np.ndarray) -> None:
        """Store actions [N], the `step` that envs.recv() returned, and the newest frames."""
        rewards, terminated, truncated, last_frames = step
        n, slot = self.num_envs, self.step % self.rows * self.num_envs
        self.step += 1
        seen = self.step % self.rows * n + np.arange(n)
        after = seen.copy()
        for i in np.flatnonzero(truncated):
            after[i] = self.slots + self.truncations % self.extra
            self.frames[after[i]] = torch.from_numpy(last_frames[i])
            self.truncations += 1
        columns = [actions, np.clip(rewards, -1, 1), terminated, self.stacks, after]
        self.table[slot : slot + n] = torch.from_numpy(np.column_stack(columns).astype(np.int32))
        self.frames[seen[0] : seen[0] + n] = torch.from_numpy(frames)
        self.stacks[terminated | truncated] = -1
        self.stacks = np.column_stack([self.stacks[:, 1:], seen])
        whole = max(0, self.step + 1 - self.n_step)  # rows whose n steps are complete
        self.count = min(whole, self.capacity) * n
        self.range.copy_(torch.tensor([whole * n - self.count, self.count]))

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement, without waiting for the device."""
        device, generator = self.frames.device, self.generator
        draw = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        return self.gather(((draw * self.range[1]).long() + self.range[0]) % self.slots)

    def gather(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Return obs, next_obs, actions, rewards, discounts of the transitions at slots [B].

        obs, next_obs: [B, 4, 84, 84] in [0, 1]. rewards: discounted sum over the steps. discounts:
        factor on the value of next_obs, gamma ** steps, or 0 where the episode terminated.
        """
        rows = self.table[(slots[:, None] + self.ahead) % self.slots]  # [B, n, 8]
        ends = ((rows[:, :, 2] > 0) | (rows[:, :, 7] >= self.slots)).long()
        taken = ends.cumsum(1) == ends  # [B, n]: no end before this step
        steps = taken.sum(1)
        last = rows[torch.arange(len(slots), device=slots.device), steps - 1]  # [B, 8]
        stacks = self.frames[rows[:, 0, 3:7]], self.frames[last[:, 4:8]]
        floats = [s.to(torch.float32, memory_format=torch.channels_last).div_(255) for s in stacks]
        rewards = (rows[:, :, 1] * self.powers[:-1] * taken).sum(1)
        return *floats, rows[:, 0, 0].long(), rewards, self.powers[steps] * (1 - last[:, 2])


# <<< shared: n-step-replay
@dataclass
class Running:
    """Where and how to run."""

    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights and Adam stay fp32
    compile: bool = False  # sampling and update as a CUDA graph (untested on a GPU)
    # >>> shared: run-flags
    device: str = "auto"  # auto, cpu, cuda or cuda:INDEX
    run_dir: str = ""  # folder, new or empty; '': a new runs/{env}__{script}__{seed}__{time}
    resume: str = ""  # continue the run in this folder, with its flags; give no others
    checkpoint_minutes: Amount = 10.0  # minutes between checkpoints
    keep_checkpoint: bool = False  # keep the last checkpoints of a finished run
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "cleanrl-sparse"  # Weights & Biases project


def integer(metavar: str) -> PrimitiveConstructorSpec[int]:
    """Return tyro's rule for reading a whole number, which may be written as 1e6."""

    def read(words: list[str]) -> int:
        number = float(words[0])  # exact below 2^53
        return int(number) if number.is_integer() and number < 2**53 else int(words[0])

    return PrimitiveConstructorSpec(1, metavar, read, lambda _: True, lambda x: [str(x)])


# Types of flags: smallest and largest value, and the range in messages and in --help.
ABOVE_0, LARGEST = math.nextafter(0, 1), sys.float_info.max
Count = Annotated[int, (1, math.inf, "at least 1"), integer("INT >= 1")]
Index = Annotated[int, (0, 2**32 - 1, "in [0, 2^32)"), integer("INT >= 0")]
Amount = Annotated[float, (0, LARGEST, "at least 0 and finite"), tyro.conf.arg(metavar="X >= 0")]
Rate = Annotated[float, (ABOVE_0, LARGEST, "above 0 and finite"), tyro.conf.arg(metavar="X > 0")]
Share = Annotated[float, (0, 1, "in [0, 1]"), tyro.conf.arg(metavar="X in [0, 1]")]


# <<< shared: run-flags
@dataclass
class Args(Running, Training, Method):
    """All flags."""

    def __post_init__(self) -> None:
        """Refuse invalid values, naming the flag."""
        check_ranges(self)
        starts, least = self.learning_starts, max(self.batch_size, self.num_envs)
        smallest = min(starts, self.buffer_size)
        flags = f"--learning-starts, --buffer-size {smallest}"
        require(smallest >= least, f"{flags}: must be at least {least} (--batch-size, --num-envs)")
        learns = self.total_timesteps > starts
        require(learns, f"--total-timesteps: must be above {starts}, --learning-starts")
        require(self.target_every >= self.num_envs, "--target-every: must be at least --num-envs")
        most = self.learning_starts // self.num_envs
        line = f"--n-step {self.n_step}: must be at most {most} (--learning-starts / --num-envs)"
        require(self.n_step <= most, line)
        require(self.sparsity < 1, "--sparsity: must be below 1")
        ordered = self.prune_start <= self.prune_end
        require(ordered, f"--prune-end {self.prune_end}: must be at least --prune-start")
        lottery, mask = self.pruner == "lottery", self.lottery_mask
        require(not lottery or mask != "", "--pruner lottery: needs --lottery-mask, a run's folder")
        require(lottery or mask == "", f"--lottery-mask {mask}: only with --pruner lottery")
        self.lottery_mask = str(Path(mask).resolve()) if lottery else ""
        for flag in ("weight_decay", "redo_threshold", "reset_every", "reset_layers"):
            owner = "weight-decay" if flag == "weight_decay" else flag.partition("_")[0]
            alone = self.regulariser == owner or getattr(self, flag) == getattr(Args, flag)
            require(alone, f"--{flag.replace('_', '-')}: only with --regulariser {owner}")


# >>> shared: run
class Run:
    """A run's folder: records (metrics.jsonl is the truth), checkpoints, the model."""

    def __init__(self, args: Args, title: str) -> None:
        script, at = Path(__file__), time.time_ns() // 1000
        name = args.resume or args.run_dir or f"runs/{title}__{script.stem}__{args.seed}__{at}"
        self.args, self.path, self.script = args, Path(name), {"script": script.name}
        self.folder, self.newest, self.saved_at = self.path / "checkpoint", "", time.monotonic()
        fresh = not any(self.path.glob("[!.]*")) and not self.path.is_file()
        line = f"--run-dir {self.path}: not empty; to continue its run: --resume {self.path}"
        require(fresh or args.resume != "", line)
        if args.track:
            import wandb

            identity: Any = {"name": self.path.resolve().name, "project": args.wandb_project}
            identity["id"] = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]
            wandb.init(**identity, resume="allow", config=vars(args), sync_tensorboard=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "a")
        try:
            if os.environ.get("RUN_LOCK") != str(self.path):  # already locked by launch.py
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, f"{self.path}: another process is working on this run")
        if fresh:
            git = ["sh", "-c", "git rev-parse HEAD"]  # without git: no error, no output
            head = subprocess.run(git, cwd=script.parent, capture_output=True).stdout.decode()
            device = torch.cuda.get_device_name() if args.device != "cpu" else platform.platform()
            versions = {"commit": head.strip() or None, "device": device, "python": sys.version}
            packages = {d.name: d.version for d in reversed([*distributions()])}
            self.write("args.json", self.script | vars(args))  # first: --resume needs it
            self.write("versions.json", versions | {"packages": packages})
        self.folder.mkdir(exist_ok=True)
        self.stops: list[int] = []  # signals received; SIGHUP stays ignored under nohup
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.stops.append(number))

    def write(self, name: str, data: bytes | dict[str, Any]) -> None:
        """Write a file, a dict as JSON; after a crash it is there as a whole or not at all."""
        content = data if isinstance(data, bytes) else json.dumps(data, indent=1).encode()
        try:
            with open(self.path / ".tmp", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.path / ".tmp", self.path / name)
        except OSError as error:
            require(False, f"{self.path / name} cannot be written ({error})", 1)

    def load(self) -> dict[str, Any]:
        """Return the newest intact checkpoint, or {}, and cut the records back to it."""
        state = dict[str, Any]()
        for path in sorted(self.folder.iterdir(), reverse=True):
            data = path.read_bytes()
            if path.name.endswith(hashlib.sha256(data).hexdigest()):
                state = torch.load(io.BytesIO(data), "cpu", weights_only=True)
                self.newest = path.name
                print(f"{self.path}: continuing from step {state['step']}")
                break
            print(f"{path} is damaged; trying the checkpoint before it", file=sys.stderr)
        else:
            require(not any(self.folder.iterdir()), f"{self.folder}: no checkpoint is intact", 1)
        self.start = time.time() - state.get("seconds", 0.0)
        self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
        size = state.get("metrics", 0)
        require(self.metrics.tell() >= size, f"{self.metrics.name} is too short for the checkpoint")
        self.metrics.truncate(size)
        self.board = SummaryWriter(str(self.path), purge_step=state.get("step", -1) + 1)
        self.board.add_text("flags", "\n".join(f"    {k}: {v}" for k, v in vars(self.args).items()))
        return state

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a record to metrics.jsonl and to TensorBoard's log."""
        record = {"step": step, "seconds": round(time.time() - self.start, 3)} | values
        self.metrics.write(json.dumps(record).encode() + b"\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, named by step and SHA-256; after a signal, stop."""
        self.board.flush()
        os.fsync(self.metrics.fileno())
        size = os.fstat(self.metrics.fileno()).st_size
        state |= {"step": step, "seconds": time.time() - self.start, "metrics": size}
        torch.save(state, data := io.BytesIO())
        name = f"{step:012d}-{hashlib.sha256(data.getbuffer()).hexdigest()}"
        self.write(f"checkpoint/{name}", data.getvalue())
        for path in self.folder.iterdir():
            if path.name not in (name, self.newest):
                path.unlink()
        self.newest, self.saved_at = name, time.monotonic()
        require(not self.stops, f"stopped at step {step}; continue with --resume {self.path}", 75)

    def finish(self, step: int, network: nn.Module, scores: dict[str, float], **extra: Any) -> None:
        """Save the network (-0.0 as 0.0) with its flags; write and print final.json."""
        flags = self.script | vars(self.args) | {"run_dir": "", "resume": ""}
        weights = {k: p.detach().cpu().contiguous() + 0.0 for k, p in network.named_parameters()}
        self.write("model.safetensors", save(weights, {"flags": json.dumps(flags)}))
        if scores:
            self.log(step, scores)
        metrics = {f"hparams/{key}": value for key, value in scores.items()}
        self.board.add_hparams(vars(self.args), metrics, run_name=".", global_step=step)
        self.board.close()
        extra |= {"status": "finished", "step": step, "seconds": time.time() - self.start}
        self.write("final.json", extra | scores | sparsity_report(network))
        for path in [] if self.args.keep_checkpoint else self.folder.iterdir():
            path.unlink()
        print(f"{(self.path / 'final.json').read_text()}\neverything is in {self.path}")


def require(accepted: bool, line: str, status: int = 2) -> None:
    """Unless `accepted`, print a line and exit: 0 done, 1 a fault, 2 bad input, 75 resumable."""
    if not accepted:
        for bar in [*getattr(tqdm, "_instances", ())]:
            bar.close()  # so that the line comes last
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        sys.exit(status)


def check_ranges(args: Args) -> None:
    """Refuse values outside their flag's range."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for low, high, accepted in getattr(hint, "__metadata__", ())[:1]:
            flag, value = name.replace("_", "-"), getattr(args, name)
            require(low <= value <= high, f"--{flag} {value}: must be {accepted}")


def find_device(args: Args) -> torch.device:
    """Return the device of --device, with TF32 switched off."""
    known = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    name = {"auto": known[0], "cuda": "cuda:0"}.get(args.device, args.device)
    require(name in known, f"--device {args.device}: this machine has {', '.join(known)}")
    torch.backends.cudnn.allow_tf32 = False
    if name != "cpu":
        torch.cuda.set_device(name)
    args.device = name  # to resume on the same kind of device: generators differ
    return torch.device(name)


def progress_bar(total: int, initial: int, unit: str, label: str = "") -> tqdm:
    """Return a progress bar; without a terminal, a plain line every 30 seconds."""
    options: Any = {"unit": unit, "desc": label, "unit_scale": True, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        options["bar_format"] = "{l_bar}{n_fmt}/{total_fmt}, {rate_fmt}{postfix}\n"
        options["mininterval"] = 30
    return tqdm(total=total, initial=initial, **options)


def parse() -> Args:
    """Return the command line's flags or, with --resume, those of the run."""
    groups = make_dataclass("Flags", [(c.__name__.lower(), c) for c in reversed(Args.__bases__)])
    title, config = (__doc__ or "").partition("\n")[0], (tyro.conf.OmitArgPrefixes,)
    parts = vars(tyro.cli(groups, description=title, config=config)).values()
    args = Args(**{name: value for part in parts for name, value in vars(part).items()})
    if not any(flag.startswith("--resume") for flag in sys.argv):
        return args
    others = [x for x in sys.argv[1:] if x.startswith("--") and not x.startswith("--resume")]
    require(not others, f"--resume takes every flag from the run; leave out {' '.join(others)}")
    try:
        saved = json.loads(Path(args.resume, "args.json").read_text())
        require(saved.pop("script") == Path(__file__).name, "--resume: the run is another script's")
        saved = Args(**saved | {"resume": args.resume or "."})
    except (OSError, ValueError, TypeError, KeyError) as error:
        require(False, f"--resume {args.resume}: holds no run of this script ({error})")
    finished = Path(args.resume, "final.json").exists()
    require(not finished, f"{args.resume} is finished; there is nothing left to do", 0)
    return saved


class Output(io.FileIO):
    """Standard output or error; what nobody reads any more is dropped."""

    def write(self, data: Any) -> int:
        """Write, or drop what cannot be written."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def command_line() -> None:
    """Run main; a fault ends the program with one line and an exit status."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", max)  # max: do nothing
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # keep freed memory:
        mallopt(option, value)  # else every update page-faults on its gradients
    try:
        main(parse())
    except Exception as error:
        cause = f"{type(error).__name__}: "
        if "allocate" in str(error):
            cause = "these flags need more memory than is available: "
        elif type(error).__module__.startswith("wandb"):
            cause = "--track (WANDB_MODE=offline needs no account), --wandb-project: "
        elif not isinstance(error, OSError):
            traceback.print_exc()  # a bug of this script
        require(False, cause + str(error).partition("\n")[0], 1)


if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # stands in for streams that were closed
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = io.BufferedWriter(Output(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, errors="replace", line_buffering=True))
    command_line()
# <<< shared: run
