"""CQL on a dataset: losses, pruning at the start, loaders, against slow versions of them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from minari.data_collector import EpisodeBuffer
from safetensors.torch import load
from tasks import CPU
from torch import Tensor, nn

OBS, ACT, B, N = 5, 2, 8, 3  # sizes of observations, actions, batch, drawn actions of a kind


def make_agent(cql: ModuleType, **flags: Any) -> Any:
    """Return an agent in float64 with random biases, so that all of them matter."""
    torch.set_default_dtype(torch.float64)
    try:
        args = cql.Args(**{"cql_actions": N, "seed": 3, "layers": 2, **flags})
        agent = cql.CQL(args, OBS, ACT, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*agent.stacks, *agent.targets, *agent.actor.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
        agent.log_alpha += 0.3
    return agent


def make_batch(seed: int, n: int = N) -> tuple[Tensor, ...]:
    """Return random transitions, of which a third terminate."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    terminated = (torch.rand(B, generator=rng, dtype=torch.float64) < 0.33).double()
    uniform = 2 * torch.rand(n, B, ACT, generator=rng, dtype=torch.float64) - 1
    obs, actions, next_obs, rewards = (
        normal(B, OBS),
        normal(B, ACT).tanh(),
        normal(B, OBS),
        normal(B),
    )
    return obs, actions, next_obs, rewards, terminated, normal(2, 1 + n, B, ACT), uniform


class Reference:
    """CQL transition by transition, action by action, on one module per network."""

    def __init__(self, agent: Any) -> None:
        self.args = agent.args
        self.actor = copy.deepcopy(agent.actor)
        self.critics, self.targets = (
            [self.unstacked(stacks, n) for n in range(2)]
            for stacks in (agent.stacks, agent.targets)
        )
        self.log_alpha = agent.log_alpha.detach().clone().requires_grad_()

    @staticmethod
    def unstacked(stacks: list[Tensor], n: int) -> nn.Sequential:
        layers = list[nn.Module]()
        for weight, bias in zip(stacks[::2], stacks[1::2]):
            layers += [nn.Linear(*weight.shape[1:], dtype=torch.float64), nn.ReLU()]
            layers[-2].load_state_dict({"weight": weight[n].T, "bias": bias[n, 0]})
        return nn.Sequential(*layers[:-1])

    def act(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return an action [A] and its log-probability for obs [O]."""
        x = obs
        for layer in [*self.actor][:-1]:
            x = torch.relu(layer(x)) if isinstance(layer, nn.Linear) else x
        mean, log_std = self.actor.output(x).split(ACT)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        tanh = torch.distributions.TanhTransform(cache_size=1)
        squashed = torch.distributions.TransformedDistribution(normal, [tanh])
        action = tanh(mean + log_std.clamp(-20, 2).exp() * noise)
        return action, squashed.log_prob(action).sum()

    def losses(self, batch: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Return TD losses, gaps, the actor's and the temperature's loss."""
        alpha, args = self.log_alpha.exp().detach(), self.args
        all_obs, actions, all_next_obs, rewards, terminated, noises, uniform = batch
        td, gaps = ([torch.zeros((), dtype=torch.float64) for _ in range(2)] for _ in range(2))
        actor_loss = alpha_loss = torch.zeros((), dtype=torch.float64)
        for b in range(B):
            obs, action, next_obs = all_obs[b], actions[b], all_next_obs[b]
            drawn = [self.act(obs, noise[b]) for noise in noises[0]]
            later = [self.act(next_obs, noise[b]) for noise in noises[1]]
            next_q = min(
                net(torch.cat([next_obs, later[0][0]]))[0] for net in self.targets
            ).detach()
            if args.entropy_backup:
                next_q = next_q - alpha * later[0][1].detach()
            y = rewards[b] + args.gamma * (1 - terminated[b]) * next_q
            asked = [
                (u[b], torch.tensor(ACT * math.log(0.5), dtype=torch.float64)) for u in uniform
            ]
            asked += [*later[1:], *drawn[1:]]
            for n, net in enumerate(self.critics):
                q = net(torch.cat([obs, action]))[0]
                td[n] = td[n] + (q - y) ** 2 / B
                weighed = sum(
                    torch.exp(net(torch.cat([obs, a.detach()]))[0]) / p.detach().exp()
                    for a, p in asked
                )
                gaps[n] = gaps[n] + (torch.log(torch.as_tensor(weighed)) - q) / B
            new, log_prob = drawn[0]
            value = min(net(torch.cat([obs, new]))[0] for net in self.critics)
            actor_loss = actor_loss + (alpha * log_prob - value) / B
            alpha_loss = (
                alpha_loss - self.log_alpha * (log_prob.detach() + args.target_entropy * ACT) / B
            )
        return td, gaps, actor_loss, alpha_loss


@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 7.0])
def test_the_losses_and_an_update_equal_the_reference(
    cql: ModuleType, alpha: float, backup: bool
) -> None:
    """With alpha 0 and the entropy in the backup it is SAC's; importance weights included."""
    flags = {"learning_rate": 2e-3, "actor_learning_rate": 1e-3, "tau": 0.1}
    agent = make_agent(cql, cql_alpha=alpha, entropy_backup=backup, **flags)
    reference = Reference(agent)
    networks = [*reference.critics, reference.actor, reference.log_alpha]
    parameters = [[n] if isinstance(n, Tensor) else [*n.parameters()] for n in networks]
    rates = [2e-3, 2e-3, 1e-3, 1e-3]
    adams = [torch.optim.Adam(p, lr=rate, foreach=False) for p, rate in zip(parameters, rates)]
    for step in range(3):
        batch = make_batch(step)
        td, gaps, actor_loss, alpha_loss = reference.losses(batch)
        critic_loss = sum(td) + alpha * sum(gaps)  # type: ignore[operator]
        ours = agent.loss(batch)
        wanted = torch.stack([critic_loss, actor_loss + alpha_loss])
        torch.testing.assert_close(torch.stack(ours[:2]), wanted, atol=1e-9, rtol=0)
        penalty = alpha * sum(x.item() for x in gaps) / 2
        logged = [*(x.item() for x in td), None, penalty]
        logged += [actor_loss.item(), None, alpha_loss.item()]
        for mine, theirs in zip(ours[2].tolist(), logged):
            assert theirs is None or mine == pytest.approx(theirs, abs=1e-9)
        gradients = [torch.autograd.grad(critic_loss, p, retain_graph=True) for p in parameters[:2]]
        gradients += [
            torch.autograd.grad(actor_loss, parameters[2]),
            torch.autograd.grad(alpha_loss, parameters[3]),
        ]
        for adam, ps, gs in zip(adams, parameters, gradients):
            for p, g in zip(ps, gs):
                p.grad = g
            adam.step()
        agent.update(*batch)
        with torch.no_grad():
            for target, net in zip(reference.targets, reference.critics):
                for t, p in zip(target.parameters(), net.parameters()):
                    t.copy_(0.9 * t + 0.1 * p)
    for stacks, nets in ((agent.stacks, reference.critics), (agent.targets, reference.targets)):
        for n, net in enumerate(nets):
            for mine, theirs in zip(
                reference.unstacked(stacks, n).parameters(), net.parameters(), strict=True
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    for mine, theirs in zip(agent.actor.parameters(), reference.actor.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    torch.testing.assert_close(agent.log_alpha, reference.log_alpha, atol=1e-9, rtol=0)


def test_without_the_term_it_is_the_sac_script(cql: ModuleType, sac: ModuleType) -> None:
    """The gradients of sac_mujoco_gmp.py's critics and actor, on the same networks and batch."""
    agent = make_agent(cql, cql_alpha=0.0, entropy_backup=True, pruner="none")
    args = sac.Args(
        width=1, weight_decay=0.0, reward_scale=1.0, target_entropy=agent.args.target_entropy
    )
    torch.set_default_dtype(torch.float64)
    other = sac.SAC(args, OBS, ACT, CPU)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        ours = [*agent.actor.parameters(), *agent.stacks, *agent.targets, agent.log_alpha]
        theirs = [*other.actor.parameters(), *other.stacks, *other.targets, other.log_alpha]
        torch._foreach_copy_(theirs, ours)
    batch, found = make_batch(0), list[list[Tensor]]()
    parameters = (other.stacks, [*other.actor.parameters()])
    for optimizer, ps in zip((other.critic_optimizer, other.actor_optimizer), parameters):
        optimizer.step = lambda ps=ps: found.append([p.grad.clone() for p in ps])
    noise = torch.stack([batch[5][1, 0], batch[5][0, 0]])
    critic_loss, actor_loss, _ = agent.loss(batch)
    wanted = (
        torch.autograd.grad(critic_loss, agent.stacks, retain_graph=True),
        torch.autograd.grad(actor_loss, [*agent.actor.parameters()]),
    )
    other.update(*batch[:5], noise)
    for mine, theirs in zip(itertools.chain(*wanted), itertools.chain(*found), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_all_actions_go_through_the_critics_in_one_pass(
    cql: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, rows, values = make_agent(cql), list[int](), cql.critic_values

    def counted(critics: list[Tensor], obs: Tensor, actions: Tensor) -> Any:
        rows.append(len(actions))
        return values(critics, obs, actions)

    monkeypatch.setattr(cql, "critic_values", counted)
    agent.update(*make_batch(0))
    assert sorted(rows) == [B, B, B * (1 + 3 * N)], "targets, actor, and everything else at once"


def test_the_multiplier_grows_while_the_gap_is_too_large(cql: ModuleType) -> None:
    """Critic loss: multiplier * alpha * (gap - aim); the multiplier goes up at half the rate."""
    agent = make_agent(cql, cql_alpha=2.0, cql_gap=0.5)
    batch = make_batch(0)
    td, gaps, *_ = Reference(agent).losses(batch)
    excess = torch.stack([2 * (gap - 0.5) for gap in gaps]).sum()
    m = agent.log_multiplier.exp().item()
    loss = agent.loss(batch)[0]
    assert loss.item() == pytest.approx((sum(td) + m * excess - 0.5 * m * excess).item(), abs=1e-9)  # type: ignore[operator]
    (slope,) = torch.autograd.grad(loss, agent.log_multiplier)
    assert slope.item() == pytest.approx(-0.5 * m * excess.item(), rel=1e-9)
    before = agent.log_multiplier.item()
    agent.update(*batch)
    assert (agent.log_multiplier.item() > before) == (excess.item() > 0)


def test_the_networks_begin_as_corls(cql: ModuleType) -> None:
    """Critics: orthogonal; actor: torch's uniform; small last layers; actions' deviation 1 / e."""
    agent = cql.CQL(cql.Args(), 11, 3, CPU)
    first, *hidden, last = agent.stacks[::2]
    for weights in (first, *hidden, last):
        assert not torch.equal(weights[0], weights[1])
    for n in range(2):
        torch.testing.assert_close(first[n] @ first[n].T, 2 * torch.eye(14), atol=1e-5, rtol=0)
        for weights in hidden:
            torch.testing.assert_close(
                weights[n].T @ weights[n], 2 * torch.eye(256), atol=1e-5, rtol=0
            )
        assert last[n].norm().item() == pytest.approx(0.01, rel=1e-5)
    assert not any(bias.any() for bias in agent.stacks[1::2])
    for layer, inputs in (
        (agent.actor.dense1, 11),
        (agent.actor.dense2, 256),
        (agent.actor.dense3, 256),
    ):
        for p in (layer.weight, layer.bias):
            assert 0.95 * inputs**-0.5 < p.abs().max() < inputs**-0.5
    assert 0.95 < agent.actor.output.weight.abs().max() / (0.01 * math.sqrt(6 / (256 + 6))) <= 1
    assert agent.actor.output.bias.tolist() == [0, 0, 0, -1, -1, -1]
    assert (agent.log_alpha.item(), agent.log_multiplier.item()) == (0, 1)


# Pruning at the start


def refused(capsys: pytest.CaptureFixture[str], what: Any, *parts: Any, status: int = 2) -> str:
    """Return the line that a call ends with."""
    with pytest.raises(SystemExit) as end:
        what(*parts)
    assert end.value.code == status
    err = re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)
    (line,) = [x for x in err if x.strip() and "step/s" not in x]  # beside the progress bar
    assert line.startswith("cql_offline_snip.py: ")
    return line.removeprefix("cql_offline_snip.py: ")


def pooled(agent: Any) -> list[Tensor]:
    """Return the weights of both critics, and of the actor, flat."""
    return [torch.cat([w.detach().flatten() for w in group]) for group in agent.groups]


@pytest.mark.parametrize("pruner", ["snip", "grasp", "random", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_counts_are_exact_and_stay(cql: ModuleType, pruner: str, sparsity: float) -> None:
    agent = make_agent(
        cql, pruner=pruner, sparsity=sparsity, learning_rate=1e-2, actor_learning_rate=1e-2
    )
    batches = [make_batch(step) for step in range(2)]
    old, scores = (
        pooled(agent),
        [torch.cat([s.flatten() for s in part]) for part in agent.scores(batches)],
    )
    agent.prune(batches)
    kept = [flat != 0 for flat in pooled(agent)]
    for mask, score in zip(kept, scores):
        assert int(mask.sum()) == round(len(mask) * (1 - sparsity))
        assert score[mask].min() >= score[~mask].max(), "the largest stay"
    for weights, mask, before in zip(pooled(agent), kept, old):
        assert torch.equal(weights[mask], before[mask]), "no new initialisation"
    assert all(map(torch.equal, agent.targets, agent.followed)), "the target is copied after"
    for step in range(5):
        agent.update(*make_batch(10 + step))
    for flat, mask in zip(pooled(agent), kept):
        assert torch.equal(flat != 0, mask)
    for target, p in zip(agent.targets[::2], agent.stacks[::2]):
        assert torch.equal(target != 0, p != 0)
    report = agent.report()
    assert report["sparsity/prunable"] == pytest.approx(sparsity, abs=1e-4)


def test_scores_are_float32s_and_over_all_batches(cql: ModuleType) -> None:
    """Whatever --precision says."""
    batches = [make_batch(step) for step in range(2)]
    plain, rough = (make_agent(cql, precision=kind) for kind in ("fp32", "bf16"))
    for ours, theirs in zip(rough.scores(batches), plain.scores(batches)):
        assert all(map(torch.equal, ours, theirs))
    for ours, theirs in zip(plain.scores(batches[:1]), plain.scores(batches)):
        assert not torch.equal(ours[0], theirs[0])


def test_random_scores_are_not_the_numbers_that_drew_the_weights(cql: ModuleType) -> None:
    agent, other = (cql.CQL(cql.Args(pruner="random", seed=seed), 11, 3, CPU) for seed in (5, 6))
    assert not torch.equal(agent.scores([])[0][0], other.scores([])[0][0])
    drawn = (
        agent.actor.dense2.weight.detach() * 16 + 1
    ) / 2  # of U(-1/16, 1/16), as uniform numbers
    scores = torch.cat([score.flatten() for score in agent.scores([])[1]])
    old, new = (set((2**20 * x).long().flatten().tolist()) for x in (drawn, scores))
    assert len(old & new) < 0.3 * len(old), "12 % by chance"
    assert (
        scores.min() >= 0
        and scores.max() < 1
        and scores.mean().item() == pytest.approx(0.5, abs=0.01)
    )


def test_magnitude_takes_the_same_share_of_each_layer(cql: ModuleType) -> None:
    """Whatever their scales; within a layer, over both critics, the largest stay."""
    agent = make_agent(cql, pruner="magnitude", sparsity=0.75)
    with torch.no_grad():
        agent.stacks[-2].mul_(1e-9)
    old = [w.detach().abs().clone() for w in agent.weights]
    agent.prune([])
    for before, mask in zip(old, agent.masks):
        assert abs(int(mask.sum()) - before.numel() / 4) <= 1
        assert before[mask != 0].min() > before[mask == 0].max()
    even = make_agent(cql, pruner="magnitude")
    with torch.no_grad():
        even.actor.output.weight.fill_(-2)
    ties = even.scores([])[1][-1].flatten()
    assert torch.equal(ties.argsort(descending=True), torch.arange(len(ties))), (
        "the lower index stays"
    )


def test_snip_is_the_gradient_at_gates(cql: ModuleType) -> None:
    """|dL/dc| at c = 1, each weight being multiplied by its own gate c; of two batches."""
    agent = make_agent(cql, pruner="snip")
    batches = [make_batch(step) for step in range(2)]
    scores = agent.scores(batches)
    for which, group in enumerate(agent.groups):
        gates = [torch.ones_like(w, requires_grad=True) for w in group]
        gated = copy.copy(agent)
        if which == 0:
            gated.stacks = [
                p if i % 2 else p.detach() * gates[i // 2] for i, p in enumerate(agent.stacks)
            ]
            loss = sum(gated.loss(batch)[0] for batch in batches) / 2
            found = torch.autograd.grad(loss, gates)
        else:
            names = [name for name, p in agent.actor.named_parameters() if p.ndim > 1]
            values = {name: w.detach() * gate for name, w, gate in zip(names, group, gates)}

            class Gated:
                def sample(self, obs: Tensor, noise: Tensor) -> Any:
                    named = {f"actor.{name}": value for name, value in values.items()}
                    return torch.func.functional_call(Sampling(agent.actor), named, (obs, noise))

            gated.__dict__["actor"] = Gated()  # found before the module of that name
            loss = sum(gated.loss(batch)[1] for batch in batches) / 2
            found = torch.autograd.grad(loss, gates)
        for score, gradient in zip(scores[which], found):
            torch.testing.assert_close(score, gradient.abs(), atol=1e-12, rtol=1e-9)


class Sampling(nn.Module):
    """An actor's sample() as forward, which functional_call needs."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Tensor, noise: Tensor) -> Any:
        return self.actor.sample(obs, noise)


def test_grasp_is_a_finite_difference(cql: ModuleType) -> None:
    """w * (H g), and H g is the gradient's change along g; of the mean loss of two batches."""
    agent = make_agent(cql, pruner="grasp")
    batches = [make_batch(step) for step in range(2)]
    scores = agent.scores(batches)

    def loss(which: int) -> Tensor:
        return (agent.loss(batches[0])[which] + agent.loss(batches[1])[which]) / 2

    for which, group in enumerate(agent.groups):
        g = torch.autograd.grad(loss(which), group)
        eps = 1e-6 / max(part.abs().max().item() for part in g)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for w, part in zip(group, g):
                    w += sign * eps * part
            ends.append(torch.autograd.grad(loss(which), group))
            with torch.no_grad():
                for w, part in zip(group, g):
                    w -= sign * eps * part
        for score, w, up, down in zip(scores[which], group, *ends):
            wanted = w.detach() * (up - down) / (2 * eps)
            assert (score - wanted).norm() < 1e-4 * wanted.norm()


def test_sparsity_zero_is_no_pruning_bit_for_bit(cql: ModuleType) -> None:
    kinds = (("none", 0.95), ("snip", 0.0), ("grasp", 0.0))
    agents = [make_agent(cql, pruner=pruner, sparsity=sparsity) for pruner, sparsity in kinds]
    for agent in agents:
        agent.prune([make_batch(99)])
        for step in range(4):
            agent.update(*make_batch(step))
    for agent in agents[1:]:
        for ours, theirs in zip(agent.state_dict().values(), agents[0].state_dict().values()):
            assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)


def test_a_layer_with_nothing_left_is_refused(
    cql: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = make_agent(cql, pruner="random", sparsity=0.9)
    scores = agent.scores([])
    scores[0][-1].fill_(-1)  # of both critics' last layer
    agent.scores = lambda _: scores
    line = refused(capsys, agent.prune, [make_batch(0)])
    assert "qf1.output" in line and "qf2.output" in line and "--sparsity" in line


def test_the_saved_networks_take_raw_observations(cql: ModuleType) -> None:
    agent = make_agent(cql, layers=3)
    mean, std, batch = np.arange(5.0), np.array([1, 2, 3, 0.5, 0.1]), make_batch(0)
    raw = batch[0] * torch.from_numpy(std) + torch.from_numpy(mean)
    networks = agent.networks(mean, std)
    q = cql.critic_values(agent.stacks, *batch[:2])
    for n in range(2):
        ours = networks[f"qf{n + 1}"](torch.cat([raw, batch[1]], 1))[:, 0]
        torch.testing.assert_close(ours, q[n], atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(networks["actor"](raw), agent.actor(batch[0])):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


# Datasets


def episodes() -> list[dict[str, np.ndarray]]:
    """Return four short episodes of Hopper: terminated, timed out, terminated at once, cut."""
    rng = np.random.default_rng(0)
    found = []
    for length, ending in ((4, "terminated"), (3, "timeout"), (1, "terminated"), (5, "")):
        found.append(
            {
                "observations": rng.normal(size=(length + 1, 11)).astype(np.float32),
                "actions": rng.uniform(-1, 1, (length, 3)).astype(np.float32),
                "rewards": rng.normal(size=length).astype(np.float32),
                "terminations": np.arange(length) == (length - 1 if ending == "terminated" else -1),
                "truncations": np.arange(length) == (length - 1 if ending == "timeout" else -1),
            }
        )
    return found


def write_d4rl(path: Path, with_next: bool = True, **changes: Any) -> Path:
    """Write the episodes as one file; a change of None leaves a key out."""
    parts: dict[str, Any] = {
        "observations": np.concatenate([e["observations"][:-1] for e in episodes()]),
        "actions": np.concatenate([e["actions"] for e in episodes()]),
        "rewards": np.concatenate([e["rewards"] for e in episodes()]),
        "terminals": np.concatenate([e["terminations"] for e in episodes()]),
        "timeouts": np.concatenate([e["truncations"] for e in episodes()]),
    }
    if with_next:
        parts["next_observations"] = np.concatenate([e["observations"][1:] for e in episodes()])
    with h5py.File(path, "w") as file:
        for key, value in (parts | changes).items():
            if value is not None:
                file[key] = value
    return path


def write_minari(
    name: str, wrappers: tuple[Any, ...] = (), bound: float = 1.0, **settings: Any
) -> Path:
    """Write the episodes as a local Minari dataset; return its folder."""
    buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(episodes())]
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (11,), np.float32),
        "action_space": gym.spaces.Box(-bound, bound, (3,), np.float32),
    }
    env = gym.make("Hopper-v5", disable_env_checker=True, **settings).spec
    env.additional_wrappers = wrappers
    minari.create_dataset_from_buffers(name, buffers, env=env, **spaces)
    return Path(minari.storage.get_dataset_path(name))


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for local Minari datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_loaders_give_the_same_transitions(cql: ModuleType, datasets: Path) -> None:
    """A timeout is no terminal; only what has no next observation is lost."""
    folder = write_minari("local/hopper/test-v0")
    read = {
        "id": cql.read_dataset("local/hopper/test-v0"),
        "folder": cql.read_dataset(str(folder)),
        "d4rl": cql.read_dataset(str(write_d4rl(datasets / "a.hdf5"))),
    }
    assert [env_id for _, env_id in read.values()] == ["Hopper-v5", "Hopper-v5", ""]
    wanted = [
        (obs, action, reward, next_obs, terminated)
        for e in episodes()
        for obs, action, reward, next_obs, terminated in zip(
            e["observations"], e["actions"], e["rewards"], e["observations"][1:], e["terminations"]
        )
    ]
    for data, _ in read.values():
        arrays = (data.obs, data.actions, data.rewards, data.next_obs, data.terminated)
        for found, *parts in zip(wanted, *arrays, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(found, parts, strict=True))
        assert np.flatnonzero(data.ended).tolist() == [3, 6, 7], "the last one is broken off"
    data, _ = cql.read_dataset(str(write_d4rl(datasets / "b.hdf5", with_next=False)))
    kept = [
        t for t in range(13) if t not in (6, 12)
    ]  # the rows of the timeout and of the file's end
    assert len(data.obs) == 11
    for i, t in enumerate(kept):
        assert np.array_equal(data.obs[i], wanted[t][0]) and data.terminated[i] == wanted[t][4]
        assert data.terminated[i] or np.array_equal(data.next_obs[i], wanted[t][3])
    assert np.flatnonzero(data.ended).tolist() == [3, 5, 6]
    data, _ = cql.read_dataset(str(write_d4rl(datasets / "c.hdf5", timeouts=None)))
    assert len(data.obs) == 13 and np.flatnonzero(data.ended).tolist() == [3, 6, 7], (
        "seen by the next observation"
    )


def test_a_terminal_row_that_also_timed_out_is_kept(cql: ModuleType, tmp_path: Path) -> None:
    """It needs no next observation."""
    timeouts = np.isin(np.arange(13), (3, 6))  # row 3 is terminal
    data, _ = cql.read_dataset(
        str(write_d4rl(tmp_path / "a.hdf5", with_next=False, timeouts=timeouts))
    )
    assert len(data.obs) == 11 and np.flatnonzero(data.terminated).tolist() == [3, 6]


def test_rewards_are_normalised_by_the_range_of_returns(
    cql: ModuleType, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whole episodes: the last one, which breaks off, would be the worst."""
    rewards = np.concatenate([e["rewards"] for e in episodes()])
    rewards[8:] = -100
    data, _ = cql.read_dataset(str(write_d4rl(datasets / "a.hdf5", rewards=rewards)))
    returns = [part.sum(dtype=np.float64) for part in np.split(rewards, [4, 7, 8])][:3]
    wanted = data.rewards * 1000 / (max(returns) - min(returns))
    np.testing.assert_allclose(cql.normalized(data).rewards, wanted, rtol=1e-5)
    refused(capsys, cql.normalized, data._replace(rewards=0 * data.rewards))


def test_the_table_is_standardised_and_in_the_environments_units(
    cql: ModuleType, datasets: Path
) -> None:
    data, _ = cql.read_dataset(str(write_d4rl(datasets / "a.hdf5")))
    env = cql.MujocoEnvs("Hopper-v5", 1, 0)
    dataset = cql.Dataset(data, env, cql.Args(dataset="a", gamma=0.9), CPU)
    obs, actions, next_obs, rewards, terminated = dataset.table.split([11, 3, 11, 1, 1], 1)
    std = data.obs.std(0) + 1e-3
    np.testing.assert_allclose(obs, (data.obs - data.obs.mean(0)) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        next_obs, (data.next_obs - data.obs.mean(0)) / std, rtol=1e-4, atol=1e-5
    )
    assert np.array_equal(actions, data.actions) and np.array_equal(rewards[:, 0], data.rewards)
    assert np.array_equal(terminated[:, 0], data.terminated)
    batches = [dataset.sample(1300) for _ in range(10)]
    drawn = torch.cat([batch[3] for batch in batches])
    counts = torch.stack([(drawn == reward).sum() for reward in rewards[:, 0]])
    assert (
        counts.sum() == 13_000 and ((counts - 1000.0) ** 2 / 1000).sum() < 33
    )  # 12 degrees of freedom, p = 0.001
    uniform = torch.stack([batch[6] for batch in batches])
    assert (
        uniform.min() > -1
        and uniform.max() < 1
        and uniform.std() == pytest.approx(3**-0.5, rel=0.01)
    )


def test_actions_are_in_shares_of_the_bounds(cql: ModuleType, datasets: Path) -> None:
    """An inverted pendulum's are -3 and 3."""
    pushes, obs = np.float32([[3], [-3], [1.5], [0]]), np.zeros((4, 4), np.float32)
    no = np.zeros(4, bool)
    data = cql.Data(obs, pushes, np.zeros(4, np.float32), obs, no, no)
    dataset = cql.Dataset(
        data, cql.MujocoEnvs("InvertedPendulum-v5", 1, 0), cql.Args(dataset="a"), CPU
    )
    assert dataset.table[:, 4].tolist() == [1, -1, 0.5, 0]


EMPTY = dict.fromkeys(("rewards", "terminals", "timeouts"), np.zeros(0))
EMPTY |= dict.fromkeys(("observations", "next_observations"), np.zeros((0, 11)))
EMPTY |= {"actions": np.zeros((0, 3))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": None}, "the key rewards is missing"),
        ({"observations": None}, "the key observations is missing"),
        ({"timeouts": None, "next_observations": None}, "timeouts and next_observations are both"),
        ({"rewards": np.array([np.inf] * 13)}, "rewards must be finite"),
        ({"rewards": np.full(13, 1e300)}, "rewards must be finite"),
        ({"rewards": np.full(13, 3e38)}, "the scores of --pruner snip are not finite"),
        ({"rewards": np.array([b"1"] * 13)}, "rewards must be numbers"),
        ({"rewards": np.zeros((13, 2))}, "rewards must have the shape [13], not [13, 2]"),
        ({"observations": np.full((13, 11), np.nan)}, "observations must be finite"),
        ({"observations": np.float32(1)}, "observations must be numbers"),
        ({"actions": np.zeros((12, 3))}, "actions must have the shape [13, any], not [12, 3]"),
        ({"actions": np.zeros((13, 3), complex)}, "actions must be numbers"),
        ({"actions": np.zeros((13, 4))}, "actions have 4 numbers, Hopper-v5's have 3"),
        (dict.fromkeys(("observations", "next_observations"), np.zeros((13, 9))), "have 9 numbers"),
        ({"next_observations": np.zeros((13, 9))}, "must have observations' shape"),
        ({"actions": np.full((13, 3), 1.5)}, "actions reach 1.5 times Hopper-v5's bounds"),
        ({"actions": np.zeros(13)}, "actions must have the shape [13, any], not [13]"),
        ({"terminals": np.array([math.nan] * 13)}, "terminals must be finite"),
        ({"terminals": np.array([0.5] * 13)}, "terminals must be 0 or 1"),
        ({"timeouts": np.array([b"no"] * 13)}, "timeouts must be numbers"),
        (EMPTY, "no transitions are in it"),
    ],
)
def test_bad_data_is_refused(
    cql: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line that names the file and the key; nothing is begun."""
    monkeypatch.chdir(tmp_path)
    write_d4rl(Path("bad.hdf5"), **changes)
    flags: dict[str, Any] = {"dataset": "bad.hdf5", "env_id": "Hopper-v5", "total_timesteps": 1}
    line = refused(capsys, cql.main, cql.Args(**flags, batch_size=2, eval_episodes=0))
    assert "--dataset bad.hdf5" in line and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.hdf5"], "nothing was begun"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rewards", np.zeros((3, 2)), "rewards must have the shape [3]"),
        ("rewards", np.array([0, math.nan, 0]), "rewards must be finite"),
        ("actions", np.zeros((2, 3)), "actions must have the shape [3, any]"),
        ("observations", np.zeros((3, 11)), "observations must have the shape [4, any]"),
        ("terminations", np.array([0.5] * 3), "terminations must be 0 or 1"),
    ],
)
def test_a_bad_minari_episode_is_refused(
    cql: ModuleType,
    datasets: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: np.ndarray,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_minari("local/hopper/test-v0")
    good = [*minari.MinariDataset(folder / "data").iterate_episodes()]
    bad = dataclasses.replace(good[1], **{key: value})
    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", lambda _: iter([good[0], bad]))
    line = refused(capsys, cql.read_dataset, str(folder))
    assert f"{folder}: episode 1:" in line and words in line


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dataset_is_refused(
    cql: ModuleType,
    datasets: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    (datasets / "damaged.hdf5").write_bytes(write_d4rl(datasets / "a.hdf5").read_bytes()[:3000])
    (datasets / "empty").mkdir()
    (datasets / "text.hdf5").write_text("no")
    cases = {
        str(datasets / "damaged.hdf5"): "cannot be read",
        str(datasets / "text.hdf5"): "cannot be read",
        str(datasets / "empty"): "cannot be read",
        str(datasets / "none.hdf5"): "no such file",
        "local/no/such-v0": f"not on this machine; looked for {datasets}",
        "mujoco/hopper/medium-v0": "fetched (Name or service not known)",
        "nonsense": "no such folder, and a Minari id ends with its version",
        "": "--dataset is missing",
    }
    for name, words in cases.items():
        line = refused(capsys, cql.read_dataset, name)
        assert line.startswith("--dataset") and name in line and words in line


@pytest.mark.filterwarnings("ignore")
def test_the_environment_must_be_known_and_the_datas(
    cql: ModuleType, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = cql.Args(dataset=str(write_d4rl(datasets / "a.hdf5")))
    assert "--env-id is missing" in refused(capsys, cql.main, args)
    write_minari("local/hopper/test-v0")
    line = refused(capsys, cql.main, cql.Args(dataset="local/hopper/test-v0", env_id="Walker2d"))
    assert line == "--env-id Walker2d: local/hopper/test-v0 was recorded in Hopper-v5"


@pytest.mark.filterwarnings("ignore")
def test_settings_of_the_recorded_environment_are_said_to_be_left_out(
    cql: ModuleType, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_minari("local/hopper/plain-v0", render_mode="rgb_array")
    write_minari("local/hopper/odd-v0", healthy_reward=0.5, max_episode_steps=50)
    assert (
        cql.read_dataset("local/hopper/plain-v0")[1]
        == cql.read_dataset("local/hopper/odd-v0")[1]
        == "Hopper-v5"
    )
    settings = {"healthy_reward": 0.5, "max_episode_steps": 50}
    wanted = (
        f"--dataset local/hopper/odd-v0: recorded with {settings}; evaluations will be without\n"
    )
    assert capsys.readouterr().err == wanted


@pytest.mark.filterwarnings("ignore")
def test_what_was_recorded_behind_wrappers_or_with_other_actions_is_refused(
    cql: ModuleType, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    write_minari("local/hopper/wrapped-v0", wrappers=env.spec.additional_wrappers)
    line = refused(capsys, cql.read_dataset, "local/hopper/wrapped-v0")
    assert "NormalizeObservation, which evaluations would not have" in line
    write_minari("local/hopper/scaled-v0", bound=2.0)
    assert "its action space is Box" in refused(capsys, cql.read_dataset, "local/hopper/scaled-v0")


@pytest.mark.slow
def test_an_id_without_a_network_is_refused_in_one_line(datasets: Path) -> None:
    """After what fetches datasets has tried for half a minute, without reporting each time."""
    command = [
        sys.executable,
        SCRIPTS / "cql_offline_snip.py",
        "--dataset",
        "mujoco/hopper/medium-v0",
    ]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    output = subprocess.run(command, cwd=datasets, capture_output=True, text=True, env=environment)
    (line,) = output.stderr.splitlines()
    assert output.returncode == 2
    assert line.startswith(
        "cql_offline_snip.py: --dataset mujoco/hopper/medium-v0: cannot be read or fetched ("
    )
    assert not [path for path in datasets.rglob("*") if path.is_file()]


# A run


def test_a_run_prunes_once_and_trains(
    cql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: the same; its records, its model, its score against D4RL's references."""
    write_d4rl(tmp_path / "a.hdf5")
    monkeypatch.chdir(tmp_path)
    pruned, prune = list[list[int]](), cql.CQL.prune

    def prune_seen(agent: Any, batches: list[Any]) -> None:
        pruned.append([len(batch[3]) for batch in batches])
        prune(agent, batches)

    monkeypatch.setattr(cql.CQL, "prune", prune_seen)
    last_state, save = list[dict[str, Any]](), cql.Run.save

    def save_seen(run: Any, step: int, state: dict[str, Any]) -> None:
        last_state.append(state["agent"])
        save(run, step, state)

    monkeypatch.setattr(cql.Run, "save", save_seen)
    flags: dict[str, Any] = {"dataset": "a.hdf5", "env_id": "Hopper", "total_timesteps": 250}
    flags |= {"batch_size": 8, "epoch_steps": 200, "eval_episodes": 2}
    flags |= {"sparsity": 0.9, "prune_batches": 3, "device": "cpu"}
    for name in ("one", "two"):
        cql.main(cql.Args(**flags, run_dir=str(tmp_path / name)))
    trained = last_state.pop()
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert models[0] == models[1] and pruned == [[8, 8, 8], [8, 8, 8]]
    records = [
        json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == [0, 200, 250, 250], "the last is the final evaluation"
    assert all(r["sparsity/prunable"] == pytest.approx(0.9, abs=1e-4) for r in records[:3]), (
        "from the start"
    )
    assert "losses/cql_loss" in records[1] and "losses/cql_loss" not in records[0]
    last = records[-1]
    final = json.loads((tmp_path / "one" / "final.json").read_text())
    assert (
        final["epoch_return"] == last["eval/episodic_return"] != records[1]["eval/episodic_return"]
    )
    saved = load(models[0])
    actor = cql.Actor(11, 3, 256, 3)
    actor.load_state_dict({name: saved[f"actor.{name}"] for name in actor.state_dict()})
    result = cql.evaluate(actor, cql.Args(env_id="Hopper", eval_episodes=2, seed=1))
    assert {key: last[key] for key in result} == result, "the saved policy's"
    std = np.concatenate([e["observations"][:-1] for e in episodes()]).std(0, dtype=np.float64)
    wanted = trained["actor.dense1.weight"] / torch.from_numpy(std + 1e-3)
    ours = saved["actor.dense1.weight"].double()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)  # not standardised
    args = json.loads((tmp_path / "one" / "args.json").read_text())
    assert args["env_id"] == "Hopper" and args["script"] == "cql_offline_snip.py"
    assert args["dataset"] == str(tmp_path / "a.hdf5"), "found again from any folder"


def test_another_dataset_is_refused_on_resume(
    cql: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything of the run is touched."""
    path = write_d4rl(tmp_path / "a.hdf5")
    flags = {
        "dataset": str(path),
        "env_id": "Hopper",
        "total_timesteps": 200,
        "batch_size": 8,
        "eval_episodes": 0,
    }
    monkeypatch.setattr(cql.Run, "finish", lambda *_, **__: None)
    cql.main(cql.Args(**flags, run_dir=str(tmp_path / "run")))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    write_d4rl(path, rewards=np.ones(13))
    line = refused(capsys, cql.main, cql.Args(**flags, resume=str(tmp_path / "run")))
    assert "has changed since the run in" in line
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    }


def test_rewards_are_normalised_on_request_only(
    cql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[Tensor]()
    monkeypatch.setattr(cql.Run, "__init__", lambda *_: seen.append(tables.pop()) or sys.exit())
    make, tables = cql.Dataset.__init__, list[Tensor]()

    def kept(self: Any, *rest: Any) -> None:
        make(self, *rest)
        tables.append(self.table[:, -2])

    monkeypatch.setattr(cql.Dataset, "__init__", kept)
    path = write_d4rl(tmp_path / "a.hdf5")
    for asked in (False, True):
        with pytest.raises(SystemExit):
            cql.main(
                cql.Args(dataset=str(path), env_id="Hopper", batch_size=8, normalize_rewards=asked)
            )
    data, _ = cql.read_dataset(str(path))
    assert np.array_equal(seen[0], data.rewards) and np.array_equal(
        seen[1], cql.normalized(data).rewards
    )


def test_a_loss_that_is_not_finite_stops_the_run(
    cql: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"dataset": str(write_d4rl(tmp_path / "a.hdf5")), "env_id": "Hopper"}
    flags |= {"total_timesteps": 300, "batch_size": 8, "learning_rate": 1e30, "eval_episodes": 0}
    line = refused(capsys, cql.main, cql.Args(**flags, run_dir=str(tmp_path / "run")), status=1)
    assert "step 100: the losses are [nan" in line and line.endswith("checkpoint kept: none")
    assert not [*(tmp_path / "run" / "checkpoint").iterdir()]


def test_the_last_checkpoint_with_finite_losses_is_kept(
    cql: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And named."""
    update, steps = cql.CQL.captured_update, itertools.count()

    def update_badly(agent: Any, dataset: Any) -> None:
        if next(steps) == 200:
            agent.critic_optimizer.param_groups[0]["lr"] = 1e30
        update(agent, dataset)

    monkeypatch.setattr(cql.CQL, "captured_update", update_badly)
    flags = {
        "dataset": str(write_d4rl(tmp_path / "a.hdf5")),
        "env_id": "Hopper",
        "batch_size": 8,
        "eval_episodes": 0,
    }
    flags |= {"total_timesteps": 400, "checkpoint_minutes": 0, "run_dir": str(tmp_path / "run")}
    line = refused(capsys, cql.main, cql.Args(**flags), status=1)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert [name[:13] for name in kept] == ["000000000100-", "000000000200-"]
    assert "step 300: the losses are" in line and line.endswith("checkpoint kept: 000000000200")


@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("cleanrl_sparse/cql_offline_snip", "h5py"),
        ("cleanrl_sparse/make_datasets", "minari"),
        ("benchmark/plot", "matplotlib"),
    ],
)
def test_a_package_of_an_extra_that_is_missing_is_named(
    script: str, package: str, tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('No module named ' + __name__)")
    results = "benchmark/results/minatar_eaudeqn.csv"
    flags = ["curves", results, "--out", str(tmp_path / "x")] if "plot" in script else []
    root, environment = SCRIPTS.parent, os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, f"{script}.py", *flags]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert f"No module named {package}" in line and "pip install" in line
