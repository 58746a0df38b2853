"""Statistics and pictures of a grid of runs, from its run folders or from a CSV file alone.

    python benchmark/plot.py curves GRID --reference Impala-DQN
    python benchmark/plot.py sweep GRID --x width --flat "DQN dense"
    python benchmark/plot.py curves benchmark/results/GRID.csv --out x  # from an earlier file

KIND is one of
    curves      score over the steps
    sweep       final score against the flag --x
    profile     share of the runs whose final score is above tau
    metrics     what was logged under --keys, over the steps
    layers      sparsity of each layer over the steps
    covariance  cosines between the loss gradients of 32 transitions

A grid is a file of one JSON object per planned run: {"curve", "script", "flags": {"env-id": "Pong",
...}, "folder"}. RUNS is an environment variable, by default runs; where SMOKE is set, RUNS/smoke.
Written are RUNS/GRID.csv, .png, .svg, .md and _table.csv. Picture and table are always made from
the CSV file, so that it alone gives them again, byte for byte. Only runs that have finished count
in final scores; "n of m" says how many of the planned ones have.

Scores of Atari games are human-normalised and pooled over the games; returns are shown for each
environment. Statistics are Agarwal et al.'s (2021, https://arxiv.org/abs/2108.13264): IQM,
optimality gap, median and mean of the games' means, with 95 % percentile intervals from a bootstrap
that redraws the seeds within each game.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "cleanrl-sparse",
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
ANCHORS = Path(__file__).parent / "anchors"
REFERENCES = ("CNN-DQN", "CNN-Rainbow", "Impala-DQN", "Impala-Rainbow")
with open(ANCHORS / "atari_human_normalisation.csv", newline="") as table:
    HUMAN = {
        row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(table)
    }
GAMES = {*HUMAN, "AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan"}
SPARSITY = {"sparsity_target": "sparsity/target", "sparsity_prunable": "sparsity/prunable"}
NUMBERS = (
    "step",
    "return",
    "d4rl_score",
    *SPARSITY,
    "i",
    "j",
    "cosine",
)  # columns; those of keys have a slash
SCORES = {"human": "human-normalised score", "return": "return", "d4rl": "D4RL score"}
SCORING = ("curves", "sweep", "profile")
USES = {
    "flat": ("sweep",),
    "keys": ("metrics",),
    "sparsity": ("curves",),
    "per_env": SCORING,
    "reference": SCORING,
    "score": SCORING,
    "bootstrap": SCORING,
    "seed": SCORING,
    "last": (*SCORING, "metrics", "layers"),
}  # flag: the kinds that read it
# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers for prints in
# black and white. As
# their numbers have no common divisor, 28 curves differ in colour or dash.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv*XP<"

Words = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # --keys A B --keys C
Strata = Sequence[np.ndarray]  # of each environment [..., its seeds]
Row = dict[str, Any]
Drawing = tuple[Figure, list[Row], str]  # picture, table, what to say below both


@dataclass
class Args:
    """Flags."""

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KIND")]  # one of the above
    grid: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID")
    ]  # of RUNS/GRID.jsonl, or a .csv file
    # flag in which the runs differ, such as width; kinds other than sweep make a curve of each
    # value
    x: str = ""
    flat: Words = ()  # curve that is the same at all --x: a horizontal line (sweep)
    # keys of metrics.jsonl, or their beginning up to a slash; none: analysis/ (metrics)
    keys: Words = ()
    per_env: bool = (
        False  # a panel for each game, with returns unless --score says otherwise (Atari)
    )
    sparsity: bool = False  # a second row of panels with the sparsity over the steps (curves)
    # Dopamine's published runs: CNN-DQN, CNN-Rainbow, Impala-DQN, Impala-Rainbow (Atari)
    reference: Words = ()
    score: str = (
        "auto"  # human, return or d4rl; auto: human for Atari unless --per-env, else return
    )
    last: int = 1  # scores whose mean is a run's final score, at least 1
    bootstrap: int = 2000  # replicates of the bootstrap, at least 100
    seed: int = 0  # of the bootstrap
    title: str = ""  # above the picture
    # path of the files to write, without an ending; default: beside the manifest or the .csv file
    out: str = ""


@dataclass
class Run:
    """A planned run and what it has logged."""

    curve: str
    env_id: str
    seed: int
    x: str
    finished: bool
    columns: dict[
        str, np.ndarray
    ]  # [T] each, NaN where nothing was logged; T = 0 if it has not begun
    scored: bool = True  # False for a game without a human score where that is asked for
    published: bool = False

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a column where it was logged."""
        steps = self.columns["step"]
        values = self.columns.get(column, np.full(len(steps), np.nan))
        return steps[~np.isnan(values)], values[~np.isnan(values)]

    def final(self, column: str, last: int) -> float:
        """Return the mean of the last values of a column, NaN if the run has not finished or has
        none.
        """
        values = self.series(column)[1][-last:]
        return float(values.mean()) if self.finished and len(values) else float("nan")


def fail(text: str) -> NoReturn:
    """End with one line and status 2."""
    print(f"plot.py: {text}", file=sys.stderr)
    raise SystemExit(2)


def words(groups: Words) -> list[str]:
    """Return the words of a flag that may be repeated."""
    return [word for group in groups for word in group]


def check(args: Args) -> None:
    """Refuse bad values, and flags that this kind would not read."""
    if args.kind not in KINDS:
        fail(f"KIND must be one of {', '.join(KINDS)}, not {args.kind}")
    for flag, kinds in USES.items():
        if getattr(args, flag) != getattr(Args, flag) and args.kind not in kinds:
            fail(f"--{flag.replace('_', '-')} is for {', '.join(kinds)}, not for {args.kind}")
    if args.kind == "sweep" and not args.x:
        fail("--x is missing: the flag in which the runs differ, such as --x width")
    if args.x.replace("-", "_") in ("curve", "env_id", "seed", "finished", "seconds", *NUMBERS):
        fail(f"--x must be a flag in which the runs of a curve differ, such as width, not {args.x}")
    if args.score not in ("auto", *SCORES):
        fail(f"--score must be auto, human, return or d4rl, not {args.score}")
    if args.last < 1 or args.bootstrap < 100 or args.seed < 0:
        fail("--last must be at least 1, --bootstrap at least 100, --seed at least 0")
    for name in words(args.reference):
        if name not in REFERENCES:
            fail(f"--reference must be one of {', '.join(REFERENCES)}, not {name}")


def records(path: Path, wanted: Iterable[str]) -> Iterator[Row]:
    """Yield the records of a metrics.jsonl that name something wanted; not the last line if it was
    cut off.
    """
    # Most records are of single episodes: parsing all would take minutes for a large grid.
    pattern = re.compile("|".join(map(re.escape, wanted)))
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    for i, line in enumerate(lines, 1):
        if pattern.search(line):
            try:
                yield json.loads(line)
            except ValueError:
                if i < len(lines):
                    fail(f"{path}: line {i} is not JSON")


def matching(keys: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the keys that are wanted: by their name, or by their beginning up to a slash."""
    return [
        key
        for name in wanted
        for key in keys
        if key == name or (name.endswith("/") and key.startswith(name))
    ]


def measure(folder: Path, atari: bool, args: Args) -> list[Row]:
    """Return a row for each score of a run (metrics: for each step with a key); sparsity is the
    latest until then.
    """
    score = "charts/epoch_return" if atari else "eval/episodic_return"
    wanted = words(args.keys) if args.kind == "metrics" else [score]
    steps, latest, rows = defaultdict[int, Row](dict), Row(), list[Row]()
    for record in records(folder / "metrics.jsonl", [*wanted, "sparsity/"]):
        steps[record["step"]].update(
            record
        )  # a step may have several, the last evaluation without sparsity
    for step, record in sorted(steps.items()):
        latest |= {key: record[key] for key in matching(record, ["sparsity/"])}
        if not (found := matching(record, wanted)):
            continue
        row = {"step": step, "seconds": record["seconds"], "return": record.get(score)}
        row |= {"d4rl_score": record["eval/d4rl_score"]} if "eval/d4rl_score" in record else {}
        row |= {column: latest.get(key) for column, key in SPARSITY.items()}
        layers = matching(latest, ["sparsity/layer/"]) if args.kind == "layers" else []
        row |= {key: record[key] for key in found if args.kind == "metrics"}
        rows.append(row | {key: latest[key] for key in layers})
    return rows


def entries(folder: Path) -> list[Row]:
    """Return the upper triangle, diagonal included, of a run's latest gradient covariance, which is
    symmetric.
    """
    if not (paths := sorted(folder.glob("gradient_covariance-*.npy"))):
        return []
    try:
        matrix = np.load(paths[-1], allow_pickle=False).astype(float)
        pairs, step = (
            np.argwhere(np.triu(np.ones_like(matrix))),
            int(paths[-1].stem.rpartition("-")[2]),
        )
        return [{"step": step, "i": int(i), "j": int(j), "cosine": matrix[i, j]} for i, j in pairs]
    except (OSError, EOFError, ValueError):
        fail(f"{paths[-1]}: must be a square matrix of cosines, written by np.save")


def text_of(value: Any) -> str:
    """Return a flag's value as the same text, whether the manifest or args.json gave it: 3, 0.95,
    True, 16 32 32.
    """
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    try:
        return str(value) if isinstance(value, bool) else f"{float(value):g}"
    except (TypeError, ValueError):
        return "" if value is None else str(value)


def collect(path: Path, args: Args) -> list[Row]:
    """Return the rows of the CSV file of a grid; a planned run that has nothing to show is a row
    without a step.
    """
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.jsonl"))) or "none"
        fail(f"{path}: no such grid; the grids there are: {known}; or give the path of a .csv file")
    rows, seen, families = list[Row](), set[tuple[Any, ...]](), set[bool]()
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            plan = json.loads(line)
            curve, script, folder = (
                str(plan["curve"]),
                str(plan["script"]),
                path.parent / plan["folder"],
            )
            flags = {
                name.replace("-", "_"): True if value == "" else value
                for name, value in plan["flags"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f"{path}: line {i} must be a JSON object with curve, script, flags and folder")
        try:
            resolved = (
                json.loads((folder / "args.json").read_text())
                if (folder / "args.json").exists()
                else {}
            )
        except ValueError:
            fail(f"{folder / 'args.json'}: not JSON")
        flags = resolved | {name[3:]: False for name in flags if name.startswith("no_")} | flags
        env_id, atari = (
            str(flags.get("dataset") or flags.get("env_id") or ""),
            bool(re.search("atari|rainbow", script)),
        )
        if not env_id or not str(flags.get("seed", "")).isdecimal():
            fail(f"{path}: line {i}: its flags must have a seed, and env-id or dataset")
        if atari:
            env_id = re.sub(r"^ALE/|(NoFrameskip)?-v[45]$", "", env_id)
        elif env_id.endswith(".hdf5") or Path(env_id).is_absolute():
            env_id = Path(env_id).name.removesuffix(".hdf5")
        run = {"curve": curve, "env_id": env_id, "seed": int(flags["seed"])}
        run |= (
            {args.x: "" if curve in words(args.flat) else text_of(flags.get(args.x))}
            if args.x
            else {}
        )
        if tuple(run.values()) in seen:
            fail(
                f"{path}: line {i}: {curve}, {env_id}, seed {run['seed']} once more; --x must be "
                "what differs"
            )
        seen.add(tuple(run.values()))
        families.add(atari)
        run["finished"] = int((folder / "final.json").exists())
        logged = entries(folder) if args.kind == "covariance" else measure(folder, atari, args)
        rows += [run | row for row in logged or [{}]]
    if not rows or len(families) > 1:
        fail(
            f"{path}: "
            + (
                "has Atari and other runs, which no picture can show"
                if rows
                else "no runs are in it"
            )
        )
    if not any("step" in row for row in rows):
        what = (
            f"--keys {' '.join(words(args.keys))}"
            if args.kind == "metrics"
            else "what this kind shows"
        )
        fail(f"{path}: no run in it has logged {what} yet")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a CSV file of all columns that a row has; six digits of a fraction, all of an
    integer.
    """
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
        )
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: f"{value:.6g}" if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )


def read_runs(path: Path, args: Args) -> list[Run]:
    """Return the runs of a CSV file in its order."""
    groups = defaultdict[tuple[str, ...], list[dict[str, str]]](list)
    needed = ["curve", "env_id", "seed", "finished", "step", *([args.x] if args.x else [])]
    needed += ["i", "j", "cosine"] if args.kind == "covariance" else ["return", *SPARSITY]
    needed += ["d4rl_score"] if args.score == "d4rl" else []
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            if missing := ", ".join(name for name in needed if name not in names):
                fail(f"{path}: no column {missing}; there are {', '.join(names) or 'none'}")
            for row in reader:
                groups[row["curve"], row["env_id"], row["seed"], row.get(args.x, "")].append(row)
        runs = []
        for (curve, env_id, seed, x), rows in groups.items():
            begun = [row for row in rows if row["step"]]
            columns = {
                name: np.array([float(row[name] or "nan") for row in begun])
                for name in names
                if name in NUMBERS or "/" in name
            }
            if args.kind != "covariance" and (np.diff(columns["step"]) <= 0).any():
                fail(
                    f"{path}: {curve}, {env_id}, seed {seed} is there more than once; --x must "
                    "be what differs"
                )
            if x and args.kind != "sweep":
                curve = f"{curve}, {args.x} {x}"
            runs.append(
                Run(curve, env_id, int(seed), text_of(x), rows[0]["finished"] == "1", columns)
            )
    except (TypeError, ValueError) as error:
        fail(f"{path}: not a CSV file of this program ({' '.join(str(error).split())})")
    return runs


def published(name: str, games: set[str], end: float) -> list[Run]:
    """Return Dopamine's runs of REFERENCES in some games, up to our last step as far as they go."""
    runs, values = list[Run](), defaultdict[str, list[list[float]]](list)
    with open(ANCHORS / "dopamine_atari_40M.csv", newline="") as file:
        for game, network, agent, frames, *scores in csv.reader(file):
            if (
                game in games
                and f"{network}-{agent}" == name
                and (frames == "1" or int(frames) * 250_000 <= end)
            ):
                values[game].append([int(frames) * 250_000, *map(float, scores)])
    network, _, agent = name.partition("-")
    for game, rows in values.items():
        steps, *returns = np.array(rows).T
        runs += [
            Run(
                f"Dopamine {agent} {network} (published)",
                game,
                seed,
                "",
                True,
                {"step": steps, "return": own},
                published=True,
            )
            for seed, own in enumerate(returns, 1)
        ]
    return runs


def add_scores(runs: list[Run], args: Args) -> None:
    """Give each run a column score: its return, its D4RL score or (return - random) / (human -
    random).
    """
    for run in runs:
        values = run.columns.get(
            "d4rl_score" if args.score == "d4rl" else "return", np.full(0, np.nan)
        )
        if args.score == "human":
            run.scored = run.env_id in HUMAN
            low, high = HUMAN.get(run.env_id, (np.nan, np.nan))
            values = (values - low) / (high - low)
        run.columns["score"] = values


def iqm(strata: Strata) -> np.ndarray:
    """Return the mean of all scores but the int(n / 4) lowest and highest, over environments and
    seeds.
    """
    scores = np.sort(np.concatenate(strata, -1), -1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


# All but the IQM and the optimality gap weigh environments equally, however many seeds each has.
STATISTICS: dict[str, Callable[[Strata], np.ndarray]] = {
    "iqm": iqm,
    "median": lambda strata: np.median(np.stack([scores.mean(-1) for scores in strata]), 0),
    "mean": lambda strata: np.stack([scores.mean(-1) for scores in strata]).mean(0),
    "gap": lambda strata: np.maximum(0, 1 - np.concatenate(strata, -1)).mean(-1),
}


def estimate(statistic: Callable[[Strata], np.ndarray], strata: Strata, args: Args) -> np.ndarray:
    """Return [3, ...]: a statistic and its 95 % interval, NaN where an environment has one seed,
    which never varies.

    Stratified bootstrap: each replicate redraws as many seeds as there are, with replacement,
    within each environment.
    """
    point = statistic(strata)
    if min(map(len, strata)) < 2:
        return np.stack([point, np.full_like(point, np.nan), np.full_like(point, np.nan)])
    rng = np.random.default_rng(args.seed)
    redrawn = [
        scores[rng.integers(len(scores), size=(args.bootstrap, len(scores)))] for scores in strata
    ]
    return np.stack([point, *np.percentile(statistic(redrawn), [2.5, 97.5], axis=0)])


def strata_of(runs: Sequence[Run], values: Sequence[float]) -> Strata:
    """Return one value for each run, grouped by environment."""
    groups = defaultdict[str, list[float]](list)
    for run, value in zip(runs, values):
        groups[run.env_id].append(value)
    return [np.array(groups[env_id]) for env_id in sorted(groups)]


def timeline(runs: list[Run], column: str) -> tuple[np.ndarray, np.ndarray, list[Run]]:
    """Return steps [T], values [T, n] and the n runs: those that have finished, or where none has,
    all that have begun.

    A run keeps a value until its next one: an epoch in which no episode ended has no score. The
    first step is the first one at which all have a value; the last is the end or, if none has
    finished, the last step that all have reached.
    """
    runs = [run for run in runs if len(run.series(column)[0])]
    runs = [run for run in runs if run.finished] or runs
    if not runs:
        return np.empty(0), np.empty((0, 0)), []
    series = [run.series(column) for run in runs]
    start, end = (
        max(s[0] for s, _ in series),
        (max if runs[0].finished else min)(s[-1] for s, _ in series),
    )
    steps = np.unique(np.concatenate([s for s, _ in series]))
    steps = steps[(steps >= start) & (steps <= end)]
    return steps, np.stack([v[np.searchsorted(s, steps, "right") - 1] for s, v in series], 1), runs


def curves_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of each curve."""
    groups = defaultdict[str, list[Run]](list)
    for run in runs:
        groups[run.curve].append(run)
    return groups


def panels_of(runs: list[Run], args: Args) -> list[tuple[Row, list[Run]]]:
    """Return facts and runs of each panel: one for all if scores are pooled, else one for each
    environment.
    """
    if not args.per_env:
        return [({}, runs)]
    env_ids = sorted({run.env_id for run in runs if run.scored})
    return [
        ({"environment": env_id}, [run for run in runs if run.env_id == env_id])
        for env_id in env_ids
    ]


def looks_of(runs: list[Run]) -> dict[str, Row]:
    """Return how each curve is drawn: our own in colours, published ones behind them in grey and
    without markers.
    """
    looks, greys = dict[str, Row](), 0
    for name, mine in curves_of(runs).items():
        i, n, m = (
            len(looks),
            sum(run.finished for run in mine if run.scored),
            sum(run.scored for run in mine),
        )
        looks[name] = {
            "color": COLOURS[i % 7],
            "linestyle": DASHES[i % 4],
            "marker": MARKERS[i % 9],
            "markersize": 4.5,
        }
        if mine[0].published:
            looks[name] = {
                "color": "0.55",
                "linestyle": DASHES[greys % 4],
                "linewidth": 1.2,
                "zorder": 1.5,
            }
            greys += 1
        looks[name]["label"] = name + (f" ({n} of {m} runs finished)" if n < m else "")
    return looks


def draw_line(axis: Any, x: np.ndarray, lines: np.ndarray, look: Row) -> None:
    """Draw lines [3, T], a middle between low and high, with markers apart from those of other
    curves.
    """
    stride = max(1, len(x) // 8)
    axis.plot(
        x, lines[0], **look, markevery=(MARKERS.find(look.get("marker", "o")) * stride // 9, stride)
    )
    axis.fill_between(x, lines[1], lines[2], color=look["color"], alpha=0.15, linewidth=0, zorder=1)


def draw_range(axis: Any, runs: list[Run], column: str, scale: float, look: Row) -> None:
    """Draw the mean of a column over the steps between its lowest and highest run."""
    steps, values, used = timeline(runs, column)
    if used:
        draw_line(
            axis, steps * scale, np.stack([values.mean(1), values.min(1), values.max(1)]), look
        )


def unit_of(runs: list[Run]) -> tuple[float, str]:
    """Return by what to multiply steps, and the unit that they then have."""
    if any(run.env_id in GAMES for run in runs):
        return 4e-6, "million frames"
    largest = max(run.columns["step"].max(initial=0) for run in runs)
    return (1e-6, "million steps") if largest >= 1e6 else (1e-3, "thousand steps")


def new_figure(
    count: int, deep: int = 1, across: int = 0, size: float = 2.9
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes [count, deep]: panels of `deep` axes one above the other,
    `across` in a row.
    """
    across = across or (count if count <= 4 else 5 if count <= 20 else 6)
    rows = -(-count // across)
    large = max(1, 6 / (across * size))  # a single panel is larger than one of many
    figure = Figure(
        (across * size * large, rows * deep * 0.8 * size * (0.4 + 0.6 * large)),
        layout="constrained",
    )
    axes = figure.subplots(rows * deep, across, squeeze=False)
    axes = axes.reshape(rows, deep, across).transpose(0, 2, 1).reshape(rows * across, deep)
    for axis in axes[count:].flat:
        axis.remove()
    return figure, axes[:count]


def caption_of(runs: list[Run], args: Args, what: str, band: str) -> str:
    """Return what a picture is over: games, seeds, what its bands are, what was left out."""
    ours = [run for run in runs if not run.published]
    used = [run for run in ours if run.finished] or [
        run for run in ours if len(run.columns["step"])
    ]
    seeds = Counter({(run.curve, run.env_id, run.x): 0 for run in ours})
    seeds.update((run.curve, run.env_id, run.x) for run in used)
    few, most = min(seeds.values()), max(seeds.values())
    games, lost = (
        {run.env_id for run in ours},
        sorted({run.env_id for run in ours if not run.scored}),
    )
    if not args.per_env:
        what += f"; games: {len(games) - len(lost)}" + (f" of {len(games)}" if lost else "")
    text = f"{what}; seeds: {f'{few} to ' if few < most else ''}{most}"
    if most <= 3 and "bootstrap" in band and (args.per_env or len(games) == 1):
        band += ", which of so few are from the lowest to the highest"
    text += f"; {band if most > 1 else 'no interval'}." if band else "."
    return text + (f" Left out, having no human score: {', '.join(lost)}." if lost else "")


def range_row(values: Sequence[float]) -> Row:
    """Return number, mean, lowest and highest of final values, which are NaN for runs that have not
    finished.
    """
    known = [value for value in values if not np.isnan(value)]
    row: Row = {"runs": len(known), "of_runs": len(values)}
    return row | (
        {"mean": float(np.mean(known)), "lowest": min(known), "highest": max(known)}
        if known
        else {}
    )


def final_row(facts: Row, runs: list[Run], args: Args) -> Row:
    """Return facts and the statistics of final scores, of all games together or of one
    environment.
    """
    finals = {id(run): run.final("score", args.last) for run in runs if run.scored}
    done = [run for run in runs if not np.isnan(finals.get(id(run), np.nan))]
    row: Row = facts | {"runs": len(done), "of_runs": len(finals)}
    if not args.per_env:
        row |= {
            "games": len({run.env_id for run in done}),
            "of_games": len({run.env_id for run in runs}),
        }
    if not done:
        return row
    strata = strata_of(done, [finals[id(run)] for run in done])
    for name in ("iqm",) if args.per_env else STATISTICS:
        row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate(
            STATISTICS[name], strata, args
        ).tolist()
    row |= range_row([*finals.values()]) if args.per_env else {}
    row |= {column: float(np.mean([run.final(column, 1) for run in done])) for column in SPARSITY}
    scale, unit = unit_of(runs)
    return row | {unit: float(max(run.series("score")[0][-1] for run in done) * scale)}


def draw_curves(runs: list[Run], args: Args) -> Drawing:
    """Draw the scores, and if asked for the sparsity, over the steps."""
    panels, looks, (scale, unit), rows = (
        panels_of(runs, args),
        looks_of(runs),
        unit_of(runs),
        list[Row](),
    )
    figure, axes = new_figure(len(panels), 1 + args.sparsity)
    for (facts, mine), column in zip(panels, axes):
        for name, curve in curves_of(mine).items():
            steps, values, used = timeline(curve, "score")
            bands = [estimate(iqm, strata_of(used, row), args) for row in values]
            draw_line(column[0], steps * scale, np.reshape(bands, (-1, 3)).T, looks[name])
            if args.sparsity:  # of what is pruned before training only the network's own is logged
                logged = [key for key in SPARSITY if any(len(run.series(key)[0]) for run in curve)]
                draw_range(column[1], curve, (logged or [""])[0], scale, looks[name])
                column[1].set(ylabel="sparsity", ylim=(-0.03, 1.03))
            rows.append(final_row({"curve": name} | facts, curve, args))
        column[0].set(title=facts.get("environment", ""), ylabel=f"{SCORES[args.score]}, IQM")
        column[-1].set_xlabel(unit)
    return figure, rows, caption_of(runs, args, "IQM", "bands: 95 % bootstrap intervals over seeds")


def draw_profile(runs: list[Run], args: Args) -> Drawing:
    """Draw the share of the runs whose final score is above tau."""
    panels, looks, rows = panels_of(runs, args), looks_of(runs), list[Row]()
    figure, axes = new_figure(len(panels))
    for (facts, mine), axis in zip(panels, axes[:, 0]):
        done = [
            (run, final) for run in mine if not np.isnan(final := run.final("score", args.last))
        ]
        finals = [final for _, final in done] or [0]
        taus = np.linspace(min(0, *finals), np.quantile(finals, 0.975), 161)

        def above(strata: Strata) -> np.ndarray:
            """Return [..., taus]: the share of the scores that are above each."""
            scores = np.concatenate(strata, -1)
            return np.stack([(scores > tau).mean(-1) for tau in taus], -1)

        for name, curve in curves_of(mine).items():
            if found := [pair for pair in done if pair[0].curve == name]:
                draw_line(axis, taus, estimate(above, strata_of(*zip(*found)), args), looks[name])
            rows.append(final_row({"curve": name} | facts, curve, args))
        axis.set(
            title=facts.get("environment", ""),
            xlabel=f"tau: {SCORES[args.score]}",
            ylabel="share of runs above",
        )
    return (
        figure,
        rows,
        caption_of(runs, args, "Final scores", "bands: 95 % bootstrap intervals over seeds"),
    )


def places_of(values: list[str], x: str) -> tuple[list[str], np.ndarray]:
    """Return the values in order and where they stand: to scale, on a logarithmic one from a ratio
    of 50.

    At equal distances stand words, sparsities, and numbers whose labels would overlap.
    """
    try:
        values = sorted(values, key=float)
    except ValueError:
        return values, np.arange(len(values))
    places = np.array(values, float)
    places = np.log10(places) if places[0] > 0 and places[-1] >= 50 * places[0] else places
    crowded = len(values) > 1 and np.diff(places).min() < np.ptp(places) / 12
    return values, np.arange(len(values)) if crowded or "sparsity" in x else places


def draw_sweep(runs: list[Run], args: Args) -> Drawing:
    """Draw final scores against a flag; curves that do not depend on it and published ones are
    horizontal lines.
    """
    if unknown := [name for name in words(args.flat) if name not in curves_of(runs)]:
        fail(f"--flat {unknown[0]}: no such curve; there are {', '.join(curves_of(runs))}")
    flat = {run.curve for run in runs if run.published or run.curve in words(args.flat)}
    lost = [run for run in runs if not run.x and run.curve not in flat]
    runs = [run for run in runs if run.x or run.curve in flat]
    values = list(dict.fromkeys(run.x for run in runs if run.curve not in flat))
    if not values:
        fail(
            f"--x {args.x}: no run of {args.grid} has that flag, in the manifest or in its "
            "args.json"
        )
    values, places = places_of(values, args.x)
    panels, looks, rows = panels_of(runs, args), looks_of(runs), list[Row]()
    moving = [name for name in looks if name not in flat]
    # Curves stand side by side, at most 0.2 of the smallest gap to either side, so that their bars
    # can be told apart.
    step = min(0.06, 0.4 / len(moving)) * (np.diff(places).min() if len(places) > 1 else 1)
    figure, axes = new_figure(len(panels))
    for (facts, mine), axis in zip(panels, axes[:, 0]):
        for name, curve in curves_of(mine).items():
            look, points = looks[name], list[tuple[float, ...]]()
            for value, place in [("", 0)] if name in flat else zip(values, places):
                some = [run for run in curve if name in flat or run.x == value]
                if some:
                    rows.append(
                        row := final_row({"curve": name} | facts | {args.x: value}, some, args)
                    )
                    points += (
                        [(place, *(row[key] for key in ("iqm", "iqm_low", "iqm_high")))]
                        if "iqm" in row
                        else []
                    )
            if name in flat:
                for _, level, *ends in points:
                    axis.axhline(
                        level, **{key: value for key, value in look.items() if "marker" not in key}
                    )
                    axis.axhspan(*ends, color=look["color"], alpha=0.12, linewidth=0, zorder=1)
            else:
                x, y, low, high = np.reshape(points, (-1, 4)).T
                x = x + step * (moving.index(name) - (len(moving) - 1) / 2)
                axis.plot(x, y, **look)
                axis.errorbar(
                    x,
                    (low + high) / 2,
                    (high - low) / 2,
                    fmt="none",
                    color=look["color"],
                    capsize=3,
                )
        axis.set(title=facts.get("environment", ""), xlabel=args.x.replace("_", " "))
        axis.set_ylabel(f"{SCORES[args.score]}, IQM")
        axis.set_xticks(places, values)
    caption = caption_of(
        runs, args, "IQM of final scores", "bars and bands: 95 % bootstrap intervals over seeds"
    )
    if args.reference:
        frames = max(run.columns["step"][-1] for run in runs if run.published) * 4e-6
        caption += f" Published scores are those at {frames:g} million frames."
    return (
        figure,
        rows,
        caption
        + (f" {len(lost)} runs that do not say their {args.x} are left out." if lost else ""),
    )


def draw_metrics(runs: list[Run], args: Args) -> Drawing:
    """Draw what was logged over the steps: a row of panels for each key, a column for each
    environment.
    """
    logged = list(
        dict.fromkeys(
            key for run in runs for key in run.columns if "/" in key and len(run.series(key)[0])
        )
    )
    if missing := [name for name in words(args.keys) if not matching(logged, [name])]:
        fail(
            f"--keys {missing[0]}: no run of {args.grid} has logged it; there are "
            f"{', '.join(logged)}"
        )
    keys, env_ids = matching(logged, words(args.keys)), sorted({run.env_id for run in runs})
    looks, (scale, unit), rows = looks_of(runs), unit_of(runs), list[Row]()
    figure, axes = new_figure(len(env_ids), len(keys), len(env_ids))
    for env_id, column in zip(env_ids, axes):
        for key, axis in zip(keys, column):
            for name, curve in curves_of([run for run in runs if run.env_id == env_id]).items():
                draw_range(axis, curve, key, scale, looks[name])
                finals = range_row([run.final(key, args.last) for run in curve])
                rows.append({"key": key, "environment": env_id, "curve": name} | finals)
            axis.set_ylabel(key)
        column[0].set_title(env_id)
        column[-1].set_xlabel(unit)
    return figure, rows, caption_of(runs, args, "Mean", "bands: lowest to highest seed")


def draw_layers(runs: list[Run], args: Args) -> Drawing:
    """Draw the sparsity of each layer over the steps, a mean over environments and seeds: a panel
    for each curve.
    """
    layers = list(
        dict.fromkeys(
            key for run in runs for key in run.columns if key.startswith("sparsity/layer/")
        )
    )
    if not layers:
        fail(
            f"{args.grid}: no sparsity/layer/NAME is in it; a .csv file must come from an "
            "earlier plot.py layers"
        )
    figure, axes = new_figure(len(curves_of(runs)))
    shades, (scale, unit), rows = matplotlib.colormaps["viridis"], unit_of(runs), list[Row]()
    for (name, curve), axis in zip(curves_of(runs).items(), axes[:, 0]):
        for i, key in enumerate(layers):
            if mine := [run for run in curve if len(run.series(key)[0])]:
                layer = key.removeprefix("sparsity/layer/")
                look = {
                    "color": shades(0.9 * i / len(layers)),
                    "linestyle": DASHES[i % 4],
                    "marker": MARKERS[i % 9],
                }
                draw_range(axis, mine, key, scale, look | {"label": layer, "markersize": 4})
                rows.append(
                    {"curve": name, "layer": layer}
                    | range_row([run.final(key, args.last) for run in curve])
                )
        axis.set(title=textwrap.fill(name, 40), xlabel=unit, ylabel="sparsity", ylim=(-0.03, 1.03))
    what = (
        "Mean, bands from lowest to highest run; environments: "
        f"{', '.join(sorted({run.env_id for run in runs}))}"
    )
    return figure, rows, caption_of(runs, args, what, "")


def draw_covariance(runs: list[Run], args: Args) -> Drawing:
    """Draw the gradient covariance of the lowest seed that has one: a row for each curve, a column
    per environment.
    """
    env_ids, names, means = (
        sorted({run.env_id for run in runs}),
        list(curves_of(runs)),
        dict[int, float](),
    )
    figure, axes = new_figure(len(env_ids), len(names), len(env_ids), 2.3)
    for run in sorted(runs, key=lambda run: -run.seed):  # a lower seed is drawn over a higher one
        axis, (i, j) = (
            axes[env_ids.index(run.env_id), names.index(run.curve)],
            (run.columns[key] for key in "ij"),
        )
        matrix = np.eye(int(max(i, default=0)) + 1)
        matrix[i.astype(int), j.astype(int)] = matrix[j.astype(int), i.astype(int)] = run.columns[
            "cosine"
        ]
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        means[id(run)] = float(np.abs(off).mean()) if len(off) else float("nan")
        if len(off):
            axis.clear()
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
            axis.set_xlabel(f"seed {run.seed}, step {run.columns['step'][0]:,.0f}", fontsize=7)
        axis.set(xticks=[], yticks=[], ylabel=textwrap.fill(run.curve, 24))
    for env_id, column in zip(env_ids, axes):
        column[0].set_title(env_id)
    figure.colorbar(image, ax=list(axes.flat), label="cosine of two loss gradients", shrink=0.8)
    rows = [
        {"curve": name, "environment": where or "all"}
        | range_row([means[id(run)] for run in curve])
        for where in ("", *env_ids)
        for name, curve in curves_of([run for run in runs if where in ("", run.env_id)]).items()
    ]
    return (
        figure,
        rows,
        "Loss gradients of 32 transitions of the replay. Table: absolute values off the diagonal.",
    )


KINDS = {
    "curves": draw_curves,
    "sweep": draw_sweep,
    "profile": draw_profile,
    "metrics": draw_metrics,
    "layers": draw_layers,
    "covariance": draw_covariance,
}


def save_picture(figure: Figure, caption: str, title: str, out: Path) -> None:
    """Write OUT.png and OUT.svg, with caption and legend below the panels."""
    labels = dict[str, Any]()
    for axis in figure.axes:
        labels = dict(zip(*axis.get_legend_handles_labels()[::-1])) | labels
        if (place := axis.get_subplotspec()) and not place.is_first_col():
            axis.set_ylabel("")
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(13 * width / (8 + max(map(len, labels), default=0)))))
    lines = textwrap.wrap(caption, int(16 * width))
    figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns) + 0.15 * len(lines))
    figure.legend(
        labels.values(),
        labels.keys(),
        title="\n".join(lines),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        title_fontsize=7.5,
        handlelength=4.5,
        frameon=False,
    )
    figure.suptitle(title)
    figure.savefig(f"{out}.png", dpi=130)
    figure.savefig(
        f"{out}.svg", metadata={"Date": None}
    )  # a date would make the same picture different bytes


def number(value: Any) -> str:
    """Return a cell of a table: two digits or more."""
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    size = abs(value)
    digits = 0 if size >= 1000 or size == size // 1 else 1 if size >= 100 else 2 if size >= 1 else 3
    return (
        "-"
        if np.isnan(value)
        else f"{value:,.{digits}f}"
        if digits < 3 or size >= 0.01
        else f"{value:.2g}"
    )


def markdown(rows: list[Row]) -> str:
    """Return a table in Markdown: `9 of 15` from runs and of_runs, `1.68 [1.64, 1.71]` from iqm,
    iqm_low, iqm_high.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [
        key for key in columns if not key.startswith("of_") and not key.endswith(("_low", "_high"))
    ]
    lines = [
        [{"iqm": "IQM", "gap": "optimality gap"}.get(key, key.replace("_", " ")) for key in columns]
    ]
    lines.append(["---"] * len(columns))
    for row in rows:
        cells = [number(row.get(key, np.nan)) for key in columns]
        for i, key in enumerate(columns):
            cells[i] += f" of {row[f'of_{key}']:,}" if f"of_{key}" in row else ""
            if not np.isnan(row.get(f"{key}_low", np.nan)):
                cells[i] += f" [{number(row[f'{key}_low'])}, {number(row[f'{key}_high'])}]"
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make(args: Args) -> None:
    """Write the CSV file, unless it is the source, then from it the picture and the table."""
    args = replace(args, x=args.x.replace("-", "_"), keys=args.keys or (("analysis/",),))
    folder = Path(os.environ.get("RUNS") or "runs") / ("smoke" if os.environ.get("SMOKE") else "")
    path = Path(args.grid) if args.grid.endswith(".csv") else Path(folder, f"{args.grid}.jsonl")
    out = Path(args.out or path.with_suffix(""))
    rows = collect(path, args) if path.suffix == ".jsonl" else []
    out.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        path = Path(f"{out}.csv")
        write_rows(path, rows)
    runs = read_runs(path, args)
    end = max((run.columns["step"].max(initial=0) for run in runs), default=0)
    if end == 0:
        fail(f"{path}: no run in it has a step")
    atari = any(run.env_id in GAMES for run in runs)
    if not atari and (args.reference or args.score == "human"):
        fail(
            f"--{'reference' if args.reference else 'score human'}: {args.grid} is not of Atari "
            "games"
        )
    if args.score == "auto":
        args = replace(
            args, score="human" if atari and not args.per_env and args.kind in SCORING else "return"
        )
    args = replace(
        args, per_env=args.per_env or args.score != "human"
    )  # nothing else is on one scale
    for name in words(args.reference):
        runs += published(name, {run.env_id for run in runs}, end)
    add_scores(runs, args)
    if not any(run.scored for run in runs):
        fail(
            f"--score human: no game of {args.grid} has a human score; --per-env shows their "
            "returns"
        )
    figure, table, caption = KINDS[args.kind](runs, args)
    save_picture(figure, caption, args.title, out)
    write_rows(Path(f"{out}_table.csv"), table)
    text = f"{markdown(table)}\n{caption}\n"
    Path(f"{out}.md").write_text(text)
    print(text, end="")


def main(args: Args) -> None:
    """Check the flags and make the files; with DRY in the environment only print the command
    line.
    """
    check(args)
    if os.environ.get("DRY"):  # tests of shell scripts look at what they would run
        return print(shlex.join(["python", *sys.argv]))
    try:
        make(args)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
