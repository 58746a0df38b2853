"""Speed of the scripts: steps per second after warm-up, and where the time goes.

    python benchmark/speed.py                # the whole table
    python benchmark/speed.py --scripts eaudeqn_atari --num-networks 1 --precisions fp32
    python benchmark/speed.py --device cuda --num-envs 8 --compile

Each row runs a script's own parts (act, environment, replay, update) in the order of its main loop,
without logging and, for several environments, without letting them step while the networks learn:
on Atari Breakout with 1 % of the actions random and a replay ratio of 0.25, on MuJoCo HalfCheetah
with one update per step. Offline, on the recorded transitions of the tests, a step is an update.
`update` includes `sample`, which is also timed alone. Rows are measured in turn, `--repeats` times
over, and the median is shown, because machines drift. With K = 5 four of the networks are at 50 %
sparsity; masks are applied at every update, also to a dense network. The EauDeQN scripts on Atari
have the CNN alone, of width 1.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro

COLUMNS = ("act", "env", "store", "update", "sample")
ATARI = {
    "eaudeqn_atari": "EauDeQN",
    "dqn_atari_gmp": "DQN",
    "rainbow_resnet_gmp": "Rainbow",
}  # script: its agent
MUJOCO = {"sac_mujoco_eaudeqn": "EauDeSAC", "sac_mujoco_gmp": "SAC"}
OFFLINE = {"cql_atari_eaudeqn": "EauDeCQL", "cql_atari_gmp": "CQL"}


@dataclasses.dataclass
class Args:
    """Flags; lists are measured in all combinations."""

    scripts: tuple[str, ...] = (*ATARI, *MUJOCO, *OFFLINE)
    networks: tuple[str, ...] = ("cnn", "impala")  # cnn, impala (Atari)
    num_networks: tuple[int, ...] = (1, 5)  # K, of Eau De Q-Network
    precisions: tuple[str, ...] = ("fp32", "bf16")  # fp32, bf16
    num_envs: tuple[int, ...] = (1,)  # environments
    feature_size: int = 512  # units of the dense layer (Atari)
    width: int = 1  # multiplies the channels of the convolutions, or 256 units (MuJoCo)
    buffer_size: int = 20_000  # transitions that the replay has room for; it is not filled
    # timed updates per row and repeat, on Atari with four times as many steps; MuJoCo: five times
    updates: int = 60
    repeats: int = 3  # times that every row is measured
    device: str = "cpu"  # cpu or cuda
    compile: bool = False  # the update as a CUDA graph


class AtariRow:
    """One configuration, kept ready: its agent, environments and replay."""

    replay_ratio = 0.25

    def __init__(
        self, script: ModuleType, args: Args, network: str, k: int, precision: str, num_envs: int
    ) -> None:
        self.name = f"{script.__name__} | {network} | {k} | {precision} | {num_envs}"
        self.num_envs, self.device, self.updates = num_envs, torch.device(args.device), args.updates
        own: Any = {"num_networks": k}
        if script.__name__ != "eaudeqn_atari":
            own = {"analysis_every": 0, "network": network, "width": args.width}
        flags = script.Args(
            precision=precision,
            num_envs=num_envs,
            buffer_size=args.buffer_size,
            feature_size=args.feature_size,
            compile=args.compile,
            **own,
        )
        self.envs = script.AtariEnvs("breakout", num_envs, 1)
        agent = ATARI[script.__name__]
        self.agent = getattr(script, agent)(flags, self.envs.num_actions, self.device)
        kind = script.PrioritisedReplay if agent == "Rainbow" else script.FrameReplay
        self.replay = kind(flags, self.device, self.envs.obs[:, -1])
        self.batch_size = flags.batch_size
        if k > 1:
            self.prune(flags, lambda: self.agent.update_target(0))
        self.times: list[dict[str, float]] = []

    def prune(self, flags: Any, choose: Callable[[], None]) -> None:
        """Let the agent prune all candidates but the first to 50 % at one choice."""
        self.agent.args = dataclasses.replace(flags, max_sparsity_step=0.5, max_exponent=1e9)
        choose()
        self.agent.args = flags

    def act(self) -> Any:
        """Return actions for what the environments show."""
        return self.agent.act(self.envs.obs, 0.01)

    def step(self, actions: Any) -> Any:
        """Let the environments take a step."""
        self.envs.send(actions)
        return self.envs.recv()

    def store(self, actions: Any, outcome: Any) -> None:
        """Give a step to the replay."""
        self.replay.add(actions, outcome, self.envs.obs[:, -1])

    def clock(self) -> float:
        """Return the time once the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def fill(self, steps: int) -> None:
        """Take steps without learning, so that the first update has transitions to draw."""
        for _ in range(steps):
            actions = self.act()
            self.store(actions, self.step(actions))

    def learn(self, updates: int) -> None:
        """Take so many gradient steps: learn() takes those that are due by a step."""
        args = self.agent.args
        before = math.floor(args.learning_starts * args.replay_ratio)
        due = self.agent.gradient_step + updates + before
        self.agent.learn(self.replay, math.ceil(due / args.replay_ratio))

    def run(self, updates: int) -> dict[str, float]:
        """Run the main loop for `updates` updates; return seconds per part and the number of
        steps.
        """
        spent, done, steps = dict.fromkeys(COLUMNS, 0.0), 0, 0
        while done < updates:
            t0 = self.clock()
            actions = self.act()
            t1 = self.clock()
            outcome = self.step(actions)
            t2 = self.clock()
            self.store(actions, outcome)
            t3 = self.clock()
            due = int((steps + self.num_envs) * self.replay_ratio) - int(steps * self.replay_ratio)
            self.learn(due)
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


class MujocoRow(AtariRow):
    """The same on MuJoCo."""

    replay_ratio = 1.0

    def __init__(
        self, script: ModuleType, args: Args, k: int, precision: str, num_envs: int
    ) -> None:
        units = f"{256 * args.width}-{256 * args.width}"
        self.name = f"{script.__name__} | {units} | {k} | {precision} | {num_envs}"
        self.num_envs, self.device = num_envs, torch.device(args.device)
        self.updates = 5 * args.updates
        own = {"num_networks": k} if script.__name__ == "sac_mujoco_eaudeqn" else {}
        flags = script.Args(
            precision=precision,
            num_envs=num_envs,
            buffer_size=args.buffer_size,
            width=args.width,
            compile=args.compile,
            **own,
        )
        self.envs = script.MujocoEnvs("HalfCheetah-v5", num_envs, 1)
        sizes = (self.envs.obs.shape[1], self.envs.num_actions)
        self.agent = getattr(script, MUJOCO[script.__name__])(flags, *sizes, self.device)
        self.replay = script.Replay(flags, self.device, self.envs)
        self.batch_size = flags.batch_size
        if k > 1:
            self.prune(flags, lambda: self.agent.choose_and_prune())
        self.times: list[dict[str, float]] = []

    def act(self) -> Any:
        """Return actions for what the environments show."""
        return self.agent.act(self.envs.obs, explore=False)

    def step(self, actions: Any) -> Any:
        """Let the environments take a step."""
        self.seen = self.envs.obs
        return self.envs.step(actions)

    def store(self, actions: Any, outcome: Any) -> None:
        """Give a step to the replay."""
        self.replay.add(self.seen, actions, *outcome[:3])


class OfflineRow(AtariRow):
    """Updates alone, on 600 recorded transitions of Breakout."""

    def __init__(
        self, script: ModuleType, args: Args, network: str, k: int, precision: str
    ) -> None:
        self.name = f"{script.__name__} | {network} | {k} | {precision} | -"
        self.device, self.updates = torch.device(args.device), args.updates
        own: Any = {"num_networks": k}
        if script.__name__ != "cql_atari_eaudeqn":
            own = {"network": network, "width": args.width}
        folder = Path(__file__).resolve().parent.parent / "tests/data/atari/Breakout/1/replay_logs"
        flags = script.Args(
            dataset=str(folder),
            transitions=300,
            checkpoints_per_epoch=2,
            precision=precision,
            feature_size=args.feature_size,
            compile=args.compile,
            **own,
        )
        self.agent = getattr(script, OFFLINE[script.__name__])(flags, 4, self.device)
        self.replay = script.Dataset(folder, 4, flags, self.device)
        self.replay.load(0)
        self.batch_size = flags.batch_size
        if k > 1:
            self.prune(flags, lambda: self.agent.update_target(0))
        self.times: list[dict[str, float]] = []

    def fill(self, steps: int) -> None:
        """Do nothing: the data are there."""

    def run(self, updates: int) -> dict[str, float]:
        """Take `updates` gradient steps; return seconds per part and the number of steps."""
        begin = self.clock()
        self.agent.learn(self.replay, updates)
        learnt = self.clock()
        for _ in range(updates):
            self.replay.sample(self.batch_size)
        spent = dict.fromkeys(COLUMNS, 0.0) | {"update": learnt - begin}
        return spent | {"sample": self.clock() - learnt, "updates": updates, "steps": updates}


def main(args: Args) -> None:
    """Measure and print one table."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cleanrl_sparse"))
    scripts = [importlib.import_module(name) for name in args.scripts]
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mallopt, as the scripts do
        ctypes.CDLL(None).mallopt(option, value)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, F = "
        f"{args.feature_size}\n"
    )
    rows = list[AtariRow]()
    for script in scripts:
        ks = args.num_networks if "eaudeqn" in script.__name__ else (1,)
        for k, precision, num_envs in itertools.product(ks, args.precisions, args.num_envs):
            if script.__name__ in MUJOCO:
                rows.append(MujocoRow(script, args, k, precision, num_envs))
                continue
            for network in ("cnn",) if "eaudeqn" in script.__name__ else args.networks:
                if script.__name__ not in OFFLINE:
                    rows.append(AtariRow(script, args, network, k, precision, num_envs))
                elif num_envs == args.num_envs[0]:  # it has none
                    rows.append(OfflineRow(script, args, network, k, precision))
    for row in rows:
        row.fill(32)
        row.run(20)  # settles caches
    for _ in range(args.repeats):
        for row in rows:
            row.times.append(row.run(row.updates))
    columns = (
        "script|network|K|precision|envs|steps/s|update ms|sample ms|act ms/step|env "
        "ms/step|store ms/step"
    )
    print(f"| {columns.replace('|', ' | ')} |\n{'|---' * 11}|")
    for row in rows:
        print(row.table_row())


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
