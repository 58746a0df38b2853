"""From run folders to the CSV file of plot.py, and from there to its runs."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import GAMES, canonical, refuse

if TYPE_CHECKING:
    from plot import Args, Words

SPARSITY = {"sparsity_target": "sparsity/target", "sparsity_prunable": "sparsity/prunable"}
# Columns of numbers; those of keys have a slash.
NUMBERS = ("step", "return", *SPARSITY, "i", "j", "cosine", "offline")

Row = dict[str, Any]
Series = tuple[np.ndarray, np.ndarray]  # [T] steps and values


@dataclass
class Run:
    """A planned run and what it has logged."""

    curve: str
    env_id: str
    seed: int
    x: str
    panel: str
    finished: bool
    steps: np.ndarray  # [T] at which it has logged something; T = 0 if it has not begun
    columns: dict[str, Series]  # where each was logged
    scored: bool = True  # False where the score that is asked for is not known
    published: bool = False

    def series(self, column: str) -> Series:
        """Return steps and values of a column where it was logged."""
        return self.columns.get(column, (np.empty(0), np.empty(0)))

    def final(self, column: str, last: int) -> float | None:
        """Return the mean of a finished run's last values of a column, None if there is none."""
        values = self.series(column)[1][-last:]
        return float(values.mean()) if self.finished and len(values) else None


def words(groups: Words) -> list[str]:
    """Return the words of a flag that may be repeated."""
    return [word for group in groups for word in group]


def records(path: Path, wanted: Iterable[str]) -> Iterator[Row]:
    """Yield the records that name something wanted; not the last line if it was cut off."""
    # Most records are of single episodes: parsing all would take minutes for a large grid.
    pattern = re.compile("|".join(map(re.escape, wanted)))
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    for i, line in enumerate(lines, 1):
        if pattern.search(line):
            try:
                yield json.loads(line)
            except ValueError:
                if i < len(lines):
                    refuse(f"{path}: line {i} is not JSON")


def matching(keys: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the keys that are wanted: by their name, or by their beginning up to a slash."""
    return [k for n in wanted for k in keys if k == n or (n[-1:] == "/" and k.startswith(n))]


def measure(folder: Path, trained: bool, args: Args) -> list[Row]:
    """Return a row for each score of a run (metrics: of each step with a key), with sparsity."""
    score = "charts/epoch_return" if trained else "eval/episodic_return"
    wanted = words(args.keys) if args.kind == "metrics" else [score]
    steps, latest, rows = defaultdict[int, Row](dict), Row(), list[Row]()
    for record in records(folder / "metrics.jsonl", [*wanted, "sparsity/"]):
        # A step may have several records; that of the last evaluation has no sparsity.
        steps[record["step"]].update(record)
    for step, record in sorted(steps.items()):
        latest |= {key: record[key] for key in matching(record, ["sparsity/"])}
        if not (found := matching(record, wanted)):
            continue
        row = {"step": step, "seconds": record["seconds"], "return": record.get(score)}
        row |= {column: latest.get(key) for column, key in SPARSITY.items()}
        layers = matching(latest, ["sparsity/layer/"]) if args.kind == "layers" else []
        row |= {key: record[key] for key in found if args.kind == "metrics"}
        rows.append(row | {key: latest[key] for key in layers})
    return rows


def entries(folder: Path) -> list[Row]:
    """Return the upper triangle, diagonal included, of a run's latest gradient covariance."""
    if not (paths := sorted(folder.glob("gradient_covariance-*.npy"))):
        return []
    try:
        matrix = np.load(paths[-1], allow_pickle=False).astype(float)
        pairs = np.argwhere(np.triu(np.ones_like(matrix)))
        step = int(paths[-1].stem.rpartition("-")[2])
        return [{"step": step, "i": int(i), "j": int(j), "cosine": matrix[i, j]} for i, j in pairs]
    except (OSError, EOFError, ValueError):
        refuse(f"{paths[-1]}: must be a square matrix of cosines, written by np.save")


def text_of(value: Any) -> str:
    """Return a flag's value as one text, be it of a manifest or of args.json: 3, True, 16 32."""
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    try:
        return str(value) if isinstance(value, bool) else f"{float(value):g}"
    except (TypeError, ValueError):
        return "" if value is None else str(value)


def flags_of(folder: Path) -> Row:
    """Return the flags of a run from its args.json, {} before it has begun."""
    path = folder / "args.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        refuse(f"{path}: not JSON")


def plans_of_grid(path: Path) -> list[Row]:
    """Return what a manifest plans, by line: where it stands, curve, script, flags, folder."""
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.jsonl"))) or "none"
        hint = f"the grids there are: {known}; or give a .csv file or run folders"
        refuse(f"{path}: no such grid; {hint}")
    plans = []
    for i, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}: line {i}"
        try:
            plan = json.loads(line)
            folder = path.parent / plan["folder"]
            own = {name.replace("-", "_"): value for name, value in plan["flags"].items()}
            plan = {"curve": str(plan["curve"]), "script": str(plan["script"]), "folder": folder}
        except (ValueError, TypeError, KeyError, AttributeError):
            refuse(f"{where} must be a JSON object with curve, script, flags and folder")
        flags = flags_of(folder) | {name[3:]: False for name in own if name.startswith("no_")}
        flags |= {name: True if value == "" else value for name, value in own.items()}
        plans.append(plan | {"where": where, "flags": flags})
    return plans


def plans_of_folders(folders: list[Path], args: Args) -> list[Row]:
    """Return the same for runs made by hand; a curve is named by the flags in which they differ."""
    found = {folder: flags_of(folder) for folder in folders}
    if missing := [folder for folder, flags in found.items() if not flags]:
        refuse(f"{missing[0]}: no run is there (it has no args.json)")
    # These flags say where and how a run was made, not what it is.
    ignored = {"env_id", "seed", "run_dir", "resume", "device", "track", "wandb_project", "dataset"}
    ignored |= {"checkpoint_minutes", "keep_checkpoint", args.x, args.panel}
    names = list(dict.fromkeys(name for flags in found.values() for name in flags))

    def differs(name: str, script: object = None) -> bool:
        """Return whether all runs have this flag, or all of a script, and with different values."""
        mine = [own for own in found.values() if script is None or own.get("script") == script]
        return all(name in own for own in mine) and len({text_of(own[name]) for own in mine}) > 1

    plans = []
    for folder, flags in found.items():
        script = str(flags.get("script", ""))
        parts = [Path(script).stem] if differs("script") else []
        for name in names:
            if name not in ignored | {"script"} and (differs(name) or differs(name, script)):
                parts.append(f"{name.replace('_', '-')} {text_of(flags[name])}")
        curve = ", ".join(parts) or Path(script).stem
        plan = {"curve": curve, "script": script, "flags": flags, "folder": folder}
        plans.append(plan | {"where": str(folder)})
    return plans


def titles_of(datasets: set[str]) -> dict[str, str]:
    """Return short names of datasets: of paths as many last parts as tell them apart."""
    longest = max((len(Path(name).parts) for name in datasets), default=0)
    for n in range(1, longest + 1):
        titles = dict[str, str]()
        for name in datasets:
            path = name.endswith(".hdf5") or Path(name).is_absolute()
            short = "/".join(Path(name).parts[-n:]) if path else name
            titles[name] = short.removesuffix(".hdf5")
        if len(set(titles.values())) == len(datasets):
            return titles
    return {name: name for name in datasets}


def game_of(flags: Row, script: str) -> str:
    """Return an Atari run's game, which may be in its dataset's path alone; "" of other runs."""
    if "atari" not in script:
        return ""
    if flags.get("env_id"):
        return canonical(str(flags["env_id"]), script)
    names = (canonical(part, script) for part in reversed(Path(flags.get("dataset") or "").parts))
    return next((name for name in names if name in GAMES), "")


def collect(path: Path, plans: list[Row], args: Args) -> list[Row]:
    """Return the rows of the CSV file; a run that has nothing to show is a row without a step."""
    rows, seen, families = list[Row](), set[tuple[Any, ...]](), set[str]()
    titles = titles_of(
        {str(plan["flags"]["dataset"]) for plan in plans if plan["flags"].get("dataset")}
    )
    for plan in plans:
        where, flags, folder = plan["where"], plan["flags"], plan["folder"]
        name = game_of(flags, plan["script"]) or str(
            flags.get("dataset") or flags.get("env_id") or ""
        )
        if not name or not str(flags.get("seed", "")).isdecimal():
            refuse(f"{where}: its flags must have a seed, and env-id or dataset")
        env_id = titles.get(name) or canonical(name, plan["script"])
        run = {"curve": plan["curve"], "env_id": env_id, "seed": int(flags["seed"])}
        for flag in filter(None, (args.x, args.panel)):
            flat = flag == args.x and plan["curve"] in words(args.flat)
            run[flag] = "" if flat else text_of(flags.get(flag))
        if tuple(run.values()) in seen:
            again = f"{plan['curve']}, {env_id}, seed {run['seed']} once more"
            refuse(f"{where}: {again}; --x must be what differs")
        seen.add(tuple(run.values()))
        family = re.search("minatar|atari|rainbow", plan["script"])
        families.add(family[0].replace("rainbow", "atari") if family else "")
        run["finished"] = int((folder / "final.json").exists())
        run |= {"offline": 1} if "cql_atari" in plan["script"] else {}  # steps are gradient steps
        covariance = args.kind == "covariance"
        # Scored by its training episodes; the others by evaluations.
        trained = family is not None and "cql" not in plan["script"]
        found = entries(folder) if covariance else measure(folder, trained, args)
        rows += [run | row for row in found or [{}]]
    if not rows or len(families) > 1:
        mixed = "mixes Atari, MinAtar and other runs, which no picture can show"
        refuse(f"{path}: {mixed if rows else 'no runs are in it'}")
    if not any("step" in row for row in rows):
        keys = f"--keys {' '.join(words(args.keys))}"
        what = keys if args.kind == "metrics" else "what this kind shows"
        refuse(f"{path}: no run in it has logged {what} yet")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a CSV file: all columns that a row has, six digits of a fraction, all of an integer."""
    with open(path, "w", newline="") as file:
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            texts = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(texts)


def read_runs(path: Path, args: Args) -> list[Run]:
    """Return the runs of a CSV file in its order; spreadsheets and pandas may have written it."""
    groups = defaultdict[tuple[str, ...], list[dict[str, str]]](list)
    needed = ["curve", "env_id", "seed", "finished", "step"]
    needed += [flag for flag in (args.x, args.panel) if flag]
    needed += ["i", "j", "cosine"] if args.kind == "covariance" else ["return", *SPARSITY]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel's mark comes off
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            if missing := ", ".join(name for name in needed if name not in names):
                refuse(f"{path}: no column {missing}; there are {', '.join(names) or 'none'}")
            for row in reader:
                if None in row or None in row.values():
                    refuse(f"{path}: line {reader.line_num} has not {len(names)} cells")
                seed = str(int(float(row["seed"])))
                flags = [text_of(row.get(flag, "")) for flag in (args.x, args.panel)]
                key = (row["curve"], row["env_id"], seed, *flags)
                groups[key].append(row)
        runs = []
        for (curve, env_id, seed, x, panel), rows in groups.items():
            begun, columns = [row for row in rows if row["step"]], dict[str, Series]()
            for name in (name for name in names if name in NUMBERS or "/" in name):
                found = [(row["step"], row[name]) for row in begun if row[name]]
                if found:
                    columns[name] = (*np.array(found, float).T,)
            steps = columns["step"][0] if begun else np.empty(0)
            if args.kind != "covariance" and (np.diff(steps) <= 0).any():
                what = f"{curve}, {env_id}, seed {seed} is there more than once"
                refuse(f"{path}: {what}; --x must be what differs")
            if x and args.kind != "sweep":
                curve = f"{curve}, {args.x} {x}"
            done = {"true": 1.0, "false": 0.0}.get(rows[0]["finished"].lower())
            finished = bool(float(rows[0]["finished"]) if done is None else done)
            facts = (curve, env_id, int(seed), x, panel, finished)
            runs.append(Run(*facts, steps, columns))
    except (OverflowError, TypeError, ValueError) as error:
        refuse(f"{path}: not a CSV file of this program ({' '.join(str(error).split())})")
    return runs
