# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "minatar>=1.0.15", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""Eau De Q-Network on MinAtar: a DQN that prunes itself as it learns.

Paper: Vincent, Faust, Tripathi, Peters, D'Eramo, "Eau De Q-Network: Adaptive Distillation of
Neural Networks in Deep Reinforcement Learning", 2025, arXiv 2503.01437. The games: Young and Tian,
"MinAtar", 2019, arXiv 1903.03176 (pip install --no-deps minatar).

K online networks learn from one replay and share one target network. At every target update the
network with the smallest loss accumulated since the last one becomes the target; network 1 becomes
its copy, the others become copies pruned further, each by its own random amount. So no one has to
set when pruning starts, how fast it goes or where it ends.

    python eaudeqn_minatar.py --env-id Breakout                     # 1M steps
    python eaudeqn_minatar.py --num-networks 1 --no-reset-optimizer # plain DQN
    python eaudeqn_minatar.py --resume RUN_DIR

The method and its guesses are as in eaudeqn_atari.py. Differences ([D] our decision):
 1. [D] The target period was chosen with dense DQN on two games; see the docs for the settings.
 2. [D] One environment without a step limit, as in MinAtar's own DQN; rewards are not clipped.
 3. [D] The K networks are computed as one batched product and share Adam's step count.
 4. [D] Neither --compile nor --precision: networks this small gain nothing from them.

Figures: benchmark/minatar_*.sh. More: docs/eaudeqn_minatar.md.
"""

from __future__ import annotations

import copy
import ctypes
import fcntl
import hashlib
import io
import json
import logging
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
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


# >>> shared: minatar-flags
@dataclass
class Training:
    """The agent and its game."""

    env_id: str = "Breakout"  # Asterix, Breakout, Freeway, Seaquest or SpaceInvaders
    seed: Index = 1  # random seed
    total_timesteps: Count = 1_000_000  # total steps
    learning_starts: Count = 5_000  # steps of random play before the first gradient step
    buffer_size: Count = 100_000  # transitions in the replay, each 60 to 140 bytes of memory
    batch_size: Count = 32  # transitions per gradient step
    learning_rate: Rate = 2.5e-4  # Adam's step size
    adam_eps: Rate = 3.125e-4  # Adam's epsilon
    gamma: Share = 0.99  # discount factor
    replay_ratio: Rate = 0.25  # gradient steps per environment step
    target_every: Count = 4_000  # steps between target updates
    epsilon_end: Share = 0.01  # final probability of a random action
    epsilon_steps: Count = 100_000  # steps over which epsilon decays from 1, after the random play
    epoch_steps: Count = 50_000  # steps per epoch; the mean return of each is reported
    width: Count = 1  # factor on the 16 channels of the convolution
    feature_size: Count = 128  # units of the dense layer
    eval_episodes: Index = 10  # episodes of the final evaluation, at epsilon 0.001; 0: none
    eval_steps: Count = 10_000  # steps after which an evaluation episode is cut off


# <<< shared: minatar-flags
@dataclass
class Method:
    """Eau De Q-Network; the defaults are those of eaudeqn_atari.py."""

    num_networks: Count = 5  # K, the online networks
    max_exponent: Amount = 3.0  # U_max: exponents are drawn from U(0, U_max); 0 never prunes
    max_sparsity_step: Share = 0.01  # S_max: most sparsity added at one target update
    behaviour: Literal["inverse-loss", "uniform", "argmin"] = "inverse-loss"  # which network acts
    selection: Literal["loss", "random"] = "loss"  # which becomes the target; random is a control
    reset_optimizer: bool = True  # zero Adam's moments and step counts at each target update


# >>> shared: minatar-network
CORNERS = 10 * np.arange(8)[:, None] + np.arange(8)  # top left cells of the 3 x 3 windows
WINDOWS = CORNERS.ravel() + np.add.outer(10 * np.arange(3), np.arange(3)).reshape(9, 1)  # [9, 64]


class QNetwork(nn.Module):
    """Q-values of a MinAtar game (Young and Tian 2019): a convolution and a dense layer."""

    def __init__(self, channels: int, num_actions: int, args: Args) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16 * args.width, 3)  # 10 x 10 -> 8 x 8
        self.dense = nn.Linear(64 * 16 * args.width, args.feature_size)
        self.output = nn.Linear(args.feature_size, num_actions)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)
        self.tensors: list[Tensor] = list(self.parameters())  # parameters() is slow

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [C, 10, 10, B], 0 or 1, to Q-values [num_actions, B]."""
        return q_values(self.tensors, obs)


def q_values(parameters: list[Tensor], obs: Tensor) -> Tensor:
    """Map obs [C, 10, 10, B] to [num_actions, B]; with K networks' stacked parameters to [K, ...].

    The batch comes last: so each layer is weight @ x, for which autograd copies nothing.
    """
    weight1, bias1, weight2, bias2, weight3, bias3 = parameters
    windows = obs.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 4, 5, 1, 2, 3)  # [C, 3, 3, 8, 8, B]
    x = weight1.flatten(-3) @ windows.reshape(-1, 64 * obs.shape[-1])  # [K, out, 8 * 8 * B]
    x = torch.relu(x + bias1[..., None]).view(*bias1.shape[:-1], -1, obs.shape[-1])
    x = torch.relu(weight2 @ x + bias2[..., None])
    return weight3 @ x + bias3[..., None]


def greedy(network: QNetwork, obs: np.ndarray) -> int:
    """Return a network's best action for obs [C, 10, 10]; NumPy is faster for a single one."""
    arrays = [p.numpy(force=True) for p in network.tensors]
    weight1, bias1, weight2, bias2, weight3, bias3 = arrays
    x = obs.reshape(-1, 100).take(WINDOWS, 1).reshape(-1, 64).astype(np.float32)  # [C * 9, 64]
    x = np.maximum(weight1.reshape(len(weight1), -1) @ x + bias1[:, None], 0)
    x = np.maximum(weight2 @ x.ravel() + bias2, 0)
    return int((weight3 @ x + bias3).argmax())


# <<< shared: minatar-network
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

    def __init__(self, args: Args, channels: int, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.num_actions = args, num_actions
        torch.manual_seed(args.seed)
        self.target = QNetwork(channels, num_actions, args)
        add_masks(self.target)
        self.target.to(device)
        k = args.num_networks
        self.online: Any = nn.ModuleList(copy.deepcopy(self.target) for _ in range(k))
        # The networks' tensors are views of stacked ones [K, ...], with which updates compute.
        self.stacked = stack([list(network.parameters()) for network in self.online])
        self.masks = stack([list(network.buffers()) for network in self.online])
        self.weights = [p.requires_grad_() for p in self.stacked][::2]  # without the biases
        adam: Any = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True}
        self.optimizer = torch.optim.Adam(self.stacked, **adam)
        self.accumulated_loss = nn.Buffer(torch.zeros(k, device=device))  # since target update
        self.latest = nn.Buffer(torch.zeros(2, k, device=device))  # losses and mean Q-values
        self.sparsity = [0.0] * k  # nominal; the masks' counts are rounded
        self.gradient_step, self.selected = 0, 0
        # A generator for each use: with K = 1 the actions are plain DQN's.
        uses = ("act", "network", "exponent", "score", "selection")
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.read_losses()

    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() holds besides networks, masks and accumulated losses."""
        rng = {use: rng.bit_generator.state for use, rng in self.rng.items()}
        counters = (self.gradient_step, self.selected, self.sparsity)
        return {"optimizer": self.optimizer.state_dict(), "rng": rng, "counters": counters}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what get_extra_state() returned."""
        self.gradient_step, self.selected, self.sparsity = state["counters"]
        self.optimizer.load_state_dict(state["optimizer"])
        for use, rng in self.rng.items():
            rng.bit_generator.state = state["rng"][use]
        self.read_losses()

    def best(self) -> int:
        """Return the index of the smallest loss; NaN never wins, and the first wins a tie."""
        return int(np.where(np.isfinite(self.losses), self.losses, math.inf).argmin())

    def read_losses(self) -> None:
        """Fetch the accumulated losses from the device, and derive each network's odds to act."""
        self.losses = np.array(self.accumulated_loss.tolist())
        odds = np.isfinite(self.losses).astype(float)
        if self.args.behaviour == "inverse-loss":
            odds = np.where(odds > 0, 1 / (self.losses + 1e-6), 0)
        elif self.args.behaviour == "argmin":
            odds = np.eye(len(odds))[self.best()]
        self.cumulative_odds = odds.cumsum()

    def act(self, obs: np.ndarray, epsilon: float) -> int:
        """Return an epsilon-greedy action for obs [C, 10, 10], by a network drawn at random."""
        if self.rng["act"].random() < epsilon:
            return int(self.rng["act"].integers(self.num_actions))
        drawn = self.rng["network"].random() * self.cumulative_odds[-1]
        network = self.online[int(self.cumulative_odds.searchsorted(drawn, "right"))]
        return greedy(network, obs)

    def update(self, obs: Any, next_obs: Any, actions: Any, rewards: Any, terminated: Any) -> None:
        """Take one gradient step with all networks on a batch."""
        with torch.no_grad():
            next_q = self.target(next_obs).amax(0)
            td_target = rewards + self.args.gamma * next_q * (1 - terminated)  # [B]
        q = q_values(self.stacked, obs)  # [K, num_actions, B]
        q_taken = q.gather(1, actions.expand(len(q), 1, -1))[:, 0]  # [K, B]
        losses = (q_taken - td_target).square().mean(1)  # [K]
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.accumulated_loss.add_(losses)
            self.latest.copy_(torch.stack([losses, q_taken.mean(1)]))

    def learn(self, replay: PackedReplay, step: int) -> None:
        """Take the gradient steps due by `step`."""
        ratio = self.args.replay_ratio
        due = math.floor(step * ratio) - math.floor(self.args.learning_starts * ratio)
        if self.gradient_step >= due:
            return
        while self.gradient_step < due:
            self.gradient_step += 1
            self.update(*replay.sample(self.args.batch_size))
        self.read_losses()

    @torch.no_grad()
    def update_target(self, step: int) -> None:
        """Copy the best network to the target and network 1, and pruned copies to the others."""
        args, best = self.args, self.best()
        if args.selection == "random":
            best = int(self.rng["selection"].choice(np.flatnonzero(np.isfinite(self.losses))))
        sparsity = self.sparsity[best]
        self.target.load_state_dict(self.online[best].state_dict())
        for k, network in enumerate(self.online):
            network.load_state_dict(self.target.state_dict())
            exponent = self.rng["exponent"].uniform(0, args.max_exponent) if k > 0 else 0.0
            self.sparsity[k] = next_sparsity(sparsity, exponent, step, args)
            if self.sparsity[k] > sparsity:
                prune(network, erk_densities(network, self.sparsity[k]), self.rng["score"])
            if args.reset_optimizer or not math.isfinite(self.losses[k]):
                for state in self.optimizer.state.values():
                    torch._foreach_zero_([state["exp_avg"][k], state["exp_avg_sq"][k]])
        if args.reset_optimizer:
            for state in self.optimizer.state.values():
                state["step"].zero_()  # common to all K
        torch._foreach_mul_(self.weights, self.masks)
        self.accumulated_loss.zero_()
        self.read_losses()
        self.selected = best + 1

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the network to save."""
        record = sparsity_report(self.online[self.best()]) | {"sparsity/target": self.sparsity[0]}
        record |= {f"sparsity/candidate_{k}": s for k, s in enumerate(self.sparsity, 1)}
        if self.gradient_step > 0:
            loss, q_value = self.latest.mean(1).tolist()
            record |= {"losses/td_loss": loss, "losses/q_values": q_value}
        return record | ({"sparsity/selected": self.selected} if self.selected else {})


def stack(networks: list[list[Tensor]]) -> list[Tensor]:
    """Stack the networks' tensors, [K, ...] each, and make the networks' own views of them."""
    stacked = [torch.stack([x.detach() for x in copies]) for copies in zip(*networks)]
    for k, network in enumerate(networks):
        for own, whole in zip(network, stacked):
            own.data = whole[k]
    return stacked


def main(args: Args) -> None:
    """Train, evaluate the network with the smallest loss, and write the results."""
    device, game = find_device(args), Game(args.env_id, (args.seed, 0))
    agent = EauDeQN(args, len(game.obs), len(game.action_set), device)
    replay = PackedReplay(args, device, game.obs)
    run = Run(args, game.title)
    step, returns, epoch_return = 0, list[float](), None  # returns: this epoch's episodes
    if saved := run.load():
        step, returns, epoch_return = saved["progress"]
        play_again(game, replay, run, *saved["game"])
        agent.load_state_dict(saved["agent"])
        replay.rng.bit_generator.state = saved["sampling"]
    bar = progress_bar(args.total_timesteps, step, "step")

    while step < args.total_timesteps:
        # Act and step.
        decay = min(1.0, max(0.0, (step - args.learning_starts) / args.epsilon_steps))
        epsilon = 1 + (args.epsilon_end - 1) * decay
        action = agent.act(game.obs, epsilon)
        reward, terminated = game.step(action)
        step += 1
        ended = step == args.total_timesteps
        # Store.
        replay.add(action, reward, terminated, game.obs)
        for score, length in game.episodes:
            run.log(step, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns.append(score)
            bar.set_postfix_str(f"return {score:g}, sparsity {agent.sparsity[0]:.3f}", False)
        # Learn.
        agent.learn(replay, step)
        if not np.isfinite(agent.losses).any():
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.losses.tolist()}; {kept}", 1)
        # Prune and target.
        if step % args.target_every == 0 and agent.losses.any() and not ended:
            agent.update_target(step)
        # Log.
        bar.update()
        epoch_ended = step % args.epoch_steps == 0
        if ended or epoch_ended or step % max(args.target_every, 1000) == 0:
            record = agent.report() | {
                "charts/SPS": (bar.n - bar.initial) / bar.format_dict["elapsed"],
                "charts/epsilon": epsilon,
                "charts/learning_rate": args.learning_rate,
                "charts/buffer_size": replay.count,
                "memory/replay_bytes": replay.nbytes,
                "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if epoch_ended:
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
            run.log(step, record)
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"progress": (step, returns, epoch_return), "agent": agent.state_dict()}
            state |= {"game": (bytes(game.actions), torch.from_numpy(game.obs.copy()))}
            run.save(step, state | {"sampling": replay.rng.bit_generator.state})

    bar.close()
    network = agent.online[agent.best()]
    run.finish(step, network, evaluate(network, run), epoch_return=epoch_return)


# >>> shared: minatar-env
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


class Game:
    """A MinAtar game: sticky actions 0.1, minimal actions, difficulty ramping, no step limit.

    `obs` [C, 10, 10] bool is the current observation: after an episode has ended, the first of the
    next. Seed and actions determine everything, so a resumed run can replay it.
    """

    def __init__(self, env_id: str, seed: tuple[int, int]) -> None:
        names = {name.replace("_", ""): name for name in GAMES}
        key = re.sub(r"^MinAtar/|-v[01]$|_", "", env_id).lower()
        require(key in names, f"--env-id {env_id}: must be one of {', '.join(names)}")
        logging.disable()  # else it warns that it cannot draw without seaborn
        try:
            self.env = import_module("minatar").Environment(names[key])
        except ImportError as error:
            require(False, f"{error}: pip install --no-deps minatar")
        logging.disable(logging.NOTSET)
        self.env.seed(seed)
        self.title = names[key].title().replace("_", "")
        self.action_set = self.env.minimal_action_set()
        self.actions = bytearray()  # all actions so far
        self.begin()

    def begin(self) -> None:
        """Start an episode."""
        self.env.reset()
        self.obs = self.env.state().transpose(2, 0, 1)
        self.score, self.length = 0.0, 0

    def step(self, action: int) -> tuple[float, bool]:
        """Take a step; return its reward, and whether the episode terminated.

        `episodes` then has its return and its length.
        """
        reward, terminated = self.env.act(self.action_set[action])
        self.actions.append(action)
        self.score += float(reward)
        self.length += 1
        self.episodes = [(self.score, self.length)] if terminated else []
        if terminated:
            self.begin()
        else:
            self.obs = self.env.state().transpose(2, 0, 1)
        return float(reward), terminated


def play_again(game: Game, replay: PackedReplay, run: Run, actions: bytes, obs: Tensor) -> None:
    """Replay a checkpoint's game, which also refills the replay."""
    bar = progress_bar(len(actions), 0, "step", "playing again")
    for action in actions:
        replay.add(action, *game.step(action), game.obs)
        bar.update()
        require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    bar.close()
    same = np.array_equal(game.obs, obs.numpy())
    require(same, "--resume: the game went differently; install the minatar in versions.json")


def evaluate(network: QNetwork, run: Run) -> dict[str, float]:
    """Play --eval-episodes at epsilon 0.001; return the values to log."""
    n, seed = run.args.eval_episodes, (run.args.seed, 1)  # training's is (seed, 0)
    if n == 0:
        return {}
    game, rng, total = Game(run.args.env_id, seed), np.random.default_rng(seed), 0.0
    with progress_bar(n, 0, "episode", "evaluating") as bar:
        for _ in range(n):
            game.begin()
            for _ in range(run.args.eval_steps):
                action = greedy(network, game.obs)
                if rng.random() < 0.001:
                    action = int(rng.integers(len(game.action_set)))
                reward, terminated = game.step(action)
                total += reward
                require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
                if terminated:
                    break
            bar.update()
    return {"eval/episodic_return": total / n, "eval/episodes": n}


# <<< shared: minatar-env
# >>> shared: packed-replay
class PackedReplay:
    """Uniform replay of the last --buffer-size transitions, in main memory, one bit per cell.

    A ring of rows, one per step: observation, action, outcome. The next one is in the next row.
    """

    def __init__(self, args: Args, device: torch.device, obs: np.ndarray) -> None:
        self.device, self.shape, self.step = device, obs.shape, 0
        self.rows = args.buffer_size + 1  # plus the current observation
        self.bits = np.zeros((self.rows, math.ceil(obs.size / 8)), np.uint8)
        self.table = np.zeros((self.rows, 3), np.float32)  # action, reward, terminated
        self.rng = np.random.default_rng((args.seed, 9))
        self.nbytes = self.bits.nbytes + self.table.nbytes
        self.bits[0] = np.packbits(obs)

    @property
    def count(self) -> int:
        """The number of transitions stored."""
        return min(self.step, self.rows - 1)

    def add(self, action: int, reward: float, terminated: bool, obs: np.ndarray) -> None:
        """Store an action, its reward and outcome, and the observation that followed."""
        self.table[self.step % self.rows] = action, reward, terminated
        self.step += 1
        self.bits[self.step % self.rows] = np.packbits(obs)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement.

        Returns obs, next_obs [C, 10, 10, B], actions [B] int64, rewards, terminated [B] floats.
        """
        steps = self.rng.integers(self.step - self.count, self.step, batch_size)
        rows = np.stack([steps, steps + 1]) % self.rows  # [2, B]
        cells = math.prod(self.shape)
        bits = np.unpackbits(self.bits[rows], axis=2, count=cells)  # [2, B, C * 10 * 10]
        seen = np.ascontiguousarray(bits.transpose(0, 2, 1)).reshape(2, *self.shape, batch_size)
        obs, next_obs = torch.from_numpy(seen).to(self.device).float()
        columns = torch.from_numpy(self.table[rows[0]].T.copy()).to(self.device)
        return obs, next_obs, columns[0].long(), columns[1], columns[2]


# <<< shared: packed-replay
@dataclass
class Running:
    """Where and how to run."""

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
        starts, smallest = self.learning_starts, min(self.learning_starts, self.buffer_size)
        line = f"--learning-starts, --buffer-size {smallest}: must be at least {self.batch_size}"
        require(smallest >= self.batch_size, f"{line} (--batch-size)")
        learns = self.total_timesteps > starts
        require(learns, f"--total-timesteps: must be above {starts}, --learning-starts")


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
