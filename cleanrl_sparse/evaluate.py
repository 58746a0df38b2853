# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12.1", "mujoco>=3.3", "tyro>=0.9",
#                 "safetensors>=0.5", "tqdm>=4.66", "imageio>=2.14", "imageio-ffmpeg>=0.5"]
# ///
"""Evaluate the network of a finished run: play, print the scores, record a video.

    python evaluate.py runs/Breakout__eaudeqn_atari__1__1790000000
    python evaluate.py RUN_DIR --episodes 100 --epsilon 0.05 --video breakout.mp4
    python evaluate.py runs/Hopper-v5__sac_mujoco_eaudeqn__1__1790000000 --video hopper.mp4

The protocol is that of training. Atari: sticky actions 0.25, 27,000 steps at most, losing a life does not end an
episode, scores undiscounted and unclipped. MuJoCo: the policy's mean action. It needs RUN_DIR/args.json and
RUN_DIR/model.safetensors only.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
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
    """Flags."""

    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of a finished run
    episodes: int = 10  # episodes to play (>= 1)
    epsilon: float = 0.001  # Atari: probability of a random action, in [0, 1]
    seed: int = 0  # seed of the episodes, which are none of training's (>= 0)
    device: str = "cpu"  # cpu, cuda or cuda:INDEX
    video: Path | None = None  # write the first episode to this file (mp4)

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        require(self.episodes >= 1, f"--episodes {self.episodes}: must be at least 1")
        require(0 <= self.epsilon <= 1, f"--epsilon {self.epsilon}: must be in [0, 1]")
        require(self.seed >= 0, f"--seed {self.seed}: must be at least 0")
        cuda = self.device.partition(":")[0] == "cuda" and torch.cuda.is_available()
        require(self.device == "cpu" or cuda, f"--device {self.device}: must be cpu or, if this machine has it, cuda")
        writable = self.video is None or (self.video.suffix == ".mp4" and os.access(self.video.parent, os.W_OK))
        require(writable, f"--video {self.video}: must be an .mp4 file in a folder that can be written")


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


# >>> shared: mujoco-env
def make_env(env_id: str, **options: Any) -> gym.Env:
    """Return Gymnasium's environment (Hopper is Hopper-v5); Exit if there is none such or its spaces do not fit."""
    try:
        import mujoco  # not before require_pictures()
    except Exception as error:  # of many kinds, as the drawing libraries see fit
        text = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: mujoco cannot be imported with it"
        raise Exit(2, f"{text} ({' '.join(str(error).split())})") from None

    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))
    name = next((n for n in (env_id, f"{env_id}-v5") if n in gym.registry), "")
    known = [n for n in gym.registry if not n.startswith("ALE/") and "NoFrameskip" not in n]
    near = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)) or "none"
    require(bool(name), f"--env-id {env_id}: no such environment; the nearest names are {near}")
    try:
        env = gym.make(name, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError) as error:
        raise Exit(2, f"--env-id {env_id} cannot be made: {' '.join(str(error).split())}") from None
    obs: Any = env.observation_space
    actions: Any = env.action_space
    fits = all(isinstance(s, gym.spaces.Box) and len(s.shape) == 1 and s.shape[0] > 0 for s in (obs, actions))
    bounded = fits and actions.dtype.kind == "f" and bool(np.isfinite([actions.low, actions.high]).all())
    require(bounded, f"--env-id {env_id}: needs a vector of observations and one of bounded continuous actions")
    return env


class MujocoSteps(NamedTuple):
    """One step of N environments."""

    last_obs: np.ndarray  # [N, O] float32, the observation before any reset
    rewards: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool
    ended: np.ndarray  # [N] bool, terminated or truncated
    episodes: list[tuple[float, int]]  # (undiscounted return, steps) of each episode that ended


class MujocoEnvs:
    """N copies of an environment with actions in [-1, 1], rescaled to its bounds; restorable at any step.

    `obs` [N, O] float32 is what the agent sees now: after an ending, the next episode's first observation. Every
    episode has a seed of its own, from (seed, environment, step). What an environment did follows from these seeds and
    its actions: a checkpoint keeps them, restore() plays them again.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, **options: Any) -> None:
        self.envs: list[Any] = [make_env(env_id, **options) for _ in range(num_envs)]
        space = self.envs[0].action_space
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2  # [A] float32
        self.title, self.num_actions = self.envs[0].spec.id, len(space.low)
        self.seed, self.actions = seed, bytearray()  # every action so far, float32
        self.began = [list[int]() for _ in range(num_envs)]  # the steps at which each environment's episodes began
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.obs = np.zeros((num_envs, *self.envs[0].observation_space.shape), np.float32)
        for i in range(num_envs):
            self.reset(i)

    def __len__(self) -> int:
        """Return the number of steps so far."""
        return len(self.actions) // (4 * len(self.envs) * self.num_actions)

    def reset(self, i: int) -> None:
        """Start an episode of environment i."""
        self.began[i].append(len(self))
        seed = np.random.SeedSequence((self.seed, i, len(self))).generate_state(1)[0]
        self.obs[i] = self.envs[i].reset(seed=int(seed))[0]
        self.returns[i] = self.lengths[i] = 0

    def step(self, actions: np.ndarray) -> MujocoSteps:
        """Take a step with actions [N, A] in [-1, 1]; what ended is reset at once."""
        n = len(self.envs)
        self.actions += actions.astype(np.float32).tobytes()
        last_obs, rewards, (terminated, ended) = np.zeros_like(self.obs), np.zeros(n), np.zeros((2, n), bool)
        episodes = list[tuple[float, int]]()
        for i in range(n):
            last_obs[i], rewards[i], terminated[i], truncated, _ = self.envs[i].step(
                self.middle + self.half * actions[i]
            )
            self.obs[i], ended[i] = last_obs[i], terminated[i] or truncated
            self.returns[i] += rewards[i]
            self.lengths[i] += 1
            if ended[i]:
                episodes.append((float(self.returns[i]), int(self.lengths[i])))
                self.reset(i)
        return MujocoSteps(last_obs, rewards, terminated, ended, episodes)

    def picture(self) -> np.ndarray:
        """Return an RGB picture [H, W, 3] uint8 of the first environment, made with render_mode="rgb_array"."""
        return np.ascontiguousarray(self.envs[0].render())

    def played(self) -> Tensor:
        """Return all actions so far [steps, N, A]."""
        flat = torch.frombuffer(self.actions, dtype=torch.float32) if self.actions else torch.empty(0)
        return flat.view(len(self), len(self.envs), self.num_actions)

    def past(self) -> dict[str, Any]:
        """Return what restore() needs beside the actions, as JSON."""
        return {"began": self.began, "digest": hashlib.sha256(self.obs.tobytes()).hexdigest()}

    def restore(self, past: dict[str, Any], played: Tensor,
                first: int) -> Iterator[tuple[int, np.ndarray, MujocoSteps]]:
        """Play a past() again with the actions played [steps, N, A], from episodes that began before step `first`.

        Yields (step, actions [N, A], MujocoSteps). Raises Exit if the episodes went otherwise than recorded.
        """
        actions = played.numpy()
        begins = np.array([max(step for step in began if step < max(1, first)) for began in past["began"]])
        self.actions = bytearray(actions[: begins.min()].tobytes())
        for step in tqdm(range(begins.min(), len(actions)), "playing again", leave=False, disable=None):
            for i in np.flatnonzero(begins == step):  # what it did until now is not in the record
                self.reset(int(i))
            yield step, actions[step], self.step(actions[step])
        self.began = past["began"]
        if hashlib.sha256(self.obs.tobytes()).hexdigest() != past["digest"]:
            raise Exit(1, "the episodes went otherwise when played again; resume with the packages of versions.json")
# <<< shared: mujoco-env


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


# >>> shared: l2-features
class NormalisedQNetwork(QNetwork):
    """A QNetwork whose features have length 1."""

    def features(self, obs: Tensor) -> Tensor:
        """Map obs [B, 4, 84, 84], floats in [0, 1], to features [B, feature_size]."""
        return nn.functional.normalize(super().features(obs), dim=1)
# <<< shared: l2-features


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


# >>> shared: actor
class Actor(nn.Sequential):
    """A Gaussian of actions, squashed to [-1, 1] by tanh; hidden layers of `units`."""

    output: nn.Linear

    def __init__(self, obs_size: int, num_actions: int, units: int, layers: int = 2) -> None:
        parts = OrderedDict[str, nn.Module]()
        for i in range(1, layers + 1):
            parts |= {f"dense{i}": nn.Linear(units if i > 1 else obs_size, units), f"relu{i}": nn.ReLU(inplace=True)}
        super().__init__(parts | {"output": nn.Linear(units, 2 * num_actions)})
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Map obs [B, O] to mean and log standard deviation [B, A] each, the latter in [-20, 2]."""
        x, output = obs, self.output
        for layer in list(self)[:-1]:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for actions
            mean, log_std = output(x.to(output.weight.dtype)).chunk(2, 1)
            return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions [..., B, A] in [-1, 1] and their log-probabilities [..., B] from standard normal noise.

        Noise is [..., B, A], obs [B, O].

        With u = mean + std * noise, log p(tanh u) = log N(u) - log(1 - tanh(u) ** 2), and the latter is
        2 * (log 2 - u - softplus(-2 * u)), which neither overflows nor loses digits at large |u|.
        """
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return u.tanh(), (log_prob - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)
# <<< shared: actor


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


# >>> shared: mujoco-evaluation
def require_pictures(flag: str, env_id: str) -> None:
    """Exit unless episodes can be filmed here. To be called first of all: MuJoCo's import settles how it draws."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen
    try:
        MujocoEnvs(env_id, 1, 0, render_mode="rgb_array").picture()
    except Exit:
        raise
    except Exception as error:  # of many kinds, as the drawing libraries see fit
        hint = " (without a screen MuJoCo draws with EGL, or with OSMesa if MUJOCO_GL=osmesa)"
        hint = "" if isinstance(error, gym.error.DependencyNotInstalled) else hint  # which says what to install
        raise Exit(2, f"{flag}: {env_id} cannot be filmed here: {' '.join(str(error).split())}{hint}") from None


@torch.no_grad()
def evaluate_actor(actor: Actor, env_id: str, episodes: int, seed: int, video: Path | None = None) -> list[float]:
    """Play episodes together by the mean action; return their returns. `video`: film the first there (mp4)."""
    envs, scores, weight = MujocoEnvs(env_id, episodes, seed), dict[int, float](), actor.output.weight
    if video:  # the same episode once more: its seed and actions are the first environment's
        film = MujocoEnvs(env_id, 1, seed, render_mode="rgb_array")
        (height, width), fps = film.picture().shape[:2], film.envs[0].metadata["render_fps"]
        writer = imageio_ffmpeg.write_frames(str(video.absolute()), (width, height), fps=fps, macro_block_size=2)
        writer.send(None)
    while len(scores) < episodes:
        actions = actor(torch.from_numpy(envs.obs).to(weight.device, weight.dtype))[0].tanh().cpu().numpy()
        if video and 0 not in scores:
            writer.send(film.picture())
            film.step(actions[:1])
        steps = envs.step(actions)
        for i, (score, _) in zip(np.flatnonzero(steps.ended), steps.episodes):
            scores.setdefault(int(i), score)
    if video:
        writer.close()
    return [scores[i] for i in range(episodes)]
# <<< shared: mujoco-evaluation


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


def load_network(run_dir: Path, device: str) -> tuple[QNetwork | Actor, str]:
    """Return a run's saved network and the environment's name; Exit if the folder holds no finished run."""
    try:
        flags = json.loads((run_dir / "args.json").read_text())
        weights = load_file(run_dir / "model.safetensors")
        network: QNetwork | Actor
        if "actor.output.bias" in weights:
            weights = {name.removeprefix("actor."): p for name, p in weights.items() if name.startswith("actor.")}
            units, obs_size = weights["dense1.weight"].shape
            layers = sum(name.startswith("dense") and name.endswith("weight") for name in weights)
            network = Actor(obs_size, len(weights["output.bias"]) // 2, units, layers)
        else:
            num_actions = AtariEnvs(find_rom(flags["env_id"])[0], 1, 0).num_actions
            kind = NormalisedQNetwork if flags.get("regulariser") == "l2-features" else QNetwork
            kind = kind if len(weights["output.bias"]) == num_actions else C51Network
            network = kind(num_actions, flags["network"], flags["feature_size"], flags["width"])
        network.load_state_dict(weights)
        return network.to(device), flags["env_id"]
    except FileNotFoundError as error:
        raise Exit(2, f"{run_dir} holds no finished run: {error.filename or error} is missing") from None
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError, AssertionError) as error:
        raise Exit(2, f"{run_dir}: cannot load its network ({str(error).splitlines()[0]})") from None


def mean_interval(scores: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of scores, from 10,000 resamples."""
    draws = np.random.default_rng(seed).choice(scores, size=(10_000, len(scores))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def parse(argv: list[str]) -> Args:
    """Return the flags of the command line."""
    return tyro.cli(Args, args=argv, description=(__doc__ or "").partition("\n")[0])


def main(args: Args) -> None:
    """Evaluate and print."""
    network, env_id = load_network(args.run_dir, args.device)
    seed, normalised = args.seed + 2_000_000, ""
    if isinstance(network, Actor):
        require(args.epsilon == 0.001, f"--epsilon {args.epsilon}: only for runs on Atari; this one is on {env_id}")
        if args.video:
            require_pictures("--video", env_id)
        title, how = env_id, "by the mean action"
        scores = evaluate_actor(network, env_id, args.episodes, seed, args.video)
    else:
        (rom, title), how = find_rom(env_id), f"at epsilon {args.epsilon:g}"
        scores = evaluate(network, rom, args.episodes, args.epsilon, seed, args.video)
        human = human_normalized(title, float(np.mean(scores)))
        score = "this game has no human score" if human is None else f"{human:.3f}"
        normalised = f"human-normalised score: {score}"
    low, high = mean_interval(scores)
    weights = [p for p in network.parameters() if p.ndim >= 2]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    what = "an actor" if isinstance(network, Actor) else "a network"
    print(f"{title}: {args.episodes} episodes {how}, {what} of {zeros:.1%} sparsity")
    interval = f"95 % interval [{low:.2f}, {high:.2f}], from {min(scores):g} to {max(scores):g}"
    print(f"return {np.mean(scores):.2f}, {interval}")
    if normalised:
        print(normalised)
    if args.video:
        print(f"video of the first episode: {args.video}")


if __name__ == "__main__":
    outlive_readers()
    command_line(main)
