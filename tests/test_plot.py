"""benchmark/plot.py: from run folders to the CSV file, the picture and the table."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from conftest import SCRIPTS

PLOT = SCRIPTS.parent / "benchmark" / "plot.py"


def plot(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PLOT, *arguments], capture_output=True, text=True, check=False)


def test_runs_become_a_csv_file_a_picture_and_a_table(tmp_path: Path) -> None:
    """Two seeds of one method, the second one shorter; a last evaluation without sparsity has the latest one's."""
    for seed, returns in ((1, [10.0, 30.0, 50.0]), (2, [20.0, 50.0])):
        folder = tmp_path / "runs" / "dense" / "Hopper-v5" / str(seed)
        folder.mkdir(parents=True)
        records = [{"step": 50, "seconds": 1.0, "charts/episodic_return": 3.0}]
        for i, score in enumerate(returns, 1):
            sparsity = {"sparsity/target": i / 10, "sparsity/prunable": i / 20} if i < 3 else {}
            records.append({"step": 100 * i, "seconds": 2.4 * i, "eval/episodic_return": score, **sparsity})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = plot(tmp_path / "runs", tmp_path / "out" / "curves")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        rows = [*csv.reader(file)]
    assert rows == [
        ["method", "env_id", "seed", "step", "seconds", "return", "sparsity_target", "sparsity_prunable"],
        ["dense", "Hopper-v5", "1", "100", "2", "10.0", "0.1", "0.05"],
        ["dense", "Hopper-v5", "1", "200", "5", "30.0", "0.2", "0.1"],
        ["dense", "Hopper-v5", "1", "300", "7", "50.0", "0.2", "0.1"],
        ["dense", "Hopper-v5", "2", "100", "2", "20.0", "0.1", "0.05"],
        ["dense", "Hopper-v5", "2", "200", "5", "50.0", "0.2", "0.1"],
    ]
    # As far as both seeds reach: 200 steps, means of 20 and 35 over the evaluations until then.
    assert result.stdout.splitlines()[-1] == "| dense | Hopper-v5 | 2 | 200 | 28 | 20 | 35 | 0.200 | 0.100 |"
    pictures = [tmp_path / "out" / f"curves.{ending}" for ending in ("png", "svg")]
    assert pictures[0].read_bytes()[:4] == b"\x89PNG" and b"<svg" in pictures[1].read_bytes()[:500]
    again = plot(tmp_path / "out" / "curves.csv", tmp_path / "again")
    assert again.stdout == result.stdout and (tmp_path / "again.png").exists()


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, words in (("nowhere", "neither"), ("empty", "metrics.jsonl"), ("other.csv", "columns")):
        result = plot(tmp_path / name, tmp_path / "out")
        assert result.returncode == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1
        assert name in result.stderr
