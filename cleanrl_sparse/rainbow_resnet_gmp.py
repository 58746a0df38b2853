# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12.1", "tyro>=0.9", "safetensors>=0.5",
#                 "tensorboard>=2.18", "tqdm>=4.66", "imageio-ffmpeg>=0.5", "wandb>=0.18"]
# ///
"""Rainbow on Atari with gradual magnitude pruning: 95 % of its weights go.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned network is a good
network", ICML 2024, arXiv 2402.12479. The agent is Dopamine's "compact" Rainbow (Hessel et al. 2018): C51, returns over
three steps, prioritised replay, and nothing else: no double, no dueling, no noisy networks. Pruned as by JaxPruner.

From 20 % to 80 % of the gradient steps the weights of the smallest magnitude are removed along a cubic schedule
(Zhu and Gupta 2017), every 1,000 gradient steps. What is removed stays removed.

    python rainbow_resnet_gmp.py --env-id Breakout --width 3        # the paper's setting: 40M frames, 95 %
    python rainbow_resnet_gmp.py --network cnn                      # DQN's convolutions
    python rainbow_resnet_gmp.py --sparsity 0                       # the dense baseline: nothing is pruned
    python rainbow_resnet_gmp.py --resume runs/Breakout__rainbow_resnet_gmp__1__1790000000

Differences from the paper, and guesses ([C] read in the paper or its authors' code, [I] inferred, [D] our decision):
 1. [C] Score |w|, per tensor, exact counts, ties by lower index; all tensors but biases, first and last layer included.
 2. [I] Sparsity is spread over the layers by the Erdos-Renyi-Kernel rule (--scope erk); each layer's own target is
    multiplied by the schedule's progress.
 3. [D] The schedule counts this run's gradient steps: 499,000 to 1,996,000 here, 500,000 to 2,000,000 in the paper.
 4. [D] --width multiplies the channels of the convolutions; the dense layer stays at --feature-size. [I] Impala's
    channels are Dopamine's 16, 32, 32; the paper's table prints 32, 64, 64, which is --width 2.
 5. [C] Priority sqrt(loss + 1e-10), the highest so far for what is new [D: as soon as its three steps are there];
    weight 1 / sqrt(priority + 1e-10) over the batch's largest; neither exponent is annealed.
 6. [D] Analyses: Q-variance is the variance of all Q(s, a) over states and actions, Q-norm the mean over states of
    |Q(s, .)|_2, srank and dormant neurons as in their papers, gradient covariance as cosines.
 7. [D] An environment is not seeded anew at each ending (AtariEnvs). With --num-envs above 1 the environments step
    while the network learns, from all but that step.

Figures: benchmark/gmp_figure*.sh, Rainbow in 1, 5, 6, 10, 11, 14, 16. More: docs/rainbow_resnet_gmp.md.
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
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# >>> shared: basics
class Exit(Exception):
    """Exit(status, line) ends the program: status 2 bad input, 1 a fault while running, 75 stopped and resumable."""


def require(accepted: bool, line: str) -> None:
    """Refuse bad input, with a line that names the flag or file and what is accepted."""
    if not accepted:
        raise Exit(2, line)

# <<< shared: basics


@dataclass
class Args:
    """Flags; the paper's main results are of --width 3. A "step" is one decision, 4 frames."""

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
    network: Literal["cnn", "impala"] = "impala"  # cnn: DQN's three convolutions; impala: the 15-layer residual network
    feature_size: int = 512  # units of the dense layer (>= 1)
    width: int = 1  # multiplies the channels of the convolutions (>= 1; the paper: 1 to 5, mainly 3)
    n_step: int = 3  # steps of the return before the bootstrap (>= 1)
    sparsity: float = 0.95  # share of the prunable weights that is zero in the end, in [0, 1); 0 never prunes
    prune_start: float = 0.2  # share of the run's gradient steps at which pruning begins, in [0, 1]
    prune_end: float = 0.8  # share at which the final sparsity is reached, in [prune_start, 1]
    prune_every: int = 1000  # gradient steps between updates of the masks (>= 1)
    prune_exponent: float = 3.0  # of the polynomial schedule (> 0); 3 is the paper's cubic one
    scope: Literal["erk", "uniform", "global"] = "erk"  # how sparsity is spread over the layers
    analysis_every: int = 250_000  # steps between analyses of the network (>= 0; 0: none)

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        # >>> shared: check
        def check(names: str, accepted: Callable[[float], bool], text: str) -> None:
            """Refuse the flags `names` whose value is not accepted."""
            for name in names.split():
                flag, value = name.replace("_", "-"), getattr(self, name)
                require(accepted(value), f"--{flag} {value}: must be {text}")

        check("total_timesteps batch_size epoch_steps", lambda x: x >= 1, "at least 1")
        check("eval_episodes checkpoint_minutes", lambda x: x >= 0, "at least 0")
        check("seed", lambda x: 0 <= x < 2**32, "in [0, 2^32)")
        check("learning_rate", lambda x: 0 < x < math.inf, "above 0 and finite")
        check("gamma", lambda x: 0 <= x <= 1, "in [0, 1]")
        check("capture_video", lambda x: not x or self.eval_episodes > 0, "used with --eval-episodes above 0")
        # <<< shared: check
        # >>> shared: check-replay-flags
        check("num_envs", lambda x: x >= 1, "at least 1")
        check("replay_ratio", lambda x: 0 < x < math.inf, "above 0 and finite")
        check("learning_starts buffer_size", lambda x: x >= self.batch_size, f"at least a batch, {self.batch_size}")
        text = f"at least --num-envs {self.num_envs}"
        check("learning_starts buffer_size", lambda x: x >= self.num_envs, text)
        # <<< shared: check-replay-flags
        # >>> shared: check-run-flags
        check("epsilon_steps", lambda x: x >= 1, "at least 1")
        check("adam_eps", lambda x: 0 < x < math.inf, "above 0 and finite")
        check("epsilon_end", lambda x: 0 <= x <= 1, "in [0, 1]")
        check("target_every", lambda x: x >= self.num_envs, text)
        # <<< shared: check-run-flags
        check("feature_size width n_step prune_every", lambda x: x >= 1, "at least 1")
        check("n_step", lambda x: x * self.num_envs <= self.learning_starts, "at most --learning-starts / --num-envs")
        check("analysis_every", lambda x: x >= 0, "at least 0")
        check("sparsity", lambda x: 0 <= x < 1, "in [0, 1)")
        check("prune_start prune_end", lambda x: 0 <= x <= 1, "in [0, 1]")
        check("prune_end", lambda x: x >= self.prune_start, f"at least --prune-start, {self.prune_start}")
        check("prune_exponent", lambda x: 0 < x < math.inf, "above 0 and finite")


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
    if not (found := re.search(rf"\b{title}\s(\S+)\s([^;\s]+)", HUMAN_SCORES)):
        return None
    return (score - float(found[1])) / (float(found[2]) - float(found[1]))


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

    What an environment did follows from its seeds and actions: a checkpoint keeps these, restore() plays them again.
    Seeding reloads the ROM, which takes as long as 200 steps, so it is left out at most endings.
    """

    RESEED_AFTER = 25_000  # an environment is seeded anew at the first ending so many steps after its last seeding

    def __init__(self, rom: str, num_envs: int, seed: int, **options: Any) -> None:
        protocol = dict(repeat_action_probability=0.25, noop_max=0, use_fire_reset=False, reward_clipping=False,
                        max_num_frames_per_episode=108_000, num_threads=min(num_envs, os.cpu_count() or 1))
        self.envs = AtariVectorEnv(rom, num_envs, autoreset_mode="NextStep", **(protocol | options))
        self.num_actions = len(self.envs.ale.get_action_set())
        self.seed, self.actions = seed, bytearray()  # every action so far, N to a step
        self.seeded = [list[int]() for _ in range(num_envs)]  # the steps at which each environment was seeded
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.reset(np.ones(num_envs, bool), reseed=True)

    def reset(self, which: np.ndarray, reseed: bool = False) -> None:
        """Start an episode where the mask `which` [N] is true."""
        seeds, step = [], len(self.actions) // len(which)
        for i in np.flatnonzero(which):
            new = reseed or step - self.seeded[i][-1] >= self.RESEED_AFTER
            self.seeded[i] += [step] * new
            key = (self.seed, int(i), step)
            seeds.append(np.random.SeedSequence(key).generate_state(1)[0] >> 1 if new else -1)  # -1: no seeding
        self.returns[which] = self.lengths[which] = 0
        options = {} if which.all() else {"reset_mask": which}
        self.obs = self.envs.reset(seed=np.array(seeds, np.int64), options=options)[0]

    def send(self, actions: np.ndarray) -> None:
        """Start a step with actions [N] int64; the environments run in threads of their own until recv()."""
        self.actions += actions.astype(np.uint8).tobytes()
        self.envs.send(actions)

    def recv(self) -> Steps:
        """Wait for the step's end. What ended is reset at once, so that no reset step reaches the replay."""
        self.obs, rewards, terminated, truncated, _ = self.envs.recv()
        last_frames, ended = self.obs[:, -1], terminated | truncated
        self.returns += rewards
        self.lengths += 1
        episodes = [(float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(ended)]
        if ended.any():
            self.reset(ended)
        return Steps(last_frames, rewards, terminated, ended, episodes)

    def past(self) -> dict[str, Any]:
        """Return what restore() needs, as JSON."""
        return {"actions": self.actions.hex(), "seeded": self.seeded, "digest": hashlib.sha256(self.obs).hexdigest()}

    def restore(self, past: dict[str, Any], first: int) -> Iterator[tuple[int, np.ndarray, Steps]]:
        """Play a past() again, each environment from its last seed at or before step `first`.

        Yields (step, actions [N], Steps). Raises Exit if the games went otherwise than recorded.
        """
        actions = np.frombuffer(bytes.fromhex(past["actions"]), np.uint8).reshape(-1, len(self.obs))
        begins = np.array([max(step for step in seeded if step <= max(0, first)) for seeded in past["seeded"]])
        self.actions = bytearray(actions[: begins.min()].tobytes())
        self.reset(begins == begins.min(), reseed=True)
        for step in tqdm(range(begins.min(), len(actions)), "playing again", leave=False, disable=None):
            self.send(actions[step].astype(np.int64))
            steps = self.recv()
            if (begun := begins == step + 1).any():  # what this environment did until now is not in the record
                self.reset(begun, reseed=True)
            yield step, actions[step], steps  # at a begin no ending: such rows lie before all stacks that are sampled
        self.seeded = past["seeded"]
        if hashlib.sha256(self.obs).hexdigest() != past["digest"]:
            raise Exit(1, "the games went otherwise when played again; resume with the ale-py of versions.json")
# <<< shared: atari-env


# >>> shared: torsos
class Residual(nn.Module):
    """Impala's residual block on [B, C, H, W]: x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shaped like x."""
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))


def make_torso(network: str, width: int) -> nn.Sequential:
    """Return Dopamine's torsos, all padding SAME as in XLA, where an odd pixel of padding stands at the end.

    cnn (Mnih et al. 2015): [B, 4, 84, 84] -> [B, 64 * width, 11, 11]; impala (Espeholt et al. 2018), 15 layers without
    normalisation: -> [B, 32 * width, 11, 11].
    """
    c = 32 * width
    if network == "cnn":
        return nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(4, c, 8, stride=4, padding=2), relu1=nn.ReLU(), pad2=nn.ZeroPad2d((1, 2, 1, 2)),  # 84 -> 21
            conv2=nn.Conv2d(c, 2 * c, 4, stride=2), relu2=nn.ReLU(),  # 21 -> 11
            conv3=nn.Conv2d(2 * c, 2 * c, 3, padding=1), relu3=nn.ReLU()))  # fmt: skip
    layers = OrderedDict[str, nn.Module]()
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
        self.relu, self.output = nn.ReLU(), nn.Linear(feature_size, num_actions)
        for name, p in self.named_parameters():  # Dopamine's initialisation
            if p.ndim == 1:
                nn.init.zeros_(p)
            elif "block" in name:  # LeCun normal, truncated at two standard deviations
                std = math.sqrt(1 / p[0].numel()) / 0.87962566
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.xavier_uniform_(p)

    def features(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to features [B, feature_size]."""
        x = self.torso(obs).permute(0, 2, 3, 1).flatten(1)  # flat in channels-last order, which needs no copy
        return self.relu(self.dense(x))

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions]."""
        x = self.features(obs)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round away what actions differ in
            return self.output(x.to(self.output.weight.dtype))
# <<< shared: torsos


# >>> shared: c51
ATOMS, V_MAX = 51, 10.0  # the distribution's support is [-V_MAX, V_MAX]


class C51Network(QNetwork):
    """A categorical distribution of the return for each action (Bellemare et al. 2017)."""

    def __init__(self, num_actions: int, network: str, feature_size: int, width: int) -> None:
        super().__init__(num_actions * ATOMS, network, feature_size, width)
        if network == "cnn":  # Dopamine's Rainbow: variance scaling 1 / sqrt(3) of the fan-in, uniform
            for p in self.parameters():
                limit = math.sqrt(math.sqrt(3) / p[0].numel())
                nn.init.uniform_(p, -limit, limit) if p.ndim > 1 else nn.init.zeros_(p)

    def logits(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to logits [B, num_actions, ATOMS]."""
        return super().forward(obs).unflatten(1, (-1, ATOMS))

    def forward(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to Q-values [B, num_actions], the means."""
        logits = self.logits(obs)
        support = torch.linspace(-V_MAX, V_MAX, ATOMS, device=logits.device, dtype=logits.dtype)
        return (logits.softmax(2) * support).sum(2)
# <<< shared: c51


# >>> shared: frame-replay
class Batch(NamedTuple):
    """Transitions over n steps, fewer where the episode ends; a truncated one bootstraps from its true last frames."""

    obs: Tensor  # [B, 4, 84, 84] uint8
    next_obs: Tensor  # [B, 4, 84, 84] uint8; of no meaning where the episode terminated
    actions: Tensor  # [B] int64
    rewards: Tensor  # [B] float32, discounted sum of rewards clipped to [-1, 1]
    discounts: Tensor  # [B] float32, of the value of next_obs: gamma ** steps, 0 where the episode terminated


class FrameReplay:
    """Uniform replay of the last `capacity` transitions that stores each frame once (7.1 KB per transition).

    A ring of rows, one per step of all N environments: slot row * N + i holds the newest frame that environment i's
    agent saw, and what it did. A stack is a slot and the three rows before it, as far as they belong to the episode
    (`age`), else zeros. The last frame of a truncated episode, of `episode_cap` steps, lies in a small ring of its own.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device, seed: int, gamma: float, n_step: int = 1,
                 frame_shape: tuple[int, ...] = (84, 84), episode_cap: int = 27_000) -> None:
        self.num_envs, self.n_step = num_envs, n_step
        self.rows = -(-capacity // num_envs) + n_step + 3  # 3 older frames of the first stack, n newer of the last
        self.slots, self.extra = self.rows * num_envs, (self.rows // episode_cap + 2) * num_envs
        self.frames = torch.empty(self.slots + self.extra + 1, *frame_shape, dtype=torch.uint8, device=device)
        self.frames[-1] = 0  # what lies before an episode
        # Per slot: action, clipped reward, terminated, age (0 for an episode's first frame, at most 3), next frame.
        self.facts = torch.zeros(self.slots, 5, dtype=torch.int32, device=device)
        self.back = torch.arange(3, -1, -1, device=device) * num_envs  # distance of a stack's frames, oldest first
        self.ahead, self.powers = torch.arange(n_step, device=device), gamma ** torch.arange(n_step + 1, device=device)
        self.range = torch.zeros(2, dtype=torch.long, device=device)  # first transition to be sampled, how many
        self.step = self.truncations = 0  # steps stored, truncations so far
        self.ages = np.zeros(num_envs, np.int64)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.nbytes = self.frames.nbytes + self.facts.nbytes

    def __len__(self) -> int:
        """Return the number of transitions that can be sampled."""
        return max(0, min(self.step - self.n_step + 1, self.rows - self.n_step - 3)) * self.num_envs

    def see(self, frames: np.ndarray) -> None:
        """Write the frames [N, H, W] that the agent sees now."""
        start = self.step % self.rows * self.num_envs
        self.frames[start : start + self.num_envs] = torch.from_numpy(frames)
        end = max(0, self.step - self.n_step + 1) * self.num_envs  # what starts here has not come to its end yet
        self.range.copy_(torch.tensor([end - len(self), len(self)]))

    def add(self, actions: np.ndarray, steps: Steps, frames: np.ndarray) -> None:
        """Store what N environments did (actions [N]), what came of it, and the frames [N, H, W] seen now.

        Rewards are whole numbers, as Atari's are; they are kept as int32.
        """
        slots = np.arange(self.num_envs) + self.step % self.rows * self.num_envs
        after = (slots + self.num_envs) % self.slots
        for i in np.flatnonzero(steps.ended & ~steps.terminated):
            after[i] = self.slots + self.truncations % self.extra
            self.frames[after[i]] = torch.from_numpy(steps.last_frames[i])
            self.truncations += 1
        facts = np.stack([actions, np.clip(steps.rewards, -1, 1), steps.terminated, self.ages, after], 1)
        self.facts[slots[0] : slots[-1] + 1] = torch.from_numpy(facts.astype(np.int32))
        self.step += 1
        self.ages = np.where(steps.ended, 0, np.minimum(self.ages + 1, 3))
        self.see(frames)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, without waiting for the device."""
        draw = torch.rand(batch_size, dtype=torch.float64, device=self.frames.device, generator=self.generator)
        return self.gather(((draw * self.range[1]).long() + self.range[0]) % self.slots)

    def stack(self, slots: Tensor, age: Tensor) -> Tensor:
        """Return where the frames [B, 4] of the stacks at slots [B] lie."""
        own = self.back <= age[:, None] * self.num_envs
        return torch.where(own, (slots[:, None] - self.back) % self.slots, len(self.frames) - 1)

    def gather(self, slots: Tensor) -> Batch:
        """Return the transitions that start at slots [B]."""
        path = (slots[:, None] + self.ahead * self.num_envs) % self.slots  # [B, n]
        actions, rewards, terminated, age, after = self.facts[path].unbind(2)  # [B, n] each
        on = ((terminated == 0) & (after < self.slots)).long()[:, :-1].cumprod(1)  # is there a step k + 1?
        steps = 1 + on.sum(1, keepdim=True)  # [B, 1]
        last, last_age, over, after = (x.gather(1, steps - 1)[:, 0] for x in (path, age, terminated, after))
        return Batch(self.frames[self.stack(slots, age[:, 0])],
                     self.frames[torch.cat([self.stack(last, last_age)[:, 1:], after[:, None]], 1)],
                     actions[:, 0].long(), (rewards * self.powers[:-1] * (self.ahead < steps)).sum(1),
                     self.powers[steps[:, 0]] * (over == 0))  # fmt: skip
# <<< shared: frame-replay


class PrioritisedReplay(FrameReplay):
    """Draws transitions with probability in proportion to their priority, stratified as in Dopamine's.

    New ones get the highest so far.

    Priorities lie in blocks of 1,024 with a sum each: a draw looks for its block among the sums, then within the block.
    That is a sum tree of two levels, a few kernels however many transitions there are (Schaul et al. 2016).
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device, seed: int, gamma: float, n_step: int,
                 **options: Any) -> None:
        super().__init__(capacity, num_envs, device, seed, gamma, n_step, **options)
        self.priority = torch.zeros(-(-self.slots // 1024), 1024, device=device)
        self.sums = torch.zeros(len(self.priority), dtype=torch.float64, device=device)
        self.highest = torch.ones((), device=device)
        self.nbytes += self.priority.nbytes + self.sums.nbytes

    def add(self, actions: np.ndarray, steps: Steps, frames: np.ndarray) -> None:
        """Store a step; what starts n steps ago can be drawn from now on, the oldest no longer."""
        super().add(actions, steps, frames)
        changes: list[tuple[int, Tensor | float]] = [(self.step + 3, 0.0)]
        changes += [(self.step - self.n_step, self.highest)] if self.step >= self.n_step else []
        for row, priority in changes:
            start = row % self.rows * self.num_envs
            self.priority.view(-1)[start : start + self.num_envs] = priority
            blocks = slice(start // 1024, (start + self.num_envs - 1) // 1024 + 1)
            self.sums[blocks] = self.priority[blocks].double().sum(1)

    def draw(self, batch_size: int) -> tuple[Batch, Tensor, Tensor]:
        """Return transitions, their slots [B] and their weights [B], the largest 1, without waiting for the device."""
        ends, device = self.sums.cumsum(0), self.frames.device
        draws = torch.rand(batch_size, dtype=torch.float64, device=device, generator=self.generator)
        draws = (torch.arange(batch_size, device=device) + draws) / batch_size * ends[-1]  # one from each stratum
        blocks = torch.searchsorted(ends, draws.clamp(max=ends[-1] * (1 - 1e-15)), right=True)
        within = self.priority[blocks].double().cumsum(1)  # [B, 1024]
        rest = (draws - ends[blocks] + self.sums[blocks]).clamp(min=0).minimum(within[:, -1] * (1 - 1e-15))
        slots = blocks * 1024 + torch.searchsorted(within, rest[:, None], right=True)[:, 0]
        weights = (self.priority.view(-1)[slots] + 1e-10).rsqrt()
        return self.gather(slots), slots, weights / weights.max()

    def prioritise(self, slots: Tensor, losses: Tensor) -> None:
        """Give the transitions at slots [B] the priorities sqrt(loss + 1e-10).

        A loss that is not finite ends the run after this step, whose other updates must still be able to draw.
        """
        priority, blocks = (losses.nan_to_num(0, 0, 0) + 1e-10).sqrt().to(self.priority), slots // 1024
        self.priority.view(-1)[slots] = priority
        self.sums[blocks] = self.priority[blocks].double().sum(1)
        self.highest.copy_(self.highest.maximum(priority.max()))

    def tensors(self) -> dict[str, Tensor]:
        """Return by name what a checkpoint keeps besides the games' past."""
        return {"replay.priority": self.priority, "replay.sums": self.sums, "replay.highest": self.highest}


# >>> shared: sparsity
def largest(score: Tensor, kept: int) -> Tensor:
    """Return a bool mask of the `kept` largest entries of score [n], ties broken by lower index."""
    rank = score.numel() - kept
    if score.device.type == "cpu":  # a partition is ten times faster than kthvalue or topk there
        threshold = torch.from_numpy(np.partition(score.numpy(), rank)[rank : rank + 1])
    else:  # kthvalue keeps one block of threads busy there
        threshold = score.sort().values[rank : rank + 1]
    above, ties = score > threshold, score == threshold
    return above | (ties & (ties.cumsum(0) <= kept - above.sum()))


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


# >>> shared: magnitude-masks
def erk_densities(shapes: list[torch.Size], sparsity: float) -> list[float]:
    """Return each tensor's density under the Erdos-Renyi-Kernel rule (Evci et al. 2020) for a total sparsity in [0, 1].

    density_l = eps * sum(shape_l) / prod(shape_l), with eps such that the total holds; a tensor that would exceed 1 is
    dense, and eps is solved again for the others.
    """
    sizes, sums = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    free, dense = set(range(len(shapes))), set[int]()
    while free:
        eps = ((1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)) / sum(sums[i] for i in free)
        full = {i for i in free if eps * sums[i] >= sizes[i]}
        if not full:
            break
        free, dense = free - full, dense | full
    return [1.0 if i in dense else eps * sums[i] / sizes[i] for i in range(len(shapes))]


def magnitude_masks(weights: list[Tensor], parents: list[Tensor], sparsity: float, scope: str,
                    progress: float = 1.0) -> list[Tensor]:
    """Return bool masks (True: kept) of the largest |weights| at a total sparsity in [0, 1]; counts are exact.

    What a parent mask has pruned stays pruned, every tensor keeps at least one weight. `scope`: erk and uniform give
    each tensor a sparsity of its own, global ranks all weights together. `progress`: the share of it to reach.
    """
    scores = [torch.where(m, w.detach().abs(), -1.0).flatten() for w, m in zip(weights, parents, strict=True)]
    sizes = [s.numel() for s in scores]
    if scope == "global":
        for s in scores:
            s[s.argmax()] = math.inf
        kept = max(len(scores), round(sum(sizes) * (1 - progress * sparsity)))
        flat = list(largest(torch.cat(scores), kept).split(sizes))
    else:
        uniform = [1 - sparsity] * len(sizes)
        densities = erk_densities([w.shape for w in weights], sparsity) if scope == "erk" else uniform
        kept_shares = [1 - progress * (1 - d) if progress < 1 else d for d in densities]
        flat = [largest(s, max(1, round(s.numel() * d))) for s, d in zip(scores, kept_shares, strict=True)]
    return [f.view(w.shape) & m for f, w, m in zip(flat, weights, parents, strict=True)]
# <<< shared: magnitude-masks


# >>> shared: schedule
def pruning_progress(step: int, start: int, end: int, exponent: float) -> float:
    """Return the share of the final sparsity at a gradient step: 1 - (1 - (t - t0) / (t1 - t0)) ** n, in [0, 1]."""
    if not start <= step < end:
        return float(step >= end)
    return 1 - (1 - (step - start) / (end - start)) ** exponent
# <<< shared: schedule


def project(probabilities: Tensor, returns: Tensor) -> Tensor:
    """Project distributions on shifted supports, probabilities and returns [B, ATOMS], onto the fixed one: [B, ATOMS].

    Each atom's probability is shared between its two neighbours there, by nearness; beyond the ends it goes to the end.
    """
    support = torch.linspace(-V_MAX, V_MAX, ATOMS, device=returns.device, dtype=returns.dtype)
    distance = (returns.clamp(-V_MAX, V_MAX)[:, :, None] - support).abs() / (2 * V_MAX / (ATOMS - 1))
    return ((1 - distance).clamp(min=0) * probabilities[:, :, None]).sum(1)


class Rainbow:
    """The online network with its masks, and the target network."""

    def __init__(self, args: Args, num_actions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.args, self.device, self.dtype, self.num_actions = args, device, dtype, num_actions
        torch.manual_seed(args.seed)
        self.online = C51Network(num_actions, args.network, args.feature_size, args.width)
        self.online.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.weights = list(prunable(self.online).values())
        self.masks = [torch.ones_like(w) for w in self.weights]
        self.gradient_step, self.sparsity, self.losses = 0, [0.0], [0.0]  # sparsity: the schedule's
        self.latest = torch.full((2,), math.nan, device=device, dtype=dtype)  # loss and mean Q-value of one update
        starts, steps = args.learning_starts, -(-args.total_timesteps // args.num_envs) * args.num_envs
        updates = max(1, math.floor(steps * args.replay_ratio) - math.floor(starts * args.replay_ratio))  # of the run
        self.start, self.end = (min(updates - 1, round(x * updates)) for x in (args.prune_start, args.prune_end))
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=args.learning_rate, eps=args.adam_eps,
                                          fused=True, capturable=args.compile)
        for p in self.online.parameters():  # now, not in the first step: a checkpoint restores into it
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device), **moments}
        self.support = torch.linspace(-V_MAX, V_MAX, ATOMS, device=device, dtype=dtype)  # [ATOMS]
        self.rng = np.random.default_rng((args.seed, 0))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # kernels and libraries are loaded once update() has run

    # >>> shared: inputs
    def to_input(self, frames: Tensor) -> Tensor:
        """Scale uint8 frames to [0, 1], channels-last, on the device."""
        return frames.to(self.device).to(self.dtype, memory_format=torch.channels_last).div_(255)

    def q_values(self, network: nn.Module, obs: Tensor) -> Tensor:
        """Return Q-values [B, num_actions] of a to_input() batch under --precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return network(obs).to(self.dtype)
    # <<< shared: inputs

    def logits(self, network: C51Network, frames: Tensor) -> Tensor:
        """Return logits [B, num_actions, ATOMS] of uint8 frames under --precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return network.logits(self.to_input(frames)).to(self.dtype)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy to the projected target distribution and Q(s, a) of each transition, [B] both."""
        batch = Batch(*(tensor.to(self.device) for tensor in batch))  # moves nothing if the replay is on the device
        rows, support = torch.arange(len(batch.obs), device=self.device), self.support
        with torch.no_grad():
            next_p = self.logits(self.target, batch.next_obs).softmax(2)
            next_p = next_p[rows, (next_p * support).sum(2).argmax(1)]  # of the target's own greedy action
            target = project(next_p, batch.rewards[:, None] + batch.discounts[:, None] * support)
        log_p = self.logits(self.online, batch.obs)[rows, batch.actions].log_softmax(1)
        return -(target * log_p).sum(1), (log_p.detach().exp() * support).sum(1)

    def update(self, batch: Batch, weights: Tensor) -> Tensor:
        """Take one gradient step; gradients are dense, masked is what comes out. Return the losses [B].

        Nothing here waits for the device.
        """
        losses, q = self.loss(batch)
        (losses * weights.to(losses)).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            self.latest.copy_(torch.stack([losses.mean(), q.mean()]))
        return losses.detach()

    def replay_update(self, replay: PrioritisedReplay) -> None:
        """Draw, update, and set the priorities of what was drawn."""
        batch, slots, weights = replay.draw(self.args.batch_size)
        replay.prioritise(slots, self.update(batch, weights))

    # >>> forked: captured-update (priorities are set by the same graph)
    def captured_update(self, replay: PrioritisedReplay) -> None:
        """Draw and update once; with --compile by replaying a CUDA graph, which the second call captures."""
        if self.args.compile and self.warm and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(replay.generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.replay_update(replay)
        if self.graph:
            self.graph.replay()
        else:
            self.replay_update(replay)
        self.gradient_step, self.warm = self.gradient_step + 1, True
    # <<< forked: captured-update

    def learn(self, replay: PrioritisedReplay, updates: int) -> None:
        """Draw and update `updates` times, with new masks when they are due."""
        for _ in range(updates):
            self.prune()
            self.captured_update(replay)
        self.losses = self.latest[:1].tolist() if updates > 0 else self.losses

    # >>> shared: pruned-agent
    @torch.no_grad()
    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """Return epsilon-greedy actions [N] for obs [N, 4, 84, 84]."""
        explore = self.rng.random(len(obs)) < epsilon
        actions = self.rng.integers(self.num_actions, size=len(obs))
        if not explore.all():
            q_values = self.q_values(self.online, self.to_input(torch.from_numpy(obs[~explore])))
            actions[~explore] = q_values.argmax(1).cpu().numpy()
        return actions

    def prune(self) -> None:
        """Take the masks of this gradient step from the weights, if new ones are due; what is pruned stays pruned.

        Adam's moments of a pruned weight go on and have no effect, since the mask follows every step.
        """
        args, step = self.args, self.gradient_step
        due = (step - self.start) % args.prune_every == 0 or step == self.end
        if args.sparsity == 0 or not (due and self.start <= step <= self.end):
            return
        progress = pruning_progress(step, self.start, self.end, args.prune_exponent)
        parents = [mask.bool() for mask in self.masks]
        masks = magnitude_masks(self.weights, parents, args.sparsity, args.scope, progress)
        for mask, new in zip(self.masks, masks, strict=True):
            mask.copy_(new)
        self.sparsity = [progress * args.sparsity]

    def update_target(self) -> None:
        """Copy the online network, zeros included."""
        self.target.load_state_dict(self.online.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Return by name every tensor that the next step depends on."""
        named = {"latest": self.latest} | {f"mask.{i}": mask for i, mask in enumerate(self.masks)}
        named |= {f"target.{name}": p for name, p in self.target.named_parameters()}
        for name, p in self.online.named_parameters():
            named |= {f"online.{name}": p} | {f"{m}.{name}": t for m, t in self.optimizer.state[p].items()}
        return named

    def state(self) -> dict[str, Any]:
        """Return the rest of what the next step depends on, as JSON."""
        numbers = {name: getattr(self, name) for name in ("gradient_step", "losses", "sparsity")}
        return {"numbers": numbers, "rng": self.rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state()."""
        vars(self).update(state["numbers"])
        self.rng.bit_generator.state = state["rng"]

    def report(self) -> dict[str, float]:
        """Return what is logged: the latest update's means, the sparsity of the online network."""
        latest = dict(zip(("losses/td_loss", "losses/q_values"), self.latest.tolist()))
        record = {"sparsity/target": self.sparsity[0]} | {k: v for k, v in latest.items() if math.isfinite(v)}
        return record | {f"sparsity/{key}": value for key, value in sparsity_report(self.online).items()}
    # <<< shared: pruned-agent


# >>> shared: analysis
def analyse(agent: Any, replay: FrameReplay, seed: int, path: Path) -> dict[str, float]:
    """Return measures of the online network on 2,048 states; write the gradient covariance of 32 transitions to `path`.

    dormant_T: share of the units after a ReLU (a channel is one) whose mean |h| is at most T times their layer's mean
    (Sokar et al. 2023). srank: smallest k such that the k largest singular values of the features make up 99 % of all
    (Kumar et al. 2021). Gradient covariance [32, 32]: cosines between the loss gradients of the transitions.
    """
    first, count = replay.range.tolist()
    draws = torch.from_numpy(np.random.default_rng(seed).integers(first, first + count, 2048 + 32) % replay.slots)
    draws, network = draws.to(replay.frames.device), agent.online
    means, hidden, features, q_values = list[list[Tensor]](), list[Tensor](), list[Tensor](), list[Tensor]()

    def note(_: nn.Module, __: Any, h: Tensor) -> None:
        """Keep a ReLU's output [B, C, H, W] or [B, C], and the mean |h| of each unit."""
        hidden[:] = [h]
        means[-1].append(h.abs().float().transpose(0, 1).flatten(1).mean(1))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.ReLU)]
    with torch.no_grad():
        for part in draws[:2048].split(256):
            means.append([])
            q_values.append(agent.q_values(network, agent.to_input(replay.gather(part).obs)))
            features += hidden  # of the last layer
    for hook in hooks:
        hook.remove()
    layers = [torch.stack(parts).mean(0) for parts in zip(*means, strict=True)]
    scores = torch.cat([units / (units.mean() + 1e-9) for units in layers])
    spectrum = torch.linalg.svdvals(torch.cat(features).float())
    q, norms = torch.cat(q_values).float(), [p.detach().float().norm() for p in network.parameters()]
    measures = {
        "dormant_0": (scores <= 0).float().mean(), "dormant_0.1": (scores <= 0.1).float().mean(),
        "srank": 1 + (spectrum.cumsum(0) < 0.99 * spectrum.sum()).sum(), "q_variance": q.var(),
        "q_norm": q.norm(dim=1).mean(), "param_norm": torch.stack(norms).norm(),
    }  # fmt: skip
    gradients = torch.empty(32, sum(p.numel() for p in network.parameters()), device=agent.device)
    for row, loss in zip(gradients, agent.loss(replay.gather(draws[2048:]))[0], strict=True):
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        row.copy_(torch.cat([g.flatten() for g in parts]))
    products = gradients @ gradients.T
    sizes = products.diag().sqrt().clamp(min=1e-30)
    np.save(file := io.BytesIO(), (products / sizes[:, None] / sizes).cpu().numpy())
    write_file(path, file.getvalue())
    return {f"analysis/{name}": float(value) for name, value in measures.items()}
# <<< shared: analysis


# >>> shared: atari-evaluation
@torch.no_grad()
def evaluate(network: nn.Module, rom: str, episodes: int, epsilon: float, seed: int, video: Path | None) -> list[float]:
    """Play episodes together, epsilon-greedily; return their unclipped returns. `video`: film the first there (mp4)."""
    rng, device = np.random.default_rng(seed), next(network.parameters()).device
    envs, scores = AtariEnvs(rom, episodes, seed), dict[int, float]()
    if video:  # the same game in colour: its seed and actions are the first environment's
        colour = AtariEnvs(rom, 1, seed, grayscale=False, img_height=210, img_width=160, stack_num=1)
        writer = imageio_ffmpeg.write_frames(str(video.absolute()), (160, 210), fps=15, macro_block_size=2)
        writer.send(None)
    while len(scores) < episodes:
        obs = torch.from_numpy(envs.obs).to(device).to(torch.float32, memory_format=torch.channels_last).div_(255)
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
# <<< shared: atari-evaluation


# >>> shared: atari-judge
def judge(network: nn.Module, rom: str, title: str, args: Args, video: Path | None) -> dict[str, float]:
    """Return what is logged of the final evaluation, at epsilon 0.001 and seeds that are none of training's."""
    scores = evaluate(network, rom, args.eval_episodes, 0.001, args.seed + 1_000_000, video)
    result = {"eval/episodic_return": float(np.mean(scores)), "eval/episodes": len(scores)}
    human = human_normalized(title, result["eval/episodic_return"])
    return result if human is None else result | {"eval/human_normalized": human}
# <<< shared: atari-judge


# >>> shared: run-directory
def write_file(path: Path, data: bytes) -> None:
    """Write a file that a crash leaves whole or absent."""
    with open(temporary := path.with_name(f".{path.name}.tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Run:
    """A run's folder: flags, versions, metrics.jsonl (the source of truth), TensorBoard events, checkpoints, the model.

    checkpoint/STEP is the SHA-256 of the rest, a line of JSON (counters, random generators, the games' past) and the
    tensors in safetensors' format. The last two are kept.
    """

    def __init__(self, args: Args, title: str, device: torch.device, disk_needed: float) -> None:
        self.args, self.path = args, Path(args.resume or args.run_dir)
        while not (args.resume or args.run_dir):
            self.path = Path("runs", f"{title}__{Path(__file__).stem}__{args.seed}__{int(time.time())}")
            with suppress(FileExistsError):  # of a run that began in the same second
                self.path.mkdir(parents=True)
                break
            time.sleep(0.1)
        self.folder = self.path / "checkpoint"
        if not args.resume:
            free = shutil.disk_usage(next(p for p in self.path.absolute().parents if p.exists())).free
            fresh = not self.path.exists() or (self.path.is_dir() and not any(self.path.glob("[!.]*")))
            require(fresh, f"--run-dir {self.path} exists: give a new folder, or go on with --resume {self.path}")
            print(f"{self.path}: checkpoints take up to {disk_needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free")
            require(free > disk_needed, f"--run-dir {self.path}: too little disk is free for checkpoints")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.begin()
                flags = {"script": Path(__file__).name} | asdict(args)
                write_file(self.path / "args.json", json.dumps(flags, indent=1).encode())
            except OSError as error:
                raise Exit(2, f"--run-dir {self.path} cannot be made ({error})") from None
        else:
            self.begin()
        self.folder.mkdir(exist_ok=True)
        if not (self.path / "versions.json").exists():
            head = [shutil.which("git") or "true", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
            commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform()
            names = ("torch", "numpy", "gymnasium", "ale-py", "mujoco", "minari", "h5py", "tyro")
            packages = {name: found.version for name in names for found in [*distributions(name=name)][:1]}
            versions = {"script": Path(__file__).name, "commit": commit or None, "python": sys.version, "device": where,
                        "threads": torch.get_num_threads(), "packages": packages}
            write_file(self.path / "versions.json", json.dumps(versions, indent=1).encode())

    def begin(self) -> None:
        """Take the folder for this process alone, and begin at W&B; Exit, leaving nothing new, if one refuses."""
        lock = self.path / ".lock"
        self.lock = open(lock, "a")  # a process that is killed leaves it free
        ours = os.environ.get("RUN_LOCK") != str(self.path)  # else benchmark/launch.py has locked it for us
        try:
            if ours:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Exit(2, f"{self.path}: another process is at work on this run") from None
        if not self.args.track:
            return
        import wandb

        name, flags = self.path.resolve().name, asdict(self.args)
        own: dict[str, Any] = {"id": re.sub(r"[^\w.-]", "-", name), "name": name, "dir": self.path, "resume": "allow"}
        try:
            self.wandb = wandb.init(project=self.args.wandb_project, config=flags, **own)
        except wandb.Error as error:
            if not self.args.resume:  # so that the corrected command is accepted
                shutil.rmtree(self.path / "wandb", ignore_errors=True)
                if ours:
                    lock.unlink()
                with suppress(OSError):  # what was there before stays
                    self.path.rmdir()
            hint = f"WANDB_MODE=offline needs no account; --wandb-project is {self.args.wandb_project}"
            raise Exit(2, f"--track: {error} ({hint})") from None

    def load(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Return state and tensors of the newest whole checkpoint, None before the first; cut the records back to it.

        A damaged checkpoint is named, and the one before it is used.
        """
        facts: dict[str, Any] = {"step": 0, "seconds": 0.0, "metrics": 0, "state": None}
        found, damaged, tensors = sorted(self.folder.glob("[0-9]*"), reverse=True), list[Path](), dict[str, Tensor]()
        for path in found:
            digest, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() == digest:
                line, _, data = body.partition(b"\n")
                facts, tensors = json.loads(line), load(data)
                break
            print(f"{path} is damaged; looking for the checkpoint before it", file=sys.stderr)
            damaged.append(path)
        if found and damaged == found:
            raise Exit(1, f"{self.folder}: no checkpoint is whole; nothing was changed")
        self.metrics = open(self.path / "metrics.jsonl", "ab")
        if self.metrics.tell() < facts["metrics"]:
            raise Exit(1, f"{self.metrics.name} is shorter than when the checkpoint was written")
        for path in damaged:
            path.unlink()
        self.metrics.truncate(facts["metrics"])
        self.metrics.seek(0, os.SEEK_END)
        self.board = SummaryWriter(str(self.path), purge_step=facts["step"] + 1)
        self.start, self.saved_at, self.saved = time.time() - facts["seconds"], time.monotonic(), facts["step"]
        return facts["state"], tensors

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one record to metrics.jsonl and give it to TensorBoard and W&B."""
        record = {"step": step, "seconds": round(time.time() - self.start, 3), **values}
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        if self.args.track:
            self.wandb.log(values, step=step)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint and delete all but the last two; Exit if it cannot be written."""
        self.board.flush()
        os.fsync(self.metrics.fileno())
        facts = {"step": step, "seconds": time.time() - self.start, "state": state, "metrics": self.metrics.tell()}
        masks = {name: t.bool() for name, t in tensors.items() if name.startswith("mask")}
        copies = {name: t.detach().cpu().contiguous() for name, t in (tensors | masks).items()}
        body = json.dumps(facts).encode() + b"\n" + save(copies)
        try:
            write_file(self.folder / f"{step:012d}", hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except OSError as error:
            raise Exit(1, f"{self.folder}: no checkpoint could be written ({error}); the last one is kept") from None
        for path in sorted(self.folder.iterdir())[:-2]:  # .names, which interrupted writes leave, come first
            path.unlink()
        self.saved, self.saved_at = step, time.monotonic()

    def finish(self, step: int, network: nn.Module, judge: Callable[[Path | None], dict[str, float]],
               epoch_return: Callable[[], float | None]) -> None:
        """Save the network, evaluate it by judge(file for the video), write final.json, tell the user what came out."""
        weights = {name: p.detach().contiguous() + 0.0 for name, p in network.named_parameters()}  # no -0.0
        write_file(self.path / "model.safetensors", save(weights))
        video = self.path / "evaluation.mp4" if self.args.capture_video else None
        result = dict[str, float]()
        if self.args.eval_episodes:
            print(f"evaluating over {self.args.eval_episodes} episodes")
            try:
                result = judge(video)
            except OSError as error:
                if not video:
                    raise
                print(f"{video}: no film could be made ({error}); evaluating without", file=sys.stderr)
                result = judge(None)
            self.log(step, result)
        self.board.close()
        report = {f"sparsity/{key}": value for key, value in sparsity_report(network).items()} | result
        seconds = time.time() - self.start
        final = {"status": "finished", "step": step, "seconds": seconds, "epoch_return": epoch_return()}
        write_file(self.path / "final.json", json.dumps(final | report, indent=1).encode())
        for key, value in report.items():
            print(f"{key:36} " + (f"{value:12,.0f}" if float(value).is_integer() else f"{value:12,.6g}"))
        print(f"finished {step} steps in {seconds / 60:.1f} minutes; everything is in {self.path}")
# <<< shared: run-directory


# >>> shared: command-line
def parse(argv: list[str]) -> Args:
    """Return the flags of the command line; with --resume those of the run."""
    args = tyro.cli(Args, args=argv, description=(__doc__ or "").partition("\n")[0])
    if not any(flag.startswith("--resume") for flag in argv):
        return args
    others = [flag for flag in argv if flag.startswith("--") and not flag.startswith("--resume")]
    require(not others, f"--resume takes every flag from the run; leave out {' '.join(others)}")
    try:
        flags = json.loads(Path(args.resume, "args.json").read_text())
        require(flags.pop("script") == Path(__file__).name, f"--resume {args.resume}: the run of another script")
        return Args(**flags | {"resume": args.resume or "."})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Exit(2, f"--resume {args.resume}: no run of this script is there ({error})") from None


def find_device(args: Args) -> torch.device:
    """Return the device of --device; Exit if this machine has none such or it cannot do what the flags ask."""
    count = torch.cuda.device_count()
    known = ["auto", "cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))]
    require(args.device in known, f"--device {args.device}: this machine has {', '.join(known)}")
    first = "cuda:0" if count else "cpu"
    device = torch.device({"auto": first, "cuda": first}.get(args.device, args.device))
    require(device.type == "cuda" or not args.compile, "--compile: only with --device cuda; it gains nothing on CPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
# <<< shared: command-line


# >>> shared: entry
def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks; else every update faults its gradients' pages in anew, a fifth of its time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


class Output(io.FileIO):
    """Standard output or error, whose reader may go away (| head, a closed terminal): then it is silent."""

    def write(self, data: Any) -> int:
        """Write what somebody can read."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def outlive_readers() -> None:
    """Let no output end a run: not a broken pipe, not a terminal that is gone, not a stream that was closed."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        stream = io.BufferedWriter(Output(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, errors="replace", line_buffering=True))


def command_line(main: Callable[[Args], None]) -> None:
    """Run main; a fault ends it with one line and an exit status."""
    keep_freed_memory()
    try:
        main(parse(sys.argv[1:]))
    except (Exit, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a fault of ours, which deserves its traceback
        hint = "" if isinstance(error, OSError) else "these flags need more memory than there is: "
        status, line = error.args if isinstance(error, Exit) else (1, f"{hint}{str(error).splitlines()[0]}")
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        sys.exit(status)
# <<< shared: entry


def main(args: Args) -> None:
    """Train, evaluate the network, and leave the run folder."""
    # >>> shared: start
    if args.resume and Path(args.resume, "final.json").exists():
        print(f"{args.resume} is finished; nothing is left to do")
        return
    device, total = find_device(args), args.total_timesteps
    step, epoch_return = 0, None
    run, stops, training = None, list[int](), False

    def stop(signum: int, _: Any) -> None:
        """Stop with a checkpoint where the loop next looks; at once before its first and after its last step."""
        stops.append(signum)
        if training:
            line = "\nstopping with a checkpoint\n"
        else:
            hint = f"go on with --resume {run.path}" if run else "no run was begun"
            line = f"{Path(__file__).name}: stopped at step {step}; {hint}\n"
        with suppress(OSError):  # whether anybody reads it decides nothing
            os.write(2, line.encode())
        if not training:
            os._exit(75)  # an exception could come up in the middle of anything

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    # <<< shared: start
    # >>> shared: atari-start
    returns, recent = list[float](), list[float]()  # of the episodes of this epoch, of the latest
    if total <= args.learning_starts:
        print(f"nothing will be learned: --total-timesteps {total} is within --learning-starts {args.learning_starts}")
    rom, title = find_rom(args.env_id)
    envs = AtariEnvs(rom, args.num_envs, args.seed)
    fits = device.type == "cpu" or 7130 * args.buffer_size < 0.8 * torch.cuda.mem_get_info(device)[0]
    require(fits or not args.compile, f"--buffer-size {args.buffer_size}: too large for the GPU, which --compile needs")
    # <<< shared: atari-start
    agent, home = Rainbow(args, envs.num_actions, device), device if fits else torch.device("cpu")
    replay = PrioritisedReplay(args.buffer_size, args.num_envs, home, args.seed, args.gamma, args.n_step)
    tensors = agent.tensors() | replay.tensors()
    # >>> shared: atari-go-on
    run = Run(args, title, device, 6 * total + 3 * sum(t.nbytes for t in tensors.values()))
    replay.see(envs.obs[:, -1])
    state, saved = run.load()
    if state:
        step, epoch_return, returns = state["counters"]
        print(f"{run.path}: going on from step {step}; the games are played again, as far as the replay reaches back")
        agent.restore(state["agent"])
        sampling = torch.tensor(state["sampling"], dtype=torch.uint8)
        same = len(sampling) == len(replay.generator.get_state())
        require(same, f"--resume {run.path}: its replay was on another kind of device, which it needs again")
        replay.generator.set_state(sampling)
        for row, actions, steps in envs.restore(state["games"], step // args.num_envs - replay.rows):
            replay.step = row
            FrameReplay.add(replay, actions, steps, envs.obs[:, -1])  # priorities, if any, are in the checkpoint
        for name, tensor in tensors.items():
            tensor.detach().copy_(saved[name])
    # <<< shared: atari-go-on
    # >>> shared: bar
    tty, shown = sys.stderr.isatty(), (step, time.monotonic())
    shape = "{percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} {remaining} left {desc}"
    bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, dynamic_ncols=True,
               mininterval=0.5 if tty else 30, bar_format="{bar:10}" + shape if tty else shape + "\n")
    # <<< shared: bar

    training = True
    while step < total:
        now, trained = step + args.num_envs, agent.gradient_step > 0
        # Act and step.
        epsilon = 1 + (args.epsilon_end - 1) * min(1.0, max(0.0, (step - args.learning_starts) / args.epsilon_steps))
        actions = agent.act(envs.obs, epsilon)
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
        # Learn and prune.
        if args.num_envs == 1:
            agent.learn(replay, updates)
        if not all(map(math.isfinite, agent.losses)):
            bar.close()
            last = f"step {run.saved} in {run.folder}" if run.saved else "none yet"
            raise Exit(1, f"the losses became {agent.losses} at step {now}; last checkpoint: {last}")
        # Target.
        if trained and now < total and now // args.target_every > step // args.target_every:
            agent.update_target()
        # Log.
        bar.set_description_str(f"return {np.mean(recent or 0):.1f} sparsity {agent.sparsity[0]:.3f}", False)
        bar.update(min(now, total) - step)
        epoch_ends, log_every = now // args.epoch_steps > step // args.epoch_steps, max(args.target_every, 1000)
        if epoch_ends or now >= total or now // log_every > step // log_every:
            speed, shown = (now - shown[0]) / (time.monotonic() - shown[1]), (now, time.monotonic())
            record = {"charts/SPS": speed, "charts/epsilon": epsilon, "charts/learning_rate": args.learning_rate,
                      "charts/buffer_size": len(replay), "memory/replay_bytes": replay.nbytes,
                      "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
            if epoch_ends:
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
            run.log(now, record | agent.report())
        if trained and args.analysis_every and now // args.analysis_every > step // args.analysis_every:
            path = run.path / f"gradient_covariance-{now:09d}.npy"
            run.log(now, analyse(agent, replay, args.seed + now, path))
        step = now
        # Save.
        if stops or step >= total or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"counters": (step, epoch_return, returns), "agent": agent.state(), "games": envs.past(),
                     "sampling": replay.generator.get_state().tolist()}
            run.save(step, tensors, state)
            if stops:
                bar.close()
                raise Exit(75, f"stopped at step {step}; go on with --resume {run.path}")

    training = False
    bar.close()
    run.finish(step, agent.online, lambda video: judge(agent.online, rom, title, args, video), lambda: epoch_return)


if __name__ == "__main__":
    outlive_readers()
    command_line(main)
