"""Run a grid of training runs, here or under Slurm, and go on after a break.

    launch.py add GRID CURVE SCRIPT --flag VALUE ...    add a curve: a run for
                                                        each combination
    launch.py launch GRID    run what is not done; again: go on
    launch.py status GRID    what waits, runs (time left), failed, is done
    launch.py retry GRID     let failed runs start again
    launch.py remove GRID CURVE    take a curve out; its runs' folders stay

A grid is a manifest, RUNS/GRID.jsonl, with one line of JSON per run: id (a
hash of script and flags, defaults left out), curve, script, flags and folder.
A run's state is read from its folder, RUNS/FOLDER, alone. final.json: done;
.lock held: running; .failed: failed, with the exit status in it; args.json:
stopped, to be resumed; nothing: waiting. Grids that ask for the same run
share it. The run itself holds the lock, so that it is not started twice
though its launcher be killed. A run that failed is left alone until `retry`,
after which a launcher that is at work, or the next one, goes on with it.

RUNS is the environment variable of that name, else runs. FLAGS is added to
the flags of every run, such as FLAGS="--num-envs 8". DRY=1 prints the commands
and does nothing. SMOKE=1 makes a tiny grid in RUNS/smoke: the script's own
environment, two values of every list, a few gradient steps.

Exit status: 0 all runs are done, 1 some failed (`status` names them), 2 bad
input, 75 stopped: launch again to go on.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common import canonical, outlive_readers, runs_folder, switch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "cleanrl_sparse"
DRY, SMOKE, RUNS = switch("DRY"), switch("SMOKE"), runs_folder()
STOPPED = 75  # exit status of a run that was asked to stop and left a checkpoint
STATES = ("waiting", "queued", "running", "stopped", "failed", "done")
# SMOKE=1: what makes a run tiny, of the flags that a script has. It must have the first ones.
ONLINE = {
    "total-timesteps": ["2000"],
    "learning-starts": ["1900"],
    "buffer-size": ["2000"],
    "batch-size": ["8", "16"],
    "epoch-steps": ["1000"],
    "target-every": ["50"],
    "prune-every": ["5"],
    "max-sparsity-step": ["0.3", "0.2"],
    "analysis-every": ["2000"],
    "eval-episodes": ["2"],
    "eval-steps": ["200"],
    "width": ["1", "2"],
}
OFFLINE = {
    "total-timesteps": ["60"],
    "dataset": ["tests/data/hopper-random.hdf5"],
    "env-id": ["Hopper-v5"],
    "batch-size": ["32"],
    "epoch-steps": ["20"],
    "eval-episodes": ["2"],
}
OFFLINE_ATARI = {
    "checkpoints-per-epoch": ["5"],
    "total-timesteps": ["60"],
    "dataset": ["tests/data/atari"],
    "env-id": ["Breakout"],
    "transitions": ["300"],
    "batch-size": ["4"],
    "epoch-steps": ["20"],
    "target-every": ["10"],
    "prune-every": ["5"],
    "max-sparsity-step": ["0.3"],
    "eval-episodes": ["2"],
    "eval-steps": ["200"],
    "width": ["1", "2"],
    "feature-size": ["16", "32"],
}
WHOLE = ("int", "Count", "Index")  # the types of flags that take an integer
REAL = ("float", "Amount", "Rate", "Real", "Share")  # those that take a number

Lists = dict[str, list[str]]  # the values of each flag, none for a switch


def refuse(line: str) -> NoReturn:
    """End with a line about bad input."""
    print(f"launch.py: {line}", file=sys.stderr)
    sys.exit(2)


@dataclass(frozen=True)
class Flag:
    """A flag of a script."""

    default: object
    kind: str  # as its annotation has it: bool, Count, Literal["a", "b"]


@dataclass(frozen=True)
class TrainingRun:
    """One line of a manifest."""

    id: str
    curve: str
    script: str
    flags: dict[str, str]  # without dashes; "" is a switch, @FOLDER the folder of another run
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
        return gpu if host == socket.gethostname() else None

    def command(self) -> list[str]:
        """Return what begins the run, after the script's name."""
        words = []
        for name, value in self.flags.items():
            value = str(RUNS / value[1:]) if value[:1] == "@" else value
            words += [f"--{name}", value] if value else [f"--{name}"]
        return [*words, "--run-dir", str(self.path)]

    def last_line(self) -> str:
        """Return the last line that the run printed."""
        return last_line(self.path / ".log")

    def progress(self) -> str:
        """Return the share of a begun run that is done, and the time left at its latest speed."""
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


def last_line(path: Path) -> str:
    """Return the last line of a file that says something; of a box, which tyro draws around a bad
    flag, the first line in it. No file, no line.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    texts = [line.strip(" \r│") for line in lines]
    if any(text.startswith("╰") for text in texts[-3:]):
        top = max((i for i, text in enumerate(texts) if text.startswith("╭")), default=-1)
        return next((text for text in texts[top + 1 :] if text), "")
    return next((text for text in reversed(texts) if text), "")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that launchers do not write the same manifest or submit the same runs at
    a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(grid: str) -> list[TrainingRun]:
    """Return the runs of a grid's manifest; a run that two curves share comes twice."""
    try:
        return [
            TrainingRun(**json.loads(line))
            for line in (RUNS / f"{grid}.jsonl").read_text().splitlines()
        ]
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in RUNS.glob("*.jsonl"))) or "none"
        refuse(f"{RUNS / grid}.jsonl is not there; grids in {RUNS}: {known}")
    except (ValueError, TypeError) as error:
        refuse(f"{RUNS / grid}.jsonl is no manifest of this launcher ({error})")


def unique(runs: list[TrainingRun]) -> list[TrainingRun]:
    """Return each run once."""
    return list({run.id: run for run in runs}.values())


def flags_of(script: str) -> dict[str, Flag]:
    """Return the flags of a script, by their names without dashes.

    They are read from its text, from Args and what it inherits: to import it would import torch.
    """
    if not (SCRIPTS / script).is_file():
        known = ", ".join(sorted(path.name for path in SCRIPTS.glob("*.py")))
        refuse(f"{script}: not in cleanrl_sparse/, which has {known}")
    body = ast.parse((SCRIPTS / script).read_text()).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    bases = [ast.unparse(base) for base in classes["Args"].bases]
    owners = [classes[name] for name in ("Args", *bases) if name in classes]
    found = dict[str, Flag]()
    for node in (node for owner in owners for node in owner.body):
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            continue
        name, kind = ast.unparse(node.target).replace("_", "-"), ast.unparse(node.annotation)
        if "ClassVar" not in kind and name not in ("run-dir", "resume"):
            found[name] = Flag(ast.literal_eval(node.value), kind)
    return found


def identity(script: str, flags: dict[str, str], known: dict[str, Flag]) -> str:
    """Return the id of a run: the same however numbers and environments are written and whether
    defaults are given or not.
    """

    def normal(name: str, value: object) -> object:
        if name == "env-id":
            return canonical(str(value), script)
        try:
            return value if isinstance(value, bool) else float(str(value))
        except ValueError:
            return value

    other = dict[str, object]()
    for name, text in flags.items():
        value: object = name in known if text == "" else text
        name = name.removeprefix("no-") if text == "" else name
        if normal(name, value) != normal(name, known[name].default):
            other[name] = normal(name, value)
    return hashlib.sha256(json.dumps([script, sorted(other.items())]).encode()).hexdigest()[:12]


def read_value(name: str, value: str, kind: str) -> str:
    """Return a value as the script will get it: 1e6 steps as 1000000. Refuse what it would."""
    if value[:1] == "@":
        return value
    if kind in WHOLE:
        with suppress(ValueError):
            number = float(value)
            exact = number.is_integer() and number < 2**53
            return str(int(number) if exact else int(value))
        refuse(f"--{name} {value}: must be an integer, such as 1000000")
    if kind in REAL:
        try:
            float(value)
        except ValueError:
            refuse(f"--{name} {value}: must be a number")
    if kind.startswith("Literal["):
        options = ast.literal_eval(f"({kind[len('Literal[') : -1]},)")
        if value not in options:
            refuse(f"--{name} {value}: must be one of {', '.join(options)}")
    return value


def values_of(words: list[str], script: str, known: dict[str, Flag]) -> Lists:
    """Return the values of each flag, none for a switch."""
    lists = Lists()
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("_", "-")
            if name.removeprefix("no-") not in known:
                near = difflib.get_close_matches(name.partition("=")[0], known, 1)
                hint = f"; --{near[0]} is one, to be given as --{near[0]} VALUE" if near else ""
                refuse(f"{word}: {script} has no such flag{hint}")
            if name in lists:
                refuse(f"{word}: given twice")
            lists[name] = []
        elif not lists:
            refuse(f"{word}: expected --flag VALUE ... after the script")
        else:
            lists[name].append(word)
    for name, values in lists.items():
        switched = name not in known or known[name].kind == "bool"
        if values and switched:
            refuse(f"--{name}: a switch, which takes no value")
        if not values and not switched:
            refuse(f"--{name}: a value is missing")
        if values:
            lists[name] = [read_value(name, value, known[name].kind) for value in values]
        if twice := [value for value, times in Counter(lists[name]).items() if times > 1]:
            refuse(f"{twice[0]}: twice in --{name}")
    return lists


def tiny(script: str, lists: Lists, known: dict[str, Flag]) -> Lists:
    """Return the values of a tiny grid: of each flag at most two, and short runs."""
    offline = "dataset" in known
    atari = "checkpoints-per-epoch" in known
    own_env = [str(known["env-id"].default)] if "env-id" in known else []
    values = OFFLINE_ATARI if atari else OFFLINE if offline else ONLINE | {"env-id": own_env}
    needed = [*values][:1] if offline else [*values][:2]
    if missing := [name for name in needed if name not in known]:
        refuse(f"SMOKE=1: {script} has no --{missing[0]}, without which a run cannot be made tiny")
    few = {name: own[:2] for name, own in lists.items()}
    return few | {n: v[: len(few.get(n, [""]))] for n, v in values.items() if n in known}


def add(grid: str, curve: str, script: str, words: list[str]) -> None:
    """Write a curve into the manifest: a run for every combination of the flags' values, in place
    of what it had.

    Words are --flag VALUE ...; a flag without a value is a switch. The value @CURVE is the folder
    of that curve's run with the same environment, seed and other flags.
    """
    known = flags_of(script)
    lists = values_of(words, script, known)
    lists |= values_of(shlex.split(os.environ.get("FLAGS", "")), script, known)
    lists = tiny(script, lists, known) if SMOKE else lists
    manifest, runs = RUNS / f"{grid}.jsonl", list[TrainingRun]()
    others = read(grid) if manifest.exists() and not DRY else []
    for values in itertools.product(*(values or [""] for values in lists.values())):
        flags = dict(zip(lists, values))
        for name, value in flags.items():
            if value.startswith("@"):
                flags[name] = value if DRY else f"@{find(others, value[1:], flags, grid)}"
        key, data = identity(script, flags, known), Path(flags.get("dataset", ""))
        if "atari" in script and "env-id" in flags:  # the games of a dataset lie in one folder
            data = Path()
        title = (data.stem if data.suffix == ".hdf5" else str(data)).strip("/.")
        title = title or canonical(flags.get("env-id", "default"), script)
        title = title.replace("/", "-")[:60]  # a file system takes names of up to 255 bytes
        folder = f"{title}__{Path(script).stem[:60]}__{flags.get('seed', '1')}__{key}"
        runs.append(TrainingRun(key, curve, script, flags, folder))
    if DRY:
        later = {(n, v) for run in runs for n, v in run.flags.items() if v.startswith("@")}
        for flag, value in later:
            text = f"DRY=1: --{flag} {value} will be the folder of a run of that curve"
            print(f"launch.py: {text}", file=sys.stderr)
        for run in runs:
            print(shlex.join(["python", f"cleanrl_sparse/{script}", *run.command()]))
        return
    replace(grid, curve, runs)
    print(f"{grid}: {curve}: {len(runs)} run{'s' * (len(runs) != 1)}")


def replace(grid: str, curve: str, runs: list[TrainingRun]) -> None:
    """Write a curve's runs into the manifest in place of what it had."""
    manifest, temporary = RUNS / f"{grid}.jsonl", RUNS / f".{grid}.jsonl"
    try:
        with locked(RUNS / f".{grid}.lock"):
            others = [run for run in read(grid) if run.curve != curve] if manifest.exists() else []
            lines = [json.dumps(asdict(run)) + "\n" for run in [*others, *runs]]
            temporary.write_text("".join(lines))
            temporary.replace(manifest)
    except OSError as error:
        refuse(f"{manifest} cannot be written ({error.strerror})")


def find(runs: list[TrainingRun], curve: str, flags: dict[str, str], grid: str) -> str:
    """Return the folder of the one run of a curve that has the same values of all flags that both
    have.
    """
    mine = [run for run in runs if run.curve == curve]
    same = []
    for run in mine:
        if all(run.flags[name] == flags[name] for name in run.flags.keys() & flags.keys()):
            same.append(run)
    if len(same) != 1:
        what = "must have one run of that curve with the same flags, it has"
        refuse(f"@{curve}: {grid} {what} {len(same)}")
    return same[0].folder


def gpus() -> list[str]:
    """Return the GPUs of this machine as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's
    tools.
    """
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]


def slots(number: int, threads: str) -> list[dict[str, str]]:
    """Return what the environment of so many runs at a time has beside ours; the GPUs take
    turns.
    """
    devices, rooms = gpus(), []
    for i in range(number):
        own = {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}
        rooms.append({"OMP_NUM_THREADS": threads} | own)
    return rooms


@dataclass
class Child:
    """A training process of ours, and its run's lock, which the process holds too."""

    run: TrainingRun
    process: subprocess.Popen[bytes]
    lock: int
    slot: int


def begin(run: TrainingRun, slot: int, environment: dict[str, str]) -> Child | None:
    """Start a run or go on with it; None if it is being run or has ended in the meantime."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    if any((run.path / name).exists() for name in ("final.json", ".failed")):
        os.close(lock)
        return None
    words = ["--resume", str(run.path)] if (run.path / "args.json").exists() else run.command()
    # A session of its own: the terminal's Ctrl-C comes through us, once.
    with open(run.path / ".log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, SCRIPTS / run.script, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment | {"RUN_LOCK": str(run.path)},
            pass_fds=[lock],
            start_new_session=True,
        )
    gpu = environment.get("CUDA_VISIBLE_DEVICES", "")
    os.ftruncate(lock, 0)
    os.write(lock, f"{socket.gethostname()} {process.pid} {gpu}\n".encode())
    return Child(run, process, lock, slot)


@dataclass
class Outcome:
    """What became of runs that are not done: lines about those that failed or broke off, and how
    many were stopped.
    """

    failed: dict[str, str] = field(default_factory=dict)  # by the run's id
    broken: list[str] = field(default_factory=list)  # killed or cancelled: not the run's own fault
    stopped: int = 0


def work(runs: list[TrainingRun], room: list[dict[str, str]]) -> Outcome:
    """Run what is neither done nor failed, as many at a time as there is room.

    Room has a slot for each run at a time, see slots(). Runs that another launcher has begun are
    waited for, and those that failed may be retried in the meantime.
    """
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stops.append(number))
    pending, children = [run for run in runs if run.state != "done"], list[Child]()
    outcome, done, told, taken = Outcome(), len(runs) - len(pending), 0, list[str]()
    while children or (pending and not stops):
        for run in [run for run in runs if run.id in outcome.failed and run.state != "failed"]:
            pending.append(run)
            del outcome.failed[run.id]
        free = [i for i in range(len(room)) if i not in {child.slot for child in children}]
        before = len(taken)
        if free:
            taken = [gpu for run in pending if (gpu := run.gpu_here) is not None]
        if len(taken) > before:
            text = "runs of other launchers are under way here and take their room"
            print(f"{len(taken)} {text}", flush=True)
        for gpu in taken[: len(free)]:
            same = [i for i in free if room[i].get("CUDA_VISIBLE_DEVICES") == gpu]
            free.remove((same or free)[-1])
        for run in [*pending] if not stops else []:
            if (state := run.state) in ("done", "failed"):
                pending.remove(run)
                done += state == "done"
                if state == "failed":
                    outcome.failed[run.id] = f"{run.folder} failed: {run.last_line()}"
            elif not free:
                break
            elif state != "running" and (child := begin(run, free[0], room[free[0]])):
                children.append(child)
                pending.remove(run)
                free.pop(0)
                verb = "go on with" if state == "stopped" else "begin"
                counts = f"[{done}/{len(runs)} done, {len(outcome.failed)} failed]"
                print(f"{counts} {verb} {run.folder}", flush=True)
        if len(stops) > told:
            told = len(stops)
            for child in children:
                child.process.send_signal(signal.SIGTERM)
            print(f"stopping {len(children)} runs; each writes a checkpoint", flush=True)
        for child in [c for c in children if c.process.poll() is not None]:
            children.remove(child)
            status, run = child.process.returncode, child.run
            if status == 0 and (run.path / "final.json").exists():
                done += 1
            elif status == STOPPED or (stops and status == -signal.SIGTERM):
                outcome.stopped += 1  # by SIGTERM itself: while it was starting
            elif status < 0:
                killed = f"{run.folder} was killed by signal {-status}"
                outcome.broken.append(f"{killed}: {run.last_line()}")
            else:
                ended = f"{run.folder} ended with status {status}: {run.last_line()}"
                outcome.failed[run.id] = ended
                (run.path / ".failed").write_text(f"{status}\n")
                print(f"launch.py: {ended}", file=sys.stderr, flush=True)
            os.close(child.lock)
        time.sleep(0.2 if children or not pending else 1)
    outcome.stopped += len(pending)
    return outcome


def local(runs: list[TrainingRun], args: argparse.Namespace) -> int:
    """Run them as processes of this machine, several at a time; return the exit status."""
    cores = len(os.sched_getaffinity(0))
    workers = args.workers or len(gpus()) * args.runs_per_gpu or cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    return report(args.grid, runs, work(runs, slots(workers, threads)))


def report(grid: str, runs: list[TrainingRun], outcome: Outcome) -> int:
    """Print how it ended; return the exit status."""
    lines = [*outcome.failed.values(), *outcome.broken]
    more = f"... and {len(lines) - 20} more; launch.py status {grid} names those that failed"
    for line in [*lines[:20], *([more] if len(lines) > 20 else [])]:
        print(f"launch.py: {line}", file=sys.stderr)
    unfinished = outcome.stopped + len(outcome.broken)
    if unfinished:
        hint = f"{unfinished} of {len(runs)} runs are unfinished; launch again to go on"
        print(f"launch.py: {hint}", file=sys.stderr)
    if outcome.failed:
        hint = f"after mending it: python benchmark/launch.py retry {grid}, and launch again"
        text = f"{len(outcome.failed)} of {len(runs)} runs failed; {hint}"
        print(f"launch.py: {text}", file=sys.stderr)
        return 1
    if unfinished:
        return STOPPED
    print(f"{grid}: all {len(runs)} runs are done")
    return 0


def slurm(*command: str, text: str | None = None, may_fail: bool = False) -> str:
    """Return what a command of Slurm's prints; end with its error, unless it may fail."""
    # Within a job, the settings of that job are not meant for those that are submitted from it.
    environment = dict(os.environ)
    for name in os.environ:
        if name.startswith("SLURM_") and name != "SLURM_CONF":
            del environment[name]
    try:
        result = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, env=environment
        )
    except FileNotFoundError:
        refuse(f"{command[0]}, a program of Slurm's, is not installed here")
    if result.returncode and not may_fail:
        said = "; ".join((result.stderr or result.stdout).split("\n")).strip("; ")
        said = (said or f"status {result.returncode}").removeprefix(f"{command[0]}: ")
        refuse(f"{command[0]}: {said}")
    return result.stdout


def queued() -> set[str]:
    """Return the ids of the runs, of all grids in RUNS, that wait or run under Slurm.

    A job array is named after the file of its tasks, so that nothing needs to be remembered between
    submissions.
    """
    ids = set[str]()
    if not [*(RUNS / ".slurm").glob("*.tasks")]:
        return ids
    for line in slurm("squeue", "--me", "--array", "--noheader", "--format=%j %K").splitlines():
        name, _, index = line.strip().rpartition(" ")
        tasks = RUNS / ".slurm" / f"{name}.tasks"
        if index.isdecimal() and tasks.exists():
            ids |= {*tasks.read_text().splitlines()[int(index)].split()}
    return ids


def submit(runs: list[TrainingRun], args: argparse.Namespace) -> int:
    """Submit what is neither done nor failed nor queued as job arrays, wait for the end; return the
    exit status.
    """
    config = slurm("scontrol", "show", "config")
    lines = [line for line in config.splitlines() if line.startswith("MaxArraySize")]
    limit = int(lines[0].split("=")[1])
    with locked(RUNS / ".slurm" / "lock"):
        alive = queued()
        ready = [run for run in runs if run.state in ("waiting", "stopped")]
        waiting = [run for run in ready if run.id not in alive]
        later = set[str]()
        tasks = []
        for i in range(0, len(waiting), args.runs_per_job):
            tasks.append(" ".join(run.id for run in waiting[i : i + args.runs_per_job]))
        for start in range(0, len(tasks), limit):
            try:
                submit_array(tasks[start : start + limit], waiting, args)
            except SystemExit:
                if not start:
                    raise
                later = {*" ".join(tasks[start:]).split()}
                print(f"launch.py: {len(later)} runs are for a later launch", file=sys.stderr)
                break
    alive, seen, lost = {run.id for run in runs} - later, set[str](), set[str]()
    while True:
        states = {run.id: run.state for run in runs}
        ended = {key for key, state in states.items() if state in ("done", "failed")}
        unfinished = states.keys() - later - ended
        # A task may end between two looks, and another launcher may be running it here.
        lost = {key for key in unfinished if states[key] != "running"} - alive - seen
        if not unfinished - lost:
            break
        in_queue = {key for key in alive if states.get(key) in ("waiting", "stopped")}
        counts = Counter((states | dict.fromkeys(in_queue, "queued")).values())
        texts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
        print(", ".join(texts), flush=True)
        time.sleep(args.poll_seconds)
        with suppress(SystemExit):  # squeue did not answer, and has said so
            alive, seen = queued(), alive
    bad = [run for run in runs if states[run.id] == "failed"]
    failed = {run.id: f"{run.folder} failed: {run.last_line()}" for run in bad}
    logs = {key: last_line(log) for key, log in task_logs(args.grid).items() if key in lost}
    said = {run.id: run.last_line() or logs.get(run.id, "") for run in runs if run.id in lost}
    broken = [f"{run.folder} left the queue: {said[run.id]}" for run in runs if run.id in lost]
    stopped = len({key for key in later if states[key] not in ("done", "failed")})
    return report(args.grid, runs, Outcome(failed, broken, stopped))


def task_logs(grid: str) -> dict[str, Path]:
    """Return for each run the log of the latest task that it belonged to."""
    logs = dict[str, Path]()
    files = (RUNS / ".slurm").glob(f"{grid}-*.tasks")
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        for i, line in enumerate(file.read_text().splitlines()):
            logs |= dict.fromkeys(line.split(), file.with_name(f"{file.stem}-{i}.log"))
    return logs


def submit_array(tasks: list[str], known: list[TrainingRun], args: argparse.Namespace) -> None:
    """Submit one job array, a task for each line of run ids; `known` has these runs.

    What they are is written down for the tasks, as the manifest may be another one by the time they
    begin.
    """
    text = "".join(f"{line}\n" for line in tasks)
    name = f"{args.grid}-{hashlib.sha256(f'{RUNS.resolve()}{text}'.encode()).hexdigest()[:8]}"
    file = (RUNS / ".slurm" / f"{name}.tasks").absolute()
    runs = min(args.runs_per_job, len(tasks[0].split()))
    options = [
        f"--job-name={name}",
        f"--array=0-{len(tasks) - 1}",
        f"--output={file.with_suffix('')}-%a.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{args.seconds_to_stop}",
        f"--time={args.time}",
        "--ntasks=1",
        f"--cpus-per-task={runs * args.cpus_per_run}",
        f"--mem={runs * args.gib_per_run}G",
        *([f"--gpus={args.gpus_per_job}"] if args.gpus_per_job else []),
        *([f"--partition={args.partition}"] if args.partition else []),
        *([f"--account={args.account}"] if args.account else []),
        *shlex.split(args.sbatch),
    ]
    command = [sys.executable, str(Path(__file__).resolve()), "work", args.grid]
    command += ["--tasks", str(file), "--threads", str(args.cpus_per_run)]
    # As a step: a batch script gets no signal itself when its job is preempted with a grace time.
    step = f"srun --ntasks=1 --cpus-per-task={runs * args.cpus_per_run} --mpi=none --export=ALL"
    # RUNS is the folder of a tiny grid already.
    exports = f"export RUNS={shlex.quote(str(RUNS))} SMOKE="
    script = f"#!/bin/bash\n{exports}\nexec {step} {shlex.join(command)}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    ids = {*text.split()}
    lines = [json.dumps(asdict(run)) + "\n" for run in known if run.id in ids]
    file.with_suffix(".jsonl").write_text("".join(lines))
    job = slurm("sbatch", "--parsable", *options, text=script).strip()
    print(f"job array {job}: {len(tasks)} tasks of up to {runs} runs", flush=True)


def task(args: argparse.Namespace) -> int:
    """Do one task of a job array, its runs side by side; where they were stopped, ask Slurm to
    queue it again.
    """
    ids = Path(args.tasks).read_text().splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])].split()
    runs = [run for run in read(f".slurm/{Path(args.tasks).stem}") if run.id in ids]
    outcome = work(runs, slots(len(runs), str(args.threads)))
    status = report(args.grid, runs, outcome)
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    # Near the time limit or in the grace time the task is still running. Otherwise Slurm queues it
    # again by itself, or it was cancelled, and to queue it again would bring it back to life.
    ask = ("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    if outcome.stopped and slurm(*ask, may_fail=True).strip() == "RUNNING":
        slurm("scontrol", "requeue", job, may_fail=True)
    return status


def show(runs: list[TrainingRun], alive: set[str]) -> None:
    """Print a table of states by curve, then the runs that are under way and those that failed."""
    states = {run.id: run.state for run in runs}
    in_queue = {key for key in alive if states.get(key) in ("waiting", "stopped")}
    states |= dict.fromkeys(in_queue, "queued")
    curves = list(dict.fromkeys(run.curve for run in runs))
    width = max(len(curve) for curve in ("all", *curves))
    print(f"{'':{width}}" + "".join(f"{state:>9}" for state in STATES))
    for curve in [*curves, "all"]:
        mine = runs if curve == "all" else [run for run in runs if run.curve == curve]
        counts = Counter(states[run.id] for run in unique(mine))
        print(f"{curve:{width}}" + "".join(f"{counts[state]:>9}" for state in STATES))
    for state, tell in (("running", TrainingRun.progress), ("failed", TrainingRun.last_line)):
        for run in unique(runs):
            if states[run.id] == state:
                print(f"{state}: {run.folder}\n    {tell(run)}")


def positive(text: str) -> int:
    """Return an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer, at least 1")
    return int(text)


LOCAL = (
    ("workers", None, "runs at a time; default: one per core, or --runs-per-gpu on each GPU"),
    ("runs-per-gpu", 1, "runs that share a GPU; default: 1"),
)  # options that are counts: name, default, help
SLURM = (
    ("runs-per-job", 1, "runs that share a task of a job array; default: 1"),
    ("cpus-per-run", 1, "cores of each run; default: 1"),
    ("gib-per-run", 10, "memory of each run in GiB; default: 10"),
    ("gpus-per-job", None, "GPUs of a task; default: none"),
    ("seconds-to-stop", 300, "time before the limit at which runs are told to stop; default: 300"),
    ("poll-seconds", 30, "time between two looks at the queue; default: 30"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; add is told apart before, as its flags are those of a
    script.
    """
    shape: Any = {"description": __doc__, "formatter_class": argparse.RawTextHelpFormatter}
    top = argparse.ArgumentParser(prog="launch.py", **shape)
    names = "add | launch | status | retry | remove"
    commands = top.add_subparsers(dest="command", required=True, metavar=names)
    commands.add_parser("add", usage="launch.py add GRID CURVE SCRIPT --flag VALUE ...")
    ours = {}
    for name in ("launch", "status", "retry", "remove", "work"):
        ours[name] = commands.add_parser(name)
        ours[name].add_argument("grid", help="name of the grid")
    ours["remove"].add_argument("curve")
    ours["work"].add_argument("--tasks")
    ours["work"].add_argument("--threads", type=int)
    launch = ours["launch"]
    backends: Any = {"choices": ("local", "slurm"), "default": "local"}
    launch.add_argument("--backend", **backends, help="default: local")
    here, there = launch.add_argument_group("local"), launch.add_argument_group("slurm")
    for group, options in ((here, LOCAL), (there, SLURM)):
        for name, default, text in options:
            count: Any = {"type": positive, "default": default, "metavar": "N"}
            group.add_argument(f"--{name}", **count, help=text)
    there.add_argument("--time", default="24:00:00", help="limit of a task; default: 24:00:00")
    there.add_argument("--partition")
    there.add_argument("--account")
    text = "more options of sbatch, in one string"
    there.add_argument("--sbatch", default="", metavar="OPTIONS", help=text)
    owners = {a.option_strings[0]: str(g.title) for g in (here, there) for a in g._group_actions}
    launch.set_defaults(of_backend=owners)
    return top


def main(argv: list[str]) -> int:
    """Do what the command line asks; return the exit status."""
    if argv[:1] == ["add"] and not {"-h", "--help"} & {*argv[1:2]}:
        if len(argv) < 4:
            refuse("add needs GRID CURVE SCRIPT --flag VALUE ...")
        if not argv[1].replace("-", "").replace("_", "").isalnum():
            refuse(f"add {argv[1]}: GRID must be of letters, digits, - and _")
        add(argv[1], argv[2], argv[3], argv[4:])
        return 0
    args = parser().parse_args(argv)
    if DRY:
        print(shlex.join(["python", "benchmark/launch.py", *argv]))
        return 0
    if args.command == "work":
        return task(args)
    runs = read(args.grid)
    if args.command == "launch":
        for flag, backend in args.of_backend.items():
            if backend != args.backend and any(word.partition("=")[0] == flag for word in argv):
                refuse(f"{flag} is for --backend {backend}")
        return (local if args.backend == "local" else submit)(unique(runs), args)
    if args.command == "status":
        alive = set[str]()
        try:
            alive = queued()
        except SystemExit:  # it has said why
            print(
                "launch.py: what is queued under Slurm is not known, and shown as waiting",
                file=sys.stderr,
            )
        show(runs, alive)
    elif args.command == "remove":
        if args.curve not in {run.curve for run in runs}:
            refuse(
                f"{args.curve}: {args.grid} has the curves "
                f"{', '.join(dict.fromkeys(run.curve for run in runs))}"
            )
        replace(args.grid, args.curve, [])
    else:
        failed = [run for run in unique(runs) if run.state == "failed"]
        for run in failed:
            (run.path / ".failed").unlink()
        print(f"{args.grid}: {len(failed)} run{'s' * (len(failed) != 1)} may start again")
    return 0


if __name__ == "__main__":
    outlive_readers()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print(
            "\nlaunch.py: Ctrl-C; jobs under Slurm go on (scancel ends them), launch again to wait",
            file=sys.stderr,
        )
        sys.exit(STOPPED)
