# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=2", "gymnasium>=1.2", "mujoco>=3.3", "imageio>=2.14",
#                 "tyro>=0.9", "safetensors>=0.5", "tensorboard>=2.18", "tqdm>=4.66", "wandb>=0.18",
#                 "minari[hf]>=0.5", "h5py>=3.11", "pillow>=10"]
# ///
"""Conservative Q-learning on a fixed dataset, pruned once, before training starts.

Paper: Arnob, Ohib, Plis, Precup, "Single-Shot Pruning for Offline Reinforcement Learning", 2021,
arXiv 2112.15579. Its full text and code could not be found: this is SNIP at initialisation (Lee et
al. 2019) on CQL (Kumar et al. 2020) with CORL's settings, not a reproduction of its table.

Each weight is scored on one batch of the dataset by how much its removal would change the loss
(SNIP) or the norm of its gradient (GraSP). 95 % are removed for good; CQL trains the rest.

    python cql_offline_snip.py --dataset mujoco/hopper/medium-v0        # a Minari dataset's id
    python cql_offline_snip.py --dataset medium.hdf5 --env-id Hopper-v4 # a D4RL file
    python cql_offline_snip.py --dataset DATASET --pruner grasp --sparsity 0.5
    python cql_offline_snip.py --dataset DATASET --pruner none          # dense CQL
    python cql_offline_snip.py --resume RUN_DIR

Differences from the paper, and guesses ([C] read in others' code, [I] inferred, [D] ours):
 1. [I] SNIP: |w * dL/dw|, no new initialisation. GraSP: the largest w * (H g), without temperature.
    Random and magnitude are controls; magnitude compares within each layer only, as the last
    layers start so small that they would lose all their weights [D].
 2. [I] L is each network's own loss: TD and CQL term for the critics, the policy loss for the
    actor. One threshold for the actor, one for both critics; all weight matrices, no biases.
 3. [D] If a layer loses all its weights, the run ends before it starts.
 4. [C] CQL as in CORL: alpha 10, 10 actions each from uniform, pi(s) and pi(s'), importance
    weights, no entropy backup. [D] CORL normalises hopper-medium's rewards: --normalize-rewards.
 5. [D] CORL's offset of -1 on the log standard deviation is the actor's initial bias; its factor is
    left out.
 6. [D] The saved networks take raw observations: the standardisation is folded into them.

Figures: benchmark/cql_pruners.sh: return against sparsity. More: docs/cql_offline_snip.md.
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
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

try:
    import h5py
    import minari
except ImportError as error:
    sys.exit(f"{error}: pip install 'minari[hf]' h5py pillow, or pip install -e '.[offline]'")


@dataclass
class Training:
    """The data and the agent; the defaults are CORL's. A step is a gradient step."""

    dataset: str = ""  # Minari id, folder of a Minari dataset, or .hdf5 file in D4RL's format
    env_id: str = ""  # environment to evaluate in; needed if the dataset names none
    seed: Index = 1  # random seed
    total_timesteps: Count = 1_000_000  # total gradient steps
    batch_size: Count = 256  # transitions per gradient step
    learning_rate: Rate = 3e-4  # Adam's step size for the critics
    actor_learning_rate: Rate = 3e-5  # Adam's step size for actor and temperature
    gamma: Share = 0.99  # discount factor
    tau: Share = 0.005  # Polyak coefficient: step of the targets to the critics
    target_entropy: Real = -1.0  # entropy that the temperature aims at, per action dimension
    entropy_backup: bool = False  # bootstrap from the soft value, with the entropy, as in SAC
    cql_alpha: Amount = 10.0  # weight of the conservative term
    cql_actions: Count = 10  # actions of each kind in that term: uniform, pi(s), pi(s')
    cql_gap: Real = -1.0  # gap that a Lagrange multiplier aims at; below 0: no multiplier
    normalize_rewards: bool = False  # times 1000 / (best - worst episode return in the dataset)
    width: Count = 1  # 256 * width units in each hidden layer
    layers: Count = 3  # hidden layers
    epoch_steps: Count = 5_000  # gradient steps per epoch; each ends with an evaluation
    eval_episodes: Index = 10  # episodes of each evaluation, without noise; 0: no evaluations
    eval_steps: Count = 1_000  # steps after which an evaluation episode is cut off


@dataclass
class Method:
    """Single-shot pruning."""

    pruner: Literal["snip", "grasp", "random", "magnitude", "none"] = "snip"  # weights' scores
    sparsity: Share = 0.95  # share of the prunable weights to remove; 0: none
    prune_batches: Count = 1  # batches that SNIP and GraSP score on


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
class CQL(nn.Module):
    """The actor with its temperature, two critics, and the two targets that follow them."""

    def __init__(self, args: Args, obs_size: int, num_actions: int, device: torch.device) -> None:
        super().__init__()
        self.args, self.obs_size, self.device = args, obs_size, device
        units, layers = 256 * args.width, args.layers
        torch.manual_seed(args.seed)
        self.actor = Actor(obs_size, num_actions, units, layers)
        for layer in self.actor:  # CORL's initialisation: torch's, with small last layers
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.xavier_uniform_(self.actor.output.weight, gain=1e-2)
        with torch.no_grad():
            self.actor.output.bias.copy_(torch.tensor([0.0, -1.0]).repeat_interleave(num_actions))
        self.actor.to(device)
        stacks = critic_stacks(2, obs_size + num_actions, units, layers)
        for weight, n in product(stacks[::2], range(2)):
            nn.init.orthogonal_(weight[n], 1e-2 if weight is stacks[-2] else math.sqrt(2))
        self.critics = nn.ParameterList(stack.to(device) for stack in stacks)
        self.stacks: list[Tensor] = list(self.critics)
        self.followed = [stack.detach() for stack in self.stacks]  # by actor and targets
        self.targets: Any = [nn.Parameter(x.clone(), requires_grad=False) for x in self.followed]
        self.target_critics = nn.ParameterList(self.targets)  # for state_dict(); slow to iterate
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.log_multiplier = nn.Parameter(torch.ones((), device=device))
        self.groups = [self.stacks[::2], list(prunable(self.actor).values())]  # a threshold each
        self.weights = [weight for group in self.groups for weight in group]
        self.masks = [torch.ones_like(weight) for weight in self.weights]
        for i, mask in enumerate(self.masks):
            self.register_buffer(f"mask{i}", mask)
        adam: Any = {"fused": True, "capturable": args.compile}
        critics = [*self.stacks, self.log_multiplier]
        self.critic_optimizer = torch.optim.Adam(critics, args.learning_rate, **adam)
        policy = [*self.actor.parameters(), self.log_alpha]
        self.actor_optimizer = torch.optim.Adam(policy, args.actor_learning_rate, **adam)
        self.latest = nn.Buffer(torch.full((7,), math.nan, device=device))  # values to log
        self.graph: torch.cuda.CUDAGraph | None = None

    def get_extra_state(self) -> list[dict[str, Any]]:
        """Return what state_dict() holds besides networks, masks and temperature."""
        return [self.critic_optimizer.state_dict(), self.actor_optimizer.state_dict()]

    def set_extra_state(self, state: list[dict[str, Any]]) -> None:
        """Restore what get_extra_state() returned."""
        self.critic_optimizer.load_state_dict(state[0])
        self.actor_optimizer.load_state_dict(state[1])

    def loss(self, batch: Any, precision: str = "fp32") -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of the critics and of actor with temperature, and values to log [7].

        Each loss is for its own parameters. The dataset's actions and all those of the
        conservative term go through the critics in one pass.
        """
        obs, actions, next_obs, rewards, terminated, noise, uniform = batch
        args, alpha = self.args, self.log_alpha.detach().exp()
        with torch.autocast(self.device.type, torch.bfloat16, precision == "bf16"):
            new_actions, log_prob = self.actor.sample(obs, noise[0])  # [1 + n, B, A] and [1 + n, B]
            with torch.no_grad():
                next_actions, next_log_prob = self.actor.sample(next_obs, noise[1])
                next_q = critic_values(self.targets, next_obs, next_actions[0]).amin(0)  # [B]
                if args.entropy_backup:
                    next_q = next_q - alpha * next_log_prob[0]
                td_target = rewards + args.gamma * (1 - terminated) * next_q
                queried = torch.cat([actions[None], uniform, next_actions[1:], new_actions[1:]])
                uniform_log_prob = torch.full_like(log_prob[1:], -math.log(2) * actions.shape[1])
                log_density = torch.cat([uniform_log_prob, next_log_prob[1:], log_prob[1:]])
            q = critic_values(self.stacks, obs.repeat(len(queried), 1), queried.flatten(0, 1))
            new_q = critic_values(self.followed, obs, new_actions[0]).amin(0)  # [B]
        q = q.unflatten(1, queried.shape[:2])  # [2, 1 + 3n, B]
        td_losses = (q[:, 0] - td_target).square().mean(1)  # [2]
        gaps = (torch.logsumexp(q[:, 1:] - log_density, 1) - q[:, 0]).mean(1)  # [2]
        if args.cql_gap < 0:
            penalties = args.cql_alpha * gaps
            critic_loss = (td_losses + penalties).sum()
        else:
            penalties = args.cql_alpha * (gaps - args.cql_gap)
            multiplier = self.log_multiplier.exp().clamp(max=1e6)
            critic_loss = (td_losses + multiplier.detach() * penalties).sum()
            critic_loss = critic_loss - 0.5 * multiplier * penalties.detach().sum()
        actor_loss = (alpha * log_prob[0] - new_q).mean()
        entropy_gap = log_prob[0].detach().mean() + args.target_entropy * actions.shape[1]
        alpha_loss = -self.log_alpha * entropy_gap
        logged = [q[:, 0].mean(), penalties.mean(), actor_loss, alpha, alpha_loss]
        return critic_loss, actor_loss + alpha_loss, torch.stack([*td_losses, *logged]).detach()

    def update(self, *batch: Tensor) -> None:
        """Take one gradient step, without waiting for the device; gradients are dense."""
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
    def scores(self, batches: list[Any]) -> list[list[Tensor]]:
        """Return the scores of the critics' and the actor's weights; the largest are kept."""
        if self.args.pruner == "random":  # not from the weights' own random numbers
            rng = np.random.default_rng((self.args.seed, 1))
            draws = [[rng.random(w.shape, np.float32) for w in group] for group in self.groups]
            return [[torch.from_numpy(x).to(self.device) for x in group] for group in draws]
        if self.args.pruner == "magnitude":  # ranks in a layer: scales differ
            return [[-magnitude_rank(w) / w.numel() for w in group] for group in self.groups]
        scores = list[list[Tensor]]()
        for which, group in enumerate(self.groups):
            gradient = [torch.zeros_like(w) for w in group]
            for batch in batches:  # of the mean loss over the batches
                parts = torch.autograd.grad(self.loss(batch)[which], group)
                gradient = [g + part / len(batches) for g, part in zip(gradient, parts)]
            if self.args.pruner == "snip":
                scores.append([(w.detach() * g).abs() for w, g in zip(group, gradient)])
                continue
            curved = [torch.zeros_like(w) for w in group]  # H g: gradient of g . (g held fixed)
            for batch in batches:
                parts = torch.autograd.grad(self.loss(batch)[which], group, create_graph=True)
                product = torch.stack([(g * part).sum() for g, part in zip(gradient, parts)]).sum()
                seconds = torch.autograd.grad(product, group)
                curved = [h + part / len(batches) for h, part in zip(curved, seconds)]
            scores.append([w.detach() * h for w, h in zip(group, curved)])
        return scores

    @torch.no_grad()
    def prune(self, batches: list[Any]) -> None:
        """Remove the weights with the smallest scores, once; no layer may end up empty.

        Counts are exact within a group, and ties go to the lower index.
        """
        args = self.args
        if args.pruner == "none" or args.sparsity == 0:
            return
        with torch.enable_grad():
            scores = self.scores(batches)
        keep = list[Tensor]()
        for group, parts in zip(self.groups, scores):
            flat = torch.cat([part.flatten() for part in parts]).cpu().numpy()
            line = f"--dataset {args.dataset}: the scores of --pruner {args.pruner} are not finite"
            require(bool(np.isfinite(flat).all()), line)
            kept = max(1, round(len(flat) * (1 - args.sparsity)))
            threshold = np.partition(flat, -kept)[-kept]
            chosen = flat > threshold
            chosen[np.flatnonzero(flat == threshold)[: kept - chosen.sum()]] = True
            keep += torch.from_numpy(chosen).split([w.numel() for w in group])
        for weight, mask, chosen in zip(self.weights, self.masks, keep):
            weight.mul_(mask.copy_(chosen.view(mask.shape)))
        torch._foreach_copy_(self.targets, self.followed)
        empty = [name for name, weight in prunable(self.networks()).items() if not weight.any()]
        line = f"--pruner {args.pruner} --sparsity {args.sparsity}: nothing would be left of"
        require(not empty, f"{line} {', '.join(empty)} (layer collapse); lower --sparsity")

    @torch.no_grad()
    def networks(self, mean: Any = 0.0, std: Any = 1.0) -> nn.ModuleDict:
        """Return copies of the networks for raw observations with this mean and std [O]."""
        qf1, qf2 = (critic_network(self.followed, n) for n in range(2))
        shared = nn.ModuleDict({"actor": self.actor, "qf1": qf1, "qf2": qf2})
        networks, size = copy.deepcopy(shared), self.obs_size
        network: Any
        for network in networks.values():  # W (x - mean) / std + b = (W / std) (x - mean) + b
            first = network[0]
            first.weight[:, :size] /= torch.as_tensor(std).to(first.weight)
            shift = torch.as_tensor(mean).to(first.weight).expand(size)
            first.bias -= first.weight.contiguous()[:, :size] @ shift
        return networks

    def report(self) -> dict[str, float]:
        """Return the values to log, of the latest update and of the networks to save."""
        names = ("qf1_loss", "qf2_loss", "q_values", "cql_loss")
        latest = zip((*names, "actor_loss", "alpha", "alpha_loss"), self.latest.tolist())
        record = {f"losses/{name}": x for name, x in latest if math.isfinite(x)}
        return record | sparsity_report(self.networks())


def magnitude_rank(weight: Tensor) -> Tensor:
    """Return each weight's rank by magnitude, from 0 for the largest; ties by lower index."""
    order = (-weight.detach().abs().flatten()).argsort(stable=True)
    return order.argsort().view(weight.shape)


def main(args: Args) -> None:
    """Prune, train, evaluate the policy, and write the results."""
    device = find_device(args)
    require(device.type != "cpu" or not args.compile, "--compile: only with --device cuda")
    data, env_id = read_dataset(args.dataset)
    args.env_id = args.env_id or env_id
    require(args.env_id != "", f"--env-id is missing: {args.dataset} names no environment")
    envs = MujocoEnvs(args.env_id, 1, args.seed)
    same = env_id.partition("-")[0] in ("", envs.title.partition("-")[0])
    require(same, f"--env-id {args.env_id}: {args.dataset} was recorded in {env_id}")
    data = normalized(data) if args.normalize_rewards else data
    dataset = Dataset(data, envs, args, device)
    agent = CQL(args, envs.obs.shape[1], envs.num_actions, device)
    agent.prune([dataset.sample(args.batch_size) for _ in range(args.prune_batches)])
    digest_file = Path(args.resume, "dataset.sha256")
    same = not args.resume or not digest_file.exists() or digest_file.read_text() == dataset.digest
    require(same, f"--dataset {args.dataset} has changed since the run in {args.resume} began")
    if Path(args.dataset).exists():
        args.dataset = str(Path(args.dataset).absolute())  # --resume may come from elsewhere
    run = Run(args, envs.title)
    run.write(digest_file.name, dataset.digest.encode())
    step = 0
    if saved := run.load():
        step = saved["step"]
        agent.load_state_dict(saved["agent"])
        dataset.generator.set_state(saved["sampling"])
    else:
        run.log(0, agent.report())  # the sparsity of each layer
    bar = progress_bar(args.total_timesteps, step, "step")

    while step < args.total_timesteps:
        # Learn until something is due: every 100 steps, at an epoch's end, at the run's end.
        previous = step
        ends = [previous - previous % period + period for period in (100, args.epoch_steps)]
        step = min(*ends, args.total_timesteps)
        ended = step >= args.total_timesteps
        for _ in range(step - previous):
            agent.captured_update(dataset)
        if not agent.latest.isfinite().all():
            kept = f"checkpoint kept: {run.newest[:12] or 'none'}"
            require(False, f"step {step}: the losses are {agent.latest.tolist()}; {kept}", 1)
        # Log.
        bar.update(step - previous)
        if ended or step % args.epoch_steps == 0 or step % 1000 == 0:
            record = agent.report() | {
                "charts/SPS": (bar.n - bar.initial) / bar.format_dict["elapsed"],
                "charts/learning_rate": args.learning_rate,
                "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            if step % args.epoch_steps == 0 and args.eval_episodes > 0 and not ended:
                actor: Any = agent.networks(dataset.mean, dataset.std)["actor"]
                record |= evaluate(actor, args)
                epoch_return = record["eval/episodic_return"]
                text = f"return {epoch_return:.1f}, sparsity {record['sparsity/prunable']:.3f}"
                bar.set_postfix_str(text, refresh=False)
            run.log(step, record)
        # Save.
        if run.stops or ended or time.monotonic() - run.saved_at >= 60 * args.checkpoint_minutes:
            sampling = dataset.generator.get_state()
            run.save(step, {"agent": agent.state_dict(), "sampling": sampling})

    bar.close()
    networks: Any = agent.networks(dataset.mean, dataset.std)
    scores = evaluate(networks["actor"], args, run)
    run.finish(step, networks, scores, epoch_return=scores.get("eval/episodic_return"))


class Data(NamedTuple):
    """Transitions of a dataset, in its order."""

    obs: np.ndarray  # [n, O] float32
    actions: np.ndarray  # [n, A] float32
    rewards: np.ndarray  # [n] float32
    next_obs: np.ndarray  # [n, O] float32, the true last observation at a truncation
    terminated: np.ndarray  # [n] bool, not at a timeout
    ended: np.ndarray  # [n] bool, last of its episode; False where a recording breaks off


def checked(where: str, array: Any, n: int, dims: int, flags: bool = False) -> np.ndarray:
    """Return an array of n rows as float32, or as bool if it holds flags; refuse others."""
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
    require(numbers, f"{where} must be numbers")
    array = array[:, 0] if dims == 1 and array.shape == (n, 1) else array
    shape = f"[{n}]" if dims == 1 else f"[{n}, any]"
    fits = array.ndim == dims and len(array) == n
    require(fits, f"{where} must have the shape {shape}, not {[*array.shape]}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    require(bool(np.isfinite(array).all()), f"{where} must be finite in float32")
    require(not flags or bool(np.isin(array, (0, 1)).all()), f"{where} must be 0 or 1")
    return array == 1 if flags else array


def read_d4rl(name: str) -> Data:
    """Read an HDF5 file in D4RL's format.

    Keys: observations, actions, rewards, terminals, and timeouts or next_observations or both.
    Without timeouts an episode ends where the next observation is not the next row's. Without
    next_observations the next row's are used, and rows without a successor in their episode are
    left out: timeouts and the last row of the file, unless terminal. Terminal rows do not
    bootstrap; for CQL's term the next episode's start is a state like any other, as in CORL.
    """
    where = f"--dataset {name}:"
    with h5py.File(name) as file:
        found = {key: item[()] for key, item in file.items() if isinstance(item, h5py.Dataset)}
    for key in ("observations", "actions", "rewards", "terminals"):
        require(key in found, f"{where} the key {key} is missing")
    given = "next_observations" in found
    line = f"{where} timeouts and next_observations are both missing; episode ends are unknown"
    require(given or "timeouts" in found, line)
    n = len(np.atleast_1d(found["observations"]))
    obs = checked(f"{where} observations", found["observations"], n, 2)
    actions = checked(f"{where} actions", found["actions"], n, 2)
    rewards = checked(f"{where} rewards", found["rewards"], n, 1)
    terminated = checked(f"{where} terminals", found["terminals"], n, 1, flags=True)
    next_obs = np.concatenate([obs[1:], obs[-1:]])
    if given:
        next_obs = checked(f"{where} next_observations", found["next_observations"], n, 2)
    same = next_obs.shape == obs.shape
    require(same, f"{where} next_observations must have observations' shape")
    timeouts = np.append((next_obs[:-1] != obs[1:]).any(1), False)
    if "timeouts" in found:
        timeouts = checked(f"{where} timeouts", found["timeouts"], n, 1, flags=True)
    ended, kept = terminated | timeouts, np.ones(n, bool)
    if not given:
        kept = ~timeouts | terminated
        kept[-1:] &= terminated[-1:]
        ended[:-1] |= (timeouts & ~terminated)[1:]  # the row before a left-out one is the last
    return Data(*(x[kept] for x in (obs, actions, rewards, next_obs, terminated, ended)))


def find_minari(name: str) -> Path:
    """Return the data folder of a Minari dataset, given its folder or its id.

    A dataset that is not on this machine is fetched.
    """
    for folder in (Path(name, "data"), Path(name)):
        if folder.is_dir():
            return folder
    line = "no such folder, and a Minari id ends with its version, like mujoco/hopper/medium-v0"
    require(name.rpartition("-v")[2].isdigit(), f"--dataset {name}: {line}")
    folder = Path(minari.storage.get_dataset_path(name), "data")
    if not folder.is_dir():
        line = f"--dataset {name}: not on this machine; looked for {folder}"
        require(not name.startswith("local/"), line)
        print(f"--dataset {name}: fetching it; if that is interrupted, delete {folder}")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each retry is reported
        minari.download_dataset(name)
    return folder


def check_recorded_env(where: str, spec: Any, space: Any) -> None:
    """Refuse data from an environment unlike the evaluation's: wrappers, other actions."""
    if known := gym.registry.get(spec.id):
        usual = known.kwargs | {"max_episode_steps": known.max_episode_steps, "render_mode": None}
        settings = spec.kwargs | {"max_episode_steps": spec.max_episode_steps, "render_mode": None}
        special = {key: x for key, x in settings.items() if x != usual.get(key)}
        if special:
            print(f"{where} recorded with {special}; evaluations will be without", file=sys.stderr)
    wrappers = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
    require(not wrappers, f"{where} recorded behind {wrappers}, which evaluations would not have")
    usual_space = make_env(spec.id).action_space
    line = f"{where} its action space is {space}, that of {spec.id} is {usual_space}"
    require(space is None or space == usual_space, line)


def read_minari(name: str) -> tuple[Data, str]:
    """Return the transitions of a Minari dataset and its environment's name, "" if it has none."""
    dataset = minari.MinariDataset(find_minari(name))
    spec, parts = dataset.env_spec, list[tuple[np.ndarray, ...]]()
    if spec:
        check_recorded_env(f"--dataset {name}:", spec, dataset.action_space)
    for episode in dataset.iterate_episodes():
        where, n = f"--dataset {name}: episode {episode.id}:", len(np.atleast_1d(episode.rewards))
        obs = checked(f"{where} observations", episode.observations, n + 1, 2)
        actions = checked(f"{where} actions", episode.actions, n, 2)
        rewards = checked(f"{where} rewards", episode.rewards, n, 1)
        terminated = checked(f"{where} terminations", episode.terminations, n, 1, flags=True)
        truncated = checked(f"{where} truncations", episode.truncations, n, 1, flags=True)
        ended = terminated | truncated | (np.arange(n) == n - 1)
        parts.append((obs[:-1], actions, rewards, obs[1:], terminated, ended))
    require(len(parts) > 0, f"--dataset {name}: no episodes are in it")
    ended[-1] = terminated[-1] | truncated[-1]
    return Data(*map(np.concatenate, zip(*parts))), spec.id if spec else ""


def read_dataset(name: str) -> tuple[Data, str]:
    """Return the transitions of --dataset and its environment's name, "" if it has none."""
    line = "give a Minari id, the folder of a Minari dataset, or a .hdf5 file in D4RL's format"
    require(name != "", f"--dataset is missing: {line}")
    file = Path(name).suffix in (".hdf5", ".h5")
    require(Path(name).exists() or not file, f"--dataset {name}: no such file")
    try:
        data, env_id = (read_d4rl(name), "") if Path(name).is_file() else read_minari(name)
    except Exception as error:  # of any kind, depending on the library
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        verb = "read" if Path(name).exists() else "read or fetched"
        require(False, f"--dataset {name}: cannot be {verb} ({text})")
    require(len(data.obs) > 0, f"--dataset {name}: no transitions are in it")
    return data, env_id


def normalized(data: Data) -> Data:
    """Multiply the rewards by 1000 / (best - worst return of a whole episode)."""
    episodes = np.cumsum(np.concatenate([[0], data.ended[:-1]])).astype(np.int64)
    returns = np.bincount(episodes, data.rewards)
    returns = returns if data.ended[-1] else returns[:-1]
    differ = len(returns) > 0 and bool(np.ptp(returns) > 0)
    require(differ, "--normalize-rewards: needs episodes of different returns in the dataset")
    return data._replace(rewards=(data.rewards * (1000 / np.ptp(returns))).astype(np.float32))


class Dataset:
    """All transitions as rows of a table on the device, observations standardised.

    A row: obs, action in [-1, 1], next_obs, reward, terminated.
    """

    def __init__(self, data: Data, envs: MujocoEnvs, args: Args, device: torch.device) -> None:
        where, env_id = f"--dataset {args.dataset}:", envs.title
        for key, ours, theirs in (
            ("observations", data.obs.shape[1], envs.obs.shape[1]),
            ("actions", data.actions.shape[1], envs.num_actions),
        ):
            require(ours == theirs, f"{where} {key} have {ours} numbers, {env_id}'s have {theirs}")
        actions = (data.actions - envs.middle) / envs.half
        bound = float(np.abs(actions).max())
        require(bound < 1 + 1e-4, f"{where} actions reach {bound:g} times {env_id}'s bounds")
        self.mean = data.obs.mean(0, dtype=np.float64)  # [O]
        self.std = data.obs.std(0, dtype=np.float64) + 1e-3
        obs, next_obs = ((x - self.mean) / self.std for x in (data.obs, data.next_obs))
        columns = [obs, actions.clip(-1, 1), next_obs, data.rewards, data.terminated]
        rows = np.column_stack(columns).astype(np.float32)
        self.digest = hashlib.sha256(rows.tobytes()).hexdigest()
        self.table = torch.from_numpy(rows).to(device)
        self.sizes, self.n = [obs.shape[1], envs.num_actions, obs.shape[1], 1, 1], args.cql_actions
        self.generator = torch.Generator(device).manual_seed(args.seed)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw transitions uniformly, with replacement, without waiting for the device.

        Returns obs [B, O], actions [B, A], next_obs [B, O], rewards, terminated [B], standard
        normal noise [2, 1 + n, B, A], for one action and n of CQL's term at obs and at next_obs,
        and uniform actions [n, B, A], all float32.
        """
        random: Any = {"device": self.table.device, "generator": self.generator}
        rows = torch.randint(len(self.table), (batch_size,), **random)
        noise = torch.randn(2, 1 + self.n, batch_size, self.sizes[1], **random)
        uniform = 2 * torch.rand(self.n, batch_size, self.sizes[1], **random) - 1
        batch = self.table[rows].split(self.sizes, 1)
        return *batch[:3], batch[3][:, 0], batch[4][:, 0], noise, uniform


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
        require(self.tau > 0, "--tau: must be above 0")
        require(self.sparsity < 1, "--sparsity: must be below 1")


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
