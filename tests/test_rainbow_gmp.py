"""Tests of rainbow_resnet_gmp.py: C51, prioritised replay over n steps, the update, and that it
learns sparse.

What it shares with dqn_atari_gmp.py (schedule, masks, analyses) is tested there.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tasks import CATCH_FLAGS, CPU, CatchNetwork, Small, catch_return, filled_replay, params
from torch import Tensor

SUPPORT = [-10 + 0.4 * i for i in range(51)]


def agent_of(module: ModuleType, dtype: torch.dtype = torch.float32, **flags: Any) -> Any:
    flags = {"feature_size": 16, "learning_starts": 100, "network": "cnn", **flags}
    agent = module.Rainbow(module.Args(**flags), 4, CPU).to(dtype)
    agent.masks = list(agent.online.buffers())  # to() makes new ones
    return agent


@pytest.fixture
def small(rainbow: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with a small network of 4 x 51 outputs."""

    class SmallC51(Small):
        """Small with logits."""

        def __init__(self, num_actions: int, args: Any) -> None:
            super().__init__(num_actions * 51, args)

        def logits(self, obs: Tensor) -> Tensor:
            return Small.forward(self, obs).unflatten(1, (-1, 51))

        def forward(self, obs: Tensor) -> Tensor:
            return (self.logits(obs).softmax(2) * torch.tensor(SUPPORT, dtype=obs.dtype)).sum(2)

    monkeypatch.setattr(rainbow, "C51Network", SmallC51)
    return rainbow


def filled(module: ModuleType, steps: int) -> Any:
    return filled_replay(module, 12, steps, gamma=0.9, n_step=3)


def replay_of(module: ModuleType, capacity: int, num_envs: int = 1, n_step: int = 1) -> Any:
    """Return an empty replay of frames of one pixel."""
    args = module.Args(buffer_size=capacity, num_envs=num_envs, n_step=n_step, batch_size=1, seed=3)
    return module.PrioritisedReplay(args, CPU, np.zeros((num_envs, 1, 1), np.uint8))


def double(batch: Iterable[Tensor]) -> list[Tensor]:
    """Return what was drawn with its floats in float64."""
    return [t.double() if t.is_floating_point() else t for t in batch]


# C51


def slow_projection(probabilities: list[float], returns: list[float]) -> list[float]:
    """Bellemare et al. (2017), algorithm 1, atom by atom."""
    mass = [0.0] * 51
    for p, z in zip(probabilities, returns):
        b = (min(10.0, max(-10.0, z)) + 10) / 0.4
        low, high = math.floor(b), math.ceil(b)
        if low == high:
            mass[low] += p
        else:
            mass[low] += p * (high - b)
            mass[high] += p * (b - low)
    return mass


@pytest.mark.parametrize(
    ("reward", "discount"),
    [
        (0.0, 1.0),
        (1.0, 0.99),
        (-1.0, 0.99**3),
        (2.71, 0.970299),
        (0.0, 0.0),
        (1.0, 0.0),
        (-3.0, 0.0),
        (9.9, 0.99),
        (-9.9, 0.99),
        (30.0, 0.99),
        (-30.0, 0.5),
        (10.0, 0.0),
        (-10.0, 0.0),
        (0.2, 1.0),
        (0.4, 0.0),
        (0.1, 1e-3),
    ],
)
def test_projection(rainbow: ModuleType, reward: float, discount: float) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(51, 0.3), 5)
    returns = np.tile([reward + discount * z for z in SUPPORT], (5, 1))
    found = rainbow.project(torch.from_numpy(probabilities), torch.from_numpy(returns))
    wanted = np.array(
        [slow_projection(p, z) for p, z in zip(probabilities.tolist(), returns.tolist())]
    )
    assert np.abs(found.numpy() - wanted).max() < 1e-12
    assert found.sum(1).tolist() == pytest.approx([1.0] * 5, abs=1e-12)
    if discount == 0 and abs(reward) <= 10:
        assert (found.numpy() @ SUPPORT) == pytest.approx([reward] * 5, abs=1e-9), (
            "all of it at the reward"
        )


def test_q_values_are_means(rainbow: ModuleType) -> None:
    torch.manual_seed(0)
    args = rainbow.Args(network="cnn", feature_size=8)
    network, obs = rainbow.C51Network(6, args), torch.rand(3, 4, 84, 84)
    logits = network.logits(obs)
    assert logits.shape == (3, 6, 51)
    odds = torch.exp(logits.double())
    wanted = (odds / odds.sum(2, keepdim=True)) @ torch.tensor(SUPPORT, dtype=torch.float64)
    assert network(obs).shape == (3, 6) and torch.allclose(network(obs).double(), wanted, atol=1e-5)
    # Variance scaling 1 / sqrt(3) by fan-in, uniform.
    bound = math.sqrt(math.sqrt(3) / (64 * 11 * 11))
    weight = network.dense.weight.detach()
    assert 0.999 * bound < float(weight.abs().max()) <= bound
    assert float(weight.var()) == pytest.approx(bound**2 / 3, rel=0.02)
    assert not any(p.any() for p in network.parameters() if p.ndim == 1)


def test_loss_in_float64(small: ModuleType) -> None:
    """Cross-entropy, gradients and Q(s, a) against loops over single transitions, to 1e-9."""
    agent, replay = agent_of(small, torch.float64), filled(small, 300)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
    *drawn, _, _ = replay.sample(64)
    obs, next_obs, actions, rewards, discounts = batch = double(drawn)
    weights = torch.rand(64)
    # Episodes that went on, that were cut after 1 and 2 steps, and that terminated.
    assert len(set(drawn[4].tolist())) == 4
    losses, q_values = agent.loss(*batch)
    (losses * weights).mean().backward()
    other, total = copy.deepcopy(agent.online), torch.zeros((), dtype=torch.float64)
    other.zero_grad()
    for i in range(64):
        after = agent.target.logits(next_obs[i : i + 1])[0].softmax(1).tolist()
        best = max(range(4), key=lambda a: sum(p * z for p, z in zip(after[a], SUPPORT)))
        returns = [float(rewards[i]) + float(discounts[i]) * z for z in SUPPORT]
        target = slow_projection(after[best], returns)
        logits = other.logits(obs[i : i + 1])[0, int(actions[i])]
        p = logits.exp() / logits.exp().sum()
        loss = -torch.stack([t * torch.log(x) for t, x in zip(target, p)]).sum()
        assert losses[i].item() == pytest.approx(loss.item(), abs=1e-9)
        mean = sum(x * z for x, z in zip(p.tolist(), SUPPORT))
        assert q_values[i].item() == pytest.approx(mean, abs=1e-9)
        total = total + float(weights[i]) * loss / 64
    total.backward()
    for ours, theirs in zip(agent.online.parameters(), other.parameters()):
        assert float((ours.grad - theirs.grad).abs().max()) < 1e-9
        assert float(theirs.grad.abs().max()) > 1e-6


def test_an_update_weighs_the_losses(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first step, by its formula, on the gradient of mean(weight * loss)."""
    agent, replay = agent_of(small, torch.float64), filled(small, 100)
    *batch, slots, _ = double(replay.sample(32))
    weights, before = torch.rand(32, dtype=torch.float64), params(agent.online)
    loss = (agent.loss(*batch)[0] * weights).mean()
    gradients = torch.autograd.grad(loss, list(agent.online.parameters()))
    monkeypatch.setattr(replay, "sample", lambda _: (*batch, slots, weights))
    agent.update(replay)
    lr, eps = agent.args.learning_rate, agent.args.adam_eps
    for p, old, g in zip(agent.online.parameters(), before, gradients):
        assert torch.allclose(p, old - lr * g / (g.abs() + eps), rtol=0, atol=1e-12)


def test_updates_go_on_after_a_loss_that_is_not_finite(small: ModuleType) -> None:
    """Those of the same step, after which the run ends: what they draw is a transition."""
    agent, replay = agent_of(small), filled(small, 100)
    slots = replay.sample(4)[5]
    replay.prioritise(slots, torch.tensor([math.nan, math.inf, -math.inf, 1.0]))
    assert replay.sums.isfinite().all() and float(replay.highest) == pytest.approx(1)
    with torch.no_grad():
        agent.online.output.bias.fill_(math.nan)
    agent.learn(replay, 116)
    assert agent.gradient_step == 4 and math.isnan(agent.latest[0])


def test_an_update_sets_priorities(small: ModuleType) -> None:
    """sqrt(loss + 1e-10) for what was drawn, the highest so far for what is new; weights are
    1 / sqrt(p), scaled.
    """
    agent, replay = agent_of(small), filled(small, 100)
    assert set(replay.priority.flatten().tolist()) == {0.0, 1.0}
    samples = replay.generator.get_state()
    *batch, slots, weights = replay.sample(32)
    assert weights.tolist() == [1.0] * 32 and len(set(slots.tolist())) > 20
    assert all(map(torch.equal, batch, replay.gather(slots))), "what stands in its slots"
    with torch.no_grad():
        losses = agent.loss(*batch)[0]
    replay.generator.set_state(samples)
    agent.update(replay)
    priorities = replay.priority.flatten()
    for slot, loss in zip(slots.tolist(), losses.tolist()):
        assert float(priorities[slot]) == pytest.approx(math.sqrt(loss + 1e-10), rel=1e-5)
    highest = max(1.0, *(math.sqrt(loss) for loss in losses.tolist()))
    assert highest > 1 and float(replay.highest) == pytest.approx(highest, rel=1e-5)
    assert replay.sums.tolist() == pytest.approx(replay.priority.double().sum(1).tolist(), abs=1e-9)
    *_, slots, weights = replay.sample(500)
    wanted = 1 / (priorities[slots].double() + 1e-10).sqrt()
    assert weights.tolist() == pytest.approx((wanted / wanted.max()).tolist(), rel=1e-5)
    assert len(set(weights.tolist())) > 5 and float(weights.max()) == 1
    count, no = replay.step, np.array([False])
    frames = np.zeros((1, 12, 12), np.uint8)
    replay.add(np.array([1]), (np.ones(1), no, no, frames), frames)
    newest = (count + 1 - replay.n_step) % replay.rows
    assert float(replay.priority.flatten()[newest]) == float(replay.highest)
    replay.prioritise(slots[:1], torch.tensor([1e-4]))
    # The highest ever, not that of the last batch.
    assert float(replay.highest) == pytest.approx(highest, rel=1e-5)


def test_the_state_is_everything(small: ModuleType) -> None:
    """An agent and a replay that take a checkpoint's tensors go on as the first ones do."""
    flags: dict[str, Any] = {"total_timesteps": 300, "prune_every": 3}
    agent, other = agent_of(small, seed=1, **flags), agent_of(small, seed=2, **flags)
    replay, again = filled(small, 60), filled(small, 60)
    agent.learn(replay, 180)
    agent.update_target()
    agent.learn(replay, 192)
    state = {"agent": agent.state_dict(), "sampling": replay.generator.get_state()}
    torch.save(state | {"priorities": replay.priorities}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["agent"])
    again.generator.set_state(saved["sampling"])
    for tensor, old in zip(again.priorities, saved["priorities"]):
        tensor.copy_(old)
    files = []
    for each, store in ((agent, replay), (other, again)):
        each.learn(store, 272)
        torch.save((each.state_dict(), store.priorities), file := io.BytesIO())
        files.append(file.getvalue())
    assert files[0] == files[1] and agent.gradient_step == 43 and agent.sparsity > 0.5


# Prioritised replay


@pytest.mark.parametrize(("size", "draws"), [(10_000, 400_000), (1_000_000, 600_000)])
def test_frequencies(rainbow: ModuleType, size: int, draws: int) -> None:
    """Chi-squared against the priorities, in bins of like expectation; what has none is never
    drawn.
    """
    replay = replay_of(rainbow, size, n_step=3)
    rng = np.random.default_rng(0)
    priorities = rng.random(size) ** 4 * (rng.random(size) < 0.7)
    priorities[size // 2] = 50.0  # one stands out
    replay.priority.view(-1)[:size] = torch.from_numpy(priorities)
    replay.sums[:] = replay.priority.double().sum(1)
    exact = replay.priority.double().flatten()[:size].numpy()
    counts = np.zeros(size)
    for _ in range(draws // 20_000):
        *_, slots, weights = replay.sample(20_000)
        counts += np.bincount(slots.numpy(), minlength=size)[:size]
    assert counts.sum() == draws and not counts[exact == 0].any()
    expected_weights = 1 / np.sqrt(exact[slots] + 1e-10)
    assert weights.numpy() == pytest.approx(expected_weights / expected_weights.max(), rel=1e-5)
    order = np.argsort(exact, kind="stable")
    expected = exact[order] / exact.sum() * draws
    bins = (expected.cumsum() / 500).astype(int)  # neighbours in priority, about 500 draws each
    wanted, found = np.bincount(bins, expected), np.bincount(bins, counts[order])
    keep = wanted > 100
    chi_squared = float(((found[keep] - wanted[keep]) ** 2 / wanted[keep]).sum())
    # Strata make it less than independent draws would.
    assert chi_squared < keep.sum() + 5 * math.sqrt(2 * keep.sum())
    # And by place: a thousand stretches of the ring.
    places = np.arange(size) * 1000 // size
    wanted, found = np.bincount(places, exact / exact.sum() * draws), np.bincount(places, counts)
    chi_squared = float(((found - wanted) ** 2 / wanted).sum())
    assert chi_squared < 1000 + 5 * math.sqrt(2000)


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_step"),
    [(50, 1, 3), (60, 3, 2), (2500, 1, 1), (3000, 7, 5), (24, 8, 3)],
)
def test_what_can_be_drawn(rainbow: ModuleType, capacity: int, num_envs: int, n_step: int) -> None:
    """At any time exactly the transitions of the uniform replay's window have a priority, also over
    the ring's seam.
    """
    replay = replay_of(rainbow, capacity, num_envs, n_step)
    frames, no = np.zeros((num_envs, 1, 1), np.uint8), np.zeros(num_envs, bool)
    for step in range(3 * replay.rows):
        replay.add(no.astype(int), (no.astype(float), no, no, frames), frames)
        if step % 7 == 0 or step < 20 or step == 3 * replay.rows - 1:
            first, count = replay.range.tolist()
            wanted = {slot % replay.slots for slot in range(first, first + count)}
            assert set(replay.priority.flatten().nonzero().flatten().tolist()) == wanted
            assert replay.sums.tolist() == replay.priority.double().sum(1).tolist()
    assert set(replay.sample(50 * capacity)[5].tolist()) == wanted


def test_draws_are_stratified(rainbow: ModuleType) -> None:
    """Draw i of 32 lies in the i-th 32nd of the sum of priorities; within it, anywhere."""
    replay = replay_of(rainbow, 3_000)
    priorities = np.random.default_rng(0).random(3_000).astype(np.float32)
    replay.priority.view(-1)[:3_000] = torch.from_numpy(priorities)
    replay.sums[:] = replay.priority.double().sum(1)
    ends = priorities.astype(np.float64).cumsum()
    places = []
    for _ in range(200):
        slots = replay.sample(32)[5].numpy()
        high, low = ends[slots] / ends[-1] * 32, (ends[slots] - priorities[slots]) / ends[-1] * 32
        assert (high >= np.arange(32) - 1e-9).all() and (low <= np.arange(1, 33) + 1e-9).all()
        places += ((high + low) / 2 - np.arange(32)).tolist()
    assert np.histogram(places, 4, (0, 1))[0] / len(places) == pytest.approx([0.25] * 4, abs=0.03)


def test_q_values_keep_their_precision_in_bf16(rainbow: ModuleType) -> None:
    """The torso computes in bf16, the output layer and the distribution's mean do not."""
    agent = agent_of(rainbow, precision="bf16")
    obs = torch.rand(64, 4, 84, 84)
    with torch.no_grad():
        with agent.autocast:
            q = agent.online(obs)
        assert not torch.equal(q, q.bfloat16().float()), "finer than bf16"
        assert torch.allclose(q, agent.online(obs), atol=0.05)
        assert not torch.equal(q, agent.online(obs))


@pytest.mark.parametrize("spike", [0, 1023, 1024, 2047, 2499])
def test_the_ends_of_blocks(rainbow: ModuleType, spike: int) -> None:
    """One transition alone has a priority, from tiny to huge: it is what is drawn, wherever it
    lies.
    """
    replay = replay_of(rainbow, 2_500)
    for size in (1e-30, 1e-5, 1.0, 1e30):
        replay.priority.zero_().view(-1)[spike] = size
        replay.sums[:] = replay.priority.double().sum(1)
        assert set(replay.sample(10_000)[5].tolist()) == {spike}


def test_memory(rainbow: ModuleType) -> None:
    replay = rainbow.PrioritisedReplay(rainbow.Args(), CPU, np.zeros((1, 84, 84), np.uint8))
    arrays = [v for v in vars(replay).values() if isinstance(v, torch.Tensor | np.ndarray)]
    assert replay.nbytes == pytest.approx(sum(array.nbytes for array in arrays), rel=1e-6)
    assert 7_056 * 1_000_000 < replay.nbytes <= 7.3e9


def test_drawing_never_waits_for_the_device(rainbow: ModuleType) -> None:
    """Fake tensors have shapes but no values: any .item(), nonzero() or boolean index raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    agent = agent_of(rainbow)
    args = rainbow.Args(buffer_size=500)
    replay = rainbow.PrioritisedReplay(args, CPU, np.zeros((1, 84, 84), np.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert replay.sample(32)[0].shape == (32, 4, 84, 84)
        agent.update(replay)


# It learns


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_catch(rainbow: ModuleType, monkeypatch: pytest.MonkeyPatch, sparsity: float) -> None:
    """Catch in 24,000 steps with 512 units, dense and at 95 % sparsity: 90 % of the best return
    (2 minutes).
    """

    class CatchC51(rainbow.C51Network):  # type: ignore[name-defined,misc]
        """The small task's network with logits."""

        def __init__(self, num_actions: int, args: Any) -> None:
            torch.nn.Module.__init__(self)
            self.inner = CatchNetwork(num_actions * 51, args)

        def logits(self, obs: Tensor) -> Tensor:
            return self.inner(obs).unflatten(1, (-1, 51))

    monkeypatch.setattr(rainbow, "C51Network", CatchC51)
    agent = rainbow.Rainbow(rainbow.Args(sparsity=sparsity, **CATCH_FLAGS), 3, CPU)
    assert catch_return(rainbow, agent) >= 0.9
    prunable = rainbow.sparsity_report(agent.online)["sparsity/prunable"]
    assert prunable == pytest.approx(sparsity, abs=1e-3)
