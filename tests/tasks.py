"""Small networks, which stand in for the scripts' own, and a small task with frames, for the tests
of the methods.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")


def filled_replay(
    module: ModuleType, size: int, steps: int, device: torch.device = CPU, **flags: Any
) -> Any:
    """Return a replay of random frames [size, size]; three steps in ten end an episode, by
    termination or truncation.
    """
    rng = np.random.default_rng(0)
    args = module.Args(buffer_size=steps, **flags)
    kind = getattr(module, "PrioritisedReplay", module.FrameReplay)
    kind = type("Short", (kind,), {"EPISODE": 1})
    replay = kind(args, device, rng.integers(0, 256, (1, size, size), dtype=np.uint8))
    for _ in range(steps):
        ended = rng.random(1) < 0.3
        terminated = ended & (rng.random(1) < 0.5)
        last, frames = rng.integers(0, 256, (2, 1, size, size), dtype=np.uint8)
        step = (rng.normal(size=1) * 9, terminated, ended & ~terminated, last)
        replay.add(rng.integers(0, 4, 1), step, frames)
    return replay


class Small(nn.Module):
    """A network of two convolutions and two matrices on obs [B, 4, 12, 12]."""

    def __init__(self, num_actions: int, args: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(8, 8, 3)  # 12 -> 5 -> 3
        self.dense = nn.Linear(72, args.feature_size)
        self.output = nn.Linear(args.feature_size, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(obs))))
        return self.output(F.relu(self.dense(x.flatten(1))))


class Tiny(nn.Module):
    """A network of 48 weights, for 4 actions, on obs [B, 4, 1, 1], for what needs many calls."""

    def __init__(self, num_actions: int, args: Any) -> None:
        super().__init__()
        self.dense, self.output = nn.Linear(4, 6), nn.Linear(6, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        return self.output(F.relu(self.dense(obs.flatten(1))))


def params(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def constant(network: nn.Module, values: list[float]) -> None:
    """Make a Tiny network answer `values` whatever it sees."""
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.output.bias.copy_(torch.tensor(values))


class CatchNetwork(nn.Module):
    """A small network on obs [B, 4, 42, 42]; the first convolution's windows are Catch's cells."""

    def __init__(self, num_actions: int, args: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 16, 6, stride=6), nn.Conv2d(16, 16, 3)  # 42 -> 7 -> 5
        self.dense = nn.Linear(400, args.feature_size)
        self.output = nn.Linear(args.feature_size, num_actions)
        for p in self.parameters():
            if p.ndim == 1:
                nn.init.zeros_(p)
            else:
                nn.init.xavier_uniform_(p)

    def forward(self, obs: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(obs))))
        return self.output(F.relu(self.dense(x.flatten(1))))


class Catch:
    """A ball falls through 7x7 cells of 6x6 pixels in six steps; the paddle below moves left, stays
    or moves right.

    The reward is 1 for a catch, -1 for a miss, and either ends the episode.
    step() returns what AtariEnvs.recv() does.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.episodes: list[tuple[float, int]] = []
        self.begin()

    def begin(self) -> None:
        self.row, self.ball, self.paddle = 0, int(self.rng.integers(7)), 3
        self.obs = np.zeros((1, 4, 42, 42), np.uint8)
        self.draw()

    def draw(self) -> None:
        cells = np.zeros((7, 7), np.uint8)
        cells[6, self.paddle] = 128
        cells[self.row, self.ball] = 255
        self.obs = np.concatenate([self.obs[:, 1:], cells.repeat(6, 0).repeat(6, 1)[None, None]], 1)

    def step(self, action: int) -> tuple[np.ndarray, ...]:
        self.paddle = min(max(self.paddle + action - 1, 0), 6)
        self.row += 1
        self.draw()
        last_frames, ended = self.obs[:, -1], self.row == 6
        reward = float(ended and (1 if self.ball == self.paddle else -1))
        if ended:
            self.begin()
        self.episodes = [(reward, 6)] if ended else []
        return np.array([reward]), np.array([ended]), np.array([False]), last_frames


CATCH_FLAGS: dict[str, Any] = {
    "feature_size": 512,
    "learning_rate": 2e-4,
    "prune_every": 50,
    "total_timesteps": 24_000,
    "buffer_size": 24_000,
    "learning_starts": 1_000,
}


def catch_return(module: ModuleType, agent: Any) -> float:
    """Train an agent with a pruning schedule on Catch for 24,000 steps; return the mean of its last
    200 returns.
    """
    env, returns = Catch(1), list[float]()
    kind = getattr(module, "PrioritisedReplay", module.FrameReplay)
    replay = kind(agent.args, CPU, env.obs[:, -1])
    for step in range(1, 24_001):
        actions = agent.act(env.obs, max(0.01, min(1.0, 1 - 0.99 * (step - 1_000) / 2_400)))
        replay.add(actions, env.step(int(actions[0])), env.obs[:, -1])
        returns += [score for score, _ in env.episodes]
        agent.learn(replay, step)
        if step > 1_004 and step % 80 == 0:
            agent.update_target()
    print("\nreturns", *(f"{np.mean(returns[i : i + 400]):.2f}" for i in range(0, 4000, 400)))
    return float(np.mean(returns[-200:]))
