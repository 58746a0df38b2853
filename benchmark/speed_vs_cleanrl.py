"""Steps per second of eaudeqn_atari.py with K = 1 against CleanRL's dqn_atari.py, in turn on one machine.

    python benchmark/speed_vs_cleanrl.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

CLEANRL is a checkout of github.com/vwxyzjn/cleanrl, CLEANRL_PYTHON an interpreter that can run its dqn_atari.py. Its
network is given our SAME padding (7,744 instead of 3,136 features) from outside, by patching torch.nn; all else is as
it is there: batch 32, one update per 4 steps, Breakout; 1 % of the actions are random. Its speed is 4 steps per
optimiser step. Both programs use the same number of threads, and nothing else should run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

WARM_UP, UPDATES = 75, 150  # updates not timed, updates timed

# Runs in CleanRL's interpreter: SAME padding, a clock on Adam, then the script as it stands.
PEER = """
import json, runpy, sys, time
import torch, torch.nn as nn
import ale_py
torch.set_num_threads(int(sys.argv[1]))
conv, linear, adam = nn.Conv2d, nn.Linear, torch.optim.Adam
def same_conv(c_in, c_out, kernel, stride=1):
    if kernel == 4:
        return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), conv(c_in, c_out, kernel, stride))
    return conv(c_in, c_out, kernel, stride, padding={8: 2, 3: 1}[kernel])
nn.Conv2d = same_conv
nn.Linear = lambda n, m: linear(7744 if n == 3136 else n, m)
clock, goal = [], int(sys.argv[2])
class Adam(adam):
    def step(self, *args, **kwargs):
        clock.append(time.perf_counter())
        if len(clock) == goal:
            print("CLOCK " + json.dumps(clock), flush=True)
        return super().step(*args, **kwargs)
torch.optim.Adam = Adam
script = sys.argv[3]
sys.argv = [script] + sys.argv[4:]
sys.path.insert(0, script.rsplit("/", 2)[0])
runpy.run_path(script, run_name="__main__")
"""


@dataclasses.dataclass
class Args:
    """Flags."""

    cleanrl: Path  # checkout of CleanRL
    cleanrl_python: Path  # interpreter that can run it
    repeats: int = 5  # times that each program runs
    threads: int = os.cpu_count() or 1  # threads of each


def peer(args: Args) -> float:
    """Return CleanRL's steps per second."""
    steps = 4 * (WARM_UP + UPDATES) + 520
    flags = ["--env-id", "BreakoutNoFrameskip-v4", "--buffer-size", "20000", "--learning-starts", "500",
             "--start-e", "0.01", "--end-e", "0.01", "--total-timesteps", str(steps)]
    script = args.cleanrl.resolve() / "cleanrl" / "dqn_atari.py"
    python, updates = str(args.cleanrl_python.absolute()), str(WARM_UP + UPDATES)
    command = [python, "-W", "ignore", "-c", PEER, str(args.threads), updates, str(script), *flags]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"CleanRL's script did not run: {result.stderr.splitlines()[-1]}")
    output = result.stdout
    clock = json.loads(next(line for line in output.splitlines() if line.startswith("CLOCK")).removeprefix("CLOCK "))
    return 4 * (len(clock) - 1 - WARM_UP) / (clock[-1] - clock[WARM_UP])


def ours(args: Args, precision: str, num_envs: int) -> float:
    """Return our steps per second."""
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--networks", "cnn", "--num-networks", "1",
               "--precisions", precision, "--num-envs", str(num_envs), "--repeats", "1", "--updates", str(UPDATES)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1].split("|")[5])


def main(args: Args) -> None:
    """Measure all in turn and print the medians and ratios."""
    programs = {"CleanRL dqn_atari.py, SAME padding": lambda: peer(args),
                "K = 1, fp32, 1 environment": lambda: ours(args, "fp32", 1),
                "K = 1, bf16, 4 environments": lambda: ours(args, "bf16", 4)}
    speeds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(args.repeats):
        for name, measure in programs.items():
            speeds[name].append(measure())
            print(f"{time.strftime('%H:%M:%S')} run {repeat + 1}: {name}: {speeds[name][-1]:.0f} steps/s", flush=True)
    base = statistics.median(next(iter(speeds.values())))
    print("\n| program | steps/s, median | lowest | highest | ratio |\n|---|---|---|---|---|")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | {median / base:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
