"""Atari offline: the reader of Dopamine's replay logs, discrete CQL and CQL+C51, K networks,
pruning by choice and by schedule, what make_datasets.py writes.

DOPAMINE_PYTHON=PYTHON, an interpreter with dopamine-rl and TensorFlow, compares the reader with
Dopamine's own replay buffer too, both ways; without it these tests are skipped.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_script, script_fixture
from tasks import CPU, Small, Tiny, all_equal, params
from test_runs import (
    LOGGED,
    LOGS,
    Output,
    Process,
    assert_same_run,
    both,
    call,
    records,
    run,
    saved_steps,
    succeed,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

datasets = script_fixture("make_datasets")
KINDS: dict[str, Any] = {"observation": np.uint8, "action": np.int32}
KINDS |= {"reward": np.float32, "terminal": np.uint8}
BOTH = tuple(LOGGED)


@pytest.fixture(params=BOTH)
def either(request: pytest.FixtureRequest) -> ModuleType:
    return load_script(request.param)


# The reader


def write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) as file:
        np.save(file, array, allow_pickle=array.dtype == object)


def write_logs(folder: Path, number: int, rows: dict[str, np.ndarray], **others: Any) -> None:
    """Write a checkpoint in Dopamine's format."""
    for name, values in rows.items():
        write_array(folder / f"$store$_{name}_ckpt.{number}.gz", values.astype(KINDS[name]))
    for name, value in others.items():
        write_array(folder / f"{name}_ckpt.{number}.gz", np.array(value))


def played(count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return rows as Dopamine writes them, of each its episode, and whether it is a black one.

    Episodes have 1 to 9 steps; some are cut off, of which no terminal tells. Frames differ.
    """
    rng = np.random.default_rng(seed)
    rows, episode, number = list[tuple[Any, ...]](), list[tuple[int, bool]](), 0
    while len(rows) < count:
        rows += [(np.zeros((84, 84)), 0, 0.0, 0)] * 3
        episode += [(number, True)] * 3
        length, cut = int(rng.integers(1, 10)), rng.random() < 0.4
        for i in range(length):
            terminal = i == length - 1 and not cut
            frame = rng.integers(1, 256, (84, 84))
            rows.append((frame, rng.integers(4), rng.choice([-7.0, 0.0, 0.25, 1.0]), terminal))
            episode.append((number, False))
        number += 1
    values = [np.array(column)[:count] for column in zip(*rows)]
    of, black = np.array(episode[:count]).T
    return dict(zip(KINDS, values)), of, black.astype(bool)


def slow_transition(
    rows: dict[str, np.ndarray], episode: np.ndarray, i: int, n_step: int, gamma: float
) -> tuple[Any, ...] | None:
    """Return state, next state (None after an end), action, return and discount at row i, if the
    rows say all of it. `episode` has a number of its own for what follows on nothing.
    """
    if i < 3 or len({*episode[i - 3 : i + 1]}) > 1:
        return None
    total, state = 0.0, rows["observation"][i - 3 : i + 1]
    for k in range(n_step):
        total += gamma**k * min(1.0, max(-1.0, float(rows["reward"][i + k])))
        if rows["terminal"][i + k]:
            return state, None, rows["action"][i], total, 0.0
        if i + k + 1 >= len(episode) or episode[i + k + 1] != episode[i]:
            return None
    later = rows["observation"][i + n_step - 3 : i + n_step + 1]
    return state, later, rows["action"][i], total, gamma**n_step


def dataset_of(module: ModuleType, folder: Path, **flags: Any) -> Any:
    args = module.Args(dataset=str(folder), **flags)
    return module.Dataset(folder, 4, args, CPU)


def drawn(dataset: Any) -> dict[int, tuple[np.ndarray, ...]]:
    """Return what sample() gives for each row that can be drawn, frames as uint8."""
    rows, found = dataset.rows[: int(dataset.count)], {}
    for i, row in enumerate(rows.tolist()):
        draw = torch.full((1,), (i + 0.5) / len(rows), dtype=torch.float64)
        rand, torch.rand = torch.rand, lambda *_, **__: draw
        try:
            batch = dataset.sample(1)
        finally:
            torch.rand = rand
        frames = [(x[0] * 255).round().to(torch.uint8).numpy() for x in batch[:2]]
        found[row] = (*frames, *(x[0].item() for x in batch[2:]))
    return found


def assert_same(found: dict[int, tuple[Any, ...]], wanted: dict[int, Any]) -> None:
    assert found.keys() == {i for i, transition in wanted.items() if transition}
    assert len(found) > 20
    for i, (state, later, action, total, discount) in found.items():
        own = wanted[i]
        assert np.array_equal(state, own[0]) and action == own[2]
        assert own[1] is None or np.array_equal(later, own[1])
        assert total == pytest.approx(own[3], abs=1e-6)
        assert discount == pytest.approx(own[4], abs=1e-7) and (discount == 0) == (own[1] is None)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_transition_is_that_of_a_slow_reference(
    either: ModuleType, n_step: int, seed: int, tmp_path: Path
) -> None:
    """Three files of 90 rows, of which 80 are read: the next file's rows follow on the tenth later.

    One has a ring's seam within these rows. Cut episodes end without a terminal, at their black
    rows, also where these are cut by the seam or by the end of what is read.
    """
    rows, episode, black = played(270, seed)
    wanted: dict[int, Any] = {}
    for number in range(3):
        part = slice(90 * number, 90 * number + 90)
        mine = {name: values[part] for name, values in rows.items()}
        of = episode[part].copy()
        others: dict[str, Any] = {} if number == 0 else {"add_count": 90}
        if number == 2:  # 40 rows over the ring's end: the newest lie before the oldest
            mine = {name: np.roll(values, 40, axis=0) for name, values in mine.items()}
            of = np.roll(of, 40)
            of[:40] += 1000
            others["add_count"] = 90 * 7 + 40
        write_logs(tmp_path, number, mine, **others)
        first = {name: values[:80] for name, values in mine.items()}
        for i in range(80):
            transition = slow_transition(first, of[:80], i, n_step, 0.9)
            wanted[80 * number + i] = transition
    dataset = dataset_of(
        either, tmp_path, transitions=80, checkpoints_per_epoch=3, n_step=n_step, gamma=0.9
    )
    dataset.load(0)
    assert_same(drawn(dataset), wanted)
    assert black.any() and not rows["terminal"].all()


def test_frames_are_on_the_device_once(either: ModuleType) -> None:
    dataset = dataset_of(either, LOGS / "Breakout/1/replay_logs", transitions=300)
    assert dataset.frames.nbytes == (5 * 300 + 1) * 84 * 84
    assert dataset.frames.dtype == torch.uint8 and dataset.nbytes < 1.01 * dataset.frames.nbytes


def test_draws_are_uniform_over_what_is_whole(either: ModuleType) -> None:
    dataset = dataset_of(either, LOGS / "Breakout/1/replay_logs", transitions=300)
    dataset.load(0)
    dataset.frames = torch.zeros(len(dataset.frames), 1, 1)
    dataset.actions = torch.arange(len(dataset.actions))
    found = torch.cat([dataset.sample(1000)[2] for _ in range(60)])
    rows = dataset.rows[: int(dataset.count)]
    counts = torch.bincount(found, minlength=1500)[rows]
    assert counts.sum() == len(found) == 60_000
    expected = 60_000 / len(rows)
    assert ((counts - expected) ** 2 / expected).sum() < len(rows) + 5 * math.sqrt(2 * len(rows))


def test_an_epochs_checkpoints_follow_from_seed_and_epoch(
    either: ModuleType, tmp_path: Path
) -> None:
    rows, _, _ = played(20, 0)
    for number in range(7):
        write_logs(tmp_path, number, rows | {"reward": np.full(20, number / 10)})
    flags = {"transitions": 20, "checkpoints_per_epoch": 3}
    going = dataset_of(either, tmp_path, **flags)
    seen = []
    for epoch in range(40):
        going.load(epoch)
        seen.append(tuple(going.drawn))
    assert all(len({*numbers}) == 3 and {*numbers} <= {*range(7)} for numbers in seen)
    counts = np.bincount(np.concatenate(seen), minlength=7)
    assert len({*seen}) > 15 and counts.min() > 8
    fresh = dataset_of(either, tmp_path, **flags)
    fresh.load(17)
    going.load(17)
    count = int(going.count)
    assert fresh.drawn == going.drawn == list(seen[17]) and count == int(fresh.count) > 0
    for name in ("frames", "outcomes", "actions"):
        assert torch.equal(getattr(fresh, name), getattr(going, name))
    assert torch.equal(fresh.rows[:count], going.rows[:count])
    other = dataset_of(either, tmp_path, seed=2, **flags)
    other_seen = [other.load(epoch) or tuple(other.drawn) for epoch in range(40)]
    assert other_seen != seen
    assert fresh.digest == other.digest


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {}


def fault(part: str, told: str) -> Callable[[Callable[[Path], None]], None]:
    def note(change: Callable[[Path], None]) -> None:
        FAULTS[change.__name__] = (change, part, told)

    return note


@fault("observation", "damaged")
def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@fault("reward", "damaged")
def checksum(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)


@fault("observation", "damaged, truncated")
def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@fault("terminal", "damaged, truncated")
def emptied(path: Path) -> None:
    path.write_bytes(b"")


@fault("action", "damaged, truncated or missing")
def missing(path: Path) -> None:
    path.unlink()


@fault("action", "must be integer [300] or longer")
def short(path: Path) -> None:
    write_array(path, np.zeros(299, np.int32))


@fault("observation", "must be uint8 [300, 84, 84] or longer")
def small_frames(path: Path) -> None:
    write_array(path, np.zeros((300, 84, 42), np.uint8))


@fault("observation", "not float32")
def frames_of_floats(path: Path) -> None:
    write_array(path, np.zeros((300, 84, 84), np.float32))


@fault("reward", "not object")
def pickled(path: Path) -> None:
    write_array(path, np.array([None] * 300))


@fault("terminal", "damaged")
def text(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        file.write(b"300 rows\n" * 100)


@fault("action", "must be in [0, 4)")
def actions_of_another_game(path: Path) -> None:
    write_array(path, np.full(300, 4))


@fault("terminal", "must be in [0, 2)")
def two(path: Path) -> None:
    write_array(path, np.full(300, 2, np.uint8))


@fault("reward", "must be finite")
def not_a_number(path: Path) -> None:
    write_array(path, np.full(300, np.nan, np.float32))


@fault("terminal", "longer than it says")
def trailing(path: Path) -> None:
    data = gzip.decompress(path.read_bytes()) + b"more"
    path.write_bytes(gzip.compress(data))


@fault("add_count", "100 rows are filled")
def half_filled(path: Path) -> None:
    write_array(path, np.array(100))


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_refused_by_name(
    either: ModuleType,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before anything is begun."""
    change, part, told = FAULTS[name]
    shutil.copytree(LOGS, tmp_path / "logs")
    (folder,) = (tmp_path / "logs").glob("*/*/replay_logs")
    prefix = "" if part == "add_count" else "$store$_"
    path = folder / f"{prefix}{part}_ckpt.3.gz"
    change(path)
    monkeypatch.chdir(tmp_path)
    flags = f"--dataset logs --transitions 300 --checkpoints-per-epoch 6 --run-dir {tmp_path}/run"
    output = call(either, flags.split(), monkeypatch, capsys)
    assert output.status == 2
    (line,) = output.complaints()
    assert line.startswith(f"{either.__name__}.py: {path}: ") and told in line
    assert not (tmp_path / "run").exists()


def found(module: ModuleType, **flags: Any) -> tuple[str, str]:
    folder, rom = module.find_replay(module.Args(**flags))
    return "/".join(folder.parts[-3:]), rom


def test_where_the_logs_are(
    either: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, _, _ = played(8, 0)
    for game, number in (("Breakout", 1), ("MsPacman", 1), ("MsPacman", 2), ("MsPacman", 11)):
        write_logs(tmp_path / game / str(number) / "replay_logs", 0, rows)
    top = str(tmp_path)
    pacman = f"{top}/MsPacman"
    assert found(either, dataset=top, env_id="Breakout") == ("Breakout/1/replay_logs", "breakout")
    for place in (f"{top}/Breakout", f"{top}/Breakout/1", f"{top}/Breakout/1/replay_logs"):
        assert found(either, dataset=place) == ("Breakout/1/replay_logs", "breakout")
    two = ("MsPacman/2/replay_logs", "ms_pacman")
    assert found(either, dataset=pacman, seed=2) == two
    assert found(either, dataset=top, env_id="ALE/MsPacman-v5", seed=2) == two
    monkeypatch.chdir(tmp_path / "MsPacman" / "2")
    assert found(either, dataset="replay_logs") == found(either, dataset=".") == two
    shutil.copytree(tmp_path / "MsPacman" / "1" / "replay_logs", tmp_path / "some" / "mine")
    assert found(either, dataset=f"{top}/some/mine", env_id="Pong") == (
        f"{tmp_path.name}/some/mine",
        "pong",
    )
    for flags, told in (
        ({"dataset": top}, "has several"),
        ({"dataset": pacman, "seed": 3}, "has several"),
        ({"dataset": top, "env_id": "Pong"}, "--env-id Pong: "),
        ({"dataset": f"{top}/Breakout", "env_id": "MsPacman"}, "--env-id MsPacman: "),
        ({"dataset": f"{top}/some/mine"}, "--env-id is missing"),
        ({"dataset": f"{top}/nowhere"}, "no $store$_observation_ckpt.0.gz in it or below it"),
        ({}, "--dataset is missing"),
    ):
        with pytest.raises(SystemExit) as end:
            found(either, **flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and told in line


def test_a_run_takes_other_data_never_again(tmp_path: Path) -> None:
    """The files' own checksums tell, in those too that the epoch does not need."""
    flags = f"{LOGGED['cql_atari_gmp']} --dataset logs --total-timesteps 5000"
    shutil.copytree(LOGS, tmp_path / "logs")
    (path,) = (tmp_path / "logs").glob("*/*/replay_logs/$store$_reward_ckpt.5.gz")
    process = Process("cql_atari_gmp", flags, "--epoch-steps 5000 --run-dir run", cwd=tmp_path)
    process.when((tmp_path / "run" / "metrics.jsonl").exists).stop(signal.SIGKILL)
    before = path.read_bytes()
    write_array(path, np.zeros(300, np.float32))
    output = run("cql_atari_gmp", "--resume run", cwd=tmp_path)
    assert output.status == 2
    assert "has changed since the run in run began" in output.complaints()[-1]
    path.write_bytes(before)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["dataset"] == str(path.parent) and args["env_id"] == "Breakout"


# Dopamine itself

DOPAMINE = r"""
import sys
import numpy as np
from dopamine.tf.replay_memory.circular_replay_buffer import OutOfGraphReplayBuffer

def buffer(capacity, n_step):
    shape = {"observation_shape": (84, 84), "stack_size": 4}
    return OutOfGraphReplayBuffer(
        replay_capacity=capacity, batch_size=1, update_horizon=n_step, gamma=0.9, **shape
    )

def dump(ours, path):
    valid = [i for i in range(ours._replay_capacity) if ours.is_valid_transition(i)]
    batch = ours.sample_transition_batch(len(valid), valid)
    names = [element.name for element in ours.get_transition_elements(1)]
    np.savez(path, **dict(zip(names, batch)), valid=valid)

what, folder, n_step = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == "write":
    rng = np.random.default_rng(0)
    for number, steps in enumerate((45, 200, 333)):  # partly filled, and rings twice round
        mine, left, last = buffer(120, n_step), 0, None
        for _ in range(steps):
            left = left or int(rng.integers(1, 12))
            left -= 1
            ended = left == 0
            terminal = ended and rng.random() < 0.7
            frame = rng.integers(1, 256, (84, 84)).astype(np.uint8)
            reward = rng.choice([-1.0, 0.0, 1.0])
            mine.add(frame, int(rng.integers(4)), reward, int(terminal), episode_end=ended)
        mine.save(folder, number)
        dump(mine, f"{folder}/own{number}.npz")
        np.save(f"{folder}/cut{number}.npy", sorted(
            i for i in mine.episode_end_indices if not mine._store["terminal"][i]))
else:
    theirs = buffer(300, n_step)
    theirs.load(folder, what)
    dump(theirs, sys.argv[4])
"""

dopamine = pytest.mark.skipif(
    "DOPAMINE_PYTHON" not in os.environ, reason="needs DOPAMINE_PYTHON, see above"
)


def ask_dopamine(*words: object) -> None:
    command = [os.environ["DOPAMINE_PYTHON"], "-c", DOPAMINE, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def theirs(path: Path) -> dict[int, Any]:
    """Return Dopamine's transitions in the form of slow_transition()."""
    own, found = np.load(path), {}
    for j, i in enumerate(own["valid"].tolist()):
        state, later = (np.moveaxis(own[name][j], -1, 0) for name in ("state", "next_state"))
        ended = bool(own["terminal"][j])
        facts = (own["action"][j], float(own["reward"][j]))
        found[i] = (state, None if ended else later, *facts, 0.0 if ended else None)
    return found


@dopamine
@pytest.mark.parametrize("n_step", [1, 3])
def test_what_dopamine_writes_is_read_as_dopamine_reads_it(
    cql_gmp: ModuleType, n_step: int, tmp_path: Path
) -> None:
    """Its own replay buffer, saved by itself. Row by row the same, but for two things.

    Dopamine draws the black rows after an episode that was cut off, whose stacks mix two episodes:
    these are left out. And of what is whole it leaves out the fourth row after the cursor, and
    terminals among the last rows before it: these are drawn.
    """
    ask_dopamine("write", tmp_path, n_step)
    for number in range(3):
        count = int(np.load(gzip.open(tmp_path / f"add_count_ckpt.{number}.gz")))
        size = min(count, 120)
        folder = tmp_path / f"only{number}"
        folder.mkdir()
        for path in tmp_path.glob(f"*_ckpt.{number}.gz"):
            shutil.copy(path, folder)
        dataset = dataset_of(
            cql_gmp, folder, transitions=size, checkpoints_per_epoch=1, n_step=n_step, gamma=0.9
        )
        dataset.load(0)
        ours, own = drawn(dataset), theirs(tmp_path / f"own{number}.npz")
        cut = {*np.load(tmp_path / f"cut{number}.npy").tolist()}
        black = {(i + k) % 120 for i in cut for k in (1, 2, 3)}
        cursor = count % 120 if count >= 120 else size
        # Across the array's own end the ring goes on; the reader does not follow it there.
        edge = {i for i in own if i < 3 or (i + n_step >= 120 and count >= 120)}
        ends = {(cursor - k) % 120 for k in (*range(1, n_step + 1), -3)}
        assert {*own} - {*ours} <= black | edge, number
        assert {*ours} - {*own} <= ends, number
        assert not {*ours} & black
        common = {*ours} & {*own}
        assert len(common) > 0.3 * size
        for i in common:
            state, later, action, total, discount = ours[i]
            assert np.array_equal(state, own[i][0]) and action == own[i][2]
            assert own[i][1] is None or np.array_equal(later, own[i][1])
            assert total == pytest.approx(own[i][3], abs=1e-6)
            assert discount == pytest.approx(0 if own[i][1] is None else 0.9**n_step)


@dopamine
def test_dopamine_reads_what_make_datasets_writes(cql_gmp: ModuleType, tmp_path: Path) -> None:
    folder = LOGS / "Breakout/1/replay_logs"
    for number in (0, 3):
        ask_dopamine(number, folder, 1, tmp_path / "own.npz")
        own = theirs(tmp_path / "own.npz")
        mine = tmp_path / f"only{number}"
        mine.mkdir()
        for path in folder.glob(f"*_ckpt.{number}.gz"):
            shutil.copy(path, mine)
        dataset = dataset_of(cql_gmp, mine, transitions=300, checkpoints_per_epoch=1, gamma=0.9)
        dataset.load(0)
        ours = drawn(dataset)
        assert {*own} - {*ours} <= {0, 1, 2, 299} and {*ours} - {*own} <= {3, 299}
        for i in {*ours} & {*own}:
            assert np.array_equal(ours[i][0], own[i][0]) and ours[i][2] == own[i][2]
            assert own[i][1] is None or np.array_equal(ours[i][1], own[i][1])


# The losses


def batch_of(size: int, side: int, seed: int = 0, dtype: Any = torch.float64) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    obs, next_obs = torch.from_numpy(rng.random((2, size, 4, side, side))).to(dtype)
    actions = torch.from_numpy(rng.integers(0, 4, size))
    rewards = torch.from_numpy(rng.normal(size=size) * 2).to(dtype)
    discounts = torch.from_numpy(np.where(rng.random(size) < 0.3, 0, 0.97)).to(dtype)
    return obs, next_obs, actions, rewards, discounts


def agent_of(module: ModuleType, **flags: Any) -> Any:
    kind = module.EauDeCQL if hasattr(module, "EauDeCQL") else module.CQL
    args = module.Args(feature_size=flags.pop("feature_size", 12), **flags)
    agent = kind(args, 4, CPU)
    with torch.no_grad():  # all differ from the target
        generator = torch.Generator().manual_seed(5)
        for p in agent.online.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return agent


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def q_gradient(
    q: np.ndarray, next_q: np.ndarray, batch: tuple[Any, ...], alpha: float, huber: bool
) -> tuple[float, float, np.ndarray]:
    """Return TD loss, conservative loss and the gradient of their sum by q [B, A], row by row."""
    _, _, actions, rewards, discounts = (x.numpy() for x in batch)
    td, gap, gradient, n = 0.0, 0.0, np.zeros_like(q), len(q)
    for b in range(n):
        target, a = rewards[b] + discounts[b] * max(next_q[b]), actions[b]
        error = q[b, a] - target
        if huber:
            td += 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
            gradient[b, a] += min(1.0, max(-1.0, error)) / n
        else:
            td += error**2
            gradient[b, a] += 2 * error / n
        gap += math.log(sum(math.exp(x) for x in q[b])) - q[b, a]
        gradient[b] += alpha * softmax(q[b]) / n
        gradient[b, a] -= alpha / n
    return td / n, alpha * gap / n, gradient


def assert_gradients(agent: Any, network: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(network.named_parameters(), wanted.parameters()):
        assert p.grad is not None and q.grad is not None
        scale = max(1.0, float(q.grad.abs().max()))
        assert float((p.grad - q.grad).abs().max()) < 1e-9 * scale, name


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_loss_and_gradients_of_cql(
    cql_gmp: ModuleType, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cql_gmp, "QNetwork", Small)
    agent = agent_of(cql_gmp, td_loss=loss, cql_alpha=0.7).double()
    batch = batch_of(11, 12)
    losses, reference = agent.loss(*batch), copy.deepcopy(agent.online)
    (losses[0] + losses[1]).backward()
    own = [x.item() for x in losses]
    q = reference(batch[0])
    next_q = agent.target(batch[1]).detach().numpy()
    td, cql, gradient = q_gradient(q.detach().numpy(), next_q, batch, 0.7, loss == "huber")
    q.backward(torch.from_numpy(gradient))
    assert own[0] == pytest.approx(td, abs=1e-9)
    assert own[1] == pytest.approx(cql, abs=1e-9)
    assert own[2] == pytest.approx(q[range(11), batch[2]].mean().item(), abs=1e-9)
    assert_gradients(agent, agent.online, reference)


def test_loss_and_gradients_of_eau_de_cql(
    cql_eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cql_eaudeqn, "QNetwork", Small)
    agent = agent_of(cql_eaudeqn, num_networks=3).double()
    batch = batch_of(11, 12)
    td_losses, cql_losses, means = agent.loss(*batch)
    references = copy.deepcopy(agent.online)
    (td_losses + cql_losses).sum().backward()
    td_losses, cql_losses, means = (x.detach() for x in (td_losses, cql_losses, means))
    next_q = agent.target(batch[1]).detach().numpy()
    for k, reference in enumerate(references):
        q = reference(batch[0])
        td, cql, gradient = q_gradient(q.detach().numpy(), next_q, batch, 0.1, False)
        q.backward(torch.from_numpy(gradient))
        assert float(td_losses[k]) == pytest.approx(td, abs=1e-9)
        assert float(cql_losses[k]) == pytest.approx(cql, abs=1e-9)
        assert float(means[k]) == pytest.approx(q[range(11), batch[2]].mean().item(), abs=1e-9)
        assert_gradients(agent, agent.online[k], reference)


def test_loss_and_gradients_of_c51(cql_gmp: ModuleType) -> None:
    """Double, dueling, with the projection atom by atom and the gradient by the logits by hand."""
    agent = agent_of(cql_gmp, c51=True, cql_alpha=0.3, n_step=3).double()
    batch = batch_of(5, 84)
    obs, next_obs, actions, rewards, discounts = batch
    atoms, delta = np.linspace(-10, 10, 51), 0.4

    def logits_of(network: Any, x: Tensor) -> Tensor:
        h = network.hidden(x)[-1]
        value, advantage = network.value(h), network.output(h).reshape(len(x), 4, 51)
        return value.reshape(-1, 1, 51) + advantage - advantage.sum(1, keepdim=True) / 4

    losses, reference = agent.loss(*batch), copy.deepcopy(agent.online)
    (losses[0] + losses[1]).backward()
    own = [x.item() for x in losses]
    logits = logits_of(reference, obs)
    p = softmax(logits.detach().numpy())  # [B, A, 51]
    q = (p * atoms).sum(2)
    assert agent.online(obs).detach().numpy() == pytest.approx(q, abs=1e-12)
    next_online = (softmax(logits_of(reference, next_obs).detach().numpy()) * atoms).sum(2)
    next_target = softmax(logits_of(agent.target, next_obs).detach().numpy())
    td, gap, gradient = 0.0, 0.0, np.zeros_like(p)
    for b in range(5):
        chosen, target = next_target[b, next_online[b].argmax()], np.zeros(51)
        for j in range(51):
            z = min(10.0, max(-10.0, float(rewards[b] + discounts[b] * atoms[j])))
            low = math.floor(round((z + 10) / delta, 9))
            high = math.ceil(round((z + 10) / delta, 9))
            share = (z + 10) / delta - low
            target[low] += chosen[j] * (1 - share)
            target[high] += chosen[j] * share * (high > low)
        a = int(actions[b])
        td -= (target * np.log(p[b, a])).sum() / 5
        gradient[b, a] += (p[b, a] - target) / 5  # targets add up to 1
        gap += (math.log(np.exp(q[b]).sum()) - q[b, a]) / 5
        by_q = 0.3 * (softmax(q[b]) - np.eye(4)[a]) / 5
        gradient[b] += by_q[:, None] * p[b] * (atoms - q[b][:, None])
    logits.backward(torch.from_numpy(gradient))
    assert own[0] == pytest.approx(td, abs=1e-9)
    assert own[1] == pytest.approx(0.3 * gap, abs=1e-9)
    assert_gradients(agent, agent.online, reference)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["eau", "gmp", "c51"])
def test_sample_and_update_never_wait_for_the_device(kind: str, precision: str) -> None:
    module = load_script(BOTH[0] if kind == "eau" else BOTH[1])
    own: dict[str, Any] = {"c51": True, "n_step": 3} if kind == "c51" else {}
    own |= {"num_networks": 2} if kind == "eau" else {}
    args = module.Args(feature_size=16, transitions=300, precision=precision, **own)
    agent = (module.EauDeCQL if kind == "eau" else module.CQL)(args, 4, CPU)
    dataset = module.Dataset(LOGS / "Breakout/1/replay_logs", 4, args, CPU)
    dataset.load(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        agent.update(*dataset.sample(32))


# K networks


def small_eau(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **flags: Any) -> Any:
    monkeypatch.setattr(module, "QNetwork", Small)
    return agent_of(module, **flags)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_networks_learn_as_if_alone(
    cql_eaudeqn: ModuleType, dtype: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four, two of them pruned, against four agents of one with the same target."""
    agent = small_eau(monkeypatch, cql_eaudeqn, num_networks=4, learning_rate=1e-3)
    for k in (1, 3):
        network = agent.online[k]
        densities = cql_eaudeqn.erk_densities(network, 0.2 * k)
        cql_eaudeqn.prune(network, densities, agent.rng["score"])
    with torch.no_grad():
        torch._foreach_mul_(agent.weights, agent.masks)
    agent.to(dtype)
    alone = []
    for k in range(4):
        one = agent_of(cql_eaudeqn, num_networks=1, learning_rate=1e-3).to(dtype)
        one.masks = [*one.online.buffers()]  # to() made new ones
        one.online[0].load_state_dict(agent.online[k].state_dict())
        one.target.load_state_dict(agent.target.state_dict())
        alone.append(one)
    for i in range(5):
        batch = batch_of(8, 12, i, dtype)
        for one in (agent, *alone):
            one.update(*batch)
    for k, one in enumerate(alone):
        for p, q in zip(agent.online[k].parameters(), one.online[0].parameters()):
            assert torch.allclose(p, q, rtol=0, atol=bound)
        assert torch.allclose(agent.accumulated_loss[k], one.accumulated_loss[0], atol=5 * bound)
        assert torch.allclose(agent.latest[:, k], one.latest[:, 0], atol=5 * bound)


def test_one_network_is_cql(
    cql_eaudeqn: ModuleType, cql_gmp: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: --num-networks 1 --no-reset-optimizer, and the other script's dense one."""
    monkeypatch.setattr(cql_eaudeqn, "QNetwork", Small)
    monkeypatch.setattr(cql_gmp, "QNetwork", Small)
    one = agent_of(cql_eaudeqn, num_networks=1, reset_optimizer=False).double()
    cql = agent_of(cql_gmp, sparsity=0, td_loss="squared").double()
    for i in range(30):
        batch = batch_of(8, 12, i)
        one.update(*batch)
        cql.update(*batch)
        if i % 7 == 6:
            one.losses = np.array(one.accumulated_loss.tolist())
            one.update_target(i + 1)
            cql.update_target(i + 1)
    for ours, own in ((one.online[0], cql.online), (one.target, cql.target)):
        assert all(torch.allclose(p, q, 0, 1e-10) for p, q in zip(params(ours), params(own)))
    assert one.sparsity == [0.0] and all(mask.all() for mask in one.masks)


@pytest.mark.parametrize("selection", ["total", "td"])
def test_the_loss_that_is_compared(
    cql_eaudeqn: ModuleType, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = small_eau(monkeypatch, cql_eaudeqn, num_networks=3, selection_loss=selection)
    wanted = np.zeros(3)
    for i in range(4):
        agent.update(*batch_of(8, 12, i, torch.float32))
        td, cql, _ = agent.latest.numpy()
        wanted += td + (cql if selection == "total" else 0)
    assert agent.accumulated_loss.numpy() == pytest.approx(wanted, rel=1e-5)
    agent.accumulated_loss.copy_(torch.tensor([3.0, math.nan, 2.0]))
    agent.losses = np.array(agent.accumulated_loss.tolist())
    assert agent.best() == 2 and agent.network() is agent.online[2]


# Pruning by choice


def tiny(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **flags: Any) -> Any:
    monkeypatch.setattr(module, "QNetwork", Tiny)
    return module.EauDeCQL(module.Args(**flags), 4, CPU)


def forced(agent: Any, best: int, step: int) -> None:
    agent.losses = np.ones(len(agent.losses))
    agent.losses[best] = 0.5
    agent.update_target(step)


def test_next_sparsity_by_hand(cql_eaudeqn: ModuleType) -> None:
    """In gradient steps: a run of 10,000, a target update every 2,000."""
    args = cql_eaudeqn.Args(total_timesteps=10_000, target_every=2_000, max_sparsity_step=1.0)
    step = cql_eaudeqn.next_sparsity
    assert step(0.0, 1.0, 2_000, args) == pytest.approx(0.25)  # 8,000 left, then 6,000
    assert step(0.5, 2.0, 4_000, args) == pytest.approx(1 - 0.5 * (4 / 6) ** 2)
    assert step(0.5, 0.0, 4_000, args) == 0.5 and step(0.5, 3.0, 8_000, args) == 1.0
    args.max_sparsity_step = 0.01
    assert step(0.5, 2.0, 4_000, args) == pytest.approx(0.51)


def test_forced_choices_follow_the_formula(
    cql_eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always the first stays dense; always the sparsest: 1 - (1 - t / H) ** 2.4 on average, from
    30 of 60 target updates of 2,000 gradient steps each, over 25 seeds.
    """
    flags: dict[str, Any] = {"total_timesteps": 120_000, "max_sparsity_step": 1.0}
    agent = tiny(monkeypatch, cql_eaudeqn, **flags)
    for update in range(1, 60):
        forced(agent, 0, 2_000 * update)
    assert agent.sparsity[0] == 0 < min(agent.sparsity[1:])
    assert all(p.all() for p in cql_eaudeqn.prunable(agent.target).values())
    exponents = []
    for seed in range(25):
        agent = tiny(monkeypatch, cql_eaudeqn, seed=seed, **flags)
        for update in range(1, 31):
            forced(agent, int(np.argmax(agent.sparsity)), 2_000 * update)
        exponents.append(math.log(1 - max(agent.sparsity)) / math.log(29 / 59))
    assert np.mean(exponents) == pytest.approx(2.4, abs=0.07)


def test_masks_hold_nest_and_have_exact_counts(
    cql_eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"total_timesteps": 20_000, "max_sparsity_step": 0.2}
    agent = small_eau(monkeypatch, cql_eaudeqn, num_networks=3, learning_rate=1e-2, **flags)
    for update, best in enumerate((2, 0, 1, 2, 1, 1, 2), 1):
        for i in range(3):
            agent.update(*batch_of(8, 12, 10 * update + i, torch.float32))
            assert all(not w[m == 0].any() for w, m in zip(agent.weights, agent.masks))
        before = [mask.clone() for mask in agent.online[best].buffers()]
        forced(agent, best, 2_000 * update)
        assert agent.selected == best + 1 and not agent.accumulated_loss.any()
        assert all_equal(params(agent.target), params(agent.online[0]))
        for network, sparsity in zip(agent.online, agent.sparsity):
            weights = cql_eaudeqn.prunable(network).values()
            densities = cql_eaudeqn.erk_densities(network, sparsity)
            for old, mask, w, density in zip(before, network.buffers(), weights, densities):
                assert not w[mask == 0].any() and not mask[old == 0].any()
                assert int(mask.sum()) == max(1, round(mask.numel() * density))
                assert (w[mask > 0] != 0).float().mean() > 0.99
        assert all(not x.any() for s in agent.optimizer.state.values() for x in s.values())
    assert agent.sparsity[0] > 0.5


def test_the_records_follow_the_choices(tmp_path: Path) -> None:
    """A record at each target update; exponents are drawn from the seed, one for each candidate."""
    flags = f"{LOGGED['cql_atari_eaudeqn']} --total-timesteps 200 --epoch-steps 50"
    more = "--target-every 50 --num-networks 3 --eval-episodes 0 --seed 3 --run-dir run"
    succeed("cql_atari_eaudeqn", flags, more, cwd=tmp_path)
    every = records(tmp_path / "run")
    exponents, candidates = np.random.default_rng((3, 0)), [0.0] * 3
    assert [record["step"] for record in every] == [50, 100, 150, 200]
    for record in every[:3]:
        base = candidates[record["sparsity/selected"] - 1]
        left = 200 - record["step"]
        found = [1 - (1 - base) * ((left - 50) / left) ** exponents.uniform(0, 1) for _ in "12"]
        candidates = [base, *(min(sparsity, base + 0.1) for sparsity in found)]
        names = [f"sparsity/candidate_{k}" for k in (1, 2, 3)]
        assert [record[name] for name in names] == pytest.approx(candidates, abs=1e-12)
        assert record["sparsity/target"] == pytest.approx(base, abs=1e-12)
    last, model = every[3], json.loads((tmp_path / "run" / "final.json").read_text())
    assert last["sparsity/selected"] == every[2]["sparsity/selected"], "none at the run's end"
    assert min(abs(model["sparsity/prunable"] - s) for s in candidates) < 1e-4


# Pruning by schedule


def test_the_schedule_in_gradient_steps(
    cql_gmp: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 1,000: from 200 to 800, every 100; masks nest, and what they remove is zero."""
    monkeypatch.setattr(cql_gmp, "QNetwork", Small)
    flags: dict[str, Any] = {"total_timesteps": 1000, "prune_every": 100, "learning_rate": 1e-2}
    agent = agent_of(cql_gmp, **flags)
    densities = cql_gmp.erk_densities(agent.online, 0.95)
    batch, seen = batch_of(4, 12, 0, torch.float32), dict[int, float]()

    class Same:
        def sample(self, _: int) -> tuple[Any, ...]:
            return batch

    before = [mask.clone() for mask in agent.masks]
    for step in range(1000):
        agent.learn(Same(), 1)
        seen[step] = agent.sparsity
        progress = 0.0 if step < 200 else 1 - (1 - (min(step, 800) // 100 * 100 - 200) / 600) ** 3
        assert agent.sparsity == pytest.approx(0.95 * progress, abs=1e-12)
        for old, mask, weight, density in zip(before, agent.masks, agent.weights, densities):
            assert not mask[old == 0].any() and not weight[mask == 0].any()
            wanted = max(1, round(mask.numel() * (1 - progress * (1 - density))))
            assert int(mask.sum()) == wanted
        before = [mask.clone() for mask in agent.masks]
    assert seen[199] == seen[200] == 0 < seen[300] and seen[799] < seen[800] == 0.95
    agent.update_target(0)
    assert all_equal(params(agent.online), params(agent.target))


# Runs


def test_a_loss_that_is_not_finite_stops_the_run(either: ModuleType, tmp_path: Path) -> None:
    name = either.__name__
    flags = f"{LOGGED[name]} --total-timesteps 300 --learning-rate 1e30"
    output = run(name, flags, "--run-dir run", cwd=tmp_path)
    assert output.status == 1
    (line,) = output.complaints()
    assert "step 100: the losses are [" in line and ("nan" in line or "inf" in line)
    assert "checkpoint kept: none" in line


def test_each_epoch_is_evaluated(either: ModuleType, tmp_path: Path) -> None:
    name = either.__name__
    flags = f"{LOGGED[name]} --total-timesteps 60 --epoch-steps 20 --run-dir run"
    succeed(name, flags, "--eval-episodes 2 --eval-steps 30", cwd=tmp_path)
    every = records(tmp_path / "run")
    assert [r["step"] for r in every if "eval/episodic_return" in r] == [20, 40, 60]
    assert [r["step"] for r in every if "losses/td_loss" in r] == [20, 40, 60]
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["eval/episodes"] == 2 and final["epoch_return"] == final["eval/episodic_return"]


def test_an_evaluation_survives_a_signal(either: ModuleType, tmp_path: Path) -> None:
    """One between two epochs: a checkpoint is written before it, and resuming begins with it."""
    name = either.__name__
    flags = f"{LOGGED[name]} --total-timesteps 60 --epoch-steps 20 --checkpoint-minutes 10"
    flags += " --eval-episodes 2 --eval-steps 300"

    def at_work(process: Process) -> Callable[[], bool]:
        return lambda: "evaluating" in process.err.read_text()

    def cut() -> None:
        process = Process(name, flags, "--run-dir cut", cwd=tmp_path)
        output = process.when(at_work(process)).stop(signal.SIGTERM)
        assert output.status == 75 and saved_steps(tmp_path / "cut") == [20], output
        assert not records(tmp_path / "cut")
        succeed(name, "--resume cut", cwd=tmp_path)

    both(lambda: succeed(name, flags, "--run-dir whole", cwd=tmp_path), cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_c51_trains_and_is_evaluated(tmp_path: Path) -> None:
    """Its value and advantages are both pruned; evaluate.py plays it."""
    flags = f"{LOGGED['cql_atari_gmp']} --total-timesteps 60 --epoch-steps 60"
    more = "--c51 --n-step 3 --eval-episodes 0 --run-dir run"
    succeed("cql_atari_gmp", flags, more, cwd=tmp_path)
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["sparsity/prunable"] == pytest.approx(0.95, abs=1e-3)
    assert final["sparsity/layer/value"] > 0
    output: Output = succeed("evaluate", "run --episodes 1 --steps 30", cwd=tmp_path)
    assert output.stdout.startswith("ALE/Breakout: 1 episode at epsilon 0.001, a network of 95.0%")


# make_datasets.py


def read_logs(folder: Path, number: int) -> dict[str, np.ndarray]:
    paths = {name: folder / f"$store$_{name}_ckpt.{number}.gz" for name in KINDS}
    return {name: np.load(gzip.open(path)) for name, path in paths.items()}


def test_what_is_recorded_is_what_was_played(datasets: ModuleType, tmp_path: Path) -> None:
    """The game, played again by the recorded actions, shows the recorded frames."""
    args = datasets.Args(env_id="Pong", data=tmp_path, transitions=500, checkpoints=3, seed=4)
    datasets.record_atari(args, "pong")
    folder = tmp_path / "Pong" / "4" / "replay_logs"
    assert len([*folder.iterdir()]) == 3 * 6
    parts = [read_logs(folder, number) for number in range(3)]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in KINDS}
    env = datasets.AtariVectorEnv(
        "pong",
        1,
        repeat_action_probability=0.25,
        noop_max=0,
        use_fire_reset=False,
        autoreset_mode="SameStep",
    )
    seed = np.random.SeedSequence((3_000_004, 0, 0)).generate_state(1)[0] >> 1
    obs, _ = env.reset(seed=np.array([seed], np.int64))
    black, ends = 3, 0
    for i in range(1500):
        if black:
            assert not rows["observation"][i].any() and rows["action"][i] == 0
            assert rows["reward"][i] == rows["terminal"][i] == 0
            black -= 1
            continue
        assert np.array_equal(rows["observation"][i], obs[0, -1]), i
        obs, rewards, terminated, _, _ = env.step(rows["action"][i : i + 1].astype(np.int64))
        assert rows["reward"][i] == rewards[0] and rows["terminal"][i] == terminated[0]
        black, ends = (3, ends + 1) if terminated[0] else (0, ends)
    assert ends >= 1 and {*rows["action"].tolist()} == {*range(6)}
    with pytest.raises(datasets.Exit, match="exists; delete it or name another"):
        datasets.record_atari(args, "pong")


def test_a_runs_network_plays(datasets: ModuleType, tmp_path: Path) -> None:
    """A network that always takes the same action: its share grows from file to file."""
    from safetensors.torch import save_file

    network = load_script("eaudeqn_atari").QNetwork(4, load_script("eaudeqn_atari").Args())
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.output.bias[3] = 1.0
    (tmp_path / "run").mkdir()
    flags = {"script": "eaudeqn_atari.py", "env_id": "Breakout"}
    weights, facts = dict(network.named_parameters()), {"flags": json.dumps(flags)}
    save_file(weights, tmp_path / "run" / "model.safetensors", facts)
    args = datasets.Args(
        env_id="Breakout", run=tmp_path / "run", data=tmp_path, transitions=200, checkpoints=3
    )
    args.epsilon = 0.1
    datasets.record_atari(args, "breakout")
    folder = tmp_path / "Breakout" / "1" / "replay_logs"
    shares = [float((read_logs(folder, i)["action"] == 3).mean()) for i in range(3)]
    assert shares == pytest.approx([0.25, 0.25 + 0.75 * 0.45, 0.25 + 0.75 * 0.9], abs=0.1)
    for game, where, told in (
        ("Pong", "run", "its network is not one of Pong"),
        ("Breakout", "nowhere", "no finished run is there"),
    ):
        args = datasets.Args(env_id=game, run=tmp_path / where, data=tmp_path / "other")
        with pytest.raises(datasets.Exit, match=told):
            datasets.record_atari(args, game.lower())
        assert not (tmp_path / "other").exists()
    (tmp_path / "small").mkdir()
    facts = {"flags": json.dumps({"script": "dqn_minatar_gmp.py", "env_id": "Breakout"})}
    weights = {"conv.weight": torch.zeros(16, 4, 3, 3), "output.weight": torch.zeros(3, 128)}
    save_file(weights, tmp_path / "small" / "model.safetensors", facts)
    args = datasets.Args(env_id="Breakout", run=tmp_path / "small", data=tmp_path / "other")
    with pytest.raises(datasets.Exit, match="not one of Breakout"):
        datasets.record_atari(args, "breakout")
    with pytest.raises(datasets.Exit, match="--medium-steps 700: is for MuJoCo"):
        datasets.main(datasets.Args(env_id="Breakout", medium_steps=700, data=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_the_command_records_what_the_script_reads(tmp_path: Path) -> None:
    """The README's two commands, in small, each alone in a process."""
    flags = ["--env-id", "Breakout", "--transitions", "100", "--checkpoints", "5"]
    script = Path(str(load_script("make_datasets").__file__))
    result = subprocess.run(
        [sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5
    more = "--total-timesteps 20 --epoch-steps 20 --batch-size 2 --feature-size 8 --run-dir run"
    dataset = "--dataset data --transitions 100 --eval-episodes 0 --num-networks 2"
    succeed("cql_atari_eaudeqn", dataset, more, cwd=tmp_path)
    assert (tmp_path / "run" / "final.json").exists()
    assert records(tmp_path / "run")[0]["step"] == 20
