"""What a CUDA graph needs can be checked without a GPU: sampling and update never read a value on the host."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode


def test_sample_and_update_never_wait_for_the_device(eaudeqn: ModuleType) -> None:
    """Fake tensors have shapes but no values: any .item(), nonzero() or boolean index would raise."""
    agent = eaudeqn.EauDeQN(eaudeqn.Args(num_networks=2, feature_size=16), 4, torch.device("cpu"))
    replay = eaudeqn.FrameReplay(500, 1, torch.device("cpu"), 1, 0.99)
    replay.see(np.zeros((1, 84, 84), np.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = replay.sample(32)
        assert batch.obs.shape == (32, 4, 84, 84)
        agent.update(batch)
        with pytest.raises(DataDependentOutputException):
            agent.accumulated_loss.add(1).sum().item()  # the net is not torn
