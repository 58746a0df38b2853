"""The model card of evaluate.py --card is what the Hugging Face hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script
from safetensors.torch import save_file


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run on MinAtar, as far as evaluate.py looks at it."""
    script = load_script("dqn_minatar_gmp")
    network = script.QNetwork(4, 3, script.Args(feature_size=8))
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    flags = {"script": "dqn_minatar_gmp.py", "env_id": "breakout", "seed": 7, "resume": ""}
    save_file(weights, tmp_path / "model.safetensors", {"flags": json.dumps(flags)})
    (tmp_path / "final.json").write_text(json.dumps({"step": 12345}))
    return tmp_path


def test_hub_reads_the_card(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")
    evaluate = load_script("evaluate")
    evaluate.main(evaluate.Args(run_dir, episodes=3, steps=200, card=True))
    card = hub.ModelCard.load(run_dir / "README.md")
    assert card.data.library_name == "cleanrl-sparse"
    assert {"reinforcement-learning", "MinAtar/Breakout"} <= {*card.data.tags}
    (result,) = card.data.eval_results
    assert card.data.model_name == "dqn_minatar_gmp"
    assert (result.task_type, result.metric_type) == ("reinforcement-learning", "mean_reward")
    assert result.dataset_type == "MinAtar/Breakout"
    printed = capsys.readouterr().out
    mean, _, spread = result.metric_value.partition(" +/- ")
    assert f"return {mean}, 95 % interval" in printed
    assert float(spread) >= 0
    score, table = printed.split("model card: ")[0].strip(), card.content
    assert score in table
    assert "12,345 steps" in table
    assert "| `seed` | 7 |" in table
    assert "`resume`" not in table, "what a flag's default leaves empty"


def test_a_card_needs_the_runs_own_folder(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "final.json").unlink()
    evaluate = load_script("evaluate")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(evaluate.Args(run_dir, card=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"evaluate.py: --card: {run_dir}/final.json is missing or damaged;")


def rewrite(run_dir: Path, **changes: Any) -> None:
    """Change the flags in a run's model.safetensors; None leaves one out."""
    flags, weights = load_script("evaluate").load_model(run_dir)
    kept = {key: value for key, value in (flags | changes).items() if value is not None}
    save_file(weights, run_dir / "model.safetensors", {"flags": json.dumps(kept)})


def test_a_fork_may_have_any_name(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """What a network is shows in its tensors. A score of cut-off episodes says so."""
    rewrite(run_dir, script="mine.py")
    evaluate = load_script("evaluate")
    evaluate.main(evaluate.Args(run_dir, episodes=2, steps=2))
    printed = capsys.readouterr().out
    assert printed.startswith("MinAtar/Breakout: 2 episodes")
    assert "; 2 cut off after 2 steps\n" in printed


def test_what_cannot_be_played_is_named(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """A model whose outputs are another game's actions, and one without an environment."""
    evaluate = load_script("evaluate")
    flags, weights = evaluate.load_model(run_dir)
    weights |= {"output.bias": torch.zeros(5), "output.weight": torch.zeros(5, 8)}
    save_file(weights, run_dir / "model.safetensors", {"flags": json.dumps(flags)})
    for told in ("5 outputs, not 3 or 51 * 3", "no finished run is there"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(evaluate.Args(run_dir, episodes=1))
        assert told in capsys.readouterr().err
        rewrite(run_dir, env_id=None)


def test_a_film_needs_a_file(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "film.mp4").mkdir()
    with pytest.raises(SystemExit, match="2"):
        load_script("evaluate").Args(run_dir, video=run_dir / "film.mp4")
    assert "film.mp4: must be an .mp4 file" in capsys.readouterr().err


def test_an_exported_agent_has_no_card(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "agent.bin").touch()
    evaluate = load_script("evaluate")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(evaluate.Args(run_dir, card=True))
    line = "evaluate.py: --card: not for an exported agent; give its run\n"
    assert capsys.readouterr().err == line
