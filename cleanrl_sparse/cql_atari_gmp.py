# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "ale-py>=0.12.1", "gymnasium>=1.2", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""CQL on Atari offline with gradual magnitude pruning, to 95 % sparsity.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned
network is a good network", ICML 2024, arXiv 2402.12479 (its figure 8). The agent is discrete
conservative Q-learning (Kumar et al. 2020) on the DQN replay (Agarwal et al. 2020), with --c51 on
distributions as in Rainbow (Hessel et al. 2018). A step is a gradient step.

From 20 % to 80 % of the run, every 1,000 steps, the weights of smallest magnitude are removed along
a cubic schedule (Zhu and Gupta 2017). Removed weights stay removed.

    python cql_atari_gmp.py --dataset DIR --env-id Pong              # DIR/Pong/1/replay_logs
    python cql_atari_gmp.py --dataset DIR/Pong/2/replay_logs --network impala --width 3
    python cql_atari_gmp.py --dataset DIR --sparsity 0                          # the dense CQL
    python cql_atari_gmp.py --dataset DIR --total-timesteps 3125000 --td-loss squared
    python cql_atari_gmp.py --dataset DIR --c51 --n-step 3 --learning-rate 6.25e-5 --adam-eps 1.5e-4
    python cql_atari_gmp.py --resume RUN_DIR

The fourth line is PolyPruneCQL, the baseline of Eau De Q-Network (arXiv 2503.01437), the fifth the
paper's CQL+C51.

Differences from the paper, and guesses ([C] read in the paper or its authors' code, [I] inferred,
[D] our decision):
 1. [C] All tensors but biases are pruned, in the first and last layers too, to exact counts.
 2. [I] Sparsity is spread by the Erdos-Renyi-Kernel rule; the schedule's progress scales each
    layer's own final sparsity. The schedule is the online runs', stretched to this run's length.
 3. [I] --width multiplies the channels of the convolutions, not the dense layer. Impala has
    Dopamine's 16, 32, 32.
 4. [I] --c51: 51 atoms in [-10, 10], the online network chooses the next action (double), state
    value and advantages (dueling) share one dense layer; the conservative term uses the means.
 5. [D] An evaluation is --eval-episodes whole episodes.
 6. [D] With several runs of a game below --dataset, the one numbered --seed is read.

Figure: benchmark/gmp_figure08.sh; PolyPruneCQL: benchmark/eaudecql.sh. More: docs/cql_atari.md.
"""

from __future__ import annotations

import copy
import ctypes
import difflib
import fcntl
import gzip
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
import zlib
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
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class Training:
    """The data and the agent. A step is a gradient step."""

    dataset: str = ""  # folder of Dopamine's checkpoints, or with GAME/RUN/replay_logs below it
    env_id: str = ""  # game, e.g. MsPacman; needed if the folder's path does not name it
    seed: Index = 1  # random seed
    total_timesteps: Count = 12_500_000  # total gradient steps
    checkpoints_per_epoch: Count = 5  # checkpoints drawn for each epoch
    transitions: Count = 50_000  # first rows of each to read, 7.1 KB each
    epoch_steps: Count = 62_500  # gradient steps per epoch; each ends with an evaluation
    batch_size: Count = 32  # transitions per gradient step
    learning_rate: Rate = 5e-5  # Adam's step size
    adam_eps: Rate = 3.125e-4  # Adam's epsilon
    gamma: Share = 0.99  # discount factor
    n_step: Count = 1  # rewards summed before bootstrapping; 3 in CQL+C51
    td_loss: Literal["huber", "squared"] = "huber"  # applied to the TD error; not with --c51
    c51: bool = False  # distributions of returns, double, dueling
    cql_alpha: Amount = 0.1  # weight of the conservative term
    target_every: Count = 2_000  # gradient steps between target updates
    network: Literal["cnn", "impala"] = "cnn"  # DQN's convolutions or the 15-layer ResNet
    width: Count = 1  # factor on the convolutions' channels; the paper: 1 and 3
    feature_size: Count = 512  # units of the dense layer
    eval_episodes: Index = 10  # episodes of each evaluation, at epsilon 0.001; 0: no evaluations
    eval_steps: Count = 27_000  # steps after which an evaluation episode is cut off


@dataclass
class Method:
    """Gradual magnitude pruning; the defaults are the paper's."""

    sparsity: Share = 0.95  # final share of the prunable weights that are zero; 0: no pruning
    prune_start: Share = 0.2  # share of the run's gradient steps before pruning begins
    prune_end: Share = 0.8  # share after which the final sparsity is reached
    prune_every: Count = 1000  # gradient steps between mask updates


# >>> shared: networks
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
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to rank actions
            return self.output(x.to(self.output.weight.dtype))


# <<< shared: networks
ATOMS, V_MAX = 51, 10.0


def support(like: Tensor) -> Tensor:
    """Return the values of the atoms [ATOMS], with the dtype and device of `like`."""
    return torch.linspace(-V_MAX, V_MAX, ATOMS, device=like.device, dtype=like.dtype)


def project(probabilities: Tensor, returns: Tensor) -> Tensor:
    """Project distributions, probabilities of returns [B, ATOMS], onto the support: [B, ATOMS].

    Each probability is split between the two nearest atoms, by nearness, or goes to an end.
    """
    distance = (returns.clamp(-V_MAX, V_MAX)[:, :, None] - support(returns)).abs()
    share = (1 - distance / (2 * V_MAX / (ATOMS - 1))).clamp(min=0)  # [B, ATOMS, ATOMS]
    return (share * probabilities[:, :, None]).sum(1)


class C51Network(QNetwork):
    """A categorical distribution of the return for each action (Bellemare et al. 2017), dueling."""

    def __init__(self, num_actions: int, args: Args) -> None:
        super().__init__(num_actions * ATOMS, args)
        self.value = nn.Linear(args.feature_size, ATOMS)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def logits(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to logits [B, num_actions, ATOMS]."""
        x = self.hidden(obs)[-1]
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.output.weight.dtype)
            advantages = self.output(x).unflatten(1, (-1, ATOMS))
            return self.value(x)[:, None] + advantages - advantages.mean(1, keepdim=True)

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions], the means."""
        logits = self.logits(obs)
        return (logits.softmax(2) * support(logits)).sum(2)


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
class CQL(nn.Module):
    """The online network, which is pruned, and the target network."""

    def __init__(self, args: Args, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args = args
        torch.manual_seed(args.seed)
        self.online: Any = (C51Network if args.c51 else QNetwork)(num_actions, args)
        add_masks(self.online)
        self.online.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.target: Any = copy.deepcopy(self.online)
        self.weights = list(prunable(self.online).values())
        self.masks = list(self.online.buffers())
        adam: Any = {"lr": args.learning_rate, "eps": args.adam_eps, "capturable": args.compile}
        self.optimizer = torch.optim.Adam(self.online.parameters(), fused=True, **adam)
        self.latest = nn.Buffer(torch.zeros(3, device=device))  # both losses and mean Q-value
        self.losses = np.zeros(1)  # sum of the latest two, on the host
        self.gradient_step, self.sparsity = 0, 0.0  # the schedule's sparsity
        self.start = min(args.total_timesteps - 1, round(args.prune_start * args.total_timesteps))
        self.end = min(args.total_timesteps - 1, round(args.prune_end * args.total_timesteps))
        self.rng = {"score": np.random.default_rng((args.seed, 0))}
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.graph: torch.cuda.CUDAGraph | None = None

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

    def loss(self, obs: Any, next_obs: Any, actions: Any, rewards: Any, discounts: Any) -> Any:
        """Return TD loss, conservative loss and mean Q(s, a) of a batch."""
        rows = torch.arange(len(actions), device=actions.device)
        if self.args.c51:
            with torch.no_grad(), self.autocast:
                best = self.online(next_obs).argmax(1)
                next_p = self.target.logits(next_obs)[rows, best].softmax(1)  # [B, ATOMS]
                returns = rewards[:, None] + discounts[:, None] * support(rewards)
                td_target = project(next_p, returns)
            with self.autocast:
                logits = self.online.logits(obs)  # [B, A, ATOMS]
            q_values = (logits.softmax(2) * support(logits)).sum(2)
            td_losses = -(td_target * logits[rows, actions].log_softmax(1)).sum(1)
        else:
            with torch.no_grad(), self.autocast:
                td_target = rewards + discounts * self.target(next_obs).max(1).values  # [B]
            with self.autocast:
                q_values = self.online(obs)  # [B, A]
            square = self.args.td_loss == "squared"
            measure = nn.functional.mse_loss if square else nn.functional.huber_loss
            td_losses = measure(q_values[rows, actions], td_target, reduction="none")
        taken = q_values[rows, actions]
        cql_loss = self.args.cql_alpha * (q_values.logsumexp(1) - taken).mean()
        return td_losses.mean(), cql_loss, taken.mean()

    def update(self, *batch: Tensor) -> None:
        """Take one gradient step on a batch, without waiting for the device."""
        td_loss, cql_loss, q_value = self.loss(*batch)
        (td_loss + cql_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.latest.copy_(torch.stack([td_loss, cql_loss, q_value]))

    # >>> shared: captured-update
    def captured_update(self, replay: Any) -> None:
        """Sample and update once; --compile captures a CUDA graph."""
        if self.graph:
            self.graph.replay()
        else:
            self.update(*replay.sample(self.args.batch_size))
        if self.args.compile and not self.graph:  # the update above has loaded the kernels
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(replay.generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.update(*replay.sample(self.args.batch_size))

    # <<< shared: captured-update
    def learn(self, dataset: Dataset, steps: int) -> None:
        """Take `steps` gradient steps, pruning on schedule."""
        for _ in range(steps):
            self.prune_if_due()
            self.gradient_step += 1
            self.captured_update(dataset)
        self.losses = np.array([sum(self.latest[:2].tolist())])

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

    def update_target(self, step: int) -> None:
        """Copy the online network, zeros included."""
        self.target.load_state_dict(self.online.state_dict())

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the online network."""
        record = sparsity_report(self.online) | {"sparsity/target": self.sparsity}
        names = ("losses/td_loss", "losses/cql_loss", "losses/q_values")
        return record | dict(zip(names, self.latest.tolist()))

    def network(self) -> nn.Module:
        """Return the network to evaluate and to save."""
        return self.online


def main(args: Args) -> None:
    """Train, evaluate the network, and write the results."""
    device, (folder, rom) = find_device(args), find_replay(args)
    require(device.type != "cpu" or not args.compile, "--compile: only with --device cuda")
    args.env_id = args.env_id or rom.title().replace("_", "")
    num_actions = len(make_envs(rom, 1, 1).ale.get_action_set())
    agent = CQL(args, num_actions, device)
    # >>> shared: offline-atari-loop
    dataset = Dataset(folder, num_actions, args, device)
    digest_file = Path(args.resume, "dataset.sha256")
    same = not args.resume or not digest_file.exists() or digest_file.read_text() == dataset.digest
    require(same, f"--dataset {args.dataset} has changed since the run in {args.resume} began")
    args.dataset = str(folder)  # absolute: --resume may come from another folder
    if not args.resume:  # report bad data before the folder is made
        dataset.load(0)
    run = Run(args, rom.title().replace("_", ""))
    run.write(digest_file.name, dataset.digest.encode())
    step, epoch_return = 0, None
    if saved := run.load():
        step, epoch_return = saved["progress"]
        agent.load_state_dict(saved["agent"])
        dataset.generator.set_state(saved["sampling"])
    bar = progress_bar(args.total_timesteps, step, "step")

    while True:
        # Log; a resumed run begins here.
        ended, epoch_ended = step >= args.total_timesteps, step % args.epoch_steps == 0
        if step > 0 and (ended or epoch_ended or step % max(args.target_every, 1000) == 0):
            record = agent.report() | {
                "charts/SPS": (bar.n - bar.initial) / bar.format_dict["elapsed"],
                "charts/learning_rate": args.learning_rate,
                "memory/replay_bytes": dataset.nbytes,
                "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if epoch_ended and not ended and args.eval_episodes > 0:
                record |= evaluate(agent.network(), rom, run)
                epoch_return = record["eval/episodic_return"]
            text = f"return {epoch_return or 0:g}, sparsity {record['sparsity/prunable']:.3f}"
            bar.set_postfix_str(text, refresh=False)
            run.log(step, record)
        if ended:
            break
        # Learn until something is due: every 100 steps, at a target update, at an epoch's end.
        dataset.load(step // args.epoch_steps)
        previous, periods = step, (100, args.target_every, args.epoch_steps)
        step = min(args.total_timesteps, *(step - step % period + period for period in periods))
        agent.learn(dataset, step - previous)
        bar.update(step - previous)
        if not np.isfinite(agent.losses).any():
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.losses.tolist()}; {kept}", 1)
        # Target.
        if step % args.target_every == 0 and step < args.total_timesteps:
            agent.update_target(step)
        # Save; always before an evaluation.
        due = time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes
        if run.stops or due or step % args.epoch_steps == 0 or step >= args.total_timesteps:
            state = {"progress": (step, epoch_return), "agent": agent.state_dict()}
            run.save(step, state | {"sampling": dataset.generator.get_state()})

    bar.close()
    scores = evaluate(agent.network(), rom, run)
    run.finish(step, agent.network(), scores, epoch_return=scores.get("eval/episodic_return"))


# <<< shared: offline-atari-loop
# >>> shared: replay-logs
def find_replay(args: Args) -> tuple[Path, str]:
    """Return the folder of Dopamine's checkpoints in --dataset, and its game's ROM."""
    wanted = find_rom(args.env_id) if args.env_id else ""
    line = "give a folder of Dopamine's checkpoints, or one with GAME/RUN/replay_logs below it"
    require(args.dataset != "", f"--dataset is missing: {line}")
    titles = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    found, where = dict[Path, str](), f"--dataset {args.dataset}:"
    for below in ("", "replay_logs/", "*/replay_logs/", "*/*/replay_logs/"):
        for path in Path(args.dataset).absolute().glob(f"{below}$store$_observation_ckpt.*.gz"):
            games = [titles.get(part.lower().replace("_", ""), "") for part in path.parts[-4:-1]]
            found[path.parent] = max(games, key=bool)
    require(len(found) > 0, f"{where} no $store$_observation_ckpt.0.gz in it or below it")
    if wanted:
        games = sorted({*found.values()} - {""})
        found = {folder: wanted for folder, game in found.items() if game in ("", wanted)}
        require(len(found) > 0, f"--env-id {args.env_id}: {where} has {', '.join(games)}")
    if len(found) > 1:
        seeded = {folder: x for folder, x in found.items() if str(args.seed) in folder.parts[-2:]}
        line = f"{where} has several, name one or its --env-id: {', '.join(map(str, found))}"
        require(len(seeded) == 1, line)
        found = seeded
    ((folder, rom),) = found.items()
    require(rom != "", f"--env-id is missing: {folder} does not name the game")
    return folder, rom


def read_rows(path: Path, shape: tuple[int, ...], kind: type, peek: bool = False) -> np.ndarray:
    """Return the first rows of a gzipped NumPy array; refuse another shape or type.

    With `peek` only the header is read and all rows are zeros. The checksum at the file's end is
    compared only if the array has no more rows.
    """
    try:
        with gzip.open(path) as file:
            np.lib.format.read_magic(file)
            found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            fits = len(found) == len(shape) and found[1:] == shape[1:] and found[:1] >= shape[:1]
            fits = fits and np.issubdtype(dtype, kind) and not fortran
            line = f"must be {kind.__name__} {[*shape]} or longer (--transitions)"
            require(fits, f"{path}: {line}, not {dtype} {[*found]}")
            if peek:
                return np.broadcast_to(np.zeros((), dtype), found)
            data = bytearray(file.read(math.prod(shape) * dtype.itemsize))
            rows = np.frombuffer(data, dtype).reshape(shape)
            require(found != shape or not file.read(1), f"{path}: longer than it says")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        require(False, f"{path}: damaged, truncated or missing ({error})")
    return rows


def find_transitions(
    terminal: np.ndarray, starts: np.ndarray, rewards: np.ndarray, args: Args
) -> tuple[np.ndarray, ...]:
    """Return which rows begin a whole transition, the returns over --n-step, and the discounts.

    All are [n]. `starts` marks rows that do not follow the row before. A state is four rows of one
    episode; a return ends at a terminal and must not cross any other end.
    """
    begins = starts | np.append(True, terminal[:-1])
    kept = ~(begins | np.append([True], begins[:-1]) | np.append([True] * 2, begins[:-2]))
    broken = ~terminal & np.append(starts[1:], True)  # the next state is unknown
    alive, returns = np.ones(len(terminal), bool), np.zeros(len(terminal))
    for i in range(args.n_step):
        rows = np.minimum(np.arange(len(terminal)) + i, len(terminal) - 1)
        returns += np.where(alive, args.gamma**i * rewards[rows], 0)
        kept &= ~(alive & broken[rows])
        alive &= ~terminal[rows]
    return kept, returns, np.where(alive, args.gamma**args.n_step, 0)


class Dataset:
    """An epoch's part of the replay, on the device: the first rows of some checkpoints.

    Frames are stored once; a state is its row's frame and those of the three rows before it.
    Before each episode Dopamine writes three black rows, which its network also saw.
    """

    def __init__(self, folder: Path, num_actions: int, args: Args, device: torch.device) -> None:
        self.folder, self.num_actions, self.args, n = folder, num_actions, args, args.transitions
        self.kinds: dict[str, Any] = {"$store$_observation": np.uint8, "$store$_action": np.integer}
        self.kinds |= {"$store$_reward": np.floating, "$store$_terminal": np.integer}
        names = [path.name.split(".")[-2] for path in folder.glob("$store$_observation_ckpt.*.gz")]
        self.numbers, self.drawn = sorted(int(x) for x in names if x.isdecimal()), list[int]()
        count, digest = args.checkpoints_per_epoch, hashlib.sha256()
        line = f"--checkpoints-per-epoch {count}: {folder} has {len(self.numbers)}"
        require(count <= len(self.numbers), line)
        for number in self.numbers:  # report bad files now, not in epoch 40
            for part in self.kinds:
                self.read(number, part, peek=True)
                with open(self.path(number, part), "rb") as file:
                    size = file.seek(-8, os.SEEK_END)  # gzip's checksum and length
                    digest.update(f"{part} {number} {size} {file.read().hex()}".encode())
        self.digest, size = digest.hexdigest(), count * n
        self.frames = torch.zeros(size + args.n_step, 84, 84, dtype=torch.uint8, device=device)
        self.outcomes = torch.zeros(size, 2, device=device)  # return, discount
        self.actions = torch.zeros(size, dtype=torch.long, device=device)
        self.rows = torch.zeros(size, dtype=torch.long, device=device)  # rows that can be drawn
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # how many of them
        self.stack = torch.arange(-3, 1, device=device)
        self.nbytes = sum(x.nbytes for x in (self.frames, self.outcomes, self.actions, self.rows))
        self.generator = torch.Generator(device).manual_seed(args.seed)

    def path(self, number: int, part: str) -> Path:
        """Return the file of a checkpoint's array."""
        return self.folder / f"{part}_ckpt.{number}.gz"

    def read(self, number: int, part: str, peek: bool = False) -> np.ndarray:
        """Return the first rows of a checkpoint's array."""
        shape = (self.args.transitions, 84, 84)[: 3 if part == "$store$_observation" else 1]
        return read_rows(self.path(number, part), shape, self.kinds[part], peek)

    def load(self, epoch: int) -> None:
        """Read the checkpoints of an epoch, drawn from --seed without replacement."""
        args, rows = self.args, list[np.ndarray]()
        rng = np.random.default_rng((args.seed, epoch))
        drawn = rng.choice(self.numbers, args.checkpoints_per_epoch, replace=False).tolist()
        if sorted(drawn) == self.drawn:
            return
        self.drawn = sorted(drawn)
        for first, number in zip(range(0, len(self.rows), args.transitions), self.drawn):
            arrays = [self.read(number, part) for part in self.kinds]
            kept, actions, returns, discounts = self.checked(number, *arrays)
            place = slice(first, first + args.transitions)
            self.frames[place] = torch.from_numpy(arrays[0])
            self.actions[place] = torch.from_numpy(actions)
            self.outcomes[place] = torch.from_numpy(np.column_stack([returns, discounts]))
            rows.append(first + np.flatnonzero(kept))
        found = torch.from_numpy(np.concatenate(rows))
        require(len(found) > 0, f"{self.folder}: no transition is whole in {self.drawn}")
        self.rows[: len(found)] = found
        self.count.fill_(len(found))

    def checked(
        self, number: int, frames: np.ndarray, actions: Any, rewards: Any, terminal: Any
    ) -> tuple[np.ndarray, ...]:
        """Return which of its rows can be drawn, and actions, returns, discounts."""
        tops = {"$store$_action": self.num_actions, "$store$_terminal": 2}
        for (part, top), values in zip(tops.items(), (actions, terminal)):
            fits = values.min() >= 0 and values.max() < top
            require(fits, f"{self.path(number, part)}: must be in [0, {top})")
        finite = bool(np.isfinite(rewards).all())
        require(finite, f"{self.path(number, '$store$_reward')}: must be finite")
        # A truncated episode shows only by three black rows, the last perhaps not read.
        black = ~frames.any((1, 2)) & (actions == 0) & (rewards == 0) & (terminal == 0)
        three = black & np.append(black[1:], True) & np.append(black[2:], [True, True])
        starts = three & ~np.append(False, black[:-1])
        starts[0] = True
        if (path := self.path(number, "add_count")).exists():  # the rows form a ring
            count = int(read_rows(path, (), np.integer))
            size = len(self.read(number, "$store$_terminal", peek=True))
            line = f"{path}: {count} rows are filled, --transitions is {len(starts)}"
            require(count >= len(starts), line)
            cursor = count % size if count >= size else 0
            starts[cursor : cursor + 1] = True
        clipped = np.clip(rewards, -1, 1).astype(float)
        kept, returns, discounts = find_transitions(terminal == 1, starts, clipped, self.args)
        return kept, actions.astype(np.int64), returns, discounts

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement, without waiting for the device.

        Returns obs, next_obs [B, 4, 84, 84] in [0, 1], actions [B] int64, rewards, discounts [B].
        """
        device, generator = self.rows.device, self.generator
        draw = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        rows = self.rows[(draw * self.count).long()]
        stacks = rows[:, None] + self.stack
        frames = self.frames[stacks], self.frames[stacks + self.args.n_step]
        floats = [x.to(torch.float32, memory_format=torch.channels_last).div_(255) for x in frames]
        return *floats, self.actions[rows], *self.outcomes[rows].unbind(1)


# <<< shared: replay-logs
# >>> shared: atari-games
def find_rom(env_id: str) -> str:
    """Return the ROM (ms_pacman) of MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4."""
    known = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    name = re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", env_id).lower()
    near = " ".join(difflib.get_close_matches(name, known, cutoff=0.3)) or "none"
    require(name in known, f"--env-id {env_id}: no such Atari game; the nearest are: {near}")
    return known[name]


def make_envs(rom: str, num_envs: int, max_steps: int) -> AtariVectorEnv:
    """Make N copies of a game under Dopamine's protocol (Machado et al. 2018).

    Sticky actions 0.25, frameskip 4 with the maximum over two frames, 84x84 grayscale, minimal
    action set, no no-op start, no FIRE reset; losing a life does not end an episode.
    """
    protocol: dict[str, Any] = {"repeat_action_probability": 0.25, "noop_max": 0}
    protocol |= {"use_fire_reset": False, "max_num_frames_per_episode": 4 * max_steps}
    threads = min(num_envs, os.cpu_count() or 1)
    return AtariVectorEnv(rom, num_envs, num_threads=threads, reward_clipping=False, **protocol)


@torch.no_grad()
def evaluate(network: nn.Module, rom: str, run: Run) -> dict[str, float]:
    """Play --eval-episodes side by side at epsilon 0.001; return the values to log."""
    n, seed = run.args.eval_episodes, run.args.seed + 1_000_000
    if n == 0:
        return {}
    envs, rng = make_envs(rom, n, run.args.eval_steps), np.random.default_rng(seed)
    obs, _ = envs.reset(seed=rng.integers(2**31, size=n))
    num_actions, device = len(envs.ale.get_action_set()), next(network.parameters()).device
    scores, over, step = np.zeros(n), np.zeros(n, bool), 0
    with progress_bar(n, 0, "episode", "evaluating") as bar:
        while not over.all():
            greedy = network(torch.from_numpy(obs).to(device) / 255).argmax(1).cpu().numpy()
            explore, step = rng.random(n) < 0.001, step + 1
            actions = np.where(explore, rng.integers(num_actions, size=n), greedy)
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            scores += np.where(over, 0, rewards)
            over |= terminated | truncated
            bar.set_postfix_str(f"step {step} of at most {run.args.eval_steps}", False)
            bar.update(int(over.sum()) - bar.n)
            require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    return {"eval/episodic_return": float(scores.mean()), "eval/episodes": n}


# <<< shared: atari-games
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
        line = f"--transitions {self.transitions}: must be at least {4 + self.n_step}"
        require(self.transitions >= 4 + self.n_step, line)
        require(self.sparsity < 1, "--sparsity: must be below 1")
        ordered = self.prune_start <= self.prune_end
        require(ordered, f"--prune-end {self.prune_end}: must be at least --prune-start")


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
