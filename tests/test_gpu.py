"""What only a machine with a GPU can show: updates equal the CPU's, a captured graph equals eager
updates, real runs.

All of it is skipped without a GPU, and has not run on one yet.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tasks import CPU, filled_replay
from test_runs import SCRIPTS, SMALL, Process, has_saved, succeed
from torch import Tensor

GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

# Fixture and class of each agent; flags that prune within a few updates.
SCHEDULE = {"prune_every": 2, "prune_start": 0.0, "learning_starts": 300}
AGENTS = {
    "eaudeqn": ("EauDeQN", {"num_networks": 3, "max_exponent": 1e9, "max_sparsity_step": 0.3}),
    "dqn": ("DQN", {"total_timesteps": 340, **SCHEDULE}),
    "baselines": ("DQN", {"pruner": "rigl", "total_timesteps": 340, **SCHEDULE}),
    "rainbow": ("Rainbow", {"network": "cnn", "total_timesteps": 340, **SCHEDULE}),
    "eaudesac": ("EauDeSAC", {"num_networks": 3, "max_exponent": 1e9, "max_sparsity_step": 0.3}),
    "sac": ("SAC", {"width": 1, "total_timesteps": 310, **SCHEDULE}),
    "cql": ("CQL", {"pruner": "random", "sparsity": 0.5}),
}
agents = pytest.mark.parametrize("name", AGENTS)


def learned(
    module: ModuleType,
    name: str,
    device: torch.device,
    home: torch.device,
    dtype: torch.dtype,
    updates: int,
    **flags: Any,
) -> dict[str, Tensor]:
    """Return an agent's tensors after `updates` updates on `device` from a replay that lies on
    `home`.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        False  # as in the scripts
    )
    kind, own = AGENTS[name]
    if name == "cql":
        args = module.Args(**own | flags)
        rng = np.random.default_rng(0)
        obs, actions, next_obs = (
            rng.uniform(-1, 1, (400, n)).astype(np.float32) for n in (3, 1, 3)
        )
        ends = rng.random(400) < 0.1
        data = module.Data(
            obs, actions, rng.normal(size=400).astype(np.float32), next_obs, ends, ends
        )
        replay: Any = module.Dataset(data, module.MujocoEnvs("Pendulum-v1", 1, 0), args, home)
        agent = module.CQL(args, 3, 1, device, dtype)
        agent.prune([replay.sample(args.batch_size)])
    elif name in ("eaudesac", "sac"):
        args = module.Args(**own | flags)
        envs = module.MujocoEnvs("Pendulum-v1", 1, 0)
        replay = module.Replay(400, envs, home, 1, args.gamma)
        rng = np.random.default_rng(0)
        for _ in range(300):
            actions = rng.uniform(-1, 1, (1, 1)).astype(np.float32)
            replay.add(actions, envs.step(actions), envs.obs)
        agent = getattr(module, kind)(args, 3, 1, device, dtype)
    else:
        args = module.Args(feature_size=32, **own | flags)
        store = module.PrioritisedReplay if name == "rainbow" else module.FrameReplay
        replay = filled_replay(module, store, 84, 300, device=home)
        agent = getattr(module, kind)(args, 4, device, dtype)
    for done in range(updates):
        if done == 3 and name == "eaudeqn":
            agent.update_target(args.target_every)
        if done == 3 and name == "eaudesac":
            agent.choose_and_prune()
        agent.learn(replay, 1)
    assert flags.get("compile", False) == (agent.graph is not None)
    return {key: tensor.detach().to(CPU) for key, tensor in agent.tensors().items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All tensors are equal to rounding in float64, and something is pruned."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=1e-7, atol=1e-9), key
    assert any((mask == 0).any() for key, mask in ours.items() if key.startswith("mask"))


@agents
def test_updates_are_those_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    assert_close(*(learned(module, name, device, CPU, torch.float64, 6) for device in (GPU, CPU)))


@agents
def test_float32_losses_are_those_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    ours, theirs = (learned(module, name, device, CPU, torch.float32, 1) for device in (GPU, CPU))
    torch.testing.assert_close(ours["latest"], theirs["latest"], rtol=1e-4, atol=1e-5)


@agents
def test_a_captured_graph_does_what_eager_updates_do(
    name: str, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(name)
    captured, eager = (
        learned(module, name, GPU, GPU, torch.float64, 6, compile=on) for on in (True, False)
    )
    assert_close(captured, eager)


@agents
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_graph_in_the_types_of_real_runs(
    name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """float32 weights, with autocast or without: as close as kernels that add up in another
    order.
    """
    module = request.getfixturevalue(name)
    flags = {"precision": precision}
    captured, eager = (
        learned(module, name, GPU, GPU, torch.float32, 6, compile=on, **flags)
        for on in (True, False)
    )
    torch.testing.assert_close(captured["latest"], eager["latest"], rtol=0.05, atol=0.05)


def test_masks_are_those_of_the_cpu(eaudeqn: ModuleType) -> None:
    torch.manual_seed(0)
    weights = [
        torch.randint(-9, 10, shape).float() for shape in ((64, 32, 3, 3), (512, 700), (6, 512))
    ]  # many ties
    parents = [torch.rand_like(w) < 0.8 for w in weights]
    for scope in ("erk", "uniform", "global"):
        for sparsity in (0.3, 0.9, 0.999):
            ours = eaudeqn.magnitude_masks(
                [w.to(GPU) for w in weights], [m.to(GPU) for m in parents], sparsity, scope
            )
            theirs = eaudeqn.magnitude_masks(weights, parents, sparsity, scope)
            assert all(torch.equal(a.to(CPU), b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_captured_run_is_stopped_and_resumed(script: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(
        script, SMALL[script], f"--device cuda --compile --run-dir {folder}", cwd=tmp_path
    )
    output = process.when(lambda: has_saved(folder, 500)).stop(signal.SIGTERM)
    assert output.status == 75, output.stderr
    succeed(script, f"--resume {folder}", cwd=tmp_path)
    final = json.loads((folder / "final.json").read_text())
    assert final["status"] == "finished" and final["step"] == 2000
    assert 0 < final["sparsity/prunable"] < 1
