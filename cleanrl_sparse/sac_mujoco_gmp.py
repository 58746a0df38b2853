# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "mujoco>=3.3", "imageio>=2.14", "tyro>=0.9",
#                 "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "imageio-ffmpeg>=0.5", "wandb>=0.18"]
# ///
"""Soft actor-critic on MuJoCo with gradual magnitude pruning of actor and critics.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned network is a good
network", ICML 2024, arXiv 2402.12479. The agent is SAC (Haarnoja et al. 2018) as in rigl/rl, which is TF-Agents'.

From 20 % to 80 % of the gradient steps the weights of the smallest magnitude are removed along a cubic schedule
(Zhu and Gupta 2017), every 1,000 gradient steps. What is removed stays removed.

    python sac_mujoco_gmp.py --env-id Walker2d-v5                   # the paper's setting: 1M steps, 1,280 units, 95 %
    python sac_mujoco_gmp.py --width 1 --sparsity 0.9               # 256 units, for a machine without a GPU
    python sac_mujoco_gmp.py --sparsity 0                           # the dense baseline: nothing is pruned
    python sac_mujoco_gmp.py --resume runs/Walker2d-v5__sac_mujoco_gmp__1__1790000000

Differences from the paper, and guesses ([C] read in the paper or its authors' code, [I] inferred, [D] our decision):
 1. [C] Score |w|, per tensor, exact counts, ties by lower index; all weight matrices of actor and critics, output
    layers included, no biases; each network's layers share its sparsity by the Erdos-Renyi rule (--scope erk).
 2. [D] The schedule counts this run's gradient steps: 199,800 to 799,200 here, 200,000 to 800,000 in the paper.
 3. [D] A weight that is pruned is exactly 0 in the target too, and not only fades by Polyak averaging.
 4. [C] Learning rate 3e-4, batch 256, tau 0.005, reward scale 0.1, 1,000 random steps, Glorot-uniform weights; L2:
    1e-4 times the sum of the squared weights is added to the losses of actor and critics (--weight-decay).
 5. [C] TF-Agents' default target entropy is -0.5 per action dimension; the SAC paper has -1 (--target-entropy).
 6. [I] The loss of the temperature is linear in alpha, as in the SAC paper, where TF-Agents' is linear in log alpha.
 7. [D] The log standard deviation is clamped to [-20, 2]; rigl/rl leaves it free. Gymnasium's v5 environments.
 8. [D] Evaluations are of 10 episodes with always the same seeds; rigl/rl's of 30.

Figures: benchmark/gmp_figure09_18.sh, eaudesac_mujoco.sh. More: docs/sac_mujoco_gmp.md.
"""

from __future__ import annotations

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
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import imageio_ffmpeg
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
    """Flags; the defaults are the paper's setting. A "step" is an environment step."""

    # >>> shared: mujoco-flags
    env_id: str = "Hopper-v5"  # Gymnasium environment with a vector of observations and bounded continuous actions
    seed: int = 1  # seed of everything random, in [0, 2^32)
    total_timesteps: int = 1_000_000  # length of the run in steps, over all environments (>= 1)
    buffer_size: int = 1_000_000  # transitions in the replay (>= batch size)
    batch_size: int = 256  # transitions per gradient step (>= 1)
    gamma: float = 0.99  # discount, in [0, 1]
    tau: float = 0.005  # share of the critics that goes into the targets at each gradient step, in (0, 1]
    replay_ratio: float = 1.0  # gradient steps per step (> 0)
    epoch_steps: int = 10_000  # steps per epoch (>= 1); each ends with an evaluation
    num_envs: int = 1  # environments (>= 1), stepped one after another; periods count the steps of all
    # <<< shared: mujoco-flags
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
    learning_starts: int = 1_000  # steps of uniformly random actions before the first gradient step (>= batch size)
    learning_rate: float = 3e-4  # Adam's step size for actor, critics and temperature (> 0)
    reward_scale: float = 0.1  # multiplies the rewards that are learned from (> 0)
    target_entropy: float = -0.5  # entropy that the temperature aims at, per action dimension, in (-inf, inf)
    width: int = 5  # 256 * width units in each of the two hidden layers (>= 1)
    weight_decay: float = 1e-4  # factor of the sum of squared weights in the losses (>= 0); torch's is twice this
    sparsity: float = 0.95  # share of the prunable weights that is zero in the end, in [0, 1); 0 never prunes
    prune_start: float = 0.2  # share of the run's gradient steps at which pruning begins, in [0, 1]
    prune_end: float = 0.8  # share at which the final sparsity is reached, in [prune_start, 1]
    prune_every: int = 1000  # gradient steps between updates of the masks (>= 1)
    prune_exponent: float = 3.0  # of the polynomial schedule (> 0); 3 is the paper's cubic one
    scope: Literal["erk", "uniform", "global"] = "erk"  # how a network's sparsity is spread over its layers

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
        # >>> shared: check-mujoco-flags
        check("width", lambda x: x >= 1, "at least 1")
        check("tau", lambda x: 0 < x <= 1, "in (0, 1]")
        check("target_entropy", math.isfinite, "finite")
        # <<< shared: check-mujoco-flags
        check("reward_scale", lambda x: 0 < x < math.inf, "above 0 and finite")
        check("prune_every", lambda x: x >= 1, "at least 1")
        check("weight_decay", lambda x: 0 <= x < math.inf, "at least 0 and finite")
        check("sparsity", lambda x: 0 <= x < 1, "in [0, 1)")
        check("prune_start prune_end", lambda x: 0 <= x <= 1, "in [0, 1]")
        check("prune_end", lambda x: x >= self.prune_start, f"at least --prune-start, {self.prune_start}")
        check("prune_exponent", lambda x: 0 < x < math.inf, "above 0 and finite")


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


# >>> shared: transition-replay
class Batch(NamedTuple):
    """Transitions, and the random numbers of one update."""

    obs: Tensor  # [B, O] float32
    actions: Tensor  # [B, A] float32, in [-1, 1]
    next_obs: Tensor  # [B, O] float32, of a truncated episode the true last observation
    rewards: Tensor  # [B] float32
    discounts: Tensor  # [B] float32, of the value of next_obs: gamma, 0 where the episode terminated
    noise: Tensor  # [2, B, A] standard normal, for the actions at next_obs and at obs


class Replay:
    """Uniform replay of the last `capacity` transitions, as rows of one table: a ring of N rows per step."""

    def __init__(self, capacity: int, envs: MujocoEnvs, device: torch.device, seed: int, gamma: float) -> None:
        self.num_envs, obs_size = len(envs.obs), envs.obs.shape[1]
        self.rows = -(-capacity // self.num_envs)  # steps that are kept
        self.parts, self.gamma = [obs_size, envs.num_actions, obs_size, 1, 1], gamma
        self.table = torch.zeros(self.rows * self.num_envs, sum(self.parts), device=device)
        self.size = torch.zeros((), dtype=torch.long, device=device)  # transitions to draw from
        self.step, self.nbytes = 0, self.table.nbytes  # steps stored
        self.obs = envs.obs.copy()  # seen before the next action
        self.generator = torch.Generator(device).manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of transitions that can be sampled."""
        return min(self.step, self.rows) * self.num_envs

    def add(self, actions: np.ndarray, steps: MujocoSteps, obs: np.ndarray) -> None:
        """Store what N environments did (actions [N, A]), what came of it, and the obs [N, O] seen now."""
        facts = [steps.rewards[:, None], self.gamma * ~steps.terminated[:, None]]
        rows = np.concatenate([self.obs, actions, steps.last_obs, *facts], 1).astype(np.float32)
        start = self.step % self.rows * self.num_envs
        self.table[start : start + self.num_envs] = torch.from_numpy(rows)
        self.step, self.obs = self.step + 1, obs.copy()
        self.size.fill_(len(self))

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, without waiting for the device."""
        device = self.table.device
        draw = torch.rand(batch_size, dtype=torch.float64, device=device, generator=self.generator)
        noise = torch.randn(2, batch_size, self.parts[1], device=device, generator=self.generator)
        obs, actions, next_obs, rewards, discounts = self.table[(draw * self.size).long()].split(self.parts, 1)
        return Batch(obs, actions, next_obs, rewards[:, 0], discounts[:, 0], noise)
# <<< shared: transition-replay


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


# >>> shared: prune
def prune(weights: list[Tensor], masks: list[Tensor], sparsity: float, scope: str, progress: float = 1.0) -> None:
    """Take new masks of one network from its weights, at a total sparsity in [0, 1]; what is pruned stays pruned."""
    new = magnitude_masks(weights, [mask.bool() for mask in masks], sparsity, scope, progress)
    for mask, kept in zip(masks, new):
        mask.copy_(kept)
# <<< shared: prune


# >>> shared: adam
def adam(groups: list[dict[str, Any]], args: Args) -> torch.optim.Adam:
    """Return Adam, its moments made now and not in the first step, since a checkpoint restores into them."""
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True, capturable=args.compile)
    for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer
# <<< shared: adam


# >>> shared: schedule
def pruning_progress(step: int, start: int, end: int, exponent: float) -> float:
    """Return the share of the final sparsity at a gradient step: 1 - (1 - (t - t0) / (t1 - t0)) ** n, in [0, 1]."""
    if not start <= step < end:
        return float(step >= end)
    return 1 - (1 - (step - start) / (end - start)) ** exponent
# <<< shared: schedule


class SAC:
    """The actor with its temperature, two critics, their masks, and the two target critics."""

    def __init__(self, args: Args, obs_size: int, num_actions: int, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> None:
        self.args, self.device, self.dtype = args, device, dtype
        self.target_entropy = args.target_entropy * num_actions
        torch.manual_seed(args.seed)
        self.actor = Actor(obs_size, num_actions, 256 * args.width).to(device, dtype)
        pair = make_critics(2, obs_size + num_actions, 256 * args.width)
        self.critics = [p.to(device, dtype, copy=True).requires_grad_() for p in pair]
        self.targets = [p.to(device, dtype) for p in pair]
        self.log_alpha = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
        self.followed = [p.detach() for p in self.critics]  # by actor and targets
        matrices, biases = self.critics[::2], self.critics[1::2]
        actor_matrices, actor_rest = list(prunable(self.actor).values()), [self.log_alpha]
        actor_rest += [p for p in self.actor.parameters() if p.ndim == 1]
        self.weights = [*matrices, *actor_matrices]
        self.masks = [torch.ones_like(w) for w in self.weights]
        self.target_masks = [mask[:2] for mask in self.masks[:3]]
        decay = 2 * args.weight_decay  # the gradient of a square
        self.critic_optimizer = adam([{"params": matrices, "weight_decay": decay}, {"params": biases}], args)
        self.actor_optimizer = adam([{"params": actor_matrices, "weight_decay": decay}, {"params": actor_rest}], args)
        self.gradient_step, self.sparsity, self.losses = 0, [0.0], [0.0] * 6  # sparsity: the schedule's
        self.latest = torch.full((6,), math.nan, device=device, dtype=dtype)
        starts, steps = args.learning_starts, -(-args.total_timesteps // args.num_envs) * args.num_envs
        updates = max(1, math.floor(steps * args.replay_ratio) - math.floor(starts * args.replay_ratio))  # of the run
        self.start, self.end = (min(updates - 1, round(x * updates)) for x in (args.prune_start, args.prune_end))
        self.rng = np.random.default_rng((args.seed, 0))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False  # kernels and libraries are loaded once update() has run

    # >>> shared: sac-update
    @torch.no_grad()
    def act(self, obs: np.ndarray, explore: bool) -> np.ndarray:
        """Return actions [N, A] in [-1, 1] for obs [N, O]: uniform ones to explore, else drawn from the policy."""
        shape = (len(obs), self.actor.output.out_features // 2)
        if explore:
            return self.rng.uniform(-1, 1, shape).astype(np.float32)
        noise = torch.from_numpy(self.rng.standard_normal(shape, np.float32))
        mean, log_std = self.actor(torch.from_numpy(obs).to(self.device, self.dtype))
        return (mean + log_std.exp() * noise.to(self.device, self.dtype)).tanh().cpu().numpy()

    def sac_update(self, batch: Batch) -> Tensor:
        """Take one gradient step; return the critics' losses [count]. Gradients are dense, masked is what comes out.

        Nothing here waits for the device.
        """
        obs, actions, next_obs, rewards, discounts, noise = (t.to(self.device, self.dtype) for t in batch)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad(), autocast:
            next_actions, log_prob = self.actor.sample(next_obs, noise[0])
            next_q = critic_values(self.targets, next_obs, next_actions).amin(0)  # [B]
            td_target = self.args.reward_scale * rewards + discounts * (next_q - alpha * log_prob)
        with autocast:
            q = critic_values(self.critics, obs, actions)  # [count, B]
        losses = (q - td_target).square().mean(1)  # [count]
        losses.sum().backward()
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights[:3], self.masks[:3])
        with autocast:
            new_actions, log_prob = self.actor.sample(obs, noise[1])
            new_q = critic_values(self.followed, obs, new_actions).amin(0)  # [B]; no gradient of the critics' weights
        actor_loss = (alpha * log_prob - new_q).mean()
        alpha_loss = -self.log_alpha.exp() * (log_prob.detach().mean() + self.target_entropy)
        (actor_loss + alpha_loss).backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights[3:], self.masks[3:])
            torch._foreach_lerp_(self.targets, self.followed, self.args.tau)
            torch._foreach_mul_(self.targets[::2], self.target_masks)
            self.latest.copy_(torch.stack([*losses.view(-1, 2).mean(0), q.mean(), actor_loss, alpha, alpha_loss]))
        return losses.detach()

    def networks(self, pair: int) -> nn.ModuleDict:
        """Return the actor and copies of a pair of critics."""
        qf1, qf2 = (one_critic(self.critics, 2 * pair + i) for i in range(2))
        return nn.ModuleDict({"actor": self.actor, "qf1": qf1, "qf2": qf2})

    def sac_report(self, pair: int) -> dict[str, float]:
        """Return what is logged: the latest update's means over all critics, the sparsity of what is saved now."""
        names = ("qf1_loss", "qf2_loss", "q_values", "actor_loss", "alpha", "alpha_loss")
        record = {f"losses/{name}": x for name, x in zip(names, self.latest.tolist()) if math.isfinite(x)}
        return record | {f"sparsity/{key}": value for key, value in sparsity_report(self.networks(pair)).items()}
    # <<< shared: sac-update

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

    update = sac_update

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

    def learn(self, replay: Replay, updates: int) -> None:
        """Sample and update `updates` times, with new masks when they are due."""
        for _ in range(updates):
            self.prune()
            self.captured_update(replay)
        self.losses = self.latest.tolist() if updates > 0 else self.losses

    def prune(self) -> None:
        """Take the masks of this gradient step from the weights of each network, if new ones are due.

        Adam's moments of a pruned weight go on and have no effect, since the mask follows every step.
        """
        args, step = self.args, self.gradient_step
        due = (step - self.start) % args.prune_every == 0 or step == self.end
        if args.sparsity == 0 or not (due and self.start <= step <= self.end):
            return
        progress = pruning_progress(step, self.start, self.end, args.prune_exponent)
        critics, masks = self.weights[:3], self.masks[:3]
        for n in range(2):
            prune([w[n] for w in critics], [m[n] for m in masks], args.sparsity, args.scope, progress)
        prune(self.weights[3:], self.masks[3:], args.sparsity, args.scope, progress)
        self.sparsity = [progress * args.sparsity]

    tensors = sac_tensors

    def state(self) -> dict[str, Any]:
        """Return the rest of what the next step depends on, as JSON."""
        numbers = {name: getattr(self, name) for name in ("gradient_step", "sparsity")}
        return {"numbers": numbers, "rng": self.rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state()."""
        vars(self).update(state["numbers"])
        self.rng.bit_generator.state = state["rng"]

    def best(self) -> nn.ModuleDict:
        """Return the networks to save: the actor and both critics."""
        return self.networks(0)

    def report(self) -> dict[str, float]:
        """Return what is logged beside the episodes."""
        return {"sparsity/target": self.sparsity[0]} | self.sac_report(0)


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
    """Train, evaluate the policy, and leave the run folder."""
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
    # >>> shared: mujoco-start
    returns, recent = list[float](), list[float]()  # of the episodes of this epoch, of the latest
    if total <= args.learning_starts:
        print(f"nothing will be learned: --total-timesteps {total} is within --learning-starts {args.learning_starts}")
    if args.capture_video:
        require_pictures("--capture-video", args.env_id)
    envs = MujocoEnvs(args.env_id, args.num_envs, args.seed)
    # <<< shared: mujoco-start
    agent = SAC(args, envs.obs.shape[1], envs.num_actions, device)
    # >>> shared: mujoco-go-on
    replay, tensors = Replay(args.buffer_size, envs, device, args.seed, args.gamma), agent.tensors()
    actions_size = 4 * envs.num_actions * total
    run = Run(args, envs.title, device, 3 * (actions_size + sum(t.nbytes for t in tensors.values())))
    state, saved = run.load()
    if state:
        step, epoch_return, returns = state["counters"]
        print(f"{run.path}: going on from step {step}; the episodes are played again")
        agent.restore(state["agent"])
        sampling = torch.tensor(state["sampling"], dtype=torch.uint8)
        same = len(sampling) == len(replay.generator.get_state())
        require(same, f"--resume {run.path}: its replay was on another kind of device, which it needs again")
        replay.generator.set_state(sampling)
        first = step // args.num_envs - replay.rows
        for row, actions, steps in envs.restore(state["episodes"], saved["actions"], first):
            replay.step = row
            replay.add(actions, steps, envs.obs)
        for name, tensor in tensors.items():
            tensor.detach().copy_(saved[name])
    # <<< shared: mujoco-go-on
    # >>> shared: bar
    tty, shown = sys.stderr.isatty(), (step, time.monotonic())
    shape = "{percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} {remaining} left {desc}"
    bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, dynamic_ncols=True,
               mininterval=0.5 if tty else 30, bar_format="{bar:10}" + shape if tty else shape + "\n")
    # <<< shared: bar

    # >>> shared: mujoco-loop
    training = True
    while step < total:
        now = step + args.num_envs
        # Act and step.
        actions = agent.act(envs.obs, explore=step < args.learning_starts)
        steps = envs.step(actions)
        # Store.
        replay.add(actions, steps, envs.obs)
        for score, length in steps.episodes:
            run.log(now, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns, recent = [*returns, score], [*recent, score][-10:]
        # Learn and prune; the target moves with every update.
        updates = math.floor(now * args.replay_ratio) - math.floor(max(step, args.learning_starts) * args.replay_ratio)
        agent.learn(replay, updates)
        if not all(map(math.isfinite, agent.losses)):
            bar.close()
            last = f"step {run.saved} in {run.folder}" if run.saved else "none yet"
            raise Exit(1, f"the losses became {agent.losses} at step {now}; last checkpoint: {last}")
        # Log.
        bar.set_description_str(f"return {np.mean(recent or 0):.1f} sparsity {agent.sparsity[0]:.3f}", False)
        bar.update(min(now, total) - step)
        epoch_ends = now // args.epoch_steps > step // args.epoch_steps
        if epoch_ends or now >= total or now // 1000 > step // 1000:
            speed = (now - shown[0]) / (time.monotonic() - shown[1])
            record = {"charts/SPS": speed, "charts/learning_rate": args.learning_rate,
                      "charts/buffer_size": len(replay), "memory/replay_bytes": replay.nbytes,
                      "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
            if epoch_ends:
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
                record |= judge(agent.actor, args) if args.eval_episodes and now < total else {}
            run.log(now, record | agent.report())
            shown = (now, time.monotonic())
        step = now
        # Save.
        if stops or step >= total or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"counters": (step, epoch_return, returns), "agent": agent.state(), "episodes": envs.past(),
                     "sampling": replay.generator.get_state().tolist()}
            run.save(step, tensors | {"actions": envs.played()}, state)
            if stops:
                bar.close()
                raise Exit(75, f"stopped at step {step}; go on with --resume {run.path}")

    training = False
    bar.close()
    run.finish(step, agent.best(), lambda video: judge(agent.actor, args, video), lambda: epoch_return)
    # <<< shared: mujoco-loop


if __name__ == "__main__":
    outlive_readers()
    command_line(main)
