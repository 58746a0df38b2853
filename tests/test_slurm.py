"""benchmark/launch.py on a real Slurm cluster: real training runs, a preemption, a time limit, a
fault, 7,200 runs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from conftest import SCRIPTS
from slurm import Cluster, missing
from test_runs import (
    TINY,
    Output,
    Process,
    assert_learned,
    assert_same_run,
    saved_steps,
    wait_until,
)

LACKS = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(LACKS), reason=f"no Slurm: {', '.join(LACKS)}"),
]

LAUNCHER = SCRIPTS.parent / "benchmark" / "launch.py"
SCRIPT = "sac_mujoco_gmp"
FLAGS = f"--env-id Pendulum-v1 {TINY[SCRIPT]}"
LONG = FLAGS.replace("--total-timesteps 300", "--total-timesteps {}")
GRACE, KILL_WAIT = 60, 20  # seconds; far more than a checkpoint takes here
UNDER_WAY = {"PENDING", "RUNNING", "COMPLETING"}
STATES = dict.fromkeys(["waiting", "queued", "running", "stopped", "failed", "done"], 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four CPUs, which the machine need not have."""
    with Cluster(
        tmp_path_factory.mktemp("slurm") / "cluster", cpus=4, grace=GRACE, kill_wait=KILL_WAIT
    ) as cluster:
        yield cluster


class Place:
    """A folder of runs and the launcher for it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.runs = cluster, folder, folder / "there"
        self.begun: list[Process] = []

    def begin(self, command: str, **environment: str) -> Process:
        """Start the launcher."""
        there = self.cluster.environment
        environment |= {
            "RUNS": str(self.runs),
            "SLURM_CONF": there["SLURM_CONF"],
            "PATH": there["PATH"],
        }
        self.begun.append(Process(LAUNCHER, command, cwd=self.folder, fresh=True, **environment))
        return self.begun[-1]

    def call(self, command: str, status: int = 0, **environment: str) -> Output:
        """Run the launcher to its end."""
        output = self.begin(command, **environment).wait()
        assert output.status == status and "Traceback" not in output.stderr, output
        return output

    def add(self, grid: str, curve: str, flags: str) -> list[Path]:
        """Add a curve to a grid; return the folders of its runs."""
        self.call(f"add {grid} {curve} {SCRIPT}.py {flags}")
        lines = map(json.loads, (self.runs / f"{grid}.jsonl").read_text().splitlines())
        return [self.runs / line["folder"] for line in lines if line["curve"] == curve]

    def jobs(self, stdout: str) -> list[str]:
        """Return the job arrays that a launcher submitted."""
        return re.findall(r"^job array (\d+):", stdout, re.MULTILINE)

    def starts(self) -> list[tuple[str, str]]:
        """Return what the tasks say that they did: ("begin" or "go on with", the run's folder)."""
        logs = "".join(path.read_text() for path in sorted((self.runs / ".slurm").glob("*.log")))
        return re.findall(r"^\[.*\] (begin|go on with) (\S+)$", logs, re.MULTILINE)


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Place]:
    """A Place, whose launchers and jobs end with the test."""
    place = Place(cluster, tmp_path)
    yield place
    for process in place.begun:
        process.popen.kill()
        process.popen.wait()
    wait_until(
        lambda: not (cluster.call("scancel", "--user=root") or cluster.call("squeue", "--noheader"))
    )


def facts(cluster: Cluster, job: str) -> list[dict[str, str]]:
    """Return what Slurm knows of a job, one dictionary for each task of an array, in order."""
    lines = cluster.call("scontrol", "--oneliner", "show", "job", job).splitlines()
    tasks = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    return sorted(tasks, key=lambda task: int(task.get("ArrayTaskId", 0)))


def ended(cluster: Cluster, job: str) -> list[dict[str, str]]:
    """Return what Slurm knows of a job when it has ended, which is a little later than its runs."""
    wait_until(lambda: all(task["JobState"] not in UNDER_WAY for task in facts(cluster, job)))
    return facts(cluster, job)


def command_line(pid: int) -> bytes:
    """Return a process's command, empty if it has ended."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def begun(folder: Path) -> bool:
    """Tell whether a run has written a record."""
    return (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0


def stopped_at(folder: Path) -> list[int]:
    """Return the steps at which a run says that it stopped with a checkpoint."""
    return [
        int(step)
        for step in re.findall(
            r"stopped at step (\d+); continue with", (folder / ".log").read_text()
        )
    ]


def says(process: Process, pattern: str) -> bool:
    """Tell whether a process has printed something."""
    return re.search(pattern, process.out.read_text(), re.MULTILINE) is not None


def table(output: Output) -> dict[str, dict[str, int]]:
    """Return what `status` prints: the number of runs in each state, by curve."""
    states, *lines = output.stdout.splitlines()
    rows = [line.split() for line in lines if re.fullmatch(r"\S+( +\d+)+", line)]
    return {curve: dict(zip(states.split(), map(int, numbers))) for curve, *numbers in rows}


def test_two_clusters_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    """They know nothing of each other, and what a job leaves behind ends with its cluster."""
    (before,) = facts(cluster, cluster.call("sbatch", "--parsable", "--hold", "--wrap=true"))
    with Cluster(tmp_path / "cluster", cpus=1) as other:
        job = other.call(
            "sbatch", "--parsable", "--output=/dev/null", "--wrap=setsid sleep 1000 & sleep 1000"
        )
        wait_until(lambda: facts(other, job)[0]["JobState"] == "RUNNING")
        assert facts(other, job)[0]["NumCPUs"] == "1" and facts(other, job)[0]["JobName"] == "wrap"
        wait_until(
            lambda: len([pid for pid in other.processes() if b"1000" in command_line(pid)]) >= 2
        )
        processes = other.processes()
        assert not {*processes} & {*cluster.processes()}
    assert not other.processes() and not [pid for pid in processes if b"1000" in command_line(pid)]
    assert facts(cluster, before["JobId"]) == [before]
    cluster.call("scancel", before["JobId"])


def test_an_array_runs_each_run_once(cluster: Cluster, place: Place) -> None:
    folders = place.add("once", "curve", f"{FLAGS} --seed 1 2 3")
    output = place.call("launch once --backend slurm --time 30 --runs-per-job 2 --poll-seconds 1")
    assert "once: all 3 runs are done" in output.stdout
    (job,) = place.jobs(output.stdout)
    tasks = ended(cluster, job)
    assert [(task["JobState"], task["Restarts"], task["NumCPUs"]) for task in tasks] == [
        ("COMPLETED", "0", "2")
    ] * 2
    assert len(folders) == len({*folders}) == 3
    assert sorted(place.starts()) == sorted(("begin", folder.name) for folder in folders)
    for seed, folder in enumerate(folders, 1):
        assert_learned(folder)
        assert json.loads((folder / "args.json").read_text())["seed"] == seed
        assert (folder / ".log").read_text().count('"status": "finished"') == 1
    again = place.call("launch once --backend slurm --time 30 --poll-seconds 1")
    assert "once: all 3 runs are done" in again.stdout and not place.jobs(again.stdout)


def test_a_launcher_inside_a_job_of_a_careful_site(place: Place) -> None:
    """What its own job was given is no matter of those that it submits; and jobs do not inherit the
    environment.
    """
    (folder,) = place.add("inside", "curve", FLAGS)
    launch = "launch inside --backend slurm --time 30 --poll-seconds 1"
    output = place.call(launch, SLURM_MEM_PER_CPU="100", SLURM_NTASKS="2", SBATCH_EXPORT="NONE")
    assert "inside: all 1 runs are done" in output.stdout
    assert_learned(folder)


def test_a_preempted_run_goes_on_as_if_nothing_had_been(cluster: Cluster, place: Place) -> None:
    steps, straight = 3000, place.folder / "straight"
    flags = LONG.format(steps) + " --seed 5"
    (folder,) = place.add("preempted", "curve", flags)
    alone = Process(SCRIPT, flags, f"--run-dir {straight}", cwd=place.folder)
    process = place.begin(
        "launch preempted --backend slurm --time 30 --partition low --poll-seconds 1"
    )
    process.when(partial(begun, folder))
    high = cluster.call(
        "sbatch", "--parsable", "-p", "high", "-c", "4", "--output=/dev/null", "--wrap=true"
    )
    output = process.wait()
    assert output.status == 0 and "preempted: all 1 runs are done" in output.stdout, output
    (step,) = stopped_at(folder)
    assert 0 < step < steps
    assert place.starts() == [("begin", folder.name), ("go on with", folder.name)]
    (job,) = place.jobs(output.stdout)
    (task,), (other,) = ended(cluster, job), ended(cluster, high)
    assert (task["ArrayTaskId"], task["Restarts"], task["JobState"]) == ("0", "1", "COMPLETED")
    assert other["JobState"] == "COMPLETED"
    waited = datetime.fromisoformat(other["StartTime"]) - datetime.fromisoformat(
        other["SubmitTime"]
    )
    assert waited.total_seconds() < GRACE / 2, (
        "the run was told at the beginning of its grace, not at the end"
    )
    assert alone.wait().status == 0
    assert_same_run(folder, straight)


def test_a_run_at_its_time_limit_goes_on_and_a_cancelled_one_does_not(
    cluster: Cluster, place: Place
) -> None:
    """Slurm looks at the limits every half minute and tells half a minute early, here 30 to 60 s
    after a start.
    """
    (folder,) = place.add("limited", "curve", LONG.format(10**6))
    process = place.begin(
        "launch limited --backend slurm --time 2 --seconds-to-stop 60 --poll-seconds 1"
    )
    process.when(lambda: ("go on with", folder.name) in place.starts())
    (job,) = place.jobs(process.out.read_text())
    (step,) = stopped_at(folder)
    size = (folder / "metrics.jsonl").stat().st_size
    process.when(lambda: (folder / "metrics.jsonl").stat().st_size > size)
    (task,) = facts(cluster, job)
    assert (task["JobState"], task["Restarts"]) == ("RUNNING", "1") and 0 < step <= saved_steps(
        folder
    )[0]
    cluster.call("scancel", job)
    wait_until(lambda: facts(cluster, job)[0]["JobState"] not in ("RUNNING", "COMPLETING"))
    (task,) = facts(cluster, job)
    assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "1")
    output = process.wait()
    first, second = stopped_at(folder)
    assert first == step < second == saved_steps(folder)[-1], "it leaves a checkpoint all the same"
    assert (
        output.status == 75
        and f"{folder.name} left the queue: {SCRIPT}.py: stopped" in output.stderr
    )
    assert table(place.call("status limited"))["curve"] == STATES | {"stopped": 1}


def test_a_failing_run_is_reported(cluster: Cluster, place: Place) -> None:
    (good,) = place.add("faulty", "good", FLAGS)
    (bad,) = place.add("faulty", "bad", f"{FLAGS} --reward-scale 1e38")
    launch = "launch faulty --backend slurm --time 30 --poll-seconds 1"
    output = place.call(launch, status=1)
    line = (bad / ".log").read_text().strip().splitlines()[-1]
    assert line.startswith(f"{SCRIPT}.py: step 104: the losses are [inf, ")
    assert (
        f"launch.py: {bad.name} failed: {line}\n" in output.stderr
        and good.name not in output.stderr
    )
    assert "1 of 2 runs failed" in output.stderr
    assert_learned(good)
    (job,) = place.jobs(output.stdout)
    states = {task["JobState"]: task for task in ended(cluster, job)}
    assert states.keys() == {"COMPLETED", "FAILED"}
    assert (states["FAILED"]["ExitCode"], states["FAILED"]["Restarts"]) == ("1:0", "0")
    again = place.call(launch, status=1)
    assert f"{bad.name} failed: {line}\n" in again.stderr and not place.jobs(again.stdout)
    assert place.call("retry faulty").stdout == "faulty: 1 run may start again\n"
    refused = place.call(f"{launch} --partition nowhere", status=2)
    assert "launch.py: sbatch: " in refused.stderr and "nowhere" in refused.stderr
    assert table(place.call("status faulty")) == {
        "good": STATES | {"done": 1},
        "bad": STATES | {"stopped": 1},
        "all": STATES | {"stopped": 1, "done": 1},
    }
    assert len(place.jobs(place.call(launch, status=1).stdout)) == 1
    assert Counter(place.starts()) == Counter(
        [("begin", good.name), ("begin", bad.name), ("go on with", bad.name)]
    )


def test_7200_runs_are_arrays_that_slurm_accepts(cluster: Cluster, place: Place) -> None:
    """Of 1,001 tasks at most, and submitted once though two launchers run."""
    place.add("large", "curve", f"{FLAGS} --seed {' '.join(map(str, range(1, 7201)))}")
    launch = "launch large --backend slurm --partition down --time 30 --poll-seconds 1"
    launchers = [place.begin(launch) for _ in range(2)]
    for process in launchers:
        process.when(partial(says, process, "^7200 "))
    arrays = cluster.call("squeue", "--noheader", "--format=%K").splitlines()
    assert Counter(arrays) == {"0-1000": 7, "0-192": 1}
    assert len(cluster.call("squeue", "--noheader", "--array").splitlines()) == 7200
    files = (place.runs / ".slurm").glob("*.tasks")
    runs = [line for file in files for line in file.read_text().splitlines()]
    assert len(runs) == len({*runs}) == 7200 and all(
        re.fullmatch("[0-9a-f]{12}", run) for run in runs
    )
    assert table(place.call("status large"))["curve"] == STATES | {"queued": 7200}
    cluster.call("scancel", "--partition=down")
    for process in launchers:
        output = process.wait()
        assert (
            output.status == 75
            and "7200 of 7200 runs are unfinished; launch again" in output.stderr
        )
    assert sorted(len(place.jobs(process.out.read_text())) for process in launchers) == [0, 8]
    assert table(place.call("status large"))["curve"] == STATES | {"waiting": 7200}
