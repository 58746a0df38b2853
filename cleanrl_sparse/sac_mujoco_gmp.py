# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "mujoco>=3.3", "imageio>=2.14",
#                 "tyro>=0.9", "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18"]
# ///
"""Soft actor-critic on MuJoCo with gradual magnitude pruning of actor and critics.

Paper: Obando-Ceron, Courville, Castro, "In value-based deep reinforcement learning, a pruned
network is a good network", ICML 2024, arXiv 2402.12479. The agent is SAC (Haarnoja et al. 2018) as
in rigl/rl, which uses TF-Agents.

From 20 % to 80 % of the run, every 1,000 gradient steps, the weights of smallest magnitude are
removed along a cubic schedule (Zhu and Gupta 2017). Removed weights stay removed.

    python sac_mujoco_gmp.py --env-id Walker2d-v5       # the paper's run: 1M steps, 1,280 units
    python sac_mujoco_gmp.py --width 1 --sparsity 0.9   # 256 units, for a machine without a GPU
    python sac_mujoco_gmp.py --sparsity 0               # the dense baseline: nothing is pruned
    python sac_mujoco_gmp.py --resume RUN_DIR

Differences from the paper, and guesses ([C] read in its authors' code, [I] inferred, [D] ours):
 1. [C] Scores are |w|; all weight matrices of actor and critics, output layers included, no biases;
    the Erdos-Renyi rule spreads each network's sparsity over its layers.
 2. [D] The schedule counts this run's gradient steps, 199,800 to 799,200, not 200,000 to 800,000.
 3. [D] A pruned weight is exactly 0 in the targets too, instead of fading by averaging.
 4. [C] L2: 1e-4 times the sum of squared weights is added to the losses of actor and critics.
 5. [C] The target entropy is TF-Agents' -0.5 per action dimension; the SAC paper has -1.
 6. [I] The temperature's loss is linear in alpha, as in the SAC paper; TF-Agents': in log alpha.
 7. [D] The log standard deviation is clamped to [-20, 2]; rigl/rl leaves it free.
 8. [D] Gymnasium's v5 environments, evaluations of the same 10 episodes; in the paper v2 and 30.

Figures: benchmark/gmp_figure09_18.sh, eaudesac_mujoco.sh. More: docs/sac_mujoco_gmp.md.
"""

from __future__ import annotations

import ctypes
import difflib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, make_dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class Training:
    """The agent and its task."""

    env_id: str = "Hopper-v5"  # Gymnasium environment with vectors of observations and actions
    seed: Index = 1  # random seed
    total_timesteps: Count = 1_000_000  # total steps, summed over all environments
    learning_starts: Count = 1_000  # steps of random actions before the first gradient step
    buffer_size: Count = 1_000_000  # transitions in the replay
    batch_size: Count = 256  # transitions per gradient step
    learning_rate: Rate = 3e-4  # Adam's step size for actor, critics and temperature
    gamma: Share = 0.99  # discount factor
    tau: Share = 0.005  # Polyak coefficient: step of the targets to the critics
    replay_ratio: Rate = 1.0  # gradient steps per environment step
    reward_scale: Rate = 0.1  # factor on the rewards in the TD target
    target_entropy: Real = -0.5  # entropy that the temperature aims at, per action dimension
    width: Count = 5  # 256 * width units in each of the two hidden layers
    weight_decay: Amount = 1e-4  # factor on the sum of squared weights, added to the losses
    epoch_steps: Count = 10_000  # steps per epoch; each ends with an evaluation
    num_envs: Count = 1  # environments, stepped in turn; step counts are summed over all of them
    eval_episodes: Index = 10  # episodes of each evaluation, without noise; 0: no evaluations
    eval_steps: Count = 1_000  # steps after which an evaluation episode is cut off


@dataclass
class Method:
    """Gradual magnitude pruning; the defaults are the paper's."""

    sparsity: Share = 0.95  # final share of the prunable weights that are zero; 0: no pruning
    prune_start: Share = 0.2  # share of the run's gradient steps before pruning begins
    prune_end: Share = 0.8  # share after which the final sparsity is reached
    prune_every: Count = 1_000  # gradient steps between mask updates


# >>> shared: sac-networks
class Actor(nn.Sequential):
    """A Gaussian over actions, squashed to [-1, 1] by tanh."""

    output: nn.Linear

    def __init__(self, obs_size: int, num_actions: int, units: int, layers: int) -> None:
        parts = OrderedDict[str, nn.Module]()
        for i in range(1, layers + 1):
            parts[f"dense{i}"] = nn.Linear(obs_size if i == 1 else units, units)
            parts[f"relu{i}"] = nn.ReLU(inplace=True)
        parts["output"] = nn.Linear(units, 2 * num_actions)
        super().__init__(parts)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Map obs [B, O] to mean and log standard deviation [B, A] each, the latter in [-20, 2]."""
        x = obs
        for layer in list(self)[:-1]:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for actions
            mean, log_std = self.output(x.to(self.output.weight.dtype)).chunk(2, 1)
            return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions [..., B, A] in [-1, 1] and their log-probabilities [..., B].

        obs is [B, O], noise [..., B, A] standard normal. With u = mean + std * noise,
        log p(tanh u) = log N(u) - log(1 - tanh(u) ** 2), and the last term is
        2 * (log 2 - u - softplus(-2 * u)), which neither overflows nor loses digits at large |u|.
        """
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        actions = u.tanh()
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return actions, (log_prob - log_slope).sum(-1)


def critic_stacks(count: int, inputs: int, units: int, layers: int) -> list[Tensor]:
    """Return the parameters of `count` Q-functions, stacked layer by layer.

    For each layer: weights [count, in, out] and biases [count, 1, out].
    """
    sizes = [inputs, *[units] * layers, 1]
    stacks = list[Tensor]()
    for size_in, size_out in pairwise(sizes):
        stacks.append(torch.empty(count, size_in, size_out))
        for weight in stacks[-1]:
            nn.init.xavier_uniform_(weight)
        stacks.append(torch.zeros(count, 1, size_out))
    return stacks


def critic_values(stacks: list[Tensor], obs: Tensor, actions: Tensor) -> Tensor:
    """Return Q [count, B] for obs [B, O] and actions [B, A], by one batched product per layer."""
    *hidden, weight, bias = stacks
    x = torch.cat([obs, actions], 1).expand(len(weight), -1, -1)
    for w, b in zip(hidden[::2], hidden[1::2]):
        x = torch.relu_(torch.baddbmm(b, x, w))
    with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to rank actions
        x = torch.linalg.vecdot(x.to(weight.dtype), weight.mT)  # 3 to 7 times as fast as a product
        return x + bias[:, :, 0]


def critic_network(stacks: list[Tensor], n: int) -> nn.Sequential:
    """Return the n-th critic as a network on [B, O + A] that shares memory with detached stacks."""
    parts = OrderedDict[str, nn.Module]()
    for i, (weight, bias) in enumerate(zip(stacks[::2], stacks[1::2]), 1):
        layer = nn.Linear(weight.shape[1], weight.shape[2], device="meta")
        layer.weight = nn.Parameter(weight[n].T)
        layer.bias = nn.Parameter(bias[n, 0])
        last = 2 * i == len(stacks)
        parts |= {"output": layer} if last else {f"dense{i}": layer, f"relu{i}": nn.ReLU()}
    return nn.Sequential(parts)


# <<< shared: sac-networks
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
class SAC(nn.Module):
    """The actor with its temperature, two critics, and the two targets that follow them."""

    def __init__(self, args: Args, obs_size: int, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.num_actions, self.device = args, num_actions, device
        torch.manual_seed(args.seed)
        self.actor = Actor(obs_size, num_actions, 256 * args.width, layers=2).to(device)
        stacks = critic_stacks(2, obs_size + num_actions, 256 * args.width, layers=2)
        self.stacks = [stack.to(device).requires_grad_() for stack in stacks]
        self.followed = [stack.detach() for stack in self.stacks]  # by actor and targets
        self.critics: Any = nn.ModuleList(critic_network(self.followed, n) for n in range(2))
        self.targets: Any = [nn.Parameter(x.clone(), requires_grad=False) for x in self.followed]
        self.target_critics = nn.ParameterList(self.targets)  # for state_dict(); slow to iterate
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        # Of the latest update: critics' losses, Q, actor's loss, alpha, its loss.
        self.latest = nn.Buffer(torch.full((6,), math.nan, device=device))
        # The critics' weights, then the actor's three; the targets have the critics' masks.
        networks = [*self.critics, self.actor]
        for network in networks:
            add_masks(network)
        self.weights = [w for network in networks for w in prunable(network).values()]
        self.masks = [mask for network in networks for mask in network.buffers()]
        self.target_weights = [stack[n].T for n in range(2) for stack in self.targets[::2]]
        adam: Any = {"lr": args.learning_rate, "fused": True, "capturable": args.compile}
        decay = 2 * args.weight_decay  # the gradient of a square
        decayed: Any = {"params": self.stacks[::2], "weight_decay": decay}
        self.critic_optimizer = torch.optim.Adam([decayed, {"params": self.stacks[1::2]}], **adam)
        decayed = {"params": self.weights[-3:], "weight_decay": decay}
        others = [p for p in self.actor.parameters() if p.ndim == 1] + [self.log_alpha]
        self.actor_optimizer = torch.optim.Adam([decayed, {"params": others}], **adam)
        self.gradient_step, self.sparsity = 0, 0.0  # the schedule's sparsity
        steps = math.ceil(args.total_timesteps / args.num_envs) * args.num_envs
        updates = max(1, self.updates_by(steps))  # of the whole run
        self.start = min(updates - 1, round(args.prune_start * updates))
        self.end = min(updates - 1, round(args.prune_end * updates))
        uses = ("act", "score")
        self.rng = {use: np.random.default_rng((args.seed, i)) for i, use in enumerate(uses)}
        self.graph: torch.cuda.CUDAGraph | None = None

    # >>> shared: sac-agent
    def updates_by(self, step: int) -> int:
        """Return the number of gradient steps due by `step`."""
        ratio = self.args.replay_ratio
        return math.floor(step * ratio) - math.floor(self.args.learning_starts * ratio)

    @torch.no_grad()
    def act(self, obs: np.ndarray, explore: bool) -> np.ndarray:
        """Return actions [N, A] in [-1, 1] for obs [N, O], uniform or drawn from the policy."""
        rng, shape = self.rng["act"], (len(obs), self.num_actions)
        if explore:
            return rng.uniform(-1, 1, shape).astype(np.float32)
        mean, log_std = self.actor(torch.from_numpy(obs).to(self.device))
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(self.device)
        return (mean + log_std.exp() * noise).tanh().cpu().numpy()

    def update(self, *batch: Tensor) -> None:
        """Take one gradient step on a batch; noise [2, B, A] is for actions at next_obs and obs.

        Gradients are dense, the updated weights are masked. Nothing waits for the device.
        """
        obs, actions, next_obs, rewards, terminated, noise = batch
        args, alpha = self.args, self.log_alpha.detach().exp()
        autocast = torch.autocast(self.device.type, torch.bfloat16, args.precision == "bf16")
        with torch.no_grad(), autocast:
            next_actions, log_prob = self.actor.sample(next_obs, noise[0])
            next_q = critic_values(self.targets, next_obs, next_actions).amin(0)  # [B]
            next_v = next_q - alpha * log_prob
            td_target = args.reward_scale * rewards + args.gamma * (1 - terminated) * next_v
        with autocast:
            q = critic_values(self.stacks, obs, actions)  # [critics, B]
        losses = (q - td_target).square().mean(1)  # [critics]
        losses.sum().backward()
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights[:-3], self.masks[:-3])
        with autocast:
            new_actions, log_prob = self.actor.sample(obs, noise[1])
            new_q = critic_values(self.followed, obs, new_actions).amin(0)  # [B]
        actor_loss = (alpha * log_prob - new_q).mean()
        entropy_gap = log_prob.detach().mean() + args.target_entropy * self.num_actions
        alpha_loss = -self.log_alpha.exp() * entropy_gap
        (actor_loss + alpha_loss).backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_mul_(self.weights[-3:], self.masks[-3:])
            torch._foreach_lerp_(self.targets, self.followed, args.tau)
            torch._foreach_mul_(self.target_weights, self.masks[: len(self.target_weights)])
            self.latest.copy_(torch.stack([*losses, q.mean(), actor_loss, alpha, alpha_loss]))

    def losses(self) -> dict[str, float]:
        """Return the latest losses to log, means over all pairs."""
        names = ("qf1_loss", "qf2_loss", "q_values", "actor_loss", "alpha", "alpha_loss")
        latest = torch.cat([self.latest[:-4].view(-1, 2).mean(0), self.latest[-4:]]).tolist()
        return {f"losses/{name}": x for name, x in zip(names, latest) if math.isfinite(x)}

    # <<< shared: sac-agent
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
    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() holds besides networks, masks and temperature."""
        adams = [self.critic_optimizer.state_dict(), self.actor_optimizer.state_dict()]
        rng = {use: rng.bit_generator.state for use, rng in self.rng.items()}
        return {"adams": adams, "rng": rng, "counters": (self.gradient_step, self.sparsity)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what get_extra_state() returned."""
        self.gradient_step, self.sparsity = state["counters"]
        self.critic_optimizer.load_state_dict(state["adams"][0])
        self.actor_optimizer.load_state_dict(state["adams"][1])
        for use, rng in self.rng.items():
            rng.bit_generator.state = state["rng"][use]

    def learn(self, replay: Replay, step: int) -> None:
        """Take the gradient steps due by `step`, pruning on schedule."""
        while self.gradient_step < self.updates_by(step):
            self.prune()
            self.captured_update(replay)
            self.gradient_step += 1

    def prune(self) -> None:
        """Shrink each network's masks if due; update() then applies them to the weights.

        So the update's gradients are still those of the weights before. A pruned weight keeps its
        Adam moments, without effect, as the mask follows every step.
        """
        args, step = self.args, self.gradient_step
        due = (step - self.start) % args.prune_every == 0 or step == self.end
        if args.sparsity == 0 or not (due and self.start <= step <= self.end):
            return
        progress = pruning_progress(step, self.start, self.end)
        self.sparsity = progress * args.sparsity
        for network in (*self.critics, self.actor):
            densities = erk_densities(network, args.sparsity)
            prune(network, [1 - progress * (1 - x) for x in densities], self.rng["score"])

    def lost(self) -> bool:
        """Return whether a loss of the latest update is not finite."""
        return self.gradient_step > 0 and not bool(self.latest.isfinite().all())

    def networks(self) -> nn.ModuleDict:
        """Return the networks to save."""
        qf1, qf2 = self.critics
        return nn.ModuleDict({"actor": self.actor, "qf1": qf1, "qf2": qf2})

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the networks to save."""
        record = self.losses() | sparsity_report(self.networks())
        return record | {"sparsity/target": self.sparsity}


def main(args: Args) -> None:
    """Train, evaluate the policy, and write the results."""
    device = find_device(args)
    require(device.type != "cpu" or not args.compile, "--compile: only with --device cuda")
    envs = MujocoEnvs(args.env_id, args.num_envs, args.seed)
    agent = SAC(args, envs.obs.shape[1], envs.num_actions, device)
    # >>> shared: mujoco-loop
    replay = Replay(args, device, envs)
    run = Run(args, envs.title)
    step, returns, epoch_return = 0, list[float](), None  # returns: this epoch's episodes
    if saved := run.load():
        step, returns, epoch_return = saved["progress"]
        play_again(envs, replay, saved["episodes"], run)
        agent.load_state_dict(saved["agent"])
        replay.generator.set_state(saved["sampling"])
    bar = progress_bar(args.total_timesteps, step, "step")

    def passed(period: int) -> bool:
        """Return whether this step reached or crossed a multiple of `period`."""
        return step // period > previous // period

    while step < args.total_timesteps:
        previous, step = step, step + args.num_envs
        ended = step >= args.total_timesteps
        # Act, step and store.
        obs = envs.obs
        actions = agent.act(obs, explore=previous < args.learning_starts)
        replay.add(obs, actions, *envs.step(actions)[:3])
        for score, length in envs.episodes:
            run.log(step, {"charts/episodic_return": score, "charts/episodic_length": length})
            returns.append(score)
            bar.set_postfix_str(f"return {score:.1f}, sparsity {agent.sparsity:.3f}", False)
        # Learn and prune; the targets follow at every gradient step.
        agent.learn(replay, step)
        if agent.lost():
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.latest.tolist()}; {kept}", 1)
        # Log.
        bar.update(min(step, args.total_timesteps) - previous)
        if ended or passed(args.epoch_steps) or passed(1000):
            record = agent.report() | {
                "charts/SPS": (bar.n - bar.initial) / bar.format_dict["elapsed"],
                "charts/learning_rate": args.learning_rate,
                "charts/buffer_size": replay.count,
                "memory/replay_bytes": replay.table.nbytes,
                "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if passed(args.epoch_steps):
                epoch_return, returns = sum(returns) / len(returns) if returns else None, []
                record |= {} if epoch_return is None else {"charts/epoch_return": epoch_return}
                record |= {} if ended else evaluate(agent.actor, args)
            run.log(step, record)
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            state = {"progress": (step, returns, epoch_return), "agent": agent.state_dict()}
            episodes = [bytes(envs.actions), envs.began, torch.from_numpy(envs.obs)]
            state |= {"episodes": episodes, "sampling": replay.generator.get_state()}
            run.save(step, state)

    bar.close()
    scores = evaluate(agent.actor, args, run)
    run.finish(step, agent.networks(), scores, epoch_return=epoch_return)


# <<< shared: mujoco-loop
# >>> shared: mujoco-envs
def make_env(env_id: str) -> gym.Env:
    """Make a Gymnasium environment (Hopper: Hopper-v5) with vectors of real numbers."""
    try:
        import mujoco  # here, as MUJOCO_GL may be wrong
    except Exception as error:  # of any kind, depending on the drawing library
        line = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: mujoco cannot be imported with it"
        require(False, f"{line} ({' '.join(str(error).split())})")
    mujoco.set_mju_user_warning(lambda x: "deprecated" in x or sys.stderr.write(f"{x}\n"))
    name = next((n for n in (env_id, f"{env_id}-v5") if n in gym.registry), "")
    near = ", ".join(difflib.get_close_matches(env_id, gym.registry, cutoff=0.3)) or "none"
    require(name != "", f"--env-id {env_id}: no such environment; the nearest are: {near}")
    try:
        env = gym.make(name, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:
        require(False, f"--env-id {env_id} cannot be made: {' '.join(str(error).split())}")
    obs: Any = env.observation_space
    actions: Any = env.action_space
    fits = all(isinstance(space, gym.spaces.Box) for space in (obs, actions))
    fits = fits and all(len(x.shape) == 1 and x.shape[0] > 0 for x in (obs, actions))
    fits = fits and actions.dtype.kind == "f" and actions.is_bounded()
    needed = "needs a vector of observations and one of bounded continuous actions"
    require(fits, f"--env-id {env_id}: {needed}")
    return env


class MujocoEnvs:
    """N copies of an environment; actions in [-1, 1] are rescaled to its bounds.

    `obs` [N, O] float32 is the current observation: after an episode has ended, the first of the
    next. Each episode has its own seed, from (seed, environment, step), so seed and actions
    determine everything and a resumed run can replay it.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int) -> None:
        self.envs: list[Any] = [make_env(env_id) for _ in range(num_envs)]
        space = self.envs[0].action_space
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2
        self.title, self.num_actions = self.envs[0].spec.id, len(space.low)
        self.seed, self.steps, self.actions = seed, 0, bytearray()  # all actions so far, N per step
        self.began = [list[int]() for _ in range(num_envs)]  # at which steps, for each one
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.obs = np.zeros((num_envs, *self.envs[0].observation_space.shape), np.float32)
        for i in range(num_envs):
            self.begin(i)

    def begin(self, i: int) -> None:
        """Begin an episode of environment i."""
        self.began[i].append(self.steps)
        seed = np.random.SeedSequence((self.seed, i, self.steps)).generate_state(1)[0]
        self.obs[i], _ = self.envs[i].reset(seed=int(seed))
        self.returns[i] = self.lengths[i] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Take a step with actions [N, A] in [-1, 1]; where an episode ends, the next one begins.

        Returns next_obs [N, O], from before any reset, and rewards, terminated, ended [N].
        `episodes` has the undiscounted return and the length of each episode that ended.
        """
        self.actions += actions.tobytes()
        self.steps += 1
        moves = self.middle + self.half * actions
        results = [env.step(move) for env, move in zip(self.envs, moves)]
        next_obs, rewards, terminated, truncated = map(np.array, list(zip(*results))[:4])
        ended = terminated | truncated
        self.returns += rewards
        self.lengths += 1
        self.episodes = list(zip(self.returns[ended].tolist(), self.lengths[ended].tolist()))
        self.obs = next_obs.astype(np.float32)
        for i in np.flatnonzero(ended).tolist():
            self.begin(i)
        return next_obs, rewards, terminated, ended


@torch.no_grad()
def evaluate(actor: Actor, args: Args, run: Run | None = None) -> dict[str, float]:
    """Play --eval-episodes side by side with the mean action; return the values to log.

    The seeds are always the same and differ from training's. With `run`, a signal ends the play.
    """
    n, device = args.eval_episodes, actor.output.weight.device
    if n == 0:
        return {}
    envs, over, scores = MujocoEnvs(args.env_id, n, args.seed + 1_000_000), np.zeros(n), np.zeros(n)
    while envs.steps < args.eval_steps and not over.all():
        mean, _ = actor(torch.from_numpy(envs.obs).to(device))
        _, rewards, _, ended = envs.step(mean.tanh().cpu().numpy())
        scores += np.where(over, 0, rewards)
        over = np.logical_or(over, ended)
        if run:
            require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    return {"eval/episodic_return": float(scores.mean()), "eval/episodes": n}


# <<< shared: mujoco-envs
# >>> shared: mujoco-replay
class Replay:
    """Uniform replay of the last --buffer-size transitions: rows of a table on the device.

    A ring, N rows per step of the N environments: obs, actions, next_obs, reward, terminated.
    """

    def __init__(self, args: Args, device: torch.device, envs: MujocoEnvs) -> None:
        self.num_envs, obs_size = envs.obs.shape
        self.rows = math.ceil(args.buffer_size / self.num_envs)  # steps kept
        self.sizes = [obs_size, envs.num_actions, obs_size, 1, 1]
        self.table = torch.zeros(self.rows * self.num_envs, sum(self.sizes), device=device)
        self.filled = torch.zeros((), dtype=torch.long, device=device)  # `count`, on the device
        self.step = self.count = 0
        self.generator = torch.Generator(device).manual_seed(args.seed)

    def add(self, obs: Any, actions: Any, next_obs: Any, rewards: Any, terminated: Any) -> None:
        """Store one step of all environments: arrays of N rows."""
        columns = [obs, actions, next_obs, rewards, terminated]
        rows = torch.from_numpy(np.column_stack(columns).astype(np.float32))
        start = self.step % self.rows * self.num_envs
        self.table[start : start + self.num_envs] = rows
        self.step += 1
        self.count = min(self.step, self.rows) * self.num_envs
        self.filled.fill_(self.count)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement, without waiting for the device.

        Returns obs [B, O], actions [B, A], next_obs [B, O], rewards, terminated [B], and standard
        normal noise [2, B, A], all float32.
        """
        random: Any = {"device": self.table.device, "generator": self.generator}
        draw = torch.rand(batch_size, dtype=torch.float64, **random)
        noise = torch.randn(2, batch_size, self.sizes[1], **random)
        batch = self.table[(draw * self.filled).long()].split(self.sizes, 1)
        return *batch[:3], batch[3][:, 0], batch[4][:, 0], noise


def play_again(envs: MujocoEnvs, replay: Replay, episodes: list[Any], run: Run) -> None:
    """Replay a checkpoint's episodes, from those that hold the oldest transitions kept."""
    past, began, obs = episodes
    actions = np.frombuffer(past, np.float32).reshape(-1, len(envs.envs), envs.num_actions)
    first = max(0, len(actions) - replay.rows)
    begins = np.array([max(step for step in steps if step <= first) for steps in began])
    envs.steps = replay.step = int(begins.min())
    envs.actions = bytearray(actions[: envs.steps].tobytes())
    bar = progress_bar(len(actions), envs.steps, "step", "playing again")
    for row in actions[envs.steps :]:
        for i in np.flatnonzero(begins == envs.steps).tolist():
            envs.begin(i)  # until now it played another episode
        seen = envs.obs
        replay.add(seen, row, *envs.step(row)[:3])
        bar.update()
        require(not run.stops, f"stopped; continue with --resume {run.path}", 75)
    bar.close()
    envs.began = began
    same = np.array_equal(envs.obs, obs.numpy())
    require(same, "--resume: the episodes went differently; install the packages in versions.json")


# <<< shared: mujoco-replay
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
Real = Annotated[float, (-LARGEST, LARGEST, "finite"), tyro.conf.arg(metavar="X")]


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
        require(self.tau > 0, "--tau: must be above 0")
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
