"""Tests of EauDeQN itself, in eaudeqn_atari.py: the identities of the method, and that it learns
and prunes.

The references are written here in other words: plain DQN with PyTorch's own loss, and one network
at a time with Adam by its formula.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tasks import CPU, Catch, CatchNetwork, Small, Tiny, all_equal, constant, params
from torch import Tensor, nn


@pytest.fixture
def small(eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with Small for its network."""
    monkeypatch.setattr(eaudeqn, "QNetwork", Small)
    return eaudeqn


@pytest.fixture
def tiny(eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with Tiny for its network."""
    monkeypatch.setattr(eaudeqn, "QNetwork", Tiny)
    return eaudeqn


def agent_of(
    module: ModuleType, num_actions: int = 4, dtype: torch.dtype = torch.float32, **flags: Any
) -> Any:
    flags = {"feature_size": 16, "target_every": 100, **flags}
    agent = module.EauDeQN(module.Args(**flags), num_actions, CPU).to(dtype)
    agent.masks = list(agent.online.buffers())  # to() makes new ones
    return agent


def update_target(agent: Any, step: int, horizon: int) -> int:
    """Update the target at a step of a run of `horizon` steps; return the index of the network
    chosen.
    """
    agent.args.total_timesteps = horizon
    agent.losses = np.array(agent.accumulated_loss.tolist())
    agent.update_target(step)
    return int(agent.selected) - 1


def act(agent: Any, obs: np.ndarray, epsilon: float, losses: list[float]) -> np.ndarray:
    """Return the actions of an agent whose networks have had these losses."""
    agent.losses = np.array(losses)
    actions: np.ndarray = agent.act(obs, epsilon)
    return actions


def batches(
    module: ModuleType, size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, ...]]:
    """Yield random batches for 4 actions, as sample() does; a quarter of the transitions are
    terminal.
    """
    frame = {Small: (12, 12), Tiny: (1, 1)}.get(module.QNetwork, (84, 84))
    rng = torch.Generator().manual_seed(seed)
    while True:
        frames = torch.randint(0, 256, (2, size, 4, *frame), generator=rng)
        actions = torch.randint(0, 4, (size,), generator=rng)
        rewards = torch.randint(-1, 2, (size,), generator=rng)
        terminated = (torch.rand(size, generator=rng) < 0.25).long()
        obs, next_obs = ((f.to(dtype) / 255).to(memory_format=LAST) for f in frames)
        yield obs, next_obs, actions, rewards, terminated


LAST = torch.channels_last


# The degenerate cases


def test_one_network_is_plain_dqn(eaudeqn: ModuleType) -> None:
    """K = 1 without resets, bit for bit over 36 updates of the real network and 4 of the target."""
    agent = agent_of(eaudeqn, num_networks=1, reset_optimizer=False, seed=4)
    torch.manual_seed(4)
    online = eaudeqn.QNetwork(4, agent.args).to(memory_format=LAST)
    target = copy.deepcopy(online)
    adam = torch.optim.Adam(online.parameters(), lr=6.25e-5, eps=1.5e-4, fused=True)
    assert all_equal(params(agent.online[0]), params(online))
    for i, batch in enumerate(batches(eaudeqn), 1):
        agent.update(*batch)

        obs, next_obs, actions, rewards, terminated = batch
        with torch.no_grad():
            bootstrap = 0.99 * (1 - terminated) * target(next_obs).max(1).values
        q = online(obs)[torch.arange(4), actions]
        loss = F.mse_loss(q, rewards + bootstrap)
        adam.zero_grad()
        loss.backward()
        adam.step()

        assert all_equal(params(agent.online[0]), params(online)), f"update {i}"
        if i % 8 == 0:
            assert update_target(agent, i * 100, 5000) == 0
            target.load_state_dict(online.state_dict())
            assert all_equal(params(agent.target), params(target))
        if i == 36:
            break
    assert agent.sparsity == [0.0]


def test_no_exponent_keeps_all_dense_and_equal(small: ModuleType) -> None:
    agent = agent_of(small, num_networks=3, max_exponent=0.0, max_sparsity_step=1.0)
    stream, start = batches(small), params(agent.target)
    for step in range(1, 10):
        agent.update(*next(stream))
        assert all(all_equal(params(network), params(agent.online[0])) for network in agent.online)
        losses = agent.accumulated_loss.tolist()
        assert losses == [losses[0]] * 3 and losses[0] > 0
        if step % 3 == 0:
            assert update_target(agent, 100 * step, 1000) == 0  # ties choose the first
    assert agent.sparsity == [0.0] * 3
    assert all(mask.all() for mask in agent.masks)
    assert small.sparsity_report(agent.online[2])["sparsity/prunable"] == 0
    assert all_equal(params(agent.target), params(agent.online[0])) and not all_equal(
        params(agent.target), start
    )


def test_all_start_as_copies(small: ModuleType) -> None:
    agent = agent_of(small, num_networks=3, seed=7)
    for network in agent.online:
        assert all_equal(params(network), params(agent.target))
    assert (
        len({id(p) for network in [agent.target, *agent.online] for p in network.parameters()})
        == 4 * 8
    )
    assert not all_equal(params(agent.target), params(agent_of(small, seed=8).target))


# One gradient step


class Alone:
    """One network, its mask and its Adam by the formula of Kingma and Ba (2015)."""

    def __init__(self, network: nn.Module, masks: dict[int, Tensor]) -> None:
        self.network, self.masks = copy.deepcopy(network), masks
        self.moments = [
            (torch.zeros_like(p), torch.zeros_like(p)) for p in self.network.parameters()
        ]
        self.steps, self.loss = 0, 0.0

    def update(self, batch: tuple[Tensor, ...], target: nn.Module, rate: float, eps: float) -> None:
        obs, next_obs, actions, rewards, terminated = batch
        after = target(next_obs).detach()
        q = self.network(obs)
        loss = torch.zeros((), dtype=obs.dtype)
        for i in range(len(q)):
            bootstrap = 0.0 if terminated[i] else 0.99 * max(after[i].tolist())
            loss = loss + (q[i, actions[i]] - float(rewards[i]) - bootstrap) ** 2
        loss = loss / len(q)
        parameters = list(self.network.parameters())
        grads = torch.autograd.grad(loss, parameters)
        self.steps += 1
        self.loss += float(loss.detach())
        with torch.no_grad():
            for j, (p, grad) in enumerate(zip(parameters, grads)):
                first, second = self.moments[j]
                first = 0.9 * first + 0.1 * grad
                second = 0.999 * second + 0.001 * grad * grad
                self.moments[j] = (first, second)
                unbiased = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
                p -= rate * unbiased[0] / (unbiased[1] ** 0.5 + eps)
                if j in self.masks:
                    p[~self.masks[j]] = 0.0


def masked(agent: Any, k: int) -> dict[int, Tensor]:
    """Return the bool masks of candidate k by the number of the parameter; weights and biases
    alternate.
    """
    return {2 * i: mask.bool().clone() for i, mask in enumerate(agent.online[k].buffers())}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_networks_learn_as_if_alone(
    eaudeqn: ModuleType, dtype: torch.dtype, tolerance: float
) -> None:
    """Four candidates of different masks; one of them dense. A step moves weights by the learning
    rate, 1e-3.
    """
    flags = {
        "num_networks": 4,
        "max_sparsity_step": 1.0,
        "learning_rate": 1e-3,
        "adam_eps": 1e-5,
        "target_every": 400,
    }
    agent = agent_of(eaudeqn, dtype=dtype, feature_size=8, **flags)
    stream = batches(eaudeqn, dtype=dtype)
    agent.update(*next(stream))
    update_target(agent, 400, 1000)  # a third is left of the run, so that up to 0.96 is pruned
    assert len(set(agent.sparsity)) == 4 and agent.sparsity[0] == 0 and max(agent.sparsity) > 0.4
    alone = [Alone(online, masked(agent, k)) for k, online in enumerate(agent.online)]
    for _ in range(3):
        batch = next(stream)
        agent.update(*batch)
        for other in alone:
            other.update(batch, agent.target, 1e-3, 1e-5)
    start = params(agent.target)
    for k, other in enumerate(alone):
        for p, q, before in zip(agent.online[k].parameters(), other.network.parameters(), start):
            assert p.dtype == dtype and float((p - q).detach().abs().max()) < tolerance
            assert float((p - before).detach().abs().max()) > 5e-4
    losses = [other.loss for other in alone]
    assert agent.accumulated_loss.tolist() == pytest.approx(
        losses, rel=1e-12 if dtype == torch.float64 else 1e-5
    )


def test_loss_by_hand(tiny: ModuleType) -> None:
    """Squared TD error, mean over the batch; a terminal state masks the bootstrap, the reward
    stays.
    """
    agent = agent_of(tiny, num_actions=2, num_networks=2, gamma=0.5)
    constant(agent.target, [3.0, 1.0])
    constant(agent.online[0], [0.5, 2.0])
    constant(agent.online[1], [1.0, -6.0])
    obs = torch.zeros(2, 4, 1, 1)
    actions, rewards, terminated = torch.tensor([[0, 1], [1, -1], [0, 1]])
    agent.update(obs, obs, actions, rewards, terminated)
    # Targets 1 + 0.5 * 3 = 2.5 and -1. First network: (0.5 - 2.5)^2 = 4 and 3^2 = 9. Second: 1.5^2
    # = 2.25 and 5^2 = 25.
    assert agent.accumulated_loss.tolist() == [6.5, 13.625]
    # Gradients of the output biases: (2 * error) / 2 = (-2, 3) and (-1.5, -5). Adam's first step is
    # the sign's.
    rate = 6.25e-5
    assert agent.online[0].output.bias.tolist() == pytest.approx([0.5 + rate, 2 - rate], abs=1e-6)
    assert agent.online[1].output.bias.tolist() == pytest.approx([1 + rate, -6 + rate], abs=1e-6)
    assert agent.target.output.bias.tolist() == [3.0, 1.0]


def test_frames_are_scaled(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What acts sees bytes / 255."""
    agent, seen = agent_of(tiny, num_networks=1), []
    monkeypatch.setattr(Tiny, "forward", lambda self, obs: (seen.append(obs), torch.eye(4)[:1])[1])
    agent.act(np.array([0, 51, 102, 255], np.uint8).reshape(1, 4, 1, 1), 0.0)
    assert seen[0].flatten().tolist() == pytest.approx([0, 0.2, 0.4, 1])


def test_accumulated_loss_is_a_sum(small: ModuleType) -> None:
    """Of the mean losses of the updates since the last update of the target."""
    agent = agent_of(small, num_networks=2, max_exponent=9.0, max_sparsity_step=0.5)
    stream = batches(small)
    for round_ in range(2):
        sums = [0.0, 0.0]
        for _ in range(3):
            batch = next(stream)
            with torch.no_grad():
                obs, next_obs, actions, rewards, terminated = batch
                after = 0.99 * agent.target(next_obs).max(1).values * (1 - terminated)
                for k, online in enumerate(agent.online):
                    q = online(obs).gather(1, actions[:, None])[:, 0]
                    sums[k] += float(F.mse_loss(q, rewards + after))
            agent.update(*batch)
            assert agent.accumulated_loss.tolist() == pytest.approx(sums, rel=1e-4)
        assert sums[0] != sums[1] or round_ == 0
        update_target(agent, 100 + round_, 1000)
        assert agent.accumulated_loss.tolist() == [0.0, 0.0]


def test_learn(small: ModuleType) -> None:
    """One update for every four steps after the warm-up, each from a sample of its own; none
    before.
    """
    rng, replays = np.random.default_rng(0), []
    record = [rng.integers(0, 256, (1, 12, 12), dtype=np.uint8) for _ in range(30)]
    flags: dict[str, Any] = {"batch_size": 8, "buffer_size": 20, "learning_starts": 10}
    agent, other = agent_of(small, **flags), agent_of(small, **flags)
    for _ in range(2):
        replay = small.FrameReplay(agent.args, CPU, record[0])
        for i, frames in enumerate(record):
            ended = np.array([i % 7 == 6])
            step = (np.array([1.0]), ended, ~ended & ended, frames)
            replay.add(np.array([i % 4]), step, frames)
        replays.append(replay)
    for step in range(12):
        agent.learn(replays[0], step)
    assert all_equal(params(agent.online[0]), params(other.online[0]))
    agent.learn(replays[0], 12)
    agent.learn(replays[0], 21)
    assert agent.gradient_step == 3  # 21 / 4 = 5, of which 10 / 4 = 2 belong to the warm-up
    for _ in range(3):
        other.update(*replays[1].sample(8))
    assert all(
        all_equal(params(ours), params(theirs)) for ours, theirs in zip(agent.online, other.online)
    )
    assert agent.losses.tolist() == other.accumulated_loss.tolist()
    assert not all_equal(params(agent.online[0]), params(agent.target))


# The schedule


def test_next_sparsity_by_hand(eaudeqn: ModuleType) -> None:
    def after(
        sparsity: float,
        exponent: float,
        step: int,
        horizon: int,
        period: int,
        max_step: float = 1.0,
    ) -> float:
        args = eaudeqn.Args(max_sparsity_step=max_step, target_every=period)
        args.total_timesteps = horizon
        return float(eaudeqn.next_sparsity(sparsity, exponent, step, args))

    assert after(0, 1, 0, 10, 1) == pytest.approx(0.1)
    assert after(0, 2, 0, 10, 1) == pytest.approx(0.19)
    assert after(0.5, 3, 5, 10, 1) == pytest.approx(0.744)  # half of 0.8 ** 3 is left
    assert after(0.5, 0.5, 36, 100, 28) == pytest.approx(0.625)  # the root of 36 / 64 is 3 / 4
    assert after(0.5, 3, 5, 10, 1, 0.01) == pytest.approx(0.51)
    assert after(0.5, 3, 5, 10, 1, 0.3) == pytest.approx(0.744)
    # No exponent, no pruning, at any time.
    assert after(0.5, 0, 5, 10, 1) == after(0.5, 0, 9, 10, 1) == after(0.5, 0, 9, 10, 7) == 0.5
    # The last period, and one that reaches past the end: nothing is left.
    assert after(0.5, 1e-3, 9, 10, 1) == after(0.5, 2, 9, 10, 7) == 1.0
    assert after(0.5, 2, 9, 10, 7, 0.01) == pytest.approx(0.51)
    assert after(0.995, 2, 9, 10, 7, 0.01) == 1.0


def test_next_sparsity_telescopes(eaudeqn: ModuleType) -> None:
    """A constant exponent follows 1 - (1 - t / H) ** n, to 1 at the end."""
    for exponent in (0.3, 1.0, 3.0):
        args = eaudeqn.Args(target_every=7, max_sparsity_step=1.0)
        args.total_timesteps = 700
        sparsity = 0.0
        for step in range(0, 700, 7):
            sparsity = eaudeqn.next_sparsity(sparsity, exponent, step, args)
            assert sparsity == pytest.approx(1 - (1 - (step + 7) / 700) ** exponent)
        assert sparsity == 1.0


def test_sparsity_never_falls(eaudeqn: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        sparsity, max_step = rng.random() ** 2, rng.choice([0.0, 0.01, 1.0])
        exponent = rng.choice([0.0, 1e-9, 3 * rng.random()])
        step = int(rng.integers(0, 1000))
        period = int(rng.integers(1, 1200))
        args = eaudeqn.Args(max_sparsity_step=float(max_step), target_every=period)
        args.total_timesteps = 1000
        after = eaudeqn.next_sparsity(sparsity, exponent, step, args)
        assert sparsity <= after <= min(1.0, sparsity + max_step)
        if exponent == 0 or max_step == 0:
            assert after == sparsity


# The choice


def test_best(tiny: ModuleType) -> None:
    agent, nan, inf = agent_of(tiny), math.nan, math.inf
    for losses, best in (
        ([3.0, 1.0, 2.0], 1),
        ([nan, 2.0, 1.0], 2),
        ([1.0, nan, 0.5, nan], 2),
        ([inf, nan, 5.0], 2),
        ([0.0, 0.0, 0.0], 0),
        ([2.0, 1.0, 1.0], 1),
        ([7.0], 0),
    ):
        agent.losses = np.array(losses)
        assert agent.best() == best


def test_update_target_chooses_the_smallest(tiny: ModuleType) -> None:
    agent = agent_of(tiny, num_networks=4)
    for losses, best in (
        ([3.0, 2.0, 1.0, 4.0], 2),
        ([math.nan, 2.0, math.nan, 1.0], 3),
        ([0.0] * 4, 0),
    ):
        for k, network in enumerate(agent.online):
            constant(network, [float(k), 0.0, 0.0, 0.0])
        agent.accumulated_loss.copy_(torch.tensor(losses))
        assert update_target(agent, 100, 1000) == best
        assert agent.target.output.bias.tolist()[0] == best
        assert all(network.output.bias.tolist()[0] == best for network in agent.online)


def forced_run(
    module: ModuleType, winner: str, seed: int, horizon: int, last: int, **flags: Any
) -> Any:
    """Update the target at every step up to `last`, with losses that let `winner` be chosen; return
    the agent.
    """
    agent = agent_of(module, seed=seed, target_every=1, **flags)
    rng = np.random.default_rng(seed)
    for step in range(1, last + 1):
        sparsest = max(range(len(agent.sparsity)), key=lambda k: agent.sparsity[k])
        best = {"first": 0, "sparsest": sparsest, "random": int(rng.integers(len(agent.sparsity)))}[
            winner
        ]
        agent.accumulated_loss.fill_(1.0)[best] = 0.5
        assert update_target(agent, step, horizon) == best
    return agent


def test_always_the_first_stays_dense(tiny: ModuleType) -> None:
    agent = forced_run(tiny, "first", 0, 50, 49, max_sparsity_step=1.0)
    assert agent.sparsity[0] == 0 and min(agent.sparsity[1:]) > 0
    assert all(p.all() for p in tiny.prunable(agent.target).values())


@pytest.mark.parametrize(("num_networks", "exponent"), [(5, 2.4), (2, 1.5)])
def test_always_the_sparsest_follows_its_schedule(
    tiny: ModuleType, num_networks: int, exponent: float
) -> None:
    """1 - (1 - t / H) ** (U_max (K - 1) / K): the largest of K - 1 draws from U(0, 3) has mean 3 (K
    - 1) / K.
    """
    found = []
    for seed in range(25):
        agent = forced_run(
            tiny, "sparsest", seed, 60, 30, num_networks=num_networks, max_sparsity_step=1.0
        )
        # The sparsest candidate is the one that the next choice would take: it was made for step
        # 31.
        left = 1 - max(agent.sparsity)
        found.append(math.log(left / (59 / 60) ** 0) / math.log(29 / 59))
    assert np.mean(found) == pytest.approx(exponent, abs=0.07)
    assert 0.02 < np.std(found) < 0.4  # drawn anew each time


def test_random_choice_prunes_nearly_all(tiny: ModuleType) -> None:
    for seed in range(3):
        agent = forced_run(tiny, "random", seed, 300, 299)
        assert agent.sparsity[0] > 0.99
        assert [int(m.sum()) for m in agent.online[0].buffers()] == [1, 1]


# Pruning, from generation to generation


def test_generations(eaudeqn: ModuleType) -> None:
    """Real networks that learn, with choices of all kinds: masks hold, nest and have exact
    counts.
    """
    agent = agent_of(eaudeqn, max_sparsity_step=0.15, max_exponent=6.0, learning_rate=1e-3, seed=2)
    stream = batches(eaudeqn)

    def kept(network: nn.Module, sparsity: float) -> list[int]:
        sizes = [weight.numel() for weight in eaudeqn.prunable(network).values()]
        densities = eaudeqn.erk_densities(network, sparsity)
        return [max(1, round(n * d)) for n, d in zip(sizes, densities)]

    def check_masks() -> None:
        for network, sparsity in zip(agent.online, agent.sparsity):
            masks = list(network.buffers())
            for weight, mask in zip(eaudeqn.prunable(network).values(), masks):
                assert not weight[mask == 0].any()
                assert set(mask.unique().tolist()) <= {0.0, 1.0}
            assert [int(mask.sum()) for mask in masks] == kept(network, sparsity)

    for generation, winner in enumerate((2, 4, 0, 1, 0, 3), 1):
        for _ in range(2):
            agent.update(*next(stream))
            check_masks()
        chosen = {
            "params": params(agent.online[winner]),
            "masks": [m.bool() for m in agent.online[winner].buffers()],
        }
        sparsity = agent.sparsity[winner]
        agent.accumulated_loss.fill_(2.0)[winner] = 1.0
        assert update_target(agent, 200 * generation, 2000) == winner

        assert all_equal(params(agent.target), chosen["params"])
        for weight, mask in zip(eaudeqn.prunable(agent.target).values(), chosen["masks"]):
            assert not weight[~mask].any()
        assert agent.sparsity[0] == sparsity and all_equal(
            [m.bool() for m in agent.online[0].buffers()], chosen["masks"]
        )
        assert all_equal(params(agent.online[0]), chosen["params"])
        assert min(agent.sparsity[1:]) > sparsity and max(agent.sparsity) <= sparsity + 0.15
        for k in range(1, 5):
            for p, parent in zip(agent.online[k].buffers(), chosen["masks"]):
                assert not (p.bool() & ~parent).any()
            # Pruned copies: what is kept is the chosen network's, what went was its smallest.
            masks = iter(zip(agent.online[k].buffers(), chosen["masks"]))
            for ours, theirs in zip(agent.online[k].parameters(), chosen["params"]):
                if theirs.ndim == 1:
                    assert torch.equal(ours, theirs)
                    continue
                mask, parent = (m.bool() for m in next(masks))
                assert torch.equal(ours, torch.where(mask, theirs, 0.0))
                gone = theirs[parent & ~mask].abs()
                if len(gone):
                    assert gone.max() <= theirs[mask].abs().min()
        check_masks()
    assert eaudeqn.sparsity_report(agent.target)["sparsity/prunable"] == pytest.approx(
        sparsity, abs=1e-3
    )
    assert sparsity > 0.2


@pytest.mark.parametrize("reset", [True, False])
def test_optimiser_state_at_a_target_update(small: ModuleType, reset: bool) -> None:
    """All K Adam states are zeroed, step counts included, or all are kept."""
    agent = agent_of(small, num_networks=3, reset_optimizer=reset)
    stream = batches(small)
    for _ in range(2):
        agent.update(*next(stream))
    before = copy.deepcopy(list(agent.optimizer.state.values()))
    assert len(before) == 24 and all(float(state["step"]) == 2 for state in before)
    assert all(state["exp_avg"].any() and state["exp_avg_sq"].any() for state in before)
    update_target(agent, 100, 1000)
    for state, old in zip(agent.optimizer.state.values(), before):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], torch.zeros_like(old[name]) if reset else old[name])
    agent.update(*next(stream))
    assert all(
        float(state["step"]) == (1 if reset else 3) for state in agent.optimizer.state.values()
    )


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_network_that_is_lost_is_replaced(small: ModuleType, lost: float) -> None:
    """Without a finite loss it neither acts nor wins; it comes back as a copy, with new moments of
    Adam.
    """
    agent = agent_of(small, num_networks=3, reset_optimizer=False)
    agent.update(*next(batches(small)))
    with torch.no_grad():
        for p in agent.online[1].parameters():
            p.fill_(lost)
            agent.optimizer.state[p]["exp_avg"].fill_(lost)
    agent.accumulated_loss[1] = lost
    agent.losses = np.array(agent.accumulated_loss.tolist())
    for behaviour in ("inverse-loss", "uniform", "argmin"):
        agent.args.behaviour = behaviour
        agent.act(np.zeros((4, 4, 12, 12), np.uint8), 0.0)
    agent.update_target(100)
    assert agent.selected != 2
    assert all(p.isfinite().all() for network in agent.online for p in network.parameters())
    agent.update(*next(batches(small)))
    assert all(map(math.isfinite, agent.accumulated_loss.tolist()))


def test_candidates_go_their_own_ways(small: ModuleType) -> None:
    """After a target update the networks share nothing: one changes, and neither the others nor the
    target do.
    """
    agent = agent_of(small, num_networks=3, max_sparsity_step=0.5, max_exponent=9.0)
    update_target(agent, 100, 1000)
    others = [params(network) for network in (agent.target, agent.online[0], agent.online[2])]
    masks = [m.clone() for k in (0, 2) for m in agent.online[k].buffers()]
    with torch.no_grad():
        for p in agent.online[1].parameters():
            p.fill_(7.0)
        for mask in agent.online[1].buffers():
            mask.zero_()
    assert all(
        all_equal(params(n), old)
        for n, old in zip((agent.target, agent.online[0], agent.online[2]), others)
    )
    assert all_equal([m for k in (0, 2) for m in agent.online[k].buffers()], masks)


def test_exponents_are_drawn_anew(tiny: ModuleType) -> None:
    """For each candidate and time from U(0, 3); none is drawn for network 1."""
    agent = agent_of(tiny, num_networks=4, max_sparsity_step=1.0, target_every=100)
    drawn = []
    for _ in range(500):
        update_target(
            agent, 500, 1000
        )  # no losses: network 1, dense, is chosen; the base is 400 / 500
        assert agent.sparsity[0] == 0
        drawn += [math.log(1 - s) / math.log(0.8) for s in agent.sparsity[1:]]
    assert len(set(drawn)) == 1500 and 0 <= min(drawn) < 0.02 and 2.98 < max(drawn) <= 3.0 + 1e-9
    shares = np.histogram(drawn, 6, (0, 3.0000001))[0] / 1500
    assert np.abs(shares - 1 / 6).max() < 0.04  # four standard deviations


# Acting


def test_fully_random_actions(tiny: ModuleType) -> None:
    agent = agent_of(tiny)
    for network in agent.online:
        constant(network, [0.0, 0.0, 9.0, 0.0])
    actions = act(agent, np.zeros((20_000, 4, 1, 1), np.uint8), 1.0, [0.0] * 5)
    counts = np.bincount(actions, minlength=4)
    assert len(counts) == 4 and ((counts - 5000) ** 2 / 5000).sum() < 25  # mean 3, variance 6


def test_epsilon_greedy(tiny: ModuleType) -> None:
    """At epsilon 0.4 the greedy action has 0.6 and its share of the rest."""
    agent = agent_of(tiny)
    for network in agent.online:
        constant(network, [0.0, 0.0, 9.0, 0.0])
    obs = np.zeros((20_000, 4, 1, 1), np.uint8)
    assert (act(agent, obs[:1000], 0.0, [1.0] * 5) == 2).all()
    shares = np.bincount(act(agent, obs, 0.4, [1.0] * 5), minlength=4) / len(obs)
    assert shares == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.015)


def test_greedy_for_each_observation(tiny: ModuleType) -> None:
    """Every environment's action is that of its own observation, in order, and of the network drawn
    for it.
    """
    agent = agent_of(tiny, num_networks=2)
    for network, sign in zip(agent.online, (1.0, -1.0)):
        constant(network, [0.0, 0.0, 0.0, 0.0])
        with torch.no_grad():
            network.dense.weight[0, 3] = 1.0  # the newest frame
            network.output.weight[0, 0] = 0.5 * sign
            network.output.weight[1, 0] = -0.5 * sign
            network.output.bias.copy_(torch.tensor([-0.25 * sign, 0.25 * sign, -9.0, -9.0]))
    obs = np.zeros((200, 4, 1, 1), np.uint8)
    obs[:, 3, 0, 0] = np.random.default_rng(0).integers(0, 2, 200) * 255
    bright = obs[:, 3, 0, 0] == 255
    assert (act(agent, obs, 0.0, [0.0, 1e9]) == np.where(bright, 0, 1)).all()
    assert (act(agent, obs, 0.0, [1e9, 0.0]) == np.where(bright, 1, 0)).all()


@pytest.mark.parametrize(
    ("behaviour", "losses", "odds"),
    [
        ("inverse-loss", [1.0, 2.0, 4.0, 4.0], [4, 2, 1, 1]),
        ("inverse-loss", [0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]),
        (
            "inverse-loss",
            [1e-6, 3e-6, 7e-6, 0.0],
            [4, 2, 1, 8],
        ),  # the 1e-6 that is added: 2, 4, 8 and 1
        ("uniform", [1.0, 2.0, 4.0, 0.0], [1, 1, 1, 1]),
        ("inverse-loss", [1.0, math.nan, 3.0, math.inf], [3, 0, 1, 0]),  # who is lost does not act
        ("uniform", [1.0, math.nan, 4.0, math.inf], [1, 0, 1, 0]),
        ("argmin", [3.0, 2.0, 1.0, 1.0], [0, 0, 1, 0]),
        ("argmin", [0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0]),
    ],
)
def test_network_that_acts(
    tiny: ModuleType, behaviour: str, losses: list[float], odds: list[int]
) -> None:
    agent = agent_of(tiny, num_networks=4, behaviour=behaviour)
    for k, network in enumerate(agent.online):
        constant(network, [float(k == action) for action in range(4)])
    counts = np.bincount(
        act(agent, np.zeros((16_000, 4, 1, 1), np.uint8), 0.0, losses), minlength=4
    )
    shares = np.array(odds) / sum(odds)
    assert np.abs(counts / 16_000 - shares).max() <= 4 * math.sqrt(0.25 / 16_000) * (
        max(shares) < 1
    )
    # One at a time the network is drawn anew for each action, too.
    alone = [int(act(agent, np.zeros((1, 4, 1, 1), np.uint8), 0.0, losses)[0]) for _ in range(400)]
    assert np.abs(np.bincount(alone, minlength=4) / 400 - shares).max() <= 0.1


def test_exploration_is_the_same_for_all(tiny: ModuleType) -> None:
    """When and how is explored does not depend on K, the behaviour or the losses: networks are
    drawn otherwise.
    """
    actions, states = [], []
    settings = (
        (1, "inverse-loss", 1.0),
        (5, "inverse-loss", 2.0),
        (5, "uniform", 0.0),
        (3, "argmin", 1.0),
    )
    for num_networks, behaviour, loss in settings:
        agent = agent_of(tiny, num_networks=num_networks, behaviour=behaviour, seed=3)
        losses, untouched = (
            [loss * (k + 1) for k in range(num_networks)],
            agent.rng["network"].bit_generator.state,
        )
        obs = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1, 1), dtype=np.uint8)
        actions.append(
            [act(agent, o, 0.5, losses).tolist() for o in obs]
        )  # the networks are still equal
        states.append(agent.rng["act"].bit_generator.state)
        assert behaviour != "inverse-loss" or agent.rng["network"].bit_generator.state != untouched
        update_target(agent, 100, 1000)
        assert agent.rng["act"].bit_generator.state == states[-1]
    assert actions[1:] == actions[:-1] and states[1:] == states[:-1]
    assert len({tuple(a) for a in actions[0]}) > 20


# What is saved and logged


def test_the_state_dict_is_the_whole_state(small: ModuleType) -> None:
    """Saved, and loaded into a new agent without unpickling, it makes it go on in the same way."""
    flags: dict[str, Any] = {
        "num_networks": 3,
        "max_sparsity_step": 0.3,
        "max_exponent": 6.0,
        "reset_optimizer": False,
    }
    agent, other = agent_of(small, seed=1, **flags), agent_of(small, seed=2, **flags)
    stream = batches(small)

    def go_on(agents: list[Any], step: int) -> None:
        for batch in [next(stream) for _ in range(2)]:
            for each in agents:
                each.update(*batch)
        chosen = [update_target(each, step, 1000) for each in agents]
        assert len(set(chosen)) == 1

    go_on([agent], 100)
    go_on([agent], 200)
    agent.update(*next(stream))
    torch.save(agent.state_dict(), file := io.BytesIO())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    go_on([agent, other], 300)
    go_on([agent, other], 400)
    assert agent.sparsity == other.sparsity and agent.sparsity[1] > 0
    obs = np.zeros((30, 4, 12, 12), np.uint8)
    assert agent.act(obs, 0.5).tolist() == other.act(obs, 0.5).tolist()
    for ours, theirs in zip(agent.state_dict().values(), other.state_dict().values()):
        assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)
    moments, others = (
        [tensor for state in each.optimizer.state.values() for tensor in state.values()]
        for each in (agent, other)
    )
    assert len(moments) == 3 * 3 * 8 and all_equal(moments, others)


def test_report(tiny: ModuleType) -> None:
    agent = agent_of(tiny, num_networks=3, max_sparsity_step=0.5, max_exponent=9.0)
    update_target(agent, 500, 1000)
    batch = next(batches(tiny, 8))
    with torch.no_grad():
        q = [network(batch[0]).gather(1, batch[2][:, None]).mean() for network in agent.online]
    agent.update(*batch)
    agent.gradient_step += 1
    losses = agent.accumulated_loss.tolist()
    agent.losses = np.array(losses)
    best = losses.index(min(losses))
    report = agent.report()
    assert report["losses/td_loss"] == pytest.approx(sum(losses) / 3)
    assert report["losses/q_values"] == pytest.approx(float(sum(q)) / 3, rel=1e-4)
    assert report["sparsity/target"] == 0
    assert [report[f"sparsity/candidate_{k}"] for k in (1, 2, 3)] == agent.sparsity
    zeros = sum(
        int((w == 0).sum())
        for w in (agent.online[best].dense.weight, agent.online[best].output.weight)
    )
    assert report["sparsity/prunable"] == zeros / 48


# The method as a whole


def learn_catch(
    module: ModuleType, feature_size: int, learning_rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train for 24,000 steps; return the mean return and the sparsity (nominal, of network 1) of
    each 1,200 steps.
    """
    total, warm_up = 24_000, 1_000
    flags = {"buffer_size": total, "learning_starts": warm_up, "target_every": 80}
    args = module.Args(feature_size=feature_size, learning_rate=learning_rate, seed=seed, **flags)
    agent, env = module.EauDeQN(args, 3, CPU), Catch(seed)
    replay = module.FrameReplay(args, CPU, env.obs[:, -1])
    losses, returns, curve = [0.0] * 5, list[float](), list[tuple[float, float]]()
    for step in range(1, total + 1):
        epsilon = max(0.01, min(1.0, 1 - 0.99 * (step - warm_up) / 2_400))
        actions = act(agent, env.obs, epsilon, losses)
        replay.add(actions, env.step(int(actions[0])), env.obs[:, -1])
        returns += [score for score, _ in env.episodes]
        agent.learn(replay, step)
        if step > warm_up and step % 4 == 0:
            losses = agent.accumulated_loss.tolist()
        if step > warm_up + 4 and step % 80 == 0 and step < total:
            update_target(agent, step, total)
            losses = [0.0] * 5
        if step % 1_200 == 0:
            curve.append((sum(returns) / len(returns), agent.sparsity[0]))
            returns.clear()
    assert replay.count == total
    for network in agent.online:  # what is called sparse is sparse
        weights, masks = module.prunable(network).values(), network.buffers()
        assert all(not w[m == 0].any() for w, m in zip(weights, masks))
    assert module.sparsity_report(agent.online[0])["sparsity/prunable"] == pytest.approx(
        agent.sparsity[0], abs=1e-3
    )
    return np.array([c[0] for c in curve]), np.array([c[1] for c in curve])


def pace(sparsities: np.ndarray, first: int, last: int) -> float:
    """Return the exponent n with which sparsity rose between two entries of a curve: 1 - s goes as
    (1 - t / H) ** n.

    The schedule without a choice has a constant one: 1.2 where the choice is random, 2.4 where the
    sparsest wins.
    """
    time_left = 1 - (np.arange(len(sparsities)) + 1) / len(sparsities)
    left = np.log(1 - sparsities)
    return float((left[last] - left[first]) / (np.log(time_left[last]) - np.log(time_left[first])))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_sparsity_at_the_pace_of_learning(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Catch with 512 and 64 features, each at a rate with which it takes half of the run to learn
    (2 to 4 minutes).

    Returns are on the scale from -1 (every ball missed) to 1 (every ball caught), of the training
    episodes.
    """
    monkeypatch.setattr(eaudeqn, "QNetwork", CatchNetwork)
    ends = {}
    for feature_size, learning_rate in ((512, 6e-5), (64, 2e-4)):
        returns, sparsities = learn_catch(eaudeqn, feature_size, learning_rate, seed)
        print(f"\n{feature_size} features, seed {seed}: returns", *(f"{r:.2f}" for r in returns))
        print("sparsities", *(f"{s:.3f}" for s in sparsities))
        assert returns[-1] >= 0.9
        saturated = int(np.argmax(returns >= 0.9))
        before, after = (
            pace(sparsities, 1, saturated),
            pace(sparsities, saturated, len(sparsities) - 2),
        )
        print(f"pace {before:.2f} until entry {saturated}, {after:.2f} from there")
        assert 0 < saturated < len(returns) - 3 and after < before / 2
        ends[feature_size] = sparsities[-1]
    assert ends[512] > 0.5
    assert ends[512] > ends[64]
