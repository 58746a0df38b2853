"""Make the table of the exported agents in agents/: returns, sparsity, size, time per action.

    python benchmark/agents.py                   # 10 episodes each, as Markdown
    python benchmark/agents.py --episodes 100    # the table of agents/README.md

agents/NAME/ has what export.py wrote: agent.bin, agent.c, agent.h and agent.py. agent_weights.c,
the same bytes as agent.bin in C, is not kept there: `export.py` makes it, and so does --weights.
Returns are evaluate.py's, sparsity is of what was exported. Sizes are agent.bin's, times medians
from Python on one thread. Both are compared with a dense network of the shape that the agent had
before it was pruned, with random weights, exported likewise and timed in turn with it.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cleanrl_sparse"))
UNITS = {"actor": 256, "minatar": 32}  # of each dense layer before it was pruned
COLUMNS = "agent|environment|return|sparsity|weights|kB|dense kB|us per action|dense us"


@dataclass
class Args:
    """Flags."""

    folder: Path = ROOT / "agents"  # with one folder per agent
    episodes: int = 10  # to play with each (>= 1)
    weights: bool = False  # only write each agent's agent_weights.c


def dense_twin(agent: Any, folder: Path) -> Any:
    """Return the dense network that an agent was, but with random weights, exported to `folder`."""
    import export
    import torch

    torch.manual_seed(0)
    kind = agent.describe()[0]["script"]
    if kind == "actor":
        sac = importlib.import_module("sac_mujoco_gmp")
        network, prefix = sac.Actor(agent.shape[0], agent.actions, UNITS[kind], 2), "actor."
    else:
        dqn = importlib.import_module("dqn_minatar_gmp")
        args = dqn.Args(feature_size=UNITS[kind])
        network, prefix = dqn.QNetwork(agent.shape[0], agent.actions, args), ""
    weights = {prefix + name: p.detach() for name, p in network.named_parameters()}
    number = {"float32": "fp32", "float16": "fp16", "int8": "int8"}[agent.type.__name__]
    export.export({"script": kind, "env_id": agent.env_id}, weights, folder, number)
    return export.load_agent(folder)


def row(folder: Path, episodes: int) -> str:
    """Return an agent's row of the table."""
    import export

    command = [sys.executable, str(ROOT / "cleanrl_sparse/evaluate.py"), str(folder)]
    command += ["--episodes", str(episodes)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:  # evaluate.py has said why
        sys.exit(result.returncode)
    found = re.search(r"return (\S+), 95 % interval (\[.*?\])", result.stdout)
    assert found, result.stdout
    agent = export.load_agent(folder)
    matrices = agent.describe()[1].values()
    sparsity = 1 - sum(map(np.count_nonzero, matrices)) / sum(w.size for w in matrices)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert size <= 500_000, f"{folder}: {size:,} bytes; at most 500,000 go into the repository"
    game = "MinAtar/" * (agent.shape[-1] == 10 and len(agent.shape) == 3) + agent.env_id
    cells = [folder.name, game, f"{found[1]} {found[2]}", f"{sparsity:.1%}", agent.type.__name__]
    obs = export.observations(agent, 500, 0, lambda batch: np.stack([*map(agent.act, batch)]))
    with tempfile.TemporaryDirectory() as twin:
        both = [agent, dense_twin(agent, Path(twin))]
    cells += [f"{len(one.data) / 1000:,.0f}" for one in both]
    times = list[list[float]]([[], []])
    for x in obs:
        for one, taken in zip(both, times):
            start = time.perf_counter()
            one.act(x)
            taken.append(time.perf_counter() - start)
    cells += [f"{np.median(taken) * 1e6:.1f}" for taken in times]
    return "| " + " | ".join(cells) + " |"


def main(args: Args) -> None:
    """Print the table or, with --weights, write each agent's agent_weights.c."""
    import export

    folders = sorted(path.parent for path in args.folder.glob("*/agent.bin"))
    if not folders:
        sys.exit(f"agents.py: --folder {args.folder}: no folder with an agent.bin is in it")
    if args.weights:
        for folder in folders:
            table = export.weights_table((folder / "agent.bin").read_bytes())
            (folder / "agent_weights.c").write_text(table)
        return
    print("| " + COLUMNS.replace("|", " | ") + " |")
    print("|---" * len(COLUMNS.split("|")) + "|")
    for folder in folders:
        print(row(folder, args.episodes), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
