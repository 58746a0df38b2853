"""Make the README's table of results, from benchmark/results/*.csv and agents/README.md.

    python benchmark/front.py                    # print it, as Markdown
    python benchmark/front.py --write            # put it into README.md

A return is the mean of a run's last five epochs or evaluations, averaged over the finished runs.
Files and times are those of the agents, and of dense networks of their shapes (agents.py).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    """Flags."""

    write: bool = False  # replace the table in README.md instead of printing it


@dataclass
class Row:
    """A row of the table: where its numbers stand."""

    task: str
    env_id: str
    dense: str = "DQN"
    scheduled: str = "PolyPruneDQN"
    eau_de: str = "EauDeDQN"
    agent: str = ""  # a folder of agents/


ACTOR = {"dense": "SAC dense", "scheduled": "SAC 95 %", "eau_de": "EauDeSAC, pruned actor"}
CRITICS = {"dense": "SAC dense", "scheduled": "", "eau_de": "EauDeSAC"}
ROWS = [
    Row("HalfCheetah-v5, actor and critics", "HalfCheetah-v5", agent="halfcheetah", **ACTOR),
    Row("HalfCheetah-v5, critics alone", "HalfCheetah-v5", **CRITICS),
    Row("Hopper-v5, actor and critics", "Hopper-v5", agent="hopper", **ACTOR),
    Row("Hopper-v5, critics alone", "Hopper-v5", **CRITICS),
    Row("MinAtar SpaceInvaders", "MinAtar/SpaceInvaders", agent="minatar_space_invaders"),
    Row("MinAtar Freeway", "MinAtar/Freeway", agent="minatar_freeway"),
    Row("MinAtar Breakout", "MinAtar/Breakout", agent="minatar_breakout"),
    Row("MinAtar Seaquest", "MinAtar/Seaquest", agent="minatar_seaquest"),
    Row("MinAtar Asterix", "MinAtar/Asterix", agent="minatar_asterix"),
]


def last_values(column: str, last: int) -> dict[tuple[str, str], float]:
    """Return the mean of a column's last values, by curve and environment, over finished runs."""
    runs: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name in ("eaudesac_mujoco", "minatar_eaudeqn"):
        with open(ROOT / "benchmark" / "results" / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["finished"] == "1":
                    key = (row["curve"], row["env_id"], row["seed"])
                    runs[key].append(float(row[column]))
    means = defaultdict[tuple[str, str], list[float]](list)
    for (curve, env_id, _), values in runs.items():
        means[curve, env_id].append(float(np.mean(values[-last:])))
    return {key: float(np.mean(values)) for key, values in means.items()}


def agents() -> dict[str, dict[str, str]]:
    """Return the rows of the table in agents/README.md, by agent."""
    lines = (ROOT / "agents" / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines if x[:1] == "|"]
    return {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}


def table() -> str:
    """Return the table as Markdown."""
    returns, shipped = last_values("return", 5), agents()
    critics, all_weights = last_values("sparsity_target", 1), last_values("sparsity_prunable", 1)
    header = "task | dense DQN or SAC | 95 % by schedule | Eau De Q-Network | of dense"
    lines = [f"| {header} | its sparsity | kB (dense) | µs per action (dense) |", "|" + "---|" * 8]
    for row in ROWS:
        dense, eau_de = returns[row.dense, row.env_id], returns[row.eau_de, row.env_id]
        scheduled = returns.get((row.scheduled, row.env_id))
        digits = 1 if "MinAtar" in row.task else 0
        cells = [row.task, f"{dense:,.{digits}f}"]
        cells += ["-" if scheduled is None else f"{scheduled:,.{digits}f}", f"{eau_de:,.{digits}f}"]
        sparsity = f"{all_weights[row.eau_de, row.env_id]:.2f}"
        if row.eau_de == "EauDeSAC":
            sparsity = f"critics {critics[row.eau_de, row.env_id]:.2f}, actor 0"
        cells += [f"{100 * eau_de / dense:.0f} %", sparsity]
        one = shipped.get(row.agent)
        cells += [f"{one['kB']} ({one['dense kB']})" if one else "-"]
        cells += [f"{one['us per action']} ({one['dense us']})" if one else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Print the table, or put it into README.md."""
    if not args.write:
        print(table())
        return
    path = ROOT / "README.md"
    before, _, after = path.read_text().partition("| task |")
    path.write_text(before + table() + "\n\n" + after.partition("\n\n")[2])
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
