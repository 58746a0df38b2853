"""Run a grid of training runs, here or under Slurm, and resume it after an interruption.

    launch.py add GRID CURVE SCRIPT --flag VALUE ...    add a curve: a run for
                                                        each combination
    launch.py launch GRID    run what is not done; again: go on
    launch.py status GRID    what waits, runs (time left), failed, is done
    launch.py retry GRID     let failed runs start again
    launch.py remove GRID CURVE    take a curve out; its runs' folders stay

A grid is a manifest, RUNS/GRID.jsonl, with one line of JSON per run: id (a
hash of script and flags, defaults left out), curve, script, flags and folder.
A run's state is read from its folder, RUNS/FOLDER, alone. final.json: done;
.lock held: running; .failed: failed, until `retry`; args.json: stopped, to be
resumed; nothing: waiting. Grids that ask for the same run share it. The run
itself holds the lock: it is not started twice even if its launcher is killed.

RUNS is the environment variable of that name, else runs. FLAGS is added to
the flags of every run, such as FLAGS="--num-envs 8". DRY=1 prints the commands
and does nothing. SMOKE=1 makes a tiny grid in RUNS/smoke: the script's own
environment, two values of every list, a few gradient steps.

Exit status: 0 all runs are done, 1 some failed (`status` names them), 2 bad
input, 75 stopped: launch again to go on.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from common import canonical, outlive_readers, refuse, runs_folder, say, switch
from flags import SCRIPTS, flags_of, identity, normal, tiny, values_of

DRY, SMOKE, RUNS = switch("DRY"), switch("SMOKE"), runs_folder()
HOST = os.uname().nodename
STOPPED = 75  # exit status of a run that was asked to stop and left a checkpoint
STATES = ("waiting", "queued", "running", "stopped", "failed", "done")
ENDED = ("failed", "done")


class TrainingRun(NamedTuple):
    """One line of a manifest."""

    id: str
    curve: str
    script: str
    flags: dict[str, str]  # without --; "" is a switch, @FOLDER the folder of another run
    folder: str

    @property
    def path(self) -> Path:
        """The run's folder."""
        return RUNS / self.folder

    @property
    def state(self) -> str:
        """One of STATES, read from the folder; queued is what only Slurm knows."""
        if (self.path / "final.json").exists():
            return "done"
        if not self.path.exists():
            return "waiting"
        with suppress(FileNotFoundError), open(self.path / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "running"
        if (self.path / ".failed").exists():
            return "failed"
        return "stopped" if (self.path / "args.json").exists() else "waiting"

    @property
    def gpu_here(self) -> str | None:
        """Which GPU it is running on, "" for none; None if it is not running on this machine."""
        if self.state != "running":
            return None
        host, _, gpu, *_ = [*(self.path / ".lock").read_text().split(), "", "", ""]
        return gpu if host == HOST else None

    @property
    def progress(self) -> str:
        """The share of a begun run that is done, and the time left at its latest speed."""
        try:
            total = json.loads((self.path / "args.json").read_text())["total_timesteps"]
            with open(self.path / "metrics.jsonl", "rb") as file:
                start = file.seek(max(0, os.path.getsize(file.name) - 65536))
                lines = file.read().split(b"\n")[start > 0 : -1]  # first and last may be cut
            records = [json.loads(line) for line in lines]
            step = records[-1]["step"]
            speed = [r["charts/SPS"] for r in records if "charts/SPS" in r][-1]
        except (OSError, LookupError, ValueError):
            return "just begun"
        hours, minutes = divmod(round((total - step) / max(speed, 1e-9) / 60), 60)
        return f"{step / total:4.0%}, {hours}:{minutes:02} h left"

    def command(self) -> list[str]:
        """Return the arguments that start the run, after the script's name."""
        words = []
        for name, value in self.flags.items():
            value = str(RUNS / value[1:]) if value[:1] == "@" else value
            words += [f"--{name}", value] if value else [f"--{name}"]
        return [*words, "--run-dir", str(self.path)]


def last_line(log: Path) -> str:
    """Return a log's last line that is not blank, "" if there is none; of tyro's box about a bad
    flag, its first line.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4096))
            text = file.read().decode(errors="replace").rstrip()
    except OSError:
        return ""
    box = text.rpartition("╭")[2].split("\n")[1:]
    lines = box if text.endswith("╯") else reversed(text.split("\n"))
    return next((said for line in lines if (said := line.strip(" \r│"))), "")


def lock(path: Path) -> IO[str]:
    """Lock a file until it is closed: one launcher at a time writes a manifest or submits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def read(grid: str) -> list[TrainingRun]:
    """Return the runs of a grid's manifest; a run that two curves share comes twice."""
    path = RUNS / f"{grid}.jsonl"
    try:
        return [TrainingRun(**json.loads(line)) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in RUNS.glob("*.jsonl"))) or "none"
        refuse(f"{path} is not there; grids in {RUNS}: {known}")
    except (ValueError, TypeError) as error:
        refuse(f"{path} is no manifest of this launcher ({error})")


def text_of(runs: list[TrainingRun]) -> str:
    """Return the text of a manifest."""
    return "".join(json.dumps(run._asdict()) + "\n" for run in runs)


def split(name: str, text: str) -> list[str]:
    """Return the words of a text, as a shell has them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        refuse(f"{name} {text}: {error}")


def add(grid: str, curve: str, script: str, words: list[str]) -> None:
    """Write a curve into the manifest, in place of what it had: a run for every combination of the
    values in `words`, --flag VALUE ... The value @CURVE is the folder of that curve's run with the
    same environment, seed and other flags.
    """
    known = flags_of(script)
    lists = values_of(words, script, known)
    own = values_of(split("FLAGS", os.environ.get("FLAGS", "")), script, known)
    given = {name.removeprefix("no-") for name in own}
    lists = {name: lists[name] for name in lists if name.removeprefix("no-") not in given} | own
    lists = tiny(script, lists, known) if SMOKE else lists
    others = read(grid) if (RUNS / f"{grid}.jsonl").exists() and not DRY else []
    later = [f"--{name} {value}" for name in lists for value in lists[name] if value[:1] == "@"]
    for flag in later if DRY else []:
        say(f"DRY=1: {flag} will be the folder of a run of that curve")
    runs = list[TrainingRun]()
    for values in itertools.product(*(values or [""] for values in lists.values())):
        flags = dict(zip(lists, values))
        for name, value in flags.items():
            if value[:1] == "@" and not DRY:
                flags[name] = f"@{find(others, value[1:], script, flags, grid)}"
        key, data = identity(script, flags, known), Path(flags.get("dataset", ""))
        if "atari" in script and "env-id" in flags:  # the games of a dataset lie in one folder
            data = Path()
        title = (data.stem if data.suffix == ".hdf5" else str(data)).strip("/.")
        title = title or canonical(flags.get("env-id", "default"), script)
        title = title.replace("/", "-")[:60]  # a file system takes names of up to 255 bytes
        folder = f"{title}__{Path(script).stem[:60]}__{flags.get('seed', '1')}__{key}"
        runs.append(TrainingRun(key, curve, script, flags, folder))
    if not DRY:
        replace(grid, curve, runs)
        return print(f"{grid}: {curve}: {len(runs)} run{'s' * (len(runs) != 1)}")
    for run in runs:
        print(shlex.join(["python", f"cleanrl_sparse/{script}", *run.command()]))
    say(f"DRY=1: {curve}: {len(runs)} run{'s' * (len(runs) != 1)}, not started")


def replace(grid: str, curve: str, runs: list[TrainingRun]) -> None:
    """Write a curve's runs into the manifest in place of what it had."""
    manifest, temporary = RUNS / f"{grid}.jsonl", RUNS / f".{grid}.jsonl"
    with lock(RUNS / f".{grid}.lock"):
        others = [run for run in read(grid) if run.curve != curve] if manifest.exists() else []
        temporary.write_text(text_of([*others, *runs]))
        temporary.replace(manifest)


def find(runs: list[TrainingRun], curve: str, script: str, flags: dict[str, str], grid: str) -> str:
    """Return the folder of a curve's one run with the same environment, seed, and value of every
    flag that is given for both.
    """

    def meaning(script: str, flags: dict[str, str], name: str) -> object:
        """Return a flag's value, given or not, however it is written."""
        known = flags_of(script)
        return normal(script, name, flags.get(name, known[name].default if name in known else ""))

    same = []
    for run in [run for run in runs if run.curve == curve]:
        names = run.flags.keys() & flags.keys() | {"env-id", "seed"}
        if all(meaning(run.script, run.flags, n) == meaning(script, flags, n) for n in names):
            same.append(run)
    if len(same) != 1:
        what = "must have one run of that curve with the same flags, it has"
        refuse(f"@{curve}: {grid} {what} {len(same)}")
    return same[0].folder


def gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's tools."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(i) for i in range(len(re.findall("(?m)^GPU ", listing)))]


class Child(NamedTuple):
    """A training process of ours, and its run's lock, which the process holds too."""

    run: TrainingRun
    process: subprocess.Popen[bytes]
    lock: int
    gpu: str


def begin(run: TrainingRun, threads: int | str, gpu: str) -> Child | None:
    """Start a run or go on with it; None if it is being run or has ended in the meantime."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = not any((run.path / name).exists() for name in ("final.json", ".failed"))
    except BlockingIOError:
        free = False
    if not free:
        os.close(lock)
        return None
    words = ["--resume", str(run.path)] if (run.path / "args.json").exists() else run.command()
    own = {"OMP_NUM_THREADS": str(threads), "RUN_LOCK": str(run.path)}
    own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    # A session of its own: the terminal's Ctrl-C comes through us, once.
    shape: Any = {"env": os.environ | own, "pass_fds": [lock], "start_new_session": True}
    with open(run.path / ".log", "ab") as log:
        shape |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen([sys.executable, SCRIPTS / run.script, *words], **shape)
    os.ftruncate(lock, 0)
    os.write(lock, f"{HOST} {process.pid} {gpu}\n".encode())
    return Child(run, process, lock, gpu)


def work(
    runs: list[TrainingRun], workers: int, threads: int | str, devices: list[str]
) -> dict[str, str]:
    """Run what is neither done nor failed, `workers` at a time, spread over the GPUs.

    Runs that another launcher has begun are waited for, and those that failed may be retried in the
    meantime. Return a line for each run that was killed or cancelled through no fault of its own.
    """
    stops: list[int] = []  # signals; what is ignored, as SIGHUP under nohup, stays so
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: stops.append(number))
    pending, children = [run for run in runs if run.state != "done"], list[Child]()
    failed, broken = list[TrainingRun](), dict[str, str]()
    done, told, others = len(runs) - len(pending), 0, list[str]()
    while children or (pending and not stops):
        retried = [run for run in failed if run.state != "failed"]
        failed = [run for run in failed if run not in retried]
        pending, before = pending + retried, len(others)
        if len(children) < workers:
            others = [gpu for run in pending if (gpu := run.gpu_here) is not None]
        if len(others) > before:
            print(f"{len(others)} runs of other launchers are under way here and count as workers")
        busy = Counter([*others, *(child.gpu for child in children)])
        for run in [*pending] if not stops else []:
            if (state := run.state) in ENDED:
                pending.remove(run)
                done += state == "done"
                failed += [run] if state == "failed" else []
            elif busy.total() >= workers:
                break
            elif state != "running":
                gpu = min(devices, key=lambda gpu: busy[gpu], default="")
                if child := begin(run, threads, gpu):
                    children.append(child)
                    pending.remove(run)
                    busy[gpu] += 1
                    verb = "go on with" if state == "stopped" else "begin"
                    print(f"[{done}/{len(runs)} done, {len(failed)} failed] {verb} {run.folder}")
        if len(stops) > told:
            told = len(stops)
            for child in children:
                child.process.send_signal(signal.SIGTERM)
            s = "s" * (len(children) != 1)
            print(f"stopping {len(children)} run{s}; each writes its checkpoint")
        for child in [child for child in children if child.process.poll() is not None]:
            run, status = child.run, child.process.returncode
            said = last_line(run.path / ".log")
            if status == 0 and (run.path / "final.json").exists():
                done += 1
            elif status < 0 and not (stops and status == -signal.SIGTERM):  # told as it started
                broken[run.id] = f"{run.folder} was killed by signal {-status}: {said}"
            elif 0 <= status != STOPPED:
                failed.append(run)
                (run.path / ".failed").write_text(f"{status}\n")
                say(f"{run.folder} ended with status {status}: {said}")
            os.close(child.lock)
            children.remove(child)
        time.sleep(0.2 if children or not pending else 1)
    return broken


def report(grid: str, runs: list[TrainingRun], broken: dict[str, str]) -> int:
    """Print how it ended; return the exit status."""
    states = {run.id: run.state for run in runs}
    bad = [run for run in runs if states[run.id] == "failed"]
    unfinished = sum(state not in ENDED for state in states.values())
    lines = [f"{run.folder} failed: {last_line(run.path / '.log')}" for run in bad]
    lines += [line for key, line in broken.items() if states[key] not in ENDED]
    for line in lines[:20]:
        say(line)
    if len(lines) > 20:
        say(f"... and {len(lines) - 20} more; launch.py status {grid} names those that failed")
    if unfinished:
        say(f"{unfinished} of {len(runs)} runs are unfinished; launch again to go on")
    if bad:
        hint = f"after fixing the cause: python benchmark/launch.py retry {grid}, and launch again"
        say(f"{len(bad)} of {len(runs)} runs failed; {hint}")
    if not (bad or unfinished):
        print(f"{grid}: all {len(runs)} runs are done")
    return 1 if bad else STOPPED if unfinished else 0


def slurm(*command: str, text: str | None = None, may_fail: bool = False) -> str:
    """Return what a command of Slurm's prints; end with its error, unless it may fail."""
    # Within a job, the settings of that job are not meant for those that are submitted from it.
    names = [name for name in os.environ if name[:6] != "SLURM_" or name == "SLURM_CONF"]
    own: Any = {"input": text, "env": {name: os.environ[name] for name in names}}
    try:
        result = subprocess.run(command, capture_output=True, text=True, **own)
    except FileNotFoundError:
        refuse(f"{command[0]}, a program of Slurm's, is not installed here")
    if result.returncode and not may_fail:
        said = "; ".join((result.stderr or result.stdout).split("\n")).strip("; ")
        said = (said or f"status {result.returncode}").removeprefix(f"{command[0]}: ")
        refuse(f"{command[0]}: {said}")
    return result.stdout


def tasks() -> dict[str, list[str]]:
    """Return the runs' ids of all tasks that were submitted, the latest last, by array and index.

    A job array is named after the file of its tasks, so that nothing needs to be remembered between
    submissions.
    """
    files = sorted((RUNS / ".slurm").glob("*.tasks"), key=lambda file: file.stat().st_mtime)
    found = dict[str, list[str]]()
    for file in files:
        for i, line in enumerate(file.read_text().splitlines()):
            found[f"{file.stem} {i}"] = line.split()
    return found


def queued() -> set[str]:
    """Return the ids of the runs, of all grids in RUNS, that wait or run under Slurm."""
    if not (known := tasks()):
        return set()
    lines = slurm("squeue", "--me", "--array", "--noheader", "--format=%j %K").splitlines()
    return {key for line in lines for key in known.get(line.strip(), [])}


def states_of(runs: list[TrainingRun], alive: set[str]) -> dict[str, str]:
    """Return the state of each run, by its id; `alive` are those that wait or run under Slurm."""
    states = {run.id: run.state for run in runs}
    in_queue = [key for key in alive if states.get(key) in ("waiting", "stopped")]
    return states | dict.fromkeys(in_queue, "queued")


def submit(runs: list[TrainingRun], args: argparse.Namespace) -> int:
    """Submit what is neither done nor failed nor queued, wait for it; return the exit status."""
    config = slurm("scontrol", "show", "config")
    limit = int(config.partition("MaxArraySize")[2].split()[1])  # MaxArraySize = 1001
    size, later = limit * args.runs_per_job, set[str]()
    with lock(RUNS / ".slurm" / "lock"):
        states = states_of(runs, queued())
        waiting = [run for run in runs if states[run.id] in ("waiting", "stopped")]
        for start in range(0, len(waiting), size):
            try:
                submit_array(waiting[start : start + size], args)
            except SystemExit:
                if not start:
                    raise
                later = {run.id for run in waiting[start:]}
                say(f"{len(later)} runs are for a later launch")
                break
    alive, seen = states.keys() - later, set[str]()
    while True:
        states = states_of(runs, alive)
        unfinished = {key for key, state in states.items() if state not in ENDED} - later
        # A task may end between two looks, and another launcher may be running it here.
        lost = {key for key in unfinished - alive - seen if states[key] != "running"}
        if unfinished == lost:
            break
        counts = Counter(states.values())
        print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
        time.sleep(args.poll_seconds)
        with suppress(SystemExit):  # squeue did not answer, and has said so
            alive, seen = queued(), alive
    logs = {key: name.replace(" ", "-") for name, keys in tasks().items() for key in keys}
    broken = dict[str, str]()
    for run in [run for run in runs if run.id in lost]:
        log = RUNS / ".slurm" / f"{logs.get(run.id)}.log"
        said = last_line(run.path / ".log") or last_line(log)
        broken[run.id] = f"{run.folder} left the queue: {said}"
    return report(args.grid, runs, broken)


def submit_array(runs: list[TrainingRun], args: argparse.Namespace) -> None:
    """Submit one job array, and write down its runs: by then the manifest may be another one."""
    starts, ids = range(0, len(runs), args.runs_per_job), [run.id for run in runs]
    text = "".join(" ".join(ids[i : i + args.runs_per_job]) + "\n" for i in starts)
    name = f"{args.grid}-{hashlib.sha256(f'{RUNS.resolve()}{text}'.encode()).hexdigest()[:8]}"
    file = (RUNS / ".slurm" / f"{name}.tasks").absolute()
    most = min(args.runs_per_job, len(runs))
    cores, log = f"--cpus-per-task={most * args.cpus_per_run}", f"{file.with_suffix('')}-%a.log"
    options = ["--job-name=" + name, f"--array=0-{len(starts) - 1}", "--output=" + log, cores]
    options += ["--open-mode=append", "--requeue", "--ntasks=1", f"--time={args.time}"]
    options += [f"--signal=TERM@{args.seconds_to_stop}", f"--mem={most * args.gib_per_run}G"]
    given = {"gpus": args.gpus_per_job, "partition": args.partition, "account": args.account}
    options += [f"--{name}={value}" for name, value in given.items() if value]
    options += split("--sbatch", args.sbatch)
    command = [sys.executable, str(Path(__file__).resolve()), "work", args.grid]
    command += ["--array", name, "--threads", str(args.cpus_per_run)]
    # As a step: a batch script gets no signal itself when its job is preempted with a grace time.
    step = f"srun --ntasks=1 {cores} --mpi=none --export=ALL"
    # RUNS is the folder of a tiny grid already.
    exports = f"export RUNS={shlex.quote(str(RUNS))} SMOKE="
    script = f"#!/bin/bash\n{exports}\nexec {step} {shlex.join(command)}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.with_suffix(".jsonl").write_text(text_of(runs))
    job = slurm("sbatch", "--parsable", *options, text=script).strip()
    print(f"job array {job}: {len(starts)} tasks of up to {most} runs")


def task(args: argparse.Namespace) -> int:
    """Do a task of a job array, its runs side by side; if they were stopped, queue it again."""
    index = os.environ["SLURM_ARRAY_TASK_ID"]
    ids = tasks()[f"{args.array} {index}"]
    runs = [run for run in read(f".slurm/{args.array}") if run.id in ids]
    broken = work(runs, len(runs), args.threads, gpus())
    status = report(args.grid, runs, broken)
    stopped = any(run.id not in broken and run.state not in ENDED for run in runs)
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{index}"
    # Near the time limit or in the grace time the task is still running. Otherwise Slurm queues it
    # again by itself, or it was cancelled, and to queue it again would bring it back to life.
    ask = ("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    if stopped and slurm(*ask, may_fail=True).strip() == "RUNNING":
        slurm("scontrol", "requeue", job, may_fail=True)
    return status


def show(runs: list[TrainingRun], alive: set[str]) -> None:
    """Print a table of states by curve, then the runs that are under way and those that failed."""
    states, curves = states_of(runs, alive), [*dict.fromkeys(run.curve for run in runs), "all"]
    width = max(map(len, curves))
    print(f"{'':{width}}" + "".join(f"{state:>9}" for state in STATES))
    for curve in curves:
        mine = {run.id for run in runs if curve in (run.curve, "all")}
        counts = Counter(states[key] for key in mine)
        print(f"{curve:{width}}" + "".join(f"{counts[state]:>9}" for state in STATES))
    for state in ("running", "failed"):
        for run in {run.id: run for run in runs if states[run.id] == state}.values():
            told = run.progress if state == "running" else last_line(run.path / ".log")
            print(f"{state}: {run.folder}\n    {told}")


# The options of launch: backend, name, default (numbers are at least 1 where given), help.
OPTIONS: tuple[tuple[str, str, int | str, str], ...] = (
    ("local", "workers", 0, "runs at a time; default: one per core, or --runs-per-gpu on each GPU"),
    ("local", "runs-per-gpu", 1, "runs that share a GPU"),
    ("slurm", "runs-per-job", 1, "runs that share a task of a job array"),
    ("slurm", "cpus-per-run", 1, "cores of each run"),
    ("slurm", "gib-per-run", 10, "memory of each run in GiB"),
    ("slurm", "gpus-per-job", 0, "GPUs of a task; default: none"),
    ("slurm", "seconds-to-stop", 300, "time before the limit at which runs are told to stop"),
    ("slurm", "poll-seconds", 30, "time between two looks at the queue"),
    ("slurm", "time", "24:00:00", "limit of a task"),
    ("slurm", "partition", "", "of the cluster"),
    ("slurm", "account", "", "of the cluster"),
    ("slurm", "sbatch", "", "more options of sbatch, in one string"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    shape: Any = {"description": __doc__, "formatter_class": argparse.RawTextHelpFormatter}
    top = argparse.ArgumentParser(prog="launch.py", **shape)
    names = ("add", "launch", "status", "retry", "remove")
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(names))
    ours = {name: commands.add_parser(name) for name in (*names, "work")}
    for command in ours.values():
        command.add_argument("grid", help="name of the grid")
    for name in ("add", "remove"):
        ours[name].add_argument("curve")
    ours["add"].add_argument("script", help="of cleanrl_sparse/")
    ours["add"].add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag VALUE ...")
    ours["work"].add_argument("--array")
    ours["work"].add_argument("--threads", type=int)
    backend: Any = {"choices": ("local", "slurm"), "default": "local", "help": "default: local"}
    ours["launch"].add_argument("--backend", **backend)
    groups = {name: ours["launch"].add_argument_group(name) for name in backend["choices"]}
    for owner, name, default, text in OPTIONS:
        text += f"; default: {default}" if default else ""
        count: Any = {"type": int, "metavar": "N"} if isinstance(default, int) else {}
        groups[owner].add_argument(f"--{name}", help=text, **count)
    return top


def launch(runs: list[TrainingRun], args: argparse.Namespace) -> int:
    """Run what is not done, here or under Slurm; return the exit status."""
    for owner, name, default, _ in OPTIONS:
        key = name.replace("-", "_")
        if (value := getattr(args, key)) is None:
            setattr(args, key, default)
        elif owner != args.backend:
            refuse(f"--{name} is for --backend {owner}")
        elif isinstance(value, int) and value < 1:
            refuse(f"--{name} {value}: must be at least 1")
    if args.backend == "slurm":
        return submit(runs, args)
    cores, devices = len(os.sched_getaffinity(0)), gpus()
    workers = args.workers or len(devices) * args.runs_per_gpu or cores
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // workers)
    return report(args.grid, runs, work(runs, workers, threads, devices))


def main(argv: list[str]) -> int:
    """Do what the command line asks; return the exit status."""
    args = parser().parse_args(argv)
    if args.command == "add":
        if not args.grid.replace("-", "").replace("_", "").isalnum():
            refuse(f"add {args.grid}: GRID must be of letters, digits, - and _")
        add(args.grid, args.curve, args.script, args.flags)
        return 0
    if DRY:
        print(shlex.join(["python", "benchmark/launch.py", *argv]))
        return 0
    if args.command == "work":
        return task(args)
    runs = read(args.grid)
    if args.command == "launch":
        return launch([*{run.id: run for run in runs}.values()], args)
    if args.command == "status":
        alive = set[str]()
        try:
            alive = queued()
        except SystemExit:  # it has said why
            say("what is queued under Slurm is not known, and shown as waiting")
        show(runs, alive)
    elif args.command == "remove":
        curves = dict.fromkeys(run.curve for run in runs)
        if args.curve not in curves:
            refuse(f"{args.curve}: {args.grid} has the curves {', '.join(curves)}")
        replace(args.grid, args.curve, [])
    else:
        failed = {run.path / ".failed" for run in runs if run.state == "failed"}
        for path in failed:
            path.unlink(missing_ok=True)
        print(f"{args.grid}: {len(failed)} run{'s' * (len(failed) != 1)} may start again")
    return 0


if __name__ == "__main__":
    outlive_readers()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        told = "jobs under Slurm go on (scancel ends them), launch again to wait"
        print(f"\nlaunch.py: Ctrl-C; {told}", file=sys.stderr)
        sys.exit(STOPPED)
    except OSError as error:
        refuse(str(error))  # which may have no file name
