"""The fork of docs/pruning_criterion.md, made from the page's own edits, trains and is resumed
exactly.
"""

from __future__ import annotations

import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, load_script
from test_runs import SMALL, Process, assert_same_run, both, has_saved, succeed

PAGE = SCRIPTS.parent / "docs" / "pruning_criterion.md"


def fork(script: str) -> str:
    """Return the script after the page's edits; each must fit exactly one place."""
    text = (SCRIPTS / f"{script}.py").read_text()
    edits = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(edits) == 3
    for edit in edits:
        lines = edit.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_movement_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of -w * dL/dw over two updates, with gradients taken here."""
    monkeypatch.setattr("conftest.SCRIPTS", tmp_path)
    (tmp_path / "dqn_movement.py").write_text(fork("dqn_atari_gmp"))
    module = load_script("dqn_movement")
    agent = module.DQN(module.Args(feature_size=8), 3, torch.device("cpu"))
    obs, next_obs = torch.rand(2, 5, 4, 84, 84)
    actions = torch.tensor([0, 1, 2, 0, 1])
    rewards, discounts = torch.tensor([[1.0, 0, -1, 0, 1], [0.9, 0, 0.9, 0.9, 0.9]])
    wanted = [torch.zeros_like(weight) for weight in agent.weights]
    for _ in range(2):
        target = rewards + discounts * agent.target(next_obs).max(1).values.detach()
        loss = (agent.online(obs)[range(5), actions] - target).square().mean()
        for score, weight, grad in zip(
            wanted, agent.weights, torch.autograd.grad(loss, agent.weights)
        ):
            score -= weight.detach() * grad
        agent.update(obs, next_obs, actions, rewards, discounts)
    scores = module.pruning_scores(agent.online, agent.rng["score"])
    for ours, theirs in zip(scores, wanted):
        torch.testing.assert_close(ours, theirs)
    assert any((score < 0).any() for score in scores), "a score of any sign"


@pytest.mark.kill
def test_the_fork_trains_and_is_resumed_exactly(tmp_path: Path) -> None:
    path = tmp_path / "dqn_movement.py"
    path.write_text(fork("dqn_atari_gmp"))
    flags = SMALL["dqn_atari_gmp"]

    def cut() -> None:
        process = Process(path, flags, "--run-dir cut", cwd=tmp_path)
        process.when(partial(has_saved, tmp_path / "cut", 1000)).stop(signal.SIGKILL)
        succeed(path, "--resume cut", cwd=tmp_path)

    both(partial(succeed, path, flags, "--run-dir whole", cwd=tmp_path), cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    final = json.loads((tmp_path / "whole" / "final.json").read_text())
    assert final["sparsity/prunable"] == pytest.approx(0.95, abs=1e-3)
    succeed("dqn_atari_gmp", flags, "--run-dir magnitude", cwd=tmp_path)
    models = [tmp_path / name / "model.safetensors" for name in ("whole", "magnitude")]
    assert models[0].read_bytes() != models[1].read_bytes(), (
        "another criterion prunes other weights"
    )
