"""Speed of a training script: steps per second after warm-up, and where the time goes.

    python benchmark/speed.py                                  # the whole table, about 6 minutes on 2 CPU cores
    python benchmark/speed.py --networks cnn --num-networks 1 --precisions fp32 --repeats 5
    python benchmark/speed.py --device cuda --num-envs 8 --compile

Each row runs the script's own parts (act, environment, replay, update) in the order of its main loop (Breakout,
1 % of the actions random, replay ratio 0.25), without logging and, for several environments, without letting them step
while the networks learn. `update` includes `sample`, which is also timed alone. Rows are measured
in turn, `--repeats` times over, and the median is shown, because machines drift. With K = 5 four of the networks are at
50 % sparsity; masks are applied at every update, also to a dense network.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro

COLUMNS = ("act", "env", "store", "update", "sample")


@dataclasses.dataclass
class Args:
    """Flags; lists are measured in all combinations."""

    networks: tuple[str, ...] = ("cnn", "impala")  # cnn, impala
    num_networks: tuple[int, ...] = (1, 5)  # K
    precisions: tuple[str, ...] = ("fp32", "bf16")  # fp32, bf16
    num_envs: tuple[int, ...] = (1,)  # environments
    feature_size: int = 512  # units of the dense layer
    updates: int = 60  # timed updates per row and repeat; a row takes four times as many steps
    repeats: int = 3  # times that every row is measured
    device: str = "cpu"  # cpu or cuda
    compile: bool = False  # the update as a CUDA graph


class Row:
    """One configuration, kept ready: its agent, environments and replay."""

    def __init__(self, script: ModuleType, args: Args, network: str, k: int, precision: str, num_envs: int) -> None:
        self.name = f"{network} | {k} | {precision} | {num_envs}"
        self.num_envs, self.device = num_envs, torch.device(args.device)
        flags = script.Args(network=network, num_networks=k, precision=precision, num_envs=num_envs, buffer_size=20_000,
                            feature_size=args.feature_size, compile=args.compile)
        self.batch_size = flags.batch_size
        self.envs = script.AtariEnvs("breakout", num_envs, 1)
        self.agent = script.EauDeQN(flags, self.envs.num_actions, self.device)
        self.replay = script.FrameReplay(flags.buffer_size, num_envs, self.device, 1, flags.gamma)
        self.replay.see(self.envs.obs[:, -1])
        if k > 1:
            self.agent.args = dataclasses.replace(flags, max_sparsity_step=0.5, max_exponent=1e9)
            self.agent.update_target(0)
            self.agent.args = flags
        self.times: list[dict[str, float]] = []

    def clock(self) -> float:
        """Return the time once the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, updates: int) -> dict[str, float]:
        """Run the main loop for `updates` updates; return seconds per part and the number of steps."""
        spent, done, steps = dict.fromkeys(COLUMNS, 0.0), 0, 0
        while done < updates:
            t0 = self.clock()
            actions = self.agent.act(self.envs.obs, 0.01)
            t1 = self.clock()
            self.envs.send(actions)
            outcome = self.envs.recv()
            t2 = self.clock()
            self.replay.add(actions, outcome, self.envs.obs[:, -1])
            t3 = self.clock()
            due = (steps + self.num_envs) // 4 - steps // 4
            self.agent.learn(self.replay, due)
            t4 = self.clock()
            for part, seconds in zip(COLUMNS, (t1 - t0, t2 - t1, t3 - t2, t4 - t3)):
                spent[part] += seconds
            done, steps = done + due, steps + self.num_envs
        begin = self.clock()
        for _ in range(done):
            self.replay.sample(self.batch_size)
        return spent | {"sample": self.clock() - begin, "updates": done, "steps": steps}

    def table_row(self) -> str:
        """Return the row of medians."""
        def median(value: Any) -> float:
            """Return the median over the repeats of value(times)."""
            return statistics.median(value(t) for t in self.times)

        sps = median(lambda t: t["steps"] / sum(t[c] for c in COLUMNS[:4]))
        shares = [median(lambda t, c=c: t[c] / t["steps"] * 1e3) for c in COLUMNS[:3]]
        update, sample = (median(lambda t, c=c: t[c] / t["updates"] * 1e3) for c in COLUMNS[3:])
        parts = " | ".join(f"{x:.3f}" for x in shares)
        return f"| {self.name} | {sps:.0f} | {update:.2f} | {sample:.3f} | {parts} |"


def main(args: Args) -> None:
    """Measure and print one table."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cleanrl_sparse"))
    script = importlib.import_module("eaudeqn_atari")
    script.keep_freed_memory()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, F = {args.feature_size}\n")
    choices = itertools.product(args.networks, args.num_networks, args.precisions, args.num_envs)
    rows = [Row(script, args, *choice) for choice in choices]
    for row in rows:
        row.run(20)  # fills the replay and settles caches
    for _ in range(args.repeats):
        for row in rows:
            row.times.append(row.run(args.updates))
    print("| network | K | precision | envs | steps/s | update ms | sample ms | act ms/step | env ms/step | store ms |")
    print("|---" * 10 + "|")
    for row in rows:
        print(row.table_row())


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
