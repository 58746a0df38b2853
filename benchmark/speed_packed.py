"""How much sooner a grid is finished with runs side by side than one after another.

    python benchmark/speed_packed.py           # four short SAC runs, 1 and 4 at a time
    python benchmark/speed_packed.py --workers 1 2 8 --runs 8 --repeats 5

The runs are real ones, started by launch.py, which shares the cores among them: one run at a time
has all of them. Times are of the whole grid, from the launcher's start to its end, with the
start-up of Python and torch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

LAUNCH = [sys.executable, str(Path(__file__).with_name("launch.py"))]


@dataclass
class Args:
    """Flags."""

    # runs at a time; the first is what the others are compared with
    workers: tuple[int, ...] = (1, 4)
    runs: int = 4  # of the grid (>= 1)
    steps: int = 4_000  # of each run, half of them with a gradient step (>= 600)
    repeats: int = 3  # times that every row is measured, in turn (>= 1)


def seconds(args: Args, workers: int) -> float:
    """Return the time that a new grid takes."""
    with tempfile.TemporaryDirectory() as runs:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "DRY", "SMOKE")
        }
        environment["RUNS"] = runs
        flags = (
            f"--env-id HalfCheetah-v5 --width 1 --eval-episodes 0 --total-timesteps {args.steps}"
        )
        seeds = " ".join(map(str, range(1, args.runs + 1)))
        flags += f" --learning-starts {args.steps // 2} --seed {seeds}"
        add = [*LAUNCH, "add", "packed", "SAC", "sac_mujoco_gmp.py", *flags.split()]
        subprocess.run(add, check=True, stdout=subprocess.DEVNULL, env=environment)
        start = time.perf_counter()
        launch = [*LAUNCH, "launch", "packed", "--workers", str(workers)]
        subprocess.run(launch, check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - start


def main(args: Args) -> None:
    """Print a Markdown table."""
    times: dict[int, list[float]] = {workers: [] for workers in args.workers}
    for _ in range(args.repeats):
        for workers, found in times.items():
            found.append(seconds(args, workers))
    base = statistics.median(times[args.workers[0]])
    cores = len(os.sched_getaffinity(0))
    print(
        f"{args.runs} runs of {args.steps} steps, {cores} cores, {args.repeats} repeats in turn\n"
    )
    print(
        "| runs at a time | seconds, median | lowest | highest | times sooner "
        "|\n|---|---|---|---|---|"
    )
    for workers, found in times.items():
        median = statistics.median(found)
        print(
            f"| {workers} | {median:.1f} | {min(found):.1f} | {max(found):.1f} | "
            f"{base / median:.2f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
