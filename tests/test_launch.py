"""benchmark/launch.py: manifests, states, runs that are started once whatever dies; and the
figures' scripts.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tyro
from conftest import FIFTEEN_GAMES, SCRIPTS, load_script
from test_docs import load_benchmark
from test_runs import wait_until

BENCHMARK = SCRIPTS.parent / "benchmark"

# A training script as far as the launcher can tell, without the seconds that importing torch takes.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from typing import ClassVar, Literal

Count, Share = int, float

class Args:
    env_id: str = "Pong"
    seed: int = 1
    total_timesteps: int = 10_000_000
    learning_starts: int = 20_000
    ticks: int = 5
    status: int = 0
    mask: str = ""
    quiet: bool = False
    rate: float = 0.5
    share: Share = 0.5
    count: Count = 1
    kind: Literal["a", "b"] = "a"
    limit: ClassVar[int] = 3

def stop(*_):
    print("stand_in.py: stopped")
    os._exit(75)

flags = {"seed": "1", "ticks": "5", "status": "0"} | dict(zip(sys.argv[1::2], sys.argv[2::2]))
flags = {name.lstrip("-"): value for name, value in flags.items()}
folder = Path(flags.get("resume") or flags["run-dir"])
signal.signal(signal.SIGTERM, stop)
if "resume" in flags:
    flags = json.loads((folder / "args.json").read_text())
elif (folder / "args.json").exists():
    sys.exit("stand_in.py: the folder is not empty")
else:
    (folder / "args.json").write_text(json.dumps(flags | {"total_timesteps": int(flags["ticks"])}))
with open(folder / "starts", "a") as starts, open(folder / "metrics.jsonl", "a") as metrics:
    starts.write("start\\n")
    starts.flush()
    begun = len((folder / "metrics.jsonl").read_text().splitlines())
    for step in range(begun, int(flags["ticks"])):
        time.sleep(0.1)
        metrics.write(json.dumps({"step": step + 1, "charts/SPS": 0.001}) + "\\n")
        metrics.flush()
    if flags["status"] != "0":
        print("stand_in.py: it broke")
        sys.exit(int(flags["status"]))
    starts.write("end\\n")
(folder / "final.json").write_text("{}")
"""


class Place:
    """A checkout with the launcher and the stand-in alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        for name in ("launch.py", "flags.py", "common.py"):
            (folder / "benchmark").mkdir(exist_ok=True)
            shutil.copy(BENCHMARK / name, folder / "benchmark")
        shutil.copytree(BENCHMARK / "anchors", folder / "benchmark" / "anchors")
        (folder / "cleanrl_sparse").mkdir()
        (folder / "cleanrl_sparse" / "stand_in.py").write_text(STAND_IN)

    def begin(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start the launcher."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RUNS", "DRY", "SMOKE")
        }
        return subprocess.Popen(
            [sys.executable, "benchmark/launch.py", *words],
            text=True,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean | environment,
        )

    def launch(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Return the launcher's status and what it wrote to stdout and stderr."""
        process = self.begin(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def add(self, curve: str, *flags: str) -> None:
        """Add a curve of the stand-in to the grid g."""
        assert self.launch("add", "g", curve, "stand_in.py", *flags)[0] == 0

    def manifest(self, grid: str = "g") -> list[dict]:
        """Return the lines of a manifest."""
        return [json.loads(line) for line in (self.runs / f"{grid}.jsonl").read_text().splitlines()]

    def starts(self) -> list[str]:
        """Return for each run what it wrote about its starts and its end."""
        return [
            " ".join((self.runs / run["folder"] / "starts").read_text().split())
            for run in self.manifest()
        ]

    def wait_for(self, count: int) -> None:
        """Wait until so many runs have begun."""
        for _ in range(200):
            if len([*self.runs.glob("*/metrics.jsonl")]) >= count:
                return
            time.sleep(0.05)
        raise AssertionError("no run began")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_curve_is_every_combination_of_its_values(place: Place) -> None:
    place.add("a", "--env-id", "Pong", "Qbert", "--seed", "1", "2", "3", "--ticks", "7", "--quiet")
    runs = place.manifest()
    assert [(r["flags"]["env-id"], r["flags"]["seed"]) for r in runs] == [
        ("Pong", "1"),
        ("Pong", "2"),
        ("Pong", "3"),
        ("Qbert", "1"),
        ("Qbert", "2"),
        ("Qbert", "3"),
    ]
    assert runs[0]["flags"] == {"env-id": "Pong", "seed": "1", "ticks": "7", "quiet": ""}
    assert (
        len({r["id"] for r in runs}) == 6
        and runs[0]["folder"] == f"Pong__stand_in__1__{runs[0]['id']}"
    )
    place.add(
        "b", "--ticks", "7", "--quiet", "--seed", "1", "--env_id", "Pong"
    )  # in another order, another curve
    place.add("a", "--env-id", "Qbert")  # in place of what it had
    assert [(r["curve"], r["id"] == runs[0]["id"]) for r in place.manifest()] == [
        ("b", True),
        ("a", False),
    ]
    assert place.launch("remove", "g", "b")[0] == 0 and [r["curve"] for r in place.manifest()] == [
        "a"
    ]


def test_the_same_run_has_one_id_however_it_is_written(place: Place) -> None:
    """Defaults given or not, other spellings of a number; a switch and other values make another
    run.
    """
    flags = ["--ticks 6", "--rate 5e-1 --ticks 6 --seed 1", "--env-id Pong --ticks 6e0 --no-quiet"]
    flags += ["--ticks 6 --quiet", "--ticks 7"]
    for i, words in enumerate(flags):
        place.add(str(i), *words.split())
    ids = [run["id"] for run in place.manifest()]
    assert ids[0] == ids[1] == ids[2] and len({*ids}) == 3
    place.launch("add", "g", "5", "stand_in.py", FLAGS="--ticks 7")
    place.launch("add", "g", "6", "stand_in.py", "--ticks", "9", FLAGS="--ticks 7 --quiet")
    assert [run["flags"] for run in place.manifest()[5:]] == [
        {"ticks": "7"},
        {"ticks": "7", "quiet": ""},
    ]
    assert place.manifest()[5]["id"] == ids[4]
    place.launch("add", "g", "7", "stand_in.py", "--quiet", FLAGS="--no-quiet --ticks 6")
    assert place.manifest()[7]["flags"] == {"no-quiet": "", "ticks": "6"}
    assert place.manifest()[7]["id"] == ids[0]


def test_what_is_done_is_left_alone_and_shared(place: Place) -> None:
    place.add("a", "--seed", "1", "2", "3")
    place.add("b", "--seed", "3", "4")
    status, out, err = place.launch("launch", "g", "--workers", "2")
    assert (status, err) == (0, "") and out.splitlines()[-1] == "g: all 4 runs are done"
    assert place.launch("launch", "g")[:2] == (0, "g: all 4 runs are done\n")
    assert place.starts() == ["start end"] * 5
    status, out, _ = place.launch("status", "g")
    assert out.splitlines()[0].split() == [
        "waiting",
        "queued",
        "running",
        "stopped",
        "failed",
        "done",
    ]
    table = [
        f"{curve:3}" + 5 * f"{0:>9}" + f"{done:>9}"
        for curve, done in (("a", 3), ("b", 2), ("all", 4))
    ]
    assert out.splitlines()[1:] == table


def test_two_launchers_start_each_run_once(place: Place) -> None:
    place.add("a", "--seed", *map(str, range(10)), "--ticks", "3")
    both = [place.begin("launch", "g", "--workers", "3") for _ in range(2)]
    assert [(p.communicate()[0].splitlines()[-1], p.returncode) for p in both] == [
        ("g: all 10 runs are done", 0)
    ] * 2
    assert place.starts() == ["start end"] * 10


@pytest.mark.kill
def test_runs_outlive_their_launcher_and_are_not_started_again(place: Place) -> None:
    place.add("a", "--seed", "1", "2", "3", "--ticks", "60")
    first = place.begin("launch", "g", "--workers", "2")
    place.wait_for(2)
    time.sleep(0.5)  # for steps to show
    first.kill()
    first.communicate()
    states = place.launch("status", "g")[1].splitlines()
    assert states[1].split() == ["a", "1", "0", "2", "0", "0", "0"]
    assert re.fullmatch(r"    +\d+%, \d+:\d\d h left", states[4])  # at 0.001 steps per second
    second = place.begin("launch", "g", "--workers", "2")
    time.sleep(0.7)
    assert not (place.runs / place.manifest()[2]["folder"]).exists(), (
        "the two that go on take the room"
    )
    out, _ = second.communicate()
    assert second.returncode == 0
    assert out.startswith("2 runs of other launchers are under way here and count as workers\n")
    assert place.starts() == ["start end"] * 3


@pytest.mark.kill
def test_a_run_that_is_killed_is_named_and_resumed(place: Place) -> None:
    place.add("a", "--seed", "1", "--ticks", "20")
    launcher = place.begin("launch", "g")
    place.wait_for(1)
    os.kill(
        int((place.runs / place.manifest()[0]["folder"] / ".lock").read_text().split()[1]),
        signal.SIGKILL,
    )
    _, err = launcher.communicate()
    assert (
        launcher.returncode == 75
        and f"{place.manifest()[0]['folder']} was killed by signal 9" in err
    )
    assert err.splitlines()[1] == "launch.py: 1 of 1 runs are unfinished; launch again to go on"
    assert place.launch("launch", "g")[0] == 0 and place.starts() == ["start start end"]
    assert (
        len((place.runs / place.manifest()[0]["folder"] / "metrics.jsonl").read_text().splitlines())
        == 20
    )


def test_a_failed_run_is_named_and_waits_for_retry(place: Place) -> None:
    place.add("good", "--seed", "1", "2")
    place.add("bad", "--status", "3")
    bad = place.manifest()[2]["folder"]
    status, _, err = place.launch("launch", "g", "--workers", "2")
    assert (
        status == 1
        and err.splitlines()[0] == f"launch.py: {bad} ended with status 3: stand_in.py: it broke"
    )
    assert err.splitlines()[-1].startswith("launch.py: 1 of 3 runs failed")
    status, _, err = place.launch("launch", "g")
    assert status == 1 and err.splitlines()[0] == f"launch.py: {bad} failed: stand_in.py: it broke"
    assert place.starts() == ["start end", "start end", "start"]
    assert place.launch("status", "g")[1].splitlines()[-2:] == [
        f"failed: {bad}",
        "    stand_in.py: it broke",
    ]
    assert place.launch("retry", "g")[1] == "g: 1 run may start again\n"
    place.launch("launch", "g")
    assert place.starts()[2] == "start start"


def test_a_launcher_at_work_takes_up_what_is_retried(place: Place) -> None:
    place.add("good", "--ticks", "25")
    place.add("bad", "--status", "3")
    bad = place.runs / place.manifest()[1]["folder"]
    launcher = place.begin("launch", "g", "--workers", "2")
    wait_until((bad / ".failed").exists)
    assert place.launch("retry", "g")[0] == 0
    _, err = launcher.communicate()
    assert launcher.returncode == 1 and err.count("ended with status 3: stand_in.py: it broke") == 2
    assert err.splitlines()[-2] == f"launch.py: {bad.name} failed: stand_in.py: it broke"
    assert place.starts() == ["start end", "start start"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.kill) for n in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_a_launcher_that_is_stopped_stops_its_runs_and_goes_on_later(
    place: Place, number: int
) -> None:
    place.add("a", "--env-id", "Pong", "--seed", "1", "2", "3", "--ticks", "15")
    launcher = place.begin("launch", "g", "--workers", "2")
    place.wait_for(2)
    launcher.send_signal(number)
    _, err = launcher.communicate()
    assert (launcher.returncode, err) == (
        75,
        "launch.py: 3 of 3 runs are unfinished; launch again to go on\n",
    )
    assert place.launch("status", "g")[1].splitlines()[1].split() == [
        "a",
        "1",
        "0",
        "0",
        "2",
        "0",
        "0",
    ]
    status, out, _ = place.launch("launch", "g", "--workers", "3")
    assert status == 0 and out.count("] go on with Pong") == 2 and out.count("] begin Pong") == 1
    assert place.starts() == ["start start end"] * 2 + ["start end"]


def test_a_launcher_under_nohup_outlives_its_terminal(place: Place) -> None:
    place.add("a", "--ticks", "15")
    words = ["nohup", sys.executable, "benchmark/launch.py", "launch", "g"]
    launcher = subprocess.Popen(words, cwd=place.folder, stdout=subprocess.PIPE, text=True)
    place.wait_for(1)
    launcher.send_signal(signal.SIGHUP)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and out.splitlines()[-1] == "g: all 1 runs are done"


def test_a_launcher_whose_output_nobody_reads_stops_its_runs(place: Place) -> None:
    """As at `2>&1 | tee log`, where tee dies of the same Ctrl-C."""
    place.add("a", "--env-id", "Pong", "--seed", "1", "2", "--ticks", "600")
    launcher = place.begin("launch", "g", "--workers", "2")
    place.wait_for(2)
    assert launcher.stdout and launcher.stderr
    launcher.stdout.close()
    launcher.stderr.close()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 75
    assert place.launch("status", "g")[1].splitlines()[1].split() == [
        "a",
        "0",
        "0",
        "0",
        "2",
        "0",
        "0",
    ]


def test_cores_and_gpus_are_shared(place: Place) -> None:
    """Two GPUs, two runs each; the threads are the cores over the runs at a time."""
    script = place.folder / "cleanrl_sparse" / "stand_in.py"
    script.write_text(
        script.read_text()
        + "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])\n"
    )
    place.add("a", "--seed", "1", "2", "3", "4", "--ticks", "10")
    environment = {"CUDA_VISIBLE_DEVICES": "2,5", "OMP_NUM_THREADS": ""}
    assert place.launch("launch", "g", "--runs-per-gpu", "2", **environment)[0] == 0
    logs = [(place.runs / run["folder"] / ".log").read_text() for run in place.manifest()]
    assert logs == [f"{gpu} {max(1, len(os.sched_getaffinity(0)) // 4)}\n" for gpu in (2, 5, 2, 5)]


@pytest.mark.kill
def test_a_run_that_outlived_its_launcher_keeps_its_gpu(place: Place) -> None:
    """The next one goes to the other GPU."""
    script = place.folder / "cleanrl_sparse" / "stand_in.py"
    script.write_text(script.read_text() + "print(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    place.add("long", "--ticks", "25")
    place.add("short", "--ticks", "2", "--seed", "2", "3")
    first = place.begin("launch", "g", CUDA_VISIBLE_DEVICES="2,5")
    place.wait_for(2)
    first.kill()
    first.communicate()
    long, *short = [place.runs / run["folder"] for run in place.manifest()]
    wait_until((short[0] / "final.json").exists)
    assert place.launch("launch", "g", CUDA_VISIBLE_DEVICES="2,5")[0] == 0
    assert [(folder / ".log").read_text() for folder in (long, *short)] == ["2\n", "5\n", "5\n"]


def test_a_flag_may_be_the_folder_of_another_curves_run(place: Place) -> None:
    place.add("dense", "--env-id", "Pong", "Qbert", "--seed", "1", "2")
    place.add("ticket", "--env-id", "Qbert", "Pong", "--seed", "2", "--mask", "@dense")
    runs = place.manifest()
    assert [r["flags"]["mask"] for r in runs[4:]] == [
        f"@{runs[3]['folder']}",
        f"@{runs[1]['folder']}",
    ]
    assert place.launch("launch", "g", "--workers", "6")[0] == 0
    mask = json.loads((place.runs / runs[4]["folder"] / "args.json").read_text())["mask"]
    assert mask == f"runs/{runs[3]['folder']}"
    status, _, err = place.launch(
        "add", "g", "ticket", "stand_in.py", "--seed", "9", "--mask", "@dense"
    )
    assert status == 2 and len(err.splitlines()) == 1 and "@dense" in err


def test_another_curves_run_has_the_same_values_given_or_not(place: Place) -> None:
    """However they are written; without --seed both mean 1."""
    place.add("dense", "--seed", "1", "2", "--rate", "0.50", "--env-id", "Pong")
    place.add("ticket", "--rate", "0.5", "--mask", "@dense")
    runs = place.manifest()
    assert runs[2]["flags"]["mask"] == f"@{runs[0]['folder']}"
    words = ("add", "g", "ticket", "stand_in.py", "--rate", "0.6", "--mask", "@dense")
    assert place.launch(*words)[0] == 2
    status, _, err = place.launch("add", "g", "b", "stand_in.py", FLAGS="--seed '1")
    assert (status, err) == (2, "launch.py: FLAGS --seed '1: No closing quotation\n")


def test_dry_prints_commands_and_smoke_makes_the_grid_tiny(place: Place) -> None:
    words = ["add", "g", "a b", "stand_in.py", "--env-id", "Pong", "Qbert", "--seed", "1", "2"]
    status, out, _ = place.launch(*words, DRY="1")
    assert status == 0 and not place.runs.exists() and len(out.splitlines()) == 4
    assert shlex.split(out.splitlines()[3])[:6] == [
        "python",
        "cleanrl_sparse/stand_in.py",
        "--env-id",
        "Qbert",
        "--seed",
        "2",
    ]
    script = place.folder / "cleanrl_sparse" / "fork.py"
    words[3] = "fork.py"  # whatever its name: the flags decide
    script.write_text(STAND_IN.replace("learning_starts", "warm_up"))
    status, _, err = place.launch(*words, SMOKE="yes")
    assert status == 2 and "fork.py has no --learning-starts" in err
    script.write_text(STAND_IN)
    assert place.launch(*words, "3", "--ticks", "4", "5", "6", SMOKE="1", RUNS="elsewhere")[0] == 0
    place.runs = place.folder / "elsewhere" / "smoke"
    tiny = {"env-id": "Pong", "total-timesteps": "2000", "learning-starts": "1900"}
    flags = [tiny | {"seed": seed, "ticks": ticks} for seed in "12" for ticks in "45"]
    assert [run["flags"] for run in place.manifest()] == flags


def test_switches_that_are_off_or_neither(place: Place) -> None:
    place.add("a")
    for value in ("0", "no", "False"):
        status, out, _ = place.launch("status", "g", DRY=value, SMOKE=value)
        assert status == 0 and "waiting" in out
    status, _, err = place.launch("status", "g", SMOKE="maybe")
    assert status == 2 and err == "launch.py: SMOKE=maybe: must be 1 or 0\n"


def test_one_name_for_one_environment(place: Place) -> None:
    """What a script takes for the same game is the same run, in a folder of the same name."""
    (place.folder / "cleanrl_sparse" / "dqn_atari.py").write_text(STAND_IN)
    (place.folder / "cleanrl_sparse" / "sac.py").write_text(STAND_IN)
    names = ["ms_pacman", "MsPacman", "ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4"]
    for name in names:
        place.launch("add", "g", name, "dqn_atari.py", "--env-id", name)
    place.launch("add", "g", "b", "sac.py", "--env-id", "Hopper")
    place.launch("add", "g", "c", "sac.py", "--env-id", "Hopper-v5")
    status, _, err = place.launch("add", "g", "d", "sac.py", "--env-id", "Hopper", "Hopper-v5")
    assert status == 2 and err == "launch.py: Hopper-v5: twice in --env-id\n"
    place.launch("add", "g", "e", "stand_in.py", "--env-id", "x" * 300)
    folders = [run["folder"] for run in place.manifest()]
    assert len({*folders[:4]}) == 1 and folders[0].startswith("MsPacman__")
    assert len({*folders[4:6]}) == 1 and folders[4].startswith("Hopper-v5__")
    assert len(folders[6]) < 200


def test_a_failure_is_named_by_its_error(place: Place) -> None:
    """Of the box that tyro draws around a bad flag, not its border."""
    script = place.folder / "cleanrl_sparse" / "boxed.py"
    lines = ["╭─ Parsing error ─╮", "│ invalid choice: 3 │", "│ ──── │", "│ See --help │", "╰────╯"]
    box = "\n".join(lines)
    flags = "    seed: int = 1\n    total_timesteps: int = 1\n"
    script.write_text(f"class Args:\n{flags}raise SystemExit({box!r})\n")
    place.launch("add", "g", "a", "boxed.py")
    status, _, err = place.launch("launch", "g")
    assert status == 1 and "ended with status 1: invalid choice: 3" in err


def stand_ins(folder: Path, **changes: str) -> dict[str, str]:
    """Write stand-ins for Slurm's programs, return the environment that finds them; test_slurm.py
    has the real ones.
    """
    programs = {
        "scontrol": "echo MaxArraySize = 1001",
        "squeue": "",
        "sbatch": "cat > submitted; echo 1",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (programs | changes).items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


SLURM = ("launch", "g", "--backend", "slurm", "--poll-seconds", "1")


def test_a_task_of_a_tiny_grid_finds_it_whatever_the_grid_has_become(
    place: Place, tmp_path: Path
) -> None:
    environment = stand_ins(tmp_path) | {"SMOKE": "1"}
    place.launch("add", "g", "a", "stand_in.py", **environment)
    status, out, err = place.launch(*SLURM, **environment)
    assert (
        status == 75
        and "job array 1: 1 tasks" in out
        and err.splitlines()[0].endswith("left the queue: ")
    )
    place.launch("add", "g", "a", "stand_in.py", "--seed", "7", **environment)
    task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1"}
    subprocess.run(
        ["bash", "submitted"], check=True, cwd=tmp_path, env=os.environ | environment | task
    )
    (final,) = place.runs.glob("smoke/*/final.json")
    assert final.parent.name.startswith("Pong__stand_in__1__")


def test_jobs_of_another_folder_of_runs_are_not_taken_for_ours(
    place: Place, tmp_path: Path
) -> None:
    environment = stand_ins(tmp_path)
    for runs in ("one", "two"):
        place.launch("add", "g", "a", "stand_in.py", RUNS=runs, **environment)
        place.launch(*SLURM, RUNS=runs, **environment)
    names = [next((tmp_path / runs / ".slurm").glob("*.tasks")).stem for runs in ("one", "two")]
    assert names[0] != names[1]
    stand_ins(tmp_path, squeue=f"echo {names[0]} 0")
    queued = [
        place.launch("status", "g", RUNS=runs, **environment)[1].splitlines()[1]
        for runs in ("one", "two")
    ]
    assert [line.split()[1:3] for line in queued] == [["0", "1"], ["1", "0"]]


def test_status_without_slurm_says_so(place: Place, tmp_path: Path) -> None:
    environment = stand_ins(tmp_path)
    place.add("a")
    place.launch(*SLURM, **environment)
    stand_ins(tmp_path, squeue="echo squeue: fatal: no controller >&2; exit 1")
    status, out, err = place.launch("status", "g", **environment)
    assert status == 0 and out.splitlines()[1].split() == ["a", "1", "0", "0", "0", "0", "0"]
    assert err.splitlines() == [
        "launch.py: squeue: fatal: no controller",
        "launch.py: what is queued under Slurm is not known, and shown as waiting",
    ]


def test_what_slurm_does_not_take_waits_for_a_later_launch(place: Place, tmp_path: Path) -> None:
    once = (
        "[ -e submitted ] && { echo sbatch: error: too many jobs >&2; exit 1; }; cat > "
        "submitted; echo 1"
    )
    environment = stand_ins(tmp_path, scontrol="echo MaxArraySize = 2", sbatch=once)
    place.add("a", "--seed", "1", "2", "3", "4", "5")
    status, _, err = place.launch(*SLURM, **environment)
    folders = [run["folder"] for run in place.manifest()]
    assert (status, err.splitlines()) == (
        75,
        [
            "launch.py: sbatch: error: too many jobs",
            "launch.py: 3 runs are for a later launch",
            *(f"launch.py: {folder} left the queue: " for folder in folders[:2]),
            "launch.py: 5 of 5 runs are unfinished; launch again to go on",
        ],
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["add", "g", "a", "stand_in.py", "--sed", "1"],
            "--sed: stand_in.py has no such flag; --seed is one",
        ),
        (["add", "g", "a", "stand_in.py", "--seed", "1", "--seed", "2"], "--seed: given twice"),
        (
            ["add", "g", "a", "stand_in.py", "--seed=1"],
            "--seed=1: stand_in.py has no such flag; --seed is one, to be",
        ),
        (["add", "g", "a", "stand_in.py", "--seed", "1", "2", "1"], "1: twice in --seed"),
        (["add", "g", "a", "stand_in.py", "--seed", "1e3", "1000"], "1000: twice in --seed"),
        (
            ["add", "g", "a", "stand_in.py", "--no-quiet", "1"],
            "--no-quiet: a switch, which takes no value",
        ),
        (["add", "g", "a", "stand_in.py", "--seed", "1.5"], "--seed 1.5: must be an integer"),
        (["add", "g", "a", "stand_in.py", "--rate", "fast"], "--rate fast: must be a number"),
        (["add", "g", "a", "stand_in.py", "--share", "7"], "--share 7: must be in [0, 1]"),
        (["add", "g", "a", "stand_in.py", "--share", "nan"], "--share nan: must be in [0, 1]"),
        (["add", "g", "a", "stand_in.py", "--count", "0e5"], "--count 0: must be at least 1"),
        (["add", "g", "a", "stand_in.py", "--kind", "c"], "--kind c: must be one of a, b"),
        (["add", "g", "a", "stand_in.py", "--seed"], "--seed: a value is missing"),
        (["add", "g", "a", "stand_in.py", "--mask", ""], "--mask: a value is missing"),
        (["add", "g", "a", "stand_in.py", "--no-seed"], "--no-seed: stand_in.py has no such flag"),
        (["add", "g", "a", "stand_in.py", "--quiet", "--no-quiet"], "--no-quiet: given twice"),
        (["launch", "g", "--workers", "0"], "--workers 0: must be at least 1"),
        (["add", "g", "a", "stand_in.py", "--limit", "1"], "--limit: stand_in.py has no such flag"),
        (["launch", "g", "--runs-per-job", "4"], "--runs-per-job is for --backend slurm"),
        (
            ["launch", "g", "--backend", "slurm", "--workers", "4"],
            "--workers is for --backend local",
        ),
        (["remove", "g", "b"], "b: g has the curves a"),
        (
            ["add", "g", "a", "stand_in.py", "--run-dir", "x"],
            "--run-dir: stand_in.py has no such flag",
        ),
        (["add", "g", "a", "stand_in.py", "1"], "1: expected --flag VALUE"),
        (
            ["add", "g", "a", "stand.py"],
            "stand.py: no training script of cleanrl_sparse/, which has",
        ),
        (["add", "g", "a", "tool.py"], "tool.py: no training script of cleanrl_sparse/, which has"),
        (
            ["launch", "g", "--backend", "slurm", "--sbatch", "it's"],
            "--sbatch it's: No closing quotation",
        ),
        (["add", "g/h", "a", "stand_in.py"], "add g/h: GRID must be of letters"),
        (["launch", "h"], "runs/h.jsonl is not there; grids in runs: broken, g"),
        (["status", "broken"], "runs/broken.jsonl is no manifest"),
    ],
)
def test_bad_input_gets_one_line(place: Place, words: list[str], told: str) -> None:
    place.add("a")
    (place.folder / "cleanrl_sparse" / "tool.py").write_text("class Args:\n    seed: int = 1\n")
    (place.folder / "scontrol").write_text("#!/bin/sh\necho MaxArraySize = 1001\n")
    (place.folder / "squeue").write_text("#!/bin/sh\n")
    for name in ("scontrol", "squeue"):
        (place.folder / name).chmod(0o755)
    (place.runs / "broken.jsonl").write_text('{"a": 1}\n')
    before = place.manifest()
    status, _, err = place.launch(*words, PATH=f"{place.folder}:{os.environ['PATH']}")
    assert status == 2 and told in err and len(err.splitlines()) == 1 and place.manifest() == before


def test_ranges_are_those_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each type of flags has the range in all scripts that `add` knows it by."""
    monkeypatch.syspath_prepend(BENCHMARK)
    known, seen = load_benchmark("flags").RANGES, set()
    for path in SCRIPTS.glob("*.py"):
        script = load_script(path.stem)
        for name, kind in vars(script).items():
            bounds = getattr(kind, "__metadata__", ((),))[0]
            if isinstance(bounds, tuple) and len(bounds) == 3:
                assert known[name] == bounds, (path.stem, name)
                seen.add(name)
    assert seen == {*known}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What DRY=1 of every figure's script prints.

    A stand-in for Python writes down the command lines, which then are done in this process: to
    start Python 300 times would take a minute.
    """
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "python").write_text("#!/bin/bash\nprintf '%q ' \"$@\"; echo\n")
    (folder / "python").chmod(0o755)
    clean = {name: text for name, text in os.environ.items() if name not in ("SMOKE", "FLAGS")}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SMOKE", "FLAGS"):
            patch.delenv(name, raising=False)
        patch.setenv("DRY", "1")
        patch.syspath_prepend(str(BENCHMARK))
        launch, plot = load_benchmark("launch"), load_benchmark("plot")
        found = dict[str, list[str]]()
        for figure in LISTS:
            path = f"{folder}{os.pathsep}{os.environ['PATH']}"
            called = dry(figure, clean | {"PATH": path})
            with contextlib.redirect_stdout(io.StringIO()) as out:
                for program, *words in map(shlex.split, called):
                    if program == "benchmark/launch.py":
                        assert launch.main(words) == 0
                    else:
                        patch.setattr(sys, "argv", [program, *words])
                        plot.main(tyro.cli(plot.Args))
            found[figure] = out.getvalue().splitlines()
    return found


def dry(figure: str, environment: dict[str, str]) -> list[str]:
    """Return what a figure's script prints with DRY=1."""
    words, environment = [BENCHMARK / f"{figure}.sh"], environment | {"DRY": "1"}
    result = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def commands(lines: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """The commands of every figure's script, the launcher's and the plotter's among them."""
    return {figure: [shlex.split(line) for line in own] for figure, own in lines.items()}


@pytest.mark.parametrize("figure", ["gmp_figure13", "eaudesac_mujoco"])
def test_a_script_prints_its_commands(figure: str, lines: dict[str, list[str]]) -> None:
    """With Python itself, as a user does it."""
    clean = {name: text for name, text in os.environ.items() if name not in ("SMOKE", "FLAGS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert dry(figure, clean | {"PATH": path}) == lines[figure]


def test_the_figures_commands_are_accepted_by_their_scripts(
    commands: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags and values; of the runs of a curve, which differ in game and seed, the first with each
    other value.
    """
    for figure, lines in commands.items():
        training = [words for words in lines if words[1].startswith("cleanrl_sparse/")]
        assert (
            training and [words[1] for words in lines[len(training) :]][-1] == "benchmark/plot.py"
        ), figure
        tried = set()
        for words in training:
            flags = (
                dict(zip(words[2::2], words[3::2]))
                if "--prune-actor" not in words
                else {"--prune-actor": ""}
            )
            kind = (
                words[1],
                *sorted(
                    (k, v) for k, v in flags.items() if k not in ("--env-id", "--seed", "--run-dir")
                ),
            )
            if kind not in tried:
                tried.add(kind)
                name = Path(words[1]).stem
                monkeypatch.setattr(sys, "argv", words[1:])
                (sys.modules.get(name) or load_script(name)).parse()


# The games and tasks of the two papers' figures, by the number that figures.csv has for them.
EAU_GAMES = {
    *("BeamRider", "MsPacman", "Qbert", "Pong", "Enduro", "SpaceInvaders", "Assault"),
    *("CrazyClimber", "Boxing", "VideoPinball"),
}
MANY: dict[str, object] = {"15": FIFTEEN_GAMES, "10": EAU_GAMES, "60": 60}
SHORT = {
    "DQN": "dqn_atari_gmp",
    "RAINBOW": "rainbow_resnet_gmp",
    "BASELINES": "dqn_atari_baselines",
    "EAU": "eaudeqn_atari",
    "SAC": "sac_mujoco_gmp",
    "EAUSAC": "sac_mujoco_eaudeqn",
    "CQL": "cql_offline_snip",
    "EAUCQL": "cql_atari_eaudeqn",
    "GMPCQL": "cql_atari_gmp",
    "MINIDQN": "dqn_minatar_gmp",
    "MINIEAU": "eaudeqn_minatar",
}
with open(BENCHMARK / "figures.csv", newline="") as table:
    LISTS = {row["figure"]: row for row in csv.DictReader(table)}


def test_every_figure_has_its_lists() -> None:
    """And there is no other script. One of your own is welcome, in a folder of its own or with its
    lists here.
    """
    assert sorted(LISTS) == sorted(path.stem for path in BENCHMARK.glob("*.sh"))


@pytest.mark.parametrize("figure", sorted(LISTS))
def test_the_figures_lists_are_the_papers(
    figure: str, commands: dict[str, list[list[str]]]
) -> None:
    """benchmark/figures.csv, written by hand from the papers: how many runs of each script, which
    games or tasks, every other flag with all its values; seeds are 1 to 5 where none are named.
    """
    row = LISTS[figure]
    text, games, flags = row["runs"], MANY.get(row["games"], {*row["games"].split()}), row["flags"]
    counts = {
        f"cleanrl_sparse/{SHORT[name]}.py": int(runs)
        for name, runs in zip(*[iter(text.split())] * 2)
    }
    training = [words for words in commands[figure] if words[1].startswith("cleanrl_sparse/")]
    assert Counter(words[1] for words in training) == counts
    assert len({words[words.index("--run-dir") + 1] for words in training}) == len(training)
    seen = dict[str, set[str]]()
    for words in training:
        for flag, value in itertools.pairwise([*words[2:], "--"]):
            if flag.startswith("--"):
                seen.setdefault(flag[2:], set()).update([] if value.startswith("--") else [value])
    found = seen.pop("env-id", set())
    assert found == games or len(found) == games
    wanted = {"seed": {*"12345"}}
    for flag in flags.split("; "):
        name, *values = flag.split()
        wanted[name] = {*values}
    del seen["run-dir"]
    seen.pop("lottery-mask", None)
    assert seen == wanted
    header = (BENCHMARK / f"{figure}.sh").read_text()
    assert f"# {len(training):,} runs of" in header and 10 <= len(header.splitlines()) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("figure", LISTS)
def test_a_tiny_version_of_the_figure_ends_with_its_picture(figure: str, tmp_path: Path) -> None:
    environment = os.environ | {"SMOKE": "1", "RUNS": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        [BENCHMARK / f"{figure}.sh"], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    tmp_path /= "smoke"
    assert (tmp_path / f"{figure}.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / f"{figure}.md"
    ).exists()
    with open(tmp_path / f"{figure}.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    own = [float(row["sparsity_target"] or 0) for row in rows if row["curve"].startswith("EauDe")]
    assert len(rows) > 1 and (not own or max(own) > 0), "Eau De Q-Network prunes in it too"


@pytest.mark.slow
def test_a_grid_that_is_killed_at_random_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL for the launcher or for a run, six times; then the models are the same, byte for
    byte.
    """
    choice, grids = random.Random(0), []
    flags = [
        "--env-id",
        "Pendulum-v1",
        "--seed",
        "1",
        "2",
        "3",
        "4",
        "--width",
        "1",
        "--total-timesteps",
        "1500",
    ]
    flags += [
        "--learning-starts",
        "200",
        "--batch-size",
        "32",
        "--prune-every",
        "50",
        "--eval-episodes",
        "1",
    ]
    flags += ["--checkpoint-minutes", "0.01", "--sparsity", "0.9"]
    for name in ("whole", "killed"):
        environment = os.environ | {"RUNS": str(tmp_path / name)}
        launch = [sys.executable, BENCHMARK / "launch.py"]
        subprocess.run(
            [*launch, "add", "g", "SAC", "sac_mujoco_gmp.py", *flags], check=True, env=environment
        )
        for _ in range(6 if name == "killed" else 0):
            launcher = subprocess.Popen([*launch, "launch", "g", "--workers", "2"], env=environment)
            time.sleep(choice.uniform(3, 9))
            if choice.random() < 0.5:
                launcher.kill()
            else:
                locks = sorted(
                    (tmp_path / name).glob("*/.lock"), key=lambda lock: lock.stat().st_mtime
                )
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(locks[-1].read_text().split()[1]), signal.SIGKILL)
                launcher.send_signal(signal.SIGTERM)
            launcher.wait()
        assert (
            subprocess.run(
                [*launch, "launch", "g", "--workers", "2"], env=environment, check=False
            ).returncode
            == 0
        )
        runs = [json.loads(line) for line in (tmp_path / name / "g.jsonl").read_text().splitlines()]
        for run in runs:  # what it says once, at its end, is said once
            log = (tmp_path / name / run["folder"] / ".log").read_text()
            assert log.count("finished 1500 steps") == 1, log
        grids.append(
            [(tmp_path / name / run["folder"] / "model.safetensors").read_bytes() for run in runs]
        )
    assert grids[0] == grids[1] and len(set(grids[0])) == 4


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_figures_scripts_pass_shellcheck() -> None:
    """SC2086 aside: the lists are meant to be split into words."""
    subprocess.run(["shellcheck", "-e", "SC2086", *BENCHMARK.glob("*.sh")], check=True)
