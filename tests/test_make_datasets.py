"""make_datasets.py: what is recorded is what was played, under honest names."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import minari
import numpy as np
import pytest
from conftest import SCRIPTS, script_fixture
from test_runs import wait_until

datasets = script_fixture("make_datasets")


def test_steps_become_episodes(datasets: ModuleType) -> None:
    """One that terminates, one that is truncated, one that is cut where the recording ends."""

    def step(obs: int, last: int, terminated: bool, truncated: bool) -> Any:
        before, after = (np.array([x], np.float32) for x in (obs, last))
        return datasets.Step(before, before / 10, 10.0 * obs, terminated, truncated, after)

    steps = [step(0, 1, False, False), step(1, 2, True, True)]
    steps += [step(5, 6, False, True), step(8, 9, False, False)]
    first, second, third = datasets.episodes_of(steps)
    assert first["observations"].tolist() == [[0], [1], [2]] and first["rewards"].tolist() == [
        0,
        10,
    ]
    assert first["terminations"].tolist() == [False, True] and not first["truncations"].any()
    assert second["observations"].tolist() == [[5], [6]] and second["truncations"].tolist() == [
        True
    ]
    assert third["observations"].tolist() == [[8], [9]] and third["truncations"].tolist() == [True]
    assert third["actions"] == pytest.approx(0.8) and not third["terminations"].any()


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_is_written_and_known_again(
    datasets: ModuleType, cql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole episodes of Hopper by random actions, replaced by the same flags only."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    args = datasets.Args(env_id="Hopper-v5", transitions=50)
    steps = [*datasets.play(args, 7, {})]
    episodes = datasets.episodes_of(steps)
    lines = [datasets.write(args, "random", episodes) for _ in "12"]
    assert (
        lines[0] == lines[1]
        and f"| local/hopper/random-v0 | {len(episodes)} | {len(steps)} |" in lines[0]
    )
    data, env_id = cql.read_dataset("local/hopper/random-v0")
    assert env_id == "Hopper-v5" and 50 <= len(data.obs) == len(steps)
    for i, step in enumerate(steps):
        assert np.array_equal(data.obs[i], step.obs) and np.array_equal(
            data.actions[i], step.action
        )
        assert np.array_equal(data.next_obs[i], step.next_obs)
        assert data.terminated[i] == step.terminated and data.rewards[i] == np.float32(step.reward)
        assert data.ended[i] == (step.terminated or step.truncated)
    for other in ({"env_id": "Hopper-v4"}, {"transitions": 51}, {"seed": 2}):
        with pytest.raises(
            datasets.Exit, match=r"random-v0 holds another dataset \(random of Hopper-v5, "
        ):
            datasets.write(dataclasses.replace(args, **other), "random", episodes)
    assert len(cql.read_dataset("local/hopper/random-v0")[0].obs) == len(steps)


def test_a_damaged_run_is_named(datasets: ModuleType, tmp_path: Path) -> None:
    """Flags that are no JSON; no checkpoint, whose episodes are to be replayed."""
    args = datasets.Args(env_id="Hopper-v5", runs=tmp_path)
    folder = tmp_path / "Hopper-v5__1__300"
    folder.mkdir()
    with pytest.raises(datasets.Exit, match="Hopper-v5__1__300: its checkpoint is gone"):
        next(datasets.replay(args, folder))
    (folder / "args.json").write_text("{")
    with pytest.raises(datasets.Exit, match=r"Hopper-v5__1__300: its args.json is damaged"):
        datasets.train(args, "Hopper-v5", 300)


@pytest.mark.slow
def test_one_command_trains_and_records(
    cql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pendulum, whose actions lie in [-2, 2]: five datasets, which the offline script reads."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    flags = [
        "--env-id",
        "Pendulum-v1",
        "--medium-steps",
        "450",
        "--expert-steps",
        "700",
        "--transitions",
        "500",
    ]
    command = [sys.executable, SCRIPTS / "make_datasets.py", *flags]
    results = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in "12"]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    tables = [
        [line for line in result.stdout.splitlines() if line.startswith("| local")]
        for result in results
    ]
    assert tables[0] == tables[1], "again, without training: the same, checksums included"
    assert (tmp_path / "runs" / "datasets" / "local-Pendulum-v1.md").read_text().count(
        "local/pendulum/"
    ) == 5
    other = subprocess.run(
        [*command, "--precision", "bf16"], cwd=tmp_path, capture_output=True, text=True
    )
    (line,) = other.stderr.splitlines()
    assert other.returncode == 2 and "random-v0 holds another dataset" in line and "fp32" in line
    command += ["--precision", "bf16", "--name", "b"]
    other = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        other.returncode == 2
        and "Pendulum-v1__1__450: made with --precision fp32, not bf16" in other.stderr
    )
    names = [
        f"local/pendulum/{kind}-v0"
        for kind in ("random", "medium", "medium-replay", "expert", "medium-expert")
    ]
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
    metrics = (
        (tmp_path / "runs" / "datasets" / "Pendulum-v1__1__700" / "metrics.jsonl")
        .read_text()
        .splitlines()
    )
    scores = [json.loads(line).get("charts/episodic_return") for line in metrics]
    assert returns[:2] == pytest.approx(
        [score for score in scores if score is not None][:2], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_stopped_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """With a checkpoint and one line; a run whose parent was killed is not run twice at once."""
    flags = [
        "--env-id",
        "Pendulum-v1",
        "--medium-steps",
        "4000",
        "--expert-steps",
        "5000",
        "--runs",
        str(tmp_path),
    ]
    command = [sys.executable, SCRIPTS / "make_datasets.py", *flags]
    environment = os.environ | {"MINARI_DATASETS_PATH": str(tmp_path / "datasets")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "Pendulum-v1__1__4000"
    wait_until(
        lambda: (
            (folder / "metrics.jsonl").exists()
            and "losses" in (folder / "metrics.jsonl").read_text()
        )
    )
    process.send_signal(number)
    if number != signal.SIGKILL:
        err = process.communicate()[1]
        assert process.returncode == 75 and "Traceback" not in err
        assert err.splitlines()[-1].endswith("did not finish; start this again to continue it")
        assert [*(folder / "checkpoint").iterdir()]
        return
    process.wait()
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 1 and "this run is already running" in second.stderr
    assert "Traceback" not in second.stderr
    wait_until(lambda: (folder / "final.json").exists())


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id Hoper-v5",
        "--medium-steps 299",
        "--expert-steps 50",
        "--transitions 0",
        "--seed -1",
        "--name a/b",
        "--name mujoco",
        "--epsilon 0.5",
        "--run nowhere",
    ],
)
def test_bad_input_is_refused_in_one_line(
    datasets: ModuleType,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_datasets.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        datasets.command_line()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and flags in line
    assert not [*tmp_path.iterdir()]
