"""Tests of dqn_atari_gmp.py: the schedule, the masks over a run, the loss, the analyses, and that
it learns sparse.

References are written in other words: float64, loops over single transitions, and convolutions
called by hand.
"""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from safetensors.torch import load_file
from tasks import (
    CATCH_FLAGS,
    CPU,
    CatchNetwork,
    Small,
    Tiny,
    all_equal,
    catch_return,
    constant,
    filled_replay,
    params,
)
from test_runs import TINY_FLAGS, side_by_side, succeed
from torch import Tensor, nn


def agent_of(
    module: ModuleType, dtype: torch.dtype = torch.float32, num_actions: int = 4, **flags: Any
) -> Any:
    flags = {"feature_size": 16, "learning_starts": 100, **flags}
    agent = module.DQN(module.Args(**flags), num_actions, CPU).to(dtype)
    agent.masks = list(agent.online.buffers())  # to() makes new ones
    return agent


def filled(module: ModuleType, size: int, steps: int, **flags: Any) -> Any:
    return filled_replay(module, size, steps, **{"gamma": 0.9, "n_step": 3} | flags)


# The schedule


def test_progress_by_hand(dqn: ModuleType) -> None:
    """From 200 to 600: 1 - (3/4) ** 3 after a quarter, 7/8 after half, nothing before and all of it
    after.
    """
    steps = (0, 199, 200, 300, 400, 500, 600, 601, 10**9)
    found = [dqn.pruning_progress(t, 200, 600) for t in steps]
    assert found == pytest.approx([0, 0, 0, 1 - 27 / 64, 7 / 8, 63 / 64, 1, 1, 1], abs=1e-12)
    assert found[2] == 0 and found[6:] == [1, 1, 1]
    assert dqn.pruning_progress(5, 5, 5) == dqn.pruning_progress(6, 5, 5) == 1.0
    assert dqn.pruning_progress(4, 5, 5) == 0.0


def test_the_papers_schedule_in_gradient_steps(dqn: ModuleType) -> None:
    """10M steps, 20,000 of them warm-up, a gradient step every four: 2,495,000; a fifth and four
    fifths of these.
    """
    agent = dqn.DQN(dqn.Args(feature_size=1), 4, CPU)
    assert (agent.start, agent.end) == (499_000, 1_996_000)
    assert (agent.end - agent.start) % 1000 == 0
    for ratio, updates in ((0.5, 4_990_000), (1.0, 9_980_000), (2.0, 19_960_000)):
        agent = dqn.DQN(dqn.Args(feature_size=1, replay_ratio=ratio), 4, CPU)
        assert (agent.start, agent.end) == (updates // 5, updates * 4 // 5)


def run_of_masks(module: ModuleType, updates: int, **flags: Any) -> tuple[Any, list[list[Tensor]]]:
    """Walk through a run's gradient steps, weights drifting at random; return the agent and the
    masks of each.
    """
    agent = agent_of(module, total_timesteps=100 + 4 * updates, **flags)
    rng, history = torch.Generator().manual_seed(0), []
    for _ in range(updates):
        before = params(agent.online)
        agent.prune_if_due()
        assert all_equal(params(agent.online), before), "weights follow in the update"
        history.append([m.bool() for m in agent.masks])
        with torch.no_grad():
            for w, m in zip(agent.weights, agent.masks, strict=True):
                w.add_(0.02 * torch.randn(w.shape, generator=rng)).mul_(m)
        agent.gradient_step += 1
    return agent, history


@pytest.mark.parametrize("every", [7, 30, 1000])
def test_masks_over_a_run(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(dqn, "QNetwork", Small)
    agent, history = run_of_masks(dqn, 200, prune_every=every, sparsity=0.9)
    assert (agent.start, agent.end) == (40, 160)
    changes = [t for t in range(1, 200) if not all_equal(history[t], history[t - 1])]
    due = [t for t in range(41, 161) if (t - 40) % every == 0 or t == 160]
    assert set(changes) <= set(due), "nothing before or at the start, nor after the end"
    # The last few steps round to the same counts.
    assert changes[0] == due[0] and len(changes) > len(due) * 0.6
    final = dqn.erk_densities(agent.online, 0.9)
    for t, masks in enumerate(history):
        late = max([d for d in due if d <= t], default=None)
        progress = 0.0 if late is None else 1 - (1 - (late - 40) / 120) ** 3
        counts = [int(m.sum()) for m in masks]
        # Each tensor's own final sparsity times the progress.
        shares = [1 - progress * (1 - d) for d in final]
        assert counts == [max(1, round(m.numel() * d)) for m, d in zip(masks, shares)]
        if t > 0:
            grown = [m & ~old for m, old in zip(masks, history[t - 1])]
            assert not any(m.any() for m in grown), "nothing grows back"
    assert agent.sparsity == 0.9


def test_a_schedule_up_to_the_end(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --prune-end 1 the last gradient step has the final masks; with both ends at 1 it has the
    only ones.
    """
    monkeypatch.setattr(dqn, "QNetwork", Small)
    for start in (0.5, 1.0):
        agent, history = run_of_masks(dqn, 50, prune_start=start, prune_end=1.0, sparsity=0.8)
        assert agent.end == 49 and agent.sparsity == 0.8
        assert sum(int(m.sum()) for m in history[-1]) < 0.25 * sum(m.numel() for m in history[-1])


def test_masks_of_jaxpruners_rule(dqn: ModuleType) -> None:
    """By hand: the largest |w| of each tensor, ties by lower index, rounded counts, at least 1."""
    weights = [[1.0, -4, 4, 2], [-9.0, 8, 7, 6, -5, 4, 0, 0, 0.5, 3]]

    def kept(sparsity: float, progress: float) -> list[list[int]]:
        network = nn.ParameterList(torch.tensor([values]) for values in weights)
        dqn.add_masks(network)
        dqn.prune(network, [1 - progress * sparsity] * 2, np.random.default_rng(0))
        return [m.flatten().nonzero().flatten().tolist() for m in network.buffers()]

    assert kept(0.5, 0.0) == [[0, 1, 2, 3], [*range(10)]]
    # 3 of 4; 7.5 of 10 is 8 (to even).
    assert kept(0.5, 0.5) == [[1, 2, 3], [0, 1, 2, 3, 4, 5, 8, 9]]
    assert kept(0.5, 1.0) == [[1, 2], [0, 1, 2, 3, 4]]
    assert kept(0.75, 1.0) == [[1], [0, 1]]  # 2.5 is 2; of -4 and 4 the first
    assert kept(0.99, 1.0) == [[1], [0]]


@pytest.mark.parametrize(
    ("network", "width", "published"),
    [
        ("cnn", 1, [0.856, 0.928, 0.918, 0.953, 0.0]),
        ("impala", 1, [0.18, *[0.70] * 4, 0.79, *[0.86] * 4, 0.86, *[0.86] * 4, 0.960, 0.0]),
        ("impala", 3, [0.23, *[0.89] * 4, 0.917, *[0.945] * 4, 0.945, *[0.945] * 4, 0.953, 0.0]),
    ],
)
def test_final_sparsity_of_each_layer(
    dqn: ModuleType, network: str, width: int, published: list[float]
) -> None:
    """With 18 actions and 512 units, after one mask update at the end; the numbers are known to two
    or three places.
    """
    flags: dict[str, Any] = {"network": network, "width": width, "feature_size": 512}
    agent = agent_of(dqn, num_actions=18, **flags, prune_start=0.0, prune_end=0.0)
    agent.prune_if_due()
    shares = [1 - float(m.mean()) for m in agent.masks]
    assert [round(share, 2) for share in shares] == pytest.approx(
        [round(x, 2) for x in published], abs=0.0101
    )
    kept, total = sum(int(m.sum()) for m in agent.masks), sum(m.numel() for m in agent.masks)
    assert abs(kept - 0.05 * total) <= len(shares) / 2


@pytest.mark.slow
def test_no_sparsity_is_no_pruning(tmp_path: Path) -> None:
    """With --sparsity 0 the model is, bit for bit, that of the same file with its pruning lines
    deleted.
    """
    source = (SCRIPTS / "dqn_atari_gmp.py").read_text()
    for line in (
        "            self.prune_if_due()\n",
        "            torch._foreach_mul_(self.weights, self.masks)\n",
    ):
        assert source.count(line) == 1
        source = source.replace(line, "")
    (tmp_path / "dqn_atari_gmp.py").write_text(source)  # the model knows its script's name
    flags = f"{TINY_FLAGS} --target-every 50 --feature-size 16 --sparsity 0 --analysis-every 0"

    def work(name: str) -> Path:
        folder = tmp_path if name == "without" else SCRIPTS
        succeed(folder / "dqn_atari_gmp.py", flags, f"--run-dir {name}", cwd=tmp_path)
        return tmp_path / name / "model.safetensors"

    models = [future.result() for future in side_by_side(work, ("with", "without")).values()]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert not any(
        (w == 0).any() for name, w in load_file(models[0]).items() if name.endswith("weight")
    )


# The update


def test_loss_and_gradients_in_float64(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three-step returns from a replay with endings of both kinds, against loops over single
    transitions, to 1e-9.
    """
    monkeypatch.setattr(dqn, "QNetwork", Small)
    replay, agent = filled(dqn, 12, 300), agent_of(dqn, torch.float64, n_step=3, gamma=0.9)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    drawn = replay.sample(64)
    batch = [t.double() if t.is_floating_point() else t for t in drawn]
    obs, next_obs, actions, rewards, discounts = batch
    # Episodes that went on, that were cut after 1 and 2 steps, and that terminated.
    assert len(set(drawn[4].tolist())) == 4
    losses, q_values = agent.loss(*batch)
    losses.mean().backward()

    other = copy.deepcopy(agent.online)
    other.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(64):
        q = other(obs[i : i + 1])[0, int(actions[i])]
        after = max(agent.target(next_obs[i : i + 1])[0].tolist())
        wanted = float(rewards[i]) + float(discounts[i]) * after
        assert losses[i].item() == pytest.approx((q.item() - wanted) ** 2, abs=1e-9)
        assert q_values[i].item() == pytest.approx(q.item(), abs=1e-12)
        total = total + (q - wanted) ** 2 / 64
    total.backward()
    for ours, theirs in zip(agent.online.parameters(), other.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert float((ours.grad - theirs.grad).abs().max()) < 1e-9
        assert float(theirs.grad.abs().max()) > 1e-6


def test_update_masks_after_a_dense_step(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and Adam's moments are dense; the weight that a mask covers is exactly 0 after each
    step.
    """
    monkeypatch.setattr(dqn, "QNetwork", Small)
    agent, replay = agent_of(dqn, sparsity=0.9, prune_start=0.0, prune_end=0.0), filled(dqn, 12, 60)
    agent.learn(replay, 112)
    for w, m in zip(agent.weights, agent.masks):
        state = agent.optimizer.state[w]
        assert not w[m == 0].any() and w[m == 1].all() and 0 < float(m.mean()) <= 1
        moments = (state["exp_avg"] != 0)[m == 0].float().mean()
        assert moments > 0.1 or bool(m.all()), "moments of pruned weights go on"
        assert float(state["step"]) == 3
    agent.update_target()
    assert all_equal(params(agent.target), params(agent.online))
    for w, m in zip(dqn.prunable(agent.target).values(), agent.masks):
        assert not w[m == 0].any()
    assert agent.gradient_step == 3 and float(agent.latest[0]) > 0


def test_the_order_of_a_pruning_step(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are those of the weights before the step, its gradient that of the unpruned weights,
    and Adam's step, by its formula, comes before the masks.
    """
    monkeypatch.setattr(dqn, "QNetwork", Small)
    replay, flags = filled(dqn, 12, 60), dict[str, Any](prune_start=0.0, prune_end=0.0)
    agent = agent_of(dqn, sparsity=0.7, learning_rate=0.1, **flags)
    dense, samples = copy.deepcopy(agent), replay.generator.get_state()
    dense.loss(*replay.sample(32))[0].mean().backward()
    replay.generator.set_state(samples)
    agent.learn(replay, 104)
    found = dqn.prunable(agent.online).items()
    for (name, w), before, mask in zip(found, dense.weights, agent.masks):
        kept, g = before.abs().flatten().argsort(), before.grad
        removed = kept[: len(kept) - int(mask.sum())]
        assert not mask.flatten()[removed].any() and mask.sum() == len(kept) - len(removed)
        wanted = (before - 0.1 * g / (g.abs() + agent.args.adam_eps)) * mask
        assert torch.allclose(w, wanted, rtol=0, atol=1e-5), name
        assert g[mask == 0].any() or mask.all()


def test_greedy_and_random_actions(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqn, "QNetwork", Tiny)
    agent, obs = agent_of(dqn), np.zeros((20_000, 4, 1, 1), np.uint8)
    constant(agent.online, [0.0, 0.0, 9.0, 0.0])
    assert (agent.act(obs[:100], 0.0) == 2).all()
    shares = np.bincount(agent.act(obs, 0.4), minlength=4) / len(obs)
    assert shares == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.015)
    shares = np.bincount(agent.act(obs, 1.0), minlength=4) / len(obs)
    assert shares == pytest.approx([0.25] * 4, abs=0.015)


def test_the_state_is_everything(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqn, "QNetwork", Small)
    flags: dict[str, Any] = {"total_timesteps": 300, "sparsity": 0.9, "prune_every": 3}
    agent, other = agent_of(dqn, seed=1, **flags), agent_of(dqn, seed=2, **flags)
    replays = [filled(dqn, 12, 60) for _ in range(2)]
    agent.learn(replays[0], 180)
    agent.update_target()
    agent.learn(replays[0], 192)
    replays[1].generator.set_state(replays[0].generator.get_state())
    torch.save(agent.state_dict(), file := io.BytesIO())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    actions = []
    for each, replay in zip((agent, other), replays):
        each.learn(replay, 272)
        actions.append(each.act(np.zeros((90, 4, 12, 12), np.uint8), 0.5).tolist())
    assert actions[0] == actions[1]
    assert agent.sparsity == other.sparsity and agent.sparsity > 0.5
    assert agent.gradient_step == other.gradient_step == 43
    files = []
    for each in (agent, other):
        torch.save(each.state_dict(), file := io.BytesIO())
        files.append(file.getvalue())
    assert files[0] == files[1]


# The analyses


def test_analyses_by_hand(dqn: ModuleType) -> None:
    """The CNN called layer by layer on the same states, with a dead channel, a dead unit and a
    faint one.
    """
    agent = agent_of(dqn, n_step=1)
    net = agent.online
    with torch.no_grad():
        net.conv2.weight[5], net.dense.weight[2] = 0, 0  # biases are 0: these are silent
        net.dense.weight[3] *= 1e-3  # heard now and then
    replay = filled(dqn, 84, 60, n_step=1)
    measures, cosines = dqn.analyse(agent, replay, 7)

    first, count = replay.range.tolist()
    drawn = np.random.default_rng(7).integers(first, first + count, 2080) % replay.slots
    slots = torch.from_numpy(drawn)
    x = replay.gather(slots[:2048])[0]
    with torch.no_grad():
        h1 = F.relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, 4, 2))
        h2 = F.relu(F.conv2d(F.pad(h1, (1, 2, 1, 2)), net.conv2.weight, net.conv2.bias, 2))
        h3 = F.relu(F.conv2d(h2, net.conv3.weight, net.conv3.bias, 1, 1))
        h4 = F.relu(h3.permute(0, 2, 3, 1).reshape(2048, -1) @ net.dense.weight.T + net.dense.bias)
        q = h4 @ net.output.weight.T + net.output.bias
    dormant = {0.0: 0, 0.1: 0}
    for h in (h1, h2, h3, h4):
        sums = h.double().abs().mean(dim=tuple(i for i in range(h.ndim) if i != 1))
        for threshold in dormant:
            limit = threshold * (float(sums.mean()) + 1e-9)
            dormant[threshold] += sum(score <= limit for score in sums.tolist())
    assert dormant[0.0] >= 2 and dormant[0.1] > dormant[0.0]
    assert measures["analysis/dormant_0"] == pytest.approx(dormant[0.0] / (32 + 64 + 64 + 16))
    assert measures["analysis/dormant_0.1"] == pytest.approx(dormant[0.1] / (32 + 64 + 64 + 16))
    spectrum = np.linalg.svd(h4.double().numpy(), compute_uv=False)
    rank = next(k for k in range(1, 17) if spectrum[:k].sum() >= 0.99 * spectrum.sum())
    assert measures["analysis/srank"] == rank and 1 < rank < 16
    values = q.double().numpy()
    assert measures["analysis/q_variance"] == pytest.approx(values.var(ddof=1), rel=1e-3)
    norm = np.sqrt((values**2).sum(1)).mean()
    assert measures["analysis/q_norm"] == pytest.approx(norm, rel=1e-4)
    squares = sum(float((p.detach().double() ** 2).sum()) for p in net.parameters())
    assert measures["analysis/param_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)

    batch, rows = replay.gather(slots[2048:]), []
    for i in range(32):
        net.zero_grad()
        agent.loss(*(t[i : i + 1] for t in batch))[0].sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]).double())
    wanted = [[float(a @ b / (a.norm() * b.norm())) for b in rows] for a in rows]
    assert np.abs(cosines - np.array(wanted)).max() < 1e-4 and np.abs(cosines).min() < 0.9


@pytest.mark.slow
def test_units_of_the_residual_network_that_are_counted(dqn: ModuleType) -> None:
    """After both ReLUs of each of six blocks, and of the dense layer: 336 units. Those behind the
    last block are left out, as by ReDo's authors.
    """
    agent, replay = agent_of(dqn, network="impala", n_step=1), filled(dqn, 84, 60, n_step=1)
    units, net = 4 * 16 + 4 * 32 + 4 * 32 + 16, agent.online

    def silent() -> float:
        return float(dqn.analyse(agent, replay, 7)[0]["analysis/dormant_0"] * units)

    before = silent()
    assert before == pytest.approx(round(before), abs=1e-4)
    with torch.no_grad():
        net.stack3.blocks[2].weight[5] = 0  # between the ReLUs of the last block; biases are 0
        net.dense.weight[2] = 0
    assert silent() == pytest.approx(round(before) + 2, abs=1e-4)
    with torch.no_grad():
        net.stack3.blocks[3].bias[7] = -1e9  # a channel behind the last block
    assert silent() == pytest.approx(round(before) + 2, abs=1e-4)


def test_an_analysis_changes_nothing(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqn, "QNetwork", QSmall)
    agent, replay = agent_of(dqn), filled(dqn, 12, 60)
    agent.learn(replay, 108)
    torch.save(agent.state_dict(), before := io.BytesIO())
    samples = replay.generator.get_state()
    first, second, other = (dqn.analyse(agent, replay, seed) for seed in (1, 1, 2))
    assert first[0] == second[0] != other[0]
    assert np.array_equal(first[1], second[1]) and not np.array_equal(first[1], other[1])
    torch.save(agent.state_dict(), after := io.BytesIO())
    assert before.getvalue() == after.getvalue()
    assert torch.equal(replay.generator.get_state(), samples)
    assert all(p.grad is None for p in agent.online.parameters())


class QSmall(Small):
    """Small with the outputs of its hidden layers."""

    def hidden(self, obs: Tensor) -> list[Tensor]:
        h1 = F.relu(self.conv1(obs))
        h2 = F.relu(self.conv2(h1))
        return [h1, h2, F.relu(self.dense(h2.flatten(1)))]


# It learns


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_catch(dqn: ModuleType, monkeypatch: pytest.MonkeyPatch, sparsity: float) -> None:
    """Catch in 24,000 steps with 512 units, dense and at 95 % sparsity: 90 % of the best return
    (about a minute).
    """
    monkeypatch.setattr(dqn, "QNetwork", CatchNetwork)
    agent = dqn.DQN(dqn.Args(sparsity=sparsity, **CATCH_FLAGS), 3, CPU)
    assert catch_return(dqn, agent) >= 0.9
    prunable = dqn.sparsity_report(agent.online)["sparsity/prunable"]
    assert prunable == pytest.approx(sparsity, abs=1e-3)
