"""What only a machine with a GPU can show: updates equal the CPU's, a captured graph equals eager
updates, real runs.

All of it is skipped without a GPU, and has not run on one yet.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
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


class Moved:
    """A replay on the CPU, whose batches come to a device in the networks' type."""

    def __init__(self, replay: Any, device: torch.device) -> None:
        self.replay, self.device = replay, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replay, name)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        kinds = {True: torch.get_default_dtype(), False: None}
        batch = self.replay.sample(batch_size)
        return tuple(t.to(self.device, kinds[t.is_floating_point()]) for t in batch)

    def prioritise(self, slots: Tensor, losses: Tensor) -> None:
        self.replay.prioritise(slots.to(CPU), losses.detach().to(CPU).float())


def learned(
    module: ModuleType, name: str, device: torch.device, home: torch.device, **flags: Any
) -> dict[str, Tensor]:
    """Return an agent's tensors after six gradient steps on a device, from a replay at home; masks
    change in between.
    """
    agent, replay = made(module, name, device, **flags)
    if home != device:
        replay = Moved(made(module, name, home, **flags)[1], device)
    if name == "cql":
        agent.prune([replay.sample(agent.args.batch_size)])
    for done in range(6):
        if done == 3 and name == "eaudeqn":
            agent.update_target(agent.args.target_every)
        if done == 3 and name == "eaudesac":
            agent.choose_and_prune()
        if name == "cql":
            agent.captured_update(replay)
            continue
        ratio = agent.args.replay_ratio
        before = math.floor(agent.args.learning_starts * ratio)
        agent.learn(replay, math.ceil((agent.gradient_step + 1 + before) / ratio))
        assert agent.gradient_step == done + 1
    assert flags.get("compile", False) == (agent.graph is not None)
    state = agent.state_dict().items()
    return {key: t.detach().to(CPU) for key, t in state if isinstance(t, Tensor)}


@pytest.fixture
def double() -> Iterator[None]:
    """Networks of float64, in which equal means equal to rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All tensors are equal to rounding in float64, and something is pruned."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=1e-7, atol=1e-9, equal_nan=True), key
    assert any((mask == 0).any() for key, mask in ours.items() if "mask" in key)


@agents
@pytest.mark.usefixtures("double")
def test_updates_are_those_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    assert_close(*(learned(module, name, device, CPU) for device in (GPU, CPU)))


@agents
def test_float32_losses_are_those_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    ours, theirs = (learned(module, name, device, CPU)["latest"] for device in (GPU, CPU))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


@agents
@pytest.mark.usefixtures("double")
def test_a_captured_graph_does_what_eager_updates_do(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Replay, pruning and all, in float64."""
    module = request.getfixturevalue(name)
    assert_close(*(learned(module, name, GPU, GPU, compile=on) for on in (True, False)))


@agents
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_graph_in_the_types_of_real_runs(
    name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """As close as kernels that add up in another order; one update is eager, the rest replays."""
    module, flags = request.getfixturevalue(name), {"precision": precision}
    captured, eager = (learned(module, name, GPU, GPU, compile=on, **flags) for on in (True, False))
    torch.testing.assert_close(
        captured["latest"], eager["latest"], rtol=0.05, atol=0.05, equal_nan=True
    )


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
