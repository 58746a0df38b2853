"""Make the README's table of results, from benchmark/results/*.csv and agents/README.md.

    python benchmark/front.py                    # print it, as Markdown
    python benchmark/front.py --write            # put it into README.md

A return is the mean of a run's last five epochs or evaluations, averaged over the finished runs.
Files and times are those of a dense network and of the agents that are kept: dense, scheduled, Eau
De Q-Network's (agents.py).
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
    dense: str  # the curve's name
    scheduled: str
    eau_de: str
    agents: tuple[str, str] = ("", "")  # folders of agents/: scheduled, Eau De Q-Network's


ACTOR = ("SAC dense", "SAC 95 %, L2", "EauDeSAC, pruned actor")
CRITICS = ("SAC dense", "", "EauDeSAC")
MINATAR = ("DQN", "PolyPruneDQN", "EauDeDQN")
ROWS = [
    Row("HalfCheetah-v5", "HalfCheetah-v5", *ACTOR, ("halfcheetah_95", "halfcheetah")),
    Row("the same, critics alone", "HalfCheetah-v5", *CRITICS),
    Row("Hopper-v5", "Hopper-v5", *ACTOR, ("hopper_95", "hopper")),
    Row("the same, critics alone", "Hopper-v5", *CRITICS),
    Row("SpaceInvaders", "MinAtar/SpaceInvaders", *MINATAR, ("", "minatar_space_invaders")),
    Row("Freeway", "MinAtar/Freeway", *MINATAR, ("", "minatar_freeway")),
    Row("Breakout", "MinAtar/Breakout", *MINATAR, ("", "minatar_breakout")),
    Row("Seaquest", "MinAtar/Seaquest", *MINATAR, ("", "minatar_seaquest")),
    Row("Asterix", "MinAtar/Asterix", *MINATAR, ("", "minatar_asterix")),
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
    header = "task | dense DQN or SAC | 95 % by schedule | Eau De Q-Network | its sparsity"
    kept = "dense, 95 %, Eau De"
    lines = [f"| {header} | kB: {kept} | µs per action: {kept} |", "|" + "---|" * 7]
    for row in ROWS:
        dense, digits = returns[row.dense, row.env_id], 1 if "MinAtar" in row.env_id else 0
        cells = [row.task, f"{dense:,.{digits}f}"]
        for curve in (row.scheduled, row.eau_de):
            value = returns.get((curve, row.env_id))
            share = "" if value is None else f"{value:,.{digits}f} ({100 * value / dense:.0f} %)"
            cells.append(share or "-")
        sparsity = f"{all_weights[row.eau_de, row.env_id]:.2f}"
        if row.eau_de == "EauDeSAC":
            sparsity = f"critics {critics[row.eau_de, row.env_id]:.2f}, actor 0"
        cells.append(sparsity)
        both = [shipped.get(name, {}) for name in row.agents]
        for column, twin in (("kB", "dense kB"), ("us per action", "dense us")):
            values = [both[1].get(twin), *(agent.get(column) for agent in both)]
            cells.append(", ".join(x or "-" for x in values) if any(values) else "-")
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
