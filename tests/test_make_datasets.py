"""make_datasets.py: what is recorded is what was played, under honest names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import minari
import numpy as np
import pytest
from conftest import SCRIPTS, script_fixture

datasets = script_fixture("make_datasets")


def outcome(module: ModuleType, last: float, reward: float, terminated: bool, ended: bool) -> Any:
    ends = (np.array([terminated]), np.array([ended]))
    return module.MujocoSteps(np.array([[last]], np.float32), np.array([reward]), *ends, [])


def test_steps_become_episodes(datasets: ModuleType) -> None:
    """One that terminates, one that is truncated, one that is cut where the recording ends."""
    def steps() -> Any:
        for obs, last, terminated, ended in ((0, 1, False, False), (1, 2, True, True), (5, 6, False, True),
                                             (8, 9, False, False)):  # fmt: skip
            action = np.array([[obs / 10]], np.float32)
            yield np.array([[obs]], np.float32), action, outcome(datasets, last, 10.0 * obs, terminated, ended)

    first, second, third = datasets.transitions(steps())
    assert first["observations"].tolist() == [[0], [1], [2]] and first["rewards"].tolist() == [0, 10]
    assert first["terminations"].tolist() == [False, True] and not first["truncations"].any()
    assert second["observations"].tolist() == [[5], [6]] and second["truncations"].tolist() == [True]
    assert third["observations"].tolist() == [[8], [9]] and third["truncations"].tolist() == [True]
    assert third["actions"] == pytest.approx(0.8) and not third["terminations"].any()


@pytest.mark.slow
def test_one_command_trains_and_records(cql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pendulum, whose actions lie in [-2, 2]: five datasets, which the offline script reads."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    flags = ["--env-id", "Pendulum-v1", "--medium-steps", "450", "--expert-steps", "700", "--transitions", "500"]
    command = [sys.executable, SCRIPTS / "make_datasets.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    results = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment) for _ in "12"]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    tables = [[line for line in result.stdout.splitlines() if line.startswith("| local")] for result in results]
    assert tables[0] == tables[1], "again, without training: the same, checksums included"
    names = [f"local/pendulum/{kind}-v0" for kind in ("random", "medium", "medium-replay", "expert", "medium-expert")]
    assert [line.split(" | ")[0][2:] for line in tables[0]] == names
    counts = {}
    for name, line in zip(names, tables[0]):
        data, env_id = cql.read_dataset(name)
        assert env_id == "Pendulum-v1" and data.obs.shape[1] == 3 and not data.terminated.any()
        assert 1 < np.abs(data.actions).max() <= 2
        counts[name] = len(data.obs)
        assert f" {len(data.obs):,} " in line
    # Whole episodes of 200 steps; the medium run's 450 steps; the runs begin alike.
    assert [*counts.values()] == [600, 600, 450, 600, 1200]
    replay = minari.load_dataset("local/pendulum/medium-replay-v0")
    assert [len(episode.rewards) for episode in replay.iterate_episodes()] == [200, 200, 50]
    returns = [float(episode.rewards.sum()) for episode in replay.iterate_episodes()]
    metrics = (tmp_path / "runs" / "datasets" / "Pendulum-v1__1__700" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line).get("charts/episodic_return") for line in metrics]
    assert returns[:2] == pytest.approx([score for score in scores if score is not None][:2], rel=1e-5)


@pytest.mark.parametrize(
    "flags", ["--env-id Hoper-v5", "--medium-steps 0", "--expert-steps 50", "--transitions 0", "--seed -1"]
)
def test_bad_input_is_refused_in_one_line(
    datasets: ModuleType, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_datasets.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        datasets.command_line(datasets.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and flags in line
    assert not [*tmp_path.iterdir()]
