"""Tests of the shared blocks `frame-replay` and `atari-env`, through eaudeqn_atari.py, and of
n-step returns.

The replay is compared with a list that keeps whole stacks, over every transition that may be
sampled, and with what the real game showed. The environments are compared with themselves,
interrupted and not, and with ale-py used by hand.
"""

from __future__ import annotations

import inspect
import io
import itertools
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv
from conftest import load_script

CPU = torch.device("cpu")
SHAPE = (2, 2)
GAMMA = 0.75


# The slow reference


class Transition(NamedTuple):
    """What the replay should give back."""

    obs: np.ndarray
    next_obs: np.ndarray
    action: int
    reward: float
    discount: float  # of the value of next_obs
    ended: bool


class World:
    """N made-up environments whose frames are all different; it keeps every transition with whole
    stacks.
    """

    def __init__(self, num_envs: int, seed: int, longest: int = 12) -> None:
        self.num_envs, self.longest = num_envs, longest
        self.rng = np.random.default_rng(seed)
        self.frames = self.endings = self.truncations = 0
        self.stacks = [self.begin() for _ in range(num_envs)]
        self.left = np.array([self.length() for _ in range(num_envs)])
        self.capped = self.left == longest
        self.steps: list[list[Transition]] = []  # by step and environment

    def length(self) -> int:
        """Draw an episode's length; half of them reach the cap and are truncated there."""
        return (
            self.longest
            if self.rng.random() < 0.5
            else int(self.rng.integers(1, max(2, self.longest)))
        )

    def frame(self) -> np.ndarray:
        """Return a frame that holds its own number, from 1."""
        self.frames += 1
        return np.array([self.frames], np.uint32).view(np.uint8).reshape(SHAPE)

    def begin(self) -> list[np.ndarray]:
        return [np.zeros(SHAPE, np.uint8)] * 3 + [self.frame()]

    def now(self) -> np.ndarray:
        return np.array([stack[-1] for stack in self.stacks])

    def step(self) -> tuple[np.ndarray, Any, np.ndarray]:
        """Let every environment make a random step; return the arguments of FrameReplay.add()."""
        actions = self.rng.integers(0, 18, self.num_envs)
        rewards = self.rng.integers(-3, 4, self.num_envs).astype(np.float64)
        self.left -= 1
        ended = self.left == 0
        terminated = ended & ~self.capped
        last_frames, row = [], []
        for i in range(self.num_envs):
            after = [*self.stacks[i][1:], self.frame()]
            obs, reward = np.array(self.stacks[i]), min(1.0, max(-1.0, float(rewards[i])))
            discount = 0.0 if terminated[i] else GAMMA
            row.append(
                Transition(obs, np.array(after), int(actions[i]), reward, discount, bool(ended[i]))
            )
            last_frames.append(after[-1])
            self.stacks[i] = after
            if ended[i]:
                self.stacks[i] = self.begin()
                self.endings += 1
                self.truncations += int(self.capped[i])
                self.left[i] = self.length()
                self.capped[i] = self.left[i] == self.longest
        self.steps.append(row)
        step = (rewards, terminated, ended & ~terminated, np.array(last_frames))
        return actions, step, self.now()

    def window(self, capacity: int, n_step: int = 1) -> list[Transition]:
        """Return the transitions of n steps that the replay should still have."""
        starts = range(len(self.steps) - n_step + 1)[-(-capacity // self.num_envs) * -1 :]
        return [self.over(start, i, n_step) for start in starts for i in range(self.num_envs)]

    def over(self, start: int, i: int, n_step: int) -> Transition:
        """Walk n steps, or to the episode's end."""
        first = last = self.steps[start][i]
        reward, discount = first.reward, 1.0
        for k in range(1, n_step):
            if last.ended:
                break
            last, discount = self.steps[start + k][i], discount * GAMMA
            reward += discount * last.reward
        discount *= last.discount
        return first._replace(
            next_obs=last.next_obs, reward=reward, discount=discount, ended=last.ended
        )


def replay_of(
    module: ModuleType, world: World, capacity: int, seed: int = 0, n_step: int = 1
) -> Any:
    flags = {"n_step": n_step} if n_step > 1 else {}
    kind = type("Short", (module.FrameReplay,), {"EPISODE": world.longest})
    args = module.Args(
        buffer_size=capacity, num_envs=world.num_envs, batch_size=1, gamma=GAMMA, seed=seed, **flags
    )
    return kind(args, CPU, world.now())


class Batch(NamedTuple):
    """What sample() returns, in one form for scripts with and without n-step returns."""

    obs: np.ndarray  # [B, 4, H, W] uint8
    next_obs: np.ndarray
    actions: np.ndarray  # [B]
    rewards: np.ndarray
    discounts: np.ndarray  # of the value of next_obs


def sample(replay: Any, size: int) -> Batch:
    """Sample, with the floats in [0, 1] made bytes again."""
    obs, next_obs, actions, rewards, last = replay.sample(size)
    for frames in (obs, next_obs):
        assert frames.dtype == torch.float32
        assert torch.equal(frames, (frames * 255).round().div(255)), "bytes / 255"
    assert actions.dtype == torch.int64
    discounts = last if last.is_floating_point() else GAMMA * (1 - last)
    frames = [(f * 255).round().to(torch.uint8).contiguous().numpy() for f in (obs, next_obs)]
    return Batch(*frames, actions.numpy(), rewards.numpy(), discounts.numpy())


def everything(replay: Any) -> Batch:
    """Return every transition that may be sampled, oldest first, by drawing evenly from [0, 1)."""

    def evenly(count: int, **_: Any) -> torch.Tensor:
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count

    with mock.patch.object(torch, "rand", evenly):
        return sample(replay, replay.count)


def assert_same(batch: Batch, transitions: list[Transition]) -> None:
    assert len(batch.obs) == len(transitions)
    obs, next_obs, actions, rewards, discounts, _ = map(np.array, zip(*transitions))
    terminated = discounts == 0
    assert np.array_equal(batch.obs, obs) and np.array_equal(batch.actions, actions)
    # Of no meaning after a terminal step.
    assert np.array_equal(batch.next_obs[~terminated], next_obs[~terminated])
    assert np.array_equal(batch.rewards, rewards)  # exact in binary, as the discounts are
    assert np.array_equal(batch.discounts, discounts)


def check(replay: Any, world: World, capacity: int, n_step: int = 1) -> None:
    window = world.window(capacity, n_step)
    assert replay.count == len(window)
    if window:
        assert_same(everything(replay), window)


# The replay against the reference


SIZES = [(40, 1), (7, 1), (61, 3), (9, 3), (200, 8)]
MANY = [("eaudeqn", 1), *(("dqn", n_step) for n_step in (1, 2, 3, 5))]


@pytest.mark.parametrize(("name", "n_step"), MANY)
@pytest.mark.parametrize(("capacity", "num_envs"), SIZES)
def test_every_transition(
    name: str, capacity: int, num_envs: int, n_step: int, request: pytest.FixtureRequest
) -> None:
    """Many small episodes, checked after every step: before the ring is full, at its seam, and many
    rounds later.
    """
    module = request.getfixturevalue(name)
    for seed in range(3):
        world = World(num_envs, seed)
        replay = replay_of(module, world, capacity, n_step=n_step)
        check(replay, world, capacity, n_step)
        for _ in range(12 * replay.rows + 5):
            replay.add(*world.step())
            check(replay, world, capacity, n_step)
        assert world.endings > world.truncations > 3


def test_truncations_as_often_as_can_be(eaudeqn: ModuleType) -> None:
    """Every environment is truncated every few steps, all in the same one: the ring of last frames
    is long enough.
    """
    for capacity, num_envs, longest in ((100, 1, 3), (99, 3, 2), (300, 4, 5), (300, 2, 1)):
        world = World(num_envs, 7, longest)
        world.length = lambda longest=longest: longest  # type: ignore[method-assign]
        world.left[:], world.capped[:] = longest, True
        replay = replay_of(eaudeqn, world, capacity)
        for _ in range(4 * replay.rows):
            replay.add(*world.step())
            check(replay, world, capacity)
        assert world.endings == world.truncations == 4 * replay.rows // longest * num_envs


def test_every_episode_under_n_steps(dqn: ModuleType) -> None:
    """All ways in which six steps may end, by termination or truncation: 3 ** 6 worlds, over 3
    steps each.
    """
    for ends in itertools.product((None, True, False), repeat=6):
        world = World(1, 0, longest=1)
        replay = replay_of(dqn, world, 3, n_step=3)
        for terminates in ends:
            world.left[:] = 99 if terminates is None else 1
            world.capped[:] = terminates is False
            replay.add(*world.step())
        assert replay.count == 3
        check(replay, world, 3, n_step=3)


def test_episodes_that_fill_the_ring(eaudeqn: ModuleType) -> None:
    """One episode without an end, longer than the ring: no stack is cut but at its start."""
    world = World(2, 0, 10**6)
    replay = replay_of(eaudeqn, world, 30)
    for _ in range(100):
        replay.add(*world.step())
        check(replay, world, 30)
    assert not world.endings and replay.count == 30


def test_many_environments(eaudeqn: ModuleType) -> None:
    """A stack's distance in slots is past what a byte holds."""
    world = World(100, 0)
    replay = replay_of(eaudeqn, world, 20_000)
    for _ in range(12):
        replay.add(*world.step())
    check(replay, world, 20_000)


def numbers(batch: Batch) -> np.ndarray:
    """Return the number of each transition's newest frame."""
    newest = np.ascontiguousarray(batch.obs[:, 3])
    return newest.reshape(len(batch.obs), 4).view(np.uint32)[:, 0]


def test_samples_are_uniform(eaudeqn: ModuleType) -> None:
    """Chi-squared over all transitions: nothing outside the window is drawn, nothing inside is left
    out.
    """
    for capacity, num_envs, steps, seed in (
        (50, 1, 173, 0),
        (60, 3, 70, 1),
        (50, 1, 11, 2),
        (300, 1, 250, 3),
    ):
        world = World(num_envs, seed)
        replay = replay_of(eaudeqn, world, capacity, seed)
        for _ in range(steps):
            replay.add(*world.step())
        frames = numbers(everything(replay))
        size, draws = len(frames), 100_000
        assert len(set(frames)) == size == len(world.window(capacity))
        seen, counts = np.unique(numbers(sample(replay, draws)), return_counts=True)
        assert set(seen) == set(frames)
        expected = draws / size
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        # Its mean is size - 1, its variance 2 (size - 1).
        assert abs(chi_squared - (size - 1)) < 5 * (2 * (size - 1)) ** 0.5


def test_a_sampled_transition_is_whole(eaudeqn: ModuleType) -> None:
    """Its parts belong together."""
    world = World(3, 4)
    replay = replay_of(eaudeqn, world, 90)
    for _ in range(80):
        replay.add(*world.step())
    by_frame = {t.obs[3].tobytes(): t for t in world.window(90)}
    batch = sample(replay, 32)
    assert_same(batch, [by_frame[obs[3].tobytes()] for obs in batch.obs])


def test_samples_repeat_with_the_seed(eaudeqn: ModuleType) -> None:
    drawn = []
    for seed in (5, 5, 6):
        world = World(1, 0)
        replay = replay_of(eaudeqn, world, 60, seed)
        for _ in range(60):
            replay.add(*world.step())
        drawn.append([numbers(sample(replay, 16)).tolist() for _ in range(3)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("num_envs", [1, 8])
def test_memory(eaudeqn: ModuleType, num_envs: int) -> None:
    """A million transitions of the paper's frames, 7,130 bytes each; none of it is touched here."""
    args = eaudeqn.Args(num_envs=num_envs)
    replay = eaudeqn.FrameReplay(args, CPU, np.zeros((num_envs, 84, 84), np.uint8))
    arrays = [v for v in vars(replay).values() if isinstance(v, torch.Tensor | np.ndarray)]
    assert replay.nbytes == pytest.approx(sum(array.nbytes for array in arrays), rel=1e-6)
    assert 7_056 * 1_000_000 < replay.nbytes <= 7_130 * 1_000_000


# Against the real game


def capped(module: ModuleType, steps: int) -> type:
    """Return FrameReplay for episodes that are truncated after so many steps."""
    return type("Short", (module.FrameReplay,), {"EPISODE": steps})


@pytest.mark.parametrize("cap", [27_000, 80])
def test_replay_gives_what_the_agent_saw(eaudeqn: ModuleType, cap: int) -> None:
    """Breakout with random actions: episodes that terminate, and with a cap of 80 steps episodes
    that are truncated.
    """
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 5, cap), np.random.default_rng(0)
    args = eaudeqn.Args(buffer_size=600, num_envs=2)
    replay = capped(eaudeqn, cap)(args, CPU, envs.obs[:, -1])
    rows: list[list[Transition]] = []
    endings = truncations = 0
    for _ in range(450):
        obs, actions = envs.obs.copy(), rng.integers(0, envs.num_actions, 2)
        envs.send(actions)
        step = rewards, terminated, truncated, last_frames = envs.recv()
        replay.add(actions, step, envs.obs[:, -1])
        ended, row = terminated | truncated, []
        for i in range(2):
            after = np.concatenate([obs[i, 1:], last_frames[i][None]])
            assert ended[i] or np.array_equal(after, envs.obs[i])
            discount = 0.0 if terminated[i] else GAMMA
            what = int(actions[i]), float(np.sign(rewards[i]))
            row.append(Transition(obs[i], after, *what, discount, bool(ended[i])))
        rows.append(row)
        endings += int(ended.sum())
        truncations += int(truncated.sum())
    assert endings > 2 and truncations == (endings if cap == 80 else 0)
    window = [transition for row in rows[-300:] for transition in row]
    assert any(t.reward for t in window)
    assert replay.count == len(window)
    assert_same(everything(replay), window)


# The environments


class Made(NamedTuple):
    """One step of the environments, and what is seen after it."""

    obs: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    last_frames: np.ndarray
    episodes: list[tuple[float, int]]


def play(envs: Any, rng: np.random.Generator, steps: int, replay: Any = None) -> list[Made]:
    """Act at random, and store it in a replay if there is one."""
    record = []
    for _ in range(steps):
        actions = rng.integers(0, envs.num_actions, len(envs.obs))
        envs.send(actions)
        step = envs.recv()
        if replay:
            replay.add(actions, step, envs.obs[:, -1])
        record.append(Made(envs.obs.copy(), *(part.copy() for part in step), envs.episodes))
    return record


def assert_equal_records(ours: list[Made], theirs: list[Made]) -> None:
    assert len(ours) == len(theirs)
    for made, other in zip(ours, theirs):
        assert made.episodes == other.episodes
        assert all(np.array_equal(a, b) for a, b in zip(made[:5], other[:5]))


def saved(envs: Any) -> list[Any]:
    """Return the games as a checkpoint keeps them."""
    games = [bytes(envs.actions), envs.seeded, torch.from_numpy(envs.obs.copy())]
    torch.save(games, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


class Unasked:
    """A run that no signal reached."""

    stops, path = (), "run"


@pytest.mark.parametrize(
    ("num_envs", "steps", "capacity"),
    [(1, 1, 150), (1, 1000, 150), (3, 5, 150), (3, 1000, 150), (3, 1000, 5000)],
)
def test_restored_games_and_replay_go_on(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, num_envs: int, steps: int, capacity: int
) -> None:
    """At any step, several episodes and seedings in, where episodes end by themselves and by the
    cap of 180 steps.

    The replay reaches back to the last seeding, over several of them, or to the start.
    """
    monkeypatch.setattr(eaudeqn.AtariEnvs, "RESEED_AFTER", 250)

    def begin() -> tuple[Any, Any]:
        envs = eaudeqn.AtariEnvs("breakout", num_envs, 9, 180)
        args = eaudeqn.Args(buffer_size=capacity, num_envs=num_envs, seed=3)
        return envs, capped(eaudeqn, 180)(args, CPU, envs.obs[:, -1])

    (envs, replay), rng = begin(), np.random.default_rng(1)
    before = play(envs, rng, steps, replay)
    if steps == 1000:
        assert sum(len(made.episodes) for made in before) >= 5 * num_envs
        assert min(map(len, envs.seeded)) >= 3  # 1 is the first
        last = {seeded[-1] for seeded in envs.seeded}
        assert len(last) == num_envs  # they are not in step with each other
        assert any(made.terminated.any() for made in before)
        assert any(made.truncated.any() for made in before)

    (other, again), played = begin(), list[int]()
    monkeypatch.setattr(
        other, "send", lambda actions, send=other.send: [played.append(1), send(actions)]
    )
    eaudeqn.play_again(other, again, saved(envs), Unasked())
    assert len(played) == steps or (steps == 1000 and len(played) < 1000 - 150 + 600), (
        "not from the start where it need not"
    )
    assert np.array_equal(other.obs, envs.obs) and other.seeded == envs.seeded
    assert (other.step, other.actions) == (envs.step, envs.actions)
    assert np.array_equal(other.returns, envs.returns)
    assert np.array_equal(other.lengths, envs.lengths)
    assert again.range.tolist() == replay.range.tolist()
    assert np.array_equal(again.stacks, replay.stacks)

    def assert_same_replays() -> None:
        ours, theirs = everything(again), everything(replay)
        goes_on = theirs.discounts > 0
        assert np.array_equal(ours.next_obs[goes_on], theirs.next_obs[goes_on])
        for name in ("obs", "actions", "rewards", "discounts"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name

    if capacity < 5000:  # else nothing is overwritten until the last check
        assert_same_replays()
    bits = rng.bit_generator.state
    future = play(envs, rng, 200, replay)
    rng.bit_generator.state = bits
    assert_equal_records(play(other, rng, 200, again), future)
    assert_same_replays()


def test_when_and_how_environments_are_seeded_anew(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first ending so many steps after the last seeding, each time and for each one with
    another seed.
    """
    given: list[list[int]] = []

    class Spy(AtariVectorEnv):
        """Notes the seeds of each reset."""

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            given.append(np.array(seed).tolist())
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(eaudeqn, "AtariVectorEnv", Spy)
    monkeypatch.setattr(eaudeqn.AtariEnvs, "RESEED_AFTER", 100)
    envs = eaudeqn.AtariEnvs("ms_pacman", 2, 9, 50)  # the steps of every episode
    play(envs, np.random.default_rng(1), 410)
    assert envs.seeded == [[0, 100, 200, 300, 400]] * 2
    assert len(given) == 5 and min(map(min, given)) >= 0, "at most endings nothing is seeded"
    assert len({seed for seeds in given for seed in seeds}) == 10


def test_restoring_another_game_is_refused(
    eaudeqn: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    envs = eaudeqn.AtariEnvs("breakout", 1, 9)
    play(envs, np.random.default_rng(1), 40)
    games, again = saved(envs), eaudeqn.AtariEnvs("breakout", 1, 9)
    games[2][0, 0, 40, 40] += 1
    replay = eaudeqn.FrameReplay(eaudeqn.Args(buffer_size=99), CPU, again.obs[:, -1])
    with pytest.raises(SystemExit) as end:
        eaudeqn.play_again(again, replay, games, Unasked())
    assert end.value.code == 2
    assert "--resume: the games went differently" in capsys.readouterr().err


def test_runs_repeat_with_the_seed(eaudeqn: ModuleType) -> None:
    records = [
        play(eaudeqn.AtariEnvs("breakout", 2, seed), np.random.default_rng(0), 60)
        for seed in (3, 3, 4)
    ]
    assert_equal_records(records[0], records[1])
    assert any(not np.array_equal(a.obs, b.obs) for a, b in zip(records[0], records[2]))


def test_environments_have_seeds_of_their_own(eaudeqn: ModuleType) -> None:
    """With the same actions sticky actions part them; the first one does not depend on how many
    there are.
    """
    envs, alone = eaudeqn.AtariEnvs("breakout", 2, 3), eaudeqn.AtariEnvs("breakout", 1, 3)
    parted = False
    for action in np.random.default_rng(0).integers(0, 4, 60):
        envs.send(np.array([action, action]))
        alone.send(np.array([action]))
        envs.recv(), alone.recv()
        parted |= not np.array_equal(envs.obs[0], envs.obs[1])
        assert np.array_equal(envs.obs[0], alone.obs[0])
    assert parted


def test_what_was_seen_stays(eaudeqn: ModuleType) -> None:
    """Later steps and resets do not write into the arrays that were handed out."""
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 3, 10), np.random.default_rng(0)
    kept: list[tuple[np.ndarray, np.ndarray]] = [(envs.obs, envs.obs.copy())]
    for _ in range(25):
        envs.send(rng.integers(0, 4, 2))
        kept += [(array, array.copy()) for array in (*envs.recv(), envs.obs)]
    assert all(np.array_equal(array, copy) for array, copy in kept)


def test_truncated_is_not_terminated(eaudeqn: ModuleType) -> None:
    """A cap of 100 steps ends Ms. Pac-Man then, and the next episode begins at once."""
    envs = eaudeqn.AtariEnvs("ms_pacman", 2, 0, 100)
    start = envs.obs.copy()
    assert start.shape == (2, 4, 84, 84) and start.dtype == np.uint8
    assert start[:, 3].any() and not start[:, :3].any()  # no step was made for the agent
    total = np.zeros(2)
    for step, made in enumerate(play(envs, np.random.default_rng(0), 300), 1):
        assert not made.terminated.any()
        assert made.truncated.tolist() == [step % 100 == 0] * 2
        total += made.rewards
        if step % 100 == 0:
            assert made.episodes == [(total[0], 100), (total[1], 100)]
            assert total.max() >= 20  # dots are ten points each: the returns are not clipped
            assert made.obs[:, 3].any() and not made.obs[:, :3].any()
            assert not np.array_equal(made.obs[:, 3], made.last_frames)
            total[:] = 0
        else:
            assert not made.episodes
            assert np.array_equal(made.obs[:, 3], made.last_frames)


@pytest.mark.parametrize("cap", [27_000, 30])
def test_last_frame_is_the_true_one(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, cap: int
) -> None:
    """At the first ending, what ale-py itself hands out as the final observation, from the same
    seed and actions.
    """
    seeds: list[np.ndarray] = []

    class Spy(AtariVectorEnv):
        """Notes the seeds that it is given."""

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            if seed is not None:
                seeds.append(np.array(seed))
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(eaudeqn, "AtariVectorEnv", Spy)
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 1, cap), np.random.default_rng(3)
    actions = rng.integers(0, envs.num_actions, (400, 2))
    record = []
    for action in actions:
        envs.send(action)
        record.append(Made(None, *envs.recv(), [])._replace(obs=envs.obs.copy()))
    for i in range(2):
        end = next(t for t, made in enumerate(record) if made.terminated[i] or made.truncated[i])
        alone = AtariVectorEnv(
            "breakout",
            1,
            autoreset_mode="SameStep",
            max_num_frames_per_episode=4 * cap,
            noop_max=0,
            repeat_action_probability=0.25,
            use_fire_reset=False,
            reward_clipping=False,
        )
        alone.reset(seed=seeds[0][i : i + 1])
        for t in range(end + 1):
            obs, rewards, terminated, truncated, info = alone.step(actions[t, i : i + 1])
            made = record[t]
            assert rewards[0] == made.rewards[i] and terminated[0] == made.terminated[i]
            assert truncated[0] == made.truncated[i] == (t == end and cap == 30)
            if t < end:
                assert np.array_equal(obs[0], made.obs[i])
        assert not (truncated[0] and terminated[0])
        assert np.array_equal(info["final_obs"][0][-1], record[end].last_frames[i])


@pytest.mark.parametrize(
    "script", ["eaudeqn_atari", "evaluate", "cql_atari_eaudeqn", "cql_atari_gmp"]
)
def test_protocol(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Machado et al. (2018) and Dopamine ask for is handed to ale-py, whose other defaults
    hold, by all that plays; and scores are not clipped: a dot of MsPacman is worth 10.
    """
    module = load_script(script)
    given: dict[str, Any] = {}

    class Spy(AtariVectorEnv):
        """Notes how it is made."""

        def __init__(self, game: str, num_envs: int, **options: Any) -> None:
            given.update(options, game=game)
            super().__init__(game, num_envs, **options)

    monkeypatch.setattr(module, "AtariVectorEnv", Spy)
    if script == "eaudeqn_atari":
        games = module.AtariEnvs("ms_pacman", 2, 1).envs
    elif script == "evaluate":
        games = module.AtariGames("MsPacman", 2, 1).envs
    else:
        games = module.make_envs("ms_pacman", 2, 27_000)
    wanted = {
        "game": "ms_pacman",
        "repeat_action_probability": 0.25,
        "noop_max": 0,
        "use_fire_reset": False,
        "reward_clipping": False,
        "max_num_frames_per_episode": 27_000 * 4,
    }
    assert wanted.items() <= given.items()
    others = {
        "frameskip": 4,
        "maxpool": True,
        "grayscale": True,
        "stack_num": 4,
        "img_height": 84,
        "img_width": 84,
        "episodic_life": False,
        "life_loss_info": False,
        "full_action_space": False,
    }
    defaults = {
        name: p.default for name, p in inspect.signature(AtariVectorEnv.__init__).parameters.items()
    }
    assert others.items() <= (defaults | given).items()
    assert len(games.ale.get_action_set()) == 9  # the minimal set: no fire buttons
    games.reset(seed=np.array([1, 2]))
    rng = np.random.default_rng(0)
    rewards = np.concatenate([games.step(rng.integers(9, size=2))[1] for _ in range(150)])
    assert rewards.max() >= 10


def shares(pixels: int, out: int) -> np.ndarray:
    """Return [out, pixels]: how much of each output pixel an input pixel makes up when a line is
    resized by area.
    """
    edges = np.arange(out + 1) * pixels / out
    starts = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return overlap.clip(0) * out / pixels


def test_frames_are_those_of_a_plain_emulator(eaudeqn: ModuleType) -> None:
    """Four frames to a step, the maximum of the last two, grey, resized by area; rewards are their
    sum.
    """
    envs = eaudeqn.AtariEnvs("space_invaders", 1, 7)
    ale = ALEInterface()
    ale.setInt("random_seed", int(np.random.SeedSequence((7, 0, 0)).generate_state(1)[0] >> 1))
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(roms.get_rom_path("space_invaders"))
    actions, rng, total = ale.getMinimalActionSet(), np.random.default_rng(0), 0
    for _ in range(120):
        action = rng.integers(len(actions), size=1)
        envs.send(action)
        rewards, terminated, truncated, _ = envs.recv()
        assert not (terminated | truncated).any()
        reward, screens = 0, list[np.ndarray]()
        for _ in range(4):
            reward += ale.act(actions[action[0]])
            screens.append(ale.getScreenGrayscale())
        wanted = shares(210, 84) @ np.maximum(*screens[2:]) @ shares(160, 84).T
        assert np.abs(wanted - envs.obs[0, -1]).max() <= 0.51 and rewards.tolist() == [reward]
        total += reward
    assert total > 0


def test_a_lost_life_ends_nothing(eaudeqn: ModuleType) -> None:
    """Breakout has five lives: random play loses the first within 60 steps, and an episode takes
    over 100.
    """
    record = play(eaudeqn.AtariEnvs("breakout", 2, 0), np.random.default_rng(0), 400)
    lengths = [length for made in record for _, length in made.episodes]
    assert lengths and min(lengths) > 100


# Names


@pytest.mark.parametrize(
    ("env_id", "rom"),
    [
        ("Breakout", "breakout"),
        ("ALE/Breakout-v5", "breakout"),
        ("BreakoutNoFrameskip-v4", "breakout"),
        ("MsPacman", "ms_pacman"),
        ("ms_pacman", "ms_pacman"),
        ("ALE/UpNDown-v5", "up_n_down"),
        ("YarsRevengeNoFrameskip-v4", "yars_revenge"),
    ],
)
def test_find_rom(eaudeqn: ModuleType, env_id: str, rom: str) -> None:
    assert eaudeqn.find_rom(env_id) == rom


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [("Brekout", "breakout"), ("ALE/MsPackman-v5", "mspacman"), ("Q*bert", "qbert")],
)
def test_unknown_games(
    eaudeqn: ModuleType, env_id: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        eaudeqn.find_rom(env_id)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith(f"eaudeqn_atari.py: --env-id {env_id}")
    assert nearest in line.partition("the nearest are")[2] and line.count("\n") == 1


@pytest.mark.parametrize("env_id", ["", "xyzzy", "ALE/", "CartPole-v1", "../breakout"])
def test_no_game_at_all(eaudeqn: ModuleType, env_id: str) -> None:
    with pytest.raises(SystemExit) as end:
        eaudeqn.find_rom(env_id)
    assert end.value.code == 2
