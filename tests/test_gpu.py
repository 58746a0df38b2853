"""What only a machine with a GPU can show: updates equal the CPU's, a captured graph equals eager
updates, real runs.

All of it is skipped without a GPU, and has not run on one yet.
"""

from __future__ import annotations

import json
import math
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
SMALL_REPLAY = {"learning_starts": 300, "buffer_size": 400}
AGENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eaudeqn": ("EauDeQN", {"num_networks": 3, "max_exponent": 1e9, "max_sparsity_step": 0.3}),
    "dqn": ("DQN", {"total_timesteps": 340, **SCHEDULE}),
    "baselines": ("DQN", {"pruner": "rigl", "total_timesteps": 340, **SCHEDULE}),
    "rainbow": ("Rainbow", {"network": "cnn", "total_timesteps": 340, **SCHEDULE}),
    "eaudesac": ("EauDeSAC", {"num_networks": 3, "max_exponent": 1e9, "max_sparsity_step": 0.3}),
    "sac": ("SAC", {"width": 1, "total_timesteps": 310, **SCHEDULE}),
    "cql": ("CQL", {"pruner": "random", "sparsity": 0.5}),
}
agents = pytest.mark.parametrize("name", AGENTS)


def made(module: ModuleType, name: str, device: torch.device, **flags: Any) -> tuple[Any, Any]:
    """Return an agent and its replay, both on a device."""
    torch.backends.cudnn.allow_tf32 = False  # as in the scripts
    kind, own = AGENTS[name]
    rng = np.random.default_rng(0)
    if name == "cql":
        args = module.Args(**own | flags)
        obs, actions, next_obs = (
            rng.uniform(-1, 1, (400, n)).astype(np.float32) for n in (3, 1, 3)
        )
        rewards, ends = rng.normal(size=400).astype(np.float32), rng.random(400) < 0.1
        data = module.Data(obs, actions, rewards, next_obs, ends, ends)
        replay: Any = module.Dataset(data, module.MujocoEnvs("Pendulum-v1", 1, 0), args, device)
        return module.CQL(args, 3, 1, device), replay
    if name in ("eaudesac", "sac"):
        args = module.Args(**SMALL_REPLAY | own | flags)
        envs = module.MujocoEnvs("Pendulum-v1", 1, 0)
        replay = module.Replay(args, device, envs)
        for _ in range(300):
            actions, obs = rng.uniform(-1, 1, (1, 1)).astype(np.float32), envs.obs
            replay.add(obs, actions, *envs.step(actions)[:3])
        return getattr(module, kind)(args, 3, 1, device), replay
    flags = {"feature_size": 32, **own, **flags}
    replay = filled_replay(module, 84, 300, device, **flags)
    return getattr(module, kind)(module.Args(**flags), 4, device), replay


def tensors(agent: Any) -> dict[str, Tensor]:
    """Return the tensors of an agent's state, on the CPU."""
    state = agent.state_dict().items()
    return {name: t.detach().to(CPU) for name, t in state if isinstance(t, Tensor)}


@pytest.mark.parametrize("name", [name for name in AGENTS if name != "rainbow"])
def test_updates_are_those_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    """Six updates on the same batches, in float64; what comes out is equal to rounding."""
    module = request.getfixturevalue(name)
    results = []
    torch.set_default_dtype(torch.float64)
    try:
        _, replay = made(module, name, CPU)
        batches = [replay.sample(32) for _ in range(6)]
        for device in (GPU, CPU):
            agent, _ = made(module, name, device)
            for batch in batches:
                parts = [t.double() if t.is_floating_point() else t for t in batch]
                agent.update(*(part.to(device) for part in parts))
            results.append(tensors(agent))
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=1e-7, atol=1e-9), key


@agents
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_graph_does_what_eager_updates_do(
    name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """As close as kernels that add up in another order; one update is eager, the rest replays."""
    module, latest = request.getfixturevalue(name), []
    for on in (True, False):
        agent, replay = made(module, name, GPU, compile=on, precision=precision)
        for _ in range(6):
            if name == "cql":
                agent.captured_update(replay)
            else:
                ratio = agent.args.replay_ratio
                before = math.floor(agent.args.learning_starts * ratio)
                agent.learn(replay, math.ceil((agent.gradient_step + 1 + before) / ratio))
        assert on == (agent.graph is not None)
        latest.append(agent.latest.to(CPU))
    torch.testing.assert_close(*latest, rtol=0.05, atol=0.05, equal_nan=True)


def test_masks_are_those_of_the_cpu(eaudeqn: ModuleType) -> None:
    """With many ties, at three sparsities one after the other."""
    results = []
    for device in (GPU, CPU):
        torch.manual_seed(0)
        network = eaudeqn.QNetwork(6, eaudeqn.Args(feature_size=16))
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randint(-9, 10, p.shape))
        eaudeqn.add_masks(network)
        network.to(device)
        for sparsity in (0.3, 0.9, 0.999):
            densities = eaudeqn.erk_densities(network, sparsity)
            eaudeqn.prune(network, densities, np.random.default_rng(0))
            results.append([mask.to(CPU) for mask in network.buffers()])
    for ours, theirs in zip(results[:3], results[3:]):
        assert all(map(torch.equal, ours, theirs))


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
