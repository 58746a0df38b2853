"""Gradient steps per second of cql_offline_snip.py against CORL's cql.py, in turn.

    python benchmark/speed_vs_corl.py --corl ../CORL --repeats 5

CORL is a checkout of github.com/tinkoff-ai/CORL. Each program has a process of its own. Its file is
run as it is; what it imports for its environments, flags and logging is replaced by empty modules,
since only its networks, its replay and its train() are used. Both have three hidden layers of 256
units, batch 256, 10 actions of each kind and Hopper's sizes, and draw from 100,000 random
transitions. Threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cleanrl_sparse"))
import cql_offline_snip as script

OBS, ACT, SIZE = 11, 3, 100_000


@dataclasses.dataclass
class Args:
    """Flags."""

    corl: Path  # checkout of CORL
    repeats: int = 5  # times that each program is measured
    updates: int = 20  # gradient steps per measurement
    only: str = ""  # measure this program in this process, once, and print its speed alone


def random_data() -> script.Data:
    """Return random transitions."""
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, SIZE, OBS)).astype(np.float32)
    actions, rewards = (
        rng.uniform(-1, 1, (SIZE, ACT)).astype(np.float32),
        rng.normal(size=SIZE).astype(np.float32),
    )
    return script.Data(
        obs, actions, rewards, next_obs, rng.random(SIZE) < 0.01, rng.random(SIZE) < 0.02
    )


def theirs(args: Args, data: script.Data) -> Callable[[], None]:
    """Return CORL's gradient step."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[name] = types.ModuleType(name)
    stubs: Any = sys.modules
    stubs["pyrallis"].wrap, stubs["gym"].Env = (lambda: lambda function: function), object
    module: Any = types.ModuleType("corl_cql")
    sys.modules["corl_cql"] = module
    path = args.corl / "algorithms" / "offline" / "cql.py"
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    config = module.TrainConfig(device="cpu")
    critics = [
        module.FullyConnectedQFunction(OBS, ACT, config.orthogonal_init, config.q_n_hidden_layers)
        for _ in "12"
    ]
    actor = module.TanhGaussianPolicy(
        OBS, ACT, 1.0, log_std_multiplier=1.0, orthogonal_init=config.orthogonal_init
    )
    adams = [torch.optim.Adam(critic.parameters(), config.qf_lr) for critic in critics]
    actor_adam = torch.optim.Adam(actor.parameters(), config.policy_lr)
    agent = module.ContinuousCQL(
        critics[0],
        adams[0],
        critics[1],
        adams[1],
        actor,
        actor_adam,
        target_entropy=-ACT,
        cql_alpha=config.cql_alpha,
        bc_steps=0,
    )
    buffer = module.ReplayBuffer(OBS, ACT, SIZE, "cpu")
    buffer.load_d4rl_dataset(
        {
            "observations": data.obs,
            "actions": data.actions,
            "rewards": data.rewards,
            "next_observations": data.next_obs,
            "terminals": data.terminated,
        }
    )
    return lambda: agent.train(buffer.sample(config.batch_size))


def ours(data: script.Data, **flags: Any) -> Callable[[], None]:
    """Return our gradient step."""
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mallopt, as the script does
        ctypes.CDLL(None).mallopt(option, value)
    args, cpu = script.Args(dataset="random", **flags), torch.device("cpu")
    dataset = script.Dataset(data, script.MujocoEnvs("Hopper-v5", 1, 0), args, cpu)
    agent = script.CQL(args, OBS, ACT, cpu)
    agent.prune([dataset.sample(args.batch_size)])
    return lambda: agent.captured_update(dataset)


PROGRAMS: dict[str, Callable[[Args, script.Data], Callable[[], None]]] = {
    "CORL cql.py": theirs,
    "cql_offline_snip.py, dense": lambda _, data: ours(data, pruner="none"),
    "cql_offline_snip.py, 95 %": lambda _, data: ours(data),
    "cql_offline_snip.py, 95 %, bf16": lambda _, data: ours(data, precision="bf16"),
}


def main(args: Args) -> None:
    """Measure all in turn and print the medians and the ratios."""
    if args.only:
        step = PROGRAMS[args.only](args, random_data())
        for _ in range(5):
            step()
        begin = time.perf_counter()
        for _ in range(args.updates):
            step()
        print(args.updates / (time.perf_counter() - begin))
        return
    speeds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(args.repeats):
        for name, values in speeds.items():
            command = [
                sys.executable,
                __file__,
                "--corl",
                str(args.corl),
                "--updates",
                str(args.updates),
            ]
            result = subprocess.run(
                [*command, "--only", name], capture_output=True, text=True, check=True
            )
            values.append(float(result.stdout.split()[-1]))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| program | updates/s, median | lowest | highest | ratio |\n|---|---|---|---|---|")
    base = statistics.median(speeds["CORL cql.py"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"| {name} | {median:.1f} | {min(values):.1f} | {max(values):.1f} | "
            f"{median / base:.2f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
