"""benchmark/plot.py: from run folders to the CSV file, the statistics, the pictures and the
tables.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tyro
from conftest import FIFTEEN_GAMES

PLOT = Path(__file__).resolve().parent.parent / "benchmark" / "plot.py"
# Scores [6 games, 5 seeds] and what rliable 1.2.0 (arch 7.2.0, SciPy 1.17.1, NumPy 2.4.6) makes of
# them with 50,000
# replicates: statistic, low, high. Its own ends differ by up to 0.006 from one seed to another.
SCORES = [
    [4.04, 0.71, 0.78, 0.33, 0.77],
    [1.34, 0.29, 3.8, 1.19, 1.53],
    [0.59, 1.41, 0.74, 0.6, 0.76],
    [0.05, 2.03, 0.36, 0.96, 1.15],
    [0.37, 0.95, 1.92, 2.75, 1.67],
    [1.14, 1.49, 1.01, 1.11, 0.11],
]
RLIABLE = {
    "iqm": (1.00688, 0.7744, 1.2538),
    "median": (1.149, 0.781, 1.476),
    "mean": (1.19833, 0.9033, 1.5347),
    "gap": (0.221, 0.1243, 0.3287),
}

Record = dict[str, Any]
Plot = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="session")
def module() -> ModuleType:
    sys.path.insert(0, str(PLOT.parent))  # for benchmark/common.py
    spec = importlib.util.spec_from_file_location("plot", PLOT)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules["plot"] = found  # dataclasses look their module up there
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def figures() -> list[Any]:
    """Return the list that collects the figures which are drawn but not saved."""
    return []


@pytest.fixture
def plot(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Any]
) -> Plot:
    """Return plot(KIND, GRID, flags...), returning the rows of the table; it saves pictures only
    where asked for.
    """
    monkeypatch.setenv("RUNS", str(tmp_path))
    save = module.save_picture

    def call(*words: str, pictures: bool = False) -> list[dict[str, str]]:
        monkeypatch.setattr(
            module, "save_picture", save if pictures else lambda figure, *_: figures.append(figure)
        )
        module.main(tyro.cli(module.Args, args=words))
        out = (
            words[words.index("--out") + 1]
            if "--out" in words
            else str(tmp_path / words[1]).removesuffix(".csv")
        )
        return read(Path(f"{out}_table.csv"))

    return call


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def plan(
    folder: Path,
    curve: str,
    env_id: str,
    seed: int,
    records: list[Record] | None = None,
    finished: bool = True,
    script: str = "dqn_atari_gmp.py",
    grid: str = "grid",
    **flags: str,
) -> Path:
    """Append a run to the manifest, begin it if it has records, and return its folder."""
    name = f"{env_id.replace('/', '-')}__{script}__{seed}__{len([*folder.glob('*__*')])}{curve}"
    texts = {"env-id": env_id, "seed": str(seed)} | {
        key.replace("_", "-"): value for key, value in flags.items()
    }
    texts = texts if env_id else {key: value for key, value in texts.items() if key != "env-id"}
    with open(folder / f"{grid}.jsonl", "a") as file:
        entry = {"id": name, "curve": curve, "script": script, "flags": texts, "folder": name}
        file.write(json.dumps(entry) + "\n")
    if records is not None:
        (folder / name).mkdir()
        resolved = {"script": script, "env_id": env_id, "seed": seed, "width": 1, "sparsity": 0.0}
        (folder / name / "args.json").write_text(json.dumps(resolved))
        (folder / name / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        if finished:
            (folder / name / "final.json").write_text('{"status": "finished"}')
    return folder / name


def epochs(*returns: float | None, sparsity: float = 0.0) -> list[Record]:
    """Return the records of Atari epochs of 250,000 steps, with an episode in each; None: no
    episode ended.
    """
    records: list[Record] = []
    for i, value in enumerate(returns, 1):
        records.append(
            {"step": 250_000 * i - 7, "seconds": 9.0 * i, "charts/episodic_return": -1.0}
        )
        score = {} if value is None else {"charts/epoch_return": value}
        layers = {"sparsity/layer/conv1": sparsity / 2, "sparsity/layer/dense": sparsity}
        shares = {"sparsity/target": sparsity, "sparsity/prunable": sparsity}
        records.append({"step": 250_000 * i, "seconds": 10.0 * i} | score | shares | layers)
    return records


def args_of(module: ModuleType, **flags: Any) -> Any:
    return module.Args(**({"kind": "curves", "grid": ("grid",)} | flags))


def strata(rows: list[list[float]]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def test_statistics_of_a_few_scores_by_hand(module: ModuleType) -> None:
    # -50 1 | 2 3 4 5 | 6 100: two of eight fall away at each end.
    assert module.iqm(strata([[1, 2, 100, 3], [-50, 4, 5, 6]])) == 3.5
    assert module.iqm(strata([[1, 2, 6]])) == 3  # int(0.75) = 0 of three fall away
    assert module.iqm(strata([[9, 1, 2, 3, -7]])) == 2
    assert np.isnan(module.iqm(strata([[10, 20, 30, 40, np.nan]]))), "no trimmed best score"
    assert module.iqm(strata([[10, 20, 30, 40, np.inf]])) == 30
    statistics = module.STATISTICS
    # 1 - 0.5, 0, 0, 1 - (-1): 2.5 of four.
    assert statistics["gap"](strata([[0.5, 2.0], [1.0, -1.0]])) == 0.625
    # The games' means are 2, 10 and 4, whatever the number of seeds.
    uneven = strata([[1, 3], [10, 10, 10], [4]])
    assert statistics["median"](uneven) == 4 and statistics["mean"](uneven) == pytest.approx(16 / 3)


@pytest.mark.parametrize("name", RLIABLE)
def test_statistics_are_rliables(module: ModuleType, name: str) -> None:
    ours = module.estimate(
        module.STATISTICS[name], strata(SCORES), args_of(module, bootstrap=50_000)
    )
    assert ours[0] == pytest.approx(RLIABLE[name][0], abs=1e-5)
    assert ours[1:] == pytest.approx(RLIABLE[name][1:], abs=0.012)


def test_statistics_are_those_of_the_rliable_that_is_installed(module: ModuleType) -> None:
    try:
        from rliable import library, metrics
    except (ImportError, TypeError):  # arch 7.2.0, which it needs, raises TypeError beside pandas 3
        pytest.skip("rliable is not installed or does not import")
    theirs = {
        "iqm": metrics.aggregate_iqm,
        "median": metrics.aggregate_median,
        "mean": metrics.aggregate_mean,
        "gap": metrics.aggregate_optimality_gap,
    }
    scores = np.random.default_rng(5).gamma(1.0, 1.0, (4, 7))  # runs x games
    for name, statistic in theirs.items():
        np.random.seed(0)
        point, ends = library.get_interval_estimates(
            {"": scores}, lambda x, f=statistic: np.array([f(x)]), reps=5000
        )
        ours = module.estimate(
            module.STATISTICS[name], [*scores.T], args_of(module, bootstrap=20_000)
        )
        assert ours[0] == pytest.approx(point[""][0]) and ours[1:] == pytest.approx(
            ends[""][:, 0], abs=0.03
        )


def test_the_bootstrap_is_that_of_a_plain_loop(module: ModuleType) -> None:
    """Unequal numbers of seeds: games of five, four, two and two."""
    games = [[*SCORES[1]], SCORES[4][:4], SCORES[5][:2], [1.3, 1.1]]
    draw, replicates = random.Random(1), list[float]()
    for _ in range(20_000):
        pool = sorted(draw.choice(game) for game in games for _ in game)
        replicates.append(sum(pool[3:10]) / 7)  # int(13 / 4) fall away at each end
    replicates.sort()
    ours = module.estimate(module.iqm, strata(games), args_of(module, bootstrap=20_000))
    # 0.29 0.37 0.95 | 1.1 1.14 1.19 1.3 1.34 1.49 1.53 | 1.92 2.75 3.8
    assert ours[0] == pytest.approx(9.09 / 7)
    assert ours[1:] == pytest.approx((replicates[500], replicates[-501]), abs=0.02)


def test_seeds_are_redrawn_within_their_game_only(module: ModuleType) -> None:
    args = args_of(module)
    assert module.estimate(module.iqm, strata([[1, 1, 1], [5, 5, 5]]), args).tolist() == [3, 3, 3]
    point, low, high = module.estimate(
        module.STATISTICS["mean"], strata([[1, 3], [100, 100]]), args
    )
    assert (point, low, high) == (
        51,
        50.5,
        51.5,
    )  # (1, 1) at least, (3, 3) at most: each a quarter of the replicates
    assert np.isnan(
        module.estimate(module.iqm, strata([[1], [2]]), args)[1:]
    ).all()  # one seed tells nothing
    point, *ends = module.estimate(module.iqm, strata([[1, 2, 3], [2]]), args)
    assert point == 2 and np.isnan(ends).all(), "nor would the others' interval hold for all games"


def test_the_same_seed_gives_the_same_interval(module: ModuleType) -> None:
    first, again, other = (
        module.estimate(module.iqm, strata(SCORES), args_of(module, seed=s)) for s in (3, 3, 4)
    )
    assert (first == again).all() and first[0] == other[0] and (first[1:] != other[1:]).all()


@pytest.mark.parametrize(
    ("name", "iqm", "low", "high"),
    [
        ("CNN-DQN", 1.677, 1.64, 1.71),
        ("Impala-DQN", 2.842, 2.72, 3.02),
        ("CNN-Rainbow", 1.938, 1.91, 1.97),
        ("Impala-Rainbow", 3.229, 3.16, 3.33),
    ],
)
def test_published_scores_of_fifteen_games(
    module: ModuleType, name: str, iqm: float, low: float, high: float
) -> None:
    args = args_of(module, score="human")
    runs = module.published(name, FIFTEEN_GAMES, 1e9)
    module.add_scores(runs, args)
    row = module.final_row({}, runs, args)
    assert (row["runs"], row["games"], row["million frames"]) == (75, 15, 40)
    assert row["iqm"] == pytest.approx(iqm, abs=5e-4)
    assert (row["iqm_low"], row["iqm_high"]) == pytest.approx((low, high), abs=0.02)


def test_anchors_have_every_game_and_epoch(module: ModuleType) -> None:
    for name in module.REFERENCES:
        runs = module.published(name, module.GAMES, 1e9)
        assert len(runs) == 60 * 5 and {len(run.steps) for run in runs} == {40}
    assert (
        len(module.HUMAN) == 55
        and len(module.GAMES) == 60
        and module.HUMAN["Breakout"] == (1.7, 30.5)
    )


def test_runs_become_rows(tmp_path: Path, plot: Plot) -> None:
    """MuJoCo: the last evaluation comes without sparsity; one run under way, one not begun."""
    records = [
        {"step": 50, "seconds": 1.0, "charts/episodic_return": 3.0},
        {
            "step": 100,
            "seconds": 2.4,
            "eval/episodic_return": 10.12345678,
            "sparsity/target": 0.1,
            "sparsity/prunable": 0.05,
            "charts/epoch_return": 77.0,
        },
        {
            "step": 200,
            "seconds": 5.0,
            "charts/epoch_return": 78.0,
            "sparsity/target": 0.2,
            "sparsity/prunable": 0.1,
        },
        {"step": 200, "seconds": 5.5, "eval/episodic_return": 30.0, "eval/episodes": 10},
    ]
    plan(tmp_path, "dense", "Hopper-v5", 1, records, script="sac_mujoco_gmp.py")
    under_way = plan(
        tmp_path, "dense", "Hopper-v5", 2, records[:2], finished=False, script="sac_mujoco_gmp.py"
    )
    with open(under_way / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "seconds": 5.0, "eval/episodic_return": 99.0, "spars')
    plan(tmp_path, "dense", "Hopper-v5", 3, script="sac_mujoco_gmp.py")
    (row,) = plot("curves", "grid")
    assert (tmp_path / "grid.csv").read_text().splitlines() == [
        "curve,env_id,seed,finished,step,seconds,return,sparsity_target,sparsity_prunable",
        "dense,Hopper-v5,1,1,100,2.4,10.1235,0.1,0.05",
        "dense,Hopper-v5,1,1,200,5.5,30,0.2,0.1",
        "dense,Hopper-v5,2,0,100,2.4,10.1235,0.1,0.05",
        "dense,Hopper-v5,3,0,,,,,",
    ]
    assert row == {
        "curve": "dense",
        "environment": "Hopper-v5",
        "runs": "1",
        "of_runs": "3",
        "mean": "30",
        "lowest": "30",
        "highest": "30",
        "sparsity_target": "0.2",
        "sparsity_prunable": "0.1",
        "thousand steps": "0.2",
    }
    cells = (tmp_path / "grid.md").read_text().splitlines()[2]
    assert cells == "| dense | Hopper-v5 | 1 of 3 | 30 | 30 | 30 | 0.200 | 0.100 | 0.200 |"


def test_final_scores_are_normalised_and_pooled(tmp_path: Path, plot: Plot) -> None:
    """Breakout: random 1.7, human 30.5; Pong: -20.7 and 14.6; seeds 2 and 1."""
    plan(tmp_path, "DQN", "ALE/Breakout-v5", 1, epochs(1.7, 30.5))  # 1
    plan(tmp_path, "DQN", "Breakout", 2, epochs(16.1, 46.1))  # 44.4 / 28.8 = 1.541667
    plan(tmp_path, "DQN", "PongNoFrameskip-v4", 1, epochs(14.6, -20.7))  # 0
    plan(tmp_path, "DQN", "Pooyan", 1, epochs(14.6, -20.7))  # has no human score
    (row,) = plot("curves", "grid")
    assert [row[key] for key in ("runs", "of_runs", "games", "of_games")] == ["3", "3", "2", "3"]
    assert float(row["iqm"]) == pytest.approx(2.541667 / 3, abs=1e-5)  # of three none falls away
    assert float(row["mean"]) == float(row["median"]) == pytest.approx(2.541667 / 4, abs=1e-5)
    assert float(row["gap"]) == pytest.approx(1 / 3, abs=1e-5)
    # Over the last two epochs: (0 + 1) / 2, (0.5 + 1.541667) / 2, (1 + 0) / 2.
    assert float(plot("curves", "grid", "--last", "2")[0]["iqm"]) == pytest.approx(
        2.020833 / 3, abs=1e-5
    )
    rows = plot("curves", "grid", "--per-env")
    assert [(row["environment"], row["mean"]) for row in rows] == [
        ("Breakout", "38.3"),
        ("Pong", "-20.7"),
        ("Pooyan", "-20.7"),
    ]
    plan(tmp_path, "other", "Pooyan", 1, epochs(1.0))
    row = plot("curves", "grid")[1]
    assert (row["curve"], row["runs"], row["games"], row["of_games"], row["iqm"]) == (
        "other",
        "0",
        "0",
        "1",
        "",
    )


def test_curves_are_the_scores_of_each_epoch(
    tmp_path: Path, plot: Plot, figures: list[Any]
) -> None:
    """Finished runs are drawn to their end, without the others; where none has finished, as far as
    all have come.
    """
    plan(
        tmp_path, "done", "Boxing", 1, epochs(0.1, 12.1, None, 24.1)
    )  # 0, 1, -, 2: human - random is 12
    plan(tmp_path, "done", "Boxing", 2, epochs(0.1, 0.1, 12.1, 12.1))  # 0, 0, 1, 1
    plan(tmp_path, "done", "Boxing", 3, epochs(84.1, 84.1), finished=False)
    plan(tmp_path, "begun", "Boxing", 1, epochs(12.1, 24.1, 36.1, sparsity=0.5), finished=False)
    plan(tmp_path, "begun", "Boxing", 2, epochs(12.1, 0.1), finished=False)
    plan(tmp_path, "begun", "Boxing", 3)
    rows = plot("curves", "grid", "--sparsity")
    scores, shares = figures[0].axes
    lines = {line.get_label(): line.get_xydata().round(6).tolist() for line in scores.get_lines()}
    assert lines == {
        "done (2 of 3 runs finished)": [[1, 0], [2, 0.5], [3, 1], [4, 1.5]],
        "begun (0 of 3 runs finished)": [[1, 1], [2, 1]],
    }
    # In the second epoch Boxing's first seed has 1 and the second 0: a replicate is 0, 0.5 or 1.
    (band, _) = scores.collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((1, 0, 3, 2))
    assert [line.get_ydata().tolist() for line in shares.get_lines()] == [
        [1, 1, 1, 1],
        [0.75, 0.75],
    ]  # weights left at sparsities of 0 and of 0.5 and 0
    assert [(row["curve"], row["runs"], row["iqm"]) for row in rows] == [
        ("done", "2", "1.5"),
        ("begun", "0", ""),
    ]
    caption = (tmp_path / "grid.md").read_text().splitlines()[-1]
    few = "95 % bootstrap intervals over seeds, which for so few seeds span lowest to highest"
    assert caption == f"IQM; games: 1; seeds per curve: 0 to 2; bands: {few}."


def test_bands_of_curves_redraw_within_games(
    tmp_path: Path, plot: Plot, figures: list[Any]
) -> None:
    """Games differ, their seeds do not: no band has any width."""
    for seed in (1, 2):
        plan(tmp_path, "DQN", "Boxing", seed, epochs(12.1, 12.1))
        plan(tmp_path, "DQN", "Breakout", seed, epochs(1.7, 59.3))  # 0 and 2
    plot("curves", "grid")
    (line,), (band,) = figures[0].axes[0].get_lines(), figures[0].axes[0].collections
    assert line.get_ydata() == pytest.approx(
        [0.5, 1.5]
    )  # (0 + 1) / 2 and (1 + 2) / 2: one of four falls at each end
    assert {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()} == {
        (1, 0.5),
        (2, 1.5),
    }


def test_a_profile_is_the_share_of_runs_above(
    tmp_path: Path, plot: Plot, figures: list[Any]
) -> None:
    for seed, value in enumerate((12.1, 24.1, 36.1, 48.1), 1):
        plan(tmp_path, "DQN", "Boxing", seed, epochs(value))  # 1, 2, 3, 4
    plan(tmp_path, "DQN", "Boxing", 5, epochs(99.0), finished=False)
    plan(tmp_path, "lost", "Boxing", 1, epochs(12.1))
    plan(tmp_path, "lost", "Boxing", 2, epochs(float("nan")))
    plot("profile", "grid")
    lost = figures[0].axes[0].get_lines()[1].get_data()[1]
    assert lost[1] == 0.5 and lost[-1] == 0, "a score that is NaN is above nothing"
    taus, shares = figures[0].axes[0].get_lines()[0].get_data()
    assert taus[0] == 0 and shares[taus < 0.99].tolist() == [1.0] * sum(taus < 0.99)
    assert set(shares[(taus > 1.01) & (taus < 1.99)]) == {0.75} and shares[-1] == 0.25
    heights = figures[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == 0 and heights.max() == 1


def test_the_five_games_without_a_human_score_are_named(
    tmp_path: Path, module: ModuleType, plot: Plot
) -> None:
    for i, game in enumerate(sorted(module.GAMES)):
        plan(tmp_path, "DQN", game, 1, epochs(float(i)))
    (row,) = plot("curves", "grid", "--reference", "CNN-DQN", "--reference", "Impala-DQN")[:1]
    assert (row["games"], row["of_games"], row["runs"]) == ("55", "60", "55")
    text = (tmp_path / "grid.md").read_text()
    assert (
        "55 of 60" in text and "AirRaid, Carnival, ElevatorAction, JourneyEscape, Pooyan." in text
    )
    # The published runs are of the same games, and only as long as ours: one million frames.
    published = read(tmp_path / "grid_table.csv")[1]
    assert published["curve"] == "Dopamine DQN CNN (published)" and published["runs"] == "275"
    assert published["million frames"] == "1"


def test_a_sweep_with_a_flat_curve(tmp_path: Path, plot: Plot) -> None:
    """Widths come from the manifest, or from args.json where it has none; Boxing: score = (return -
    0.1) / 12.
    """
    for seed in (1, 2):
        plan(tmp_path, "dense", "Boxing", seed, epochs(12.1))
        plan(tmp_path, "pruned", "Boxing", seed, epochs(24.1 + 12 * seed))  # width 1
        plan(tmp_path, "pruned", "Boxing", seed, epochs(48.1), width="3")
    plan(tmp_path, "pruned", "Boxing", 1, width="5")
    plan(tmp_path, "pruned", "Boxing", 3)  # not begun, and does not say its width
    rows = plot("sweep", "grid", "--x", "width", "--flat", "dense", "--reference", "Impala-DQN")
    keys = ("curve", "width", "runs", "of_runs", "iqm", "iqm_low", "iqm_high")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found[:4] == [
        ("dense", "", "2", "2", "1", "1", "1"),
        ("pruned", "1", "2", "2", "3.5", "3", "4"),
        ("pruned", "3", "2", "2", "4", "4", "4"),
        ("pruned", "5", "0", "1", "", "", ""),
    ]
    assert found[4][:3] == ("Dopamine DQN Impala (published)", "", "5") and len(found) == 5
    text = (tmp_path / "grid.md").read_text()
    assert "1 runs that do not say their width" in text and "at 1 million frames" in text
    assert (
        plot("sweep", str(tmp_path / "grid.csv"), "--x", "width", "--flat", "dense")[:4] == rows[:4]
    )
    curves = plot("curves", "grid", "--x", "width", "--out", str(tmp_path / "other"))
    assert [row["curve"] for row in curves] == [
        "dense, width 1",
        "pruned, width 1",
        "pruned, width 3",
        "pruned, width 5",
        "pruned",
    ]


def test_where_the_values_of_a_sweep_stand(module: ModuleType) -> None:
    def places(*values: str, x: str = "width") -> tuple[list[str], list[float]]:
        names, where = module.places_of([*values], x)
        return names, where.tolist()

    assert places("3", "10", "1") == (["1", "3", "10"], [1, 3, 10])
    assert places("1e-05", "0.001", "0.0001") == (
        ["1e-05", "0.0001", "0.001"],
        [-5, -4, -3],
    )  # a ratio of 100
    assert places("1", "8", "1.1") == (["1", "1.1", "8"], [0, 1, 2])  # labels would overlap
    names, where = places("0.99", "0", "0.5", "0.9", x="sparsity")
    assert names == ["0", "0.5", "0.9", "0.99"] and where == pytest.approx([0, 0.30103, 1, 2])
    assert places("0.99", "0.01", "0", x="sparsity")[1] == [0, 1, 2]  # labels would overlap
    assert places("uniform", "erk") == (["uniform", "erk"], [0, 1])


def test_d4rl_scores_of_datasets(tmp_path: Path, plot: Plot, figures: list[Any]) -> None:
    """Offline runs log no target sparsity."""
    for seed in (1, 2):
        score = {"eval/episodic_return": 1000.0 * seed}
        records = [
            {"step": 0, "seconds": 0.0, "sparsity/prunable": 0.9},
            {"step": 1000, "seconds": 1.0} | score,
        ]
        plan(
            tmp_path,
            "SNIP",
            "",
            seed,
            records,
            script="cql_offline_snip.py",
            dataset="/data/hopper_medium-v2.hdf5",
        )
    (row,) = plot("curves", "grid", "--score", "d4rl")
    assert (row["environment"], row["lowest"], row["highest"], row["mean"]) == (
        "hopper_medium-v2",
        "31.3489",  # 100 (1000 + 20.272305) / (3234.3 + 20.272305)
        "62.0749",
        "46.7119",
    )
    assert plot("curves", "grid", "--sparsity")[0]["mean"] == "1500"
    left = figures[1].axes[1].get_lines()[0].get_xydata().tolist()
    assert left == [[1, pytest.approx(0.1)]]


def test_offline_atari_is_scored_by_evaluations(tmp_path: Path, plot: Plot) -> None:
    """One dataset has many games; a game's score is human-normalised, as online."""
    for game, score in (("Pong", 14.6), ("Breakout", 1.7)):
        records = [{"step": 1000, "seconds": 1.0, "eval/episodic_return": score}]
        plan(tmp_path, "CQL", game, 1, records, script="cql_atari_gmp.py", dataset="data")
    rows = plot("sweep", "grid", "--x", "dataset")
    assert [float(row["mean"]) for row in rows] == [pytest.approx(0.5)]
    (row,) = plot("curves", "grid")
    assert float(row["thousand gradient steps"]) == 1, "not frames"


def test_metrics_and_layers_over_the_steps(tmp_path: Path, plot: Plot, figures: list[Any]) -> None:
    """Analyses come in records of their own; a layer's sparsity is that of the network then."""
    for seed in (1, 2):
        analysis = {
            "step": 250_000,
            "seconds": 12.0,
            "analysis/srank": 10.0 * seed,
            "analysis/q_norm": 5.0,
        }
        records = [*epochs(1.0, sparsity=0.4), analysis, *epochs(1.0, 2.0, sparsity=0.8)[2:]]
        records += [analysis | {"step": 500_000, "analysis/srank": 7.0 + seed}]
        plan(tmp_path, "DQN", "Boxing", seed, records)
    rows = plot("metrics", "grid")
    assert [(row["key"], row["mean"], row["lowest"], row["highest"]) for row in rows] == [
        ("analysis/srank", "8.5", "8", "9"),
        ("analysis/q_norm", "5", "5", "5"),
    ]
    axis = figures[0].axes[0]
    assert axis.get_lines()[0].get_xydata().tolist() == [[1, 15], [2, 8.5]]
    assert axis.collections[0].get_paths()[0].get_extents().extents == pytest.approx((1, 8, 2, 20))
    assert (
        plot("metrics", "grid", "--keys", "analysis/srank", "--last", "2")[0]["mean"] == "11.75"
    )  # 10 20 8 9
    csv_rows = read(tmp_path / "grid.csv")
    assert [row["analysis/srank"] for row in csv_rows] == ["10", "8", "20", "9"]
    assert [row["return"] for row in csv_rows] == ["1", "2", "1", "2"]
    rows = plot("layers", "grid")
    assert [(row["layer"], row["mean"]) for row in rows] == [("conv1", "0.4"), ("dense", "0.8")]
    assert [row["sparsity/layer/dense"] for row in read(tmp_path / "grid.csv")] == [
        "0.4",
        "0.8",
        "0.4",
        "0.8",
    ]


def test_gradient_covariance(tmp_path: Path, plot: Plot, figures: list[Any]) -> None:
    """The latest matrix of each seed counts; drawn is that of the lowest seed that has one."""
    matrix = np.array([[1.0, 0.5, -0.25], [0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]], np.float32)
    plan(tmp_path, "DQN", "Pong", 1, epochs(1.0))
    for seed in (3, 2):
        run = plan(tmp_path, "DQN", "Pong", seed, epochs(1.0), finished=False)
        np.save(run / "gradient_covariance-000250000.npy", np.ones((3, 3), np.float32))
        np.save(
            run / "gradient_covariance-000500000.npy",
            matrix if seed == 2 else -matrix * [[1, 1, 0]],
        )
    total, row = plot("covariance", "grid")
    assert total["environment"] == "all" and row["environment"] == "Pong"
    # Off the diagonal: 0.5, 0.25, 0 twice each: a mean of 0.25. Of seed 3 the upper triangle has
    # -0.5, 0 and 0.
    assert (row["runs"], row["of_runs"]) == ("2", "3") and float(row["highest"]) == 0.25
    assert float(row["lowest"]) == pytest.approx(1 / 6, abs=1e-6)
    (image,) = figures[0].axes[0].get_images()
    assert image.get_array().tolist() == matrix.tolist() and image.get_clim() == (-1, 1)
    rows = read(tmp_path / "grid.csv")
    assert len(rows) == 1 + 2 * 6 and rows[0]["step"] == "" and rows[1]["step"] == "500000"


KINDS = [
    ("curves", "--sparsity", "--reference", "CNN-DQN", "CNN-Rainbow"),
    ("curves", "--per-env", "--title", "a | b"),
    ("sweep", "--x", "width", "--flat", "DQN"),
    ("profile",),
    ("metrics",),
    ("layers",),
    ("covariance",),
]


@pytest.mark.parametrize("words", KINDS, ids=lambda words: "".join(words[:2]))
def test_the_csv_file_gives_the_same_table_and_pictures(
    tmp_path: Path, plot: Plot, words: tuple[str, ...]
) -> None:
    analysis = {"step": 250_000, "seconds": 12.0, "analysis/srank": 3.3333333333}
    pairs = [
        (curve, game)
        for curve in ("DQN", "a very long name | of a curve")
        for game in ("Pong", "Alien")
    ]
    for i, (curve, game) in enumerate(pairs):
        for seed in (1, 2):
            records = [*epochs(1 / 3 + i, 20 / 3 * seed, sparsity=0.4), analysis]
            run = plan(tmp_path, curve, game, seed, records, finished=seed + i < 5)
            np.save(run / "gradient_covariance-000250000.npy", np.eye(4) + seed / 7)
    plan(tmp_path, "DQN", "Alien", 3)
    table = plot(words[0], "grid", *words[1:], pictures=True)
    assert table and (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "grid.svg").read_bytes()[:500]
    source = (tmp_path / "grid.csv").read_bytes()
    plot(
        words[0],
        str(tmp_path / "grid.csv"),
        *words[1:],
        "--out",
        str(tmp_path / "new" / "again"),
        pictures=True,
    )
    assert (
        not (tmp_path / "new" / "again.csv").exists()
        and (tmp_path / "grid.csv").read_bytes() == source
    )
    for ending in (".png", ".svg", ".pdf", ".md", "_table.csv"):
        assert (tmp_path / f"grid{ending}").read_bytes() == (
            tmp_path / "new" / f"again{ending}"
        ).read_bytes(), ending


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("pie", "grid"), ("KIND", "curves, sweep, profile")),
        (("curves", "nowhere"), ("nowhere.jsonl", "grid")),
        (("curves", "empty"), ("empty.jsonl", "no runs")),
        (("curves", "broken"), ("broken.jsonl", "line 1", "curve, script, flags and folder")),
        (("curves", "seedless"), ("seedless.jsonl", "line 1", "seed")),
        (("curves", "twice"), ("twice.jsonl", "line 2", "--x")),
        (("curves", "mixed"), ("mixed.jsonl", "Atari")),
        (("curves", "planned"), ("planned.jsonl", "yet")),
        (("metrics", "grid"), ("grid.jsonl", "--keys analysis/ yet")),
        (("curves", "unbegun.csv"), ("unbegun.csv", "step")),
        (
            ("metrics", "grid", "--keys", "analysis/srank", "charts/epoch_return"),
            ("--keys analysis/srank", "epoch_return"),
        ),
        (("curves", "no.csv"), ("no.csv", "No such file")),
        (("curves", "other.csv"), ("other.csv", "no column env_id, seed")),
        (("curves", "text.csv"), ("text.csv", "much")),
        (("layers", "good.csv"), ("good.csv", "layer")),
        (("curves", "swept.csv"), ("swept.csv", "--x")),
        (("sweep", "good.csv", "--x", "width"), ("good.csv", "no column width")),
        (("sweep", "grid"), ("--x", "width")),
        (("sweep", "grid", "--x", "seed"), ("--x", "seed")),
        (("sweep", "grid", "--x", "widht"), ("--x widht", "no run")),
        (("sweep", "grid", "--x", "width", "--flat", "nobody"), ("--flat nobody", "DQN")),
        (
            ("curves", "grid", "--reference", "CNN-IQN"),
            ("--reference", "Impala-Rainbow", "CNN-IQN"),
        ),
        (("curves", "hopper", "--reference", "CNN-DQN"), ("--reference", "Atari")),
        (("curves", "hopper", "--score", "human"), ("--score human", "Atari")),
        (("curves", "grid", "--score", "d4rl"), ("--score d4rl", "no environment of grid")),
        (("curves",), ("GRID is missing",)),
        (("metrics", "grid", "--panel", "width"), ("--panel is for curves, sweep, profile",)),
        (("curves", "grid", "--against", "DQN"), ("--against DQN", "no other curve")),
        (("curves", "cut.csv"), ("cut.csv: line 3 has not 8 cells",)),
        (("curves", "foreign", "--reference", "CNN-DQN"), ("--reference", "60 Atari games")),
        (("curves", "offline", "--reference", "CNN-DQN"), ("--reference", "updates")),
        (
            ("sweep", "grid", "--x", "width", "--panel", "sparsity", "--baseline", "DQN", "1"),
            ("--baseline DQN 1", "both"),
        ),
        (("curves", "grid", "--score", "elo"), ("--score", "d4rl", "elo")),
        (("curves", "grid", "--last", "0"), ("--last", "at least 1")),
        (("curves", "grid", "--flat", "DQN"), ("--flat", "sweep")),
        (("covariance", "grid"), ("gradient_covariance-000000001.npy", "matrix")),
        (("profile", "grid", "--out", "grid.csv/x"), ("grid.csv",)),
    ],
)
def test_what_cannot_be_drawn_is_named(
    tmp_path: Path,
    plot: Plot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    texts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    header = "curve,env_id,seed,finished,step,return,sparsity_target,sparsity_prunable\n"
    files = {
        "empty.jsonl": "",
        "broken.jsonl": '{"curve": "a", "flags": {}}\n',
        "other.csv": "curve,b\n1,2\n",
        "seedless.jsonl": '{"curve": "a", "script": "s", "flags": {"env-id": "Pong"}, '
        '"folder": "f"}\n',
        "text.csv": header + "a,Pong,1,1,250000,much,0,0\n",
        "good.csv": header + "a,Pong,1,1,250000,1,0,0\n",
        "unbegun.csv": header + "a,Pong,1,0,,,,\n",
        "swept.csv": header + "a,Pong,1,1,250000,1,0,0\n" * 2,
        "grid.csv": "",
        "cut.csv": header + "a,Pong,1,1,250000,1,0,0\na,Pong,2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run = plan(tmp_path, "DQN", "Pong", 1, epochs(1.0))
    (run / "gradient_covariance-000000001.npy").write_text("no matrix")
    for seed, grid in ((1, "twice"), (1, "twice"), (1, "mixed"), (1, "planned")):
        plan(tmp_path, "DQN", "Pong", seed, grid=grid)
    hopper = [{"step": 1, "seconds": 1.0, "eval/episodic_return": 1.0, "sparsity/target": 0.0}]
    plan(tmp_path, "SAC", "Hopper-v5", 1, hopper, grid="hopper", script="sac_mujoco_gmp.py")
    plan(tmp_path, "SAC", "Hopper-v5", 1, grid="mixed", script="sac_mujoco_gmp.py")
    plan(tmp_path, "DQN", "Adventure", 1, epochs(1.0), grid="foreign")
    offline = {"script": "cql_atari_gmp.py", "grid": "offline", "dataset": "data"}
    plan(tmp_path, "CQL", "Pong", 1, hopper, **offline)
    with pytest.raises(SystemExit) as stop:
        plot(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert all(text in error for text in texts), error


def test_seeds_and_values_however_they_are_written(tmp_path: Path, plot: Plot) -> None:
    """A seed of seven digits; a float as a program that reads CSV files may write it."""
    for i, (seed, width) in enumerate(((1, "1"), (4_000_000_000, "1"), (1, "3"))):
        plan(
            tmp_path,
            "DQN",
            "MinAtar/Breakout",
            seed,
            epochs(2.0 + i),
            width=width,
            script="dqn_minatar_gmp.py",
        )
    words = ("--x", "width", "--baseline", "DQN", "1.0")
    rows = plot("curves", "grid", *words)
    text = (tmp_path / "grid.csv").read_text()
    assert "4000000000" in text
    again = text.replace(",1,1,1,", ",1.0,1.0,1.0,").replace(",4000000000,", ",4000000000.0,")
    (tmp_path / "again.csv").write_text(again)
    assert again != text and plot("curves", str(tmp_path / "again.csv"), *words) == rows
    assert [row["curve"] for row in rows] == ["DQN, width 1", "DQN, width 3"]


def test_a_baseline_has_the_value_of_both_flags(tmp_path: Path, plot: Plot) -> None:
    """Which may be the same number."""
    for score, width, ratio in ((3.0, "1", "1"), (5.0, "1", "2"), (9.0, "2", "1")):
        flags = {"width": width, "replay_ratio": ratio, "script": "dqn_minatar_gmp.py"}
        plan(tmp_path, "DQN", "MinAtar/Breakout", 1, epochs(score), **flags)
    words = ("--x", "width", "--panel", "replay-ratio", "--baseline", "DQN", "1", "2")
    for row in plot("sweep", "grid", *words):
        assert row["width"] != "1" or (row["iqm"] == "1") == (row["replay_ratio"] == "2")


def test_datasets_of_one_name_in_two_folders_are_two(tmp_path: Path, plot: Plot) -> None:
    """Of their paths as much as tells them apart."""
    for i, robot in enumerate(("hopper", "halfcheetah")):
        records = [{"step": 1000, "seconds": 1.0, "eval/episodic_return": float(i)}]
        dataset = f"/data/{robot}/medium-v0"
        plan(tmp_path, "CQL", "", 1, records, script="cql_offline_snip.py", dataset=dataset)
    rows = plot("curves", "grid")
    assert [(row["environment"], row["mean"]) for row in rows] == [
        ("halfcheetah/medium-v0", "1"),
        ("hopper/medium-v0", "0"),
    ]


def test_an_offline_run_that_waits_is_of_the_game_in_its_path(tmp_path: Path, plot: Plot) -> None:
    records = [{"step": 1000, "seconds": 1.0, "eval/episodic_return": 3.0}]
    flags = {"script": "cql_atari_gmp.py", "dataset": "data/Breakout"}
    begun = plan(tmp_path, "CQL", "", 1, records, **flags)
    args = json.loads((begun / "args.json").read_text())
    (begun / "args.json").write_text(json.dumps(args | {"env_id": "Breakout"}))
    plan(tmp_path, "CQL", "", 2, **flags)
    (row,) = plot("curves", "grid")
    assert (row["runs"], row["of_runs"], row["games"], row["of_games"]) == ("1", "2", "1", "1")


def test_the_last_point_of_a_line_is_the_tables(
    tmp_path: Path, plot: Plot, figures: list[Any]
) -> None:
    """Games without a human score are in neither."""
    for game in ("Pong", "Breakout", "AirRaid"):
        plan(tmp_path, "DQN", game, 1, epochs(1.0, 5.0))
    (row,) = plot("curves", "grid")
    line = figures[0].axes[0].get_lines()[0].get_ydata()
    assert line[-1] == pytest.approx(float(row["iqm"]), rel=1e-5) and row["of_games"] == "3"


def test_runs_that_have_no_step_in_common_draw_no_line(tmp_path: Path, plot: Plot) -> None:
    """One whose first episode ended late, and one that has just begun."""
    plan(tmp_path, "DQN", "Pong", 1, epochs(None, None, 1.0), finished=False)
    plan(tmp_path, "DQN", "Pong", 2, epochs(1.0), finished=False)
    (row,) = plot("curves", "grid", "--sparsity")
    assert row["runs"] == "0"


def test_games_without_published_runs_are_left_out(
    tmp_path: Path, plot: Plot, capsys: pytest.CaptureFixture[str]
) -> None:
    for game in ("Pong", "Adventure"):
        plan(tmp_path, "DQN", game, 1, epochs(1.0))
    rows = plot("epochs", "grid", "--reference", "CNN-DQN")
    assert {row["environment"] for row in rows} == {"Pong"}
    assert "Without published runs: Adventure." in capsys.readouterr().out


def test_a_damaged_line_is_named_unless_it_is_the_last(
    tmp_path: Path, plot: Plot, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan(tmp_path, "DQN", "Pong", 1, epochs(1.0, 2.0))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    with pytest.raises(SystemExit):
        plot("curves", "grid")
    assert "metrics.jsonl: line 2" in capsys.readouterr().err


def test_the_command_line_and_its_environment(tmp_path: Path) -> None:
    """RUNS and SMOKE say where the grid is; DRY only shows the command."""
    for folder in ("runs", "runs/smoke", "mine/smoke"):
        (tmp_path / folder).mkdir(parents=True)
        plan(tmp_path / folder, folder.replace("/", "-"), "Pong", 1, epochs(1.0))
    plain = {key: value for key, value in os.environ.items() if key not in ("RUNS", "SMOKE", "DRY")}
    for more, folder in (
        ({}, "runs"),
        ({"SMOKE": "1"}, "runs/smoke"),
        ({"SMOKE": "1", "RUNS": "mine"}, "mine/smoke"),
    ):
        name = folder.replace("/", "-")
        result = subprocess.run(
            [sys.executable, PLOT, "curves", "grid"],
            env=plain | more,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        assert (
            result.stdout == (tmp_path / folder / "grid.md").read_text()
            and f"| {name} | 1 of 1" in result.stdout
        )
        assert (tmp_path / folder / "grid.png").exists()
    words = ["sweep", "nowhere", "--x", "width", "--flat", "DQN dense"]
    result = subprocess.run(
        [sys.executable, PLOT, *words], env=plain | {"DRY": "1"}, capture_output=True, text=True
    )
    assert (
        result.returncode == 0
        and result.stdout == f"python {PLOT} sweep nowhere --x width --flat 'DQN dense'\n"
    )
    trace = [sys.executable, "-X", "importtime", PLOT, *words]
    result = subprocess.run(trace, env=plain | {"DRY": "1"}, capture_output=True, text=True)
    assert "numpy" in result.stderr and "matplotlib" not in result.stderr, "it takes a second"


def hopper(*returns: float) -> list[Record]:
    """Return the records of evaluations every 100 steps."""
    keys = {"sparsity/target": 0.0, "sparsity/prunable": 0.5}
    return [
        {"step": 100 * i, "seconds": 1.0 * i, "eval/episodic_return": value} | keys
        for i, value in enumerate(returns, 1)
    ]


def test_runs_made_by_hand_are_named_by_what_differs(
    tmp_path: Path, plot: Plot, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No manifest: the folders alone. Seeds are the runs of a curve; folders and devices say
    nothing.
    """
    folders = []
    for i, (sparsity, seed) in enumerate([(0.0, 1), (0.0, 2), (0.9, 1)]):
        folder = plan(tmp_path, "x", "Hopper-v5", seed, hopper(1.0, 10.0 * i), script="sac.py")
        flags = json.loads((folder / "args.json").read_text())
        flags |= {"sparsity": sparsity, "run_dir": f"x{i}", "device": f"cuda:{i}"}
        (folder / "args.json").write_text(json.dumps(flags))
        folders.append(str(folder))
    module.main(tyro.cli(module.Args, args=["curves", *folders]))
    rows = read(tmp_path / "comparison_table.csv")
    found = [(row["curve"], row["runs"], row["mean"]) for row in rows]
    assert found == [("sparsity 0", "2", "5"), ("sparsity 0.9", "1", "20")]
    module.main(tyro.cli(module.Args, args=["curves", *folders[:2]]))
    assert [row["curve"] for row in read(tmp_path / "comparison_table.csv")] == ["sac"]
    # What one script alone has is no difference between two.
    other = plan(tmp_path, "x", "Hopper-v5", 1, hopper(1.0, 5.0), script="other.py")
    flags = json.loads((other / "args.json").read_text()) | {"num_networks": 5}
    (other / "args.json").write_text(json.dumps(flags))
    module.main(tyro.cli(module.Args, args=["curves", *folders, str(other)]))
    found = [row["curve"] for row in read(tmp_path / "comparison_table.csv")]
    assert found == ["sac, sparsity 0", "sac, sparsity 0.9", "other, sparsity 0"]
    # A folder that is called like a grid does not hide it.
    plan(tmp_path, "x", "Hopper-v5", 1, hopper(1.0, 5.0), script="sac.py", grid="own")
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    assert [row["mean"] for row in plot("curves", "own")] == ["5"]


def test_a_baseline_puts_games_without_a_human_score_on_one_scale(
    tmp_path: Path,
    plot: Plot,
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """(return - random) / (mean of the baseline - random), here of two MinAtar games."""
    monkeypatch.setitem(module.RANDOM, "MinAtar/Breakout", 1.0)
    monkeypatch.setitem(module.RANDOM, "MinAtar/Freeway", 0.0)
    script = "dqn_minatar_gmp.py"
    for seed in (1, 2):
        for game, low in (("Breakout", 10.0), ("space_invaders", 1.0), ("freeway", 40.0)):
            if game != "space_invaders":
                plan(tmp_path, "dense", game, seed, epochs(low * seed), script=script, width="1")
                plan(tmp_path, "dense", game, seed, epochs(5.0), script=script, width="4")
                plan(tmp_path, "95 %", game, seed, epochs(low * 2), script=script, width="1")
    flags = ("sweep", "grid", "--x", "width", "--baseline", "dense", "1")
    rows = {(row["curve"], row["width"]): row for row in plot(*flags)}
    # Breakout: 10, 20, mean 15, random 1; Freeway: 40, 80, mean 60, random 0.
    assert float(rows["dense", "1"]["mean"]) == pytest.approx(1)
    assert float(rows["dense", "4"]["mean"]) == pytest.approx((4 / 14 + 5 / 60) / 2, abs=1e-6)
    assert float(rows["95 %", "1"]["mean"]) == pytest.approx((19 / 14 + 80 / 60) / 2, abs=1e-5)
    text = (tmp_path / "grid.md").read_text()
    assert "Random play is 0, the mean of dense 1 is 1" in text and "thousand" in text
    assert not capsys.readouterr().err
    monkeypatch.setitem(module.RANDOM, "MinAtar/Freeway", 70.0)
    plot(*flags)
    assert "--baseline dense 1: on MinAtar/Freeway it is no better" in capsys.readouterr().err


def test_epochs_beside_the_published_prediction_interval(
    tmp_path: Path, plot: Plot, module: ModuleType
) -> None:
    """Breakout, CNN-DQN, the first million frames: by hand from the anchors."""
    (first,) = (
        [float(value) for value in line[4:]]
        for line in csv.reader(open(module.ANCHORS / "dopamine_atari_40M.csv"))
        if line[:4] == ["Breakout", "CNN", "DQN", "1"]
    )
    mean = sum(first) / 5
    sd = (sum((value - mean) ** 2 for value in first) / 4) ** 0.5
    half = 2.776 * sd * 1.2**0.5
    plan(tmp_path, "DQN", "Breakout", 1, epochs(mean + 0.99 * half, 1000.0))
    rows = plot("epochs", "grid", "--reference", "CNN-DQN", "CNN-Rainbow")
    assert [row["inside"] for row in rows] == ["yes", "no"]
    assert float(rows[0]["published_high"]) == pytest.approx(mean + half, rel=1e-5)
    assert float(rows[0]["published_low"]) == pytest.approx(mean - half, rel=1e-5)
    assert "1 of 2 epochs lie inside" in (tmp_path / "grid.md").read_text()


def test_panels_of_a_flag_and_of_each_curve_against_one(
    tmp_path: Path, plot: Plot, figures: list[Any]
) -> None:
    for curve in ("dense", "a", "b"):
        for width in ("3", "10"):
            plan(tmp_path, curve, "Pong", 1, epochs(1.0), width=width)
    rows = plot("curves", "grid", "--panel", "width", "--against", "dense")
    assert [axis.get_title() for axis in figures[0].axes] == ["width 3"] * 2 + ["width 10"] * 2
    labels = [[line.get_label() for line in axis.get_lines()] for axis in figures[0].axes]
    assert labels == [["dense", "a"], ["dense", "b"]] * 2
    found = [(row["curve"], row["width"]) for row in rows]
    assert found == [(c, w) for w in ("3", "10") for c in ("dense", "a", "b")]


def test_what_spreadsheets_make_of_a_file_and_what_is_not_finite(
    tmp_path: Path, plot: Plot
) -> None:
    """A byte-order mark, 1.0 or True for 1; a return that is not a number is shown as such."""
    plan(tmp_path, "a", "Hopper-v5", 1, hopper(5.0, float("nan")), script="sac.py")
    plan(tmp_path, "b", "Hopper-v5", 1, hopper(5.0, float("inf")), script="sac.py")
    plan(tmp_path, "c", "Hopper-v5", 1, hopper(5.0, 7.0), script="sac.py")
    table = plot("curves", "grid")
    assert [(row["runs"], row["mean"]) for row in table] == [("1", "nan"), ("1", "inf"), ("1", "7")]
    cells = [
        line.split(" | ")[2:4] for line in (tmp_path / "grid.md").read_text().splitlines()[2:5]
    ]
    assert cells == [["1 of 1", "nan"], ["1 of 1", "inf"], ["1 of 1", "7"]]
    text = (tmp_path / "grid.csv").read_text()
    for finished in ("1.0", "True", "TRUE"):
        changed = text.replace(",1,1,100", f",1.0,{finished},100").replace(
            ",1,1,200", f",1.0,{finished},200"
        )
        (tmp_path / "sheet.csv").write_text("\ufeff" + changed)
        assert plot("curves", str(tmp_path / "sheet.csv")) == table


def test_labels_reach_the_picture_as_they_are(tmp_path: Path, plot: Plot) -> None:
    plan(tmp_path, "_hidden $x$ 5 %", "Hopper-v5", 1, hopper(5.0), script="sac.py")
    plot("curves", "grid", "--title", "$y", pictures=True)
    text = (tmp_path / "grid.svg").read_text()
    assert "_hidden $x$ 5 %" in text and "$y" in text
