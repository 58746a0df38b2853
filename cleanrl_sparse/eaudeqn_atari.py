# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "ale-py>=0.12.1", "gymnasium>=1.2", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""Eau De Q-Network on Atari: a DQN that prunes itself as it learns.

Paper: Vincent, Faust, Tripathi, Peters, D'Eramo, "Eau De Q-Network: Adaptive Distillation of
Neural Networks in Deep Reinforcement Learning", 2025, arXiv 2503.01437 (its online variant).

K online networks learn from one replay and share one target network. At every target update the
network with the smallest loss accumulated since the last one becomes the target; network 1 becomes
its copy, the others become copies pruned further, each by its own random amount. So no one has to
set when pruning starts, how fast it goes or where it ends.

    python eaudeqn_atari.py --env-id Breakout                       # the paper's run: 40M frames
    python eaudeqn_atari.py --num-networks 1 --no-reset-optimizer   # plain DQN
    python eaudeqn_atari.py --resume RUN_DIR

Differences from the paper, and guesses ([I] inferred, [D] our decision; no code was published):
 1. [I] The formula of next_sparsity(), which fits every published symbol and value.
 2. [D] Sparsity is spread by the Erdos-Renyi-Kernel rule; [I] biases are never pruned.
 3. [I] Each action is chosen by a network drawn with odds 1 / (accumulated loss + 1e-6).
 4. [I] The loss is the squared TD error; a target update resets Adam, step counts included.
 5. [D] All networks start as copies of one. The one with the smallest loss is evaluated and saved.
 6. [D] Epsilon decays after the warm-up, as in Dopamine. Games are reseeded only now and then.
 7. [D] With --num-envs above 1 the games step while the networks learn from all earlier steps.

Figures: benchmark/eaudedqn_*.sh. More: docs/eaudeqn_atari.md.
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

    env_id: str = "Breakout"  # game, e.g. MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4
    seed: Index = 1  # random seed
    total_timesteps: Count = 10_000_000  # total steps, summed over all environments
    learning_starts: Count = 20_000  # steps of random play before the first gradient step
    buffer_size: Count = 1_000_000  # transitions in the replay, each 7.1 KB of memory
    batch_size: Count = 32  # transitions per gradient step
    learning_rate: Rate = 6.25e-5  # Adam's step size
    adam_eps: Rate = 1.5e-4  # Adam's epsilon
    gamma: Share = 0.99  # discount factor
    replay_ratio: Rate = 0.25  # gradient steps per environment step
    target_every: Count = 8_000  # steps between target updates
    epsilon_end: Share = 0.01  # final probability of a random action
    epsilon_steps: Count = 250_000  # steps over which epsilon decays from 1, after the random play
    epoch_steps: Count = 250_000  # steps per epoch; the mean return of each is reported
    num_envs: Count = 1  # environments; if several, they step while the agent learns
    feature_size: Count = 512  # units of the dense layer; the paper has 32, 512 and 2048
    eval_episodes: Index = 10  # episodes of the final evaluation, at epsilon 0.001; 0: none
    eval_steps: Count = 27_000  # steps after which an evaluation episode is cut off


@dataclass
class Method:
    """Eau De Q-Network; the defaults are the paper's."""

    num_networks: Count = 5  # K, the online networks
    max_exponent: Amount = 3.0  # U_max: exponents are drawn from U(0, U_max); 0 never prunes
    max_sparsity_step: Share = 0.01  # S_max: most sparsity added at one target update
    behaviour: Literal["inverse-loss", "uniform", "argmin"] = "inverse-loss"  # which network acts
    reset_optimizer: bool = True  # zero Adam's moments and step counts at each target update


class QNetwork(nn.Module):
    """DQN's Q-values of stacked frames (Mnih et al. 2015), in Dopamine's form."""

    def __init__(self, num_actions: int, args: Args) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 32, 8, stride=4, padding=2)  # 84 -> 21
        self.conv2 = nn.Conv2d(32, 64, 4, stride=2)  # 21 -> 11
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.dense = nn.Linear(11 * 11 * 64, args.feature_size)
        self.output = nn.Linear(args.feature_size, num_actions)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions]."""
        x = torch.relu(self.conv1(obs))
        x = nn.functional.pad(x, (1, 2, 1, 2))  # as XLA's SAME: odd pixel at the end
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.conv3(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels-last order needs no copy
        x = torch.relu(self.dense(x))
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to rank actions
            return self.output(x.to(self.output.weight.dtype))


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
def next_sparsity(sparsity: float, exponent: float, step: int, args: Args) -> float:
    """Return a candidate's sparsity from `step` until the next target update.

    min(1 - (1 - s) * ((H - t - T) / (H - t)) ** n, s + S_max), H: the run's length, T: the period.
    A constant n gives the polynomial schedule 1 - (1 - t / H) ** n; n = 0 prunes nothing.
    """
    left = args.total_timesteps - step
    base = max(0.0, (left - args.target_every) / left)
    return min(1.0, sparsity + min((1 - sparsity) * (1 - base**exponent), args.max_sparsity_step))


class EauDeQN(nn.Module):
    """K online networks with accumulated losses, and the target network they share."""

    def __init__(self, args: Args, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.num_actions, self.device = args, num_actions, device
        torch.manual_seed(args.seed)
        self.target = QNetwork(num_actions, args)
        add_masks(self.target)
        self.target.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        k = args.num_networks
        self.online: Any = nn.ModuleList(copy.deepcopy(self.target) for _ in range(k))
        self.weights = [w for network in self.online for w in prunable(network).values()]
        self.masks = list(self.online.buffers())
        adam: Any = {"lr": args.learning_rate, "eps": args.adam_eps, "capturable": args.compile}
        self.optimizer = torch.optim.Adam(self.online.parameters(), fused=True, **adam)
        self.accumulated_loss = nn.Buffer(torch.zeros(k, device=device))  # since target update
        self.latest = nn.Buffer(torch.zeros(2, k, device=device))  # losses and mean Q-values
        self.losses = np.zeros(k)  # copy of accumulated_loss on the host
        self.sparsity = [0.0] * k  # nominal; the masks' counts are rounded
        self.gradient_step, self.selected = 0, 0
        uses = ("act", "network", "exponent", "score")  # a generator each: K = 1 acts as DQN does
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.graph: torch.cuda.CUDAGraph | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() holds besides networks, masks and accumulated losses."""
        rng = {use: rng.bit_generator.state for use, rng in self.rng.items()}
        counters = (self.gradient_step, self.selected, self.losses.tolist(), self.sparsity)
        return {"optimizer": self.optimizer.state_dict(), "rng": rng, "counters": counters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what get_extra_state() returned."""
        self.gradient_step, self.selected, losses, self.sparsity = state["counters"]
        self.losses = np.array(losses)
        self.optimizer.load_state_dict(state["optimizer"])
        for use, rng in self.rng.items():
            rng.bit_generator.state = state["rng"][use]

    def best(self) -> int:
        """Return the index of the smallest loss; NaN never wins, and the first wins a tie."""
        return int(np.where(np.isfinite(self.losses), self.losses, math.inf).argmin())

    @torch.no_grad()
    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """Return epsilon-greedy actions [N] for obs [N, 4, 84, 84], by networks drawn at random."""
        explore = self.rng["act"].random(len(obs)) < epsilon
        actions = self.rng["act"].integers(self.num_actions, size=len(obs))
        odds = np.isfinite(self.losses).astype(float)
        if self.args.behaviour == "inverse-loss":
            odds = np.where(odds > 0, 1 / (self.losses + 1e-6), 0)
        elif self.args.behaviour == "argmin":
            odds = np.eye(len(odds))[self.best()]
        drawn = self.rng["network"].choice(len(odds), size=len(obs), p=odds / odds.sum())
        for k in set(drawn[~explore]):
            chosen = ~explore & (drawn == k)
            with self.autocast:
                q_values = self.online[k](torch.from_numpy(obs[chosen]).to(self.device) / 255)
            actions[chosen] = q_values.argmax(1).cpu().numpy()
        return actions

    def update(self, obs: Any, next_obs: Any, actions: Any, rewards: Any, terminated: Any) -> None:
        """Take one gradient step with all networks, without waiting for the device."""
        with torch.no_grad(), self.autocast:
            next_q = self.target(next_obs).max(1).values
            td_target = rewards + self.args.gamma * next_q * (1 - terminated)  # [B]
        with self.autocast:  # a loop: vmap and grouped convolutions were slower (see the docs)
            q = [network(obs).gather(1, actions[:, None]) for network in self.online]
        q_taken = torch.cat(q, 1).T  # [K, B]
        losses = (q_taken - td_target).square().mean(1)  # [K]
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.accumulated_loss.add_(losses)
            self.latest.copy_(torch.stack([losses, q_taken.mean(1)]))

    def learn(self, replay: FrameReplay, step: int) -> None:
        """Take the gradient steps due by `step`; --compile captures a CUDA graph."""
        ratio = self.args.replay_ratio
        due = math.floor(step * ratio) - math.floor(self.args.learning_starts * ratio)
        while self.gradient_step < due:
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
            if self.gradient_step == due:  # once, since it waits for the device
                self.losses = np.array(self.accumulated_loss.tolist())

    @torch.no_grad()
    def update_target(self, step: int) -> None:
        """Copy the best network to the target and network 1, and pruned copies to the others."""
        args, best = self.args, self.best()
        sparsity = self.sparsity[best]
        self.target.load_state_dict(self.online[best].state_dict())
        for k, network in enumerate(self.online):
            network.load_state_dict(self.target.state_dict())
            exponent = self.rng["exponent"].uniform(0, args.max_exponent) if k > 0 else 0.0
            self.sparsity[k] = next_sparsity(sparsity, exponent, step, args)
            if self.sparsity[k] > sparsity:
                prune(network, erk_densities(network, self.sparsity[k]), self.rng["score"])
            if self.optimizer.state and (args.reset_optimizer or not math.isfinite(self.losses[k])):
                for p in network.parameters():
                    torch._foreach_zero_(list(self.optimizer.state[p].values()))
        torch._foreach_mul_(self.weights, self.masks)
        self.accumulated_loss.zero_()
        self.losses, self.selected = np.zeros(len(self.online)), best + 1

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the network to save."""
        record = sparsity_report(self.online[self.best()]) | {"sparsity/target": self.sparsity[0]}
        record |= {f"sparsity/candidate_{k}": s for k, s in enumerate(self.sparsity, 1)}
        if self.gradient_step > 0:
            loss, q_value = self.latest.mean(1).tolist()
            record |= {"losses/td_loss": loss, "losses/q_values": q_value}
        return record | ({"sparsity/selected": self.selected} if self.selected else {})


def main(args: Args) -> None:
    """Train, evaluate the network with the smallest loss, and write the results."""
    device, rom = find_device(args), find_rom(args.env_id)
    require(device.type != "cpu" or not args.compile, "--compile: only with --device cuda")
    envs = AtariEnvs(rom, args.num_envs, args.seed)
    agent = EauDeQN(args, envs.num_actions, device)
    replay = FrameReplay(args, device, envs.obs[:, -1])
    run = Run(args, rom.title().replace("_", ""))
    step, returns, epoch_return = 0, list[float](), None  # returns: this epoch's episodes
    if saved := run.load():
        step, returns, epoch_return = saved["progress"]
        play_again(envs, replay, saved["games"], run)
        agent.load_state_dict(saved["agent"])
        replay.generator.set_state(saved["sampling"])
    bar = progress_bar(args.total_timesteps, step, "step")

    def passed(period: int) -> bool:
        """Return whether this step reached or crossed a multiple of `period`."""
        return step // period > previous // period

    while step < args.total_timesteps:
        previous, step = step, step + args.num_envs
        ended = step >= args.total_timesteps
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
            bar.set_postfix_str(f"return {score:g}, sparsity {agent.sparsity[0]:.3f}", False)
        # Learn.
        if args.num_envs == 1:
            agent.learn(replay, step)
        if not np.isfinite(agent.losses).any():
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.losses.tolist()}; {kept}", 1)
        # Prune and target.
        if agent.losses.any() and passed(args.target_every) and not ended:
            agent.update_target(step // args.target_every * args.target_every)
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
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"progress": (step, returns, epoch_return), "agent": agent.state_dict()}
            games = [bytes(envs.actions), envs.seeded, torch.from_numpy(envs.obs.copy())]
            state |= {"games": games, "sampling": replay.generator.get_state()}
            run.save(step, state)

    bar.close()
    network = agent.online[agent.best()]
    run.finish(step, network, evaluate(network, rom, run), epoch_return=epoch_return)


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
class FrameReplay:
    """Uniform replay of the last --buffer-size transitions, on the device; frames are stored once.

    A ring of rows, one per step of all N environments: slot row * N + i holds the newest frame of
    environment i, the action taken on it, and the positions in `frames` of its transition's frames:
    -1 is the black frame before an episode. Truncated episodes' last frames lie behind the slots.
    """

    EPISODE = 27_000  # steps after which an episode is truncated

    def __init__(self, args: Args, device: torch.device, first_frames: np.ndarray) -> None:
        self.num_envs = n = args.num_envs
        self.rows = math.ceil(args.buffer_size / n) + 4  # plus three older rows, one newer
        self.slots, self.extra = self.rows * n, (self.rows // self.EPISODE + 2) * n
        shape = (self.slots + self.extra + 1, *first_frames.shape[1:])
        self.frames = torch.empty(shape, dtype=torch.uint8, device=device)
        self.frames[-1] = 0
        # Per slot: action, clipped reward (a whole number), terminated, positions of 4 + 1 frames.
        self.table = torch.zeros(self.slots, 8, dtype=torch.int32, device=device)
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
        self.count = min(self.step, self.rows - 4) * n
        self.range.copy_(torch.tensor([self.step * n - self.count, self.count]))

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement, without waiting for the device.

        Returns obs, next_obs [B, 4, 84, 84] in [0, 1], actions, rewards, terminated [B] int64.
        """
        device, generator = self.frames.device, self.generator
        draw = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        slots = ((draw * self.range[1]).long() + self.range[0]) % self.slots
        rows = self.table[slots].long()
        stacks = self.frames[rows[:, 3:7]], self.frames[rows[:, 4:8]]
        floats = [s.to(torch.float32, memory_format=torch.channels_last).div_(255) for s in stacks]
        return *floats, *rows[:, :3].unbind(1)


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
