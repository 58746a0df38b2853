"""Tests of the shared blocks `sparsity` and `pruning`, through eaudeqn_atari.py, and of the
networks.

Masks are compared with a slow implementation of another kind: sorted (magnitude, index) pairs, and
an Erdos-Renyi-Kernel rule that is solved by bisection. Torsos are compared with convolutions and
pools that pad by hand.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

SPARSITIES = (0.0, 0.3, 0.8, 0.95, 0.99)
NATURE = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 7744), (18, 512)]


def impala_shapes(width: int) -> list[tuple[int, ...]]:
    """Return the shapes of the Impala network's weights: per stack an entry convolution and four in
    two blocks.
    """
    shapes: list[tuple[int, ...]] = []
    for c_in, c in ((4, 16 * width), (16 * width, 32 * width), (32 * width, 32 * width)):
        shapes += [(c, c_in, 3, 3)] + 4 * [(c, c, 3, 3)]
    return [*shapes, (512, 11 * 11 * 32 * width), (18, 512)]


def slow_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Bisect on eps until the densities min(1, eps * sum(shape) / prod(shape)) leave the wanted
    number of weights.
    """
    sizes, ratios = [math.prod(s) for s in shapes], [sum(s) / math.prod(s) for s in shapes]
    low, high = 0.0, 2 / min(ratios)
    for _ in range(200):
        middle = (low + high) / 2
        left = sum(n * min(1.0, middle * r) for n, r in zip(sizes, ratios))
        low, high = (middle, high) if left < (1 - sparsity) * sum(sizes) else (low, middle)
    return [min(1.0, high * r) for r in ratios]


def slow_masks(
    weights: list[Tensor], parents: list[Tensor], densities: list[float]
) -> list[list[bool]]:
    """Sort (magnitude, index) of all that the parents kept and take from the top."""
    masks = []
    for weight, parent, density in zip(weights, parents, densities):
        values, kept = weight.flatten().tolist(), parent.flatten().tolist()
        ranked = sorted((-abs(value), j) for j, value in enumerate(values) if kept[j])
        taken = {j for _, j in ranked[: max(1, round(len(values) * density))]}
        masks.append([j in taken for j in range(len(values))])
    return masks


def network_of(module: ModuleType, weights: list[Tensor], parents: list[Tensor] = []) -> nn.Module:  # noqa: B006
    """Return a network with these weights, masked by the parents."""
    network = nn.Module()
    for i, weight in enumerate(weights):
        network.register_parameter(f"w{i}", nn.Parameter(weight.clone()))
    module.add_masks(network)
    for mask, parent in zip(network.buffers(), parents):
        mask.copy_(parent)
    return network


RNG = np.random.default_rng(0)


def pruned(
    module: ModuleType,
    weights: list[Tensor],
    densities: list[float],
    parents: list[Tensor] = [],  # noqa: B006
) -> list[Tensor]:
    """Return the bool masks of a network after prune(), which must leave the weights alone."""
    network = network_of(module, weights, parents)
    module.prune(network, densities, RNG)
    masks = [mask.bool() for mask in network.buffers()]
    assert all(torch.equal(p.detach(), w) for p, w in zip(network.parameters(), weights))
    return masks


def erk(module: ModuleType, shapes: list[Any], sparsity: float) -> list[float]:
    """Return the densities of a network of these shapes."""
    network = nn.Module()
    with torch.device("meta"):
        for i, shape in enumerate(shapes):
            network.register_parameter(f"w{i}", nn.Parameter(torch.empty(shape)))
    densities: list[float] = module.erk_densities(network, sparsity)
    return densities


def ones(weights: list[Tensor]) -> list[Tensor]:
    return [torch.ones(w.shape, dtype=torch.bool) for w in weights]


def flat(masks: list[Tensor]) -> list[list[bool]]:
    return [mask.flatten().tolist() for mask in masks]


# Masks


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_of_the_cnn(eaudeqn: ModuleType, sparsity: float) -> None:
    torch.manual_seed(3)
    network = eaudeqn.QNetwork(18, eaudeqn.Args(feature_size=8))
    weights = [w.detach() for w in eaudeqn.prunable(network).values()]
    densities = erk(eaudeqn, [w.shape for w in weights], sparsity)
    masks = pruned(eaudeqn, weights, densities)
    assert [m.shape for m in masks] == [w.shape for w in weights]
    assert flat(masks) == slow_masks(weights, ones(weights), densities)
    left = sum(int(mask.sum()) for mask in masks)
    assert abs(left - (1 - sparsity) * sum(w.numel() for w in weights)) <= 2.5


def made_up(seed: int) -> list[Tensor]:
    """Return small integer weights, most of which occur many times and with both signs."""
    rng = np.random.default_rng(seed)
    shapes = [(3, 2, 3, 3), (7, 11), (5, 1), (13, 6), (2, 2)]
    return [torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_with_ties(eaudeqn: ModuleType, sparsity: float) -> None:
    for seed in range(20):
        weights = made_up(seed)
        for densities in (
            [1 - sparsity] * 5,
            erk(eaudeqn, [w.shape for w in weights], sparsity),
        ):
            masks = pruned(eaudeqn, weights, densities)
            assert flat(masks) == slow_masks(weights, ones(weights), densities)
            assert all(m.any() for m in masks)


def test_masks_nest(eaudeqn: ModuleType) -> None:
    """Generation after generation, with weights that change as in learning, nothing that was pruned
    comes back.
    """
    rng = np.random.default_rng(0)
    weights = made_up(99)
    masks = ones(weights)
    for sparsity in (0.1, 0.11, 0.3, 0.55, 0.8, 0.95, 0.99, 1.0):
        parents = masks
        # The pruned weights grow, those that are left shrink, some to exactly 0: still only the
        # latter may be kept.
        weights = [
            torch.from_numpy(rng.integers(-2, 3, w.shape).astype(np.float32)) for w in weights
        ]
        weights = [torch.where(m, w, w + 50) for w, m in zip(weights, parents)]
        densities = [1 - sparsity] * len(weights)
        masks = pruned(eaudeqn, weights, densities, parents)
        assert flat(masks) == slow_masks(weights, parents, densities)
        assert not any((m & ~p).any() for m, p in zip(masks, parents))
        assert all(m.any() for m in masks)


def test_kept_zeros_go_before_pruned_weights(eaudeqn: ModuleType) -> None:
    weights = [torch.tensor([[0.0, 5.0, 0.0, -0.0, 0.0, -7.0]])]
    parents = [torch.tensor([[True, False, True, True, True, False]])]
    masks = pruned(eaudeqn, weights, [0.5], parents)  # the lower indices of the four zeros
    assert flat(masks) == [[True, False, True, True, False, False]]


def test_masks_by_hand(eaudeqn: ModuleType) -> None:
    weights = [
        torch.tensor([[1.0, -4.0], [4.0, 2.0]]),
        torch.tensor([[-9.0, 8.0, 7.0, 6.0, -5.0, 4.0]]),
    ]
    masks = pruned(eaudeqn, weights, [0.5, 0.5])  # 2 of 4 and 3 of 6
    assert flat(masks) == [[False, True, True, False], [True, True, True, False, False, False]]
    # erk 0.4: sums 4 and 7, 6 to keep, eps = 6 / 11: 2.18 of 4 and 3.82 of 6.
    masks = pruned(eaudeqn, weights, erk(eaudeqn, [(2, 2), (1, 6)], 0.4))
    assert flat(masks) == [[False, True, True, False], [True, True, True, True, False, False]]


def test_everything_and_nothing(eaudeqn: ModuleType) -> None:
    weights = made_up(5)
    assert flat(pruned(eaudeqn, weights, [1.0] * 5)) == flat(ones(weights))
    masks = pruned(eaudeqn, weights, [0.0] * 5)
    assert [int(m.sum()) for m in masks] == [1] * 5
    for weight, mask in zip(weights, masks):
        largest = weight.abs().flatten().tolist().index(float(weight.abs().max()))
        assert int(mask.flatten().nonzero()) == largest


def test_masks_of_channels_last_weights(eaudeqn: ModuleType) -> None:
    """The flat index is that of the shape, however the tensor lies in memory."""
    weights = [torch.tensor([2.0, -2.0, 2.0, 1.0] * 18).view(2, 4, 3, 3)]
    network = network_of(eaudeqn, weights)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert next(network.parameters()).stride() != weights[0].stride()
    eaudeqn.prune(network, [0.4], RNG)
    masks = [mask.bool() for mask in network.buffers()]
    assert flat(masks) == slow_masks(weights, ones(weights), [0.4])


def test_any_score_may_take_the_place_of_the_magnitude(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed, and drawn from the generator that it is given; what is pruned stays so whatever its
    score.
    """
    weights = [torch.tensor([[3.0, -1.0, 2.0, -5.0, 4.0]])]
    parents = [torch.tensor([[True, True, True, True, False]])]

    def signed(network: nn.Module, rng: np.random.Generator) -> list[Tensor]:
        return [p.detach() for p in network.parameters()]

    monkeypatch.setattr(eaudeqn, "pruning_scores", signed)
    masks = pruned(eaudeqn, weights, [0.6], parents)
    assert flat(masks) == [[True, True, True, False, False]]

    def drawn(network: nn.Module, rng: np.random.Generator) -> list[Tensor]:
        return [torch.from_numpy(rng.random(p.shape)) for p in network.parameters()]

    monkeypatch.setattr(eaudeqn, "pruning_scores", drawn)
    results = []
    for seed in (1, 1, 2):
        network = network_of(eaudeqn, [torch.ones(4, 50)])
        eaudeqn.prune(network, [0.5], np.random.default_rng(seed))
        results.append(flat([mask.bool() for mask in network.buffers()]))
    assert results[0] == results[1] != results[2]


# Erdos-Renyi-Kernel


def test_erk_by_hand(eaudeqn: ModuleType) -> None:
    # Two tensors: sums 5 and 9, sizes 6 and 20. Half of 26 weights is 13; eps = 13 / 14.
    densities = erk(eaudeqn, [(2, 3), (4, 5)], 0.5)
    assert densities == pytest.approx([13 / 14 * 5 / 6, 13 / 14 * 9 / 20])
    # A quarter less: 19.5 / 14 * 5 = 6.96 of 6, so the first is dense and the second holds the
    # other 13.5 of 20.
    assert erk(eaudeqn, [(2, 3), (4, 5)], 0.25) == pytest.approx([1, 13.5 / 20])
    # Kernel dimensions count: sums 2 + 2 + 3 + 3 = 10 and 20, sizes 36 and 100; 10 % is 13.6, eps =
    # 13.6 / 30.
    densities = erk(eaudeqn, [(2, 2, 3, 3), (10, 10)], 0.9)
    assert densities == pytest.approx([13.6 / 3 / 36, 13.6 * 2 / 3 / 100])


def test_erk_is_solved_again_more_than_once(eaudeqn: ModuleType) -> None:
    """With the first tensor dense, the second exceeds 1 in its turn."""
    shapes = [(1, 1), (4, 5), (100, 100)]
    # 30 % of 10,021 is 3006.3; eps = 3006.3 / 211 = 14.2: 28 of 1 and 128 of 20. Both are dense;
    # left 2985.3 of 10,000.
    assert erk(eaudeqn, shapes, 0.7) == pytest.approx([1, 1, 0.29853])
    # Sums 2, 4, 29; sizes 1, 3, 100; 21 to keep. eps = 21 / 35: 1.2 of 1, 2.4 of 3. Then 20 / 33:
    # 2.42, 17.6.
    shapes = [(1, 1), (1, 3), (4, 25)]
    assert erk(eaudeqn, shapes, 1 - 21 / 104) == pytest.approx(
        [1, 20 / 33 * 4 / 3, 20 / 33 * 29 / 100]
    )
    # 26 to keep: eps = 26 / 35: 1.5 of 1, 2.97 of 3 (not yet dense). Then 25 / 33: 3.03 of 3. The
    # third holds 22.
    assert erk(eaudeqn, shapes, 1 - 26 / 104) == pytest.approx([1, 1, 0.22])


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 1.0])
def test_erk_against_bisection(eaudeqn: ModuleType, sparsity: float) -> None:
    for shapes in (
        NATURE,
        impala_shapes(1),
        impala_shapes(3),
        [(2, 3), (4, 5), (300, 1), (6, 7, 1, 2)],
    ):
        densities = erk(eaudeqn, shapes, sparsity)
        assert densities == pytest.approx(slow_densities(shapes, sparsity), abs=1e-9)
        total = sum(d * math.prod(s) for d, s in zip(densities, shapes))
        assert total == pytest.approx((1 - sparsity) * sum(map(math.prod, shapes)), abs=1e-6)


def test_erk_of_the_papers_networks(dqn: ModuleType) -> None:
    """The sparsities per layer at 0.95 and 18 actions that specs/gmp.md lists."""

    def sparsities(network: str, width: int) -> list[float]:
        with torch.device("meta"):
            q_network = dqn.QNetwork(18, dqn.Args(network=network, width=width))
        shapes = [tuple(w.shape) for w in dqn.prunable(q_network).values()]
        assert shapes == (NATURE if network == "cnn" else impala_shapes(width))
        return [1 - d for d in dqn.erk_densities(q_network, 0.95)]

    assert sparsities("cnn", 1) == pytest.approx([0.856, 0.928, 0.918, 0.953, 0], abs=0.0006)
    one, three = sparsities("impala", 1), sparsities("impala", 3)
    assert one == pytest.approx(
        [0.18, *[0.70] * 4, 0.79, *[0.86] * 4, 0.86, *[0.86] * 4, 0.960, 0], abs=0.006
    )
    expected = [0.23, *[0.89] * 4, 0.917, *[0.945] * 4, 0.945, *[0.945] * 4, 0.953, 0]
    assert three == pytest.approx(expected, abs=0.006)
    assert three[5:] == pytest.approx(expected[5:], abs=0.0006)


# What is pruned, and the report


def test_prunable(eaudeqn: ModuleType, dqn: ModuleType) -> None:
    """All matrices and kernels, the first and the last included; no bias."""
    names = ["conv1", "conv2", "conv3", "dense", "output"]
    network = eaudeqn.QNetwork(6, eaudeqn.Args(feature_size=8))
    assert list(eaudeqn.prunable(network)) == names
    assert eaudeqn.prunable(network)["dense"] is network.dense.weight
    parameters = {id(p): name for name, p in network.named_parameters()}
    left = parameters.keys() - {id(p) for p in eaudeqn.prunable(network).values()}
    assert sorted(parameters[i] for i in left) == sorted(f"{name}.bias" for name in names)

    impala = dqn.prunable(dqn.QNetwork(6, dqn.Args(network="impala", feature_size=8)))
    assert len(impala) == 17 and all(w.ndim >= 2 for w in impala.values())


def test_report_of_a_hand_made_network(eaudeqn: ModuleType) -> None:
    network = nn.Sequential(
        OrderedDict(first=nn.Conv2d(1, 2, 2), last=nn.Linear(3, 4))
    )  # 8 + 2 and 12 + 4 parameters
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(0.5)
        network.first.weight[0] = 0  # 4 of 8
        network.last.weight[2, 1] = -0.0  # 1 of 12
        network.last.bias.zero_()  # biases are never pruned, so that their zeros do not count
    wanted = {
        "prunable": 5 / 20,
        "total": 5 / 26,
        "active_params": 21,
        "layer/first": 0.5,
        "layer/last": 1 / 12,
    }
    report = eaudeqn.sparsity_report(network)
    assert report == pytest.approx({f"sparsity/{key}": value for key, value in wanted.items()})


# Networks


def same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return XLA's SAME padding before and after, for an output of ceil(size / stride)."""
    total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def padded(x: np.ndarray, kernel: int, stride: int, value: float) -> np.ndarray:
    pads = same(x.shape[-1], kernel, stride)
    return np.pad(x, ((0, 0), pads, pads), constant_values=value)


def slow_conv(x: np.ndarray, layer: nn.Conv2d, kernel: int, stride: int) -> np.ndarray:
    """Convolve x [C, H, H] window by window."""
    weight, bias = (p.detach().numpy() for p in layer.parameters())
    size, x = math.ceil(x.shape[-1] / stride), padded(x, kernel, stride, 0)
    out = np.empty((len(weight), size, size))
    for i in range(size):
        for j in range(size):
            window = x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            out[:, i, j] = np.tensordot(weight, window, 3) + bias
    return out


def slow_pool(x: np.ndarray) -> np.ndarray:
    """Take the maximum of 3x3 windows, two apart."""
    size, x = math.ceil(x.shape[-1] / 2), padded(x, 3, 2, -np.inf)
    return np.array(
        [
            [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(size)]
            for i in range(size)
        ]
    ).transpose(2, 0, 1)


def test_same_padding() -> None:
    """The reference itself, against the numbers of specs/gmp.md."""
    assert same(84, 8, 4) == (2, 2) and same(21, 4, 2) == (1, 2) and same(11, 3, 1) == (1, 1)
    assert same(84, 3, 2) == (0, 1) and same(42, 3, 2) == (0, 1) and same(21, 3, 2) == (1, 1)


def with_biases(network: nn.Module) -> nn.Module:
    """Give the biases values, so that a missing one shows."""
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p.uniform_(-0.5, 0.5)
    return network.double()


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def slow_head(x: np.ndarray, network: nn.Module) -> np.ndarray:
    """Apply the dense layers to features [C, H, H], whose flat order is row, column, channel."""
    dense, output = (
        [p.detach().numpy() for p in layer.parameters()]
        for layer in (network.dense, network.output)
    )
    hidden = (dense[0] @ x.transpose(1, 2, 0).ravel() + dense[1]).clip(0)
    return output[0] @ hidden + output[1]


def args_of(module: ModuleType, network: str, **flags: int) -> Any:
    """Return flags; of a script with one network only the CNN's can be asked for."""
    if module.__name__ == "eaudeqn_atari":
        assert network == "cnn"
        return module.Args(**flags)
    return module.Args(network=network, **flags)


@pytest.mark.parametrize("name", ["eaudeqn", "dqn"])
def test_cnn_is_padded_same(name: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    torch.manual_seed(0)
    network = with_biases(module.QNetwork(3, args_of(module, "cnn", feature_size=5)))
    obs = torch.rand(1, 4, 84, 84, dtype=torch.float64)
    conv1, conv2, conv3 = convolutions(network)
    x = slow_conv(obs[0].numpy(), conv1, 8, 4).clip(0)
    assert x.shape == (32, 21, 21)
    x = slow_conv(x, conv2, 4, 2).clip(0)
    assert x.shape == (64, 11, 11)
    x = slow_conv(x, conv3, 3, 1).clip(0)
    assert np.abs(network(obs)[0].detach().numpy() - slow_head(x, network)).max() < 1e-12


def test_impala_is_padded_same(dqn: ModuleType) -> None:
    torch.manual_seed(0)
    network = with_biases(dqn.QNetwork(3, args_of(dqn, "impala", feature_size=5)))
    obs = torch.rand(1, 4, 84, 84, dtype=torch.float64) - 0.5
    layers = iter(convolutions(network))
    x = obs[0].numpy()
    for channels, size in ((16, 42), (32, 21), (32, 11)):
        x = slow_pool(slow_conv(x, next(layers), 3, 1))
        assert x.shape == (channels, size, size)
        for _ in range(2):
            x = x + slow_conv(slow_conv(x.clip(0), next(layers), 3, 1).clip(0), next(layers), 3, 1)
    assert next(layers, None) is None
    wanted = slow_head(x.clip(0), network)
    assert np.abs(network(obs)[0].detach().numpy() - wanted).max() < 1e-12


@pytest.mark.parametrize(
    ("network", "width", "channels"), [("cnn", 1, 64), ("cnn", 2, 128), ("impala", 2, 64)]
)
def test_widths(dqn: ModuleType, network: str, width: int, channels: int) -> None:
    q_network = dqn.QNetwork(4, args_of(dqn, network, feature_size=8, width=width))
    # The width leaves the dense layer's units alone.
    assert q_network.dense.weight.shape == (8, 121 * channels)
    assert q_network(torch.zeros(2, 4, 84, 84)).shape == (2, 4)


def test_parameter_counts(eaudeqn: ModuleType, dqn: ModuleType) -> None:
    def count(network: str, width: int) -> int:
        with torch.device("meta"):
            q_network = dqn.QNetwork(18, args_of(dqn, network, width=width))
        return sum(p.numel() for p in q_network.parameters())

    # 8,224 + 32,832 + 36,928 convolutions, 3,965,440 dense, 9,234 output.
    assert count("cnn", 1) == 4_052_658
    own = eaudeqn.QNetwork(18, eaudeqn.Args())
    assert sum(p.numel() for p in own.parameters()) == 4_052_658
    # 592 + 4 * 2,320, 4,640 + 4 * 9,248, 9,248 + 4 * 9,248, dense 1,982,976, output 9,234.
    assert count("impala", 1) == 2_089_954
    # 48 and 96 channels: 1,776 + 4 * 20,784, 41,568 + 4 * 83,040, 83,040 + 4 * 83,040, dense
    # 5,947,904, output 9,234.
    assert count("impala", 3) == 6_830_978


@pytest.mark.parametrize(
    ("name", "network"), [("eaudeqn", "cnn"), ("dqn", "cnn"), ("dqn", "impala")]
)
def test_initialisation(name: str, network: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(name)
    torch.manual_seed(0)
    q_network = module.QNetwork(18, args_of(module, network, feature_size=64))
    blocks = 0
    for name, p in q_network.named_parameters():
        if p.ndim == 1:
            assert not p.any(), name
            continue
        window = p[0, 0].numel()  # 1 of a matrix
        fan_in, fan_out = p.shape[1] * window, p.shape[0] * window
        std = float(p.detach().std())
        if "block" in name:  # LeCun normal, cut off at two standard deviations of the uncut one
            blocks += 1
            wanted, bound = math.sqrt(1 / fan_in), 2.274 * math.sqrt(1 / fan_in)
        else:  # Xavier uniform
            wanted, bound = math.sqrt(2 / (fan_in + fan_out)), math.sqrt(6 / (fan_in + fan_out))
        assert std == pytest.approx(wanted, rel=3 / math.sqrt(2 * p.numel()) + 0.005), name
        assert 0.97 * bound < float(p.detach().abs().max()) <= bound, name
    assert blocks == (12 if network == "impala" else 0)
