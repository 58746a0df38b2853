# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=2", "gymnasium>=1.2", "mujoco>=3.3", "imageio>=2.14", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "imageio-ffmpeg>=0.5", "wandb>=0.18",
#                 "minari[hf]>=0.5", "h5py>=3.11", "pillow>=10"]
# ///
"""Conservative Q-learning on a fixed dataset, pruned once, before training starts.

Paper: Arnob, Ohib, Plis, Precup, "Single-Shot Pruning for Offline Reinforcement Learning", 2021, arXiv 2112.15579.
Its body and code could not be found: this is SNIP at initialisation (Lee et al. 2019) applied to CQL (Kumar et al.
2020) with CORL's settings, not a reproduction of the paper's table.

Every weight is scored on one batch of the dataset by how much its removal would change the loss (SNIP) or the length of
its gradient (GraSP); 95 % go, for good. Then CQL trains what is left.

    python cql_offline_snip.py --dataset mujoco/hopper/medium-v0                      # a Minari dataset by id
    python cql_offline_snip.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v4     # a file of D4RL's
    python cql_offline_snip.py --dataset local/hopper/medium-v0 --pruner grasp --sparsity 0.5
    python cql_offline_snip.py --dataset DATASET --pruner none                        # dense CQL
    python cql_offline_snip.py --resume runs/Hopper-v5__cql_offline_snip__1__1790000000

Differences from the paper, and guesses ([C] read in the paper or another's code, [I] inferred, [D] our decision):
 1. [I] SNIP: |w * dL/dw|, no new initialisation. GraSP: the largest w * (H g). Random and magnitude are controls.
 2. [I] L is each network's own loss: TD and CQL term for the critics, the policy loss for the actor. One threshold for
    the actor, one for both critics together; all weight matrices, no biases; exact counts, ties by lower index.
    [D] Magnitudes are compared within each layer only: the last layers begin so small that all of them would go.
 3. [D] A layer of which nothing is left ends the run before it starts.
 4. [C] CQL as in CORL: alpha 10, 10 actions each from uniform, pi(s) and pi(s'), importance weights, no entropy backup.
    [D] Rewards are the data's; CORL's configuration for hopper-medium normalises them (--normalize-rewards).
 5. [D] Actor: CORL's offset of -1 of the log standard deviation is its initial bias; the factor beside it is left out.
 6. [D] The saved networks take raw observations: the standardisation is folded into their first layers.
 7. [D] Temperature of GraSP: 1, and no flag; it divides a classifier's logits, and these losses are regressions.

Figures: benchmark/cql_pruners.sh: return against sparsity. More: docs/cql_offline_snip.md.
"""

from __future__ import annotations

import copy
import ctypes
import difflib
import fcntl
import hashlib
import io
import itertools
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import h5py
import imageio_ffmpeg
import minari
import numpy as np
import torch
import tyro
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
    """Flags; the defaults are CORL's settings, pruned to 95 %. A "step" is a gradient step."""

    dataset: str = ""  # Minari id, folder of a local Minari dataset, or .hdf5 file of D4RL's format
    env_id: str = ""  # environment to evaluate in, such as Hopper-v5; needed where the dataset names none
    seed: int = 1  # seed of everything random, in [0, 2^32)
    total_timesteps: int = 1_000_000  # length of the run in gradient steps (>= 1)
    batch_size: int = 256  # transitions per gradient step (>= 1)
    learning_rate: float = 3e-4  # Adam's step size for the critics (> 0)
    actor_learning_rate: float = 3e-5  # Adam's step size for actor and temperature (> 0)
    gamma: float = 0.99  # discount, in [0, 1]
    tau: float = 0.005  # share of the critics that goes into the targets at each gradient step, in (0, 1]
    target_entropy: float = -1.0  # entropy that the temperature aims at, per action dimension, in (-inf, inf)
    entropy_backup: bool = False  # bootstrap from the soft value, with the entropy, as SAC does
    cql_alpha: float = 10.0  # weight of the conservative term (>= 0)
    cql_actions: int = 10  # actions drawn for it of each kind: uniform, pi(s), pi(s') (>= 1)
    cql_gap: float = -1.0  # gap that a Lagrange multiplier of the term aims at, in (-inf, inf); below 0: no multiplier
    normalize_rewards: bool = False  # multiply by 1000 / (best - worst return of the dataset's episodes)
    width: int = 1  # 256 * width units in each hidden layer (>= 1)
    layers: int = 3  # hidden layers (>= 1)
    pruner: Literal["snip", "grasp", "random", "magnitude", "none"] = "snip"  # which weights go before training starts
    sparsity: float = 0.95  # share of the prunable weights that goes, in [0, 1); 0 prunes nothing
    prune_batches: int = 1  # batches that SNIP and GraSP score on (>= 1)
    epoch_steps: int = 5_000  # gradient steps per epoch (>= 1); each ends with an evaluation
    # >>> shared: mujoco-run-flags
    device: str = "auto"  # auto, cpu, cuda or cuda:INDEX
    compile: bool = False  # capture sampling and update in a CUDA graph (CUDA only; not yet tried on a GPU)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of hidden layers while learning; weights stay fp32
    run_dir: str = ""  # folder for the run, new or empty; default: runs/{environment}__{script}__{seed}__{time}
    resume: str = ""  # go on with the run in this folder; it has all flags, so give no other
    checkpoint_minutes: float = 10.0  # minutes between checkpoints (>= 0)
    eval_episodes: int = 10  # episodes of each evaluation, without noise, always the same seeds (>= 0; 0: none)
    capture_video: bool = False  # write the first episode of the final evaluation to RUN_DIR/evaluation.mp4
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "cleanrl-sparse"  # project there
    # <<< shared: mujoco-run-flags

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
        # >>> shared: check-mujoco-flags
        check("width", lambda x: x >= 1, "at least 1")
        check("tau", lambda x: 0 < x <= 1, "in (0, 1]")
        check("target_entropy", math.isfinite, "finite")
        # <<< shared: check-mujoco-flags
        check("layers cql_actions prune_batches", lambda x: x >= 1, "at least 1")
        check("actor_learning_rate", lambda x: 0 < x < math.inf, "above 0 and finite")
        check("cql_alpha", lambda x: 0 <= x < math.inf, "at least 0 and finite")
        check("cql_gap", math.isfinite, "finite")
        check("sparsity", lambda x: 0 <= x < 1, "in [0, 1)")


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


# >>> shared: critics
def make_critics(count: int, inputs: int, units: int, layers: int = 2) -> list[Tensor]:
    """Return Q-functions as stacked tensors, layer by layer: weights [count, in, out] and biases [count, 1, out]."""
    critics, sizes = list[Tensor](), [inputs, *[units] * layers, 1]
    for size_in, size_out in itertools.pairwise(sizes):
        weights = torch.empty(count, size_in, size_out)
        for weight in weights:
            nn.init.xavier_uniform_(weight)
        critics += [weights, torch.zeros(count, 1, size_out)]
    return critics


def critic_values(critics: list[Tensor], obs: Tensor, actions: Tensor) -> Tensor:
    """Return Q [count, B] of stacked critics for obs [B, O] and actions [B, A], by one batched product per layer."""
    *hidden, weight, bias = critics
    x = torch.cat([obs, actions], 1).expand(len(weight), -1, -1)
    for w, b in zip(hidden[::2], hidden[1::2]):
        x = torch.relu_(torch.baddbmm(b, x, w))
    with torch.autocast(x.device.type, enabled=False):  # bf16 would round away what actions differ in
        return torch.linalg.vecdot(x.to(weight.dtype), weight.mT) + bias[:, :, 0]  # a product is 3 to 7 times as slow


def one_critic(critics: list[Tensor], n: int) -> nn.Sequential:
    """Return a copy of the n-th of stacked critics as a module on [B, O + A]."""
    layers = OrderedDict[str, nn.Module]()
    for i, (weight, bias) in enumerate(zip(critics[::2], critics[1::2]), 1):
        name = f"dense{i}" if 2 * i < len(critics) else "output"
        layers[name] = nn.Linear(*weight.shape[1:])
        layers[name].load_state_dict({"weight": weight[n].T, "bias": bias[n, 0]})
        layers |= {f"relu{i}": nn.ReLU()} if name != "output" else {}
    return nn.Sequential(layers)
# <<< shared: critics


# >>> shared: offline-data
class Data(NamedTuple):
    """Transitions of a dataset, in its order."""

    obs: np.ndarray  # [n, O] float32
    actions: np.ndarray  # [n, A] float32
    rewards: np.ndarray  # [n] float32
    next_obs: np.ndarray  # [n, O] float32, of a truncated episode the true last observation
    terminated: np.ndarray  # [n] bool; a timeout is not
    ended: np.ndarray  # [n] bool, last of its episode; not where the recording breaks off


def checked(where: str, array: Any, n: int, dims: int, flags: bool = False) -> np.ndarray:
    """Return an array of n rows as float32, as bool if it holds flags; Exit, naming `where`, if it is no such array."""
    require(isinstance(array, np.ndarray) and array.dtype.kind in "biuf", f"{where} must be numbers")
    array = array[:, 0] if dims == 1 and array.shape == (n, 1) else array
    shape = f"[{n}]" if dims == 1 else f"[{n}, any]"
    require(array.ndim == dims and len(array) == n, f"{where} must have the shape {shape}, not {[*array.shape]}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    require(bool(np.isfinite(array).all()), f"{where} must be finite in float32")
    require(not flags or bool(np.isin(array, (0, 1)).all()), f"{where} must be 0 or 1")
    return array == 1 if flags else array


def read_d4rl(name: str) -> Data:
    """Read an HDF5 file of D4RL's format: observations, actions, rewards, terminals, timeouts, next_observations.

    One of the last two may be missing. Without timeouts an episode ends where the next observation is not the next
    row's. Without next_observations they are the next row's; the rows of which none follows in the episode (timeouts,
    the last row of the file) are left out, unless they are terminal. Those do not bootstrap, and for CQL's term the
    next episode's first observation is a state of the data like any other; CORL does the same.
    """
    with h5py.File(name) as file:
        found = {key: item[()] for key, item in file.items() if isinstance(item, h5py.Dataset)}
    for key in ("observations", "actions", "rewards", "terminals"):
        require(key in found, f"--dataset {name}: the key {key} is missing")
    text = "timeouts and next_observations are both missing, so that nothing says where episodes end"
    require("timeouts" in found or "next_observations" in found, f"--dataset {name}: {text}")
    n = len(np.atleast_1d(found["observations"]))

    def read(key: str, dims: int, flags: bool = False) -> np.ndarray:
        """Return what is under a key."""
        return checked(f"--dataset {name}: {key}", found[key], n, dims, flags)

    obs, actions, rewards = read("observations", 2), read("actions", 2), read("rewards", 1)
    terminated, kept = read("terminals", 1, flags=True), np.ones(n, bool)
    given = "next_observations" in found
    next_obs = read("next_observations", 2) if given else np.concatenate([obs[1:], obs[-1:]])
    require(next_obs.shape == obs.shape, f"--dataset {name}: next_observations must have observations' shape")
    if "timeouts" in found:
        timeouts = read("timeouts", 1, flags=True)
    else:
        timeouts = np.append((next_obs[:-1] != obs[1:]).any(1), False)
    ended = terminated | timeouts
    if not given:
        kept = ~timeouts | terminated
        kept[-1:] &= terminated[-1:]
        ended[:-1] |= (timeouts & ~terminated)[1:]  # what comes before a row that is left out is now the last
    return Data(*(x[kept] for x in (obs, actions, rewards, next_obs, terminated, ended)))


def read_minari(name: str) -> tuple[Data, str]:
    """Read a Minari dataset: a folder of one, or an id, which is fetched if it is not on this machine.

    Returns the transitions and the environment's name, which is empty if it has none.
    """
    folder = Path(name, "data") if Path(name, "data").is_dir() else Path(name)
    if not folder.is_dir():
        text = "no such folder, and a Minari id ends with its version, like mujoco/hopper/medium-v0"
        require(name.rpartition("-v")[2].isdigit(), f"--dataset {name}: {text}")
        folder = Path(minari.storage.get_dataset_path(name), "data")
        here = folder.is_dir()
        require(here or not name.startswith("local/"), f"--dataset {name}: not on this machine; looked for {folder}")
        if not here:
            print(f"--dataset {name}: fetching it to {folder}; if that is broken off, delete what is there")
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it reports each of its retries
            minari.download_dataset(name)
    dataset, parts = minari.MinariDataset(folder), list[tuple[np.ndarray, ...]]()
    spec = dataset.env_spec
    if spec and (known := gym.registry.get(spec.id)):
        usual, settings = ({**s.kwargs, "max_episode_steps": s.max_episode_steps} for s in (known, spec))
        special = {key: x for key, x in settings.items() if key != "render_mode" and x != usual.get(key)}
        if special:
            print(f"--dataset {name}: recorded with {special}; evaluations will be without", file=sys.stderr)
        wrappers = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
        require(not wrappers, f"--dataset {name}: recorded behind {wrappers}, which evaluations would not have")
        env, space = make_env(spec.id), dataset.action_space
        same = space is None or space == env.action_space
        require(same, f"--dataset {name}: its actions are of {space}, those of {spec.id} of {env.action_space}")
    for episode in dataset.iterate_episodes():
        where, n = f"--dataset {name}: episode {episode.id}:", len(np.atleast_1d(episode.rewards))
        obs, actions = (checked(f"{where} observations", episode.observations, n + 1, 2),
                        checked(f"{where} actions", episode.actions, n, 2))
        rewards = checked(f"{where} rewards", episode.rewards, n, 1)
        terminated, truncated = (checked(f"{where} {key}", getattr(episode, key), n, 1, flags=True)
                                 for key in ("terminations", "truncations"))
        ended = terminated | truncated | (np.arange(n) == n - 1)
        parts.append((obs[:-1], actions, rewards, obs[1:], terminated, ended))
    require(bool(parts), f"--dataset {name}: no episodes are in it")
    parts[-1][-1][-1] = terminated[-1] | truncated[-1]
    return Data(*map(np.concatenate, zip(*parts))), spec.id if spec else ""


def read_dataset(name: str) -> tuple[Data, str]:
    """Return the transitions of --dataset and its environment's name, if it has one.

    Exit, naming the key, if it cannot be read or is not what it should be.
    """
    require(bool(name), "--dataset is missing: a Minari id, a folder of a Minari dataset, or a .hdf5 file of D4RL's")
    require(Path(name).exists() or Path(name).suffix not in (".hdf5", ".h5"), f"--dataset {name}: no such file")
    try:
        data, env_id = (read_d4rl(name), "") if Path(name).is_file() else read_minari(name)
    except Exit:
        raise
    except Exception as error:  # of many kinds, as the libraries see fit
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        verb = "read" if Path(name).exists() else "read or fetched"
        raise Exit(2, f"--dataset {name}: cannot be {verb} ({text})") from None
    require(len(data.obs) > 0, f"--dataset {name}: no transitions are in it")
    return data, env_id


def normalized(data: Data) -> Data:
    """Return data whose rewards are multiplied by 1000 / (best - worst return of its whole episodes)."""
    episodes = np.cumsum(np.concatenate([[0], data.ended[:-1]])).astype(np.int64)
    returns = np.bincount(episodes, data.rewards)
    returns = returns if data.ended[-1] else returns[:-1]
    text = "--normalize-rewards: needs episodes of different returns in the dataset"
    require(len(returns) > 0 and bool(np.ptp(returns) > 0), text)
    return data._replace(rewards=(data.rewards * (1000 / np.ptp(returns))).astype(np.float32))


# Returns of a random and an expert policy, by which D4RL normalises scores (Fu et al. 2020).
D4RL_SCORES = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3), "Walker2d": (1.629008, 4592.3),
               "Ant": (-325.6, 3879.7)}  # fmt: skip
# <<< shared: offline-data


class Batch(NamedTuple):
    """Transitions, and the random numbers of one update."""

    obs: Tensor  # [B, O] float32, standardised
    actions: Tensor  # [B, A] float32, in [-1, 1]
    next_obs: Tensor  # [B, O] float32, standardised
    rewards: Tensor  # [B] float32
    discounts: Tensor  # [B] float32, of the value of next_obs: gamma, 0 where the episode terminated
    noise: Tensor  # [2, 1 + n, B, A] standard normal: actions at obs and at next_obs, each one and n for CQL's term
    uniform: Tensor  # [n, B, A] in [-1, 1]


class Dataset:
    """All transitions as one table on the device, observations standardised."""

    def __init__(self, data: Data, env: MujocoEnvs, args: Args, device: torch.device) -> None:
        sizes = (("observations", data.obs.shape[1], env.obs.shape[1]),
                 ("actions", data.actions.shape[1], env.num_actions))  # fmt: skip
        for key, ours, theirs in sizes:
            require(ours == theirs, f"--dataset {args.dataset}: {key} have {ours} numbers, {env.title}'s have {theirs}")
        actions = (data.actions - env.middle) / env.half
        bound = float(np.abs(actions).max())
        require(bound < 1 + 1e-4, f"--dataset {args.dataset}: actions reach {bound:g} times {env.title}'s bounds")
        self.mean, self.std = data.obs.mean(0, dtype=np.float64), data.obs.std(0, dtype=np.float64) + 1e-3
        obs, next_obs = ((x - self.mean) / self.std for x in (data.obs, data.next_obs))
        discounts = args.gamma * ~data.terminated
        rows = np.concatenate([obs, actions.clip(-1, 1), next_obs, data.rewards[:, None], discounts[:, None]], 1)
        self.table = torch.from_numpy(rows.astype(np.float32)).to(device)
        self.parts, self.n = [obs.shape[1], env.num_actions, obs.shape[1], 1, 1], args.cql_actions
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.digest = hashlib.sha256(self.table.cpu().numpy().tobytes()).hexdigest()

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, without waiting for the device."""
        device, rng, shape = self.table.device, self.generator, (batch_size, self.parts[1])
        rows = torch.randint(len(self.table), (batch_size,), device=device, generator=rng)
        noise = torch.randn(2, 1 + self.n, *shape, device=device, generator=rng)
        uniform = 2 * torch.rand(self.n, *shape, device=device, generator=rng) - 1
        obs, actions, next_obs, rewards, discounts = self.table[rows].split(self.parts, 1)
        return Batch(obs, actions, next_obs, rewards[:, 0], discounts[:, 0], noise, uniform)


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


# >>> shared: adam
def adam(groups: list[dict[str, Any]], args: Args) -> torch.optim.Adam:
    """Return Adam, its moments made now and not in the first step, since a checkpoint restores into them."""
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True, capturable=args.compile)
    for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer
# <<< shared: adam


class CQL:
    """The actor with its temperature, two critics, their masks, and the two target critics."""

    def __init__(self, args: Args, obs_size: int, num_actions: int, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> None:
        self.args, self.device, self.dtype = args, device, dtype
        self.target_entropy, self.obs_size = args.target_entropy * num_actions, obs_size
        torch.manual_seed(args.seed)
        self.actor = Actor(obs_size, num_actions, 256 * args.width, args.layers)
        for layer in self.actor:  # CORL's initialisation: torch's, and small last layers
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.xavier_uniform_(self.actor.output.weight, gain=1e-2)
        with torch.no_grad():
            self.actor.output.bias.copy_(torch.tensor([0.0, -1.0]).repeat_interleave(num_actions))
        self.actor.to(device, dtype)
        pair = make_critics(2, obs_size + num_actions, 256 * args.width, args.layers)
        for weight, critic in itertools.product(pair[::2], range(2)):
            nn.init.orthogonal_(weight[critic], gain=1e-2 if weight is pair[-2] else math.sqrt(2))
        self.critics = [p.to(device, dtype).requires_grad_() for p in pair]
        self.followed = [p.detach() for p in self.critics]  # by actor and targets
        self.targets = [p.clone() for p in self.followed]
        self.log_alpha, self.log_multiplier = (torch.full((), x, device=device, dtype=dtype) for x in (0.0, 1.0))
        self.groups = [self.critics[::2], list(prunable(self.actor).values())]  # one threshold each
        self.weights = [*self.groups[0], *self.groups[1]]
        self.masks = [torch.ones_like(w) for w in self.weights]
        self.critic_optimizer = adam([{"params": [*self.critics, self.log_multiplier.requires_grad_()]}], args)
        actor_parameters = [*self.actor.parameters(), self.log_alpha.requires_grad_()]
        self.actor_optimizer = adam([{"params": actor_parameters, "lr": args.actor_learning_rate}], args)
        self.gradient_step, self.losses = 0, [0.0] * 7
        self.latest = torch.full((7,), math.nan, device=device, dtype=dtype)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # kernels and libraries are loaded once update() has run

    def loss(self, batch: Batch, precision: str = "fp32") -> tuple[Tensor, Tensor, Tensor]:
        """Return two losses, of the critics and of actor and temperature, each for its own parameters; and logs [7].

        All actions whose values the conservative term needs go through the critics in one pass, with the dataset's.
        """
        obs, actions, next_obs, rewards, discounts, noise, uniform = (t.to(self.device, self.dtype) for t in batch)
        args, alpha = self.args, self.log_alpha.detach().exp()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            new, log_prob = self.actor.sample(obs, noise[0])  # [1 + n, B, A] and [1 + n, B]
            with torch.no_grad():
                later, later_log_prob = self.actor.sample(next_obs, noise[1])
                next_q = critic_values(self.targets, next_obs, later[0]).amin(0)  # [B]
                if args.entropy_backup:
                    next_q = next_q - alpha * later_log_prob[0]
                td_target = rewards + discounts * next_q
                asked = torch.cat([actions[None], uniform, later[1:], new[1:]])  # [1 + 3n, B, A]
                uniform_log_prob = torch.full_like(log_prob[1:], -math.log(2) * actions.shape[1])
                log_density = torch.cat([uniform_log_prob, later_log_prob[1:], log_prob[1:]])  # [3n, B]
            q = critic_values(self.critics, obs.repeat(len(asked), 1), asked.flatten(0, 1))
            new_q = critic_values(self.followed, obs, new[0]).amin(0)  # [B]; no gradient of the critics' weights
        q = q.unflatten(1, asked.shape[:2])  # [2, 1 + 3n, B]
        td_losses = (q[:, 0] - td_target).square().mean(1)  # [2]
        gaps = (torch.logsumexp(q[:, 1:] - log_density, 1) - q[:, 0]).mean(1)  # [2]
        if args.cql_gap < 0:
            penalties = args.cql_alpha * gaps
            critic_loss = (td_losses + penalties).sum()
        else:
            multiplier, penalties = self.log_multiplier.exp().clamp(max=1e6), args.cql_alpha * (gaps - args.cql_gap)
            critic_loss = (td_losses + multiplier.detach() * penalties).sum()
            critic_loss = critic_loss - 0.5 * multiplier * penalties.detach().sum()
        actor_loss = (alpha * log_prob[0] - new_q).mean()
        alpha_loss = -self.log_alpha * (log_prob[0].detach().mean() + self.target_entropy)
        logged = torch.stack([*td_losses, q[:, 0].mean(), penalties.mean(), actor_loss, alpha, alpha_loss]).detach()
        return critic_loss, actor_loss + alpha_loss, logged

    def update(self, batch: Batch) -> None:
        """Take one gradient step; gradients are dense, masked is what comes out. Nothing here waits for the device."""
        critic_loss, actor_loss, logged = self.loss(batch, self.args.precision)
        critic_loss.backward()
        actor_loss.backward()
        for optimizer in (self.critic_optimizer, self.actor_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
            torch._foreach_lerp_(self.targets, self.followed, self.args.tau)
            self.latest.copy_(logged)

    # >>> shared: captured-update
    def captured_update(self, replay: Any) -> None:
        """Sample and update once; with --compile by replaying a CUDA graph, which the second call captures."""
        if self.args.compile and self.warm and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(replay.generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.update(replay.sample(self.args.batch_size))
        if self.graph:
            self.graph.replay()
        else:
            self.update(replay.sample(self.args.batch_size))
        self.gradient_step, self.warm = self.gradient_step + 1, True
    # <<< shared: captured-update

    def learn(self, dataset: Dataset, updates: int) -> None:
        """Sample and update `updates` times."""
        for _ in range(updates):
            self.captured_update(dataset)
        self.losses = self.latest.tolist()

    def scores(self, batches: list[Batch]) -> list[list[Tensor]]:
        """Return the score of every weight, for the critics and for the actor; the largest stay."""
        if self.args.pruner == "random":  # from numbers that no weight was drawn from
            rng = np.random.default_rng((self.args.seed, 1))
            draws = [[rng.random(w.shape, np.float32) for w in group] for group in self.groups]
            return [[torch.from_numpy(draw).to(self.device) for draw in group] for group in draws]
        if self.args.pruner == "magnitude":  # ranks within a layer, as layers begin at scales of their own
            orders = [[(-w.detach().abs().flatten()).argsort(stable=True) for w in group] for group in self.groups]
            return [[(-order.argsort() / w.numel()).view(w.shape) for order, w in zip(*pair)]
                    for pair in zip(orders, self.groups)]
        found = list[list[Tensor]]()
        for which, group in enumerate(self.groups):
            gradient = [torch.zeros_like(w) for w in group]
            for batch in batches:  # of the mean loss over the batches
                parts = torch.autograd.grad(self.loss(batch)[which], group)
                gradient = [g + part / len(batches) for g, part in zip(gradient, parts)]
            if self.args.pruner == "grasp":  # H g, the gradient of g . gradient with the latter held
                curved = [torch.zeros_like(w) for w in group]
                for batch in batches:
                    parts = torch.autograd.grad(self.loss(batch)[which], group, create_graph=True)
                    product = torch.stack([(g * part).sum() for g, part in zip(gradient, parts)]).sum()
                    seconds = torch.autograd.grad(product, group)
                    curved = [h + part / len(batches) for h, part in zip(curved, seconds)]
                found.append([w.detach() * h for w, h in zip(group, curved)])
            else:
                found.append([(w.detach() * g).abs() for w, g in zip(group, gradient)])
        return found

    def prune(self, batches: list[Batch]) -> None:
        """Remove the weights with the smallest scores, once; Exit if that would leave a layer empty."""
        if self.args.pruner == "none" or self.args.sparsity == 0:
            return
        masks = list[Tensor]()
        for group, scores in zip(self.groups, self.scores(batches)):
            sizes = [w.numel() for w in group]
            kept = max(1, round(sum(sizes) * (1 - self.args.sparsity)))
            flat = torch.cat([score.flatten() for score in scores])
            text = f"--dataset {self.args.dataset}: the scores of --pruner {self.args.pruner} are not finite"
            require(bool(flat.isfinite().all()), text)
            flat = largest(flat, kept)
            masks += [mask.view(w.shape) for mask, w in zip(flat.split(sizes), group)]
        with torch.no_grad():
            for weight, mask, new in zip(self.weights, self.masks, masks):
                weight.mul_(mask.copy_(new))
            for target, p in zip(self.targets, self.followed):
                target.copy_(p)
        empty = [name for name, weight in prunable(self.networks()).items() if not weight.any()]
        text = f"--pruner {self.args.pruner} --sparsity {self.args.sparsity}: nothing would be left of"
        require(not empty, f"{text} {', '.join(empty)} (layer collapse); a lower sparsity keeps more")

    # >>> shared: sac-tensors
    def sac_tensors(self) -> dict[str, Tensor]:
        """Return by name every tensor that the next step depends on."""
        named = {"log_alpha": self.log_alpha, "latest": self.latest}
        named |= {f"critic.{i}": p for i, p in enumerate(self.critics)}
        named |= {f"target.{i}": p for i, p in enumerate(self.targets)}
        named |= {f"mask.{i}": mask for i, mask in enumerate(self.masks)}
        named |= {f"actor.{name}": p for name, p in self.actor.named_parameters()}
        for use, optimizer in (("critic", self.critic_optimizer), ("actor", self.actor_optimizer)):
            for i, moments in enumerate(optimizer.state.values()):
                named |= {f"{use}_adam.{i}.{name}": tensor for name, tensor in moments.items()}
        return named
    # <<< shared: sac-tensors

    def tensors(self) -> dict[str, Tensor]:
        """Return by name every tensor that the next step depends on."""
        return {"log_multiplier": self.log_multiplier} | self.sac_tensors()

    def networks(self, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 1.0) -> nn.ModuleDict:
        """Return copies of actor and critics for observations [O] that are not standardised by mean and std [O]."""
        actor, size = copy.deepcopy(self.actor), self.obs_size
        networks = {"actor": actor} | {f"qf{n + 1}": one_critic(self.critics, n) for n in range(2)}
        with torch.no_grad():
            for network in networks.values():  # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)
                first: Any = network[0]
                first.weight[:, :size] /= torch.as_tensor(std).to(first.weight)
                first.bias -= first.weight[:, :size] @ torch.as_tensor(mean).to(first.weight).expand(size)
        return nn.ModuleDict(networks)

    def report(self) -> dict[str, float]:
        """Return what is logged beside the evaluations."""
        names = ("qf1_loss", "qf2_loss", "q_values", "cql_loss", "actor_loss", "alpha", "alpha_loss")
        record = {f"losses/{name}": x for name, x in zip(names, self.latest.tolist()) if math.isfinite(x)}
        return record | {f"sparsity/{key}": value for key, value in sparsity_report(self.networks()).items()}


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


# >>> shared: mujoco-judge
def judge(actor: Actor, args: Args, video: Path | None = None) -> dict[str, float]:
    """Return what is logged of an evaluation, whose seeds are always the same and none of training's."""
    scores = evaluate_actor(actor, args.env_id, args.eval_episodes, args.seed + 1_000_000, video)
    return {"eval/episodic_return": float(np.mean(scores)), "eval/episodes": len(scores)}
# <<< shared: mujoco-judge


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
    """Prune, train, evaluate the policy, and leave the run folder."""
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
    data, env_id = read_dataset(args.dataset)
    args = replace(args, env_id=args.env_id or env_id)
    require(bool(args.env_id), f"--env-id is missing: {args.dataset} does not say what it was recorded in")
    if args.capture_video:
        require_pictures("--capture-video", args.env_id)
    env = MujocoEnvs(args.env_id, 1, args.seed)
    same = env_id.partition("-")[0] in ("", env.title.partition("-")[0])
    require(same, f"--env-id {args.env_id}: {args.dataset} was recorded in {env_id}")
    dataset = Dataset(normalized(data) if args.normalize_rewards else data, env, args, device)
    agent = CQL(args, env.obs.shape[1], env.num_actions, device)
    agent.prune([dataset.sample(args.batch_size) for _ in range(args.prune_batches)])
    mark = Path(args.resume, "dataset.sha256")
    same = not args.resume or not mark.exists() or mark.read_text() == dataset.digest
    require(same, f"--dataset {args.dataset} is not what it was when the run in {args.resume} began")
    if Path(args.dataset).exists():
        args = replace(args, dataset=str(Path(args.dataset).absolute()))  # --resume may come from another folder
    tensors, sparsity = agent.tensors(), agent.report()["sparsity/prunable"]
    scale = D4RL_SCORES.get(env.title.partition("-")[0])

    def score(video: Path | None = None) -> dict[str, float]:
        """Return what is logged of an evaluation."""
        nonlocal epoch_return
        actor: Any = agent.networks(dataset.mean, dataset.std)["actor"]
        result = judge(actor, args, video)
        epoch_return = result["eval/episodic_return"]
        if scale:
            result["eval/d4rl_score"] = 100 * (epoch_return - scale[0]) / (scale[1] - scale[0])
        return result

    run = Run(args, env.title, device, 3 * sum(t.nbytes for t in tensors.values()))
    write_file(run.path / mark.name, dataset.digest.encode())
    state, saved = run.load()
    if state:
        step, epoch_return = state["counters"]
        print(f"{run.path}: going on from step {step}")
        agent.gradient_step = step
        sampling = torch.tensor(state["sampling"], dtype=torch.uint8)
        same = len(sampling) == len(dataset.generator.get_state())
        require(same, f"--resume {run.path}: its data were on another kind of device, which it needs again")
        dataset.generator.set_state(sampling)
        for name, tensor in tensors.items():
            tensor.detach().copy_(saved[name])
    else:
        run.log(0, agent.report())  # the sparsity of each layer
    # >>> shared: bar
    tty, shown = sys.stderr.isatty(), (step, time.monotonic())
    shape = "{percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} {remaining} left {desc}"
    bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, dynamic_ncols=True,
               mininterval=0.5 if tty else 30, bar_format="{bar:10}" + shape if tty else shape + "\n")
    # <<< shared: bar

    training = True
    while step < total:
        # Learn, as far as something is due: every 100 steps, at an epoch's end, at the run's end.
        ends = [period - step % period for period in (100, args.epoch_steps)]
        now = step + min(*ends, total - step)
        agent.learn(dataset, now - step)
        if not all(map(math.isfinite, agent.losses)):
            bar.close()
            last = f"step {run.saved} in {run.folder}" if run.saved else "none yet"
            raise Exit(1, f"the losses became {agent.losses} before step {now}; last checkpoint: {last}")
        # Log.
        epoch_ends = now % args.epoch_steps == 0
        if epoch_ends or now >= total or now // 1000 > step // 1000:
            speed = (now - shown[0]) / (time.monotonic() - shown[1])
            record = {"charts/SPS": speed, "charts/learning_rate": args.learning_rate,
                      "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
            if epoch_ends and args.eval_episodes and now < total:
                record |= score()
            run.log(now, record | agent.report())
            shown = (now, time.monotonic())
        latest = "-" if epoch_return is None else f"{epoch_return:.1f}"
        bar.set_description_str(f"return {latest} sparsity {sparsity:.3f}", False)
        bar.update(now - step)
        step = now
        # Save.
        if stops or step >= total or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"counters": (step, epoch_return), "sampling": dataset.generator.get_state().tolist()}
            run.save(step, tensors, state)
            if stops:
                bar.close()
                raise Exit(75, f"stopped at step {step}; go on with --resume {run.path}")

    training = False
    bar.close()
    run.finish(step, agent.networks(dataset.mean, dataset.std), score, lambda: epoch_return)


if __name__ == "__main__":
    outlive_readers()
    command_line(main)
