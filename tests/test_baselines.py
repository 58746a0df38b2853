"""Tests of dqn_atari_baselines.py: sparse training and regularisation, each against its
definition.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tasks import CPU, Small, all_equal, filled_replay, params
from test_runs import TINY_FLAGS, records, run, side_by_side, succeed
from torch import Tensor


def agent_of(module: ModuleType, **flags: Any) -> Any:
    flags = {
        "feature_size": 16,
        "learning_starts": 100,
        "total_timesteps": 900,
        **flags,
    }  # 200 gradient steps
    return module.DQN(module.Args(**flags), 4, CPU)


@pytest.fixture
def small(baselines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with Small for its network."""
    monkeypatch.setattr(baselines, "QNetwork", Small)
    return baselines


def filled(module: ModuleType, size: int = 12) -> Any:
    return filled_replay(module, size, 60)


def learn(agent: Any, replay: Any, updates: int) -> None:
    """Take gradient steps, of which there is one for every four steps after the first 100."""
    agent.learn(replay, 100 + 4 * (agent.gradient_step + updates))


def snapshot(agent: Any) -> tuple[list[Tensor], list[Tensor]]:
    return [m.bool() for m in agent.masks], [w.detach().clone() for w in agent.weights]


# Sparse training


@pytest.mark.parametrize("pruner", ["static", "set", "rigl"])
def test_random_masks_at_the_start(small: ModuleType, pruner: str) -> None:
    agents = [agent_of(small, pruner=pruner, sparsity=0.8, seed=seed) for seed in (1, 1, 2)]
    masks = [snapshot(agent)[0] for agent in agents]
    assert all_equal(masks[0], masks[1]) and not all_equal(masks[0], masks[2])
    densities = small.erk_densities(agents[0].online, 0.8)
    assert [int(m.sum()) for m in masks[0]] == [
        max(1, round(m.numel() * d)) for m, d in zip(masks[0], densities)
    ]
    for w, target, m in zip(agents[0].weights, small.prunable(agents[0].target).values(), masks[0]):
        assert not w[~m].any() and w[m].all() and torch.equal(w, target)
    dense = agent_of(small, pruner=pruner, sparsity=0.0)
    assert all(m.all() for m in dense.masks) and dense.sparsity == 0


def test_static_masks_stay(small: ModuleType) -> None:
    agent = agent_of(small, pruner="static", sparsity=0.8, prune_every=1)
    before = snapshot(agent)[0]
    learn(agent, filled(small), 30)
    assert all_equal(snapshot(agent)[0], before) and 0.75 < agent.sparsity < 0.85
    assert all(not w[~m].any() for w, m in zip(agent.weights, before))


@pytest.mark.parametrize("pruner", ["set", "rigl"])
def test_smallest_weights_are_replaced(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    """0.3 of each layer at first, less along a cosine; by random weights, or by those of the
    largest gradient.
    """
    agent, replay = agent_of(small, pruner=pruner, sparsity=0.7, prune_every=10), filled(small)
    batch = replay.sample(32)
    monkeypatch.setattr(replay, "sample", lambda _: batch)
    changes, overlaps = [], []
    for step in range(200):
        old, weights = snapshot(agent)
        if step == 0:
            agent.update(*batch)
            continue
        agent.gradient_step = step
        moments = [agent.optimizer.state[w]["exp_avg_sq"].clone() for w in agent.weights]
        losses = agent.loss(*batch)[0]
        gradients = torch.autograd.grad(losses.mean(), agent.weights)
        agent.regrow_if_due(replay)
        new, _ = snapshot(agent)
        rng = np.random.default_rng((agent.args.seed, step))
        random = [torch.from_numpy(rng.random(w.shape)).float() for w in weights]
        scores = [g.abs() for g in gradients] if pruner == "rigl" else random
        if not all_equal(old, new):
            changes.append(step)
        for w, before, was, now, g, m, score in zip(
            agent.weights, weights, old, new, gradients, moments, scores
        ):
            assert was.sum() == now.sum(), "as many as before"
            dropped, grown = was & ~now, now & ~was
            assert (
                not w[~now].any()
                and torch.equal(w[was & now], before[was & now])
                and not w[grown].any()
            )
            assert not any(
                agent.optimizer.state[w][name][grown].any() for name in ("exp_avg", "exp_avg_sq")
            )
            assert torch.equal(agent.optimizer.state[w]["exp_avg_sq"][was & now], m[was & now])
            if step in changes and dropped.any():
                # Exactly: the largest weights stay, the rest are those of the largest score,
                # dropped ones among them.
                share, size = 0.3 * (1 + math.cos(math.pi * step / 160)) / 2, int(was.sum())
                by_weight = (
                    torch.where(was, before.abs(), -1)
                    .flatten()
                    .argsort(descending=True, stable=True)
                )
                score = score.flatten().clone()
                score[by_weight[: size - round(share * size)]] = math.inf
                wanted = torch.zeros(was.numel(), dtype=torch.bool)
                wanted[score.argsort(descending=True, stable=True)[:size]] = True
                assert torch.equal(now.flatten(), wanted)
                largest = g.abs()[~was].sort(descending=True).values[: int(grown.sum())]
                overlaps.append(torch.equal(g.abs()[grown].sort(descending=True).values, largest))
        agent.update(*batch)
    assert set(changes) <= set(range(10, 160, 10)) and len(changes) >= 12
    assert all(overlaps) if pruner == "rigl" else not any(overlaps[:4])


@pytest.mark.slow
def test_a_lottery_ticket(tmp_path: Path) -> None:
    """The mask of a finished run on its own initial weights; another seed or size is refused, and
    so is no run.
    """
    flags = f"{TINY_FLAGS} --target-every 50 --feature-size 16 --seed 3"
    succeed("dqn_atari_gmp", flags, "--sparsity 0.9 --prune-every 5 --run-dir winner", cwd=tmp_path)
    lottery = "--pruner lottery --lottery-mask winner"
    tries = (
        f"{lottery} --run-dir ticket",
        f"{lottery} --seed 4",
        f"{lottery} --feature-size 8",
        "--pruner lottery --lottery-mask nowhere",
        "--pruner lottery",
        "--lottery-mask winner",
        "--pruner lottery --lottery-mask rainbow",
        "--pruner lottery --lottery-mask damaged",
    )
    succeed("rainbow_resnet_gmp", flags, "--network cnn --run-dir rainbow", cwd=tmp_path)
    shutil.copytree(tmp_path / "winner", tmp_path / "damaged")
    model = tmp_path / "damaged" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-9])
    outputs = side_by_side(lambda own: run("dqn_atari_baselines", flags, own, cwd=tmp_path), tries)
    ticket, *refused = (future.result() for future in outputs.values())
    assert ticket.status == 0, ticket.stderr
    masks = [
        {
            name: w != 0
            for name, w in load_file(tmp_path / run_dir / "model.safetensors").items()
            if w.ndim > 1
        }
        for run_dir in ("winner", "ticket")
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert sum(int(m.sum()) for m in masks[0].values()) == pytest.approx(0.1 * 198_000, rel=0.03)
    named = (
        "--seed 4",
        "sizes",
        "nowhere",
        "--lottery-mask",
        "--pruner lottery",
        "rainbow",
        "damaged",
    )
    for output, words in zip(refused, named, strict=True):
        (line,) = output.complaints()
        assert output.status == 2 and words in line, output


def test_the_lottery_starts_from_the_initial_weights(baselines: ModuleType, tmp_path: Path) -> None:
    flags = {"seed": 5, "feature_size": 16}
    dense = agent_of(baselines, sparsity=0.0, **flags)
    masks = {
        f"{name}.weight": torch.rand(w.shape) < 0.3
        for name, w in baselines.prunable(dense.online).items()
    }
    model = {
        name: p.detach().contiguous() * masks.get(name, 1)
        for name, p in dense.online.named_parameters()
    }
    metadata = {"flags": json.dumps(flags)}
    (tmp_path / "model.safetensors").write_bytes(baselines.save(model, metadata))
    agent = agent_of(baselines, pruner="lottery", lottery_mask=str(tmp_path), **flags)
    for (name, w), first in zip(baselines.prunable(agent.online).items(), dense.weights):
        assert torch.equal(w, first * masks[f"{name}.weight"])
    assert agent.sparsity == pytest.approx(0.7, abs=0.01)


def test_gmp_is_the_other_script(tmp_path: Path) -> None:
    """Without a regulariser the model and the losses are those of dqn_atari_gmp.py, bit for bit."""
    flags = f"{TINY_FLAGS} --target-every 50 --feature-size 16 --prune-every 5"
    own = {"dqn_atari_gmp": "--analysis-every 0", "dqn_atari_baselines": ""}
    side_by_side(
        lambda script: succeed(script, flags, own[script], f"--run-dir {script}", cwd=tmp_path), own
    )
    ours, theirs = (load_file(tmp_path / script / "model.safetensors") for script in own)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [r["losses/td_loss"] for r in records(tmp_path / script) if "losses/td_loss" in r]
        for script in own
    ]
    assert losses[0] == losses[1] and losses[0]


# Regularisation


def test_weight_decay_is_coupled(small: ModuleType) -> None:
    """1e-5 times the weight is added to the gradient, before Adam's moments; by Adam's formula in
    float64.
    """
    args = small.Args(feature_size=16, regulariser="weight-decay", sparsity=0.0, learning_rate=1e-2)
    agent = small.DQN(args, 4, CPU).double()
    agent.masks = list(agent.online.buffers())  # double() makes new ones
    batch = [part.double() for part in filled(small).sample(32)]
    batch[2], before = batch[2].long(), params(agent.online)
    gradients = torch.autograd.grad(agent.loss(*batch)[0].mean(), list(agent.online.parameters()))
    agent.update(*batch)
    for p, old, g in zip(agent.online.parameters(), before, gradients):
        g = g + 1e-5 * old
        assert torch.allclose(p, old - 1e-2 * g / (g.abs() + 1.5e-4), rtol=0, atol=1e-12)
        assert (
            torch.allclose(agent.optimizer.state[p]["exp_avg"], 0.1 * g, rtol=0, atol=1e-14)
            and old.any()
        )


def test_features_of_length_one(baselines: ModuleType) -> None:
    agent, seen = agent_of(baselines, regulariser="l2-features", sparsity=0.0), list[Tensor]()
    agent.online.output.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    q = agent.online(torch.rand(5, 4, 84, 84))
    assert seen[0].norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert torch.allclose(q, seen[0] @ agent.online.output.weight.T + agent.online.output.bias)
    plain = agent_of(baselines, sparsity=0.0)
    assert all_equal(params(plain.online), params(agent.online))
    assert agent.target.normalise and not plain.target.normalise


@pytest.mark.parametrize("network", ["cnn", "impala"])
def test_dormant_units_are_made_anew(baselines: ModuleType, network: str) -> None:
    """Silent units: new incoming weights, no outgoing ones, empty moments; all else, and what comes
    out, as before.
    """
    agent = agent_of(baselines, network=network, regulariser="redo", sparsity=0.0, seed=2)
    replay = filled_replay(baselines, 84, 40)
    net = agent.online
    learn(agent, replay, 2)
    before, behind = net.stack2.blocks[:2] if network == "impala" else (net.conv1, net.conv2)
    silent = [(net.dense, 3), (before, 7)] + ([(net.conv3, 9)] if network == "cnn" else [])
    with torch.no_grad():
        for layer, unit in silent:
            layer.weight[unit], layer.bias[unit] = 0.0, -1.0
    old = {name: p.detach().clone() for name, p in net.named_parameters()}
    obs = torch.rand(6, 4, 84, 84)
    with torch.no_grad():
        was = net(obs)
    agent.gradient_step = 1000
    agent.recycle(replay)
    fresh = agent.fresh()

    changed = {name: (p != old[name]) for name, p in net.named_parameters()}
    for layer, unit in silent:
        name = next(n for n, m in net.named_modules() if m is layer)
        new, drawn = layer.weight[unit], fresh.get_submodule(name).weight[unit]
        assert (
            torch.equal(new[new != 0], drawn[new != 0]) and (new != 0).float().mean() > 0.1
        )  # not from dead units
        assert layer.bias[unit] == 0
        for tensor in (layer.weight, layer.bias):
            assert not agent.optimizer.state[tensor]["exp_avg"][unit].any()
            assert not agent.optimizer.state[tensor]["exp_avg_sq"][unit].any()
    outgoing = [net.output.weight[:, 3], behind.weight[:, 7]]
    outgoing += [net.dense.weight.view(16, 121, 64)[:, :, 9]] if network == "cnn" else []
    assert not any(w.any() for w in outgoing)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not agent.optimizer.state[behind.weight][moment][:, 7].any()
        if network == "cnn":
            assert (
                not agent.optimizer.state[net.dense.weight][moment].view(16, 121, 64)[:, :, 9].any()
            )
    with torch.no_grad():
        assert torch.allclose(net(obs), was, atol=0.2), (
            "what is below a tenth of the mean said little"
        )
    assert changed["dense.weight"][3].any() and not changed["output.bias"].any()


def test_dormant_is_a_tenth_of_the_mean(baselines: ModuleType) -> None:
    """Of 16 dense units, by scores computed apart: exactly those at or below 0.1 of the mean are
    drawn anew.
    """
    agent = agent_of(baselines, regulariser="redo", sparsity=0.0)
    replay = filled_replay(baselines, 84, 40)
    agent.update(*replay.sample(2))  # which makes Adam's moments
    agent.gradient_step = 0
    with torch.no_grad():
        for unit in range(16):
            agent.online.dense.weight[unit] *= 0.02 * (1 + unit)
        agent.online.dense.bias.zero_()
    first, count = replay.range.tolist()
    draws = np.random.default_rng((1, 0)).integers(count, size=64)
    x = replay.gather(torch.from_numpy(draws + first) % replay.slots)[0]
    with torch.no_grad():
        features = agent.online.hidden(x)[-2].permute(0, 2, 3, 1).flatten(1)
        h = torch.relu(features @ agent.online.dense.weight.T).double().mean(0)
    wanted = (h <= 0.1 * h.mean()).tolist()
    agent.recycle(replay)
    anew = (agent.online.dense.weight == agent.fresh().dense.weight).float().mean(
        1
    ) > 0.1  # where channels are alive
    assert anew.tolist() == wanted and 0 < sum(wanted) < 16


def test_dormant_units_are_looked_for_each_1000_gradient_steps(
    baselines: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the last one; what a unit gets anew is masked as before."""
    agent = agent_of(baselines, regulariser="redo", pruner="static", sparsity=0.5)
    replay = filled_replay(baselines, 84, 40)
    calls, recycle = list[int](), agent.recycle
    monkeypatch.setattr(
        agent, "recycle", lambda replay: calls.append(agent.gradient_step) or recycle(replay)
    )
    learn(agent, replay, 1)
    monkeypatch.setattr(agent, "update", lambda *_: None)
    weight, mask = agent.online.dense.weight, agent.masks[-2]
    with torch.no_grad():
        weight[3] = agent.online.dense.bias[3] = 0.0
    agent.gradient_step = 999
    learn(agent, replay, 1)
    assert agent.gradient_step == 1000 and calls == [] and not weight[3].any()
    learn(agent, replay, 2)
    assert calls == [1000]
    assert mask.shape == weight.shape and 0 < mask[3].sum() < mask[3].numel()
    assert weight[3].any() and not weight[mask == 0].any()


def test_the_last_layer_is_made_anew(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, replay = (
        agent_of(small, regulariser="reset", sparsity=0.5, pruner="static"),
        filled(small),
    )
    learn(agent, replay, 3)
    before, target = params(agent.online), params(agent.target)
    monkeypatch.setattr(agent, "update", lambda *_: None)
    agent.gradient_step = 99_999
    learn(agent, replay, 1)
    assert agent.gradient_step == 100_000 and all_equal(params(agent.online), before), (
        "not after the last update"
    )
    learn(agent, replay, 1)
    assert agent.gradient_step == 100_001
    assert torch.equal(agent.target.output.weight, agent.online.output.weight)
    names = [name for name, _ in agent.online.named_parameters()]
    for name, p, old, t, t_old in zip(
        names, agent.online.parameters(), before, agent.target.parameters(), target
    ):
        if name.startswith("output"):
            assert not torch.equal(p, old) or not p.any()
            assert not any(
                agent.optimizer.state[p][name].any() for name in ("exp_avg", "exp_avg_sq")
            )
        else:
            assert (
                torch.equal(p, old)
                and torch.equal(t, t_old)
                and agent.optimizer.state[p]["exp_avg"].any()
            )
    assert not agent.online.output.weight[agent.masks[-1] == 0].any(), "masked as before"
    again = copy.deepcopy(agent.online.output.weight)
    agent.gradient_step = 100_000
    agent.reset()
    assert torch.equal(agent.online.output.weight, again), "drawn from the seed and the step"


@pytest.mark.parametrize(
    ("layers", "changed"),
    [("last", {"output"}), ("penultimate", {"dense"}), ("both", {"dense", "output"})],
)
def test_the_layers_that_are_reset_and_when(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, layers: str, changed: set[str]
) -> None:
    flags = {"regulariser": "reset", "reset_layers": layers, "reset_every": 2}
    agent, replay = agent_of(small, **flags), filled(small)
    learn(agent, replay, 2)
    before = {name: p.clone() for name, p in agent.online.named_parameters()}
    monkeypatch.setattr(agent, "update", lambda *_: None)
    learn(agent, replay, 1)
    after = dict(agent.online.named_parameters())
    moved = {
        name.partition(".")[0] for name, p in before.items() if not torch.equal(p, after[name])
    }
    assert moved == changed
    for name in changed:
        online, target = agent.online.get_submodule(name), agent.target.get_submodule(name)
        assert torch.equal(online.weight, target.weight)


def test_the_flags_of_weight_decay_and_of_dormancy(baselines: ModuleType) -> None:
    agent = agent_of(baselines, regulariser="weight-decay", weight_decay=0.5)
    assert agent.optimizer.param_groups[0]["weight_decay"] == 0.5
    recycled = []
    for threshold in (0.0, 1.0):
        agent = agent_of(baselines, regulariser="redo", redo_threshold=threshold)
        replay = filled_replay(baselines, 84, 40)
        learn(agent, replay, 3)
        agent.recycle(replay)
        recycled.append(int((agent.online.output.weight == 0).all(0).sum()))
    assert recycled[0] < recycled[1] > 1, "of its layer's mean: at 1 about half of the units"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--regulariser redo --pruner rigl --prune-every 9", "--regulariser l2-features"]
)
def test_short_runs(tmp_path: Path, flags: str) -> None:
    flags = f"{TINY_FLAGS} {flags} --target-every 50 --feature-size 16 --run-dir run"
    succeed("dqn_atari_baselines", flags, cwd=tmp_path)
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["sparsity/prunable"] == pytest.approx(0.95, abs=1e-3)
    assert [r for r in records(tmp_path / "run") if r.get("losses/td_loss", 0) > 0]
