# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12", "tyro>=0.9", "safetensors>=0.5",
#   "tensorboard>=2.18", "tqdm>=4.66", "imageio-ffmpeg>=0.5", "wandb>=0.18",
# ]
# ///
"""Eau De Q-Network on Atari: a deep Q-network that starts dense and prunes itself at the pace of its learning.

Paper: Vincent, Faust, Tripathi, Peters, D'Eramo, "Eau De Q-Network: Adaptive Distillation of Neural Networks in Deep
Reinforcement Learning", 2025, arXiv 2503.01437 (its online variant, EauDeDQN).

K online networks learn from one replay and share one target network. At every target update the network with the
smallest loss accumulated since the last one becomes the target; network 1 becomes its copy, the others become copies
pruned further, each by its own random amount. Nobody sets when pruning starts, how fast it goes or where it ends.

    python eaudeqn_atari.py --env-id Breakout                       # the paper's setting: 40M frames
    python eaudeqn_atari.py --env-id Pong --feature-size 2048       # the paper's large network (32: its small one)
    python eaudeqn_atari.py --resume runs/Breakout__eaudeqn_atari__1__1790000000
    python eaudeqn_atari.py --num-networks 1 --no-reset-optimizer   # plain DQN, same code

Differences from the paper, and guesses ([I] inferred, [D] our decision; no training code was released):
 1. [I] Next sparsity of candidate k at step t: min(1 - (1 - s) * ((H - t - T) / (H - t)) ** n_k, s + max_sparsity_step)
    with n_k ~ U(0, max_exponent), fitted to every published name and value. H: the run's steps, T: --target-every.
 2. [D] Sparsity is spread over the layers by the Erdos-Renyi-Kernel rule (--scope erk); biases are never pruned [I].
 3. [I] Each action is that of a network drawn anew, P(k) ~ 1 / (accumulated loss + 1e-6) (--behaviour).
 4. [I] The loss is the squared TD error; all K Adam states are reset at a target update, step counts included.
 5. [D] One network is drawn and all K start as copies of it. Evaluated and saved: the one of the smallest loss.
 6. [D] Epsilon anneals after the warm-up (as in Dopamine), so that the methods of this repository compare.
 7. [D] With --num-envs above 1 the environments step while the networks learn, from all but that step.
 8. [D] An environment gets a new seed at the first ending after 25,000 steps, not at each (see AtariEnvs).

Figures: the online comparison of EauDeDQN, its ablations of K, U_max and S_max. More: docs/eaudeqn_atari.md.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# >>> shared: basics
class Exit(Exception):
    """Ends the program with one line and a status: 2 bad input, 1 a fault while running, 75 stopped and resumable."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


def require(accepted: bool, line: str) -> None:
    """Refuse bad input, with a line that names the flag or file and what is accepted."""
    if not accepted:
        raise Exit(2, line)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of data, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
# <<< shared: basics


PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of the peak memory that the system reports, in bytes


@dataclass
class Args:
    """Flags; the defaults are the paper's setting. A "step" is an environment step: one decision, 4 frames."""

    # >>> shared: run-flags
    env_id: str = "Breakout"  # game; Breakout, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 are the same
    seed: int = 1  # seed of everything random, in [0, 2^32)
    total_timesteps: int = 10_000_000  # length of the run in steps, over all environments (>= 1); 10M are 40M frames
    learning_starts: int = 20_000  # steps of uniformly random play before the first gradient step (>= batch size)
    buffer_size: int = 1_000_000  # transitions in the replay (>= batch size), 7.1 KB of memory each
    batch_size: int = 32  # transitions per gradient step (>= 1)
    learning_rate: float = 6.25e-5  # Adam's step size (> 0)
    adam_eps: float = 1.5e-4  # Adam's epsilon (> 0)
    gamma: float = 0.99  # discount, in [0, 1]
    replay_ratio: float = 0.25  # gradient steps per step (> 0)
    target_every: int = 8_000  # steps between target updates (>= number of environments)
    epsilon_end: float = 0.01  # final probability of a random action, in [0, 1]
    epsilon_steps: int = 250_000  # steps over which it falls from 1, counted from the end of the warm-up (>= 1)
    epoch_steps: int = 250_000  # steps per epoch, the unit of reporting (>= 1); 250,000 are 1M frames
    num_envs: int = 1  # environments (>= 1); several step while the learner learns; periods count the steps of all
    device: str = "auto"  # auto, cpu, cuda or cuda:INDEX
    compile: bool = False  # capture sampling and update in a CUDA graph (CUDA only; not yet tried on a GPU)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks; weights and Adam stay fp32
    run_dir: str = ""  # folder for the run, new or empty; default: runs/{game}__{script}__{seed}__{time}
    resume: str = ""  # go on with the run in this folder; it has all flags, so give no other
    checkpoint_minutes: float = 10.0  # minutes between checkpoints (>= 0)
    eval_episodes: int = 10  # episodes of the final evaluation, at epsilon 0.001 (>= 0; 0: none)
    capture_video: bool = False  # write the first evaluation episode to RUN_DIR/evaluation.mp4
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "cleanrl-sparse"  # project there
    # <<< shared: run-flags
    network: Literal["cnn", "impala"] = "cnn"  # cnn: DQN's three convolutions; impala: the 15-layer residual network
    feature_size: int = 512  # units of the dense layer (>= 1); the paper's small, medium and large: 32, 512, 2048
    width: int = 1  # multiplies the channels of the convolutions (>= 1)
    num_networks: int = 5  # K, the online networks (>= 1)
    max_exponent: float = 3.0  # U_max: exponents are drawn from U(0, U_max) (>= 0); 0 never prunes
    max_sparsity_step: float = 0.01  # S_max: most sparsity added at one target update, in [0, 1]
    scope: Literal["erk", "uniform", "global"] = "erk"  # how sparsity is spread over the layers
    behaviour: Literal["inverse-loss", "uniform", "argmin"] = "inverse-loss"  # how the network that acts is drawn
    reset_optimizer: bool = True  # zero Adam's moments and step counts of all K networks at each target update

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        # >>> shared: check-run-flags
        def check(names: str, accepted: Callable[[float], bool], text: str) -> None:
            """Refuse the flags `names` whose value is not accepted."""
            for name, value in ((name, getattr(self, name)) for name in names.split()):
                require(accepted(value), f"--{name.replace('_', '-')} {value}: must be {text}")

        check("total_timesteps batch_size epsilon_steps epoch_steps num_envs", lambda x: x >= 1, "at least 1")
        check("eval_episodes checkpoint_minutes", lambda x: x >= 0, "at least 0")
        check("seed", lambda x: 0 <= x < 2**32, "in [0, 2^32)")
        check("learning_rate adam_eps replay_ratio", lambda x: 0 < x < math.inf, "above 0")
        check("gamma epsilon_end", lambda x: 0 <= x <= 1, "in [0, 1]")
        check("learning_starts buffer_size", lambda x: x >= self.batch_size, f"at least a batch, {self.batch_size}")
        names, text = "target_every learning_starts buffer_size", f"at least --num-envs, {self.num_envs}"
        check(names, lambda x: x >= self.num_envs, text)
        check("capture_video", lambda x: not x or self.eval_episodes > 0, "used with --eval-episodes above 0")
        # <<< shared: check-run-flags
        check("feature_size width num_networks", lambda x: x >= 1, "at least 1")
        check("max_exponent", lambda x: 0 <= x < math.inf, "at least 0")
        check("max_sparsity_step", lambda x: 0 <= x <= 1, "in [0, 1]")


# >>> shared: atari-env
# Random and human scores for the human-normalised score (Dopamine's and rliable's table; 55 of the 60 games have one).
HUMAN_SCORES = """
Alien 227.8 7127.7; Amidar 5.8 1719.5; Assault 222.4 742.0; Asterix 210.0 8503.3; Asteroids 719.1 47388.7; Atlantis
12850.0 29028.1; BankHeist 14.2 753.1; BattleZone 2360.0 37187.5; BeamRider 363.9 16926.5; Berzerk 123.7 2630.4;
Bowling 23.1 160.7; Boxing 0.1 12.1; Breakout 1.7 30.5; Centipede 2090.9 12017.0; ChopperCommand 811.0 7387.8;
CrazyClimber 10780.5 35829.4; DemonAttack 152.1 1971.0; DoubleDunk -18.6 -16.4; Enduro 0.0 860.5; FishingDerby -91.7
-38.7; Freeway 0.0 29.6; Frostbite 65.2 4334.7; Gopher 257.6 2412.5; Gravitar 173.0 3351.4; Hero 1027.0 30826.4;
IceHockey -11.2 0.9; Jamesbond 29.0 302.8; Kangaroo 52.0 3035.0; Krull 1598.0 2665.5; KungFuMaster 258.5 22736.3;
MontezumaRevenge 0.0 4753.3; MsPacman 307.3 6951.6; NameThisGame 2292.3 8049.0; Phoenix 761.4 7242.6; Pitfall -229.4
6463.7; Pong -20.7 14.6; PrivateEye 24.9 69571.3; Qbert 163.9 13455.0; Riverraid 1338.5 17118.0; RoadRunner 11.5
7845.0; Robotank 2.2 11.9; Seaquest 68.4 42054.7; Skiing -17098.1 -4336.9; Solaris 1236.3 12326.7; SpaceInvaders 148.0
1668.7; StarGunner 664.0 10250.0; Tennis -23.8 -8.3; TimePilot 3568.0 5229.2; Tutankham 11.4 167.6; UpNDown 533.4
11693.2; Venture 0.0 1187.5; VideoPinball 0.0 17667.9; WizardOfWor 563.5 4756.5; YarsRevenge 3092.9 54576.9; Zaxxon
32.5 9173.3"""


def find_rom(env_id: str) -> tuple[str, str]:
    """Return ROM and title (ms_pacman, MsPacman) of MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4; else Exit."""
    titles = {"".join(word.capitalize() for word in rom.split("_")): rom for rom in roms.get_all_rom_ids()}
    name = re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", env_id)
    title = {t.lower(): t for t in titles}.get(name.lower(), "")
    near = ", ".join(difflib.get_close_matches(name, titles, n=3, cutoff=0.3)) or "none"
    require(bool(title), f"--env-id {env_id}: no such Atari game; the nearest names are {near}")
    return titles[title], title


def human_normalized(title: str, score: float) -> float | None:
    """Return (score - random) / (human - random), or None for a game without a human score."""
    table = {name: (float(low), float(high)) for name, low, high in map(str.split, HUMAN_SCORES.split(";"))}
    low, high = table.get(title, (0.0, 0.0))
    return (score - low) / (high - low) if high > low else None


class Steps(NamedTuple):
    """One step of N environments."""

    last_frames: np.ndarray  # [N, 84, 84] uint8, the newest frame before any reset
    rewards: np.ndarray  # [N] unclipped
    terminated: np.ndarray  # [N] bool
    ended: np.ndarray  # [N] bool, terminated or truncated
    episodes: list[tuple[float, int]]  # (undiscounted return, steps) of each episode that ended


class AtariEnvs:
    """N copies of a game under Dopamine's protocol (Machado et al. 2018), restorable at any step.

    Sticky actions 0.25, frameskip 4 with the maximum over the last two frames, 84x84 grayscale, stacks of 4, minimal
    action set, no no-op start, no FIRE reset, losing a life does not end an episode, 27,000 steps truncate it.
    `obs` [N, 4, 84, 84] uint8 is what the agent sees now: after an ending, the next episode's first frame.

    An environment's state follows from its last seed and the actions since. Seeding reloads the ROM, which takes as
    long as 200 steps, so it waits for the first episode that ends RESEED_AFTER or more steps after the last seeding.
    """

    RESEED_AFTER = 25_000

    def __init__(self, rom: str, num_envs: int, seed: int, **options: Any) -> None:
        protocol = dict(repeat_action_probability=0.25, noop_max=0, use_fire_reset=False, reward_clipping=False,
                        max_num_frames_per_episode=108_000, num_threads=min(num_envs, os.cpu_count() or 1))
        self.envs = AtariVectorEnv(rom, num_envs, autoreset_mode="NextStep", **(protocol | options))
        self.num_actions = len(self.envs.ale.get_action_set())
        self.seed, self.seedings = seed, np.zeros(num_envs, np.int64)  # how often each environment was seeded
        self.actions = [bytearray() for _ in range(num_envs)]  # and its actions since then
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.reset(np.ones(num_envs, bool), reseed=True)

    def reset(self, which: np.ndarray, reseed: bool) -> None:
        """Start an episode where the mask `which` [N] is true, from a new seed or with the next draws of the last."""
        seeds = None
        if reseed:
            self.seedings += which
            keys = [(self.seed, int(i), int(self.seedings[i])) for i in np.flatnonzero(which)]
            seeds = np.array([np.random.SeedSequence(key).generate_state(1)[0] >> 1 for key in keys], np.int64)
            for i in np.flatnonzero(which):
                self.actions[i].clear()
        self.returns[which] = self.lengths[which] = 0
        self.obs = self.envs.reset(seed=seeds, options={} if which.all() else {"reset_mask": which})[0]

    def send(self, actions: np.ndarray) -> None:
        """Start a step with actions [N] int64; the environments run in threads of their own until recv()."""
        for history, action in zip(self.actions, actions, strict=True):
            history.append(action)
        self.envs.send(actions)

    def recv(self) -> Steps:
        """Wait for the step's end. What ended is reset at once, so that no reset step reaches the replay."""
        self.obs, rewards, terminated, truncated, _ = self.envs.recv()
        last_frames, ended = self.obs[:, -1], terminated | truncated
        self.returns += rewards
        self.lengths += 1
        episodes = [(float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(ended)]
        old = np.array([len(history) >= self.RESEED_AFTER for history in self.actions])
        for which, reseed in ((ended & old, True), (ended & ~old, False)):
            if which.any():
                self.reset(which, reseed)
        return Steps(last_frames, rewards, terminated, ended, episodes)

    def state(self) -> dict[str, Any]:
        """Return what restore() needs, as JSON."""
        return {"seedings": self.seedings.tolist(), "actions": [bytes(history).hex() for history in self.actions],
                "digest": sha256(self.obs.tobytes())}

    def restore(self, state: dict[str, Any]) -> None:
        """Replay the actions since each environment's seed, right-aligned. Exit if the game went otherwise."""
        histories = [bytes.fromhex(text) for text in state["actions"]]
        longest = max(map(len, histories))
        for step in range(longest + 1):
            begins = np.array([len(history) == longest - step for history in histories])
            if begins.any():
                self.seedings[begins] = np.array(state["seedings"])[begins] - 1
                self.reset(begins, reseed=True)
            if step < longest:
                self.send(np.array([h[step - longest] if len(h) >= longest - step else 0 for h in histories]))
                self.recv()
        if sha256(self.obs.tobytes()) != state["digest"]:
            raise Exit(1, "the replayed episodes are not the recorded ones; resume with the ale-py of versions.json")
# <<< shared: atari-env


# >>> shared: torsos
class Residual(nn.Module):
    """Impala's residual block on [B, C, H, W]: x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped like x."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def make_torso(network: str, width: int) -> nn.Sequential:
    """Return Dopamine's torsos, all padding SAME as in XLA, where an odd pixel of padding stands at the end.

    cnn (Mnih et al. 2015): [B, 4, 84, 84] -> [B, 64 * width, 11, 11]; impala (Espeholt et al. 2018), 15 layers without
    normalisation: -> [B, 32 * width, 11, 11].
    """
    layers, c = OrderedDict[str, nn.Module](), 32 * width
    if network == "cnn":
        layers |= {"conv1": nn.Conv2d(4, c, 8, stride=4, padding=2), "relu1": nn.ReLU()}  # 84 -> 21
        layers |= {"pad2": nn.ZeroPad2d((1, 2, 1, 2)), "conv2": nn.Conv2d(c, 2 * c, 4, stride=2), "relu2": nn.ReLU()}
        layers |= {"conv3": nn.Conv2d(2 * c, 2 * c, 3, padding=1), "relu3": nn.ReLU()}  # 11
        return nn.Sequential(layers)
    for i, (c_in, c_out, pad) in enumerate(((4, c // 2, 0), (c // 2, c, 0), (c, c, 1)), 1):
        pool = nn.MaxPool2d(3, stride=2, padding=pad, ceil_mode=True)  # 84 -> 42 -> 21 -> 11
        layers |= {f"entry{i}": nn.Conv2d(c_in, c_out, 3, padding=1), f"pool{i}": pool}
        layers |= {f"block{i}a": Residual(c_out), f"block{i}b": Residual(c_out)}
    return nn.Sequential(layers | {"relu": nn.ReLU()})


class QNetwork(nn.Module):
    """Q-values of stacked frames: torso, one dense layer of `feature_size` units, output layer."""

    def __init__(self, num_actions: int, network: str, feature_size: int, width: int) -> None:
        super().__init__()
        self.torso = make_torso(network, width)
        self.dense = nn.Linear(11 * 11 * width * (64 if network == "cnn" else 32), feature_size)
        self.output = nn.Linear(feature_size, num_actions)
        for name, p in self.named_parameters():  # Dopamine's initialisation
            if p.ndim == 1:
                nn.init.zeros_(p)
            elif "block" in name:  # LeCun normal, truncated at two standard deviations
                std = math.sqrt(1 / p[0].numel()) / 0.87962566
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.xavier_uniform_(p)

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions]."""
        x = self.torso(obs)  # [B, C, 11, 11]
        x = F.relu(self.dense(x.permute(0, 2, 3, 1).flatten(1)))  # flat in channels-last order, which needs no copy
        return self.output(x)
# <<< shared: torsos


# >>> shared: frame-replay
class Batch(NamedTuple):
    """Transitions; a truncated episode is not terminated and bootstraps from its true last observation."""

    obs: Tensor  # [B, 4, 84, 84] uint8
    next_obs: Tensor  # [B, 4, 84, 84] uint8
    actions: Tensor  # [B] int64
    rewards: Tensor  # [B] float32, clipped to [-1, 1]
    terminated: Tensor  # [B] bool


class FrameReplay:
    """Uniform replay of the last `capacity` transitions that stores each frame once (7.1 KB per transition).

    A ring of rows, one per step of all N environments: slot row * N + i holds the newest frame that environment i's
    agent saw, and what it did. A stack is a slot and the three rows before it, as far as they belong to the episode
    (`age`), else zeros. The frame after an ending lies in a small ring of its own; where episodes are shorter than 128
    steps on average that ring comes round first and the oldest transitions are forgotten early.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device, seed: int,
                 frame_shape: tuple[int, ...] = (84, 84)) -> None:
        self.num_envs, self.rows = num_envs, -(-capacity // num_envs) + 4  # 3 older frames of a stack, 1 newest
        self.slots, self.endings = self.rows * num_envs, max(capacity // 128 + 16, 2 * num_envs)
        self.frames = torch.empty(self.slots + self.endings + 1, *frame_shape, dtype=torch.uint8, device=device)
        self.frames[-1] = 0  # what lies before an episode
        self.action, self.age = torch.zeros(2, self.slots, dtype=torch.uint8, device=device)
        self.reward, self.terminated = torch.zeros(2, self.slots, dtype=torch.int8, device=device)
        self.ending = torch.zeros(self.slots, dtype=torch.int32, device=device)  # slot of an ending's last frame, or -1
        self.back = torch.arange(3, -1, -1, device=device) * num_envs  # distance of a stack's frames, oldest first
        self.range = torch.zeros(2, dtype=torch.long, device=device)  # first transition to be sampled, how many
        self.step = self.first = self.num_endings = 0  # steps stored, first step whose ending is kept, endings so far
        self.ending_step = np.full(self.endings, -1)  # the step that each kept ending belongs to
        self.ages = np.zeros(num_envs, np.int64)  # 0 for an episode's first frame, at most 3
        self.unsaved: int | None = None  # first step that a checkpoint in progress has still to read
        self.generator = torch.Generator(device).manual_seed(seed)
        self.nbytes = sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor | np.ndarray))

    def __len__(self) -> int:
        """Return the number of transitions that can be sampled."""
        return int(self.step - max(self.first, self.step - self.rows + 4, 0)) * self.num_envs

    def see(self, frames: np.ndarray) -> None:
        """Write the frames [N, H, W] that the agent sees now."""
        start = self.step % self.rows * self.num_envs
        self.frames[start : start + self.num_envs] = torch.from_numpy(frames)
        self.age[start : start + self.num_envs] = torch.from_numpy(self.ages.astype(np.uint8))
        self.range.copy_(torch.tensor([self.step * self.num_envs - len(self), len(self)]))

    def add(self, actions: np.ndarray, steps: Steps, frames: np.ndarray) -> None:
        """Store what N environments did (actions [N]), what came of it, and the frames [N, H, W] seen now."""
        while (low := self.unsaved) is not None and low <= max(
            self.step + 1 - self.rows, np.sort(self.ending_step)[: self.num_envs].max()
        ):  # a row and, at most, num_envs endings are overwritten below
            time.sleep(0.001)
        start = self.step % self.rows * self.num_envs
        row = slice(start, start + self.num_envs)
        self.action[row] = torch.from_numpy(actions.astype(np.uint8))
        self.reward[row] = torch.from_numpy(np.clip(steps.rewards, -1, 1).astype(np.int8))
        self.terminated[row] = torch.from_numpy(steps.terminated)
        self.ending[row] = -1
        for i in np.flatnonzero(steps.ended):
            entry = self.num_endings % self.endings
            self.first = max(self.first, int(self.ending_step[entry]) + 1)
            self.frames[self.slots + entry] = torch.from_numpy(steps.last_frames[i])
            self.ending[start + i] = self.slots + entry
            self.ending_step[entry] = self.step
            self.num_endings += 1
        self.step += 1
        self.ages = np.where(steps.ended, 0, np.minimum(self.ages + 1, 3))
        self.see(frames)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, without waiting for the device."""
        draw = torch.rand(batch_size, dtype=torch.float64, device=self.frames.device, generator=self.generator)
        return self.gather(((draw * self.range[1]).long() + self.range[0]) % self.slots)

    def gather(self, slots: Tensor) -> Batch:
        """Return the transitions at slots [B]."""
        own = self.back <= self.age[slots, None].long() * self.num_envs  # [B, 4]
        stack = torch.where(own, (slots[:, None] - self.back) % self.slots, len(self.frames) - 1)
        after = torch.where(self.ending[slots] < 0, (slots + self.num_envs) % self.slots, self.ending[slots])
        frames = self.frames[torch.cat([stack, after[:, None]], 1)]  # [B, 5, H, W]
        actions, rewards = self.action[slots].long(), self.reward[slots].float()
        return Batch(frames[:, :4], frames[:, 1:], actions, rewards, self.terminated[slots].bool())

    def state(self) -> dict[str, Any]:
        """Return the counters and the generator as JSON; pieces() gives the contents."""
        return {"counters": (self.step, self.first, self.num_endings), "ages": self.ages.tolist(),
                "endings": self.ending_step.tolist(), "generator": self.generator.get_state().tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state()."""
        self.step, self.first, self.num_endings = state["counters"]
        self.ages, self.ending_step = np.array(state["ages"]), np.array(state["endings"])
        if len(state["generator"]) != len(self.generator.get_state()):
            raise Exit(1, "the run was begun with its replay on another kind of device (--device, GPU memory)")
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))

    def pieces(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (array, index) of what steps first..last-1 hold; add() waits before it overwrites what is to come."""
        for low in range(first, last, 1024):
            self.unsaved = low
            index = torch.arange(low * self.num_envs, min(low + 1024, last) * self.num_envs)
            slots = (index % self.slots).to(self.frames.device)
            arrays = (self.ending, self.action, self.reward, self.terminated, self.age, self.frames)
            yield from ((array, slots) for array in arrays)
            endings = self.ending[slots].long()
            yield self.frames, endings[endings >= 0]
        self.unsaved = None
# <<< shared: frame-replay


# >>> shared: sparsity
def erk_densities(shapes: list[torch.Size], sparsity: float) -> list[float]:
    """Return each tensor's density under the Erdos-Renyi-Kernel rule (Evci et al. 2020) for a total sparsity in [0, 1].

    density_l = eps * sum(shape_l) / prod(shape_l), with eps such that the total holds; a tensor that would exceed 1 is
    dense, and eps is solved again for the others.
    """
    budget = (1 - sparsity) * sum(map(math.prod, shapes))
    dense: set[int] = set()
    while len(dense) < len(shapes):
        free = [i for i in range(len(shapes)) if i not in dense]
        eps = (budget - sum(math.prod(shapes[i]) for i in dense)) / sum(sum(shapes[i]) for i in free)
        full = {i for i in free if eps * sum(shapes[i]) >= math.prod(shapes[i])}
        if not full:
            return [1.0 if i in dense else eps * sum(s) / math.prod(s) for i, s in enumerate(shapes)]
        dense |= full
    return [1.0] * len(shapes)


def largest(score: Tensor, kept: int) -> Tensor:
    """Return a bool mask of the `kept` largest entries of score [n], ties broken by lower index."""
    rank = score.numel() - kept
    if score.device.type == "cpu":  # a partition is ten times faster than kthvalue or topk there
        threshold = torch.from_numpy(np.partition(score.numpy(), rank)[rank : rank + 1])
    else:
        threshold = score.kthvalue(rank + 1).values
    above, ties = score > threshold, score == threshold
    return above | (ties & (ties.cumsum(0) <= kept - above.sum()))


def magnitude_masks(weights: list[Tensor], parents: list[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """Return bool masks (True: kept) of the largest |weights| at a total sparsity in [0, 1]; counts are exact.

    What a parent mask has pruned stays pruned, every tensor keeps at least one weight. `scope`: erk and uniform give
    each tensor its own count, global ranks all weights together.
    """
    scores = [torch.where(m, w.detach().abs(), -1.0).flatten() for w, m in zip(weights, parents, strict=True)]
    sizes = [s.numel() for s in scores]
    if scope == "global":
        for s in scores:
            s[s.argmax()] = math.inf
        kept = max(len(scores), round(sum(sizes) * (1 - sparsity)))
        flat = list(largest(torch.cat(scores), kept).split(sizes))
    else:
        uniform = [1 - sparsity] * len(sizes)
        densities = erk_densities([w.shape for w in weights], sparsity) if scope == "erk" else uniform
        flat = [largest(s, max(1, round(s.numel() * d))) for s, d in zip(scores, densities, strict=True)]
    return [f.view(w.shape) & m for f, w, m in zip(flat, weights, parents, strict=True)]


def prunable(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that pruning may remove: every tensor of two or more dimensions, no bias."""
    return {name.removesuffix(".weight"): p for name, p in network.named_parameters() if p.ndim >= 2}


def sparsity_report(network: nn.Module) -> dict[str, float]:
    """Measure the share of zeros: in the prunable weights, in all parameters, per layer; and the parameters left."""
    zeros = {name: int((w == 0).sum()) for name, w in prunable(network).items()}
    size, total = sum(w.numel() for w in prunable(network).values()), sum(p.numel() for p in network.parameters())
    pruned = sum(zeros.values())
    report = {"prunable": pruned / size, "total": pruned / total, "active_params": float(total - pruned)}
    return report | {f"layer/{name}": zeros[name] / w.numel() for name, w in prunable(network).items()}
# <<< shared: sparsity


def next_sparsity(sparsity: float, exponent: float, step: int, horizon: int, period: int, max_step: float) -> float:
    """Return a candidate's sparsity for steps step..step+period of a run of `horizon` steps.

    min(1 - (1 - s) * ((H - t - T) / (H - t)) ** n, s + S_max): a constant n follows the polynomial schedule
    1 - (1 - t / H) ** n, whatever s has been reached; 0 ** 0 is 1, so that n = 0 prunes nothing.
    """
    base = min(1.0, max(0.0, (horizon - step - period) / (horizon - step)))
    return min(1.0, sparsity + min((1 - sparsity) * (1 - base**exponent), max_step))  # exactly s where n = 0


def choose(losses: list[float]) -> int:
    """Return the index of the smallest loss; NaN never wins, ties go to the lower index."""
    return min(range(len(losses)), key=lambda k: (math.isnan(losses[k]), losses[k], k))


class EauDeQN:
    """K online networks with their masks and accumulated losses, and the target network that they share."""

    def __init__(self, args: Args, num_actions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.args, self.device, self.dtype, self.num_actions = args, device, dtype, num_actions
        torch.manual_seed(args.seed)
        self.target = QNetwork(num_actions, args.network, args.feature_size, args.width)
        self.target.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.target.requires_grad_(False)
        self.online = [copy.deepcopy(self.target).requires_grad_(True) for _ in range(args.num_networks)]
        self.weights = [list(prunable(network).values()) for network in self.online]
        self.masks = [[torch.ones_like(w) for w in weights] for weights in self.weights]
        self.sparsity = [0.0] * args.num_networks  # nominal: the exact counts round it, and every tensor keeps a weight
        self.accumulated_loss = torch.zeros(args.num_networks, device=device, dtype=dtype)
        self.latest = torch.zeros(2, args.num_networks, device=device, dtype=dtype)  # losses and mean Q of one update
        self.optimizer = torch.optim.Adam([p for network in self.online for p in network.parameters()], fused=True,
                                          lr=args.learning_rate, eps=args.adam_eps, capturable=device.type == "cuda")
        for p in self.optimizer.param_groups[0]["params"]:  # now, not in the first step: a checkpoint restores into it
            self.optimizer.state[p] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        # Each use of randomness has a generator of its own: with K = 1 the actions are those of plain DQN.
        uses = ("act", "network", "exponent")
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # kernels are loaded and cuBLAS has its workspace once update() has run

    def to_input(self, frames: Tensor) -> Tensor:
        """Scale uint8 frames to [0, 1], channels-last, on the device."""
        return frames.to(self.device, self.dtype, memory_format=torch.channels_last).div_(255)

    def q_values(self, network: nn.Module, obs: Tensor) -> Tensor:
        """Return Q-values [B, num_actions] of a to_input() batch under --precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return network(obs).to(self.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray, epsilon: float, losses: list[float]) -> np.ndarray:
        """Return epsilon-greedy actions [N] for obs [N, 4, 84, 84], each of a network drawn for it."""
        explore = self.rng["act"].random(len(obs)) < epsilon
        actions = self.rng["act"].integers(self.num_actions, size=len(obs))
        odds = np.array([1 / (loss + 1e-6) if self.args.behaviour == "inverse-loss" else 1.0 for loss in losses])
        drawn = self.rng["network"].choice(len(losses), size=len(obs), p=odds / odds.sum())
        drawn = np.full(len(obs), choose(losses)) if self.args.behaviour == "argmin" else drawn
        for k in set(drawn[~explore]):
            mine = ~explore & (drawn == k)
            q_values = self.q_values(self.online[k], self.to_input(torch.from_numpy(obs[mine])))
            actions[mine] = q_values.argmax(1).cpu().numpy()
        return actions

    def update(self, batch: Batch) -> None:
        """Take one gradient step with all K networks on one batch. Nothing here waits for the device."""
        batch = Batch(*(tensor.to(self.device) for tensor in batch))  # moves nothing if the replay is on the device
        obs, next_obs = self.to_input(batch.obs), self.to_input(batch.next_obs)
        with torch.no_grad():
            next_q = self.q_values(self.target, next_obs).max(1).values
            td_target = batch.rewards + self.args.gamma * next_q * ~batch.terminated  # [B]
        # A loop over modules: vmap and grouped convolutions were slower (docs/eaudeqn_atari.md has the numbers).
        q = torch.cat([self.q_values(net, obs).gather(1, batch.actions[:, None]) for net in self.online], 1).T  # [K, B]
        losses = (q - td_target).square().mean(1)  # [K]
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Dense networks need no masks, but a CUDA graph is captured once and for all.
        sparse = [k for k in range(len(self.online)) if self.sparsity[k] > 0 or self.device.type == "cuda"]
        with torch.no_grad():
            for k in sparse:
                torch._foreach_mul_(self.weights[k], self.masks[k])
            self.accumulated_loss += losses
            self.latest.copy_(torch.stack([losses, q.mean(1)]))

    def learn(self, replay: FrameReplay, updates: int) -> None:
        """Sample and update `updates` times; with --compile by replaying a CUDA graph, after one plain call."""
        for _ in range(updates):
            if self.args.compile and self.warm and not self.graph:
                self.graph = torch.cuda.CUDAGraph()
                self.graph.register_generator_state(replay.generator)
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.update(replay.sample(self.args.batch_size))
            self.warm = True
            if self.graph:
                self.graph.replay()
            else:
                self.update(replay.sample(self.args.batch_size))

    @torch.no_grad()
    def update_target(self, step: int, horizon: int) -> int:
        """Make the best network the target, network 1 its copy, the others its pruned copies; return its index."""
        args, best = self.args, choose(self.accumulated_loss.tolist())
        self.target.load_state_dict(self.online[best].state_dict())
        weights, sparsity = list(prunable(self.target).values()), self.sparsity[best]
        parents = [mask.bool() for mask in self.masks[best]]
        for k in range(args.num_networks):
            exponent = self.rng["exponent"].uniform(0, args.max_exponent) if k > 0 else 0.0
            limits = (step, horizon, args.target_every, args.max_sparsity_step)
            self.sparsity[k] = next_sparsity(sparsity, exponent, *limits)
            pruned = self.sparsity[k] > sparsity
            masks = magnitude_masks(weights, parents, self.sparsity[k], args.scope) if pruned else parents
            self.online[k].load_state_dict(self.target.state_dict())
            for weight, mask, new in zip(self.weights[k], self.masks[k], masks):
                weight.mul_(mask.copy_(new))
        if args.reset_optimizer:
            for state in self.optimizer.state.values():
                torch._foreach_zero_(list(state.values()))
        self.accumulated_loss.zero_()
        return best

    def tensors(self) -> dict[str, Tensor]:
        """Return by name every tensor that the next step depends on."""
        named = {"accumulated_loss": self.accumulated_loss, "latest": self.latest}
        named |= {f"target.{name}": p for name, p in self.target.named_parameters()}
        for k, network in enumerate(self.online):
            named |= {f"mask.{k}.{i}": mask for i, mask in enumerate(self.masks[k])}
            for name, p in network.named_parameters():
                named |= {f"online.{k}.{name}": p} | {f"{m}.{k}.{name}": t for m, t in self.optimizer.state[p].items()}
        return named

    def report(self, losses: list[float]) -> dict[str, float]:
        """Return what is logged: the latest update's means over the K networks, the sparsity of what is saved now."""
        td_loss, q_values = self.latest.mean(1).tolist()
        record = {"losses/td_loss": td_loss, "losses/q_values": q_values, "sparsity/target": self.sparsity[0]}
        record |= {f"sparsity/{key}": value for key, value in sparsity_report(self.online[choose(losses)]).items()}
        return record | {f"sparsity/candidate_{k}": s for k, s in enumerate(self.sparsity, 1)}


# >>> shared: evaluation
@torch.no_grad()
def evaluate(network: nn.Module, rom: str, episodes: int, epsilon: float, seed: int, video: Path | None) -> list[float]:
    """Play episodes on the training protocol, epsilon-greedily, together; return their unclipped returns.

    `video`: record the first one there (mp4, colour, 15 frames a second, real time).
    """
    rng, device = np.random.default_rng(seed), next(network.parameters()).device
    envs, scores = AtariEnvs(rom, episodes, seed), dict[int, float]()
    if video:  # the same game in colour: its seed and actions are the first environment's
        import imageio_ffmpeg

        colour = AtariEnvs(rom, 1, seed, grayscale=False, img_height=210, img_width=160, stack_num=1)
        writer = imageio_ffmpeg.write_frames(str(video), (160, 210), fps=15, macro_block_size=2)
        writer.send(None)
    while len(scores) < episodes:
        obs = torch.from_numpy(envs.obs).to(device, torch.float32, memory_format=torch.channels_last).div_(255)
        actions = network(obs).argmax(1).cpu().numpy()
        actions = np.where(rng.random(episodes) < epsilon, rng.integers(envs.num_actions, size=episodes), actions)
        if video and 0 not in scores:
            writer.send(np.ascontiguousarray(colour.obs[0, 0]))
            colour.send(actions[:1])
            colour.recv()
        envs.send(actions)
        steps = envs.recv()
        for i, (score, _) in zip(np.flatnonzero(steps.ended), steps.episodes):
            scores.setdefault(int(i), score)
    if video:
        writer.close()
    return [scores[i] for i in range(episodes)]
# <<< shared: evaluation


# >>> shared: run-directory
def write_file(path: Path, data: bytes) -> str:
    """Write a file that a crash leaves whole or absent; return its SHA-256."""
    with open(temporary := path.with_name(f".{path.name}.tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return sha256(data)


class Run:
    """A run's folder: flags, versions, metrics.jsonl (the source of truth), TensorBoard events, checkpoints, the model.

    A checkpoint is STEP.json (counters, random generators and the SHA-256 of its files; written last), STEP.safetensors
    and the replay, in segments that hold only what is new. The last two checkpoints are kept.
    """

    def __init__(self, args: Args, title: str, device: torch.device, disk_needed: float) -> None:
        default = Path("runs", f"{title}__{Path(__file__).stem}__{args.seed}__{int(time.time())}")
        self.args, self.path = args, Path(args.resume or args.run_dir or default)
        self.folder, self.saver, self.saving = self.path / "checkpoint", ThreadPoolExecutor(1), Future[None]()
        self.saving.set_result(None)
        if not args.resume:
            free = shutil.disk_usage(next(p for p in self.path.absolute().parents if p.exists())).free
            print(f"{self.path}: checkpoints take up to {disk_needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free")
            require(free > disk_needed, f"--run-dir {self.path}: too little disk is free for checkpoints")
            begun = {"checkpoint", "versions.json", ".versions.json.tmp", ".args.json.tmp"}  # by a run killed at once
            fresh = not self.path.exists() or (self.path.is_dir() and {p.name for p in self.path.iterdir()} <= begun)
            require(fresh, f"--run-dir {self.path} exists: give a new folder, or go on with --resume {self.path}")
            head = [shutil.which("git") or "true", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
            commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
            versions = {"script": Path(__file__).name, "commit": commit or None, "python": sys.version,
                        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform(),
                        "packages": {name: version(name) for name in ("torch", "numpy", "gymnasium", "ale-py", "tyro")}}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(self.path / "versions.json", json.dumps(versions, indent=1).encode())
                write_file(self.path / "args.json", json.dumps(dataclasses.asdict(args), indent=1).encode())
            except OSError as error:
                raise Exit(2, f"--run-dir {self.path} cannot be made ({error})") from None

    def load(self, tensors: dict[str, Tensor], replay: FrameReplay) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint and cut the records back to it; return its state, None before the first.

        A damaged checkpoint is named, and the one before it is used.
        """
        self.checkpoint: dict[str, Any] = {"step": 0, "seconds": 0.0, "metrics_bytes": 0, "files": {}, "segments": []}
        manifests = sorted(self.folder.glob("*.json"), reverse=True)
        for manifest in manifests:
            digest, _, body = manifest.read_bytes().partition(b"\n")
            files = json.loads(body)["files"] if sha256(body).encode() == digest else {manifest.name: "another"}
            paths = {self.folder / name: digest for name, digest in files.items()}
            damaged = [path for path in paths if not path.exists() or sha256(path.read_bytes()) != paths[path]]
            if not damaged:
                self.checkpoint = json.loads(body)
                for newer in manifests[: manifests.index(manifest)]:
                    newer.unlink()
                break
            print(f"{damaged[0]} is damaged; looking for the checkpoint before it", file=sys.stderr)
        if manifests and not self.checkpoint["files"]:
            raise Exit(1, f"{self.folder}: no checkpoint is whole; nothing was changed")
        if manifests:
            saved = load_file(self.folder / f"{self.checkpoint['step']:012d}.safetensors")
            for name, tensor in tensors.items():
                tensor.detach().copy_(saved[name])
            for first, last in self.checkpoint["segments"]:
                with gzip.open(self.folder / f"replay-{first}-{last}.gz") as file:
                    for array, index in replay.pieces(first, last):
                        array[index] = torch.from_numpy(np.load(file)).to(array.device)
        self.metrics = open(self.path / "metrics.jsonl", "ab")
        if self.metrics.tell() < self.checkpoint["metrics_bytes"]:
            raise Exit(1, f"{self.metrics.name} is shorter than when the checkpoint was written")
        self.metrics.truncate(self.checkpoint["metrics_bytes"])
        self.metrics.seek(0, os.SEEK_END)
        self.board = SummaryWriter(str(self.path), purge_step=self.checkpoint["step"] + 1)
        self.start, self.saved_at = time.time() - self.checkpoint["seconds"], time.monotonic()
        if self.args.track:
            import wandb

            name = self.path.resolve().name
            self.wandb = wandb.init(project=self.args.wandb_project, id=name, name=name, dir=self.path, resume="allow",
                                    config=dataclasses.asdict(self.args))
        return self.checkpoint.get("state")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one record to metrics.jsonl and give it to TensorBoard and W&B."""
        record = {"step": step, "seconds": round(time.time() - self.start, 3), **values}
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        if self.args.track:
            self.wandb.log(values, step=step)

    def save(self, step: int, tensors: dict[str, Tensor], replay: FrameReplay, state: dict[str, Any]) -> None:
        """Copy the state and write a checkpoint beside the loop; the replay is read while it is written."""
        self.finish_saving()
        self.board.flush()
        os.fsync(self.metrics.fileno())
        oldest = max(0, replay.step - replay.rows + 1)
        segments = [s for s in self.checkpoint["segments"] if s[1] > oldest]
        segments.append([max(oldest, segments[-1][1] if segments else 0), replay.step])
        self.checkpoint |= {"step": step, "seconds": time.time() - self.start, "metrics_bytes": self.metrics.tell(),
                            "segments": segments, "state": json.loads(json.dumps(state))}  # a copy: the loop goes on
        masks = {name: t.bool() for name, t in tensors.items() if name.startswith("mask")}
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in (tensors | masks).items()}
        replay.unsaved = segments[-1][0]
        self.saving, self.saved_at = self.saver.submit(self._write, copies, replay), time.monotonic()

    def _write(self, copies: dict[str, Tensor], replay: FrameReplay) -> None:
        """Write the checkpoint, manifest last, then delete the files that no kept one needs."""
        checkpoint, name = self.checkpoint, f"{self.checkpoint['step']:012d}"
        segments = [f"replay-{first}-{last}.gz" for first, last in checkpoint["segments"]]
        data = io.BytesIO()
        try:
            with gzip.GzipFile(fileobj=data, mode="wb", compresslevel=1, mtime=0) as file:
                for array, index in replay.pieces(*checkpoint["segments"][-1]):
                    np.save(file, array[index].cpu().numpy())
        finally:
            replay.unsaved = None  # else the loop would wait for ever
        new = {segments[-1]: data.getvalue(), f"{name}.safetensors": save(copies)}
        old = {segment: checkpoint["files"][segment] for segment in segments[:-1]}
        checkpoint["files"] = old | {file: write_file(self.folder / file, data) for file, data in new.items()}
        body = json.dumps(checkpoint).encode()
        write_file(self.folder / f"{name}.json", sha256(body).encode() + b"\n" + body)
        kept = [(path, path.read_bytes()) for path in sorted(self.folder.glob("*.json"))[-2:]]
        needed = {n for path, text in kept for n in (path.name, *json.loads(text.partition(b"\n")[2])["files"])}
        for path in self.folder.iterdir():
            if path.name not in needed:
                path.unlink()

    def finish(self, step: int, network: nn.Module, rom: str, title: str, epoch_return: float | None) -> None:
        """Save the network, evaluate it, write final.json and tell the user what came out."""
        self.finish_saving()
        weights = {name: p.detach().contiguous() + 0.0 for name, p in network.named_parameters()}  # no -0.0
        write_file(self.path / "model.safetensors", save(weights))
        episodes, seed = self.args.eval_episodes, self.args.seed + 1_000_000  # not the seed of training
        video = self.path / "evaluation.mp4" if self.args.capture_video else None
        print(f"evaluating over {episodes} episodes" if episodes else "no evaluation")
        scores = evaluate(network, rom, episodes, 0.001, seed, video) if episodes else []
        result = {"eval/episodic_return": float(np.mean(scores)), "eval/episodes": episodes} if scores else {}
        if scores and (human := human_normalized(title, result["eval/episodic_return"])) is not None:
            result["eval/human_normalized"] = human
        if result:
            self.log(step, result)
        self.board.close()
        report, seconds = {f"sparsity/{k}": v for k, v in sparsity_report(network).items()}, time.time() - self.start
        final = {"status": "finished", "step": step, "seconds": seconds, "epoch_return": epoch_return, "scores": scores}
        write_file(self.path / "final.json", json.dumps(final | result | report, indent=1).encode())
        for key, value in (report | result).items():
            print(f"{key:28} {value:12,.6g}")
        print(f"finished {step} steps in {seconds / 60:.1f} minutes; everything is in {self.path}")

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk; Exit if it could not be written."""
        try:
            self.saving.result()
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            raise Exit(1, f"{self.folder}: no checkpoint could be written ({error}); the last one is kept") from None
# <<< shared: run-directory


# >>> shared: command-line
def parse(argv: list[str]) -> Args:
    """Return the flags of the command line; with --resume those of the run."""
    args = tyro.cli(Args, args=argv, description=(__doc__ or "").partition("\n")[0])
    require("--resume" not in argv or args.resume != "", "--resume needs the folder of a run")
    if not args.resume:
        return args
    others = [flag for flag in argv if flag.startswith("--") and not flag.startswith("--resume")]
    require(not others, f"--resume takes every flag from the run; leave out {' '.join(others)}")
    try:
        return Args(**json.loads(Path(args.resume, "args.json").read_text()) | {"resume": args.resume})
    except (OSError, ValueError, TypeError) as error:
        raise Exit(2, f"--resume {args.resume}: no run of this script is there ({error})") from None


def find_device(args: Args) -> torch.device:
    """Return the device of --device; Exit if this machine has none such or it cannot do what the flags ask."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    require(args.device in known, f"--device {args.device}: this machine has {', '.join(known)}")
    device = torch.device(("cuda" if count else "cpu") if args.device == "auto" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    require(device.type == "cuda" or not args.compile, "--compile: only with --device cuda; it gains nothing on CPU")
    return device
# <<< shared: command-line


# >>> shared: entry
def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks; else every update faults its gradients' pages in anew, a fifth of its time."""
    with contextlib.suppress(OSError, AttributeError):  # on another C library
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)


def command_line(main: Callable[[Args], None]) -> None:
    """Run main; a fault ends it with one line and an exit status."""
    keep_freed_memory()
    try:
        main(parse(sys.argv[1:]))
    except (Exit, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of ours, which deserves its traceback
        status = error.status if isinstance(error, Exit) else 1
        hint = "" if isinstance(error, (Exit, OSError)) else "these flags need more memory than there is: "
        print(f"{Path(__file__).name}: {hint}{str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(status)
# <<< shared: entry


def main(args: Args) -> None:
    """Train, evaluate the network of the smallest loss, and leave the run folder."""
    if args.resume and Path(args.resume, "final.json").exists():
        print(f"{args.resume} is finished; nothing is left to do")
        return
    device, (rom, title), total = find_device(args), find_rom(args.env_id), args.total_timesteps
    step, gradient_step, selected, epoch_return = 0, 0, 0, None
    returns, recent, stops = list[float](), [0.0], list[int]()  # of this epoch's episodes, of the latest; signals

    def stop(signum: int, _: Any) -> None:
        """Stop after this step with a checkpoint; at once when only the evaluation is left."""
        stops.append(signum)
        if step >= total:
            raise Exit(75, f"stopped before the evaluation; go on with --resume {run.path}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    envs = AtariEnvs(rom, args.num_envs, args.seed)
    agent = EauDeQN(args, envs.num_actions, device)
    fits = device.type == "cpu" or 7130 * args.buffer_size < 0.8 * torch.cuda.mem_get_info(device)[0]
    require(fits or not args.compile, f"--buffer-size {args.buffer_size}: too large for the GPU, which --compile needs")
    replay = FrameReplay(args.buffer_size, args.num_envs, device if fits else torch.device("cpu"), args.seed)
    tensors = agent.tensors()
    run = Run(args, title, device, 700 * args.buffer_size + 2 * sum(t.nbytes for t in tensors.values()))
    if state := run.load(tensors, replay):
        (step, gradient_step, selected, returns, epoch_return), agent.sparsity = state["counters"], state["sparsity"]
        for use, rng in agent.rng.items():
            rng.bit_generator.state = state["rng"][use]
        replay.restore(state["replay"])
        envs.restore(state["envs"])
    replay.see(envs.obs[:, -1])
    losses, tty, shown = agent.accumulated_loss.tolist(), sys.stderr.isatty(), (step, time.monotonic())
    shape = "{percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} {remaining} left {desc}"
    bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, dynamic_ncols=True,
               mininterval=0.5 if tty else 30, bar_format="{bar:10}" + shape if tty else shape + "\n")

    while step < total:
        now, trained = step + args.num_envs, gradient_step > 0
        # Act and step.
        epsilon = 1 + (args.epsilon_end - 1) * min(1.0, max(0.0, (step - args.learning_starts) / args.epsilon_steps))
        actions = agent.act(envs.obs, epsilon, losses)
        envs.send(actions)
        updates = math.floor(now * args.replay_ratio) - math.floor(max(step, args.learning_starts) * args.replay_ratio)
        if args.num_envs > 1:  # the environments step meanwhile; one alone keeps the paper's order of events
            agent.learn(replay, updates)
        steps = envs.recv()
        # Store.
        replay.add(actions, steps, envs.obs[:, -1])
        for score, length in steps.episodes:
            run.log(now, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns, recent = [*returns, score], [*recent, score][-10:]
        # Learn.
        if args.num_envs == 1:
            agent.learn(replay, updates)
        gradient_step += max(0, updates)
        if updates > 0 and not all(map(math.isfinite, losses := agent.accumulated_loss.tolist())):
            bar.close()
            run.finish_saving()
            last = f"step {run.checkpoint['step']} in {run.folder}" if run.checkpoint["files"] else "none yet"
            raise Exit(1, f"the losses became {losses} at step {now}; last checkpoint: {last}")
        # Prune and target.
        if trained and now < total and now // args.target_every > step // args.target_every:
            selected = 1 + agent.update_target(now // args.target_every * args.target_every, total)
            losses = [0.0] * args.num_networks
        # Log.
        bar.set_description_str(f"return {np.mean(recent):.1f} sparsity {agent.sparsity[0]:.3f}", False)
        bar.update(min(now, total) - step)
        epoch_ends, log_every = now // args.epoch_steps > step // args.epoch_steps, max(args.target_every, 1000)
        if epoch_ends or now // log_every > step // log_every:
            speed, shown = (now - shown[0]) / (time.monotonic() - shown[1]), (now, time.monotonic())
            record = {"charts/SPS": speed, "charts/epsilon": epsilon, "charts/learning_rate": args.learning_rate,
                      "charts/buffer_size": len(replay), "memory/replay_bytes": replay.nbytes,
                      "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT}
            if selected:
                record["sparsity/selected"] = selected
            if epoch_ends:
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
            run.log(now, record | agent.report(losses))
        step = now
        # Save.
        if stops or step >= total or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"counters": (step, gradient_step, selected, returns, epoch_return), "sparsity": agent.sparsity,
                     "rng": {use: rng.bit_generator.state for use, rng in agent.rng.items()}, "replay": replay.state(),
                     "envs": envs.state()}
            run.save(step, tensors, replay, state)
        if stops:
            bar.close()
            run.finish_saving()
            raise Exit(75, f"stopped at step {step}; go on with --resume {run.path}")

    bar.close()
    run.finish(step, agent.online[choose(losses)], rom, title, epoch_return)


if __name__ == "__main__":
    command_line(main)
