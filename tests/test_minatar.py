"""The MinAtar scripts: games against the package's own loop, the replay against a list, the
batched networks against separate ones.

What tests/test_runs.py and tests/test_sparsity.py do with all scripts is not done again.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_script, script_fixture
from minatar import Environment
from torch import nn

GAMES = {
    "Asterix": "asterix",
    "Breakout": "breakout",
    "Freeway": "freeway",
    "Seaquest": "seaquest",
    "SpaceInvaders": "space_invaders",
}
CPU = torch.device("cpu")

eau = script_fixture("eaudeqn_minatar")
gmp = script_fixture("dqn_minatar_gmp")


@pytest.mark.parametrize(
    "game",  # an episode of Freeway has 2,500 steps
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "Freeway")) for name in GAMES],
)
def test_a_game_is_the_packages_own(eau: ModuleType, game: str) -> None:
    """200 random episodes: what is seen, got and ended; the wrapper goes on by itself."""
    ours = eau.Game(f"MinAtar/{game}-v1", (7, 0))
    env = Environment(GAMES[game], sticky_action_prob=0.1, difficulty_ramping=True)
    env.seed((7, 0))
    rng = np.random.default_rng(1)
    actions = env.minimal_action_set()
    assert ours.title == game
    for _ in range(200):
        env.reset()
        score, length, terminated = 0.0, 0, False
        while not terminated:
            assert np.array_equal(ours.obs, np.moveaxis(env.state(), 2, 0))
            action = int(rng.integers(len(actions)))
            reward, terminated = env.act(actions[action])
            assert ours.step(action) == (reward, terminated)
            score, length = score + reward, length + 1
            assert ours.episodes == ([(score, length)] if terminated else [])


def test_a_game_has_many_names_and_a_wrong_one_is_refused(
    eau: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SpaceInvaders", "space_invaders", "MinAtar/SpaceInvaders-v0"):
        assert eau.Game(name, (1, 0)).title == "SpaceInvaders"
    with pytest.raises(SystemExit):
        eau.Game("Pong", (1, 0))
    assert "--env-id Pong" in capsys.readouterr().err


def test_without_the_package_one_line_says_what_to_do(
    eau: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(SystemExit) as end:
        eau.Game("Breakout", (1, 0))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.endswith("pip install --no-deps minatar")


@pytest.mark.parametrize("steps", [1, 39, 40, 41, 200])
def test_the_replay_draws_the_last_transitions(eau: ModuleType, steps: int) -> None:
    """Against a list of all of them; 300 cells do not fill their bytes."""
    rng = np.random.default_rng(3)
    args = eau.Args(buffer_size=40)
    seen = [rng.random((3, 10, 10)) < 0.2 for _ in range(steps + 1)]
    facts = [(i % 6, float(rng.integers(-2, 9)), bool(rng.random() < 0.1)) for i in range(steps)]
    replay = eau.PackedReplay(args, CPU, seen[0])
    for i, (action, reward, terminated) in enumerate(facts):
        replay.add(action, reward, terminated, seen[i + 1])
    assert replay.count == min(steps, 40)
    drawn = set()
    obs, next_obs, actions, rewards, terminated = replay.sample(800)
    assert actions.dtype == torch.int64 and obs.dtype == torch.float32
    for b in range(800):
        (i,) = (i for i in range(steps) if np.array_equal(seen[i], obs[..., b].numpy()))
        assert np.array_equal(seen[i + 1], next_obs[..., b].numpy())
        assert (actions[b], rewards[b], terminated[b]) == facts[i]
        drawn.add(i)
    assert drawn == {*range(max(0, steps - 40), steps)}


@pytest.fixture
def double() -> Any:
    """Run a test in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches(count: int, channels: int = 4, actions: int = 3) -> list[tuple[torch.Tensor, ...]]:
    """Return random batches, of the default type."""
    generator, made = torch.Generator().manual_seed(5), []
    for _ in range(count):
        cells = (torch.rand(2, channels, 10, 10, 32, generator=generator) < 0.2) * 1.0
        drawn = torch.randint(actions, (32,), generator=generator)
        rewards = torch.randn(32, generator=generator)
        terminated = (torch.rand(32, generator=generator) < 0.2) * 1.0
        made.append((cells[0], cells[1], drawn, rewards, terminated))
    return made


def plain_network(network: nn.Module) -> nn.Sequential:
    """Return PyTorch's own layers with a network's weights."""
    layers = [copy.deepcopy(layer) for layer in (network.conv, network.dense, network.output)]
    conv, dense, output = layers
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense, nn.ReLU(), output)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, 2])
def test_batched_networks_equal_separate_ones(eau: ModuleType, double: None, width: int) -> None:
    """Three networks of different weights and masks, 20 updates, against plain PyTorch."""
    args = eau.Args(num_networks=3, width=width, feature_size=24, learning_rate=1e-2)
    agent = eau.EauDeQN(args, 4, 3, CPU)
    for k, network in enumerate(agent.online):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.1 * torch.randn_like(p))
            densities = [1 - 0.4 * k] * 3
            eau.prune(network, densities, agent.rng["score"])
            for weight, mask in zip(eau.prunable(network).values(), network.buffers()):
                weight.mul_(mask)
    separate = [plain_network(network) for network in agent.online]
    target = plain_network(agent.target)
    adams = [
        torch.optim.Adam(n.parameters(), args.learning_rate, eps=args.adam_eps) for n in separate
    ]
    masks = [[m.clone() for m in network.buffers()] for network in agent.online]
    total = np.zeros(3)
    for batch in batches(20):
        agent.update(*batch)
        obs, next_obs, actions, rewards, terminated = batch
        with torch.no_grad():
            best = target(next_obs.movedim(-1, 0)).max(1).values
            td_target = torch.where(terminated > 0, rewards, rewards + 0.99 * best)
        for k, (network, adam) in enumerate(zip(separate, adams)):
            q = network(obs.movedim(-1, 0))[torch.arange(32), actions]
            loss = ((q - td_target) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            total[k] += loss.item()
            with torch.no_grad():
                for weight, mask in zip((p for p in network.parameters() if p.ndim > 1), masks[k]):
                    weight[mask == 0] = 0
    for network, reference in zip(agent.online, separate):
        for p, wanted in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.data, wanted.data, rtol=0, atol=1e-10)
    torch.testing.assert_close(agent.accumulated_loss, torch.from_numpy(total), rtol=0, atol=1e-9)


def test_networks_stay_views_of_the_stacked_tensors(eau: ModuleType) -> None:
    """After a target update and a checkpoint too: else updates and pruning would part."""
    agent = eau.EauDeQN(eau.Args(num_networks=3, feature_size=8), 4, 3, CPU)
    for batch in batches(3):
        agent.update(*batch)
    agent.update_target(8000)
    agent.load_state_dict(copy.deepcopy(agent.state_dict()))
    for k, network in enumerate(agent.online):
        for whole, own in zip(agent.stacked, network.parameters(), strict=True):
            assert own.data_ptr() == whole[k].data_ptr() and torch.equal(own, whole[k])
        for whole, own in zip(agent.masks, network.buffers(), strict=True):
            assert own.data_ptr() == whole[k].data_ptr()


def test_one_network_without_resets_is_dense_dqn(eau: ModuleType, gmp: ModuleType) -> None:
    """Bit for bit: weights and actions."""
    one = eau.EauDeQN(eau.Args(num_networks=1, reset_optimizer=False, feature_size=16), 4, 3, CPU)
    dqn = gmp.DQN(gmp.Args(sparsity=0, feature_size=16), 4, 3, CPU)
    rng = np.random.default_rng(2)
    for i, batch in enumerate(batches(40)):
        one.update(*batch)
        dqn.update(*batch)
        if i == 20:
            one.losses = np.ones(1)
            one.update_target(8000)
            dqn.target.load_state_dict(dqn.online.state_dict())
        obs = rng.random((4, 10, 10)) < 0.2
        assert one.act(obs, 0.3) == dqn.act(obs, 0.3)
    for p, q in zip(one.online[0].parameters(), dqn.online.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("reset", [True, False])
def test_a_target_update_resets_what_it_must(eau: ModuleType, reset: bool) -> None:
    """All moments and the step count; without resets those of a network that diverged alone."""
    args = eau.Args(num_networks=3, feature_size=8, reset_optimizer=reset)
    agent = eau.EauDeQN(args, 4, 3, CPU)
    for batch in batches(3):
        agent.update(*batch)
    agent.losses = np.array([2.0, np.nan, 1.0])
    agent.update_target(8000)
    assert agent.selected == 3
    for state in agent.optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert [bool(part.any()) for part in moment] == [not reset, False, not reset]
        assert float(state["step"]) == (0 if reset else 3)


def test_the_control_chooses_the_next_target_at_random(eau: ModuleType) -> None:
    """Among the networks whose loss is finite."""
    args = eau.Args(num_networks=4, feature_size=8, selection="random")
    agent, chosen = eau.EauDeQN(args, 4, 3, CPU), []
    for _ in range(60):
        agent.losses = np.array([1.0, 5.0, np.inf, 9.0])
        agent.update_target(8000)
        chosen.append(agent.selected)
    assert {*chosen} == {1, 2, 4} and min(map(chosen.count, (1, 2, 4))) > 8


@pytest.mark.parametrize(
    ("behaviour", "shares"),
    [
        ("inverse-loss", [0.8, 0.2, 0, 0]),
        ("uniform", [1 / 3, 1 / 3, 0, 1 / 3]),
        ("argmin", [1, 0, 0, 0]),
    ],
)
def test_which_network_acts(eau: ModuleType, behaviour: str, shares: list[float]) -> None:
    """Network k prefers action k; the last loss is so large that it hardly ever acts."""
    args = eau.Args(num_networks=4, feature_size=8, behaviour=behaviour)
    agent = eau.EauDeQN(args, 4, 4, CPU)
    for k, network in enumerate(agent.online):
        with torch.no_grad():
            network.output.weight.zero_()
            network.output.bias[k] = 1
    agent.accumulated_loss.copy_(torch.tensor([1.0, 4.0, np.nan, 1e30]))
    agent.read_losses()
    obs = np.zeros((4, 10, 10), bool)
    actions = [agent.act(obs, 0.0) for _ in range(3000)]
    assert np.bincount(actions, minlength=4) / 3000 == pytest.approx(shares, abs=0.03)


def test_the_greedy_action_is_that_of_the_largest_q_value(gmp: ModuleType) -> None:
    """Also after the weights have changed in place."""
    network = gmp.QNetwork(6, 5, gmp.Args(width=2, feature_size=24))
    rng = np.random.default_rng(3)
    for _ in range(2):
        for p in network.parameters():
            p.data.normal_()
        states = rng.random((200, 6, 10, 10)) < 0.3
        q = network(torch.from_numpy(states).permute(1, 2, 3, 0).float())  # [A, B]
        assert [gmp.greedy(network, obs) for obs in states] == q.argmax(0).tolist()


def test_both_scripts_evaluate_the_same_game(eau: ModuleType) -> None:
    """An episode ends at --eval-steps; games and exploration have seeds of their own."""
    script = load_script("dqn_minatar_gmp")
    args = script.Args(env_id="Freeway", eval_episodes=2, eval_steps=30, feature_size=8)
    torch.manual_seed(1)
    network = script.QNetwork(7, 3, args)

    class Folder:
        """What evaluate() asks of a run."""

        stops: tuple[int, ...] = ()
        path = "run"

    Folder.args = args  # type: ignore[attr-defined]
    scores = [module.evaluate(network, Folder) for module in (script, eau)]
    assert scores[0] == scores[1] and scores[0]["eval/episodes"] == 2
