"""Statistics and pictures of runs, from their folders or from a CSV file alone.

    python benchmark/plot.py curves GRID --reference Impala-DQN
    python benchmark/plot.py curves RUN_DIR RUN_DIR ...             # runs made by hand
    python benchmark/plot.py sweep GRID --x width --flat "DQN dense"
    python benchmark/plot.py curves benchmark/results/GRID.csv --out x  # from an earlier file

KIND is one of
    curves      score over the steps
    sweep       final score against the flag --x
    profile     share of the runs whose final score is above tau
    epochs      each epoch beside the published runs' prediction interval (Atari)
    metrics     what was logged under --keys, over the steps
    layers      sparsity of each layer over the steps
    covariance  cosines between the loss gradients of 32 transitions

A grid is a file of one JSON object per planned run: {"curve", "script", "flags": {"env-id": "Pong",
...}, "folder"}. Runs made by hand are named by the flags in which they differ. RUNS is an
environment variable, by default runs; where SMOKE is on, RUNS/smoke. Written are RUNS/GRID.csv,
.png, .svg, .pdf, .md and _table.csv (comparison.* beside the first folder for runs made by hand).
Picture and table are always made from the CSV file, so that it alone gives them again, byte for
byte. Only runs that have finished count in final scores; "n of m" says how many of the planned
ones have.

Scores of Atari games are human-normalised and pooled over the games; --baseline pools those of
other environments, with random play as 0 and the mean of that curve as 1. Else returns are shown
for each environment. Statistics are Agarwal et al.'s (2021, https://arxiv.org/abs/2108.13264): IQM,
optimality gap, median and mean of the games' means, with 95 % percentile intervals from a bootstrap
that redraws the seeds within each game; of environments one by one, none with four seeds, mean and
range.
"""

from __future__ import annotations

import csv
import itertools
import re
import shlex
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from common import ANCHORS, GAMES, HUMAN, outlive_readers, refuse, runs_folder, switch
from rows import (
    NUMBERS,
    SPARSITY,
    Row,
    Run,
    collect,
    matching,
    plans_of_folders,
    plans_of_grid,
    read_runs,
    text_of,
    words,
    write_rows,
)

# Type 42: text stays text, as publishers ask for. Without parse_math a $ is a $.
STYLE = """svg.hashsalt cleanrl-sparse; axes.grid True; grid.alpha 0.3; font.size 9;
    axes.titlesize 9; axes.spines.top False; axes.spines.right False; lines.linewidth 1.2;
    pdf.fonttype 42; text.parse_math False"""
REFERENCES = ("CNN-DQN", "CNN-Rainbow", "Impala-DQN", "Impala-Rainbow")
with open(ANCHORS / "minatar_random.csv", newline="") as table:
    RANDOM = {row["game"]: float(row["random"]) for row in csv.DictReader(table)}
RANDOM |= {game: random for game, (random, _) in HUMAN.items()}
with open(ANCHORS / "d4rl.csv", newline="") as table:
    D4RL = {
        row["robot"]: (float(row["random"]), float(row["expert"])) for row in csv.DictReader(table)
    }
SCORES = {
    "human": "human-normalised score",
    "baseline": "share of the baseline's return",
    "return": "return",
    "d4rl": "D4RL's normalised score",
}
SCORING = "curves sweep profile"  # kinds
# The flags that only some kinds read.
USES = {
    "sweep": "flat",
    "metrics": "keys",
    "curves": "sparsity against",
    SCORING: "panel baseline per_env score bootstrap seed",
    f"{SCORING} epochs": "reference",
    f"{SCORING} metrics layers": "last",
}
# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers for prints in
# black and white. As their numbers have no common divisor, 28 curves differ in colour or dash.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv*XP<"

Words = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # --keys A B --keys C
Strata = Sequence[np.ndarray]  # of each environment [..., its seeds]
Drawing = tuple[Any, list[Row], str]  # picture, table, what to say below both


@dataclass
class Args:
    """Flags."""

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KIND")]  # one of the above
    # of RUNS/GRID.jsonl, or a .csv file, or folders of runs
    grid: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GRID ...")]
    # flag in which the runs differ, such as width; all kinds but sweep make a curve of each value
    x: str = ""
    panel: str = ""  # flag, such as width: a panel for each of its values
    against: str = ""  # curve that is in every panel, one panel for each other curve (curves)
    flat: Words = ()  # curve that is the same at all --x: a horizontal line (sweep)
    # keys of metrics.jsonl, or their beginning up to a slash; none: analysis/ (metrics)
    keys: Words = ()
    per_env: bool = False  # a panel for each game, with returns unless --score says otherwise
    sparsity: bool = False  # a second row of panels with the share of weights left (curves)
    # Dopamine's published runs: CNN-DQN, CNN-Rainbow, Impala-DQN, Impala-Rainbow (Atari)
    reference: Words = ()
    # curve whose mean final return is 1, then its value of --x and that of --panel
    baseline: tuple[str, ...] = ()
    # human, baseline, return or d4rl; auto: baseline where --baseline is given, human for Atari
    # unless --per-env, else return
    score: str = "auto"
    last: int = 1  # scores whose mean is a run's final score, at least 1
    bootstrap: int = 2000  # replicates of the bootstrap, at least 100
    seed: int = 0  # of the bootstrap
    title: str = ""  # above the picture
    # path of the files to write, without an ending; default: beside the manifest or the .csv file
    out: str = ""
    few: tyro.conf.Suppress[bool] = False  # mean and range, as no environment has four seeds


def check(args: Args) -> None:
    """Refuse bad values, and flags that this kind would not read."""
    if not args.grid:
        refuse("GRID is missing: the name of a grid, a .csv file, or folders of runs")
    if args.kind not in KINDS:
        refuse(f"KIND must be one of {', '.join(KINDS)}, not {args.kind}")
    for kinds, flags in USES.items():
        for flag in flags.split() if args.kind not in kinds.split() else []:
            if getattr(args, flag) != getattr(Args, flag):
                what = f"is for {', '.join(kinds.split())}, not for {args.kind}"
                refuse(f"--{flag.replace('_', '-')} {what}")
    if args.kind == "sweep" and not args.x:
        refuse("--x is missing: the flag in which the runs differ, such as --x width")
    if args.kind == "epochs" and not args.reference:
        refuse("--reference is missing: the published runs, such as --reference CNN-DQN")
    for flag, name in (("x", args.x), ("panel", args.panel)):
        if name.replace("-", "_") in ("curve", "env_id", "seed", "finished", "seconds", *NUMBERS):
            refuse(f"--{flag} must be a flag in which runs differ, such as width, not {name}")
    if args.score not in ("auto", *SCORES):
        refuse(f"--score must be auto, {', '.join(SCORES)}, not {args.score}")
    if args.score == "baseline" and not args.baseline:
        refuse("--score baseline needs --baseline CURVE")
    if len(args.baseline) > 1 + bool(args.x) + bool(args.panel):
        refuse("--baseline takes a curve, then its value of --x and that of --panel")
    if args.last < 1 or args.bootstrap < 100 or args.seed < 0:
        given = f"--last {args.last}, --bootstrap {args.bootstrap}, --seed {args.seed}"
        refuse(f"{given}: must be at least 1, 100 and 0")
    for name in words(args.reference):
        if name not in REFERENCES:
            refuse(f"--reference must be one of {', '.join(REFERENCES)}, not {name}")


def published(name: str, games: set[str], end: float) -> list[Run]:
    """Return Dopamine's runs of REFERENCES in some games, up to our last step as far as they go."""
    runs, values = list[Run](), defaultdict[str, list[list[float]]](list)
    with open(ANCHORS / "dopamine_atari_40M.csv", newline="") as file:
        for game, network, agent, frames, *scores in csv.reader(file):
            if game not in games or f"{network}-{agent}" != name:
                continue
            if frames == "1" or int(frames) * 250_000 <= end:
                values[game].append([int(frames) * 250_000, *map(float, scores)])
    network, _, agent = name.partition("-")
    curve = f"Dopamine {agent} {network} (published)"
    for game, rows in values.items():
        steps, *returns = np.array(rows).T
        for seed, own in enumerate(returns, 1):
            columns = {"return": (steps, own)}
            runs.append(Run(curve, game, seed, "", "", True, steps, columns, published=True))
    return runs


def baseline_of(runs: list[Run], args: Args) -> dict[str, tuple[float, float]]:
    """Return for each environment random play's return and the mean final one of --baseline."""
    curve, *values = args.baseline
    flags = [flag for flag in ("x", "panel") if getattr(args, flag)]
    if values and len(values) < len(flags):
        refuse(
            f"--baseline {' '.join(args.baseline)}: with --x and --panel it needs the value of both"
        )
    asked = {flag: text_of(value) for flag, value in zip(flags, values)}
    swept = asked.get("x") and args.kind != "sweep"  # the value is part of the curve's name
    name = f"{curve}, {args.x} {asked['x']}" if swept else curve
    finals = defaultdict[str, list[float]](list)
    for run in runs:
        mine = run.curve == name and all(getattr(run, flag) == asked[flag] for flag in asked)
        final = run.final("return", args.last)
        if mine and final is not None:
            finals[run.env_id].append(final)
    if not finals:
        made = dict.fromkeys(
            (run.curve, *filter(None, (run.x, run.panel))) for run in runs if run.finished
        )
        names = ", ".join(map(shlex.join, made)) or "none"
        refuse(f"--baseline {shlex.join(args.baseline)}: no finished run of it; there are {names}")
    if unknown := [env_id for env_id in finals if env_id not in RANDOM]:
        refuse(f"--baseline: the score of random play is not known of {unknown[0]}")
    scale = {env_id: (RANDOM[env_id], float(np.mean(own))) for env_id, own in finals.items()}
    for env_id, (low, high) in scale.items():
        if high <= low:
            line = f"on {env_id} it is no better than random play; scores there mean nothing"
            print(f"plot.py: --baseline {shlex.join(args.baseline)}: {line}", file=sys.stderr)
    return scale


def add_scores(runs: list[Run], args: Args) -> None:
    """Give each run a column score: its return, or that on D4RL's, a human's or the baseline's
    scale.
    """
    scale = {"human": HUMAN}.get(args.score, {})
    if args.score == "d4rl":
        # a word of the dataset's name: hopper_medium-v2, but not antmaze
        parts = {run.env_id: set(re.split("[^a-z0-9]", run.env_id.lower())) for run in runs}
        scale = {
            env_id: D4RL[robot] for robot in D4RL for env_id in parts if robot in parts[env_id]
        }
    if args.score == "baseline":
        scale = baseline_of(runs, args)
    for run in runs:
        steps, values = run.series("return")
        if args.score != "return":
            run.scored = run.env_id in scale
            low, high = scale.get(run.env_id, (np.nan, np.nan))
            values = (100 if args.score == "d4rl" else 1) * (values - low) / (high - low)
        run.columns["score"] = steps, values


def iqm(strata: Strata) -> np.ndarray:
    """Return the mean of all scores, of all environments, but the int(n / 4) lowest and highest;
    NaN where one is NaN, which sorting would take for the highest.
    """
    scores = np.sort(np.concatenate(strata, -1), -1)
    cut = scores.shape[-1] // 4
    kept = scores[..., cut : scores.shape[-1] - cut].mean(-1)
    return np.where(np.isnan(scores[..., -1]), np.nan, kept)


# All but the IQM and the optimality gap weigh environments equally, however many seeds each has.
STATISTICS: dict[str, Callable[[Strata], np.ndarray]] = {
    "iqm": iqm,
    "median": lambda strata: np.median(np.stack([scores.mean(-1) for scores in strata]), 0),
    "mean": lambda strata: np.stack([scores.mean(-1) for scores in strata]).mean(0),
    "gap": lambda strata: np.maximum(0, 1 - np.concatenate(strata, -1)).mean(-1),
}


def estimate(statistic: Callable[[Strata], np.ndarray], strata: Strata, args: Args) -> np.ndarray:
    """Return [3, ...]: a statistic and its 95 % interval, NaN where an environment has one seed,
    which never varies. Each replicate redraws, with replacement, the seeds within each environment.
    """
    point = statistic(strata)
    if min(map(len, strata)) < 2:
        return np.stack([point, np.full_like(point, np.nan), np.full_like(point, np.nan)])
    rng = np.random.default_rng(args.seed)
    redrawn = [own[rng.integers(len(own), size=(args.bootstrap, len(own)))] for own in strata]
    return np.stack([point, *np.percentile(statistic(redrawn), [2.5, 97.5], axis=0)])


def centre(strata: Strata, args: Args) -> np.ndarray:
    """Return [3]: what is drawn of scores: IQM and interval, or of few seeds mean and range."""
    if args.few:
        scores = np.concatenate(strata)
        return np.array([scores.mean(), scores.min(), scores.max()])
    return estimate(iqm, strata, args)


def strata_of(runs: Sequence[Run], values: Sequence[float]) -> Strata:
    """Return one value for each run, grouped by environment."""
    groups = defaultdict[str, list[float]](list)
    for run, value in zip(runs, values):
        groups[run.env_id].append(value)
    return [np.array(groups[env_id]) for env_id in sorted(groups)]


def timeline(runs: list[Run], column: str) -> tuple[np.ndarray, np.ndarray, list[Run]]:
    """Return steps [T], values [T, n], and the n runs: those that have finished, else begun ones.

    A run keeps a value until its next one: an epoch in which no episode ended has no score. The
    steps are those at which all have a value, to the end or, if none has finished, as far as all
    have come.
    """
    runs = [run for run in runs if len(run.series(column)[0])]
    runs = [run for run in runs if run.finished] or runs
    if not runs:
        return np.empty(0), np.empty((0, 0)), []
    series = [run.series(column) for run in runs]
    start = max(steps[0] for steps, _ in series)
    end = (max if runs[0].finished else min)(steps[-1] for steps, _ in series)
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
    """Return facts and runs of each panel: one for each value of --panel, for each environment
    unless scores are pooled, and for each curve beside that of --against.
    """
    panels = [(Row(), runs)]
    if args.panel:
        texts = sorted({run.panel for run in runs if not run.published}, key=sortable)
        own = {text: [run for run in runs if run.panel == text or run.published] for text in texts}
        panels = [({args.panel: text}, mine) for text, mine in own.items()]
    if args.per_env:
        env_ids, wide = sorted({run.env_id for run in runs if run.scored}), panels
        panels = []
        for (facts, mine), env_id in itertools.product(wide, env_ids):
            own_env = [run for run in mine if run.env_id == env_id]
            panels.append((facts | {"environment": env_id}, own_env))
    if args.against:
        names = [name for name, curve in curves_of(runs).items() if not curve[0].published]
        if args.against not in names:
            refuse(f"--against {args.against}: no such curve; there are {', '.join(names)}")
        names.remove(args.against)
        if not names:
            refuse(f"--against {args.against}: no other curve is there yet")
        wide, panels = panels, []
        for (facts, mine), name in itertools.product(wide, names):
            pair = [run for run in mine if run.curve in (args.against, name) or run.published]
            panels.append((facts, pair))
    return panels


def sortable(text: str) -> tuple[float, str]:
    """Return a key that sorts numbers by their value and words by the alphabet."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def title_of(facts: Row) -> str:
    """Return what stands above a panel: value of --panel, environment."""
    own = [f"{key.replace('_', ' ')} {facts[key]}" for key in facts if key != "environment"]
    return "\n".join([*own, *filter(None, [facts.get("environment")])])


def literal(text: str) -> str:
    """Return a label that matplotlib does not hide, as it does with those that begin with _."""
    return f"\u200b{text}" if text.startswith("_") else text


def looks_of(runs: list[Run]) -> dict[str, Row]:
    """Return how each curve is drawn: ours in colours, published ones in grey, without markers."""
    looks, greys = dict[str, Row](), 0
    for name, mine in curves_of(runs).items():
        i, scored = len(looks), [run for run in mine if run.scored]
        looks[name] = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4]}
        looks[name] |= {"marker": MARKERS[i % 9], "markersize": 3}
        if mine[0].published:
            looks[name] = {"color": "0.55", "linestyle": DASHES[greys % 4], "zorder": 1.5}
            greys += 1
        n, m = sum(run.finished for run in scored), len(scored)
        looks[name]["label"] = literal(name) + (f" ({n} of {m} runs finished)" if n < m else "")
    return looks


def draw_line(axis: Any, x: np.ndarray, lines: np.ndarray, look: Row) -> None:
    """Draw lines [3, T], a middle between low and high, with markers apart from other curves'."""
    stride = max(1, len(x) // 8)
    first = MARKERS.find(look.get("marker", "o")) * stride // 9
    axis.plot(x, lines[0], **look, markevery=(first, stride))
    axis.fill_between(x, lines[1], lines[2], color=look["color"], alpha=0.12, linewidth=0, zorder=1)


def draw_range(
    axis: Any, runs: list[Run], column: str, scale: float, look: Row, left: bool = False
) -> None:
    """Draw the mean of a column over the steps between its lowest and highest run; with `left` what
    is left of 1.
    """
    steps, values, _ = timeline(runs, column)
    if len(steps):
        values = np.maximum(1 - values, 1e-4) if left else values
        lines = np.stack([values.mean(1), values.min(1), values.max(1)])
        draw_line(axis, steps * scale, lines, look)


def scale_density(axes: Sequence[Any]) -> None:
    """Give all such axes one logarithmic scale, on which 95 and 99 % pruned lie apart."""
    low = 0.8 * min([0.1, *(line.get_ydata().min() for axis in axes for line in axis.get_lines())])
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4) if t >= low]
    for axis in axes:
        axis.set(ylim=(low, 1.2), yscale="log", ylabel="weights left")
        axis.set_yticks(ticks, [f"{100 * t:g} %" for t in ticks])
        axis.minorticks_off()


def unit_of(runs: list[Run]) -> tuple[float, str]:
    """Return by what to multiply steps, and the unit that they then have."""
    offline = any("offline" in run.columns for run in runs)
    if any(run.env_id in GAMES for run in runs) and not offline:
        return 4e-6, "million frames"
    largest = max(run.steps.max(initial=0) for run in runs)
    scale, many = (1e-6, "million") if largest >= 1e6 else (1e-3, "thousand")
    return scale, f"{many} {'gradient ' * offline}steps"


def new_figure(count: int, deep: int = 1, across: int = 0) -> tuple[Any, np.ndarray]:
    """Return a figure and its axes [count, deep]: panels of `deep` axes one above the other,
    `across` in a row.
    """
    try:
        from matplotlib import rcParams  # takes almost a second, which DRY=1 does not need
        from matplotlib.figure import Figure
    except ImportError as error:
        refuse(f"{error}: pip install matplotlib, or pip install -e '.[plot]'")
    style: dict[Any, Any] = dict(map(str.split, STYLE.split(";")))
    rcParams.update(style)
    across = across or (count if count <= 4 else 5 if count <= 20 else 6)
    rows, size = -(-count // across), 2.3
    large = max(1, 3.6 / (across * size))  # a single panel is larger than one of many
    height = rows * deep * 0.8 * size * (0.4 + 0.6 * large)
    figure = Figure((across * size * large, height), layout="constrained")
    axes = figure.subplots(rows * deep, across, squeeze=False)
    axes = axes.reshape(rows, deep, across).transpose(0, 2, 1).reshape(rows * across, deep)
    for axis in axes[count:].flat:
        axis.remove()
    return figure, axes[:count]


def seeds_of(runs: list[Run]) -> dict[tuple[str, ...], int]:
    """Return how many runs of ours count for each curve, environment and flag: those that have
    finished, or where none has, all that have begun.
    """
    ours = [run for run in runs if not run.published]
    used = [run for run in ours if run.finished] or [run for run in ours if len(run.steps)]
    seeds = Counter((run.curve, run.env_id, run.x, run.panel) for run in used)
    return {key: seeds[key] for key in ((run.curve, run.env_id, run.x, run.panel) for run in ours)}


def caption_of(runs: list[Run], args: Args, what: str, band: str) -> str:
    """Return what a picture covers: games, seeds, what its bands are, what was left out."""
    ours, seeds = [run for run in runs if not run.published], seeds_of(runs)
    few, most = min(seeds.values()), max(seeds.values())
    games = {run.env_id for run in ours}
    lost = sorted({run.env_id for run in ours if not run.scored})
    if not args.per_env:
        what += f"; games: {len(games) - len(lost)}" + (f" of {len(games)}" if lost else "")
    if most <= 3 and "bootstrap" in band and len(games) == 1:
        band += ", which for so few seeds span lowest to highest"
    text = f"{what}; seeds per curve: {f'{few} to ' if few < most else ''}{most}"
    text += f"; {band if most > 1 else 'no interval'}." if band else "."
    if args.score == "baseline":
        text += f" Random play is 0, the mean of {' '.join(args.baseline)} is 1 on each."
    return text + (f" Left out, having no such score: {', '.join(lost)}." if lost else "")


def range_row(values: Sequence[float | None]) -> Row:
    """Return number, mean, lowest and highest of final values, None where not finished."""
    known = [value for value in values if value is not None]
    row: Row = {"runs": len(known), "of_runs": len(values)}
    if not known:
        return row
    return row | {"mean": float(np.mean(known)), "lowest": np.min(known), "highest": np.max(known)}


def final_row(facts: Row, runs: list[Run], args: Args) -> Row:
    """Return facts and the statistics of final scores, of all games or of one environment."""
    finals = {id(run): run.final("score", args.last) for run in runs if run.scored}
    known = {key: value for key, value in finals.items() if value is not None}
    done = [run for run in runs if id(run) in known]
    row: Row = facts | {"runs": len(done), "of_runs": len(finals)}
    if not args.per_env:
        row["games"] = len({run.env_id for run in done})
        row["of_games"] = len({run.env_id for run in runs})
    if not done:
        return row
    strata = strata_of(done, [known[id(run)] for run in done])
    if not args.few:
        for name in ("iqm",) if args.per_env else STATISTICS:
            values = estimate(STATISTICS[name], strata, args).tolist()
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values))
    row |= range_row([*finals.values()]) if args.per_env else {}
    for column in SPARSITY:
        shares = [share for run in done if (share := run.final(column, 1)) is not None]
        row |= {column: float(np.mean(shares))} if shares else {}
    scale, unit = unit_of(runs)
    return row | {unit: float(max(run.series("score")[0][-1] for run in done) * scale)}


def once(rows: list[Row]) -> list[Row]:
    """Return each row once: a curve may stand in several panels."""
    return list({repr(row): row for row in rows}.values())  # by its text, as NaN is not NaN


def score_name(args: Args) -> str:
    """Return what the scores are, for a label."""
    return SCORES[args.score].replace("the baseline", "".join(args.baseline[:1]))


def drawn(args: Args) -> tuple[str, str, str]:
    """Return what is drawn of the scores, what their bands are, and the text at their axis."""
    what, band = "IQM", "bands: 95 % bootstrap intervals over seeds"
    if args.few:
        what, band = "mean", "bands: lowest to highest seed"
    # in lines that are no longer than a low panel
    label = textwrap.fill(f"{score_name(args)}, {what}", 18, break_on_hyphens=False)
    return what, band, label


def draw_curves(runs: list[Run], args: Args) -> Drawing:
    """Draw the scores, and if asked for the weights that are left, over the steps."""
    panels, looks, (scale, unit) = panels_of(runs, args), looks_of(runs), unit_of(runs)
    figure, axes = new_figure(len(panels), 1 + args.sparsity)
    rows, (what, band, label) = list[Row](), drawn(args)
    for i, ((facts, mine), column) in enumerate(zip(panels, axes)):
        for name, curve in curves_of(mine).items():
            steps, values, used = timeline([run for run in curve if run.scored], "score")
            bands = [centre(strata_of(used, row), args) for row in values]
            draw_line(column[0], steps * scale, np.reshape(bands, (-1, 3)).T, looks[name])
            # Of what is pruned before training only the network's own sparsity is logged.
            shares = [key for key in SPARSITY if any(key in run.columns for run in curve)]
            if args.sparsity and shares and not curve[0].published:
                draw_range(column[1], curve, shares[0], scale, looks[name], left=True)
            rows.append(final_row({"curve": name} | facts, curve, args))
        column[0].set(title=title_of(facts), ylabel=label)
        column[-1].set_xlabel(unit)
        if args.against and i > 0 and facts == panels[i - 1][0]:
            column[0].sharey(axes[i - 1, 0])  # beside one curve, those of an environment share y
    if args.sparsity:
        scale_density([*axes[:, 1]])
    return figure, once(rows), caption_of(runs, args, what[0].upper() + what[1:], band)


def draw_profile(runs: list[Run], args: Args) -> Drawing:
    """Draw the share of the runs whose final score is above tau."""
    panels, looks, rows = panels_of(runs, args), looks_of(runs), list[Row]()
    figure, axes = new_figure(len(panels))
    for (facts, mine), axis in zip(panels, axes[:, 0]):
        finals = [(run, run.final("score", args.last)) for run in mine]
        done = [(run, final) for run, final in finals if final is not None]  # NaN: above nothing
        scores = [final for _, final in done if np.isfinite(final)] or [0.0]
        taus = np.linspace(min(0, *scores), np.quantile(scores, 0.975), 161)

        def above(strata: Strata) -> np.ndarray:
            """Return [..., taus]: the share of the scores that are above each."""
            pooled = np.concatenate(strata, -1)
            return np.stack([(pooled > tau).mean(-1) for tau in taus], -1)

        for name, curve in curves_of(mine).items():
            if found := [pair for pair in done if pair[0].curve == name]:
                draw_line(axis, taus, estimate(above, strata_of(*zip(*found)), args), looks[name])
            rows.append(final_row({"curve": name} | facts, curve, args))
        axis.set(title=title_of(facts), xlabel=f"tau: {score_name(args)}")
        axis.set_ylabel("share of runs above")
    band = drawn(replace(args, few=False))[1]
    return figure, rows, caption_of(runs, args, "Final scores", band)


def places_of(values: list[str], x: str) -> tuple[list[str], np.ndarray]:
    """Return the values in order and where they stand: to scale, on a logarithmic one from a ratio
    of 50, sparsities by the logarithm of what they leave; at equal distances words, and numbers
    whose labels would overlap.
    """
    try:
        values = sorted(values, key=float)
    except ValueError:
        return values, np.arange(len(values))
    places = np.array(values, float)
    if "sparsity" in x and places[-1] < 1:
        places = -np.log10(1 - places)
    elif places[0] > 0 and places[-1] >= 50 * places[0]:
        places = np.log10(places)
    crowded = len(values) > 1 and np.diff(places).min() < np.ptp(places) / 14
    return values, np.arange(len(values)) if crowded else places


def draw_sweep(runs: list[Run], args: Args) -> Drawing:
    """Draw final scores against a flag; curves that do not depend on it and published ones are
    horizontal lines.
    """
    if unknown := [name for name in words(args.flat) if name not in curves_of(runs)]:
        refuse(f"--flat {unknown[0]}: no such curve; there are {', '.join(curves_of(runs))}")
    flat = {run.curve for run in runs if run.published or run.curve in words(args.flat)}
    lost = [run for run in runs if not run.x and run.curve not in flat]
    runs = [run for run in runs if run.x or run.curve in flat]
    values = list(dict.fromkeys(run.x for run in runs if run.curve not in flat))
    if not values:
        what = f"no run of {' '.join(args.grid)} has that flag, in the manifest or in its args.json"
        refuse(f"--x {args.x}: {what}")
    values, places = places_of(values, args.x)
    panels, looks, rows = panels_of(runs, args), looks_of(runs), list[Row]()
    moving = [name for name in looks if name not in flat]
    # Curves stand side by side, at most 0.2 of the smallest gap to either side, so that their bars
    # can be told apart.
    step = min(0.06, 0.4 / len(moving)) * (np.diff(places).min() if len(places) > 1 else 1)
    figure, axes = new_figure(len(panels))
    what, band, label = drawn(args)
    middle = ("mean", "lowest", "highest") if args.few else ("iqm", "iqm_low", "iqm_high")
    for (facts, mine), axis in zip(panels, axes[:, 0]):
        for name, curve in curves_of(mine).items():
            look, points = looks[name], list[tuple[float, ...]]()
            for value, place in [("", 0.0)] if name in flat else zip(values, places):
                if some := [run for run in curve if name in flat or run.x == value]:
                    row = final_row({"curve": name} | facts | {args.x: value}, some, args)
                    rows.append(row)
                    if middle[0] in row:
                        points.append((place, *(row[key] for key in middle)))
            x, y, low, high = np.reshape(points, (-1, 4)).T
            if name in flat:
                line = {key: value for key, value in look.items() if "marker" not in key}
                for level, *ends in zip(y, low, high):
                    axis.axhline(level, **line)
                    axis.axhspan(*ends, color=look["color"], alpha=0.12, linewidth=0, zorder=1)
            else:
                x = x + step * (moving.index(name) - (len(moving) - 1) / 2)
                axis.plot(x, y, **look)
                bars: Row = {"fmt": "none", "color": look["color"], "capsize": 2}
                axis.errorbar(x, (low + high) / 2, (high - low) / 2, **bars)
        axis.set(title=title_of(facts), xlabel=args.x.replace("_", " "), ylabel=label)
        axis.set_xticks(places, values, fontsize=8)
    bars_are = band.replace("bands:", "bars and bands:")
    caption = caption_of(runs, args, f"{what[0].upper()}{what[1:]} of final scores", bars_are)
    if args.reference:
        frames = max(run.steps[-1] for run in runs if run.published) * 4e-6
        caption += f" Published scores are those at {frames:g} million frames."
    if lost:
        caption += f" {len(lost)} runs that do not say their {args.x} are left out."
    return figure, once(rows), caption


def draw_epochs(runs: list[Run], args: Args) -> Drawing:
    """Draw each epoch's return beside the published runs of the same agent, with the interval in
    which a sixth run of theirs would lie 95 times of 100: mean +- t(0.975, 4) sd sqrt(1 + 1 / 5).
    """
    ours = [run for run in runs if not run.published and len(run.series("return")[0])]
    known = {run.env_id for run in runs if run.published}
    lost = sorted({run.env_id for run in ours} - known)
    ours = [run for run in ours if run.env_id in known]
    if not ours:
        refuse("no epoch of a game with published runs has ended yet")
    pairs = list(dict.fromkeys((run.curve, run.env_id) for run in ours))
    pairs.sort(key=lambda pair: ([*curves_of(ours)].index(pair[0]), pair[1]))
    figure, axes = new_figure(len(pairs))
    rows = list[Row]()
    for (name, env_id), axis in zip(pairs, axes[:, 0]):
        agent = name.partition(" ")[0]
        theirs = [run for run in runs if run.published and f" {agent} " in run.curve]
        if not theirs:
            refuse(f"--reference: none is of {agent}, the first word of the curve {name}")
        theirs = [run for run in theirs if run.env_id == env_id]
        scores = np.stack([run.series("return")[1] for run in theirs])  # [5, epochs]
        steps, label = theirs[0].steps, theirs[0].curve
        half = 2.776 * scores.std(0, ddof=1) * (1 + 1 / 5) ** 0.5
        bounds = np.stack([scores.mean(0), scores.mean(0) - half, scores.mean(0) + half])
        axis.errorbar(steps * 4e-6, bounds[0], half, color="0.55", capsize=4, label=label)
        for run in (run for run in ours if (run.curve, run.env_id) == (name, env_id)):
            own_steps, values = run.series("return")
            axis.plot(own_steps * 4e-6, values, "o", color=COLOURS[2], markersize=4, label="ours")
            for step, value in zip(own_steps, values):
                if step in steps:
                    middle, low, high = bounds[:, np.flatnonzero(steps == step)[0]]
                    row: Row = {"curve": name, "environment": env_id, "seed": run.seed}
                    row |= {"million frames": step * 4e-6, "return": value}
                    row |= {"published": middle, "published_low": low, "published_high": high}
                    rows.append(row | {"inside": "yes" if low <= value <= high else "no"})
        axis.set(title=f"{name}, {env_id}", xlabel="million frames", ylabel="return")
    inside = sum(row["inside"] == "yes" for row in rows)
    interval = "bars: 95 % prediction intervals of the five published runs"
    caption = f"{inside} of {len(rows)} epochs lie inside; {interval}."
    return figure, rows, caption + (f" Without published runs: {', '.join(lost)}." if lost else "")


def draw_metrics(runs: list[Run], args: Args) -> Drawing:
    """Draw what was logged over the steps: panels of each key in a row, of an environment below."""
    logged = list(dict.fromkeys(key for run in runs for key in run.columns if "/" in key))
    if missing := [name for name in words(args.keys) if not matching(logged, [name])]:
        what = f"no run of {' '.join(args.grid)} has logged it; there are {', '.join(logged)}"
        refuse(f"--keys {missing[0]}: {what}")
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
    """Draw each layer's sparsity, a mean over environments and seeds: a panel for each curve."""
    from matplotlib import colormaps

    logged = list(dict.fromkeys(key for run in runs for key in run.columns))
    if not (layers := matching(logged, ["sparsity/layer/"])):
        what = "no sparsity/layer/NAME is in it; a .csv file must be of an earlier plot.py layers"
        refuse(f"{' '.join(args.grid)}: {what}")
    figure, axes = new_figure(len(curves_of(runs)))
    shades, (scale, unit), rows = colormaps["viridis"], unit_of(runs), list[Row]()
    for (name, curve), axis in zip(curves_of(runs).items(), axes[:, 0]):
        for i, key in enumerate(layers):
            if mine := [run for run in curve if len(run.series(key)[0])]:
                layer = key.removeprefix("sparsity/layer/")
                look: Row = {"color": shades(0.9 * i / len(layers)), "linestyle": DASHES[i % 4]}
                look |= {"marker": MARKERS[i % 9], "label": literal(layer), "markersize": 3}
                draw_range(axis, mine, key, scale, look)
                finals = range_row([run.final(key, args.last) for run in curve])
                rows.append({"curve": name, "layer": layer} | finals)
        axis.set(title=textwrap.fill(name, 40), xlabel=unit)
        axis.set(ylabel="sparsity", ylim=(-0.03, 1.03))
    env_ids = ", ".join(sorted({run.env_id for run in runs}))
    what = f"Mean, bands from lowest to highest run; environments: {env_ids}"
    return figure, rows, caption_of(runs, args, what, "")


def draw_covariance(runs: list[Run], args: Args) -> Drawing:
    """Draw the gradient covariance of the lowest seed that has one: a row for each curve, a column
    per environment.
    """
    env_ids, names = sorted({run.env_id for run in runs}), list(curves_of(runs))
    means = dict[int, float | None]()
    figure, axes = new_figure(len(env_ids), len(names), len(env_ids))
    for run in sorted(runs, key=lambda run: -run.seed):  # a lower seed is drawn over a higher one
        axis = axes[env_ids.index(run.env_id), names.index(run.curve)]
        i, j, cosines = (run.series(key)[1] for key in ("i", "j", "cosine"))
        rows, columns = i.astype(int), j.astype(int)
        matrix = np.eye(int(max(i, default=0)) + 1)
        matrix[rows, columns] = matrix[columns, rows] = cosines
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        means[id(run)] = float(np.abs(off).mean()) if len(off) else None
        if len(off):
            axis.clear()
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
            axis.set_xlabel(f"seed {run.seed}, step {run.steps[0]:,.0f}", fontsize=7)
        axis.set(xticks=[], yticks=[], ylabel=textwrap.fill(run.curve, 24))
    for env_id, column in zip(env_ids, axes):
        column[0].set_title(env_id)
    figure.colorbar(image, ax=list(axes.flat), label="cosine of two loss gradients", shrink=0.8)
    table = list[Row]()
    for where in ("", *env_ids):
        some = [run for run in runs if where in ("", run.env_id)]
        for name, curve in curves_of(some).items():
            facts = {"curve": name, "environment": where or "all"}
            table.append(facts | range_row([means[id(run)] for run in curve]))
    what = (
        "Loss gradients of 32 transitions of the replay. Table: absolute values off the diagonal."
    )
    return figure, table, what


DRAW = (
    draw_curves,
    draw_sweep,
    draw_profile,
    draw_epochs,
    draw_metrics,
    draw_layers,
    draw_covariance,
)
KINDS = {draw.__name__.removeprefix("draw_"): draw for draw in DRAW}


def save_picture(figure: Any, title: str, out: Path) -> None:
    """Write OUT.png, OUT.svg and OUT.pdf, with the legend below the panels."""
    labels = dict[str, Any]()
    for axis in figure.axes:
        labels = dict(zip(*axis.get_legend_handles_labels()[::-1])) | labels
        if (place := axis.get_subplotspec()) and not place.is_first_col():
            axis.set_ylabel("")
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(13 * width / (8 + max(map(len, labels), default=0)))))
    figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns))
    where: Row = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(labels.values(), labels.keys(), **where, fontsize=8, handlelength=3)
    figure.suptitle(title)
    # A date would make the same picture different bytes.
    figure.savefig(f"{out}.png", dpi=200)
    figure.savefig(f"{out}.svg", metadata={"Date": None})
    figure.savefig(f"{out}.pdf", metadata={"CreationDate": None})


def number(value: Any) -> str:
    """Return a cell of a table: at least two digits; - for a missing value."""
    if value is None or isinstance(value, str):
        return value if isinstance(value, str) else "-"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if not np.isfinite(value) or 1e-12 < size < 0.01:
        return f"{value:.2g}"
    digits = 0 if size >= 1000 or size == size // 1 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def markdown(rows: list[Row]) -> str:
    """Return a table in Markdown: `9 of 15` of runs, of_runs; `2 [1, 3]` of iqm, iqm_low, _high."""
    names = {"iqm": "IQM", "gap": "optimality gap"}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kept = [k for k in columns if not k.startswith("of_") and not k.endswith(("_low", "_high"))]
    lines = [[names.get(key, key.replace("_", " ")) for key in kept], ["---"] * len(kept)]
    for row in rows:
        cells = [number(row.get(key)) for key in kept]
        for i, key in enumerate(kept):
            cells[i] += f" of {row[f'of_{key}']:,}" if f"of_{key}" in row else ""
            if not np.isnan(row.get(f"{key}_low", np.nan)):
                cells[i] += f" [{number(row[f'{key}_low'])}, {number(row[f'{key}_high'])}]"
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source_of(args: Args) -> tuple[Path, list[Row]]:
    """Return the CSV file or the manifest that GRID names, or the one that run folders would have;
    and what is planned, nothing for a CSV file.
    """
    folders, path = [Path(name) for name in args.grid], runs_folder() / f"{args.grid[0]}.jsonl"
    if len(folders) == 1 and path.exists():
        return path, plans_of_grid(path)
    if all(folder.is_dir() for folder in folders):
        return folders[0].parent / "comparison.jsonl", plans_of_folders(folders, args)
    if len(folders) > 1:
        missing = next(folder for folder in folders if not folder.is_dir())
        refuse(f"{missing}: not a folder; GRID is one grid, one .csv file, or folders of runs")
    if folders[0].suffix == ".csv":
        return folders[0], []
    return path, plans_of_grid(path)


def make(args: Args) -> None:
    """Write the CSV file, unless it is the source, then from it the picture and the table."""
    args = replace(args, x=args.x.replace("-", "_"), panel=args.panel.replace("-", "_"))
    args = replace(args, keys=args.keys or (("analysis/",),))
    path, plans = source_of(args)
    out = Path(args.out or path.with_suffix(""))
    rows = collect(path, plans, args) if path.suffix == ".jsonl" else []
    out.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        path = Path(f"{out}.csv")
        write_rows(path, rows)
    runs = read_runs(path, args)
    end = max((run.steps.max(initial=0) for run in runs), default=0)
    if end == 0:
        refuse(f"{path}: no run in it has a step")
    atari = any(run.env_id in GAMES for run in runs)
    if not atari and (args.reference or args.score == "human"):
        flag = "reference" if args.reference else "score human"
        refuse(f"--{flag}: {' '.join(args.grid)} has none of the 60 Atari games with known scores")
    if args.reference and any("offline" in run.columns for run in runs):
        refuse("--reference: the published runs are online ones; the steps of these are updates")
    if args.score == "auto":
        pooled = "baseline" if args.baseline else "human" if atari and not args.per_env else ""
        args = replace(args, score=pooled if pooled and args.kind in SCORING.split() else "return")
    # Nothing but human and baseline scores is on one scale.
    args = replace(args, per_env=args.per_env or args.score not in ("human", "baseline"))
    for name in words(args.reference):
        runs += published(name, {run.env_id for run in runs}, end)
    args = replace(args, few=args.per_env and max(seeds_of(runs).values()) <= 3)
    add_scores(runs, args)
    if not any(run.scored for run in runs):
        what = f"no environment of {' '.join(args.grid)} has one; --score return is always known"
        refuse(f"--score {args.score}: {what}")
    figure, table, caption = KINDS[args.kind](runs, args)
    save_picture(figure, args.title, out)
    write_rows(Path(f"{out}_table.csv"), table)
    text = f"{markdown(table)}\n{caption}\n"
    Path(f"{out}.md").write_text(text)
    print(text, end="")


def main(args: Args) -> None:
    """Check the flags and make the files; with DRY=1 only print the command line."""
    check(args)
    if switch("DRY"):  # tests of shell scripts look at what they would run
        return print(shlex.join(["python", *sys.argv]))
    try:
        make(args)
    except OSError as error:
        refuse(str(error))  # which may have no file name


if __name__ == "__main__":
    outlive_readers()
    main(tyro.cli(Args, description=__doc__))
