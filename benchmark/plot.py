"""Learning curves of a grid of runs: collect them into one CSV file and draw returns and sparsity over the steps.

    python benchmark/plot.py runs/eaudesac_mujoco benchmark/results/eaudesac_mujoco         # OUT.csv, OUT.png, OUT.svg
    python benchmark/plot.py benchmark/results/eaudesac_mujoco.csv pictures/eaudesac_mujoco # from the CSV alone

A grid is a folder METHOD/ENVIRONMENT/SEED/ of run folders; runs that have not ended yet are drawn as far as they are.
Lines are means over the seeds, bands reach from the lowest to the highest seed.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLUMNS = ("method", "env_id", "seed", "step", "seconds", "return", "sparsity_target", "sparsity_prunable")
KEYS = {"return": "eval/episodic_return", "sparsity_target": "sparsity/target",
        "sparsity_prunable": "sparsity/prunable"}  # fmt: skip
# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers for prints in black and white.
STYLES = [("#000000", "-", "o"), ("#E69F00", "--", "s"), ("#0072B2", "-", "^"), ("#D55E00", ":", "D"),
          ("#009E73", "-.", "v"), ("#CC79A7", "--", "x"), ("#56B4E9", ":", "P")]  # fmt: skip


@dataclass
class Args:
    """Flags."""

    source: Annotated[Path, tyro.conf.Positional]  # folder METHOD/ENVIRONMENT/SEED/ of runs, or a CSV file
    out: Annotated[Path, tyro.conf.Positional]  # path of the files to write, without an ending


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return one row for each evaluation of each run in METHOD/ENVIRONMENT/SEED/."""
    rows = []
    for metrics in sorted(folder.glob("*/*/*/metrics.jsonl")):
        method, env_id, seed = metrics.parent.parts[-3:]
        latest: dict[str, Any] = {}
        for line in metrics.read_text().splitlines():
            record = json.loads(line)
            latest |= record  # an evaluation may come without sparsity, which then is what it was
            step = record["step"]
            if KEYS["return"] in record:
                values = {column: latest[key] for column, key in KEYS.items()}
                facts = {"method": method, "env_id": env_id, "seed": int(seed), "step": step}
                values = {column: round(value, 6) for column, value in values.items()}
                rows.append(facts | {"seconds": round(record["seconds"])} | values)
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file of COLUMNS."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            sys.exit(f"plot.py: {path}: the columns must be {', '.join(COLUMNS)}")
        return [{k: v if k in COLUMNS[:2] else float(v) for k, v in row.items()} for row in reader]


def curves(rows: list[dict[str, Any]], column: str) -> np.ndarray:
    """Return [4, T]: step, mean, lowest and highest of a column over the seeds, as far as all of them reach."""
    by_step = defaultdict(list)
    for row in rows:
        by_step[row["step"]].append(row[column])
    seeds = len({row["seed"] for row in rows})
    full = {step: values for step, values in sorted(by_step.items()) if len(values) == seeds}
    return np.array([(step, np.mean(v), min(v), max(v)) for step, v in full.items()]).reshape(-1, 4).T


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw a column of panels for each environment: returns above, sparsity below."""
    envs, methods = sorted({row["env_id"] for row in rows}), sorted({row["method"] for row in rows})
    figure, axes = plt.subplots(2, len(envs), figsize=(5 * len(envs), 6.4), sharex=True, squeeze=False)
    panels = (("return", "return of 10 evaluation episodes"), ("sparsity_target", "sparsity of the critics"))
    for (i, (column, label)), (j, env_id) in ((a, b) for a in enumerate(panels) for b in enumerate(envs)):
        axis = axes[i, j]
        for (colour, dash, marker), method in zip(itertools.cycle(STYLES), methods):
            mine = [row for row in rows if (row["env_id"], row["method"]) == (env_id, method)]
            step, mean, low, high = curves(mine, column)
            seeds = len({row["seed"] for row in mine})
            name = f"{method} ({seeds} seed{'s' if seeds > 1 else ''})"
            look = {"color": colour, "linestyle": dash, "marker": marker, "markevery": 4, "markersize": 4}
            axis.plot(step / 1e3, mean, label=name, **look)
            axis.fill_between(step / 1e3, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_title(env_id if i == 0 else "")
        axis.set_ylabel(label if j == 0 else "")
        axis.set_xlabel("thousand steps" if i == 1 else "")
        axis.set_ylim(*((0, 1) if column.startswith("sparsity") else (None, None)))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(out.with_name(f"{out.name}.{ending}"), dpi=130)


def main(args: Args) -> None:
    """Write the CSV file and the picture, print a table: per seed the mean of the last five evaluations."""
    if not args.source.exists():
        sys.exit(f"plot.py: {args.source}: neither a folder METHOD/ENVIRONMENT/SEED/ of runs nor a CSV file")
    rows = collect(args.source) if args.source.is_dir() else read(args.source)
    if not rows:
        sys.exit(f"plot.py: {args.source}: no METHOD/ENVIRONMENT/SEED/metrics.jsonl with an evaluation is there")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.source.is_dir():
        with open(args.out.with_name(f"{args.out.name}.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, args.out)
    print("| method | environment | seeds | steps | return: median | lowest | highest | sparsity: critics | all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method, env_id in sorted({(row["method"], row["env_id"]) for row in rows}):
        mine = [row for row in rows if (row["method"], row["env_id"]) == (method, env_id)]
        end = int(curves(mine, "return")[0, -1])
        last = [row for row in mine if row["step"] == end]
        reached = [row for row in mine if row["step"] <= end]
        returns = [np.mean([row["return"] for row in reached if row["seed"] == at["seed"]][-5:]) for at in last]
        sparsity = [np.mean([row[column] for row in last]) for column in COLUMNS[-2:]]
        numbers = f"{np.median(returns):,.0f} | {min(returns):,.0f} | {max(returns):,.0f}"
        print(f"| {method} | {env_id} | {len(last)} | {end:,} | {numbers} | {sparsity[0]:.3f} | {sparsity[1]:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
