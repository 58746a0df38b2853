"""Steps per second of our scripts against CleanRL's, in turn on one machine.

    python benchmark/speed_vs_cleanrl.py --cleanrl ../cleanrl \\
        --cleanrl-python ../cleanrl/.venv/bin/python
    python benchmark/speed_vs_cleanrl.py --peers sac_continuous_action --repeats 3 ...

CLEANRL is a checkout of github.com/vwxyzjn/cleanrl, CLEANRL_PYTHON an interpreter that can run
these scripts. Their Atari network is given our SAME padding (7,744 instead of 3,136 features) from
outside; all else is as it is there: batch 32, one update per 4 steps, Breakout; 1 % of DQN's
actions are random. SAC: HalfCheetah-v5, 256-256 units, batch 256, one update per step. Their speed
follows from the optimiser steps per environment step (1/4; of SAC 3: critics, actor, temperature).
All programs use the same number of threads, and nothing else should run.
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
from collections.abc import Callable
from pathlib import Path

import tyro

WARM_UP, UPDATES = 75, 150  # updates not timed, updates timed; twice as many of SAC

# Runs in CleanRL's interpreter: SAME padding, a clock on Adam, then the script as it stands.
PEER = """
import json, sys, time
import torch, torch.nn as nn
import ale_py
torch.set_num_threads(int(sys.argv[1]))
conv, adam = nn.Conv2d, torch.optim.Adam
def same_conv(c_in, c_out, kernel, stride=1):
    if kernel == 4:
        return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), conv(c_in, c_out, kernel, stride))
    return conv(c_in, c_out, kernel, stride, padding={8: 2, 3: 1}[kernel])
nn.Conv2d = same_conv
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
source = open(script).read().replace("3136", "7744")  # SAC has no such number, and no convolutions
exec(compile(source, script, "exec"), {"__name__": "__main__", "__file__": script})
"""


@dataclasses.dataclass
class Args:
    """Flags."""

    cleanrl: Path  # checkout of CleanRL
    cleanrl_python: Path  # interpreter that can run it
    # their scripts
    peers: tuple[str, ...] = ("dqn_atari", "rainbow_atari", "sac_continuous_action")
    repeats: int = 5  # times that each program runs
    threads: int = os.cpu_count() or 1  # threads of each


def peer(args: Args, name: str) -> float:
    """Return the steps per second of a script of CleanRL's."""
    sac = name == "sac_continuous_action"
    per_step = 3 if sac else 0.25  # optimiser steps
    warm_up, timed = (2 * 3 * WARM_UP, 2 * 3 * UPDATES) if sac else (WARM_UP, UPDATES)
    starts = 300 if sac else 500  # SAC stays within the first episode, of 1,000 steps
    total = starts + int((warm_up + timed) / per_step) + 20
    env_id = "HalfCheetah-v5" if sac else "BreakoutNoFrameskip-v4"
    flags = [
        "--env-id",
        env_id,
        "--buffer-size",
        "20000",
        "--learning-starts",
        str(starts),
        "--total-timesteps",
        str(total),
    ]
    flags += ["--start-e", "0.01", "--end-e", "0.01"] if name == "dqn_atari" else []
    script = args.cleanrl.resolve() / "cleanrl" / f"{name}.py"
    python, updates = str(args.cleanrl_python.absolute()), str(warm_up + timed)
    command = [python, "-W", "ignore", "-c", PEER, str(args.threads), updates, str(script), *flags]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"CleanRL's script did not run: {result.stderr.splitlines()[-1]}")
    output = result.stdout
    clock = json.loads(
        next(line for line in output.splitlines() if line.startswith("CLOCK")).removeprefix(
            "CLOCK "
        )
    )
    return (len(clock) - 1 - warm_up) / per_step / (clock[-1] - clock[warm_up])


def ours(args: Args, script: str, precision: str = "fp32", num_envs: int = 1, k: int = 1) -> float:
    """Return the steps per second of a script of ours."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("speed.py")),
        "--scripts",
        script,
        "--networks",
        "cnn",
        "--num-networks",
        str(k),
        "--precisions",
        precision,
        "--num-envs",
        str(num_envs),
        "--repeats",
        "1",
        "--updates",
        str(UPDATES),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    return float(output.splitlines()[-1].split("|")[6])


def main(args: Args) -> None:
    """Measure all in turn and print the medians and, against the peer above them, the ratios."""
    groups: dict[str, dict[str, Callable[[], float]]] = {
        "dqn_atari": {
            "eaudeqn_atari.py, K = 1": lambda: ours(args, "eaudeqn_atari"),
            "eaudeqn_atari.py, K = 1, bf16, 4 environments": lambda: ours(
                args, "eaudeqn_atari", "bf16", 4
            ),
            "dqn_atari_gmp.py": lambda: ours(args, "dqn_atari_gmp"),
        },
        "rainbow_atari": {
            "rainbow_resnet_gmp.py --network cnn": lambda: ours(args, "rainbow_resnet_gmp")
        },
        "sac_continuous_action": {
            "sac_mujoco_eaudeqn.py, K = 1": lambda: ours(args, "sac_mujoco_eaudeqn"),
            "sac_mujoco_eaudeqn.py, K = 1, bf16": lambda: ours(args, "sac_mujoco_eaudeqn", "bf16"),
            "sac_mujoco_gmp.py --width 1": lambda: ours(args, "sac_mujoco_gmp"),
            "sac_mujoco_eaudeqn.py, K = 5": lambda: ours(args, "sac_mujoco_eaudeqn", k=5),
            "sac_mujoco_eaudeqn.py, K = 5, bf16": lambda: ours(
                args, "sac_mujoco_eaudeqn", "bf16", k=5
            ),
        },
    }
    programs: dict[str, Callable[[], float]] = {}
    for name in args.peers:
        title = f"CleanRL {name}.py{', SAME padding' if 'atari' in name else ''}"
        programs |= {title: lambda name=name: peer(args, name)} | groups[name]
    speeds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(args.repeats):
        for name, measure in programs.items():
            speeds[name].append(measure())
            print(
                f"{time.strftime('%H:%M:%S')} run {repeat + 1}: {name}: {speeds[name][-1]:.0f} "
                "steps/s",
                flush=True,
            )
    print("\n| program | steps/s, median | lowest | highest | ratio |\n|---|---|---|---|---|")
    base = 1.0
    for name, values in speeds.items():
        median = statistics.median(values)
        base = median if name.startswith("CleanRL") else base
        print(
            f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | "
            f"{median / base:.2f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
