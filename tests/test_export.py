"""Exported agents do what torch does, in C and in NumPy; the odd cases; damage is noticed."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, load_script, script_fixture
from safetensors.torch import save_file

export = script_fixture("export")
evaluate = script_fixture("evaluate")

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
STRICT = ["-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic", "-Werror"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pruned(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> torch.Tensor:
    weight = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
    weight[np.abs(weight) < np.quantile(np.abs(weight), 1 - density)] = 0
    return torch.from_numpy(weight).float()


def write_run(
    folder: Path, shapes: dict[str, tuple[int, ...]], density: float, **flags: Any
) -> Any:
    """Write a run's model with random weights; return them."""
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": pruned(shape, density, rng) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        weights[f"{name}.bias"] = torch.from_numpy(rng.normal(0, 0.05, shape[0])).float()
    return save(folder, weights, **flags)


def save(folder: Path, weights: dict[str, torch.Tensor], **flags: Any) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    flags = {"script": "dqn_atari_gmp.py", "env_id": "Breakout"} | flags
    save_file(weights, folder / "model.safetensors", {"flags": json.dumps(flags)})
    return weights


def cnn(channels: int = 8, units: int = 64, actions: int = 4) -> dict[str, tuple[int, ...]]:
    c = channels
    shapes: dict[str, tuple[int, ...]] = {"conv1": (c, 4, 8, 8), "conv2": (2 * c, c, 4, 4)}
    shapes["conv3"] = (2 * c, 2 * c, 3, 3)
    return shapes | {"dense": (units, 242 * c), "output": (actions, units)}


def impala(c: int = 4, units: int = 32, actions: int = 5) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(((4, c), (c, 2 * c), (2 * c, 2 * c)), 1):
        shapes[f"stack{i}.entry"] = (b, a, 3, 3)
        shapes |= {f"stack{i}.blocks.{j}": (b, b, 3, 3) for j in range(4)}
    return shapes | {"dense": (units, 121 * 2 * c), "output": (actions, units)}


def actor(units: int = 40, actions: int = 3, obs: int = 11) -> dict[str, tuple[int, ...]]:
    shapes = {"dense1": (units, obs), "dense2": (units, units), "output": (2 * actions, units)}
    return {f"actor.{name}": shape for name, shape in shapes.items()}


def minatar(c: int = 4) -> dict[str, tuple[int, ...]]:
    return {"conv": (16, c, 3, 3), "dense": (32, 1024), "output": (3, 32)}


MINATAR = {"script": "dqn_minatar_gmp.py"}
NETWORKS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "cnn": (cnn(), {}),
    "odd channels": (cnn(7, 61, 18), {}),
    "one action": (cnn(4, 16, 1), {}),
    "normalised": (cnn(), {"regulariser": "l2-features"}),
    "impala": (impala(), {}),
    "rainbow": (cnn(4, 32, 3 * 51), {"script": "rainbow_resnet_gmp.py"}),
    "dueling": (
        cnn(4, 32, 3 * 51) | {"value": (51, 32)},
        {"script": "cql_atari_gmp.py", "c51": True},
    ),
    "actor": (actor(), {"env_id": "Hopper", "script": "sac_mujoco_gmp.py"}),
    "one dimension": (actor(24, 1, 3), {"env_id": "Pendulum-v1"}),
    "minatar": (minatar(), MINATAR),
}


def observations(weights: dict[str, torch.Tensor], count: int) -> np.ndarray:
    """Return frames with edges and flat areas, or numbers."""
    rng = np.random.default_rng(1)
    first = next(iter(weights.values()))
    if first.ndim == 2:
        return rng.normal(size=(count, first.shape[1])).astype(np.float32)
    if first.shape[2:] == (3, 3) and "conv.weight" in weights:
        return rng.integers(0, 2, (count, first.shape[1], 10, 10)).astype(np.uint8)
    coarse = rng.integers(0, 256, (count, 4, 12, 12)) * (rng.random((count, 4, 12, 12)) < 0.5)
    return coarse.repeat(7, 2).repeat(7, 3).astype(np.uint8)


def reference(evaluate: ModuleType, folder: Path, obs: np.ndarray) -> np.ndarray:
    """Return evaluate.py's outputs."""
    flags, weights = evaluate.load_model(folder)
    x = torch.from_numpy(obs)
    with torch.no_grad():
        if obs.ndim == 2:
            return evaluate.mean_actions(weights, x).numpy()
        return evaluate.q_values(
            weights, flags, x / (1 if "conv.weight" in weights else 255)
        ).numpy()


def outputs(export: ModuleType, out: Path, obs: np.ndarray, use_c: bool = True) -> np.ndarray:
    agent = export.load_agent(out, use_c)
    assert bool(agent._library) == use_c
    return np.stack([agent.q_values(x) for x in obs])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("kind", "density", "most"),
    [("fp32", 0.05, 1e-5), ("fp32", 0.7, 1e-5), ("fp16", 0.1, 3e-3), ("int8", 0.1, 0.1)],
)
def test_agrees_with_torch(
    name: str,
    kind: str,
    density: float,
    most: float,
    export: ModuleType,
    evaluate: ModuleType,
    tmp_path: Path,
) -> None:
    """C and NumPy; the large networks in C only where the sanitizers' test has them too."""
    shapes, flags = NETWORKS[name]
    weights = write_run(tmp_path / "run", shapes, density, **flags)
    obs = observations(weights, 20)
    expected = reference(evaluate, tmp_path / "run", obs)
    most *= max(1, np.ptp(expected))
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", kind)
    slow = outputs(export, tmp_path / "out", obs[:4], use_c=False)
    assert np.abs(slow - expected[:4]).max() <= most
    if kind == "fp32" or name in ("cnn", "actor", "minatar"):
        found = outputs(export, tmp_path / "out", obs)
        assert np.abs(found - expected).max() <= most
        assert np.abs(found[:4] - slow).max() <= 1e-5


def test_wide_gaps_empty_rows_and_a_zero_layer(
    export: ModuleType, evaluate: ModuleType, tmp_path: Path
) -> None:
    """Gaps of 255, 256, 510, 511 and more; rows and columns without a weight."""
    weights = write_run(tmp_path / "run", actor(1200, 2, 17), 0.5)
    middle = torch.zeros(1200, 1200)
    rows = [0, 255, 510], [1, 257, 767], [511, 1022], [1199], [600, 856], [200, 400, 600, 800, 1000]
    for row, index in enumerate(rows):
        middle[row, index] = torch.linspace(-1, 1, len(index)) + 2
    weights["actor.dense2.weight"] = middle
    for turn, matrix in enumerate((middle, middle.T.contiguous(), torch.zeros(1200, 1200))):
        weights["actor.dense2.weight"] = matrix
        weights["actor.dense2.bias"][:] = 0.3  # all fire
        save(tmp_path / "run", weights)
        obs = observations({"actor.dense1.weight": weights["actor.dense1.weight"]}, 20)
        expected = reference(evaluate, tmp_path / "run", obs)
        for kernel in (export.ROWS, export.COLUMNS):
            export.choose_kernel, kept = (lambda *_, k=kernel: k), export.choose_kernel
            network, _, _ = export.export(
                *export.load_model(tmp_path / "run"), tmp_path / "out", "fp32"
            )
            export.choose_kernel = kept
            for use_c in (True, False):
                found = outputs(export, tmp_path / "out", obs, use_c)
                assert np.abs(found - expected).max() <= 1e-5
            if turn == 2:
                assert network.layers[1].entries == 0


def test_encoding_by_hand(export: ModuleType) -> None:
    """Row 0 has weights at 2 and 600: 2, then 598 = 255 + 255 + 88; row 1 has none."""
    weight = np.zeros((2, 700), np.float32)
    weight[0, [2, 600]] = 1.5, -2
    parts = dict(export.encode(export.Layer("dense", weight, np.zeros(2)), "fp32"))
    assert parts["gaps"].tolist() == [2, 255, 255, 88]
    assert parts["values"].tolist() == [1.5, 0, 0, -2]
    assert parts["groups"].tolist() == [[4, 1], [0, 1]]
    layer = export.Layer("dense", weight.T, np.zeros(700), kernel=export.COLUMNS)
    parts = dict(export.encode(layer, "int8"))
    assert parts["order"].tolist() == [0] and parts["groups"].tolist() == [[4, 1]]
    values = [127 * 256 + 2, 255, 255, 65536 - 127 * 256 + 88]
    assert layer.bits == 8 and parts["values"].tolist() == values
    assert parts["scale"][[2, 600]] == pytest.approx([1.5 / 127, 2 / 127])


def test_close_entries_leave_bits_to_the_value(export: ModuleType) -> None:
    """Three bits hold distances of 1 and 7, and leave 13 to the value; 8 wants four."""
    weight = np.zeros((1, 20), np.float32)
    weight[0, [1, 8]] = 2, -2
    layer = export.Layer("dense", weight, np.zeros(1))
    values = dict(export.encode(layer, "int8"))["values"]
    assert layer.bits == 3 and values.tolist() == [4095 * 8 + 1, 65536 - 4095 * 8 + 7]
    weight[0, 16] = 2
    values = dict(export.encode(layer, "int8"))["values"]
    assert layer.bits == 4
    assert values.tolist() == [2047 * 16 + 1, 65536 - 2047 * 16 + 7, 2047 * 16 + 8]


def test_int8_rounds_to_the_nearest(export: ModuleType) -> None:
    """1.6 is 101.6 steps of 2 / 127."""
    layer = export.Layer("dense", np.float32([[1.6, -2]]), np.zeros(1), kernel=export.DENSE_ROWS)
    assert dict(export.encode(layer, "int8"))["values"].tolist() == [[102, -127]]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("kernel", ["ROWS", "COLUMNS", "DENSE_ROWS", "DENSE_COLUMNS"])
def test_every_kernel_reads_every_type(
    kernel: str, kind: str, export: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C agrees with NumPy closely; with torch it cannot."""
    weights = write_run(tmp_path / "run", actor(60), 0.5)
    monkeypatch.setattr(export, "choose_kernel", lambda *_: getattr(export, kernel))
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", kind)
    obs = observations(weights, 20)
    found, slow = (outputs(export, tmp_path / "out", obs, use_c) for use_c in (True, False))
    assert np.abs(found - slow).max() <= 1e-6


def test_units_without_effect_are_left_out(
    export: ModuleType, evaluate: ModuleType, tmp_path: Path
) -> None:
    """Unit 0 is read by nobody; unit 1 never fires; unit 2 fires only by its bias and stays."""
    weights = write_run(tmp_path / "run", minatar(), 1.0, **MINATAR)
    weights["dense.weight"][:, :64] = 0  # channel 0
    weights["conv.weight"][1] = -weights["conv.weight"][1].abs()
    weights["conv.bias"][1] = 0
    weights["conv.weight"][2], weights["conv.bias"][2] = 0, 0.5
    weights["output.weight"][:, 5] = 0
    save(tmp_path / "run", weights, **MINATAR)
    network, dropped, _ = export.export(
        *export.load_model(tmp_path / "run"), tmp_path / "out", "fp32"
    )
    assert dropped == 3 and [len(layer.bias) for layer in network.layers] == [14, 31, 3]
    obs = observations(weights, 50)
    expected = reference(evaluate, tmp_path / "run", obs)
    assert np.abs(outputs(export, tmp_path / "out", obs) - expected).max() <= 1e-5


def test_units_of_impala_that_fire_at_large_inputs_alone_stay(
    export: ModuleType, evaluate: ModuleType, tmp_path: Path
) -> None:
    """Inside, inputs have no upper bound: units that need one of 50 are not left out."""
    weights = write_run(tmp_path / "run", impala(), 1.0)
    weights["stack1.entry.bias"][:], weights["stack3.entry.bias"][:] = 100, 100
    for name in ("stack1.blocks.0", "dense"):
        weights[f"{name}.weight"][:] = 0
        weights[f"{name}.weight"].flatten(1)[:, 4] = 1  # of a kernel: its middle
        weights[f"{name}.bias"][:] = -50
    save(tmp_path / "run", weights)
    _, dropped, _ = export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    assert dropped == 0
    obs = observations(weights, 2)
    expected = reference(evaluate, tmp_path / "run", obs)
    found = outputs(export, tmp_path / "out", obs, use_c=False)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_distributions_far_apart(export: ModuleType, evaluate: ModuleType, tmp_path: Path) -> None:
    """Of actions whose logits differ by 200: each has a softmax of its own."""
    shapes, flags = NETWORKS["rainbow"]
    weights = write_run(tmp_path / "run", shapes, 0.2, **flags)
    weights["output.bias"][51:] -= 200
    save(tmp_path / "run", weights, **flags)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    obs = observations(weights, 3)
    expected = reference(evaluate, tmp_path / "run", obs)
    for use_c in (True, False):
        assert np.abs(outputs(export, tmp_path / "out", obs, use_c) - expected).max() <= 1e-4


def test_more_inputs_than_16_bits_count_are_refused(
    export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes: Any = {"conv": (1025, 4, 3, 3), "dense": (2, 65_600), "output": (3, 2)}
    write_run(tmp_path / "run", shapes, 1.0, **MINATAR)
    with pytest.raises(SystemExit):
        export.main(export.Args(run_dir=tmp_path / "run"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "65,535" in lines[0]


def test_another_export_leaves_nothing_of_the_one_before(
    export: ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "agent.onnx").touch()
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    assert not (tmp_path / "out" / "agent.onnx").exists()


def test_log_standard_deviations_are_left_out(export: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", actor(), 1.0)
    network, _, _ = export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    assert network.layers[-1].weight.shape == (3, 40)


def test_a_mutated_weight_is_noticed(
    export: ModuleType, evaluate: ModuleType, tmp_path: Path
) -> None:
    """Change one stored weight of each layer, with a CRC that fits: NumPy disagrees with torch."""
    weights = write_run(tmp_path / "run", cnn(), 0.1)
    for name in ("conv1", "conv2", "conv3", "dense"):
        weights[f"{name}.bias"][:] = 0.5  # all units fire
    save(tmp_path / "run", weights)
    network, _, blob = export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    obs = observations(weights, 8)
    expected = reference(evaluate, tmp_path / "run", obs)
    for layer in network.layers:
        changed = bytearray(blob)
        values = np.frombuffer(blob, np.float32, layer.entries, layer.parts["values"])
        place = layer.parts["values"] + 4 * int(np.abs(values).argmax())
        struct.pack_into("<f", changed, place, -struct.unpack_from("<f", changed, place)[0])
        struct.pack_into("<I", changed, 12, zlib.crc32(changed[16:], zlib.crc32(changed[:12])))
        (tmp_path / "out" / "agent.bin").write_bytes(changed)
        found = outputs(export, tmp_path / "out", obs, use_c=False)
        assert np.abs(found - expected).max() > 1e-5, layer.name
        with pytest.raises(ValueError, match="made for another"):
            export.load_agent(tmp_path / "out")


def test_damage_is_refused_in_one_line(export: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    _, _, blob = export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    for place in (6, 7, 8, 12, 20, 40, len(blob) // 2, len(blob) - 1):  # 6, 7: what kind it is
        changed = bytearray(blob)
        changed[place] ^= 1
        (tmp_path / "out" / "agent.bin").write_bytes(changed)
        with pytest.raises(ValueError, match="CRC"):
            export.load_agent(tmp_path / "out")
    for cut in (blob[:30], blob[:-5]):
        (tmp_path / "out" / "agent.bin").write_bytes(cut)
        with pytest.raises(ValueError, match=r"too short|CRC"):
            export.load_agent(tmp_path / "out")
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "agent.bin" in result.stderr
    # With a CRC that fits: of another program. Network, output, type; outputs, entries, groups.
    for place, form, value in (
        *((place, "<B", 9) for place in (6, 7, 24)),
        *((64 + place, "<I", 2**32 - 1) for place in (24, 32, 36)),
    ):
        changed = bytearray(blob)
        struct.pack_into(form, changed, place, value)
        struct.pack_into("<I", changed, 12, zlib.crc32(changed[16:], zlib.crc32(changed[:12])))
        (tmp_path / "out" / "agent.bin").write_bytes(changed)
        with pytest.raises(ValueError, match=r"agent\.bin: (unknown|no) network"):
            export.load_agent(tmp_path / "out", use_c=False).layers()


@pytest.mark.parametrize("use_c", [True, False])
def test_observations_of_another_shape_are_refused(
    use_c: bool, export: ModuleType, tmp_path: Path
) -> None:
    """NumPy would stretch one frame to four, and one number to all."""
    for name, wrong in (("cnn", [(84, 84), (1, 84, 84)]), ("actor", [(), (1,), (1, 11)])):
        write_run(tmp_path / name, NETWORKS[name][0], 0.2)
        export.export(*export.load_model(tmp_path / name), tmp_path / "out", "fp32")
        agent = export.load_agent(tmp_path / "out", use_c)
        for shape in wrong:
            for method in (agent.act, agent.q_values):
                with pytest.raises(ValueError, match="must be"):
                    method(np.zeros(shape))


@pytest.mark.parametrize("use_c", [True, False])
def test_scaled_pixels_are_refused(use_c: bool, export: ModuleType, tmp_path: Path) -> None:
    """Floats in [0, 1] would all become 0; numbers of MinAtar and of actors may be floats."""
    write_run(tmp_path / "run", cnn(), 0.2)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    agent = export.load_agent(tmp_path / "out", use_c)
    for kind in (np.float32, np.int64):
        for method in (agent.act, agent.q_values):
            with pytest.raises(ValueError, match=f"{kind.__name__}: must be uint8.* 0 to 255"):
                method(np.ones((4, 84, 84), kind))
    assert isinstance(agent.act(np.ones((4, 84, 84), np.uint8)), int)


@pytest.mark.parametrize("use_c", [True, False])
def test_cells_other_than_0_and_1_are_refused(
    use_c: bool, export: ModuleType, tmp_path: Path
) -> None:
    weights = write_run(tmp_path / "run", minatar(), 0.2, **MINATAR)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    agent, obs = export.load_agent(tmp_path / "out", use_c), observations(weights, 1)[0]
    values = agent.q_values(obs).tolist()
    for kind in (bool, np.int64, np.float32):
        assert agent.q_values(obs.astype(kind)).tolist() == values
    for wrong in (0.5, -1, 300, math.nan):
        for method in (agent.act, agent.q_values):
            with pytest.raises(ValueError, match="0 or 1"):
                method(np.full(agent.shape, wrong))


def test_threads_may_share_an_agent(export: ModuleType, tmp_path: Path) -> None:
    weights = write_run(tmp_path / "run", cnn(), 0.3)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    agent, obs = export.load_agent(tmp_path / "out"), observations(weights, 16)
    alone = [agent.q_values(x).tolist() for x in obs]
    with ThreadPoolExecutor(8) as pool:
        found = [x.tolist() for x in pool.map(agent.q_values, np.concatenate([obs] * 20))]
    assert found == alone * 20


def test_processes_may_compile_at_once(export: ModuleType, tmp_path: Path) -> None:
    """Each gets a whole library, and nothing else stays in the cache."""
    write_run(tmp_path / "run", cnn(), 0.3)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    code = "from agent import *; agent = Agent(); assert agent._library; print(agent.q_values("
    code += "np.ones(agent.shape, np.uint8)))"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=tmp_path / "out", **pipes) for _ in range(4)]
    found = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4 and len(found) == 1, found
    assert len([*(tmp_path / "cache" / "cleanrl-sparse").iterdir()]) == 1


def test_says_why_numpy_computes(
    export: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line: the cache cannot be written, there is no compiler, or it fails."""
    weights = write_run(tmp_path / "run", actor(), 0.2)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    (tmp_path / "file").touch()
    for name, value, why in (
        ("XDG_CACHE_HOME", str(tmp_path / "file"), "file"),
        ("CC", "no-such-compiler", "no-such-compiler"),
        ("CC", "false", "false cannot compile"),
        ("CC", "cc -fno-such-flag", "cannot compile agent.c: .*no-such-flag"),
        ("CC", '"cc', "CC.*quotation"),
        ("HOME", "", "home"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            if name == "HOME":  # a user without an entry in /etc/passwd
                patch.delenv("XDG_CACHE_HOME")
                patch.setattr(Path, "home", lambda: Path("~nobody-at-all").expanduser())
            agent = export.load_agent(tmp_path / "out")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "NumPy" in lines[0] and re.search(why, lines[0]), lines
        assert agent.act(observations(weights, 1)[0]).shape == (3,)
    export.load_agent(tmp_path / "out", use_c=False)
    assert not capsys.readouterr().err


def test_what_is_cached_is_what_its_name_says(
    export: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the folder's name looks like an option, or another export comes in between."""
    monkeypatch.chdir(tmp_path)
    for folder, density in (("-out", 0.2), ("new", 0.5)):
        write_run(tmp_path / "run", actor(), density)
        export.export(*export.load_model(tmp_path / "run"), Path(folder), "fp32")
    swap = tmp_path / "swap"
    swap.write_text(f'#!/bin/sh\ncp {tmp_path}/new/agent.[ch] {tmp_path}/-out\nexec cc "$@"\n')
    swap.chmod(0o755)
    shutil.copytree("-out", "twin")
    monkeypatch.setenv("CC", str(swap))
    for folder in ("-out", "twin"):
        assert export.load_agent(Path(folder))._library
    assert Path("-out/agent.c").read_bytes() == Path("new/agent.c").read_bytes()
    assert not Path("cache/cleanrl-sparse").stat().st_mode & 0o077


def test_a_library_without_the_agent_is_replaced(
    export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    export.load_agent(tmp_path / "out")
    (library,) = (tmp_path / "cache" / "cleanrl-sparse").iterdir()
    command = ["cc", "-shared", "-x", "c", "/dev/null", "-o", str(tmp_path / "empty.so")]
    subprocess.run(command, check=True)
    (tmp_path / "empty.so").replace(library)
    code = "from agent import Agent; print(bool(Agent()._library))"
    for expected in ("False", "True"):
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
        assert len(result.stderr.splitlines()) == (expected == "False")


def test_the_compiler_may_have_flags(
    export: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    monkeypatch.setenv("CC", "cc -g0")
    assert export.load_agent(tmp_path / "out")._library


MAIN = r"""
#include <stdio.h>
#include "agent.h"
static agent_state state;
int main(int argc, char **argv)
{
    static OBSERVATION obs[AGENT_OBSERVATION];
    FILE *file = fopen(argv[argc - 1], "rb");
    if (!file || agent_init(&state, agent_weights, AGENT_WEIGHTS_BYTES) != 0)
        return 1;
    while (fread(obs, sizeof obs, 1, file) == 1)
        ACT
    return fclose(file);
}
"""


def run_program(
    out: Path, obs: np.ndarray, compiler: list[str], before: tuple[str, ...] = ()
) -> np.ndarray:
    """Return what a C program with this agent gives: actions; or an index, then Q-values."""
    act = "float action[AGENT_ACTIONS]; const float *y = action; agent_act(&state, obs, action);"
    if obs.ndim > 2:
        act = 'const float *y; printf("%d ", agent_act(&state, obs));'
        act += " y = agent_q_values(&state, obs);"
    act = f"{{ int i; {act} for (i = 0; i < AGENT_ACTIONS; i++)"
    act += ' printf("%.9g ", y[i]); printf("\\n"); }'
    code = MAIN.replace("ACT\n", act + "\n")
    kind = "float" if obs.ndim == 2 else "unsigned char"
    (out / "main.c").write_text(code.replace("OBSERVATION obs", f"{kind} obs"))
    obs.tofile(out / "obs.bin")
    files = ["main.c", "agent.c", "agent_weights.c", "-o", "program", "-lm"]
    subprocess.run([compiler[0], *STRICT, *compiler[1:], *files], cwd=out, check=True)
    command = [*before, "./program", "obs.bin"]
    result = subprocess.run(command, cwd=out, check=True, capture_output=True, text=True)
    assert not result.stderr
    return np.array([line.split() for line in result.stdout.splitlines()], float)


SANITIZERS = ["cc", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("odd channels", "fp32"),
        ("odd channels", "int8"),
        ("impala", "int8"),
        ("rainbow", "fp16"),
        ("normalised", "fp32"),
        ("minatar", "fp16"),
        ("one dimension", "fp32"),
        ("actor", "fp16"),
        ("actor", "int8"),
    ],
)
def test_no_warnings_and_nothing_for_the_sanitizers(
    name: str, kind: str, export: ModuleType, evaluate: ModuleType, tmp_path: Path
) -> None:
    shapes, flags = NETWORKS[name]
    weights = write_run(tmp_path / "run", shapes, 0.1, **flags)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", kind)
    obs = observations(weights, 3)
    for file in ("agent.c", "agent_weights.c"):
        command = ["cc", *STRICT, "-c", file, "-o", "strict.o"]
        subprocess.run(command, cwd=tmp_path / "out", check=True)
    found = run_program(tmp_path / "out", obs, [*SANITIZERS, "-Wno-error"])
    expected = outputs(export, tmp_path / "out", obs, use_c=False)
    if obs.ndim == 2:
        assert np.abs(found - expected).max() <= 1e-6
    else:
        assert found[:, 0].tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize(
    ("name", "kind", "density"),
    [
        ("odd channels", "fp32", 0.1),
        ("odd channels", "int8", 0.7),
        ("impala", "fp16", 0.1),
        ("actor", "int8", 0.3),
        ("actor", "fp16", 0.3),
    ],
)
def test_vectors_of_other_widths(
    lanes: int,
    name: str,
    kind: str,
    density: float,
    export: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None, and AVX-512's: the compiler makes them of narrower ones where the machine has none."""
    shapes, flags = NETWORKS[name]
    weights = write_run(tmp_path / "run", shapes, density, **flags)
    obs = observations(weights, 3)
    for kernel in range(4) if name == "actor" else [None]:
        if kernel is not None:
            monkeypatch.setattr(export, "choose_kernel", lambda *_, k=kernel: k)
        export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", kind)
        found = run_program(tmp_path / "out", obs, ["cc", f"-DLANES={lanes}", "-Wno-psabi"])
        expected = outputs(export, tmp_path / "out", obs, use_c=False)
        assert np.abs(found[:, -expected.shape[1] :] - expected).max() <= 1e-6


def guarded(header: str) -> tuple[str, str]:
    """Return agent.h with a gap after each buffer, and C statements that poison the gaps."""
    member = re.compile(r"(?<=[ ,])(\w+)\[([^]]+)\]([,;])")
    poison = []

    def guard(match: re.Match[str]) -> str:
        name, size, end = match.groups()
        kind = "float " if end == "," else ""
        place = ("state.scratch." if name in ("offset", "weight", "plane") else "state.") + name
        poison.append(f"__asan_poison_memory_region(&{place}_gap, 1024);")
        return f"{name}[{size}]; char {name}_gap[1024] __attribute__((aligned(8))); {kind}"

    start = header.index("typedef struct")
    return header[:start] + member.sub(guard, header[start:]), "\n".join(poison)


@pytest.mark.parametrize(("lanes", "density"), [(1, 0.1), (8, 0.1), (16, 0.1), (16, 0.7)])
def test_the_slack_of_planes_is_enough(
    lanes: int,
    density: float,
    export: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing touches what lies behind a buffer; and Impala needs 138 of the 160 floats."""
    weights = write_run(tmp_path / "run", impala(), density)
    weights["stack1.entry.weight"][:, -1, -1, -1] = 1  # the tap that reads farthest
    save(tmp_path / "run", weights)
    assert export.SLACK == 160
    for slack in (160, 136) if (lanes, density) == (16, 0.1) else (160,):
        monkeypatch.setattr(export, "SLACK", slack)
        export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
        text, poison = guarded((tmp_path / "out" / "agent.h").read_text())
        (tmp_path / "out" / "agent.h").write_text(text)
        (tmp_path / "out" / "main.c").write_text(
            '#include <sanitizer/asan_interface.h>\n#include "agent.h"\n'
            "static agent_state state;\nstatic unsigned char obs[AGENT_OBSERVATION];\n"
            "int main(void)\n{\n"
            "    if (agent_init(&state, agent_weights, AGENT_WEIGHTS_BYTES) != 0)\n"
            f"        return 2;\n{poison}\n    return agent_act(&state, obs) < 0;\n}}\n"
        )
        files = ["main.c", "agent.c", "agent_weights.c", "-o", "program", "-lm"]
        command = [
            "cc",
            "-O1",
            "-w",
            "-Wno-psabi",
            "-fsanitize=address",
            f"-DLANES={lanes}",
            *files,
        ]
        subprocess.run(command, cwd=tmp_path / "out", check=True)
        result = subprocess.run(["./program"], cwd=tmp_path / "out", capture_output=True, text=True)
        assert ("AddressSanitizer" in result.stderr) == (slack < 138), result.stderr
        assert (result.returncode == 0) == (slack >= 138)


AGENTS = Path(__file__).parent.parent / "agents"


@pytest.mark.parametrize("folder", sorted(AGENTS.glob("minatar_*")), ids=lambda path: path.name)
def test_int8_plays_as_trained_agents_do(folder: Path, export: ModuleType, tmp_path: Path) -> None:
    """At least 990 of 1,000 actions, in at most 60 % of the bytes of fp16."""
    pytest.importorskip("minatar")
    agent = export.load_agent(folder)
    weights = {}
    for layer in agent.layers():
        weights[f"{layer['name']}.weight"] = torch.from_numpy(layer["weight"].copy())
        weights[f"{layer['name']}.bias"] = torch.from_numpy(layer["bias"].copy())
    save(tmp_path, weights, env_id=agent.env_id, **MINATAR)
    export.export(*export.load_model(tmp_path), tmp_path / "out", "int8")
    small = export.load_agent(tmp_path / "out")
    obs = export.observations(agent, 1000, 0, lambda batch: [agent.act(x) for x in batch])
    assert sum(agent.act(x) == small.act(x) for x in obs) >= 0.99 * len(obs)
    assert len(small.data) <= 0.6 * len(agent.data)


@pytest.mark.parametrize("name", ["halfcheetah", "hopper"])
def test_int8_acts_as_trained_actors_do(name: str, export: ModuleType, tmp_path: Path) -> None:
    """Their first layers see numbers up to 30; as dense int8 no action was within 0.01."""
    agent, weights = export.load_agent(AGENTS / name), {}
    for layer in agent.layers():
        weight, bias = (torch.from_numpy(layer[x].copy()) for x in ("weight", "bias"))
        if layer["name"] == "output":  # with log standard deviations, which export.py leaves out
            weight, bias = torch.cat([weight, 0 * weight]), torch.cat([bias, 0 * bias])
        weights |= {f"actor.{layer['name']}.weight": weight, f"actor.{layer['name']}.bias": bias}
    save(tmp_path, weights, env_id=agent.env_id, script="sac_mujoco_eaudeqn.py")
    export.export(*export.load_model(tmp_path), tmp_path / "out", "int8")
    small = export.load_agent(tmp_path / "out")
    obs = export.observations(agent, 1000, 0, lambda batch: np.stack([*map(agent.act, batch)]))
    differences = np.array([np.abs(agent.act(x) - small.act(x)).max() for x in obs])
    assert differences.max() <= 0.05 and np.mean(differences <= 0.01) >= 0.95
    assert len(small.data) <= 1.05 * len(agent.data)


@pytest.mark.parametrize("name", ["halfcheetah", "minatar_breakout"])
def test_a_trained_agent_is_played_and_filmed(name: str, tmp_path: Path) -> None:
    """It leaves the film alone, and prints no warning of MuJoCo's about Gymnasium's models."""
    (tmp_path / "here").mkdir()
    steps = 40 if name == "halfcheetah" else 20
    flags = ["--episodes", "2", "--steps", str(steps), "--video", "film.mp4"]
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(AGENTS / name), *flags]
    result = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "return" in result.stdout and "WARNING" not in result.stderr, result.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["film.mp4"]
    film = imageio_ffmpeg.read_frames(str(tmp_path / "here" / "film.mp4"))
    width, height = next(film)["size"]
    *_, last = pictures = [np.frombuffer(x, np.uint8).reshape(height, width, 3) for x in film]
    if name == "halfcheetah":
        brown = last[:, :, 0].astype(int) - last[:, :, 2] > 40
        assert len(pictures) == steps and 500 < brown.sum() < 50_000, "it ran out of the picture"
    else:
        assert 5 < len(pictures) <= steps


@pytest.mark.parametrize("folder", sorted(AGENTS.glob("*/")), ids=lambda path: path.name)
def test_trained_agents_have_the_present_loader(folder: Path, export: ModuleType) -> None:
    assert (folder / "agent.py").read_text() == export.PY_AGENT


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_program_in_cpp_links(export: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    code = '#include "agent.h"\nstatic agent_state state;\nint main()\n'
    code += "{ return agent_init(&state, agent_weights, AGENT_WEIGHTS_BYTES); }\n"
    (tmp_path / "out" / "main.cpp").write_text(code)
    for command in (
        ["cc", "-c", "agent.c", "agent_weights.c"],
        ["c++", "-Wall", "-Wextra", "-Werror", "main.cpp", "agent.o", "agent_weights.o", "-lm"],
        ["./a.out"],
    ):
        subprocess.run(command, cwd=tmp_path / "out", check=True)


def test_push_frame_keeps_the_last_four(export: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", cnn(), 0.1)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", "fp32")
    (tmp_path / "out" / "frames.c").write_text(r"""
#include <string.h>
#include "agent.h"
static agent_state s;
int main(void)
{
    static unsigned char frame[84 * 84];
    const unsigned char *stack;
    int i;
    if (agent_init(&s, agent_weights, AGENT_WEIGHTS_BYTES) != 0)
        return 1;
    for (i = 1; i < 7; i++) {
        memset(frame, i, sizeof frame);
        stack = agent_push_frame(&s, frame);
    }
    for (i = 0; i < AGENT_OBSERVATION; i++)
        if (stack[i] != 3 + i / 7056)
            return 2;
    agent_new_episode(&s);
    stack = agent_push_frame(&s, frame);
    return stack[0] != 0 || stack[3 * 7056 - 1] != 0 || stack[3 * 7056] != 6;
}
""")
    files = ["frames.c", "agent.c", "agent_weights.c", "-o", "frames", "-lm"]
    subprocess.run([*SANITIZERS, *STRICT[:1], *files], cwd=tmp_path / "out", check=True)
    assert subprocess.run(["./frames"], cwd=tmp_path / "out").returncode == 0


def test_a_million_weights_compile_soon_in_little_memory(
    export: ModuleType, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    blob = rng.integers(0, 256, 5_000_000, dtype=np.uint8).tobytes()  # fp32 and a byte each
    header = (
        "#define AGENT_H\n#include <stdint.h>\nextern const unsigned char *const agent_weights;"
    )
    (tmp_path / "agent.h").write_text(header)
    (tmp_path / "agent_weights.c").write_text(export.weights_table(blob))
    code = "import resource,subprocess;subprocess.run(['cc','-std=c99','-O2','-Wall','-Wextra',"
    code += "'-pedantic','-Werror','-c','agent_weights.c'],check=True);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.process_time(), time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert time.perf_counter() - start[1] < 5
    assert int(result.stdout) < 100_000  # kB
    data = (tmp_path / "agent_weights.o").read_bytes()
    assert blob[:4000] in data and blob[-4000:] in data


def test_exports_and_evaluates_a_real_run(
    export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command; then evaluate.py plays the exported agent as it plays the run."""
    script = load_script("sac_mujoco_gmp")
    torch.manual_seed(0)
    network = script.Actor(3, 1, 64, 2)
    weights = {f"actor.{k}": p.detach() for k, p in network.named_parameters()}
    save(tmp_path / "run", weights, env_id="Pendulum-v1", script="sac_mujoco_gmp.py")
    export.main(export.Args(run_dir=tmp_path / "run", observations=200))
    text = capsys.readouterr().out
    assert "C: 200 of 200" in text and "NumPy: 200 of 200" in text
    scores = []
    for folder in ("run", "run/export"):
        flags = ["--episodes", "2", "--steps", "50"]
        command = [sys.executable, str(SCRIPTS / "evaluate.py"), str(tmp_path / folder), *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        scores.append(next(x for x in result.stdout.splitlines() if x.startswith("return")))
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("change", "flags", "line"),
    [
        ({"actor.dense1.bias": torch.full((40,), math.nan)}, {}, "not finite"),
        ({"actor.dense1.weight": torch.full((40, 11), 1e6)}, {"fp16": True}, "--fp16.*1e"),
        ({"actor.dense1.bias": None}, {}, "actor.dense1.bias.*missing"),
        ({}, {"out": "run"}, "--out .*run"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    change: dict[str, Any],
    flags: dict[str, Any],
    line: str,
    export: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = write_run(tmp_path / "run", actor(), 0.2, env_id="Hopper-v5") | change
    save(tmp_path / "run", {k: w for k, w in weights.items() if w is not None})
    flags = {name: Path(x) if name == "out" else x for name, x in flags.items()}
    with pytest.raises(SystemExit) as caught:
        export.main(export.Args(run_dir=tmp_path / "run", **flags))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and re.search(line, lines[0]), lines
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["cnn", "one dimension"])
def test_a_seed_gives_the_same_observations(name: str, export: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", NETWORKS[name][0], 0.2, **NETWORKS[name][1])
    network = export.network_of(*export.load_model(tmp_path / "run"))
    still = np.zeros(8, int) if name == "cnn" else np.zeros((8, 1))
    first, again, other = (
        export.observations(network, 240, seed, lambda _: still.copy()) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["cnn", "impala", "actor", "minatar"])
def test_onnx(name: str, export: ModuleType, evaluate: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    shapes, flags = NETWORKS[name]
    weights = write_run(tmp_path / "run", shapes, 0.2, **flags)
    export.write_onnx(*evaluate.load_model(tmp_path / "run"), tmp_path / "agent.onnx")
    obs = observations(weights, 3)
    session = runtime.InferenceSession(tmp_path / "agent.onnx")
    found = [session.run(None, {"observation": x[None].astype(np.float32)})[0][0] for x in obs]
    assert np.abs(np.stack(found) - reference(evaluate, tmp_path / "run", obs)).max() <= 1e-5


def test_onnx_without_its_package_is_refused_in_one_line(
    export: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run", actor(), 0.2)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        export.main(export.Args(run_dir=tmp_path / "run", onnx=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install onnx" in lines[0]
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
@pytest.mark.cross
@pytest.mark.parametrize("name", ["cnn", "odd channels", "impala", "rainbow", "actor", "minatar"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_other_processors(name: str, kind: str, export: ModuleType, tmp_path: Path) -> None:
    """A Raspberry Pi's processor, emulated, acts alike; a Cortex-M's compiler accepts it."""
    arm, qemu = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    bare = shutil.which("arm-none-eabi-gcc")
    if not (arm and qemu and bare):
        pytest.skip("needs gcc-aarch64-linux-gnu, qemu-user and gcc-arm-none-eabi")
    shapes, flags = NETWORKS[name]
    weights = write_run(tmp_path / "run", shapes, 0.1, **flags)
    export.export(*export.load_model(tmp_path / "run"), tmp_path / "out", kind)
    obs = observations(weights, 10)
    found = run_program(tmp_path / "out", obs, [arm, "-static"], (qemu,))
    expected = outputs(export, tmp_path / "out", obs)
    if name == "actor":
        assert np.abs(found - expected).max() <= 1e-6
    else:
        assert found[:, 0].tolist() == expected.argmax(1).tolist()
    for file in ("agent.c", "agent_weights.c"):
        machine = ["-mcpu=cortex-m7", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv5-d16"]
        command = [bare, *machine, *STRICT, "-c", file, "-o", "bare.o"]
        subprocess.run(command, cwd=tmp_path / "out", check=True)
