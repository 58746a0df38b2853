"""The training scripts as a user runs them: what a run leaves, kill and resume, damage, bad input,
one file alone.

ATARI, MINATAR, MUJOCO, LOGGED and OFFLINE are the only places that know which scripts there are.
Runs are real and small, on Breakout, Hopper, 600 recorded transitions of a random policy on Hopper
or 1,800 on Breakout, and the CPU; one that several tests look at is made once per session. Two run
side by side wherever the tests allow it, one thread each.
"""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SCRIPTS as FOLDER
from conftest import load_script
from forks import Fork
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Each training script with its own small flags, by what it plays.
ATARI = {
    "eaudeqn_atari": "--feature-size 16 --num-networks 3 --max-exponent 1 --max-sparsity-step 0.1",
    "dqn_atari_gmp": "--feature-size 16 --prune-every 7 --n-step 2 --analysis-every 900",
    "rainbow_resnet_gmp": "--network cnn --feature-size 16 --prune-every 7 --analysis-every 900",
    "dqn_atari_baselines": "--feature-size 16 --pruner rigl --regulariser redo --prune-every 9",
}
MINATAR = {  # so fast that a checkpoint every 0.6 s, as on Atari, could leave no time for a kill
    "eaudeqn_minatar": "--feature-size 8 --num-networks 3 --max-exponent 1 --max-sparsity-step 0.1"
    " --checkpoint-minutes 0.004",
    "dqn_minatar_gmp": "--feature-size 8 --prune-every 7 --checkpoint-minutes 0.004",
}
MUJOCO = {
    "sac_mujoco_eaudeqn": "--replay-ratio 0.25 --num-networks 3 --max-exponent 1"
    " --max-sparsity-step 0.1 --prune-every 20 --prune-actor",
    "sac_mujoco_gmp": "--replay-ratio 0.25 --width 1 --prune-every 7",
}
DATA = Path(__file__).parent / "data" / "hopper-random.hdf5"
LOGS = Path(__file__).parent / "data" / "atari"
LOGGED_FLAGS = (
    f"--dataset {LOGS} --transitions 300 --checkpoints-per-epoch 2 --target-every 100"
    " --batch-size 2"
)
LOGGED = {
    "cql_atari_eaudeqn": f"{LOGGED_FLAGS} --feature-size 16 --num-networks 2"
    " --max-exponent 1 --max-sparsity-step 0.1",
    "cql_atari_gmp": f"{LOGGED_FLAGS} --feature-size 16 --prune-every 7",
}
OFFLINE = {"cql_offline_snip": f"--layers 2 --dataset {DATA} --env-id Hopper-v5"} | LOGGED
SCRIPTS = ATARI | MINATAR | MUJOCO | OFFLINE
PIXELS = ATARI | LOGGED  # those whose network sees Atari's frames
DQNS, SINGLE = ATARI | MINATAR, OFFLINE | MINATAR  # those with epsilon; those without --num-envs
GAME = dict.fromkeys(SCRIPTS, "Hopper-v5") | dict.fromkeys(DQNS | LOGGED, "Breakout")
LOSS = dict.fromkeys(SCRIPTS, "losses/qf1_loss") | dict.fromkeys(DQNS | LOGGED, "losses/td_loss")


def flags_of(
    common: str, online: str, atari: str = "", mujoco: str = "", offline: str = ""
) -> dict[str, str]:
    """Return each script's flags for a run of one size."""
    parts = dict.fromkeys(DQNS, f"{online} {atari}") | dict.fromkeys(MUJOCO, f"{online} {mujoco}")
    parts |= dict.fromkeys(OFFLINE, offline)
    return {name: f"{common} {parts[name]} {own}" for name, own in SCRIPTS.items()}


# 2,000 steps with nine target updates or more, a replay that wraps round and a checkpoint now and
# then: 10 to 20 s.
SMALL = flags_of(
    "--total-timesteps 2000 --batch-size 2 --epoch-steps 600 --eval-episodes 0",
    online="--learning-starts 300 --buffer-size 1000",
    atari="--target-every 200 --checkpoint-minutes 0.01 --epsilon-steps 1000 --epsilon-end 0.9",
    mujoco="--checkpoint-minutes 0.003",
    offline="--checkpoint-minutes 0.003",
)
# With three environments there is an epoch, and so a record, at each target update.
VARIANTS = {1: "", 3: "--num-envs 3 --epoch-steps 200"}
# Still learns and prunes: about 3 s, most of it for the imports.
TINY_COMMON = "--total-timesteps 300 --batch-size 2 --epoch-steps 100 --eval-episodes 0"
TINY_ONLINE = "--learning-starts 100 --buffer-size 200"
TINY_FLAGS = f"{TINY_COMMON} {TINY_ONLINE}"
TINY = flags_of(TINY_COMMON, TINY_ONLINE, atari="--target-every 50")
TIMEOUT = 240.0  # seconds for one process; a run takes ten on a quiet machine

KEYS = """
charts/episodic_return charts/episodic_length charts/epoch_return charts/SPS charts/epsilon
charts/learning_rate
charts/buffer_size
losses/td_loss losses/q_values losses/qf1_loss losses/qf2_loss losses/actor_loss losses/alpha
losses/alpha_loss
losses/cql_loss
sparsity/target sparsity/prunable sparsity/total sparsity/active_params sparsity/selected
analysis/dormant_0 analysis/dormant_0.1 analysis/srank analysis/q_variance analysis/q_norm
analysis/param_norm
eval/episodic_return eval/episodes memory/replay_bytes memory/peak_bytes
"""
KEY = re.compile(
    "|".join(map(re.escape, KEYS.split())) + r"|sparsity/layer/[\w.]+|sparsity/candidate_[1-9]\d*"
)
# What `wc -l` may say at most, and where `main` begins at the latest; see CONTRIBUTING.
LINES = {
    "eaudeqn_atari": (835, 331),
    "dqn_atari_gmp": (966, 386),
    "rainbow_resnet_gmp": (1073, 434),
    "dqn_atari_baselines": (1075, 538),
    "sac_mujoco_eaudeqn": (938, 455),
    "sac_mujoco_gmp": (911, 425),
    "cql_offline_snip": (1017, 413),
    "eaudeqn_minatar": (805, 360),
    "dqn_minatar_gmp": (766, 318),
    "cql_atari_eaudeqn": (868, 328),
    "cql_atari_gmp": (976, 433),
}
VOLATILE = {
    "seconds",
    "time/seconds",
    "charts/SPS",
    "memory/peak_bytes",
}  # may differ between two equal runs

T, R = TypeVar("T"), TypeVar("R")
Straight: TypeAlias = "dict[int, Future[tuple[Path, Output]]]"
BrokenOff: TypeAlias = "dict[int, Future[tuple[Path, list[tuple[int, Output, Path]]]]]"


@dataclasses.dataclass
class Output:
    """What a finished process said."""

    status: int
    stdout: str
    stderr: str

    def complaints(self) -> list[str]:
        """Return the lines on stderr that are not a progress bar's."""
        lines = (line for line in self.stderr.splitlines() if line.strip())
        return [line for line in lines if not re.match(r"[\w ]*:?\s*\d+%", line)]


def wait_until(ready: Callable[[], bool]) -> None:
    """Wait until `ready`."""
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Process:
    """A training script in a process of its own, with its output in files.

    Unless it shall be `fresh`, or there is a GPU, it has imported torch already; see forks.py.
    """

    def __init__(
        self,
        script: str | Path,
        *flags: str | Path,
        cwd: Path,
        fresh: bool = False,
        **environment: str,
    ) -> None:
        path = script if isinstance(script, Path) else FOLDER / f"{script}.py"
        command = [str(path), *itertools.chain(*(str(flag).split() for flag in flags))]
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PYTHONPATH"))
        } | environment
        self.started = time.monotonic()
        cwd.mkdir(parents=True, exist_ok=True)
        self.out, self.err = (
            cwd / f".{os.urandom(4).hex()}.{name}" for name in ("stdout", "stderr")
        )
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.popen: Fork | subprocess.Popen[bytes] = (
                subprocess.Popen(
                    [sys.executable, *command], cwd=cwd, env=environment, stdout=out, stderr=err
                )
                if fresh or torch.cuda.is_available()
                else Fork(command, cwd, environment, [self.out, self.err])
            )

    def wait(self) -> Output:
        """Wait for the end."""
        try:
            self.popen.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            pytest.fail(f"no end after {TIMEOUT} s: {self.err.read_text()[-2000:]}")
        return Output(self.popen.returncode, self.out.read_text(), self.err.read_text())

    def when(self, ready: Callable[[], bool]) -> Process:
        """Wait until `ready`; the process must not have ended by then."""
        while not ready():
            assert self.popen.poll() is None, f"ended too early: {self.wait()}"
            assert time.monotonic() - self.started < TIMEOUT, self.err.read_text()[-2000:]
            time.sleep(0.002)
        return self

    def stop(self, signum: int) -> Output:
        """Send a signal and wait for the end."""
        self.popen.send_signal(signum)
        return self.wait()


def run(
    script: str | Path, *flags: str | Path, cwd: Path, fresh: bool = False, **environment: str
) -> Output:
    """Run a script to its end."""
    return Process(script, *flags, cwd=cwd, fresh=fresh, **environment).wait()


def succeed(
    script: str | Path, *flags: str | Path, cwd: Path, fresh: bool = False, **environment: str
) -> Output:
    """Run a script to its end, which must be a good one."""
    output = run(script, *flags, cwd=cwd, fresh=fresh, **environment)
    assert output.status == 0, output.stderr
    assert "Traceback" not in output.stderr, output.stderr
    return output


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> dict[T, Future[R]]:
    """Call work(item) for all items, two at a time; a failure is raised by its own result()
    only.
    """
    with ThreadPoolExecutor(2) as pool:
        return {item: pool.submit(work, item) for item in items}


def both(*works: Callable[[], T]) -> list[T]:
    """Call both at a time; return what they return, or raise the first failure."""
    return [future.result() for future in side_by_side(lambda work: work(), works).values()]


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a run's folder."""
    return sorted(int(path.name[:12]) for path in (folder / "checkpoint").glob("[0-9]*"))


def has_saved(folder: Path, step: int) -> bool:
    """Tell whether two checkpoints are kept and the newest is of `step` or later."""
    steps = saved_steps(folder)
    return len(steps) > 1 and steps[-1] >= step


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under joined names: {"sparsity": {"total": 0}} -> {"sparsity/total":
    0}.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run's folder."""
    return max((folder / "checkpoint").glob("[0-9]*"))


def checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds; its name has the digest."""
    data = path.read_bytes()
    assert path.name.endswith(hashlib.sha256(data).hexdigest())
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return state


def flip_byte(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def assert_same_run(resumed: Path, straight: Path) -> None:
    """Both wrote the same model byte for byte, and the same records, times and speeds aside."""

    def steady(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in VOLATILE}

    assert [*map(steady, records(resumed))] == [*map(steady, records(straight))]
    assert (resumed / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()
    finals = (
        flatten(json.loads((folder / "final.json").read_text())) for folder in (resumed, straight)
    )
    assert steady(next(finals)) == steady(next(finals))
    assert_tensorboard_equals_metrics(resumed)
    leftovers = [name for name in contents(resumed) if name.endswith(".tmp")]
    assert not leftovers
    assert not saved_steps(resumed) and not saved_steps(straight), "a finished run needs none"


def assert_tensorboard_equals_metrics(folder: Path) -> None:
    """The events, cut back where a run was resumed, are the scalars of metrics.jsonl (which are
    doubles) in float32; and the flags are hyperparameters.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    wanted: dict[str, list[tuple[int, float]]] = {}
    for record in records(folder):
        for key in record.keys() - {"step", "seconds"}:
            wanted.setdefault(key, []).append(
                (record["step"], torch.tensor(record[key], dtype=torch.float32).item())
            )
    scores = {f"hparams/{key}" for key in wanted if key.startswith("eval/")}
    assert {*events.Tags()["scalars"]} - {*wanted} <= scores
    assert {*wanted} <= {*events.Tags()["scalars"]}
    args = json.loads((folder / "args.json").read_text()).keys() - {"script"}
    hparams = b"".join(events.PluginTagToContent("hparams").values())
    assert all(flag.encode() in hparams for flag in args)
    for key, values in wanted.items():
        assert [(event.step, event.value) for event in events.Scalars(key)] == values, key


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    """Each training script's name."""
    return str(request.param)


@pytest.fixture(scope="session")
def module(script: str) -> ModuleType:
    """The script as a module."""
    return load_script(script)


@pytest.fixture(scope="session")
def home(script: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of one script."""
    return tmp_path_factory.mktemp(script)


@pytest.fixture(scope="session")
def straight(script: str, home: Path, request: pytest.FixtureRequest) -> Straight:
    """Return, per number of environments that tests ask for, a run that nothing disturbed, and what
    it printed.
    """

    def work(num_envs: int) -> tuple[Path, Output]:
        folder = home / f"straight{num_envs}"
        flags = (SMALL[script], VARIANTS[num_envs], f"--run-dir {folder}")
        return folder, succeed(script, *flags, cwd=home)

    several = script not in SINGLE and any(
        item.name.endswith(f"[{script}-3]") for item in request.session.items
    )
    return side_by_side(work, VARIANTS if several else [1])


@pytest.fixture(scope="session")
def broken_off(script: str, home: Path) -> BrokenOff:
    """Return, per number of environments, a run killed three times and resumed.

    With it: of each kill the signal, what the process said, and a copy of the folder as the kill
    left it.
    """

    def early(folder: Path) -> bool:
        return (folder / "metrics.jsonl").exists()  # opened just before the first step

    def writing(folder: Path) -> bool:
        return (has_saved(folder, 600) and (folder / ".tmp").exists()) or has_saved(folder, 1600)

    kills: dict[int, list[tuple[Callable[[Path], bool], int]]] = {
        1: [
            (early, signal.SIGKILL),
            (partial(has_saved, step=1000), signal.SIGKILL),
            (partial(has_saved, step=1200), signal.SIGTERM),
        ],
        3: [
            (early, signal.SIGTERM),
            (writing, signal.SIGKILL),
            (partial(has_saved, step=1200), signal.SIGINT),
        ],
    }

    def work(num_envs: int) -> tuple[Path, list[tuple[int, Output, Path]]]:
        folder, left = home / f"broken_off{num_envs}", []
        flags = f"{SMALL[script]} {VARIANTS[num_envs]} --run-dir {folder}"
        for i, (ready, signum) in enumerate(kills[num_envs]):
            output = Process(script, flags, cwd=home).when(partial(ready, folder)).stop(signum)
            copy = home / f"{folder.name}_{i}"
            shutil.copytree(folder, copy)
            left.append((signum, output, copy))
            flags = f"--resume {folder}"
        succeed(script, flags, cwd=home)
        return folder, left

    return side_by_side(work, [1] if script in SINGLE else VARIANTS)


@pytest.fixture(scope="session")
def half_way(broken_off: BrokenOff) -> dict[int, Path]:
    """Return, per number of environments, a run as its last kill left it, with two checkpoints."""
    return {num_envs: future.result()[1][-1][2] for num_envs, future in broken_off.items()}


@pytest.fixture(scope="session")
def killed(broken_off: BrokenOff) -> Path:
    """Return a run of one environment as SIGKILL left it half-way, with two checkpoints. Copy it,
    do not change it.
    """
    _, left = broken_off[1].result()
    return left[1][2]


variants = pytest.mark.parametrize("num_envs", VARIANTS)


# What a run leaves


@variants
def test_a_run_leaves_every_file(script: str, straight: Straight, num_envs: int) -> None:
    folder, output = straight[num_envs].result()
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 2  # of the run, and of its hyperparameters
    if script in ("dqn_atari_gmp", "rainbow_resnet_gmp"):
        analyses = {f"gradient_covariance-{now:09d}.npy" for now in (900, 1800)}
        assert names >= analyses and np.load(folder / max(analyses)).shape == (32, 32)
        names -= analyses
    wanted = {
        ".lock",
        "args.json",
        "versions.json",
        "metrics.jsonl",
        "checkpoint",
        "model.safetensors",
        "final.json",
    }
    assert names - events == wanted | ({"dataset.sha256"} if script in OFFLINE else set())

    args = json.loads((folder / "args.json").read_text())
    assert args["script"] == f"{script}.py"
    wanted_args = {"total_timesteps": 2000, "seed": 1, "env_id": GAME[script]}
    wanted_args |= {} if script in SINGLE else {"num_envs": num_envs}
    assert args.items() >= wanted_args.items()
    versions = flatten(json.loads((folder / "versions.json").read_text()))
    assert {"commit", "device"} <= versions.keys()
    assert versions["packages/torch"] == importlib.metadata.version("torch")
    final = json.loads((folder / "final.json").read_text())
    assert final["status"] == "finished"
    assert final["step"] == 2000 + (1 if num_envs == 3 else 0)  # 667 steps of three
    assert 0 < final["seconds"] < TIMEOUT

    assert not saved_steps(folder), "a finished run needs no checkpoint"
    assert not output.complaints()
    assert str(folder) in output.stdout


@variants
def test_the_progress_is_plain_lines(script: str, straight: Straight, num_envs: int) -> None:
    lines = [line for line in straight[num_envs].result()[1].stderr.split("\n") if line.strip()]
    assert lines and all("\r" not in line for line in lines), "the output is no terminal"
    wanted = r"100%.*2\.00k/2\.00k, .*step/s.* return -?[\d.]+, sparsity [\d.]+"
    wanted = wanted if script not in OFFLINE else r"100%.*2\.00k/2\.00k, .*step/s"
    assert re.search(wanted, lines[-1]), lines[-1]


@variants
def test_the_records_have_the_names_and_the_cadence_of_the_protocol(
    script: str, straight: Straight, num_envs: int
) -> None:
    folder, _ = straight[num_envs].result()
    epoch_steps = json.loads((folder / "args.json").read_text())["epoch_steps"]
    every = records(folder)
    for record in every:
        assert all(KEY.fullmatch(key) for key in record.keys() - {"step", "seconds"})
        assert isinstance(record["step"], int) and record["step"] % num_envs == 0
        assert all(
            isinstance(value, int | float) and math.isfinite(value) for value in record.values()
        )
    for earlier, later in itertools.pairwise(every):
        assert earlier["step"] <= later["step"] and earlier["seconds"] <= later["seconds"]
    if script in LOGGED:
        assert [record["step"] for record in every] == [600, 1000, 1200, 1800, 2000]
        eau = "eaudeqn" in script
        own = {"candidate_1", "candidate_2", "selected"} if eau else set[str]()
        layers = {f"layer/{name}" for name in ("conv1", "conv2", "conv3", "dense", "output")}
        measured = {"prunable", "total", "active_params", "target"} | layers | own
        wanted = {f"sparsity/{name}" for name in measured}
        wanted |= {f"losses/{name}" for name in ("td_loss", "cql_loss", "q_values")}
        wanted |= {"charts/SPS", "charts/learning_rate", "memory/replay_bytes"}
        wanted |= {"memory/peak_bytes", "step", "seconds"}
        assert all(record.keys() == wanted for record in every)
        return
    if script in OFFLINE:
        assert [record["step"] for record in every] == [0, 600, 1000, 1200, 1800, 2000], (
            "each 600 and each 1,000"
        )
        names = (
            "qf1_loss",
            "qf2_loss",
            "q_values",
            "cql_loss",
            "actor_loss",
            "alpha",
            "alpha_loss",
        )
        learned = {f"losses/{name}" for name in names} | {
            "charts/SPS",
            "charts/learning_rate",
            "memory/peak_bytes",
        }
        layers = {
            f"layer/{net}.{layer}"
            for net in ("actor", "qf1", "qf2")
            for layer in ("dense1", "dense2", "output")
        }
        measured = {f"sparsity/{name}" for name in {"prunable", "total", "active_params"} | layers}
        assert every[0].keys() == measured | {"step", "seconds"}, (
            "of the networks that training begins with"
        )
        assert all(
            record.keys() == measured | learned | {"step", "seconds"} for record in every[1:]
        )
        return

    def due(*periods: int) -> list[int]:
        steps = range(num_envs, every[-1]["step"] + 1, num_envs)
        return [step for step in steps if any(step // p > (step - num_envs) // p for p in periods)]

    learner = [record for record in every if "sparsity/target" in record]
    assert all((LOSS[script] in record) == (record["step"] > 300) for record in learner), (
        "from the first update on"
    )
    # The target is updated every 200 steps, so 1,000 is the rarer; and at each epoch's end.
    assert [record["step"] for record in learner] == due(epoch_steps, 1000)
    in_all = {"charts/SPS", "sparsity/prunable", "sparsity/total"} | (
        {"charts/epsilon"} if script in DQNS else set()
    )
    assert all(in_all <= record.keys() for record in learner)
    assert all(0 < record["charts/SPS"] < 100_000 for record in learner)

    # The mean of the episodes that ended in an epoch, which has no score when none did.
    ends, returns = due(epoch_steps), dict[int, list[float]]()
    for record in every:
        if "charts/episodic_return" in record and (
            later := [end for end in ends if end >= record["step"]]
        ):
            returns.setdefault(later[0], []).append(record["charts/episodic_return"])
    scored = {
        record["step"]: record["charts/epoch_return"]
        for record in every
        if "charts/epoch_return" in record
    }
    assert scored == pytest.approx(
        {end: sum(scores) / len(scores) for end, scores in returns.items()}
    )
    last = json.loads((folder / "final.json").read_text())["epoch_return"]
    assert last is None if ends[-1] not in scored else last == pytest.approx(scored[ends[-1]])


@variants
def test_each_episode_that_ended_has_a_record(
    script: str, straight: Straight, num_envs: int
) -> None:
    """An episode of L steps that ended at step s began at s - L * num_envs: at step 0, or where
    another had ended.
    """
    if script in OFFLINE:
        pytest.skip("it plays no episodes to learn from")
    starts, ends = [0] * num_envs, 0
    for record in records(straight[num_envs].result()[0]):
        if "charts/episodic_return" in record:
            starts.remove(record["step"] - record["charts/episodic_length"] * num_envs)
            starts.append(record["step"])
            ends += 1
    assert ends >= 8
    assert all(start > 0 for start in starts), "an episode ended in every environment"


def test_epsilon_falls_from_the_end_of_the_warm_up(script: str, straight: Straight) -> None:
    if script not in DQNS:
        pytest.skip("it has no epsilon")
    learner = [record for record in records(straight[1].result()[0]) if "charts/epsilon" in record]
    epsilon = {record["step"]: record["charts/epsilon"] for record in learner}
    assert epsilon[1000] == pytest.approx(1 - 0.1 * 699 / 1000, abs=1e-9), (
        "of the action of step 999"
    )
    assert epsilon[2000] == pytest.approx(0.9, abs=1e-9), "not below --epsilon-end"


@variants
def test_the_sparsity_records_follow_the_algorithm(
    script: str, straight: Straight, num_envs: int
) -> None:
    if "eaudeqn" not in script or script in MUJOCO | LOGGED:
        pytest.skip(
            "of candidates that are pairs, tests/test_sac.py has its own; test_cql_atari.py"
        )
    exponents = np.random.default_rng((1, 2))  # of seed 1
    learner = [
        record for record in records(straight[num_envs].result()[0]) if "sparsity/target" in record
    ]
    for record in learner:
        candidates = [record[f"sparsity/candidate_{k}"] for k in (1, 2, 3)]
        target = record["sparsity/target"]
        assert candidates[0] == target
        assert all(target <= candidate <= target + 0.1 + 1e-9 for candidate in candidates)
        assert record.get("sparsity/selected", 1) in (1, 2, 3)
        # Measured, of the network that would be saved, within the rounding of five layers' counts
        # to whole weights.
        assert min(abs(record["sparsity/prunable"] - candidate) for candidate in candidates) < 1e-4
    assert learner[-1]["sparsity/target"] > 0 and "sparsity/selected" in learner[-1]
    first = next(record["step"] for record in learner if "sparsity/selected" in record)
    assert num_envs == 1 or first == 402, "the first multiple of 200 after the first gradient step"
    for earlier, later in itertools.pairwise(learner):
        assert later["sparsity/target"] >= earlier["sparsity/target"]
        # With three environments there is a record at each target update: the chosen candidate
        # became the target.
        # None takes place at the end of the run.
        if num_envs == 3 and "sparsity/selected" in later and later["step"] < 2000:
            t, target = (
                later["step"] // 200 * 200,
                earlier[f"sparsity/candidate_{later['sparsity/selected']}"],
            )
            assert later["sparsity/target"] == pytest.approx(target, abs=1e-12)
            # An exponent n leaves ((2000 - t - 200) / (2000 - t)) ** n of the density, and takes
            # 0.1 at most.
            drawn = [
                1 - (1 - target) * ((1800 - t) / (2000 - t)) ** exponents.uniform(0, 1)
                for _ in range(2)
            ]
            wanted = [target, *(min(sparsity, target + 0.1) for sparsity in drawn)]
            assert [later[f"sparsity/candidate_{k}"] for k in (1, 2, 3)] == pytest.approx(
                wanted, abs=1e-12
            )
            assert abs(later["sparsity/prunable"] - later["sparsity/target"]) < 1e-4, (
                "network 1, a copy of the target"
            )


@variants
def test_the_model_has_the_sparsity_that_is_reported(
    script: str, module: ModuleType, straight: Straight, num_envs: int
) -> None:
    folder, output = straight[num_envs].result()
    model = load_file(folder / "model.safetensors")
    assert not any("target" in name for name in model)
    weights = {name: tensor for name, tensor in model.items() if tensor.ndim > 1}
    zeros = {name: int((tensor == 0).sum()) for name, tensor in weights.items()}
    total = sum(tensor.numel() for tensor in model.values())
    wanted = {
        "prunable": sum(zeros.values()) / sum(tensor.numel() for tensor in weights.values()),
        "total": sum(zeros.values()) / total,
        "active_params": total - sum(zeros.values()),
    } | {
        f"layer/{name.removesuffix('.weight')}": zeros[name] / weights[name].numel()
        for name in weights
    }
    final = flatten(json.loads((folder / "final.json").read_text()))
    last = next(record for record in reversed(records(folder)) if "sparsity/prunable" in record)
    for key, value in wanted.items():
        assert final[f"sparsity/{key}"] == value, key
        assert last[f"sparsity/{key}"] == value, key
    assert f'"sparsity/active_params": {total - sum(zeros.values())}.0' in output.stdout
    assert sum(zeros.values()) > 0.01 * total

    if script in MINATAR:  # Breakout has 4 channels and 3 actions
        network = own_network(module, model, flags_of_model(folder))
        assert network(torch.rand(4, 10, 10, 2)).shape == (3, 2)
        assert total == 16 * 36 + 16 + 1024 * 8 + 8 + 8 * 3 + 3
        return
    if script not in PIXELS:  # Hopper has 11 observations and 3 actions
        sizes = {"actor": (11, 6), "qf1": (14, 1), "qf2": (14, 1)}
        layers = {name: [(256, n), (256, 256), (m, 256)] for name, (n, m) in sizes.items()}
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
            f"{name}.{layer}.weight": shape
            for name, shapes in layers.items()
            for layer, shape in zip(("dense1", "dense2", "output"), shapes)
        }
        return
    network = own_network(module, model, flags_of_model(folder))
    assert torch.isfinite(network(torch.rand(2, 4, 84, 84))).all()
    names = {name.removesuffix(".weight") for name in weights}
    assert names == {"conv1", "conv2", "conv3", "dense", "output"}
    outputs = 4 * 51 if script == "rainbow_resnet_gmp" else 4  # Breakout has four actions
    assert total == 8224 + 32832 + 36928 + 7744 * 16 + 16 + 16 * outputs + outputs


def flags_of_model(folder: Path) -> dict[str, Any]:
    """Return the flags in a model's metadata."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        flags: dict[str, Any] = json.loads(file.metadata()["flags"])
    return flags


def own_network(module: ModuleType, model: dict[str, torch.Tensor], flags: dict[str, Any]) -> Any:
    """Return the script's own network, or its actor, with the weights of a model."""
    fields = {field.name for field in dataclasses.fields(module.Args)}
    args = module.Args(**{name: value for name, value in flags.items() if name in fields})
    if hasattr(module, "Actor"):
        model = {name[6:]: p for name, p in model.items() if name.startswith("actor.")}
        layers = sum(name.startswith("dense") and name.endswith("weight") for name in model)
        network = module.Actor(11, 3, 256, layers)
    elif hasattr(module, "PackedReplay"):
        network = module.QNetwork(4, 3, args)
    else:
        c51 = getattr(args, "c51", hasattr(module, "C51Network"))
        network = (module.C51Network if c51 else module.QNetwork)(4, args)
    network.load_state_dict(model, strict=True)
    return network


@variants
def test_the_model_says_where_it_comes_from(script: str, straight: Straight, num_envs: int) -> None:
    """All flags but those of the place, so that the file depends on the run alone."""
    folder, _ = straight[num_envs].result()
    flags, args = flags_of_model(folder), json.loads((folder / "args.json").read_text())
    assert flags == args | {"run_dir": "", "resume": ""} and flags["script"] == f"{script}.py"


def test_evaluate_answers_as_the_script_does(
    script: str, module: ModuleType, straight: Straight
) -> None:
    """It has functions of its own, by the flags in the model's metadata."""
    folder, _ = straight[1].result()
    evaluate = load_script("evaluate")
    flags, model = evaluate.load_model(folder)
    own = own_network(module, model, flags)
    with torch.no_grad():
        if script in PIXELS:
            obs = torch.rand(2, 4, 84, 84)
            answers = evaluate.q_values(model, flags, obs), own(obs)
        elif script in MINATAR:  # whose batch comes last
            obs = torch.rand(2, 4, 10, 10)
            answers = evaluate.q_values(model, flags, obs), own(obs.permute(1, 2, 3, 0)).T
        else:
            obs = torch.randn(2, 11)
            answers = evaluate.mean_actions(model, obs), own(obs)[0].tanh()
    torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dqn_atari_gmp", {"network": "impala", "width": 2}),
        ("rainbow_resnet_gmp", {"network": "impala"}),
        ("dqn_atari_baselines", {"regulariser": "l2-features"}),
        ("cql_atari_gmp", {"network": "impala", "width": 2, "c51": True}),
    ],
)
def test_evaluate_knows_all_networks(name: str, flags: dict[str, Any]) -> None:
    module, evaluate = load_script(name), load_script("evaluate")
    kind = getattr(module, "C51Network", module.QNetwork)
    network = kind(4, module.Args(feature_size=16, **flags))
    model, obs = dict(network.named_parameters()), torch.rand(2, 4, 84, 84)
    with torch.no_grad():
        answer = evaluate.q_values(model, {"script": f"{name}.py", **flags}, obs)
        torch.testing.assert_close(answer, network(obs), rtol=1e-5, atol=1e-5)


def test_evaluate_prints_the_score(
    script: str,
    module: ModuleType,
    straight: Straight,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its episodes have seeds of their own, 2,000,000 above --seed."""
    if script != "sac_mujoco_eaudeqn":
        pytest.skip(
            "an actor is an actor; on Atari .ci/run plays an episode, which may take 27,000 steps"
        )
    folder, _ = straight[1].result()
    output = succeed("evaluate", folder, "--episodes 3 --seed 5", cwd=tmp_path)
    model, flags = load_file(folder / "model.safetensors"), flags_of_model(folder)
    del flags["script"]
    args = module.Args(**flags | {"seed": 1_000_005, "eval_episodes": 3})
    score = module.evaluate(own_network(module, model, flags), args)["eval/episodic_return"]
    weights = [p for name, p in model.items() if name.startswith("actor.") and p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in weights) / (11 * 256 + 256 * 256 + 256 * 6)
    first, second, *layers = output.stdout.splitlines()
    assert first == f"Hopper-v5: 3 episodes by the mean action, an actor of {zeros:.1%} sparsity"
    assert second.startswith(f"return {score:.2f}, 95 % interval [")
    assert len(layers) == 3 and all(line.startswith("  actor.") for line in layers)
    evaluate = load_script("evaluate")
    for words, line in (
        ([str(folder), "--epsilon", "0.1"], "--epsilon 0.1: not for Hopper-v5"),
        ([str(tmp_path)], f"{tmp_path}: no finished run is there (No such file or directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        with pytest.raises(SystemExit) as end:
            evaluate.main(evaluate.tyro.cli(evaluate.Args))
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"evaluate.py: {line}")


@pytest.mark.slow
def test_evaluate_films_the_first_episode(script: str, straight: Straight, tmp_path: Path) -> None:
    """One picture for each step; the score is the one without a film."""
    if script in DQNS | OFFLINE and script != "eaudeqn_minatar":
        pytest.skip(".ci/run films an episode on Atari; the offline script's networks are these")
    folder, _ = straight[1].result()
    plain = succeed("evaluate", folder, "--episodes 1", cwd=tmp_path)
    output = succeed("evaluate", folder, "--episodes 1 --video film.mp4", cwd=tmp_path)
    assert output.stdout == f"{plain.stdout}film of the first episode: film.mp4\n"
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))
    assert frames > 5 and seconds == pytest.approx(
        frames / (125 if script in MUJOCO else 15), abs=0.1
    )


@pytest.mark.kill
@variants
def test_pruned_weights_are_zero_in_the_checkpoint(
    script: str, half_way: dict[int, Path], num_envs: int
) -> None:
    """Of every network with masks, which nest: what a target lacks, its copies lack."""
    if script in SINGLE and num_envs > 1:
        pytest.skip("it has one environment or none")
    tensors = checkpoint(newest(half_way[num_envs]))["agent"]
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    groups: dict[str, list[torch.Tensor]] = {}
    for name, mask in tensors.items():
        if re.search(r"\bmask\d+$", name):
            groups.setdefault(name.rpartition(".")[0], []).append(mask)
    assert groups
    pruned = 0
    for network, masks in groups.items():
        # CQL's masks are the agent's: of both critics, whose stacked weights are even, and actor.
        mine = rf"{network}\.[\w.]*weight" if network else r"critics\.[02468]|actor\..*weight"
        names = [name for name in tensors if re.fullmatch(mine, name)]
        names.sort(key=lambda name: not network and name.startswith("actor."))
        weights = [tensors[name] for name in names]
        if [w.shape for w in weights] != [m.shape for m in masks]:
            continue  # stacked, as SAC's critics are: tests/test_sac.py looks into these
        for weight, mask in zip(weights, masks):
            assert set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any()
            assert not weight[mask == 0].any()
            assert (weight[mask > 0] != 0).float().mean() > 0.99
            pruned += int((mask == 0).sum())
    assert pruned > 0


@pytest.mark.kill
@variants
def test_as_many_gradient_steps_as_the_replay_ratio_says(
    script: str, half_way: dict[int, Path], num_envs: int
) -> None:
    if script in OFFLINE:
        pytest.skip("its steps are the gradient steps")
    state = checkpoint(newest(half_way[num_envs]))
    counters = state["agent"]["_extra_state"]["counters"]
    assert counters[0] == state["step"] // 4 - 300 // 4


@variants
def test_tensorboard_has_the_same_scalars(straight: Straight, num_envs: int) -> None:
    assert_tensorboard_equals_metrics(straight[num_envs].result()[0])


# Kill and resume


@variants
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    straight: Straight, broken_off: BrokenOff, num_envs: int
) -> None:
    folder, left = broken_off[num_envs].result()
    assert not any((copy / "final.json").exists() for _, _, copy in left)
    if num_envs == 1:
        assert not saved_steps(left[0][2]), "the first kill comes before the first checkpoint"
    assert_same_run(folder, straight[num_envs].result()[0])


@pytest.mark.shared
@variants
def test_a_signal_stops_the_run_and_says_how_to_go_on(broken_off: BrokenOff, num_envs: int) -> None:
    folder, left = broken_off[num_envs].result()
    asked = [
        (output, copy) for signum, output, copy in left if signum in (signal.SIGTERM, signal.SIGINT)
    ]
    assert len(asked) == {1: 1, 3: 2}[num_envs]
    for output, copy in asked:
        assert output.status == 75
        (line,) = output.complaints()
        assert f"--resume {folder}" in line
        assert f"stopped at step {saved_steps(copy)[-1]};" in line, "it stopped with a checkpoint"
    assert all(
        output.status == -signal.SIGKILL for signum, output, _ in left if signum == signal.SIGKILL
    )


@pytest.mark.shared
def test_a_finished_run_has_nothing_to_resume(
    script: str, straight: Straight, tmp_path: Path
) -> None:
    folder, _ = straight[1].result()
    before = contents(folder)
    output = succeed(script, f"--resume {folder}", cwd=tmp_path)
    assert "finished" in output.stderr and str(folder) in output.stderr
    assert contents(folder) == before


@pytest.mark.shared
@pytest.mark.kill
def test_a_run_whose_folder_was_moved_goes_on(
    script: str, killed: Path, straight: Straight, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "moved")
    succeed(script, "--resume moved", cwd=tmp_path)
    assert_same_run(tmp_path / "moved", straight[1].result()[0])


@pytest.mark.shared
def test_the_evaluation_survives_a_signal(script: str, home: Path) -> None:
    """Pong, because an untrained agent ends its episodes by losing them."""
    if script in OFFLINE:
        pytest.skip(
            "its evaluation is that of the MuJoCo scripts, and as short as Hopper's first episodes"
        )
    game = "Pong" if script in ATARI else "HalfCheetah-v5"
    game = "Freeway --eval-steps 2500" if script in MINATAR else game
    flags = f"{TINY[script]} --env-id {game} --eval-episodes 3"

    def whole() -> None:
        succeed(script, flags, "--run-dir whole", cwd=home)

    def cut() -> None:
        process = Process(script, flags, "--run-dir cut", cwd=home)

        def evaluating() -> bool:
            return "evaluating" in process.err.read_text()

        output = process.when(evaluating).stop(signal.SIGTERM)
        assert output.status == 75 and "--resume cut" in output.complaints()[-1], output
        assert not (home / "cut" / "final.json").exists()
        succeed(script, "--resume cut", cwd=home)

    both(whole, cut)
    assert_same_run(home / "cut", home / "whole")
    final = json.loads((home / "whole" / "final.json").read_text())
    last = records(home / "whole")[-1]
    score = last["eval/episodic_return"]
    assert last["eval/episodes"] == 3
    if script in DQNS:
        assert -21 <= score <= 21
    else:
        evaluated = [r["step"] for r in records(home / "whole") if "eval/episodic_return" in r]
        assert evaluated == [100, 200, 300], "at the end of each epoch"
        assert -1000 < score < 1000
    assert final.items() >= {key: last[key] for key in last if key.startswith("eval/")}.items()


# Damage


@pytest.fixture(scope="session")
def mended(script: str, home: Path, killed: Path) -> dict[str, Future[tuple[Path, Output]]]:
    """Return, per misfortune of a killed run, the run's folder in the end, and what was said when
    it struck.
    """

    def damage(where: str) -> tuple[Path, Output]:
        """Damage the newest checkpoint, resume, stop as soon as it is noticed, resume.

        So the next checkpoint's step comes before the damaged one's.
        """
        folder = home / f"damaged_{where}"
        shutil.copytree(killed, folder)
        damaged, steps = newest(folder), saved_steps(folder)
        flip_byte(damaged, 700 if where == "facts" else damaged.stat().st_size // 2)
        process = Process(script, f"--resume {folder}", cwd=home)
        output = process.when(
            lambda: "damaged" in process.err.read_text() and not damaged.exists()
        ).stop(signal.SIGTERM)
        assert output.status == 75, output
        assert any(damaged.name in line and "damaged" in line for line in output.complaints()), (
            output
        )
        assert re.search(r"step \d+;.*--resume", output.complaints()[-1]), f"{steps}: {output}"
        succeed(script, f"--resume {folder}", cwd=home)
        return folder, output

    def fill_the_disk(_: str) -> tuple[Path, Output]:
        """Resume with a limit on the size of files: the tensors no longer fit, the records still
        do. Then without.
        """
        folder = home / "disk_full"
        shutil.copytree(killed, folder)
        before = {
            name: digest
            for name, digest in contents(folder).items()
            if name.startswith("checkpoint")
        }
        process = Process(script, f"--resume {folder}", cwd=home)
        resource.prlimit(
            process.popen.pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY)
        )
        output = process.wait()
        assert contents(folder).items() >= before.items(), "the checkpoints before are kept"
        succeed(script, f"--resume {folder}", cwd=home)
        return folder, output

    works = dict.fromkeys(KINDS, damage)
    if hasattr(resource, "prlimit"):  # on Linux
        works["disk"] = fill_the_disk
    return side_by_side(lambda name: works[name](name), works)


KINDS = ("facts", "tensors")


@pytest.mark.shared
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    mended: dict[str, Future[tuple[Path, Output]]], straight: Straight, kind: str
) -> None:
    folder, output = mended[kind].result()
    assert "Traceback" not in output.stderr
    assert_same_run(folder, straight[1].result()[0])


@pytest.mark.shared
def test_a_full_disk_leaves_the_checkpoint_before(
    mended: dict[str, Future[tuple[Path, Output]]], straight: Straight
) -> None:
    if "disk" not in mended:
        pytest.skip("no way to limit another process here")
    folder, output = mended["disk"].result()
    assert output.status == 1, output
    (line,) = output.complaints()
    assert (
        str(folder / "checkpoint") in line and "too large" in line
    )  # the system's word for this kind of full
    assert_same_run(folder, straight[1].result()[0])


@pytest.mark.shared
def test_with_all_checkpoints_damaged_nothing_is_changed(
    script: str, killed: Path, tmp_path: Path
) -> None:
    def work(how: str) -> None:
        folder = tmp_path / how
        shutil.copytree(killed, folder)
        for path in (folder / "checkpoint").iterdir():
            if how == "flipped":
                flip_byte(path, path.stat().st_size - 100)
            elif how == "cut":
                path.write_bytes(path.read_bytes()[:-1])
            else:
                path.write_bytes(b"")
        before = contents(folder)
        output = run(script, f"--resume {folder}", cwd=tmp_path)
        assert output.status == 1 and "Traceback" not in output.stderr, output
        assert output.complaints()[-1].endswith("checkpoint: no checkpoint is intact")
        assert contents(folder) == before

    for future in side_by_side(work, ["flipped", "cut", "emptied"]).values():
        future.result()


@pytest.mark.shared
def test_a_loss_that_is_not_finite_stops_the_run(script: str, tmp_path: Path) -> None:
    if script in OFFLINE:
        pytest.skip("tests/test_cql.py and tests/test_cql_atari.py have their own")
    flags = f"{TINY[script]} --learning-starts 20 --learning-rate 1e30"

    def with_a_checkpoint_at_each_step() -> None:
        output = run(script, flags, "--checkpoint-minutes 0 --run-dir run", cwd=tmp_path)
        assert output.status == 1, output
        (line,) = output.complaints()
        match = re.search(r"step (\d+)", line)
        assert match and 21 <= int(match[1]) <= 40, (
            "the first gradient step, at 21 or 24, makes weights infinite"
        )
        assert "nan" in line or "inf" in line
        assert saved_steps(tmp_path / "run")[-1] == int(match[1]) - 1, "the last good one"
        assert f"checkpoint kept: {int(match[1]) - 1:012d}" in line
        again = run(script, "--resume run", cwd=tmp_path)
        assert again.status == 1 and again.complaints() == output.complaints(), (
            "the checkpoint can be used"
        )

    def without_a_checkpoint() -> None:
        output = run(script, flags, "--run-dir other", cwd=tmp_path)
        assert output.status == 1 and not saved_steps(tmp_path / "other")
        (line,) = output.complaints()
        assert "checkpoint kept: none" in line, "nothing is promised that is not there"

    both(with_a_checkpoint_at_each_step, without_a_checkpoint)


@pytest.mark.slow
def test_updates_of_the_same_step_survive_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Four updates a step, of which the first makes weights infinite, from a prioritised replay."""
    flags = f"{TINY['rainbow_resnet_gmp']} --num-envs 16 --learning-rate 1e30 --run-dir run"
    output = run("rainbow_resnet_gmp", flags, cwd=tmp_path)
    (line,) = output.complaints()
    assert output.status == 1 and "step 112: the losses are [nan]" in line


@variants
def test_what_a_step_does_and_when_the_target_is_copied(
    script: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_envs: int
) -> None:
    """One environment: store, then learn, as in the paper; several step while the networks learn.

    The target is copied at each multiple of --target-every after the first gradient step, not at
    the run's end.
    """
    if script not in ATARI:
        pytest.skip("the target follows each update; MinAtar's order is Atari's")
    (kind,) = (
        c for c in vars(module).values() if inspect.isclass(c) and hasattr(c, "update_target")
    )
    replay, copied, events = (
        getattr(module, "PrioritisedReplay", module.FrameReplay),
        list[Any](),
        list[str](),
    )
    add, learn = replay.add, kind.learn
    monkeypatch.setattr(replay, "add", lambda *what: events.append("store") or add(*what))
    monkeypatch.setattr(kind, "learn", lambda *what: events.append("learn") or learn(*what))
    monkeypatch.setattr(
        kind, "update_target", lambda agent, *step: copied.append((agent.gradient_step, *step))
    )
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of this process stay
    flags = f"{TINY[script]} --num-envs {num_envs} --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    module.main(module.parse())
    steps = (150, 200, 250)
    wanted = zip({1: (12, 25, 37), 3: (12, 25, 38)}[num_envs], steps)
    assert copied == [pair if script == "eaudeqn_atari" else pair[:1] for pair in wanted]
    assert events[:4] == (["store", "learn"] if num_envs == 1 else ["learn", "store"]) * 2
    assert len(events) == 2 * 300 // num_envs


# Bad input

BAD = """
--total-timesteps 0 | --batch-size 0
--learning-rate 0 | --learning-rate -1 | --learning-rate nan | --learning-rate inf | --gamma 1.1
--gamma -0.1 | --gamma nan | --epoch-steps 0 | --eval-steps 0
--checkpoint-minutes -1 | --eval-episodes -1
--seed -1 | --seed 99999999999999999999999 | --device gpu | --device cuda:99
--env-id Pacmann
"""
ONLINE_BAD = """
--learning-starts 1 | --learning-starts 9999999 | --buffer-size 1 | --replay-ratio 0
--replay-ratio inf | --num-envs 0 | --num-envs 201
"""
ATARI_BAD = f"""{ONLINE_BAD}
--adam-eps 0 | --target-every 0 | --epsilon-end 2 | --epsilon-steps 0 | --feature-size 0
--compile
"""
SAC_BAD = """
--tau 0 | --tau 1.1 | --tau nan | --target-entropy nan | --target-entropy inf
--env-id CartPole-v1 | --env-id Blackjack-v1 | --compile
"""
MUJOCO_BAD = f"{ONLINE_BAD}{SAC_BAD}--reward-scale 0 | --reward-scale inf | --width 0 |"
EAU_DE_BAD = """
--num-networks 0 | --num-networks -2 | --max-exponent -1 | --max-exponent nan | --max-exponent inf
--max-sparsity-step 1.5 | --max-sparsity-step -0.1
"""
GMP_BAD = """
--sparsity 1 | --sparsity -0.1 | --prune-start 1.1 | --prune-end 0.1
--prune-end nan | --prune-every 0
"""
DQN_GMP_BAD = f"{ATARI_BAD}{GMP_BAD}--width 0 | --n-step 0 | --n-step 51 | --analysis-every -1"
MINATAR_BAD = """
--learning-starts 1 | --learning-starts 9999999 | --buffer-size 1 | --replay-ratio 0
--replay-ratio inf | --width 0
--adam-eps 0 | --target-every 0 | --epsilon-end 2 | --epsilon-steps 0 | --feature-size 0
"""
OWN_BAD = {
    "eaudeqn_minatar": MINATAR_BAD + EAU_DE_BAD,
    "dqn_minatar_gmp": MINATAR_BAD + GMP_BAD,
    "eaudeqn_atari": ATARI_BAD + EAU_DE_BAD,
    "dqn_atari_gmp": DQN_GMP_BAD,
    "rainbow_resnet_gmp": DQN_GMP_BAD,
    "dqn_atari_baselines": f"""{ATARI_BAD}{GMP_BAD}--width 0 | --lottery-mask some/run
--weight-decay -1 | --redo-threshold 2 | --reset-every 0 | --n-step 0
--weight-decay 0.5 | --redo-threshold 0.2 | --reset-every 7 | --reset-layers both
""",
    "sac_mujoco_eaudeqn": f"{MUJOCO_BAD}{EAU_DE_BAD}--prune-every 0",
    "sac_mujoco_gmp": f"{MUJOCO_BAD}{GMP_BAD}--weight-decay -1 | --weight-decay inf",
    "cql_offline_snip": f"""{SAC_BAD}
--width 0 | --sparsity 1 | --sparsity -0.1 | --actor-learning-rate 0 | --actor-learning-rate inf
--cql-alpha -1 | --cql-alpha inf
--cql-actions 0 | --cql-gap nan | --layers 0 | --prune-batches 0 | --dataset nowhere.hdf5
""",
}
LOGGED_BAD = """
--dataset nowhere | --env-id Pong | --transitions 4 | --transitions 301 | --checkpoints-per-epoch 0
--checkpoints-per-epoch 7 | --adam-eps 0 | --n-step 0 | --cql-alpha -1 | --cql-alpha inf
--target-every 0 | --feature-size 0 | --compile
"""
OWN_BAD |= {
    "cql_atari_eaudeqn": LOGGED_BAD + EAU_DE_BAD,
    "cql_atari_gmp": f"{LOGGED_BAD}{GMP_BAD}--width 0",
}
CASES = [
    (name, case.strip())
    for name in SCRIPTS
    for case in re.split(r"[|\n]", BAD + OWN_BAD[name])
    if case.strip()
]


def call(
    module: ModuleType,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Output:
    """Run a script's command line in this process, which saves the imports; it must end there,
    without training.
    """
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of this process stay
    with pytest.raises(SystemExit) as end:
        module.command_line()
    captured = capsys.readouterr()
    return Output(
        end.value.code if isinstance(end.value.code, int) else 1, captured.out, captured.err
    )


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}:{case}" for name, case in CASES])
def test_a_value_out_of_range_is_refused(
    name: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = sys.modules.get(name) or load_script(name)
    monkeypatch.chdir(tmp_path)
    more = "" if name in SINGLE else "--num-envs 2"
    output = call(module, f"{TINY[name]} {more} {case}".split(), monkeypatch, capsys)
    assert output.status == 2
    (line,) = output.complaints()
    flag, _, value = case.partition(" ")
    assert flag in line and value.rstrip("0") in line, line
    assert line.startswith(f"{name}.py: ") and len(line) < 200
    assert not [*tmp_path.iterdir()], "nothing was begun"


@pytest.mark.shared
@pytest.mark.parametrize("flags", ["--buffer-size 100000000000000", "--feature-size 1000000000"])
def test_what_does_not_fit_in_memory_is_refused(
    script: str,
    module: ModuleType,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if script in OFFLINE and "--buffer-size" in flags:
        pytest.skip("it has no buffer")
    flags = (
        flags
        if script in DQNS | LOGGED
        else flags.replace("--feature-size 1000000000", "--width 10000000")
    )
    output = call(module, f"{TINY[script]} {flags}".split(), monkeypatch, capsys)
    assert output.status in (1, 2)
    (line,) = output.complaints()
    assert len(line) < 300
    assert not [*tmp_path.rglob("args.json")], "no run was begun"


@pytest.mark.shared
@pytest.mark.parametrize("left", [".lock", "args.json"])
def test_a_folder_that_was_only_begun_is_gone_on_with(
    script: str, module: ModuleType, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash leaves before args.json is as good as nothing; what it leaves after is a run."""
    flags = f"{TINY[script]} --run-dir run"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    (tmp_path / "run").mkdir()
    saved = {"script": f"{script}.py"} | dataclasses.asdict(module.parse())
    (tmp_path / "run" / left).write_text(json.dumps(saved) if left == "args.json" else "")
    succeed(script, "--resume run" if left == "args.json" else flags, cwd=tmp_path)
    assert_learned(tmp_path / "run")


def test_the_run_of_another_script_is_refused(
    script: str,
    module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two scripts may have the same flags; their runs are not the same."""
    flags = {"script": "another.py"} | dataclasses.asdict(module.Args())
    (tmp_path / "args.json").write_text(json.dumps(flags))
    output = call(module, ["--resume", str(tmp_path)], monkeypatch, capsys)
    (line,) = output.complaints()
    assert output.status == 2 and "--resume" in line and "another script" in line
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


@pytest.mark.parametrize("flag", ["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:2", "gpu"])
def test_devices_of_a_machine_with_two_gpus(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    if flag in ("cuda:2", "gpu"):
        with pytest.raises(SystemExit):
            module.find_device(module.Args(device=flag))
    else:
        args = module.Args(device=flag)
        device = module.find_device(args)
        assert args.device == str(device), "a run is resumed on the device that it began on"
        index = {"cuda:1": 1, "cpu": None}.get(flag, 0)
        assert device == torch.device("cpu" if flag == "cpu" else f"cuda:{index}")
        assert chosen == ([] if flag == "cpu" else [index])


def is_numeric(kind: Any) -> bool:
    """Tell whether a flag is a number: those with a range have types of their own."""
    return kind in ("Count", "Index", "Amount", "Rate", "Share", "int", "float")


def test_each_numeric_flag_has_a_bad_value(script: str, module: ModuleType) -> None:
    tried = {case.split()[0] for name, case in CASES if name == script}
    numeric = {field.name for field in dataclasses.fields(module.Args) if is_numeric(field.type)}
    assert {"--" + name.replace("_", "-") for name in numeric} <= tried


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Brekout", ["--env-id", "Brekout", "breakout"]),
        ("--env-id ALE/MsPackman-v5", ["--env-id", "mspacman"]),
        ("--buffer-size 31 --batch-size 32", ["--buffer-size", "31", "32"]),
        ("--num-envs 0", ["--num-envs", "0", "1"]),
        pytest.param(
            "--device cuda",
            ["--device", "cuda", "cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        ("--run-dir full", ["--run-dir", "full", "--resume full"]),
        ("--run-dir file", ["--run-dir", "file"]),
        ("--resume full", ["--resume", "full"]),
        ("--resume nowhere", ["--resume", "nowhere"]),
        ("--resume other", ["--resume", "other"]),
        ("--resume other --seed 3 --no-track", ["--resume", "--seed", "--no-track"]),
        ("--resume=other --total-timesteps=90000", ["--resume", "--total-timesteps"]),
    ],
)
def test_bad_input_is_named(
    script: str,
    module: ModuleType,
    flags: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, name, text in (
        ("full", "notes.txt", "mine"),
        ("other", "args.json", '{"learning": true}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    if script in OFFLINE and any(flag in flags for flag in ("--buffer-size", "--num-envs")):
        pytest.skip("it has no such flag")
    if script in MINATAR and ("--num-envs" in flags or "MsPackman" in flags):
        pytest.skip("it has no such flag or game")
    if script not in DQNS | LOGGED:  # misspelt
        flags = flags.replace("Brekout", "Hoper-v5").replace("ALE/MsPackman-v5", "HalfCheeta")
        right = {"Brekout": "Hoper-v5", "breakout": "Hopper-v5", "mspacman": "HalfCheetah-v5"}
        words = [right.get(word, word) for word in words]
    small = "" if "--resume" in flags else f"{TINY[script]} "
    output = call(module, (small + flags).split(), monkeypatch, capsys)
    assert output.status == 2
    (line,) = output.complaints()
    assert all(word in line for word in words), line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags", [["--resume", ""], ["--resume="], ["--resume=", "--seed", "3"]])
def test_an_empty_resume_is_refused(
    module: ModuleType,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--resume "$RUN"` with RUN unset must not start a run of 40M frames."""
    monkeypatch.setattr(module, "main", lambda _: sys.exit("it ran"))
    monkeypatch.chdir(tmp_path)
    output = call(module, flags, monkeypatch, capsys)
    assert output.status == 2 and "--resume" in output.complaints()[0]


@pytest.mark.shared
def test_resume_refuses_other_flags_and_changes_nothing(
    script: str, killed: Path, tmp_path: Path
) -> None:
    before = contents(killed)
    output = run(script, f"--resume {killed} --total-timesteps 9000", cwd=tmp_path)
    (line,) = output.complaints()
    assert output.status == 2 and "--total-timesteps" in line and "--resume" in line
    output = run(script, SMALL[script], f"--run-dir {killed}", cwd=tmp_path)
    (line,) = output.complaints()
    assert output.status == 2 and "--run-dir" in line and "--resume" in line
    assert contents(killed) == before


@pytest.mark.shared
@pytest.mark.parametrize(
    "flags",
    ["--no-such-flag 3", "--seed one", "--seed 1.5", "--precision fp17", "--resume", "Breakout"],
)
def test_an_unknown_flag_or_type_is_refused(
    module: ModuleType,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    output = call(module, flags.split(), monkeypatch, capsys)
    assert output.status == 2 and flags.split()[0] in output.stderr
    assert not [*tmp_path.iterdir()]


# Flags and source


def test_a_whole_number_may_be_written_as_1e6(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--total-timesteps", "1.5e6", "--batch-size", "16", "--seed", str(2**32 - 1)]
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
    args = module.parse()
    assert [args.total_timesteps, args.batch_size, args.seed] == [1_500_000, 16, 2**32 - 1]
    assert isinstance(args.total_timesteps, int)
    for word in ("1.5", "1e-1", "1e999999999", "1e-999999999", "nan", "inf", "many"):
        monkeypatch.setattr(sys, "argv", [str(module.__file__), "--batch-size", word])
        with pytest.raises(SystemExit):
            module.parse()


def declared(module: ModuleType) -> dict[str, str]:
    """Return each flag's field and the comment behind it, which is its help."""
    fields = [field.name for field in dataclasses.fields(module.Args)]
    comments = {}
    with open(str(module.__file__), "rb") as file:
        for token in tokenize.tokenize(file.readline):
            match = re.match(r"    (\w+): .*#", token.line)
            if token.type == tokenize.COMMENT and match:
                comments.setdefault(match[1], token.string.lstrip("# "))
    return {name: comments.get(name, "") for name in fields}


@pytest.mark.shared
@pytest.mark.parametrize("columns", [80, 200])
def test_help_describes_every_flag(
    script: str, module: ModuleType, tmp_path: Path, columns: int
) -> None:
    output = run(script, "--help", cwd=tmp_path, COLUMNS=str(columns), TERM="dumb")
    assert output.status == 0 and not output.stderr
    assert (
        max(len(line) for line in output.stdout.splitlines() if not line.startswith("usage:"))
        <= columns
    )
    text = re.sub(r"[\s│]", "", output.stdout)
    assert "…" not in text
    for name, comment in declared(module).items():
        flag = "--" + name.replace("_", "-")
        assert flag in text
        assert len(comment) > 10, f"{flag} has no help"
        assert re.sub(r"\s", "", comment) in text, f"the help of {flag} does not reach the user"
    for field in dataclasses.fields(module.Args):
        if is_numeric(field.type):
            flag = re.escape("--" + field.name.replace("_", "-"))
            ranged = re.search(rf"{flag}(INT>=|X>|X>=|Xin\[)|(at least|above)", text)
            assert ranged, f"{field.name} has no range"
    groups = re.findall(r"^ (\w+) options", output.stdout, re.MULTILINE)
    in_order = groups[-3:] == ["method", "training", "running"]
    assert in_order or columns > 80, "the method comes first"  # else in two columns


def test_every_flag_is_read(script: str, module: ModuleType) -> None:
    """Somewhere outside Args: args.NAME, whatever holds the args."""
    read = {"precision"} if script in MINATAR else set()  # where bf16 is refused, a case of BAD
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "id", "") or getattr(owner, "attr", "")
            if name == "args":
                read.add(node.attr)
    assert {*declared(module)} - read == set()
    assert len(declared(module)) <= (41 if script == "dqn_atari_baselines" else 36)


# What the papers or the code that a script follows say; of Atari in steps of 4 frames.
DOPAMINE = {
    "total_timesteps": 10_000_000,
    "learning_starts": 20_000,
    "buffer_size": 1_000_000,
    "batch_size": 32,
    "learning_rate": 6.25e-5,
    "adam_eps": 1.5e-4,
    "gamma": 0.99,
    "replay_ratio": 0.25,
    "target_every": 8000,
    "epsilon_end": 0.01,
    "epsilon_steps": 250_000,
    "epoch_steps": 250_000,
    "feature_size": 512,
}
SAC = {
    "total_timesteps": 1_000_000,
    "buffer_size": 1_000_000,
    "batch_size": 256,
    "gamma": 0.99,
    "tau": 0.005,
    "replay_ratio": 1.0,
    "prune_every": 1000,
}
EAU_DE = {"num_networks": 5, "max_exponent": 3.0, "max_sparsity_step": 0.01}
GMP = {"sparsity": 0.95, "prune_start": 0.2, "prune_end": 0.8, "prune_every": 1000}
MINATARS = {  # docs/eaudeqn_minatar.md has the search
    "total_timesteps": 1_000_000,
    "learning_starts": 5_000,
    "learning_rate": 2.5e-4,
    "adam_eps": 3.125e-4,
    "target_every": 4_000,
    "epsilon_end": 0.01,
    "epsilon_steps": 100_000,
    "buffer_size": 100_000,
    "batch_size": 32,
    "gamma": 0.99,
    "replay_ratio": 0.25,
    "width": 1,
    "feature_size": 128,
}
OFFLINE_ATARI = {  # in gradient steps
    "checkpoints_per_epoch": 5,
    "transitions": 50_000,
    "epoch_steps": 62_500,
    "batch_size": 32,
    "learning_rate": 5e-5,
    "adam_eps": 3.125e-4,
    "gamma": 0.99,
    "n_step": 1,
    "cql_alpha": 0.1,
    "target_every": 2000,
    "feature_size": 512,
}
PAPERS = {
    "eaudeqn_minatar": MINATARS
    | EAU_DE
    | {"behaviour": "inverse-loss", "selection": "loss", "reset_optimizer": True},
    "dqn_minatar_gmp": MINATARS | GMP,
    "eaudeqn_atari": DOPAMINE | EAU_DE | {"behaviour": "inverse-loss", "reset_optimizer": True},
    "dqn_atari_gmp": DOPAMINE | GMP | {"network": "cnn", "width": 1, "n_step": 1},
    "rainbow_resnet_gmp": DOPAMINE | GMP | {"network": "impala", "width": 1, "n_step": 3},
    "dqn_atari_baselines": DOPAMINE
    | GMP
    | {"network": "cnn", "width": 1, "n_step": 1, "pruner": "gmp", "regulariser": "none"}
    | {"weight_decay": 1e-5, "redo_threshold": 0.1, "reset_every": 100_000, "reset_layers": "last"},
    "sac_mujoco_eaudeqn": SAC
    | EAU_DE
    | {
        "learning_starts": 5000,
        "learning_rate": 1e-3,
        "reward_scale": 1.0,
        "target_entropy": -1.0,
        "width": 1,
        "loss_aggregation": "ema",
        "prune_actor": False,
        "reset_optimizer": False,
    },
    "sac_mujoco_gmp": SAC
    | GMP
    | {
        "learning_starts": 1000,
        "learning_rate": 3e-4,
        "reward_scale": 0.1,
        "target_entropy": -0.5,
        "width": 5,
        "weight_decay": 1e-4,
    },
    "cql_atari_eaudeqn": OFFLINE_ATARI
    | EAU_DE
    | {"total_timesteps": 3_125_000}
    | {"selection_loss": "total", "reset_optimizer": True},
    "cql_atari_gmp": OFFLINE_ATARI
    | GMP
    | {"total_timesteps": 12_500_000, "network": "cnn"}
    | {"width": 1, "c51": False, "td_loss": "huber"},
    "cql_offline_snip": {
        "total_timesteps": 1_000_000,
        "batch_size": 256,
        "gamma": 0.99,
        "tau": 0.005,
        "target_entropy": -1.0,
        "learning_rate": 3e-4,
        "actor_learning_rate": 3e-5,
        "entropy_backup": False,
        "cql_actions": 10,
        "cql_gap": -1.0,
        "cql_alpha": 10.0,
        "layers": 3,
        "width": 1,
        "normalize_rewards": False,
        "pruner": "snip",
        "sparsity": 0.95,
        "prune_batches": 1,
    },
}


def test_the_defaults_are_the_papers(script: str, module: ModuleType) -> None:
    """Every flag that changes what is learned is named here, but for the seed, the game, its copies
    and precision.
    """
    flags = dataclasses.asdict(module.Args())
    assert {name: flags[name] for name in PAPERS[script]} == PAPERS[script]
    rest = {
        "seed",
        "env_id",
        "num_envs",
        "precision",
        "device",
        "compile",
        "run_dir",
        "resume",
        "checkpoint_minutes",
        "eval_episodes",
        "eval_steps",
        "track",
        "wandb_project",
        "keep_checkpoint",
        "analysis_every",
        "lottery_mask",
        "dataset",
        "epoch_steps",
    }
    assert {*flags} - {*PAPERS[script]} <= rest


def assert_short_and_plain(lines: list[str], most: int) -> None:
    """At most `most` lines of 100 columns, laid out by `ruff format` and not dense."""
    assert len(lines) <= most and max(map(len, lines)) <= 100
    assert np.mean([len(line) for line in lines if line.strip()]) <= 60.5
    assert not any("fmt: skip" in line or "fmt: off" in line for line in lines)


@pytest.mark.parametrize("tool", ["evaluate", "make_datasets"])
def test_a_tool_is_short_and_plain(tool: str) -> None:
    assert_short_and_plain((FOLDER / f"{tool}.py").read_text().splitlines(), 600)


def test_a_script_is_short_and_plain(script: str) -> None:
    """Bars that a script may not pass on its way down to 600 lines; the method comes first."""
    lines = (FOLDER / f"{script}.py").read_text().splitlines()
    most, main_by = LINES[script]
    assert_short_and_plain(lines, most)
    (main,) = (
        node
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    assert main.lineno <= main_by
    (loop,) = (node for node in main.body if isinstance(node, ast.While))
    assert loop.end_lineno and loop.end_lineno - loop.lineno < 60, "the main loop"


def test_a_script_imports_only_what_its_header_declares(script: str) -> None:
    source = (FOLDER / f"{script}.py").read_text()
    header = source.partition("# ///\n")[0]
    declared = re.findall(r'"([\w-]+)(?:\[\w+\])?[>=<\d.]*"', header)
    packages = {name.replace("-", "_") for name in declared} | {"__future__"}
    tree = ast.parse(source)

    def imported(nodes: Iterable[ast.AST]) -> set[str]:
        names = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 and node.module for node in froms), "nothing relative"
        return {name.partition(".")[0] for name in [*names, *(str(node.module) for node in froms)]}

    everywhere = imported([*ast.walk(tree)])
    assert everywhere - sys.stdlib_module_names <= packages
    folders = ("cleanrl_sparse", "benchmark", "tools", "tests")
    ours = {path.stem for folder in folders for path in (FOLDER.parent / folder).glob("*.py")} | {
        *folders
    }
    assert everywhere & ours == set()
    assert "wandb" not in imported(tree.body), "imported only with --track"


# Alone, and with other flags


def assert_learned(folder: Path) -> None:
    """A short run reached the learner and pruned, and is finished."""
    losses = {"losses/td_loss", "losses/qf1_loss"}
    assert json.loads((folder / "final.json").read_text())["status"] == "finished"
    last = next(record for record in reversed(records(folder)) if losses & record.keys())
    assert all(last[loss] > 0 for loss in losses & last.keys())
    assert any(
        value > 0
        for key, value in last.items()
        if key.startswith(("sparsity/prunable", "sparsity/candidate"))
    )


def test_one_file_alone_trains(script: str, tmp_path: Path) -> None:
    """Copied to an empty folder it trains, prunes and evaluates. The first one also under another
    name, from elsewhere, on a machine without git.

    An untrained agent never serves in Breakout: without --eval-steps it would play 27,000 steps.
    """
    for folder, name in (("alone", script), ("other", "my_variant")):
        (tmp_path / folder).mkdir()
        shutil.copy(FOLDER / f"{script}.py", tmp_path / folder / f"{name}.py")
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in itertools.chain(
        *(Path(path).glob("*") for path in os.environ["PATH"].split(os.pathsep))
    ):
        if program.stem != "git" and not (programs / program.name).exists():
            (programs / program.name).symlink_to(program)
    runs: list[tuple[Path, Path, dict[str, str]]] = [
        (tmp_path / "alone" / f"{script}.py", tmp_path / "alone", {}),
        (tmp_path / "other" / "my_variant.py", tmp_path / "elsewhere", {"PATH": str(programs)}),
    ]
    runs = runs if script == "eaudeqn_atari" else runs[:1]
    before = time.time()
    flags = f"{TINY[script]} --seed 7 --eval-episodes 1 --eval-steps 20"
    outputs = both(
        *(
            partial(succeed, path, flags, cwd=cwd, fresh=True, **environment)
            for path, cwd, environment in runs
        )
    )
    for (path, cwd, _), output in zip(runs, outputs):
        (folder,) = (cwd / "runs").iterdir()
        match = re.fullmatch(rf"{GAME[script]}__{path.stem}__7__(\d+)", folder.name)
        assert match and before <= int(match[1]) / 1e6 <= time.time()
        assert_learned(folder)
        assert json.loads((folder / "versions.json").read_text())["commit"] is None
        last = records(folder)[-1]
        assert last["eval/episodes"] == 1 and math.isfinite(last["eval/episodic_return"])
        assert "evaluating" in output.stderr or GAME[script] == "Hopper-v5"


@pytest.mark.slow
def test_what_weights_and_biases_refuses_leaves_no_folder(script: str, tmp_path: Path) -> None:
    flags = f"{TINY[script]} --track --run-dir k=v,x:1"
    places = {"cwd": tmp_path, "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    output = run(script, flags, "--wandb-project team/project", **places)  # type: ignore[arg-type]
    assert output.status == 1 and "Traceback" not in output.stderr, output
    assert "--wandb-project" in output.complaints()[-1]
    assert "team/project" in output.complaints()[-1]
    assert not (tmp_path / "k=v,x:1").exists(), "so that the corrected command is accepted"
    succeed(script, flags, **places)  # type: ignore[arg-type]


# Nobody reads, somebody else writes


@pytest.mark.shared
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
def test_a_run_outlives_the_readers_of_its_output(script: str, tmp_path: Path, signum: int) -> None:
    """As at `| head` and `2>&1 | tee log` when tee dies of the same Ctrl-C: the signal alone stops
    it, resumably.
    """
    flags = (
        f"{SMALL[script]} --total-timesteps 10000000 --checkpoint-minutes 10 --run-dir run".split()
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / f"{script}.py"), *flags],
        cwd=tmp_path,
        stdout=write,
        stderr=write,
    )
    os.close(write)
    os.close(read)
    try:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        wait_until(lambda: len(records(tmp_path / "run")) > 2 or process.poll() is not None)
        assert process.poll() is None, "it goes on in silence"
        process.send_signal(signum)
        assert process.wait(TIMEOUT) == 75
    finally:
        process.kill()
    assert len(saved_steps(tmp_path / "run")) == 1


@pytest.mark.shared
def test_a_run_needs_no_output_at_all(script: str, tmp_path: Path) -> None:
    command = shlex.join(
        [sys.executable, str(FOLDER / f"{script}.py"), *TINY[script].split(), "--run-dir", "run"]
    )
    closed = subprocess.run(
        ["bash", "-c", f"{command} >&- 2>&-"], cwd=tmp_path, check=False, timeout=TIMEOUT
    )
    assert closed.returncode == 0
    assert_learned(tmp_path / "run")


def test_a_folder_that_another_process_writes_to_is_refused(
    script: str, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = contents(tmp_path / "run")
        output = run(script, "--resume run", cwd=tmp_path)
        assert output.status == 2
        assert output.complaints() == [f"{script}.py: run: another process is working on this run"]
        assert contents(tmp_path / "run") == before


def new_run(module: ModuleType, **flags: Any) -> Any:
    """Return the folder of a run that begins."""
    return module.Run(module.Args(device="cpu", **flags), "Game")


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert new_run(module).path != new_run(module).path


def test_the_versions_are_those_of_what_is_imported(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two copies of a package Python imports the first on its path."""
    (tmp_path / "tyro-0.0.1.dist-info").mkdir()
    (tmp_path / "tyro-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tyro\nVersion: 0.0.1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = new_run(module, run_dir=str(tmp_path / "run"))
    assert json.loads((run.path / "versions.json").read_text())["packages"]["tyro"] == "0.0.1"


@pytest.mark.parametrize("name", [*MUJOCO, "cql_offline_snip"])
def test_a_way_of_drawing_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    output = run(name, TINY[name], "--run-dir run", cwd=tmp_path, MUJOCO_GL="nonsense")
    assert output.status == 2
    (line,) = output.complaints()
    assert line.startswith(f"{name}.py: MUJOCO_GL=nonsense: mujoco cannot be imported with it")


@pytest.mark.shared
def test_track_works_offline_without_an_account(script: str, tmp_path: Path) -> None:
    output = succeed(
        script,
        TINY[script],
        "--track --run-dir run",
        cwd=tmp_path,
        HOME=str(tmp_path),
        WANDB_MODE="offline",
    )
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert LOSS[script].encode() in log.read_bytes()
    assert_learned(tmp_path / "run")
    assert "finished" in output.stdout


@pytest.mark.slow
def test_track_without_an_account_says_what_to_do(script: str, tmp_path: Path) -> None:
    output = run(script, TINY[script], "--track --run-dir run", cwd=tmp_path, HOME=str(tmp_path))
    assert output.status == 1 and "Traceback" not in output.stderr, output
    assert output.complaints()[-1].startswith(f"{script}.py: --track ")
    assert "WANDB_MODE=offline" in output.complaints()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--precision bf16", "--network impala", "--network impala --precision bf16"]
)
def test_a_variant_trains(script: str, flags: str, tmp_path: Path) -> None:
    single = script in ("eaudeqn_atari", "cql_atari_eaudeqn")
    if ("impala" in flags and single) or script in MINATAR:
        pytest.skip("it has one network")
    flags = flags if script in PIXELS else flags.replace("--network impala", "--width 2")
    succeed(script, TINY[script], flags, "--run-dir run", cwd=tmp_path)
    assert_learned(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_games_train_and_resume(script: str, number: int, tmp_path: Path) -> None:
    if script in OFFLINE:
        pytest.skip("it does not play to learn")
    atari = ("MsPacman", "Qbert", "Pong", "Enduro", "VideoPinball")
    game = (
        atari if script in ATARI else ("HalfCheetah", "Walker2d", "Ant", "Humanoid", "Pendulum-v1")
    )[number]
    if script in MINATAR:
        game = ("Asterix", "breakout", "Freeway", "Seaquest", "space_invaders")[number]
    flags = f"{SMALL[script]} --env-id {game} {'' if script in MINATAR else '--num-envs 2'}"

    def whole() -> None:
        succeed(script, flags, "--run-dir whole", cwd=tmp_path)

    def cut() -> None:
        process = Process(script, flags, "--run-dir cut", cwd=tmp_path)
        process.when(lambda: has_saved(tmp_path / "cut", 1000)).stop(signal.SIGKILL)
        succeed(script, "--resume cut", cwd=tmp_path)

    both(whole, cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert_learned(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2, 3, 8])
def test_kills_at_random_moments(script: str, num_envs: int, tmp_path: Path) -> None:
    """Twenty kills per script or more, with a checkpoint every 0.3 s; where there are games, with
    records between two gradient steps.
    """
    if script in SINGLE and num_envs > 1:
        pytest.skip("it has one environment or none to train in")
    flags = f"{SMALL[script]} --checkpoint-minutes 0.005 --epoch-steps 40"
    if script not in OFFLINE:
        flags += " --replay-ratio 0.03 --total-timesteps 3000"
    if script in MINATAR:  # 3,000 steps end too soon for twenty kills
        flags += " --total-timesteps 30000"
    if script in OFFLINE:
        flags += " --total-timesteps " + ("1500" if script in LOGGED else "6000")
    if script not in SINGLE:
        flags += f" --num-envs {num_envs}"
    succeed(script, flags, "--run-dir whole", cwd=tmp_path)
    rng, kills = random.Random(num_envs), 0
    wanted, longest = (20, 0.7) if script in SINGLE else (8, 2.0)  # seconds until a kill
    flags += " --run-dir cut"
    while not (tmp_path / "cut" / "final.json").exists():
        process = Process(script, flags, cwd=tmp_path)
        if kills < wanted:
            begun = process.out.read_text if kills else (tmp_path / "cut/metrics.jsonl").exists
            if script in SINGLE:  # a bar: no line comes before the first checkpoint
                begun = process.err.read_text
            process.when(lambda begun=begun: bool(begun()))  # "continuing from step", if resumed
            time.sleep(rng.uniform(0, longest))
            signum = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            output = process.stop(signum)
            # -15: SIGTERM during the imports.
            assert output.status in (0, 75, -signal.SIGKILL, -signal.SIGTERM), output
            kills += 1
        else:
            signum = 0
            assert process.wait().status == 0
        flags = "--resume cut"
    print(f"{script}, {num_envs} environments: {kills} kills")
    for path in (tmp_path / "cut" / "checkpoint").iterdir():
        assert signum == signal.SIGKILL, "between final.json and its removal"
        path.unlink()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_a_tracked_run_can_be_resumed(script: str, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
    process = Process(script, SMALL[script], "--track --run-dir run", cwd=tmp_path, **environment)
    process.when(lambda: has_saved(tmp_path / "run", 800)).stop(signal.SIGKILL)
    succeed(script, "--resume run", cwd=tmp_path, **environment)
    assert_tensorboard_equals_metrics(tmp_path / "run")
    assert len([*(tmp_path / "wandb").glob("offline-run-*/*.wandb")]) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 30, 700, 0.01, 0.1, 0.5, 0.999], ids=str)
def test_damage_anywhere_in_a_checkpoint_is_noticed(
    script: str, position: float, killed: Path, straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damaged = newest(folder)
    flip_byte(damaged, int(position if position >= 1 else position * damaged.stat().st_size))
    output = succeed(script, f"--resume {folder}", cwd=tmp_path)
    assert any(damaged.name in line and "damaged" in line for line in output.complaints())
    assert_same_run(folder, straight[1].result()[0])
