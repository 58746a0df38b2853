"""Steps per second of the MinAtar scripts and of a plain DQN in CleanRL's manner, in turn.

    python benchmark/speed_minatar.py --repeats 5

Each program plays Breakout at width 1 with one gradient step in four steps and 1 % of random
actions, on one thread. What counts is the CPU time of a long run less that of a short one, so that
imports and other programs on the machine count for nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

SCRIPTS = Path(__file__).resolve().parent.parent / "cleanrl_sparse"
STARTS = 1000  # steps before the first gradient step


@dataclasses.dataclass
class Args:
    """Flags."""

    # programs to measure
    programs: tuple[str, ...] = ("plain", "eaudeqn K=1", "eaudeqn K=5", "gmp dense", "gmp 95 %")
    repeats: int = 5  # times that each program runs
    steps: int = 20_000  # steps that are timed
    game: str = "Breakout"  # one of a single word
    plain: int = 0  # be the plain program, for as many steps; the other flags have no part in it


class Buffer:
    """Replay of observations as floats, as Stable-Baselines3 has it for CleanRL."""

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self.size, self.count = size, 0
        self.obs = np.zeros((size, *shape), np.float32)
        self.next_obs = np.zeros((size, *shape), np.float32)
        self.actions = np.zeros((size, 1), np.int64)
        self.rewards = np.zeros(size, np.float32)
        self.dones = np.zeros(size, np.float32)

    def add(
        self, obs: np.ndarray, next_obs: np.ndarray, action: int, reward: float, done: bool
    ) -> None:
        """Store a transition."""
        i = self.count % self.size
        self.obs[i], self.next_obs[i], self.actions[i] = obs, next_obs, action
        self.rewards[i], self.dones[i] = reward, done
        self.count += 1

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """Draw transitions uniformly."""
        rows = np.random.randint(0, min(self.count, self.size), batch_size)
        arrays = (self.obs, self.next_obs, self.actions, self.rewards, self.dones)
        return [torch.tensor(array[rows]) for array in arrays]


def plain(args: Args) -> None:
    """Train a DQN as CleanRL's dqn_atari.py does, but act without gradients."""
    logging.disable()
    env = import_module("minatar").Environment(args.game.lower())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    env.seed(1)
    env.reset()
    actions, channels = env.minimal_action_set(), env.state_shape()[2]
    q_network = nn.Sequential(
        nn.Conv2d(channels, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, len(actions)),
    )
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=2.5e-4)
    buffer = Buffer(100_000, (channels, 10, 10))
    writer = SummaryWriter(tempfile.mkdtemp())
    start, episodic_return = time.time(), 0.0
    obs = env.state().transpose(2, 0, 1).astype(np.float32)
    for global_step in range(args.plain):
        epsilon = 1.0 if global_step < STARTS else 0.01
        if random.random() < epsilon:
            action = random.randrange(len(actions))
        else:
            with torch.no_grad():
                q_values = q_network(torch.tensor(obs).unsqueeze(0))
            action = int(torch.argmax(q_values, dim=1)[0])
        reward, done = env.act(actions[action])
        next_obs = env.state().transpose(2, 0, 1).astype(np.float32)
        episodic_return += reward
        buffer.add(obs, next_obs, action, reward, done)
        obs = next_obs
        if done:
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            episodic_return = 0.0
            env.reset()
            obs = env.state().transpose(2, 0, 1).astype(np.float32)
        if global_step > STARTS and global_step % 4 == 0:
            batch_obs, batch_next_obs, batch_actions, rewards, dones = buffer.sample(32)
            with torch.no_grad():
                target_max, _ = target_network(batch_next_obs).max(dim=1)
                td_target = rewards + 0.99 * target_max * (1 - dones)
            old_val = q_network(batch_obs).gather(1, batch_actions).squeeze()
            loss = nn.functional.mse_loss(td_target, old_val)
            if global_step % 100 == 0:
                writer.add_scalar("losses/td_loss", loss, global_step)
                sps = int(global_step / (time.time() - start))
                writer.add_scalar("charts/SPS", sps, global_step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if global_step > STARTS and global_step % 4000 == 0:
            target_network.load_state_dict(q_network.state_dict())
    writer.close()


def seconds(args: Args, program: str, steps: int) -> float:
    """Return the CPU time of a run of some steps."""
    if program == "plain":
        flags = [__file__, "--plain", str(steps), "--game", args.game]
    else:
        own = {
            "eaudeqn K=1": ("eaudeqn_minatar", "--num-networks", "1", "--no-reset-optimizer"),
            "eaudeqn K=5": ("eaudeqn_minatar",),
            "gmp dense": ("dqn_minatar_gmp", "--sparsity", "0"),
            "gmp 95 %": ("dqn_minatar_gmp",),
        }[program]
        flags = [str(SCRIPTS / f"{own[0]}.py"), *own[1:], "--env-id", args.game]
        flags += ["--total-timesteps", str(steps), "--learning-starts", str(STARTS)]
        flags += ["--epsilon-steps", "1", "--eval-episodes", "0", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        places = {"TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *flags]
        subprocess.run(
            command, cwd=folder, env=os.environ | places, capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(args: Args) -> None:
    """Measure all in turn and print the medians, and the ratios to the first program's speed."""
    speeds: dict[str, list[float]] = {name: [] for name in args.programs}
    short = 2 * STARTS
    for repeat in range(args.repeats):
        for name, values in speeds.items():
            taken = seconds(args, name, short + args.steps) - seconds(args, name, short)
            values.append(args.steps / taken)
            print(f"run {repeat + 1}: {name}: {values[-1]:.0f} steps/s", flush=True)
    print("\n| program | steps/s, median | lowest | highest | ratio |\n|---|---|---|---|---|")
    base = statistics.median(speeds[args.programs[0]])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | "
            f"{median / base:.2f} |"
        )


if __name__ == "__main__":
    flags = tyro.cli(Args, description=(__doc__ or "").partition("\n")[0])
    plain(flags) if flags.plain else main(flags)
