"""SAC on MuJoCo: environments, replay, update, choice, pruning, against slow versions of them."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tasks import CPU
from torch import Tensor, nn

OBS, ACT, B = 5, 2, 16  # sizes of observations, actions, batch


@pytest.fixture(params=["sac_mujoco_eaudeqn", "sac_mujoco_gmp"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the two scripts."""
    name = "eaudesac" if request.param == "sac_mujoco_eaudeqn" else "sac"
    return request.getfixturevalue(name)


def make_agent(module: ModuleType, dtype: torch.dtype = torch.float64, /, **flags: Any) -> Any:
    """Return an agent whose hidden layers have 256 units."""
    kind = module.EauDeSAC if hasattr(module, "EauDeSAC") else module.SAC
    common = {"learning_starts": 256, "total_timesteps": 5256, "width": 1, "seed": 3}
    torch.set_default_dtype(dtype)
    try:
        return kind(module.Args(**common | flags), OBS, ACT, CPU)
    finally:
        torch.set_default_dtype(torch.float32)


def make_batch(seed: int) -> tuple[Tensor, ...]:
    """Return random transitions, of which a third terminate."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    terminated = (torch.rand(B, generator=rng, dtype=torch.float64) < 0.33).double()
    obs, actions, next_obs = normal(B, OBS), normal(B, ACT).tanh(), normal(B, OBS)
    return obs, actions, next_obs, normal(B), terminated, normal(2, B, ACT)


def all_parameters(agent: Any) -> list[Tensor]:
    return [*agent.stacks, *agent.targets, *agent.actor.parameters(), agent.log_alpha]


# The update


class Reference:
    """SAC as the paper writes it: a module and an optimiser per network, torch's distributions.

    K pairs of critics learn towards the target pair, which with the actor follows the first.
    """

    def __init__(self, agent: Any, pairs: int, decay: float = 0.0) -> None:
        def dense(*sizes: int) -> nn.Sequential:
            layers = [nn.Linear(*shape, dtype=torch.float64) for shape in itertools.pairwise(sizes)]
            return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

        self.args, self.decay = agent.args, decay
        self.actor = dense(OBS, 256, 256, 2 * ACT)
        self.actor.load_state_dict(dict(zip(self.actor.state_dict(), agent.actor.parameters())))
        self.critics = [dense(OBS + ACT, 256, 256, 1) for _ in range(2 * pairs)]
        self.targets = [dense(OBS + ACT, 256, 256, 1) for _ in range(2)]
        for nets, stacks in ((self.critics, agent.stacks), (self.targets, agent.targets)):
            for n, net in enumerate(nets):
                net.load_state_dict(dict(zip(net.state_dict(), self.unstacked(stacks, n))))
        self.log_alpha = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        parameters = [net.parameters() for net in (self.actor, *self.critics)] + [[self.log_alpha]]
        self.adams = [
            torch.optim.Adam(p, lr=self.args.learning_rate, foreach=False) for p in parameters
        ]

    @staticmethod
    def unstacked(stacks: list[Tensor], n: int) -> list[Tensor]:
        """Return the n-th of stacked critics as nn.Linear's weight and bias, layer after layer."""
        return [stack[n].T if i % 2 == 0 else stack[n, 0] for i, stack in enumerate(stacks)]

    def act(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions and their log-probabilities, which torch's distribution says."""
        mean, log_std = self.actor(obs).split(ACT, 1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        tanh = torch.distributions.TanhTransform(cache_size=1)
        actions = tanh(normal.mean + normal.stddev * noise)
        return actions, torch.distributions.TransformedDistribution(normal, [tanh]).log_prob(
            actions
        ).sum(1)

    def l2(self, net: nn.Module) -> Tensor:
        return (
            self.decay * torch.stack([(p**2).sum() for p in net.parameters() if p.ndim > 1]).sum()
        )

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        for adam in self.adams:
            adam.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, batch: Any, masks: list[Tensor]) -> list[float]:
        """Return each critic's loss before its step. `masks`: three of each, the actor last."""
        obs, actions, next_obs, rewards, terminated, noise = batch
        discounts = self.args.gamma * (1 - terminated)
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            next_actions, log_prob = self.act(next_obs, noise[0])
            x = torch.cat([next_obs, next_actions], 1)
            next_q = torch.minimum(*(net(x)[:, 0] for net in self.targets))
            y = self.args.reward_scale * rewards + discounts * (next_q - alpha * log_prob)
        losses = []
        for n, (net, adam) in enumerate(zip(self.critics, self.adams[1:-1])):
            loss = ((net(torch.cat([obs, actions], 1))[:, 0] - y) ** 2).mean()
            losses.append(loss.item())
            self.step(adam, loss + self.l2(net))
            self.mask(net, masks[3 * n : 3 * n + 3])
        new_actions, log_prob = self.act(obs, noise[1])
        x = torch.cat([obs, new_actions], 1)
        q = torch.minimum(*(net(x)[:, 0] for net in self.critics[:2]))
        self.step(self.adams[0], (alpha * log_prob - q).mean() + self.l2(self.actor))
        self.mask(self.actor, masks[-3:])
        entropy = -log_prob.detach()
        self.step(
            self.adams[-1],
            (self.log_alpha.exp() * (entropy - self.args.target_entropy * ACT)).mean(),
        )
        with torch.no_grad():
            for n, (target, net) in enumerate(zip(self.targets, self.critics)):
                for t, p in zip(target.parameters(), net.parameters()):
                    t.copy_((1 - self.args.tau) * t + self.args.tau * p)
                self.mask(target, masks[3 * n : 3 * n + 3])
        return losses

    @staticmethod
    @torch.no_grad()
    def mask(net: nn.Module, masks: list[Tensor]) -> None:
        for p, mask in zip([p for p in net.parameters() if p.ndim > 1], masks):
            p[mask == 0] = 0

    def assert_equal(self, agent: Any) -> None:
        pairs = [(agent.stacks, self.critics), (agent.targets, self.targets)]
        for stacks, nets in pairs:
            for n, net in enumerate(nets):
                for ours, theirs in zip(self.unstacked(stacks, n), net.parameters(), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        for ours, theirs in zip(agent.actor.parameters(), self.actor.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        torch.testing.assert_close(agent.log_alpha, self.log_alpha[0], atol=1e-10, rtol=0)


@torch.no_grad()
def disturb(agent: Any, share: float = 0.0) -> None:
    """Make all critics differ, and prune a share of every network at random."""
    rng = torch.Generator().manual_seed(5)
    for stack in (*agent.stacks, *agent.targets):
        stack += 0.05 * torch.randn(stack.shape, generator=rng, dtype=torch.float64)
    for weight, mask in zip(agent.weights, agent.masks):
        mask.copy_(torch.rand(mask.shape, generator=rng) >= share)
        weight *= mask
    for target, mask in zip(agent.target_weights, agent.masks):
        target *= mask


def test_the_networks_begin_by_glorots_rule(module: ModuleType) -> None:
    """Uniform up to sqrt(6 / (in + out)), biases and log alpha 0; all pairs are copies."""
    agent, same, other = (make_agent(module, seed=seed) for seed in (5, 5, 6))
    assert all(map(torch.equal, all_parameters(agent), all_parameters(same)))
    weights = [(w[n], *w.shape[1:]) for w in agent.stacks[::2] for n in range(2)]
    weights += [(w, *w.shape) for w in (p for p in agent.actor.parameters() if p.ndim == 2)]
    assert len(weights) == 9
    for w, inputs, outputs in weights:
        assert 0.95 < w.abs().max() * ((inputs + outputs) / 6) ** 0.5 <= 1 + 1e-6
    for ours, theirs in zip(agent.stacks[::2], other.stacks[::2]):
        assert not torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], theirs[0]), (
            "each critic, each seed"
        )
        assert torch.equal(ours, ours[:2].repeat(len(ours) // 2, 1, 1))
    assert not torch.equal(agent.actor.output.weight, other.actor.output.weight)
    biases = [
        *agent.stacks[1::2],
        *(p for p in agent.actor.parameters() if p.ndim == 1),
        agent.log_alpha,
    ]
    assert not any(bias.any() for bias in biases)
    assert all(
        torch.equal(target, critic[:2]) for target, critic in zip(agent.targets, agent.stacks)
    )


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("pairs", [1, 3])
def test_an_update_of_k_pairs_is_k_separate_updates(
    eaudesac: ModuleType, pairs: int, share: float
) -> None:
    """With one pair: plain SAC."""
    agent = make_agent(
        eaudesac, num_networks=pairs, reward_scale=0.7, tau=0.1, gamma=0.9, learning_rate=3e-3
    )
    disturb(agent, share)
    reference, accumulated = Reference(agent, pairs), np.zeros(pairs)
    for step in range(12):
        batch = make_batch(step)
        agent.learn(Fixed(batch), 256 + step + 1)
        losses = reference.update(batch, agent.masks)
        accumulated = 0.9 * accumulated + 0.1 * np.array(losses).reshape(pairs, 2).sum(1)
        reference.assert_equal(agent)
    assert agent.accumulated_loss.tolist() == pytest.approx(accumulated.tolist(), rel=1e-10)
    assert pairs == 1 or len({round(x, 6) for x in accumulated}) == pairs, "the pairs differ"


@pytest.mark.parametrize(("share", "decay"), [(0.0, 0.0), (0.6, 0.0), (0.3, 0.01)])
def test_the_pruned_update_is_plain_sac_with_masks(
    sac: ModuleType, share: float, decay: float
) -> None:
    agent = make_agent(
        sac, weight_decay=decay, reward_scale=0.7, tau=0.1, target_entropy=-0.3, learning_rate=3e-3
    )
    disturb(agent, share)
    reference = Reference(agent, 1, decay)
    for step in range(12):
        batch = make_batch(step)
        agent.update(*batch)
        reference.update(batch, agent.masks)
        reference.assert_equal(agent)


def test_plain_sac_is_the_same_in_both_scripts(eaudesac: ModuleType, sac: ModuleType) -> None:
    """K = 1 never pruned, and sparsity 0, over choices and prunings: equal bit for bit."""
    flags = {"learning_rate": 1e-3, "reward_scale": 1.0, "target_entropy": -1.0, "prune_every": 3}
    ours = make_agent(eaudesac, num_networks=1, max_exponent=0.0, **flags)
    theirs = make_agent(sac, sparsity=0.0, weight_decay=0.0, **flags)
    for agent in (ours, theirs):
        learn(agent, Fixed(), 10)
    assert all(map(torch.equal, all_parameters(ours), all_parameters(theirs)))
    assert ours.selected == 1 and ours.candidate_sparsity == [0.0] and theirs.sparsity == 0.0


class Fixed:
    """A replay whose i-th sample is make_batch(i), or always the same batch."""

    def __init__(self, batch: tuple[Tensor, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        self.batch, self.dtype, self.drawn = batch, dtype, 0

    def sample(self, _: int) -> tuple[Tensor, ...]:
        self.drawn += 1
        return tuple(x.to(self.dtype) for x in self.batch or make_batch(self.drawn))


def learn(agent: Any, replay: Any, updates: int) -> None:
    """Take gradient steps."""
    agent.learn(replay, agent.args.learning_starts + agent.gradient_step + updates)


def test_what_is_logged_of_an_update(sac: ModuleType) -> None:
    agent = make_agent(sac, weight_decay=0.0)
    disturb(agent)
    reference, batch = Reference(agent, 1), make_batch(0)
    q = [net(torch.cat(batch[:2], 1)).mean().item() for net in reference.critics]
    agent.update(*batch)
    losses = reference.update(batch, agent.masks)
    report = agent.report()
    assert [report["losses/qf1_loss"], report["losses/qf2_loss"]] == pytest.approx(losses)
    assert report["losses/q_values"] == pytest.approx(np.mean(q))
    assert report["losses/alpha"] == 1.0
    assert all(math.isfinite(report[f"losses/{name}"]) for name in ("actor_loss", "alpha_loss"))


def test_bf16_changes_an_update_by_its_rounding_only(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = list[bool]()
    rough, fine = (make_agent(module, torch.float32, precision=p) for p in ("bf16", "fp32"))
    batch = tuple(tensor.float() for tensor in make_batch(0))
    for owner, name in ((module, "critic_values"), (module.Actor, "forward")):
        function = getattr(owner, name)

        def noted(*what: Any, function: Any = function) -> Any:
            rounded.append(torch.is_autocast_enabled("cpu"))
            return function(*what)

        monkeypatch.setattr(owner, name, noted)
    rough.update(*batch)
    assert rounded == [True] * 5, (
        "targets, critics, the critics that the actor follows, and the actor twice"
    )
    fine.update(*batch)
    assert rounded[5:] == [False] * 5
    assert rough.latest.tolist() != fine.latest.tolist()
    assert rough.latest.tolist() == pytest.approx(fine.latest.tolist(), rel=0.05, abs=0.05)
    assert all(p.dtype == torch.float32 for p in all_parameters(rough))
    with torch.autocast("cpu", torch.bfloat16):
        answers = [
            module.critic_values(rough.stacks, *batch[:2]),
            *rough.actor(batch[0]),
        ]
    assert all(answer.dtype == torch.float32 for answer in answers), (
        "the last layers are not rounded"
    )


# The policy


def test_the_density_of_actions_integrates_to_one(module: ModuleType) -> None:
    """At five policies, over actions in (-1, 1) by the trapezoidal rule in u = atanh(action)."""
    actor = module.Actor(1, 1, 8, 2).double()
    for obs in (-3.0, -1.0, 0.0, 1.0, 3.0):
        with torch.no_grad():
            mean, log_std = (x.item() for x in actor(torch.tensor([[obs]], dtype=torch.float64)))
            noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
            actions, log_prob = actor.sample(
                torch.full((20_001, 1), obs, dtype=torch.float64), noise
            )
        u = (mean + math.exp(log_std) * noise)[:, 0]
        assert torch.allclose(actions[:, 0], u.tanh())
        # da = (1 - tanh(u)^2) du
        integral = torch.trapezoid(log_prob.exp() / u.cosh() ** 2, u)
        assert integral.item() == pytest.approx(1, abs=1e-9)


def test_log_probabilities_stay_finite_at_the_bounds(module: ModuleType) -> None:
    """From |u| = 9 on tanh(u) rounds to 1; log(1 - tanh(u) ** 2) is then -2 * (|u| - log 2)."""
    actor = module.Actor(1, 1, 8, 2)
    for u in (-60.0, -20.0, 20.0, 60.0):
        with torch.no_grad():
            actor.output.weight.zero_()
            actor.output.bias.copy_(torch.tensor([u, 0.0]))
        actions, log_prob = actor.sample(torch.zeros(1, 1), torch.zeros(1, 1))
        assert abs(actions.item()) == 1
        assert log_prob.item() == pytest.approx(
            -0.5 * math.log(2 * math.pi) + 2 * (abs(u) - math.log(2)), rel=1e-5
        )
        log_prob.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in actor.parameters() if p.grad is not None)


def test_the_standard_deviation_is_clamped(module: ModuleType) -> None:
    actor = module.Actor(1, 1, 8, 2)
    for bias, expected in ((-100.0, -20.0), (1.0, 1.0), (100.0, 2.0)):
        with torch.no_grad():
            actor.output.weight.zero_()
            actor.output.bias.copy_(torch.tensor([0.0, bias]))
        assert actor(torch.zeros(1, 1))[1].item() == expected


def test_acting(module: ModuleType) -> None:
    """Uniform to explore, else the policy's mean and deviation; the generator alone decides."""
    agent, other = (make_agent(module, torch.float32) for _ in range(2))
    obs = np.random.default_rng(0).normal(size=(4000, OBS)).astype(np.float32)
    actions = agent.act(obs, explore=True)
    assert actions.shape == (4000, ACT) and actions.dtype == np.float32
    assert np.abs(actions).max() <= 1 and abs(actions.mean()) < 0.05
    assert actions.std() == pytest.approx(3**-0.5, rel=0.05)
    same = np.repeat(obs[:1], 4000, 0)
    actions = np.arctanh(agent.act(same, explore=False).astype(np.float64))
    mean, log_std = (x.detach().numpy() for x in agent.actor(torch.from_numpy(obs[:1])))
    assert actions.mean(0) == pytest.approx(mean[0], abs=0.1)
    assert actions.std(0) == pytest.approx(np.exp(log_std[0]), rel=0.1)
    other.act(obs, explore=True)
    assert np.array_equal(np.arctanh(other.act(same, explore=False).astype(np.float64)), actions)


def test_seeds_and_uses_of_randomness_are_independent(
    eaudesac: ModuleType, sac: ModuleType
) -> None:
    """Two seeds explore, act and prune differently; no two uses share their random numbers."""
    obs = np.zeros((1, OBS), np.float32)
    for module in (eaudesac, sac):
        agents = [make_agent(module, torch.float32, seed=seed) for seed in (1, 2)]
        for agent in agents:
            agent.actor.load_state_dict(agents[0].actor.state_dict())
        for explore in (True, False):
            one, two = (agent.act(obs, explore) for agent in agents)
            assert not np.isclose(one, two).any()
        draws = [rng.random() for agent in agents for rng in agent.rng.values()]
        assert len({*draws}) == len(draws) == (4 if module is sac else 6)


# Choosing and pruning


def zeros(weights: list[Tensor]) -> int:
    return sum(int((w == 0).sum()) for w in weights)


def sparsity_records(agent: Any) -> list[float]:
    """Return what is logged of four pairs: which was chosen, sparsity of the target, of each."""
    report = agent.report()
    return [
        report[f"sparsity/{name}"]
        for name in ("selected", "target", *(f"candidate_{k}" for k in (1, 2, 3, 4)))
    ]


def erk_kept(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[int]:
    """Return how many weights each tensor keeps; the scale of the densities by bisection."""
    sizes, low, high = [math.prod(shape) for shape in shapes], 0.0, 1e9
    for _ in range(200):
        scale = (low + high) / 2
        kept = sum(min(n, scale * sum(shape)) for n, shape in zip(sizes, shapes))
        low, high = (scale, high) if kept < (1 - sparsity) * sum(sizes) else (low, scale)
    return [max(1, round(min(n, low * sum(shape)))) for n, shape in zip(sizes, shapes)]


def test_the_best_pair_is_copied_and_pruned(eaudesac: ModuleType) -> None:
    agent = make_agent(
        eaudesac, num_networks=4, max_sparsity_step=0.2, max_exponent=900.0, prune_every=100
    )
    disturb(agent, 0.0)
    for step in range(3):
        agent.update(*make_batch(step))
    before = [stack.detach().clone() for stack in agent.stacks]
    moments = [state["exp_avg_sq"].clone() for state in agent.critic_optimizer.state.values()]
    targets = [target.clone() for target in agent.targets]
    assert "sparsity/selected" not in agent.report(), "nothing has been chosen yet"
    agent.gradient_step = 100
    agent.accumulated_loss.copy_(torch.tensor([3.0, math.nan, 1.0, 2.0]))
    agent.choose_and_prune()
    assert agent.selected == 3 and agent.accumulated_loss.tolist() == [0] * 4
    assert sparsity_records(agent) == pytest.approx([3, 0, 0, 0.2, 0.2, 0.2])
    assert agent.sparsity == 0 and agent.candidate_sparsity[1:] == pytest.approx([0.2] * 3), (
        "S_max: no draw is near 0"
    )
    for stack, old in zip(agent.stacks, before):
        assert torch.equal(stack[:2], old[4:6]), "pair 1 is the chosen one, whole"
        for n in range(2, 8):
            kept = stack[n] != 0
            assert torch.equal(stack[n][kept], old[4 + n % 2][kept]), (
                "the others are its pruned copies"
            )
    for new, old in zip(agent.critic_optimizer.state.values(), moments):
        assert all(torch.equal(new["exp_avg_sq"][n], old[4 + n % 2]) for n in range(8))
    assert all(map(torch.equal, agent.targets, targets)), (
        "the target of an unpruned pair stays as it is"
    )
    shapes = [(OBS + ACT, 256), (256, 256), (256, 1)]
    for n in range(2, 8):
        kept = [int((weight[n] != 0).sum()) for weight in agent.stacks[::2]]
        assert kept == erk_kept(shapes, 0.2)
        for weight, old in zip(agent.stacks[::2], before[::2]):
            gone, left = old[4 + n % 2][weight[n] == 0].abs(), old[4 + n % 2][weight[n] != 0].abs()
            assert not len(gone) or gone.max() <= left.min(), "the smallest go"

    agent.gradient_step = 200
    agent.accumulated_loss.copy_(torch.tensor([3.0, 2.0, 4.0, 2.0]))
    agent.choose_and_prune()
    assert agent.selected == 2, "ties go to the lower index"
    assert agent.sparsity == pytest.approx(0.2)
    assert agent.candidate_sparsity[1:] == pytest.approx([0.4] * 3)
    assert sparsity_records(agent) == pytest.approx([2, 0.2, 0.2, 0.4, 0.4, 0.4])
    for target, stack in zip(agent.targets[::2], agent.stacks[::2]):
        assert torch.equal(target == 0, stack[:2] == 0), (
            "the target takes over the chosen pair's mask"
        )
    agent.update(*make_batch(9))
    assert [zeros([w[n] for w in agent.stacks[::2]]) for n in range(2)] == [
        zeros([t[n] for t in agent.targets[::2]]) for n in range(2)
    ]


class Exponents:
    """Stands in for the generator of exponents."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (0, 3.0)
        return next(self.values)


def test_the_next_sparsities_by_hand(eaudesac: ModuleType) -> None:
    """H = 5,000, T = 1,000: at t = 1,000 (3/4) ** n of the density stays, at 4,000 nothing."""
    agent = make_agent(eaudesac, num_networks=3, max_sparsity_step=1.0)
    disturb(agent)
    assert agent.horizon == 5000
    agent.rng["exponent"] = Exponents(1.0, 2.0, 0.5, 1.0)
    acting = agent.rng["act"].bit_generator.state
    agent.gradient_step = 1000
    agent.choose_and_prune()
    assert agent.candidate_sparsity == pytest.approx([0, 1 / 4, 7 / 16])
    agent.gradient_step = 2000
    agent.accumulated_loss.copy_(torch.tensor([2.0, 1.0, 3.0]))
    agent.choose_and_prune()
    assert agent.candidate_sparsity == pytest.approx([1 / 4, 1 - 3 / 4 * (2 / 3) ** 0.5, 1 / 2])
    agent.rng["exponent"] = Exponents(1.0, 2.0)
    agent.gradient_step = 4000
    agent.choose_and_prune()
    assert agent.candidate_sparsity == pytest.approx([1 / 4, 1, 1])
    assert all(mask.sum() == 1 for mask in agent.masks[6:-3]), "each tensor keeps a weight"
    assert agent.rng["act"].bit_generator.state == acting, "exponents have a generator of their own"


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_gradient_steps_of_a_run(eaudesac: ModuleType, sac: ModuleType, num_envs: int) -> None:
    """5,257 steps are 5,259 of three environments; 256 of them are random."""
    flags = {"total_timesteps": 5257, "num_envs": num_envs}
    updates = {1: 5001, 3: 5003}[num_envs]
    assert make_agent(eaudesac, **flags).horizon == updates
    agent = make_agent(sac, prune_start=0.0, prune_end=1.0, **flags)
    assert (agent.start, agent.end) == (0, updates - 1), (
        "the last masks come before the last update"
    )
    agent = make_agent(sac, total_timesteps=264)
    assert (agent.start, agent.end) == (2, 6), "1.6 and 6.4 of 8"


def test_sparsity_is_exact_after_every_update(eaudesac: ModuleType) -> None:
    """Masks hold and nest; actor and target have the chosen pair's sparsity."""
    flags = {"total_timesteps": 300, "max_sparsity_step": 0.1, "prune_every": 2, "tau": 0.3}
    agent = make_agent(eaudesac, num_networks=3, prune_actor=True, **flags)
    disturb(agent)
    replay, chosen = Fixed(), []
    masks = [mask.clone() for mask in agent.masks[:6]]
    for step in range(1, 25):
        learn(agent, replay, 1)
        for weight, mask in zip(agent.weights, agent.masks):
            assert torch.equal(weight == 0, mask == 0)
        for target, mask in zip(agent.target_weights, agent.masks):
            assert torch.equal(target == 0, mask == 0)
        if step % 2 == 0:
            chosen.append(agent.sparsity)
            pair = agent.masks[:6]
            assert all((new <= old).all() for new, old in zip(pair, masks)), "what is pruned stays"
            for k, sparsity in enumerate(agent.candidate_sparsity):
                masks = agent.masks[6 * k : 6 * k + 6]
                assert all((mask <= of_1).all() for mask, of_1 in zip(masks, pair)), "masks nest"
                pruned = zeros(agent.weights[6 * k : 6 * k + 3])
                assert pruned == pytest.approx(sparsity * (OBS + ACT + 256 + 1) * 256, abs=3)
            masks = [mask.clone() for mask in pair]
            shapes = [(256, OBS), (256, 256), (2 * ACT, 256)]
            kept = [int((w != 0).sum()) for w in agent.weights[-3:]]
            assert kept == erk_kept(shapes, agent.sparsity)
    assert chosen == sorted(chosen) and chosen[-1] > 0.1


def test_the_actor_stays_dense_unless_asked(eaudesac: ModuleType) -> None:
    agent = make_agent(eaudesac, num_networks=3, max_sparsity_step=0.5, prune_every=2)
    learn(agent, Fixed(), 12)
    assert agent.candidate_sparsity[1] > 0 and zeros(agent.weights[-3:]) == 0


def test_another_score_prunes_every_network(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random score, which draws from the generator it is given: the same seed, the same masks."""

    def score(network: nn.Module, rng: np.random.Generator) -> list[Tensor]:
        asked.append(next(iter(module.prunable(network).values())).shape)
        shapes = [w.shape for w in module.prunable(network).values()]
        return [torch.from_numpy(rng.random(shape)) for shape in shapes]

    asked = list[tuple[int, ...]]()
    monkeypatch.setattr(module, "pruning_scores", score)
    eau_de = hasattr(module, "EauDeSAC")
    flags = {"num_networks": 2, "prune_actor": True} if eau_de else {"sparsity": 0.5}
    one, two = (make_agent(module, total_timesteps=288, prune_every=4, **flags) for _ in range(2))
    for agent in (one, two):
        learn(agent, Fixed(), 24)
    assert {*asked} == {(256, OBS + ACT), (256, OBS)}, "critics and actor"
    assert all(map(torch.equal, one.masks, two.masks)) and not all(m.all() for m in one.masks)


def test_what_a_checkpoint_brings_back(module: ModuleType) -> None:
    """An agent that was restored reports, acts and goes on as the one that was saved."""
    flags = (
        {"num_networks": 3, "max_sparsity_step": 0.1}
        if hasattr(module, "EauDeSAC")
        else {"sparsity": 0.5}
    )
    flags |= {"total_timesteps": 276, "prune_every": 4}
    saved, other = (make_agent(module, torch.float32, **flags) for _ in range(2))
    obs = np.ones((3, OBS), np.float32)
    saved.act(obs, explore=True)
    learn(saved, Fixed(dtype=torch.float32), 11)
    torch.save(saved.state_dict(), file := io.BytesIO())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert saved.report()["sparsity/prunable"] > 0
    for _ in range(2):
        assert other.report() == saved.report()
        assert np.array_equal(other.act(obs, explore=False), saved.act(obs, explore=False))
        for agent in (saved, other):
            learn(agent, Fixed(dtype=torch.float32), 5)
        assert all(map(torch.equal, all_parameters(saved), all_parameters(other)))


@pytest.mark.parametrize("reset", [False, True])
def test_reset_optimizer(eaudesac: ModuleType, reset: bool) -> None:
    agent = make_agent(eaudesac, num_networks=2, prune_every=4, reset_optimizer=reset)
    learn(agent, Fixed(), 4)
    for state in agent.critic_optimizer.state.values():
        assert {*state} == {"step", "exp_avg", "exp_avg_sq"}
        assert all((tensor.count_nonzero() == 0) == reset for tensor in state.values())
        assert state["step"] == (0 if reset else 4)
    assert all(state["step"] == 4 for state in agent.actor_optimizer.state.values()), (
        "the actor's are left alone"
    )


def test_choices_are_made_when_due(eaudesac: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each multiple of prune_every after gradient step 0, none at the run's end."""
    flags = {"learning_starts": 256, "total_timesteps": 268, "replay_ratio": 2.0, "prune_every": 8}
    agent = make_agent(eaudesac, **flags)
    assert agent.horizon == 24
    chosen = list[int]()
    monkeypatch.setattr(agent, "choose_and_prune", lambda: chosen.append(agent.gradient_step))
    monkeypatch.setattr(agent, "update", lambda *_: None)
    for step in (257, 258, 258, 263, 268):
        agent.learn(Fixed(), step)
    assert chosen == [8, 16]


def test_losses_are_summed_or_averaged(
    eaudesac: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how, expected in (
        ("sum", [33.0, 66.0]),
        ("ema", [0.5 * (0.5 * 3 + 30), 0.5 * (0.5 * 6 + 60)]),
    ):
        agent = make_agent(eaudesac, num_networks=2, loss_aggregation=how, tau=0.5)
        losses = iter([[1.0, 2, 3, 3, 0, 0, 0, 0], [10.0, 20, 30, 30, 0, 0, 0, 0]])

        def update(*_: Any, agent: Any = agent, losses: Any = losses) -> None:
            agent.latest.copy_(torch.tensor(next(losses)))

        monkeypatch.setattr(agent, "update", update)
        learn(agent, Fixed(), 2)
        assert agent.accumulated_loss.tolist() == pytest.approx(expected)


def test_the_saved_critics_are_the_best_pair(eaudesac: ModuleType) -> None:
    agent = make_agent(eaudesac, num_networks=3)
    disturb(agent, 0.5)
    agent.accumulated_loss.copy_(torch.tensor([3.0, 1.0, 2.0]))
    networks, batch = agent.networks(), make_batch(0)
    values = eaudesac.critic_values(agent.stacks, *batch[:2])
    x = torch.cat(batch[:2], 1)
    assert torch.allclose(networks["qf1"](x)[:, 0], values[2])
    assert torch.allclose(networks["qf2"](x)[:, 0], values[3])
    pruned = zeros(agent.weights[6:12]) + zeros(agent.weights[-3:])
    total = 2 * (OBS + ACT + 256 + 1) * 256 + (OBS + 256 + 2 * ACT) * 256
    assert agent.report()["sparsity/prunable"] == pytest.approx(pruned / total)


def test_the_schedule_prunes_actor_and_critics_exactly(sac: ModuleType) -> None:
    """By hand: t0 = 1,000, t1 = 4,000, at every 500: 1 - (1 - (t - 1000) / 3000) ** 3."""
    agent = make_agent(sac, sparsity=0.9, prune_every=500)
    disturb(agent)
    assert (agent.start, agent.end) == (1000, 4000)
    shapes = [[(OBS + ACT, 256), (256, 256), (256, 1)]] * 2 + [
        [(256, OBS), (256, 256), (2 * ACT, 256)]
    ]
    progress = {999: 0, 1000: 0, 1499: 0, 1500: 91 / 216, 2000: 152 / 216, 2500: 0.875}
    progress |= {3000: 208 / 216, 3999: 215 / 216, 4000: 1, 4500: 1}
    networks = [agent.masks[:3], agent.masks[3:6], agent.masks[6:]]
    for step in range(0, 5000):
        if step % 500 == 0:
            agent.gradient_step = step
            agent.prune()
        if step in progress:
            assert agent.sparsity == pytest.approx(0.9 * progress[step])
            for network, layers in zip(networks, shapes):
                ends = erk_kept(layers, 0.9)
                for mask, shape, kept in zip(network, layers, ends):
                    n = math.prod(shape)
                    assert abs(mask.sum().item() - (n - progress[step] * (n - kept))) <= 1.5, (
                        step,
                        shape,
                    )
    total = sum(math.prod(shape) for layers in shapes for shape in layers)
    assert sum(int((m == 0).sum()) for m in agent.masks) == pytest.approx(0.9 * total, abs=5)


def test_the_last_masks_come_at_the_end_of_the_schedule(sac: ModuleType) -> None:
    """3,000 steps of schedule are no multiple of 700."""
    agent = make_agent(sac, sparsity=0.9, prune_every=700)
    pruned = {}
    for agent.gradient_step in range(5000):
        agent.prune()
        pruned[agent.gradient_step] = agent.sparsity
    steps = [step for step in pruned if pruned[step] != pruned.get(step - 1, 0.0)]
    assert steps == [1700, 2400, 3100, 3800, 4000] and pruned[4000] == 0.9


def test_pruned_weights_stay_zero_in_all_networks(sac: ModuleType) -> None:
    agent = make_agent(sac, total_timesteps=276, prune_every=1, sparsity=0.8, tau=0.3)
    replay = Fixed()
    for _ in range(20):
        learn(agent, replay, 1)
        for weight, mask in zip(agent.weights, agent.masks):
            assert torch.equal(weight == 0, mask == 0)
        for target, mask in zip(agent.target_weights, agent.masks):
            assert torch.equal(target == 0, mask == 0)
    report = agent.report()
    assert (
        report["sparsity/prunable"] == pytest.approx(0.8, abs=1e-3)
        and report["sparsity/target"] == 0.8
    )


def test_nothing_is_pruned_at_sparsity_zero(sac: ModuleType) -> None:
    agent = make_agent(sac, total_timesteps=276, prune_every=1, sparsity=0.0)
    learn(agent, Fixed(), 20)
    assert zeros(agent.weights) == 0 and all(mask.all() for mask in agent.masks)


# Environments and replay


class Lopsided(gym.Env[np.ndarray, np.ndarray]):
    """Observes the action; the first is bounded by 0 and 3, the second by -5 and -1. Six steps."""

    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([0, -5], np.float32), np.array([3, -1], np.float32))

    def __init__(self, **_: Any) -> None:
        pass

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return action, float(action.sum()), False, self.steps == 6, {}


def test_actions_are_rescaled_to_bounds_that_differ(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1 is the lower bound, 1 the upper one, 0 their middle; what was asked for is kept."""
    spec = gym.envs.registration.EnvSpec("Lopsided-v0", entry_point=Lopsided)
    monkeypatch.setitem(gym.registry, "Lopsided-v0", spec)
    envs = module.MujocoEnvs("Lopsided-v0", 1, 0)
    for asked, taken in (
        ([-1, -1], [0, -5]),
        ([1, 1], [3, -1]),
        ([0, 0], [1.5, -3]),
        ([-0.5, 0.5], [0.75, -2]),
    ):
        outcome = envs.step(np.array([asked], np.float32))
        assert envs.obs.tolist() == [taken] and outcome[1].tolist() == [sum(taken)]
        assert np.frombuffer(envs.actions, np.float32)[-2:].tolist() == asked


BOUNDS = {"Hopper-v5": 1.0, "Pendulum-v1": 2.0, "Humanoid-v5": 0.4}  # of the actions, both ways


def play(env_id: str, seed: int, index: int, actions: np.ndarray) -> list[tuple[Any, ...]]:
    """Return the transitions of one environment, played with Gymnasium alone."""
    env, found, bound = gym.make(env_id), [], np.float32(BOUNDS[env_id])

    def seeded(step: int) -> int:
        return int(np.random.SeedSequence((seed, index, step)).generate_state(1)[0])

    obs, _ = env.reset(seed=seeded(0))
    for step, action in enumerate(actions):
        next_obs, reward, terminated, truncated, _ = env.step(bound * action)
        found.append((obs, action, next_obs, reward, terminated, truncated))
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset(seed=seeded(step + 1))
    return found


def store(replay: Any, envs: Any, actions: np.ndarray) -> None:
    """Take a step, as main does."""
    obs = envs.obs
    replay.add(obs, actions, *envs.step(actions)[:3])


@pytest.mark.parametrize(
    ("env_id", "num_envs"),
    [("Hopper-v5", 1), ("Hopper-v5", 3), ("Pendulum-v1", 2), ("Humanoid", 1)],
)
def test_the_replay_holds_what_happened(module: ModuleType, env_id: str, num_envs: int) -> None:
    """Terminations (Hopper), time limits after 200 steps (Pendulum), a ring that wraps round."""
    steps, capacity, rng = 450, 300, np.random.default_rng(0)
    envs = module.MujocoEnvs(env_id, num_envs, 7)
    replay = module.Replay(module.Args(buffer_size=capacity), CPU, envs)
    actions = rng.uniform(-1, 1, (steps, num_envs, envs.num_actions)).astype(np.float32)
    episodes = list[tuple[float, int]]()
    for row in actions:
        store(replay, envs, row)
        episodes += envs.episodes
    assert envs.steps == steps and envs.actions == actions.tobytes()
    assert replay.count == capacity == len(replay.table)
    name = env_id if "-" in env_id else f"{env_id}-v5"
    worlds = [play(name, 7, i, actions[:, i]) for i in range(num_envs)]
    endings, returns = 0, list[tuple[float, int]]()
    for step in range(steps):
        for i, world in enumerate(worlds):
            obs, action, next_obs, reward, terminated, truncated = world[step]
            if step >= steps - replay.rows:
                row = replay.table[step % replay.rows * num_envs + i].numpy()
                wanted = np.concatenate([obs, action, next_obs, [reward, float(terminated)]])
                assert np.array_equal(row, wanted.astype(np.float32))
                endings += terminated or truncated
    for i, world in enumerate(worlds):
        score, length = 0.0, 0
        for *_, reward, terminated, truncated in world:
            score, length = score + float(reward), length + 1
            if terminated or truncated:
                returns.append((score, length))
                score, length = 0.0, 0
        now = world[-1][2]
        if not (world[-1][4] or world[-1][5]):
            assert np.array_equal(envs.obs[i], now.astype(np.float32))
    assert endings >= 2
    assert [*sum(sorted(episodes), ())] == pytest.approx([*sum(sorted(returns), ())])


def test_samples_are_uniform_and_whole(module: ModuleType) -> None:
    """A chi-squared test of which are drawn; noise is standard normal and new each time."""
    envs = module.MujocoEnvs("Pendulum-v1", 2, 0)
    replay = module.Replay(module.Args(buffer_size=40, seed=1, batch_size=30), CPU, envs)
    for step in range(15):  # 30 of 40 places are filled
        row = np.full((2, 1), step / 20, np.float32)
        replay.add(envs.obs, row, envs.obs, step + np.array([0, 0.5]), np.zeros(2, bool))
    batches = [replay.sample(300) for _ in range(100)]
    rewards = torch.cat([batch[3] for batch in batches])
    values, counts = rewards.unique(return_counts=True)
    assert values.tolist() == [n / 2 for n in range(30)]
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 58  # 29 degrees of freedom, p = 0.001
    assert all(torch.equal(batch[1][:, 0], (batch[3].floor() / 20)) for batch in batches)
    noise = torch.stack([batch[5] for batch in batches])
    assert noise.shape == (100, 2, 300, 1) and abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert len(noise.unique()) > 59_000
    flags = [module.Args(buffer_size=40, seed=seed, batch_size=30) for seed in (1, 2)]
    again, other = (module.Replay(args, CPU, envs) for args in flags)
    assert torch.equal(again.sample(300)[5], batches[0][5]), "by the seed"
    assert not torch.equal(other.sample(300)[5], batches[0][5])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Pendulum-v1"])
@pytest.mark.parametrize(("num_envs", "capacity"), [(1, 2000), (1, 130), (3, 390)])
def test_restored_environments_and_replay_go_on(
    eaudesac: ModuleType, env_id: str, num_envs: int, capacity: int
) -> None:
    """From a past at any step the same replay, and then the same future."""
    rng, args = np.random.default_rng(1), eaudesac.Args(buffer_size=capacity, batch_size=130)
    envs = eaudesac.MujocoEnvs(env_id, num_envs, 5)
    replay = eaudesac.Replay(args, CPU, envs)
    pasts = {}
    actions = rng.uniform(-1, 1, (700, num_envs, envs.num_actions)).astype(np.float32)
    for step, row in enumerate(actions):
        if step in (1, 137, 330, 431, 600):  # at 330 Pendulum's oldest of 130 is within an episode
            pasts[step] = copy.deepcopy(past_of(envs)), replay.table.clone()
        store(replay, envs, row)
    for step, (past, table) in pasts.items():
        again = eaudesac.MujocoEnvs(env_id, num_envs, 5)
        other = eaudesac.Replay(args, CPU, again)
        eaudesac.play_again(again, other, past, types.SimpleNamespace(stops=[], path=""))
        assert torch.equal(other.table, table) and other.count == min(step * num_envs, capacity)
        for row in actions[step:]:
            store(other, again, row)
        assert torch.equal(other.table, replay.table), step
        assert past_of(again)[:2] == past_of(envs)[:2] and np.array_equal(again.obs, envs.obs)
        assert np.array_equal(again.returns, envs.returns)
        assert np.array_equal(again.lengths, envs.lengths)


def past_of(envs: Any) -> list[Any]:
    """Return what a checkpoint keeps of the environments."""
    return [bytes(envs.actions), envs.began, torch.from_numpy(envs.obs.copy())]


def test_another_past_is_noticed(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    envs = module.MujocoEnvs("Hopper-v5", 1, 5)
    for _ in range(5):
        envs.step(np.zeros((1, 3), np.float32))
    actions, began, obs = past_of(envs)
    actions = (np.frombuffer(actions, np.float32) + 0.1).astype(np.float32).tobytes()
    again = module.MujocoEnvs("Hopper-v5", 1, 5)
    replay = module.Replay(module.Args(), CPU, again)
    with pytest.raises(SystemExit) as end:
        run = types.SimpleNamespace(stops=[], path="")
        module.play_again(again, replay, [actions, began, obs], run)
    assert end.value.code == 2 and "versions.json" in capsys.readouterr().err


@pytest.mark.parametrize(("env_id", "sizes"), [("Pendulum-v1", (3, 1)), ("Hopper-v5", (11, 3))])
def test_evaluation_is_by_the_mean_action_and_always_the_same(
    module: ModuleType, env_id: str, sizes: tuple[int, int]
) -> None:
    """The first episode of each environment counts; Hopper's end at different steps."""
    torch.manual_seed(0)
    actor, lengths, scores = module.Actor(*sizes, 16, 2), list[int](), list[float]()
    with torch.no_grad():
        actor.output.weight *= 0.03  # small actions, under which Hopper falls at different times
    args = module.Args(env_id=env_id, eval_episodes=3, seed=5)
    result = module.evaluate(actor, args)
    assert result == module.evaluate(actor, args)
    for i in range(3):
        env, total, over, lengths = gym.make(env_id), 0.0, False, [*lengths, 0]
        obs, _ = env.reset(seed=int(np.random.SeedSequence((1_000_005, i, 0)).generate_state(1)[0]))
        while not over:
            mean = actor(torch.from_numpy(obs.astype(np.float32))[None])[0]
            obs, reward, *ends, _ = env.step(
                np.float32(BOUNDS[env_id]) * mean[0].detach().tanh().numpy()
            )
            total, over, lengths[-1] = total + float(reward), any(ends), lengths[-1] + 1
        scores.append(total)
    assert result["eval/episodic_return"] == pytest.approx(np.mean(scores), rel=1e-3)
    assert result["eval/episodes"] == 3
    assert env_id != "Hopper-v5" or len({*lengths}) > 1


class Two:
    """One ends an episode at every second step, the other at step 5; rewards +t and -t."""

    def __init__(self, env_id: str, num_envs: int, seed: int) -> None:
        assert (env_id, num_envs, seed) == ("any", 2, 1_000_007), "none of training's seeds"
        self.obs, self.steps = np.zeros((2, 3), np.float32), 0

    def step(self, _: np.ndarray) -> tuple[np.ndarray, ...]:
        self.steps += 1
        ended = np.array([self.steps % 2 == 0, self.steps == 5])
        return self.obs, np.array([1.0, -1.0]) * self.steps, ended, ended


@pytest.mark.parametrize(("eval_steps", "score"), [(1000, 3 - 15), (4, 3 - 10), (1, 1 - 1)])
def test_only_first_episodes_count(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, eval_steps: int, score: float
) -> None:
    """And of those the steps before --eval-steps."""
    monkeypatch.setattr(module, "MujocoEnvs", Two)
    args = module.Args(env_id="any", eval_episodes=2, eval_steps=eval_steps, seed=7)
    result = module.evaluate(module.Actor(3, 1, 4, 2), args)
    assert result == {"eval/episodic_return": score / 2, "eval/episodes": 2}
    run = types.SimpleNamespace(stops=[15], path="a/run")
    with pytest.raises(SystemExit) as end:
        module.evaluate(module.Actor(3, 1, 4, 2), args, run)
    assert end.value.code == 75, "a signal ends it"


@pytest.mark.parametrize("steps", [[200, 400], [200, 400, 450]])
def test_evaluations_and_records_of_a_run(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """Each epoch's end has one of each, and the run's, with the sparsity of what is saved."""
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)  # those of this process stay
    flags = {
        "env_id": "Pendulum-v1",
        "total_timesteps": steps[-1],
        "learning_starts": 300,
        "batch_size": 4,
        "width": 1,
    }
    eau_de, schedule = (
        {"prune_every": 30, "max_sparsity_step": 0.2},
        {"prune_every": 7, "prune_end": 0.99},
    )
    flags |= eau_de if hasattr(module, "EauDeSAC") else schedule
    module.main(
        module.Args(**flags, epoch_steps=200, eval_episodes=1, run_dir=str(tmp_path / "run"))
    )
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    sparsities = {r["step"]: r["sparsity/prunable"] for r in records if "sparsity/prunable" in r}
    assert [r["step"] for r in records if "eval/episodic_return" in r] == steps
    assert [*sparsities] == steps and sorted({*sparsities.values()}) == [*sparsities.values()], (
        "it grows to the end"
    )
    assert (
        json.loads((tmp_path / "run" / "final.json").read_text())["sparsity/prunable"]
        == sparsities[steps[-1]]
    )


SHORT: dict[str, Any] = {
    "env_id": "Pendulum-v1",
    "total_timesteps": 40,
    "learning_starts": 25,
    "batch_size": 4,
    "width": 1,
}


def test_a_loss_that_is_not_finite_ends_the_run(
    module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    flags = SHORT | {"learning_rate": 1e30, "eval_episodes": 0, "run_dir": str(tmp_path / "run")}
    with pytest.raises(SystemExit) as end:
        module.main(module.Args(**flags))
    line = capsys.readouterr().err
    assert end.value.code == 1 and "step 26: the losses are" in line
    assert "checkpoint kept: none" in line


def test_a_lost_pair_is_replaced_at_the_next_choice(eaudesac: ModuleType) -> None:
    """All else goes on as if there were no such pair. The loss of pair 1 ends the run."""
    flags = {"num_networks": 3, "prune_every": 6, "max_sparsity_step": 0.1}
    broken, whole = (make_agent(eaudesac, **flags) for _ in range(2))
    for agent in (broken, whole):
        disturb(agent)
        with torch.no_grad():  # never the best
            agent.stacks[-1][4:] = math.nan if agent is broken else 100.0
        learn(agent, Fixed(), 5)
        assert not agent.lost()
    for ours, theirs in zip(all_parameters(broken), all_parameters(whole)):
        assert torch.equal(
            ours[:4] if len(ours.shape) == 3 else ours,
            theirs[:4] if len(theirs.shape) == 3 else theirs,
        )
    assert broken.accumulated_loss.isnan().tolist() == [False, False, True]
    assert "losses/qf1_loss" in whole.report() and "losses/qf1_loss" not in broken.report()
    for agent in (broken, whole):
        learn(agent, Fixed(), 9)
    assert all(map(torch.equal, all_parameters(broken), all_parameters(whole)))
    assert broken.report() == whole.report()
    with torch.no_grad():
        broken.stacks[-1][:1] = math.nan
    learn(broken, Fixed(), 1)
    assert broken.lost()


def test_the_warm_up_is_random_and_as_long_as_asked(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = module.EauDeSAC if hasattr(module, "EauDeSAC") else module.SAC
    act, explored = kind.act, []

    def noted(self: Any, obs: np.ndarray, explore: bool) -> np.ndarray:
        explored.append(explore)
        return act(self, obs, explore)

    monkeypatch.setattr(kind, "act", noted)
    module.main(module.Args(**SHORT, eval_episodes=0, run_dir=str(tmp_path / "run")))
    assert explored == [True] * 25 + [False] * 15


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("Hoper-v5", "Hopper-v5"),
        ("CartPole-v1", "bounded continuous actions"),
        ("Blackjack-v1", "vector"),
        ("Hopper-v3", "cannot be made"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(
    module: ModuleType, env_id: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        module.make_env(env_id)
    line = capsys.readouterr().err.strip()
    assert (
        end.value.code == 2 and f"--env-id {env_id}" in line and words in line and "\n" not in line
    )


@pytest.mark.parametrize("space", ["matrix", "empty", "whole"])
def test_actions_that_are_no_vector_of_fractions_are_refused(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    space: str,
) -> None:
    env = gym.make("Pendulum-v1")
    shape, dtype = {
        "matrix": ((2, 3), np.float32),
        "empty": ((0,), np.float32),
        "whole": ((2,), np.int64),
    }[space]
    env.action_space = gym.spaces.Box(-1, 1, shape, dtype)  # type: ignore[arg-type]
    monkeypatch.setattr(gym, "make", lambda *_, **__: env)
    with pytest.raises(SystemExit) as end:
        module.make_env("Pendulum-v1")
    assert end.value.code == 2 and "bounded continuous actions" in capsys.readouterr().err


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dense", "pruned", "eau de", "eau de, pruned actor", "bf16"])
def test_it_learns_to_swing_up_a_pendulum(
    eaudesac: ModuleType, sac: ModuleType, which: str, tmp_path: Path
) -> None:
    """A random policy scores about -1,200 over 200 steps, a good one -150."""
    flags: dict[str, Any] = {"env_id": "Pendulum-v1", "total_timesteps": 10_000, "seed": 2}
    flags |= {"learning_starts": 500, "learning_rate": 1e-3, "width": 1, "reward_scale": 1.0}
    flags |= {"target_entropy": -1.0, "run_dir": str(tmp_path / "run"), "epoch_steps": 5000}
    flags |= {"batch_size": 128, "prune_every": 100, "device": "cpu"}
    ways: dict[str, dict[str, Any]] = {"dense": {"sparsity": 0.0}, "pruned": {"sparsity": 0.95}}
    ways |= {"eau de, pruned actor": {"prune_actor": True}, "bf16": {"precision": "bf16"}}
    own = ways.get(which, {})
    module = sac if "sparsity" in own else eaudesac
    module.main(module.Args(**flags, **own))
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    print(which, final["eval/episodic_return"], final["sparsity/prunable"])
    assert final["eval/episodic_return"] > -250
    if "sparsity" in own:
        assert final["sparsity/prunable"] == pytest.approx(own["sparsity"], abs=1e-3)
    else:
        assert final["sparsity/layer/qf1.dense2"] > 0.2
        assert (final["sparsity/layer/actor.dense2"] > 0.2) == ("actor" in which)
