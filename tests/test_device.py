"""What a CUDA graph needs can be checked without a GPU: sampling and update never read a value on
the host.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode


def test_sample_and_update_never_wait_for_the_device(eaudeqn: ModuleType) -> None:
    """Fake tensors have shapes but no values: any .item(), nonzero() or boolean index would
    raise.
    """
    args, cpu = eaudeqn.Args(num_networks=2, feature_size=16, buffer_size=500), torch.device("cpu")
    agent = eaudeqn.EauDeQN(args, 4, cpu)
    replay = eaudeqn.FrameReplay(args, cpu, np.zeros((1, 84, 84), np.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = replay.sample(32)
        assert batch[0].shape == (32, 4, 84, 84)
        agent.update(*batch)
        with pytest.raises(DataDependentOutputException):
            agent.accumulated_loss.add(1).sum().item()  # the net is not torn


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["EauDeSAC", "SAC"])
def test_sac_never_waits_for_the_device(
    eaudesac: ModuleType, sac: ModuleType, kind: str, precision: str
) -> None:
    module, cpu = eaudesac if kind == "EauDeSAC" else sac, torch.device("cpu")
    args = module.Args(width=1, precision=precision, learning_starts=500, buffer_size=500)
    agent = getattr(module, kind)(args, 3, 1, cpu)
    replay = module.Replay(args, cpu, module.MujocoEnvs("Pendulum-v1", 1, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        agent.update(*replay.sample(32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gap", [-1.0, 1.0])
def test_cql_never_waits_for_the_device(cql: ModuleType, gap: float, precision: str) -> None:
    args, cpu = cql.Args(precision=precision, cql_gap=gap), torch.device("cpu")
    rows = [np.zeros((40, n), np.float32) for n in (3, 1, 3)]
    data = cql.Data(
        rows[0], rows[1], np.zeros(40, np.float32), rows[2], np.zeros(40, bool), np.zeros(40, bool)
    )
    dataset = cql.Dataset(data, cql.MujocoEnvs("Pendulum-v1", 1, 0), args, cpu)
    agent = cql.CQL(args, 3, 1, cpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        agent.update(*dataset.sample(32))
