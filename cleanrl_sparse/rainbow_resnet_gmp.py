# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "ale-py>=0.12.1", "gymnasium>=1.2", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""Rainbow on Atari with gradual magnitude pruning: 95 % of its weights go by the end.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned
network is a good network", ICML 2024, arXiv 2402.12479. The agent is Dopamine's "compact" Rainbow
(Hessel et al. 2018): C51, returns over three steps, prioritised replay, and nothing else: no
double, no dueling, no noisy networks. It is pruned as by JaxPruner.

From 20 % to 80 % of the gradient steps the weights of the smallest magnitude are removed along a
cubic schedule (Zhu and Gupta 2017), every 1,000 gradient steps. What is removed stays removed.

    python rainbow_resnet_gmp.py --env-id Breakout --width 3    # the paper's setting: 40M frames
    python rainbow_resnet_gmp.py --network cnn                  # DQN's convolutions
    python rainbow_resnet_gmp.py --sparsity 0                   # the dense baseline
    python rainbow_resnet_gmp.py --resume RUN_DIR

Differences from the paper, and guesses ([C] read in the paper or its authors' code, [I] inferred,
[D] our decision):
 1. [C] All tensors but biases are pruned, the first and the last layer too, with exact counts.
 2. [I] Sparsity is spread by the Erdos-Renyi-Kernel rule; the schedule's progress multiplies each
    layer's own final sparsity.
 3. [D] The schedule counts this run's gradient steps: 499,000 to 1,996,000 here, 500,000 to
    2,000,000 in the paper.
 4. [D] --width multiplies the channels of the convolutions, not the dense layer. [I] Impala's are
    Dopamine's 16, 32, 32; the paper's table prints 32, 64, 64, which is --width 2.
 5. [C] Priority sqrt(loss + 1e-10), for what is new the highest so far; weight
    1 / sqrt(priority + 1e-10) over the batch's largest; neither exponent is annealed. [D] What is
    new can be drawn as soon as its three steps are there.
 6. [D] Q-variance is that of all Q(s, a) over states and actions, Q-norm the mean of |Q(s, .)|_2.
 7. [D] Games are seeded anew only now and then. With --num-envs above 1 they step while the
    network learns from all earlier steps.

Figures: benchmark/gmp_figure*.sh, all with Rainbow. More: docs/rainbow_resnet_gmp.md.
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
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class Training:
    """The agent and its game. A step is one decision in one environment: 4 frames."""

    env_id: str = "Breakout"  # game, like MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4
    seed: Index = 1  # seed of everything random
    total_timesteps: Count = 10_000_000  # steps of the run, over all environments
    learning_starts: Count = 20_000  # steps of random play before the first gradient step
    buffer_size: Count = 1_000_000  # transitions in the replay, 7.1 KB of memory each
    batch_size: Count = 32  # transitions per gradient step
    learning_rate: Rate = 6.25e-5  # Adam's step size
    adam_eps: Rate = 1.5e-4  # Adam's epsilon
    gamma: Share = 0.99  # discount factor
    n_step: Count = 3  # steps of the return before the bootstrap
    replay_ratio: Rate = 0.25  # gradient steps per step
    target_every: Count = 8_000  # steps between target updates
    epsilon_end: Share = 0.01  # final probability of a random action
    epsilon_steps: Count = 250_000  # steps over which it falls from 1, after the random play
    epoch_steps: Count = 250_000  # steps per epoch, whose mean return is reported
    num_envs: Count = 1  # environments; if several, they step while the agent learns
    network: Literal["cnn", "impala"] = "impala"  # DQN's convolutions or the 15-layer ResNet
    width: Count = 1  # multiplies the channels of the convolutions; the paper: 1 to 5, mainly 3
    feature_size: Count = 512  # units of the dense layer
    eval_episodes: Index = 10  # episodes of the final evaluation, at epsilon 0.001
    eval_steps: Count = 27_000  # steps after which an evaluation episode is cut off


# >>> shared: gmp-flags
@dataclass
class Method:
    """Gradual magnitude pruning; the defaults are the paper's."""

    sparsity: Share = 0.95  # share of the prunable weights that is zero in the end; 0 never prunes
    prune_start: Share = 0.2  # share of the run's gradient steps at which pruning begins
    prune_end: Share = 0.8  # share at which the final sparsity is reached
    prune_every: Count = 1000  # gradient steps between new masks
    analysis_every: Index = 250_000  # steps between analyses of the network; 0: none


# <<< shared: gmp-flags
# >>> shared: networks
class Stack(nn.Module):
    """A convolution, a pooling and two residual blocks of Impala (Espeholt et al. 2018)."""

    def __init__(self, c_in: int, c_out: int, padding: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=padding, ceil_mode=True)
        self.blocks = nn.ModuleList(nn.Conv2d(c_out, c_out, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor, hidden: list[Tensor]) -> Tensor:
        """Halve the sides of x [B, c_in, H, H]; put what each ReLU gives into `hidden`."""
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
        """Return what the hidden layers' ReLUs give for obs [B, 4, 84, 84], floats in [0, 1].

        The last are the features [B, feature_size]. Impala's last convolutions have no part in
        it: the units counted as dormant are those of ReDo's authors (Sokar et al. 2023).
        """
        hidden = list[Tensor]()
        if self.network == "cnn":
            hidden.append(torch.relu(self.conv1(obs)))
            x = nn.functional.pad(hidden[0], (1, 2, 1, 2))  # as XLA's SAME, odd pixel at the end
            hidden.append(torch.relu(self.conv2(x)))
            hidden.append(torch.relu(self.conv3(hidden[1])))
            x = hidden[2]
        else:
            x = self.stack1(obs, hidden)
            x = self.stack2(x, hidden)
            x = torch.relu(self.stack3(x, hidden))
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels-last order: needs no copy
        return [*hidden, torch.relu(self.dense(x))]

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions]."""
        x = self.hidden(obs)[-1]
        with torch.autocast(x.device.type, enabled=False):  # bf16 would blur how the actions differ
            return self.output(x.to(self.output.weight.dtype))


# <<< shared: networks


ATOMS, V_MAX = 51, 10.0  # of the distribution of the return, on [-V_MAX, V_MAX]


def support(like: Tensor) -> Tensor:
    """Return the atoms' values [ATOMS], with the type and on the device of a tensor."""
    return torch.linspace(-V_MAX, V_MAX, ATOMS, device=like.device, dtype=like.dtype)


def project(probabilities: Tensor, returns: Tensor) -> Tensor:
    """Project distributions, probabilities of returns [B, ATOMS], onto the support: [B, ATOMS].

    Each probability is shared between the two nearest atoms, by nearness, or goes to the end.
    """
    distance = (returns.clamp(-V_MAX, V_MAX)[:, :, None] - support(returns)).abs()
    share = (1 - distance / (2 * V_MAX / (ATOMS - 1))).clamp(min=0)  # [B, ATOMS, ATOMS]
    return (share * probabilities[:, :, None]).sum(1)


class C51Network(QNetwork):
    """A categorical distribution of the return for each action (Bellemare et al. 2017)."""

    def __init__(self, num_actions: int, args: Args) -> None:
        super().__init__(num_actions * ATOMS, args)
        if args.network == "cnn":  # Dopamine's: uniform, variance scaling 1 / sqrt(3) by fan-in
            for p in self.parameters():
                limit = math.sqrt(math.sqrt(3) * p.shape[0] / p.numel())
                nn.init.uniform_(p, -limit, limit) if p.ndim > 1 else nn.init.zeros_(p)

    def logits(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to logits [B, num_actions, ATOMS]."""
        return super().forward(obs).unflatten(1, (-1, ATOMS))

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions], the means."""
        logits = self.logits(obs)
        return (logits.softmax(2) * support(logits)).sum(2)


# >>> shared: sparsity
def prunable(network: nn.Module) -> dict[str, Tensor]:
    """Return what pruning may remove: every tensor of two or more dimensions, so no bias."""
    return {k.removesuffix(".weight"): p for k, p in network.named_parameters() if p.ndim >= 2}


def add_masks(network: nn.Module) -> None:
    """Give each prunable weight a mask (1: kept) as a buffer: state_dict() has it too."""
    for i, weight in enumerate(prunable(network).values()):
        network.register_buffer(f"mask{i}", torch.ones_like(weight))


def sparsity_report(network: nn.Module) -> dict[str, float]:
    """Return the shares of zeros, of all prunable weights and of each layer, and what is left."""
    weights, total = prunable(network), sum(p.numel() for p in network.parameters())
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    pruned, size = sum(zeros.values()), sum(weight.numel() for weight in weights.values())
    report = {"prunable": pruned / size, "total": pruned / total, "active_params": total - pruned}
    report |= {f"layer/{name}": zeros[name] / w.numel() for name, w in weights.items()}
    return {f"sparsity/{key}": float(value) for key, value in report.items()}


# <<< shared: sparsity
# >>> shared: pruning
def pruning_scores(network: nn.Module, rng: np.random.Generator) -> list[Tensor]:
    """Return a score of any sign for each prunable weight; the lowest are pruned first.

    Put another criterion here (docs/pruning_criterion.md); a random one draws from `rng`.
    """
    return [weight.abs() for weight in prunable(network).values()]


def erk_densities(network: nn.Module, sparsity: float) -> list[float]:
    """Return the share of each prunable tensor to keep, for a total sparsity in [0, 1].

    The Erdos-Renyi-Kernel rule (Evci et al. 2020): eps * sum(shape) / prod(shape), with eps such
    that the total holds; a tensor that would exceed 1 is dense, and eps is solved again.
    """
    sizes = np.array([weight.numel() for weight in prunable(network).values()])
    sums = np.array([sum(weight.shape) for weight in prunable(network).values()])
    dense = np.zeros(len(sizes), bool)
    for _ in sizes:  # each turn but the last finds another one
        left = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        eps = left / max(1, sums[~dense].sum())
        dense |= eps * sums >= sizes
    return np.where(dense, 1.0, eps * sums / sizes).tolist()


@torch.no_grad()
def prune(network: nn.Module, densities: list[float], rng: np.random.Generator) -> None:
    """Lower the masks to these densities; the weights are left alone.

    Counts are exact, ties go to the lower index, every tensor keeps at least one weight. What is
    pruned stays pruned: it counts as -inf.
    """
    for score, mask, density in zip(pruning_scores(network, rng), network.buffers(), densities):
        flat = torch.where(mask > 0, score, -math.inf).flatten().cpu().numpy()
        kept = max(1, round(len(flat) * density))
        threshold = np.partition(flat, -kept)[-kept]  # far faster than a sort
        keep = flat > threshold
        keep[np.flatnonzero(flat == threshold)[: kept - keep.sum()]] = True
        mask.mul_(torch.from_numpy(keep).view(mask.shape).to(mask.device))


# <<< shared: pruning


# >>> shared: schedule
def pruning_progress(step: int, start: int, end: int) -> float:
    """Return the share of the final sparsity to have at a gradient step, in [0, 1].

    1 - (1 - (t - t0) / (t1 - t0)) ** 3
    """
    if not start <= step < end:
        return float(step >= end)
    return 1 - (1 - (step - start) / (end - start)) ** 3


# <<< shared: schedule
class Rainbow(nn.Module):
    """The online network, which is pruned, and the target network."""

    def __init__(self, args: Args, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.num_actions, self.device = args, num_actions, device
        torch.manual_seed(args.seed)
        self.online = C51Network(num_actions, args)
        add_masks(self.online)
        self.online.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.target = copy.deepcopy(self.online)
        self.weights = list(prunable(self.online).values())
        self.masks = list(self.online.buffers())
        adam: Any = {"lr": args.learning_rate, "eps": args.adam_eps, "capturable": args.compile}
        self.optimizer = torch.optim.Adam(self.online.parameters(), fused=True, **adam)
        self.latest = nn.Buffer(torch.zeros(2, device=device))  # loss and mean Q-value
        self.gradient_step, self.sparsity = 0, 0.0  # sparsity: the schedule's
        steps = math.ceil(args.total_timesteps / args.num_envs) * args.num_envs
        updates = max(1, self.updates_by(steps))  # of the run
        self.start = min(updates - 1, round(args.prune_start * updates))
        self.end = min(updates - 1, round(args.prune_end * updates))
        # Each use of randomness has its own generator.
        uses = ("act", "score")
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.graph: torch.cuda.CUDAGraph | None = None

    def loss(self, obs: Any, next_obs: Any, actions: Any, rewards: Any, discounts: Any) -> Any:
        """Return the cross-entropy to the target and Q(s, a) of each transition, [B] both."""
        rows, atoms = torch.arange(len(obs), device=self.device), support(rewards)
        with torch.no_grad(), self.autocast:
            next_p = self.target.logits(next_obs).softmax(2)
            best = (next_p * atoms).sum(2).argmax(1)  # the target's own greedy actions
            returns = rewards[:, None] + discounts[:, None] * atoms
            target = project(next_p[rows, best], returns)
        with self.autocast:
            log_p = self.online.logits(obs)[rows, actions].log_softmax(1)
        return -(target * log_p).sum(1), (log_p.detach().exp() * atoms).sum(1)

    def update(self, replay: PrioritisedReplay) -> None:
        """Take one gradient step on a batch and set its priorities; never wait for the device."""
        *batch, slots, weights = replay.sample(self.args.batch_size)
        losses, q_values = self.loss(*batch)
        (losses * weights).mean().backward()
        self.optimizer.step()  # gradients and moments are dense
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.latest.copy_(torch.stack([losses.mean(), q_values.mean()]))
            replay.prioritise(slots, losses)

    def learn(self, replay: PrioritisedReplay, step: int) -> None:
        """Prune and update as often as is due by `step`; --compile makes a CUDA graph of it."""
        while self.gradient_step < self.updates_by(step):
            self.prune_if_due()
            self.gradient_step += 1
            if self.graph:
                self.graph.replay()
            else:
                self.update(replay)
            if self.args.compile and not self.graph:  # the update above has loaded the kernels
                self.graph = torch.cuda.CUDAGraph()
                self.graph.register_generator_state(replay.generator)
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.update(replay)

    # >>> shared: gmp-agent
    @torch.no_grad()
    def prune_if_due(self) -> None:
        """Lower the masks along the schedule, every --prune-every gradient steps and at its end.

        They are those of the weights before this gradient step, whose gradient does not know of
        them yet (JaxPruner's order): update() sets to zero what they remove, after Adam's step.
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
        """Return what is logged: of the latest update, and of the online network."""
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
        """Return how many gradient steps are due by a step."""
        ratio = self.args.replay_ratio
        return math.floor(step * ratio) - math.floor(self.args.learning_starts * ratio)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() has besides networks and masks."""
        rng = {use: rng.bit_generator.state for use, rng in self.rng.items()}
        counters = (self.gradient_step, self.sparsity)
        return {"optimizer": self.optimizer.state_dict(), "rng": rng, "counters": counters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what get_extra_state() gave."""
        self.gradient_step, self.sparsity = state["counters"]
        self.optimizer.load_state_dict(state["optimizer"])
        for use, rng in self.rng.items():
            rng.bit_generator.state = state["rng"][use]

    # <<< shared: gmp-agent


def main(args: Args) -> None:
    """Train, evaluate the network, and write the results."""
    device, rom = find_device(args), find_rom(args.env_id)
    envs = AtariEnvs(rom, args.num_envs, args.seed)
    agent = Rainbow(args, envs.num_actions, device)
    replay = PrioritisedReplay(args, device, envs.obs[:, -1])
    run = Run(args, rom.title().replace("_", ""))
    step, returns, epoch_return = 0, list[float](), None  # returns: of this epoch's episodes
    if saved := run.load():
        step, returns, epoch_return = saved["progress"]
        play_again(envs, replay, saved["games"], run)
        agent.load_state_dict(saved["agent"])
        replay.generator.set_state(saved["sampling"])
        for tensor, old in zip(replay.priorities, saved["priorities"]):
            tensor.copy_(old)
    # >>> shared: gmp-loop
    bar = progress_bar(args.total_timesteps, step, "step")

    def passed(period: int) -> bool:
        """Tell whether this step reaches or crosses a multiple of `period`."""
        return step // period > previous // period

    while step < args.total_timesteps:
        previous, step = step, step + args.num_envs
        ended, trained = step >= args.total_timesteps, agent.gradient_step > 0
        # Act and step.
        fallen = min(1.0, max(0.0, (previous - args.learning_starts) / args.epsilon_steps))
        epsilon = 1 + (args.epsilon_end - 1) * fallen
        actions = agent.act(envs.obs, epsilon)
        envs.send(actions)
        if args.num_envs > 1:  # the environments step meanwhile; one keeps the paper's order
            agent.learn(replay, step)
        # Store.
        replay.add(actions, envs.recv(), envs.obs[:, -1])
        for score, length in envs.episodes:
            run.log(step, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns.append(score)
            text = f"return {score:g}, sparsity {agent.sparsity:.3f}"
            bar.set_postfix_str(text, refresh=False)
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
        if args.analysis_every and passed(args.analysis_every) and agent.gradient_step > 0:
            measures, cosines = analyse(agent, replay, args.seed + step)
            run.log(step, measures)
            np.save(file := io.BytesIO(), cosines)
            run.write(f"gradient_covariance-{step:09d}.npy", file.getvalue())
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"progress": (step, returns, epoch_return), "agent": agent.state_dict()}
            games = [bytes(envs.actions), envs.seeded, torch.from_numpy(envs.obs.copy())]
            state |= {"games": games, "sampling": replay.generator.get_state()}
            state["priorities"] = replay.priorities
            run.save(step, state)

    bar.close()
    scores = evaluate(agent.online, rom, run)
    run.finish(step, agent.online, scores, epoch_return=epoch_return)


# >>> shared: analysis
def analyse(agent: Any, replay: FrameReplay, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """Measure the online network on 2,048 states of the replay; return cosines [32, 32], too.

    dormant_T: share of the hidden units (a channel is one) whose mean output is at most T times
    their layer's mean (Sokar et al. 2023). srank: smallest k such that the k largest singular
    values of the features make up 99 % of all (Kumar et al. 2021). Cosines: those between the
    gradients of the losses of 32 transitions.
    """
    first, count = replay.range.tolist()
    drawn = np.random.default_rng(seed).integers(first, first + count, 2048 + 32) % replay.slots
    slots, network = torch.from_numpy(drawn).to(agent.device), agent.online
    means, features, q_values = list[list[Tensor]](), list[Tensor](), list[Tensor]()
    for part in slots[:2048].split(256):
        obs = replay.gather(part)[0]
        with torch.no_grad(), agent.autocast:
            hidden = network.hidden(obs)
            means.append([h.float().transpose(0, 1).flatten(1).mean(1) for h in hidden])
            features.append(hidden[-1].float())
            q_values.append(network(obs))
    layers = [torch.stack(parts).mean(0) for parts in zip(*means)]
    scores = torch.cat([units / (units.mean() + 1e-9) for units in layers])
    spectrum, q = torch.linalg.svdvals(torch.cat(features)), torch.cat(q_values)
    norms = torch.stack([p.detach().norm() for p in network.parameters()])
    measures = {
        "dormant_0": (scores <= 0).float().mean(),
        "dormant_0.1": (scores <= 0.1).float().mean(),
        "srank": 1 + (spectrum.cumsum(0) < 0.99 * spectrum.sum()).sum(),
        "q_variance": q.var(),
        "q_norm": q.norm(dim=1).mean(),
        "param_norm": norms.norm(),
    }
    size = sum(p.numel() for p in network.parameters())
    gradients = torch.empty(32, size, device=agent.device)
    for row, loss in zip(gradients, agent.loss(*replay.gather(slots[2048:]))[0]):
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        row.copy_(torch.cat([part.flatten() for part in parts]))
    products = gradients @ gradients.T
    sizes = products.diag().sqrt().clamp(min=1e-30)
    cosines = (products / sizes[:, None] / sizes).cpu().numpy()
    return {f"analysis/{name}": float(value) for name, value in measures.items()}, cosines


# <<< shared: analysis
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
    action set, no no-op start, no FIRE reset; losing a life ends no episode, 27,000 steps truncate
    it. `obs` [N, 4, 84, 84] uint8 is what the agent sees now: after an end, the next episode's
    start. All of it follows from seeds and actions, which is how a run is restored.
    """

    RESEED_AFTER = 25_000  # steps; seeding reloads the ROM, so most episodes begin without it

    def __init__(self, rom: str, num_envs: int, seed: int, max_steps: int = 27_000) -> None:
        protocol: dict[str, Any] = {"repeat_action_probability": 0.25, "noop_max": 0}
        protocol |= {"use_fire_reset": False, "reward_clipping": False}
        protocol |= {"max_num_frames_per_episode": 4 * max_steps, "autoreset_mode": "SameStep"}
        threads = min(num_envs, os.cpu_count() or 1)
        self.envs = AtariVectorEnv(rom, num_envs, num_threads=threads, **protocol)
        self.num_actions = len(self.envs.ale.get_action_set())
        self.seed, self.step, self.actions = seed, 0, bytearray()  # all actions, N to a step
        self.seeded = [list[int]() for _ in range(num_envs)]  # before which steps
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.begin(np.ones(num_envs, bool))

    def begin(self, which: np.ndarray) -> None:
        """Seed the environments of the mask `which` [N] anew and start their episodes."""
        rows = np.flatnonzero(which).tolist()
        keys = [np.random.SeedSequence((self.seed, i, self.step)) for i in rows]
        seeds = np.array([key.generate_state(1)[0] >> 1 for key in keys], np.int64)
        for i in rows:
            self.seeded[i].append(self.step)
        options = {} if which.all() else {"reset_mask": which}
        self.obs, _ = self.envs.reset(seed=seeds, options=options)
        self.returns[which] = self.lengths[which] = 0

    def send(self, actions: np.ndarray) -> None:
        """Start a step with actions [N] int64; the environments run in threads until recv()."""
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
    """Play a checkpoint's games again, from the last seedings before all that the replay holds."""
    past, seeded, obs = games
    actions = np.frombuffer(past, np.uint8).reshape(-1, replay.num_envs)
    first = max(0, len(actions) - replay.rows)
    begins = np.array([max(step for step in steps if step <= first) for steps in seeded])
    envs.step = replay.step = int(begins.min())
    envs.actions = bytearray(actions[: envs.step].tobytes())
    bar = progress_bar(len(actions), envs.step, "step", "playing again")
    for row in actions[envs.step :]:
        if (begins == envs.step).any():  # before its begin an environment plays something else
            envs.begin(begins == envs.step)
        envs.send(row.astype(np.int64))
        replay.add(row, envs.recv(), envs.obs[:, -1])
        bar.update()
        require(not run.stops, f"stopped; go on with --resume {run.path}", 75)
    bar.close()
    envs.seeded = seeded
    same = np.array_equal(envs.obs, obs.numpy())
    require(same, "--resume: the games went differently; install the ale-py of versions.json")


@torch.no_grad()
def evaluate(network: nn.Module, rom: str, run: Run) -> dict[str, float]:
    """Play --eval-episodes together at epsilon 0.001; return what is logged of them."""
    n, seed = run.args.eval_episodes, run.args.seed + 1_000_000  # none of training's seeds
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
                scores.setdefault(i, score)
            bar.set_postfix_str(f"step {envs.step} of at most {run.args.eval_steps}", False)
            bar.update(len(scores) - bar.n)
            require(not run.stops, f"stopped; go on with --resume {run.path}", 75)
    return {"eval/episodic_return": sum(scores.values()) / n, "eval/episodes": n}


# <<< shared: atari-env
# >>> shared: n-step-replay
class FrameReplay:
    """Uniform replay of the last --buffer-size transitions, on the device; frames are stored once.

    A ring of rows, one per step of all N environments: slot row * N + i holds the newest frame that
    environment i showed, what was done then, and where in `frames` its transition's lie: -1 is the
    black frame before an episode. The last frame of a truncated episode lies behind the slots.
    A transition is put together when it is drawn: over --n-step steps, fewer if its episode ends.
    """

    EPISODE = 27_000  # steps of an episode that is truncated

    def __init__(self, args: Args, device: torch.device, first_frames: np.ndarray) -> None:
        self.num_envs = n = args.num_envs
        self.n_step = args.n_step
        self.capacity = math.ceil(args.buffer_size / n)  # rows to draw from
        self.rows = self.capacity + 3 + args.n_step  # with three older frames, and newer ones
        self.slots, self.extra = self.rows * n, (self.rows // self.EPISODE + 2) * n
        shape = (self.slots + self.extra + 1, *first_frames.shape[1:])
        self.frames = torch.empty(shape, dtype=torch.uint8, device=device)
        self.frames[-1] = 0
        # Per slot: action, clipped reward (a whole number), terminated, positions of 4 + 1 frames.
        self.facts = torch.zeros(self.slots, 8, dtype=torch.int32, device=device)
        self.ahead = torch.arange(args.n_step, device=device) * n
        self.powers = args.gamma ** torch.arange(args.n_step + 1, device=device)
        self.range = torch.zeros(2, dtype=torch.long, device=device)  # oldest transition, count
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.nbytes = self.frames.nbytes + self.facts.nbytes
        self.step = self.truncations = self.count = 0
        self.stacks = np.column_stack([np.full((n, 3), -1), np.arange(n)])  # of what is seen now
        self.frames[:n] = torch.from_numpy(first_frames)

    def add(self, actions: np.ndarray, step: tuple[np.ndarray, ...], frames: np.ndarray) -> None:
        """Store actions [N], the step that envs.recv() returned, and the frames seen now."""
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
        self.facts[slot : slot + n] = torch.from_numpy(np.column_stack(columns).astype(np.int32))
        self.frames[seen[0] : seen[0] + n] = torch.from_numpy(frames)
        self.stacks[terminated | truncated] = -1
        self.stacks = np.column_stack([self.stacks[:, 1:], seen])
        whole = max(0, self.step + 1 - self.n_step)  # rows whose n steps are there
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
        of the value of next_obs, gamma ** steps, or 0 where the episode terminated.
        """
        facts = self.facts[(slots[:, None] + self.ahead) % self.slots]  # [B, n, 8]
        ends = ((facts[:, :, 2] > 0) | (facts[:, :, 7] >= self.slots)).long()
        taken = ends.cumsum(1) == ends  # [B, n]: is there no end before this step?
        steps = taken.sum(1)
        last = facts[torch.arange(len(slots), device=slots.device), steps - 1]  # [B, 8]
        stacks = self.frames[facts[:, 0, 3:7]], self.frames[last[:, 4:8]]
        floats = [s.to(torch.float32, memory_format=torch.channels_last).div_(255) for s in stacks]
        rewards = (facts[:, :, 1] * self.powers[:-1] * taken).sum(1)
        return *floats, facts[:, 0, 0].long(), rewards, self.powers[steps] * (1 - last[:, 2])


# <<< shared: n-step-replay


class PrioritisedReplay(FrameReplay):
    """Draws transitions in proportion to their priorities, stratified as in Dopamine.

    Priorities lie in blocks of 1,024 with a sum each: a draw looks for its block among the sums,
    then within the block. That is a sum tree of two levels (Schaul et al. 2016): a few kernels.
    """

    def __init__(self, args: Args, device: torch.device, first_frames: np.ndarray) -> None:
        super().__init__(args, device, first_frames)
        self.priority = torch.zeros(math.ceil(self.slots / 1024), 1024, device=device)
        self.sums = torch.zeros(len(self.priority), dtype=torch.float64, device=device)
        self.highest = torch.ones((), device=device)  # so far; what is new gets it
        self.priorities = [self.priority, self.sums, self.highest]  # for a checkpoint
        self.nbytes += self.priority.nbytes + self.sums.nbytes

    def add(self, actions: np.ndarray, step: tuple[np.ndarray, ...], frames: np.ndarray) -> None:
        """Store a step; what began n steps ago can be drawn from now on, the oldest no longer."""
        super().add(actions, step, frames)
        row = torch.arange(self.num_envs, device=self.frames.device)
        self.set((self.step + 3) % self.rows * self.num_envs + row, 0.0)
        if self.step >= self.n_step:
            newest = (self.step - self.n_step) % self.rows
            self.set(newest * self.num_envs + row, self.highest)

    def set(self, slots: Tensor, priority: Tensor | float) -> None:
        """Set the priorities at slots [B]."""
        self.priority.view(-1)[slots] = priority
        blocks = slots // 1024
        self.sums[blocks] = self.priority[blocks].double().sum(1)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions, one from each of equal parts of the sum; never wait for the device.

        Returns what gather() does, and slots and weights [B]; the largest weight is 1.
        """
        ends, device, below = self.sums.cumsum(0), self.frames.device, 1 - 1e-15
        draw = torch.rand(batch_size, dtype=torch.float64, device=device, generator=self.generator)
        draw = (torch.arange(batch_size, device=device) + draw) / batch_size * ends[-1]
        blocks = torch.searchsorted(ends, draw.clamp(max=ends[-1] * below), right=True)
        within = self.priority[blocks].double().cumsum(1)  # [B, 1024]
        rest = (draw - ends[blocks] + self.sums[blocks]).clamp(min=0)
        rest = rest.minimum(within[:, -1] * below)[:, None]
        slots = blocks * 1024 + torch.searchsorted(within, rest, right=True)[:, 0]
        weights = (self.priority.view(-1)[slots] + 1e-10).rsqrt()
        return *self.gather(slots), slots, weights / weights.max()

    def prioritise(self, slots: Tensor, losses: Tensor) -> None:
        """Give the transitions at slots [B] the priorities sqrt(loss + 1e-10).

        A loss that is not finite ends the run, but not before the step's other updates have drawn.
        """
        priority = (losses.nan_to_num(0, 0, 0) + 1e-10).sqrt().to(self.priority)
        self.set(slots, priority)
        self.highest.copy_(self.highest.maximum(priority.max()))


# >>> shared: run-flags
def integer(metavar: str) -> PrimitiveConstructorSpec[int]:
    """Return how a whole number is read, which may be written as 1e6."""

    def read(words: list[str]) -> int:
        number = float(words[0])  # exact below 2^53
        return int(number) if number.is_integer() and number < 2**53 else int(words[0])

    return PrimitiveConstructorSpec(1, metavar, read, lambda _: True, lambda x: [str(x)])


# Types of flags: the smallest and the largest value, and what --help and messages say of them.
ABOVE_0, LARGEST = math.nextafter(0, 1), sys.float_info.max
Count = Annotated[int, (1, math.inf, "at least 1"), integer("INT >= 1")]
Index = Annotated[int, (0, 2**32 - 1, "in [0, 2^32)"), integer("INT >= 0")]
Amount = Annotated[float, (0, LARGEST, "at least 0 and finite"), tyro.conf.arg(metavar="X >= 0")]
Rate = Annotated[float, (ABOVE_0, LARGEST, "above 0 and finite"), tyro.conf.arg(metavar="X > 0")]
Share = Annotated[float, (0, 1, "in [0, 1]"), tyro.conf.arg(metavar="X in [0, 1]")]


@dataclass
class Running:
    """Where and how it runs."""

    device: str = "auto"  # auto, cpu, cuda or cuda:INDEX
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights and Adam stay fp32
    compile: bool = False  # sampling and update as a CUDA graph (not yet tried on a GPU)
    run_dir: str = ""  # folder, new or empty; default: a new runs/{env}__{script}__{seed}__{time}
    resume: str = ""  # go on with the run in this folder; it has all flags, so give no other
    checkpoint_minutes: Amount = 10.0  # minutes between checkpoints
    keep_checkpoint: bool = False  # keep the last ones when the run has finished
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "cleanrl-sparse"  # project there


# <<< shared: run-flags
# >>> shared: gmp-args
@dataclass
class Args(Running, Training, Method):
    """All flags."""

    def __post_init__(self) -> None:
        """Refuse values that are not accepted, naming the flag."""
        check_ranges(self)
        least = max(self.batch_size, self.num_envs)
        smallest = min(self.learning_starts, self.buffer_size)
        text = f"--learning-starts, --buffer-size {smallest}: at least --batch-size and --num-envs"
        require(smallest >= least, f"{text}, {least}")
        require(self.target_every >= self.num_envs, "--target-every: must be at least --num-envs")
        most = self.learning_starts // self.num_envs
        text = f"--n-step {self.n_step}: at most --learning-starts / --num-envs"
        require(self.n_step <= most, f"{text}, {most}")
        require(self.sparsity < 1, "--sparsity: must be below 1")
        ordered = self.prune_start <= self.prune_end
        require(ordered, f"--prune-end {self.prune_end}: must be at least --prune-start")


# <<< shared: gmp-args
# >>> shared: run
class Run:
    """A run's folder: records (metrics.jsonl is the source of truth), checkpoints, the model."""

    def __init__(self, args: Args, title: str) -> None:
        script, at = Path(__file__), time.time_ns() // 1000
        name = args.resume or args.run_dir or f"runs/{title}__{script.stem}__{args.seed}__{at}"
        self.args, self.path, self.script = args, Path(name), {"script": script.name}
        self.folder, self.newest, self.saved_at = self.path / "checkpoint", "", time.monotonic()
        fresh = not any(self.path.glob("[!.]*")) and not self.path.is_file()
        line = f"--run-dir {self.path}: exists; to go on with the run in it, --resume {self.path}"
        require(fresh or args.resume != "", line)
        if args.track:
            import wandb

            own: Any = {"name": self.path.resolve().name, "project": args.wandb_project}
            own["id"] = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]
            wandb.init(**own, resume="allow", config=vars(args), sync_tensorboard=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "a")
        try:
            if os.environ.get("RUN_LOCK") != str(self.path):  # benchmark/launch.py has locked it
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, f"{self.path}: another process is at work on this run")
        if fresh:
            git = ["sh", "-c", "git rev-parse HEAD"]  # where there is no git, nothing is said
            head = subprocess.run(git, cwd=script.parent, capture_output=True).stdout.decode()
            cpu = args.device == "cpu"
            device = platform.platform() if cpu else torch.cuda.get_device_name()
            facts = {"commit": head.strip() or None, "device": device, "python": sys.version}
            packages = {d.name: d.version for d in reversed([*distributions()])}
            self.write("args.json", self.script | vars(args))  # first: --resume needs it alone
            self.write("versions.json", facts | {"packages": packages})
        self.folder.mkdir(exist_ok=True)
        self.stops: list[int] = []  # signals; what is ignored, as SIGHUP under nohup, stays so
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.stops.append(number))

    def write(self, name: str, data: bytes | dict[str, Any]) -> None:
        """Write a file, a dict as JSON; a crash leaves it whole or absent."""
        with open(self.path / ".tmp", "wb") as file:
            file.write(data if isinstance(data, bytes) else json.dumps(data, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path / ".tmp", self.path / name)

    def load(self) -> dict[str, Any]:
        """Return the newest whole checkpoint, {} before the first; cut the records back to it."""
        state = dict[str, Any]()
        for path in sorted(self.folder.iterdir(), reverse=True):
            data = path.read_bytes()
            if path.name.endswith(hashlib.sha256(data).hexdigest()):
                state = torch.load(io.BytesIO(data), "cpu", weights_only=True)
                self.newest = path.name
                print(f"{self.path}: going on from step {state['step']}")
                break
            print(f"{path} is damaged; looking for the checkpoint before it", file=sys.stderr)
        else:
            require(not any(self.folder.iterdir()), f"{self.folder}: no checkpoint is whole", 1)
        self.start = time.time() - state.get("seconds", 0.0)
        self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
        whole = self.metrics.tell() >= state.get("metrics", 0)
        require(whole, f"{self.metrics.name} is shorter than when the checkpoint was written")
        self.metrics.truncate(state.get("metrics", 0))
        self.board = SummaryWriter(str(self.path), purge_step=state.get("step", 0) + 1)
        self.board.add_text("flags", "\n".join(f"    {k}: {v}" for k, v in vars(self.args).items()))
        return state

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a record to metrics.jsonl, and give it to TensorBoard."""
        record = {"step": step, "seconds": round(time.time() - self.start, 3)} | values
        self.metrics.write(json.dumps(record).encode() + b"\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, named by step and SHA-256; a run that has got a signal ends here."""
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
        require(not self.stops, f"stopped at step {step}; go on with --resume {self.path}", 75)

    def finish(self, step: int, network: nn.Module, scores: dict[str, float], **facts: Any) -> None:
        """Save the network with its flags, write final.json, and tell what came out."""
        flags = self.script | vars(self.args) | {"run_dir": "", "resume": ""}
        parameters = network.named_parameters()  # + 0.0 makes 0.0 of -0.0
        weights = {k: p.detach().cpu().contiguous() + 0.0 for k, p in parameters}
        self.write("model.safetensors", save(weights, {"flags": json.dumps(flags)}))
        if scores:
            self.log(step, scores)
        metrics = {f"hparams/{key}": value for key, value in scores.items()}
        self.board.add_hparams(vars(self.args), metrics, run_name=".", global_step=step)
        self.board.close()
        facts |= {"status": "finished", "step": step, "seconds": time.time() - self.start}
        self.write("final.json", facts | scores | sparsity_report(network))
        for path in [] if self.args.keep_checkpoint else self.folder.iterdir():
            path.unlink()
        print(f"{(self.path / 'final.json').read_text()}\neverything is in {self.path}")


def require(accepted: bool, line: str, status: int = 2) -> None:
    """End with a line unless `accepted`: 2 is bad input, 1 a fault, 75 stopped and resumable."""
    if not accepted:
        for bar in [*getattr(tqdm, "_instances", ())]:
            bar.close()  # so that the line is the output's last
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        sys.exit(status)


def check_ranges(args: Args) -> None:
    """Refuse values outside their flag's range."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for low, high, text in getattr(hint, "__metadata__", ())[:1]:
            flag, value = name.replace("_", "-"), getattr(args, name)
            require(low <= value <= high, f"--{flag} {value}: must be {text}")


def find_device(args: Args) -> torch.device:
    """Return the device of --device; fp32 means fp32 there."""
    known = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    name = {"auto": known[0], "cuda": "cuda:0"}.get(args.device, args.device)
    require(name in known, f"--device {args.device}: this machine has {', '.join(known)}")
    require(name != "cpu" or not args.compile, "--compile: only with --device cuda")
    torch.backends.cudnn.allow_tf32 = False
    if name != "cpu":
        torch.cuda.set_device(name)
    args.device = name  # a run is resumed where it began: generators differ between devices
    return torch.device(name)


def progress_bar(total: int, initial: int, unit: str, about: str = "") -> tqdm:
    """Return a bar; where the output is no terminal, a plain line now and then."""
    options: Any = {"unit": unit, "desc": about, "unit_scale": True, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        line = "{l_bar}{n_fmt}/{total_fmt}, {rate_fmt}{postfix}\n"
        options |= {"mininterval": 30, "bar_format": line}
    return tqdm(total=total, initial=initial, **options)


def parse() -> Args:
    """Return the flags of the command line; with --resume those of the run."""
    groups = make_dataclass("Flags", [(c.__name__.lower(), c) for c in reversed(Args.__bases__)])
    about, config = (__doc__ or "").partition("\n")[0], (tyro.conf.OmitArgPrefixes,)
    parts = vars(tyro.cli(groups, description=about, config=config)).values()
    args = Args(**{name: value for part in parts for name, value in vars(part).items()})
    if not any(flag.startswith("--resume") for flag in sys.argv):
        return args
    others = [x for x in sys.argv[1:] if x.startswith("--") and not x.startswith("--resume")]
    require(not others, f"--resume takes every flag from the run; leave out {' '.join(others)}")
    try:
        saved = json.loads(Path(args.resume, "args.json").read_text())
        require(saved.pop("script") == Path(__file__).name, "--resume: the run of another script")
        saved = Args(**saved | {"resume": args.resume or "."})
    except (OSError, ValueError, TypeError, KeyError) as error:
        require(False, f"--resume {args.resume}: no run of this script is there ({error})")
    finished = Path(args.resume, "final.json").exists()
    require(not finished, f"{args.resume} is finished; nothing is left to do", 0)
    return saved


class Output(io.FileIO):
    """Standard output or error; what nobody reads any more is dropped, and ends no run."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def command_line() -> None:
    """Run main; a fault ends it with one line and an exit status."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", max)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # glibc keeps freed memory:
        mallopt(option, value)  # else every update faults its gradients' pages in anew
    try:
        main(parse())
    except Exception as error:
        about = f"{type(error).__name__}: "
        if "allocate" in str(error):
            about = "these flags need more memory than there is: "
        elif type(error).__module__.startswith("wandb"):
            about = "--track (WANDB_MODE=offline needs no account), --wandb-project: "
        elif not isinstance(error, OSError):
            traceback.print_exc()  # a fault of ours
        require(False, about + str(error).partition("\n")[0], 1)


if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # takes the place of a stream that was closed
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = io.BufferedWriter(Output(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, errors="replace", line_buffering=True))
    command_line()
# <<< shared: run
