"""Tests of the shared blocks `frame-replay` and `atari-env`, through eaudeqn_atari.py.

The replay is compared with a list that keeps whole stacks, over every transition that may be sampled, and with what the
real game showed. The environments are compared with themselves, interrupted and not, and with ale-py used by hand.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv

CPU = torch.device("cpu")
SHAPE = (2, 2)


# The slow reference


class Transition(NamedTuple):
    """What the replay should give back."""

    obs: np.ndarray
    next_obs: np.ndarray
    action: int
    reward: float
    terminated: bool


class World:
    """N made-up environments whose frames are all different; it keeps every transition with whole stacks."""

    def __init__(self, module: ModuleType, num_envs: int, seed: int, longest: int = 12) -> None:
        self.module, self.num_envs, self.longest = module, num_envs, longest
        self.rng = np.random.default_rng(seed)
        self.frames = 0
        self.stacks = [self.begin() for _ in range(num_envs)]
        self.left = self.rng.integers(1, longest + 1, num_envs)
        self.steps: list[list[Transition]] = []  # by step and environment
        self.endings: list[int] = []  # the step of each ending

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
        terminated = ended & (self.rng.random(self.num_envs) < 0.5)
        last_frames, row = [], []
        for i in range(self.num_envs):
            after = [*self.stacks[i][1:], self.frame()]
            obs, reward = np.array(self.stacks[i]), min(1.0, max(-1.0, float(rewards[i])))
            row.append(Transition(obs, np.array(after), int(actions[i]), reward, bool(terminated[i])))
            last_frames.append(after[-1])
            self.stacks[i] = after
            if ended[i]:
                self.stacks[i] = self.begin()
                self.left[i] = self.rng.integers(1, self.longest + 1)
                self.endings.append(len(self.steps))
        self.steps.append(row)
        steps = self.module.Steps(np.array(last_frames), rewards, terminated, ended, [])
        return actions, steps, self.now()

    def first(self, capacity: int) -> int:
        """Return the oldest step that the replay should still have: it has its rows, and the last endings."""
        first = max(0, len(self.steps) - -(-capacity // self.num_envs))
        too_many = self.endings[: -(capacity // 128 + 16)]
        return max(first, too_many[-1] + 1) if too_many else first

    def window(self, capacity: int) -> list[Transition]:
        return [transition for row in self.steps[self.first(capacity) :] for transition in row]


def replay_of(module: ModuleType, capacity: int, num_envs: int, seed: int = 0) -> Any:
    return module.FrameReplay(capacity, num_envs, CPU, seed, frame_shape=SHAPE)


def everything(replay: Any) -> Any:
    """Gather every transition that may be sampled, oldest first."""
    first, count = replay.range.tolist()
    return replay.gather(torch.arange(first, first + count) % replay.slots)


def assert_same(batch: Any, transitions: list[Transition]) -> None:
    assert len(batch.obs) == len(transitions)
    for name, column in zip(("obs", "next_obs", "actions", "rewards", "terminated"), zip(*transitions)):
        same = np.array_equal(getattr(batch, name).numpy(), np.array(column))
        assert same, name
    assert batch.actions.dtype == torch.int64 and batch.rewards.dtype == torch.float32
    assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8 and batch.terminated.dtype == torch.bool


def check(replay: Any, world: World, capacity: int) -> None:
    window = world.window(capacity)
    assert len(replay) == len(window)
    if window:
        assert_same(everything(replay), window)


# The replay against the reference


@pytest.mark.parametrize(("capacity", "num_envs"), [(40, 1), (7, 1), (61, 3), (9, 3), (200, 8)])
def test_every_transition(eaudeqn: ModuleType, capacity: int, num_envs: int) -> None:
    """Many small episodes, checked after every step: before the ring is full, at its seam, and many rounds later."""
    for seed in range(3):
        world, replay = World(eaudeqn, num_envs, seed), replay_of(eaudeqn, capacity, num_envs)
        replay.see(world.now())
        check(replay, world, capacity)
        for _ in range(6 * replay.rows + 5):
            replay.add(*world.step())
            check(replay, world, capacity)
        assert len(world.endings) > 5


def test_too_many_endings(eaudeqn: ModuleType) -> None:
    """Where the ring of last frames comes round first, old transitions are forgotten, and none is wrong."""
    for capacity, num_envs, longest in ((100, 1, 3), (100, 3, 2), (300, 4, 5), (300, 2, 1)):
        world, replay = World(eaudeqn, num_envs, 7, longest), replay_of(eaudeqn, capacity, num_envs)
        replay.see(world.now())
        for _ in range(4 * replay.rows):
            replay.add(*world.step())
            check(replay, world, capacity)
        assert 0 < len(replay) < capacity - num_envs
        assert all(np.count_nonzero(t.next_obs[-1]) for t in world.window(capacity))


def test_episodes_that_fill_the_ring(eaudeqn: ModuleType) -> None:
    """One episode without an end, longer than the ring: no stack is cut but at its start."""
    world, replay = World(eaudeqn, 2, 0, 10**6), replay_of(eaudeqn, 30, 2)
    replay.see(world.now())
    for _ in range(100):
        replay.add(*world.step())
        check(replay, world, 30)
    assert not world.endings and len(replay) == 30


def test_many_environments(eaudeqn: ModuleType) -> None:
    """A stack's distance in slots is past what a byte holds."""
    world, replay = World(eaudeqn, 100, 0), replay_of(eaudeqn, 20_000, 100)
    replay.see(world.now())
    for _ in range(12):
        replay.add(*world.step())
    check(replay, world, 20_000)


def test_length(eaudeqn: ModuleType) -> None:
    world, replay = World(eaudeqn, 1, 0), replay_of(eaudeqn, 20, 1)
    lengths = [len(replay)]
    replay.see(world.now())
    for _ in range(25):
        replay.add(*world.step())
        lengths.append(len(replay))
    assert lengths == [*range(21), *[20] * 5]


def numbers(batch: Any) -> np.ndarray:
    """Return the number of each transition's newest frame."""
    return batch.obs[:, 3].contiguous().numpy().reshape(len(batch.obs), 4).view(np.uint32)[:, 0]


def test_samples_are_uniform(eaudeqn: ModuleType) -> None:
    """Chi-squared over all transitions: nothing outside the window is drawn, nothing inside is left out."""
    for capacity, num_envs, steps, seed in ((50, 1, 173, 0), (60, 3, 70, 1), (50, 1, 11, 2), (300, 1, 250, 3)):
        world, replay = World(eaudeqn, num_envs, seed), replay_of(eaudeqn, capacity, num_envs, seed)
        replay.see(world.now())
        for _ in range(steps):
            replay.add(*world.step())
        frames = numbers(everything(replay))
        size, draws = len(frames), 100_000
        assert len(set(frames)) == size == len(world.window(capacity))
        seen, counts = np.unique(numbers(replay.sample(draws)), return_counts=True)
        assert set(seen) == set(frames)
        expected = draws / size
        chi_squared = float(((counts - expected) ** 2 / expected).sum())  # mean size - 1, variance 2 (size - 1)
        assert abs(chi_squared - (size - 1)) < 5 * (2 * (size - 1)) ** 0.5


def test_sample_is_gathered(eaudeqn: ModuleType) -> None:
    """A sampled transition is whole: its parts belong together."""
    world, replay = World(eaudeqn, 3, 4), replay_of(eaudeqn, 90, 3)
    replay.see(world.now())
    for _ in range(80):
        replay.add(*world.step())
    by_frame = {t.obs[3].tobytes(): t for t in world.window(90)}
    batch = replay.sample(32)
    assert_same(batch, [by_frame[obs[3].numpy().tobytes()] for obs in batch.obs])


def test_samples_repeat_with_the_seed(eaudeqn: ModuleType) -> None:
    drawn = []
    for seed in (5, 5, 6):
        world, replay = World(eaudeqn, 1, 0), replay_of(eaudeqn, 60, 1, seed)
        replay.see(world.now())
        for _ in range(60):
            replay.add(*world.step())
        drawn.append([numbers(replay.sample(16)).tolist() for _ in range(3)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("num_envs", [1, 8])
def test_memory(eaudeqn: ModuleType, num_envs: int) -> None:
    """A million transitions of the paper's frames, 7,130 bytes each; none of it is touched here."""
    replay = eaudeqn.FrameReplay(1_000_000, num_envs, CPU, 0)
    arrays = [v for v in vars(replay).values() if isinstance(v, torch.Tensor | np.ndarray)]
    assert replay.nbytes == sum(array.nbytes for array in arrays)
    assert 7_056 * 1_000_000 < replay.nbytes <= 7_130 * 1_000_000


# Checkpoints of the replay


def write(replay: Any, first: int, last: int) -> list[np.ndarray]:
    return [array[index].numpy().copy() for array, index in replay.pieces(first, last)]


def read(replay: Any, first: int, last: int, pieces: list[np.ndarray]) -> None:
    left = iter(pieces)
    for array, index in replay.pieces(first, last):
        array[index] = torch.from_numpy(next(left))
    assert next(left, None) is None


@pytest.mark.parametrize(
    ("capacity", "num_envs", "longest", "saves"),
    [
        (50, 1, 12, (20,)),
        (50, 1, 12, (30, 45, 60, 170)),
        (60, 3, 12, (5, 6, 24, 31, 47, 50)),
        (100, 3, 2, (30, 60, 90)),  # too many endings
        (2500, 1, 30, (1100, 2600, 5300)),  # several pieces of 1,024 steps
    ],
)
def test_restore(eaudeqn: ModuleType, capacity: int, num_envs: int, longest: int, saves: tuple[int, ...]) -> None:
    """Segments that each hold only what is new make up the same replay, with the same samples then and later."""
    world, replay = World(eaudeqn, num_envs, 3, longest), replay_of(eaudeqn, capacity, num_envs, 8)
    replay.see(world.now())
    segments: list[tuple[int, int, list[np.ndarray]]] = []
    for save in saves:
        while replay.step < save:
            replay.add(*world.step())
            if replay.step % 7 == 0:
                replay.sample(4)
        # As Run.save(): what lies wholly before the ring's oldest row is dropped.
        oldest = max(0, replay.step - replay.rows + 1)
        segments = [segment for segment in segments if segment[1] > oldest]
        first = max(oldest, segments[-1][1] if segments else 0)
        segments.append((first, replay.step, write(replay, first, replay.step)))
        assert replay.unsaved is None
        state = json.loads(json.dumps(replay.state()))

    again = replay_of(eaudeqn, capacity, num_envs, 0)
    for first, last, pieces in segments:
        read(again, first, last, pieces)
    again.restore(state)
    again.see(world.now())
    for _ in range(3 * replay.rows if replay.rows < 1000 else 300):
        check(again, world, capacity)
        for ours, theirs in zip(again.sample(8), replay.sample(8)):
            assert torch.equal(ours, theirs)
        actions, steps, frames = world.step()
        replay.add(actions, steps, frames)
        again.add(actions, steps, frames)


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("capacity", "num_envs", "longest"), [(1500, 1, 300), (3300, 3, 300), (1500, 1, 5), (2000, 4, 1)]
)
def test_add_waits_for_a_checkpoint(eaudeqn: ModuleType, capacity: int, num_envs: int, longest: int) -> None:
    """What is written while the run goes on is what was there at the start; the run goes on as far as it can."""
    world, replay = World(eaudeqn, num_envs, 0, longest), replay_of(eaudeqn, capacity, num_envs)
    replay.see(world.now())
    while replay.step < 2 * replay.rows:
        replay.add(*world.step())
    first, last = replay.step - replay.rows + 1, replay.step
    before = write(replay, first, last)
    replay.unsaved = first  # as Run.save() does before its thread begins

    def go_on() -> None:
        for _ in range(2 * replay.rows):
            replay.add(*world.step())

    thread = in_background(go_on)
    time.sleep(0.05)
    assert thread.is_alive() and replay.step == last  # not one step can be made in a full ring
    after = []
    for array, index in replay.pieces(first, last):
        time.sleep(0.005)
        after.append(array[index].numpy().copy())
    thread.join(20)
    assert not thread.is_alive() and replay.step == last + 2 * replay.rows
    assert len(before) == len(after) and all(map(np.array_equal, before, after))
    check(replay, world, capacity)


def test_add_goes_on_where_nothing_is_overwritten(eaudeqn: ModuleType) -> None:
    world, replay = World(eaudeqn, 1, 0), replay_of(eaudeqn, 50, 1)  # 54 rows
    replay.see(world.now())
    for _ in range(10):
        replay.add(*world.step())
    replay.unsaved = 0

    def go_on() -> None:
        for _ in range(44):
            replay.add(*world.step())

    thread = in_background(go_on)
    time.sleep(0.2)
    # Step 53 is seen, not yet made: the frame after it would lie in the row of step 0.
    waits, steps = thread.is_alive(), replay.step
    replay.unsaved = None
    thread.join(5)
    assert waits and steps == 53 and replay.step == 54


def test_add_waits_for_all_endings_of_its_step(eaudeqn: ModuleType) -> None:
    """Three environments end at once and take three places of the ring of last frames, not only the oldest."""
    world, replay = World(eaudeqn, 3, 0, 1), replay_of(eaudeqn, 300, 3)  # places for 18 endings, 3 at every step
    replay.see(world.now())
    replay.add(*world.step())
    world.left[:] = (1, 10**6, 10**6)  # one ending: from here on a step's three lie in the places of two steps
    replay.add(*world.step())
    world.left[:] = 1
    for _ in range(5):
        replay.add(*world.step())
    assert replay.num_endings == 19 and replay.step == 7
    replay.unsaved = int(np.unique(replay.ending_step)[1])  # the oldest step is on disk, the one after it is not
    frame = replay.frames[replay.ending[replay.unsaved * 3].long()].clone()
    thread = in_background(lambda: replay.add(*world.step()))
    time.sleep(0.05)
    waits, unharmed = thread.is_alive(), torch.equal(replay.frames[replay.ending[replay.unsaved * 3].long()], frame)
    replay.unsaved = None
    thread.join(5)
    assert unharmed, "the last frame of a step that is still to be written was overwritten"
    assert waits and replay.step == 8


# Against the real game


@pytest.mark.parametrize("cap", [108_000, 320])
def test_replay_gives_what_the_agent_saw(eaudeqn: ModuleType, cap: int) -> None:
    """Breakout with random actions: episodes that terminate, and with a cap of 80 steps episodes that are truncated."""
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 5, max_num_frames_per_episode=cap), np.random.default_rng(0)
    replay = eaudeqn.FrameReplay(600, 2, CPU, 0)
    replay.see(envs.obs[:, -1])
    rows: list[list[Transition]] = []
    endings = truncations = 0
    for _ in range(450):
        obs, actions = envs.obs.copy(), rng.integers(0, envs.num_actions, 2)
        envs.send(actions)
        steps = envs.recv()
        replay.add(actions, steps, envs.obs[:, -1])
        row = []
        for i in range(2):
            after = np.concatenate([obs[i, 1:], steps.last_frames[i][None]]) if steps.ended[i] else envs.obs[i].copy()
            reward = float(np.sign(steps.rewards[i]))
            row.append(Transition(obs[i], after, int(actions[i]), reward, bool(steps.terminated[i])))
        rows.append(row)
        endings += int(steps.ended.sum())
        truncations += int((steps.ended & ~steps.terminated).sum())
    assert endings > 2 and truncations == (endings if cap == 320 else 0)
    window = [transition for row in rows[-300:] for transition in row]
    assert any(t.reward for t in window)
    assert len(replay) == len(window)
    assert_same(everything(replay), window)


# The environments


def play(envs: Any, rng: np.random.Generator, steps: int) -> list[tuple[np.ndarray, Any]]:
    """Act at random; return (obs after it, Steps) of each step."""
    record = []
    for _ in range(steps):
        envs.send(rng.integers(0, envs.num_actions, len(envs.obs)))
        made = envs.recv()
        record.append((envs.obs.copy(), made._replace(last_frames=made.last_frames.copy())))
    return record


def assert_equal_records(ours: list[tuple[np.ndarray, Any]], theirs: list[tuple[np.ndarray, Any]]) -> None:
    assert len(ours) == len(theirs)
    for (obs, made), (other_obs, other) in zip(ours, theirs):
        assert np.array_equal(obs, other_obs)
        assert made.episodes == other.episodes
        assert all(np.array_equal(a, b) for a, b in zip(made[:4], other[:4]))


@pytest.mark.parametrize(("num_envs", "steps"), [(1, 0), (1, 1000), (3, 1000), (3, 5)])
def test_restored_environments_go_on(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, num_envs: int, steps: int
) -> None:
    """At any step, several episodes and seedings in, where episodes end by themselves and by the cap."""
    monkeypatch.setattr(eaudeqn.AtariEnvs, "RESEED_AFTER", 250)
    options = {"max_num_frames_per_episode": 720}  # 180 steps; random play lasts 130 to 280
    envs, rng = eaudeqn.AtariEnvs("breakout", num_envs, 9, **options), np.random.default_rng(1)
    before = play(envs, rng, steps)
    if steps == 1000:
        assert sum(len(made.episodes) for _, made in before) >= 5 * num_envs
        assert envs.seedings.min() >= 3  # 1 is the first
        assert len(set(map(len, envs.actions))) == num_envs  # they are not in step with each other
        assert any(made.terminated.any() for _, made in before)
        assert any((made.ended & ~made.terminated).any() for _, made in before)
    state, obs = json.loads(json.dumps(envs.state())), envs.obs.copy()
    returns, lengths, seedings = envs.returns.copy(), envs.lengths.copy(), envs.seedings.copy()
    bits = rng.bit_generator.state
    future = play(envs, rng, 200)

    again = eaudeqn.AtariEnvs("breakout", num_envs, 9, **options)
    play(again, np.random.default_rng(2), 20)  # whatever it did before
    again.restore(state)
    assert np.array_equal(again.obs, obs)
    assert np.array_equal(again.returns, returns) and np.array_equal(again.lengths, lengths)
    assert np.array_equal(again.seedings, seedings)
    assert again.state() == state
    rng.bit_generator.state = bits
    assert_equal_records(play(again, rng, 200), future)
    assert again.state() == envs.state()


def test_restoring_another_game_is_refused(eaudeqn: ModuleType) -> None:
    envs = eaudeqn.AtariEnvs("breakout", 1, 9)
    play(envs, np.random.default_rng(1), 40)
    state = envs.state()
    state["digest"] = "0" * 64
    with pytest.raises(eaudeqn.Exit) as error:
        eaudeqn.AtariEnvs("breakout", 1, 9).restore(state)
    assert error.value.status == 1


def test_runs_repeat_with_the_seed(eaudeqn: ModuleType) -> None:
    records = [play(eaudeqn.AtariEnvs("breakout", 2, seed), np.random.default_rng(0), 60) for seed in (3, 3, 4)]
    assert_equal_records(records[0], records[1])
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(records[0], records[2]))


def test_environments_have_seeds_of_their_own(eaudeqn: ModuleType) -> None:
    """With the same actions sticky actions part them; the first one does not depend on how many there are."""
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
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 3, max_num_frames_per_episode=40), np.random.default_rng(0)
    kept: list[tuple[np.ndarray, np.ndarray]] = [(envs.obs, envs.obs.copy())]
    for _ in range(25):
        envs.send(rng.integers(0, 4, 2))
        steps = envs.recv()
        kept += [(array, array.copy()) for array in (envs.obs, *steps[:4])]
    assert all(np.array_equal(array, copy) for array, copy in kept)


def test_truncated_is_not_terminated(eaudeqn: ModuleType) -> None:
    """A cap of 400 frames ends Ms. Pac-Man after 100 steps, and the next episode begins at once."""
    envs = eaudeqn.AtariEnvs("ms_pacman", 2, 0, max_num_frames_per_episode=400)
    start = envs.obs.copy()
    assert start.shape == (2, 4, 84, 84) and start.dtype == np.uint8
    assert start[:, 3].any() and not start[:, :3].any()  # no step was made for the agent
    total = np.zeros(2)
    for step, (obs, made) in enumerate(play(envs, np.random.default_rng(0), 300), 1):
        assert not made.terminated.any()
        assert made.ended.tolist() == [step % 100 == 0] * 2
        total += made.rewards
        if step % 100 == 0:
            assert made.episodes == [(total[0], 100), (total[1], 100)]
            assert total.max() >= 20  # dots are ten points each: the returns are not clipped
            assert obs[:, 3].any() and not obs[:, :3].any()
            assert not np.array_equal(obs[:, 3], made.last_frames)
            total[:] = 0
        else:
            assert not made.episodes
            assert np.array_equal(obs[:, 3], made.last_frames)


@pytest.mark.parametrize("cap", [108_000, 120])
def test_last_frame_is_the_true_one(eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    """At the first ending, what ale-py itself hands out as the final observation, from the same seed and actions."""
    seeds: list[np.ndarray] = []

    class Spy(AtariVectorEnv):
        """Notes the seeds that it is given."""

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            if seed is not None:
                seeds.append(np.array(seed))
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(eaudeqn, "AtariVectorEnv", Spy)
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 1, max_num_frames_per_episode=cap), np.random.default_rng(3)
    actions = rng.integers(0, envs.num_actions, (400, 2))
    record = []
    for action in actions:
        envs.send(action)
        record.append((envs.recv(), envs.obs.copy()))
    for i in range(2):
        end = next(t for t, (made, _) in enumerate(record) if made.ended[i])
        alone = AtariVectorEnv("breakout", 1, autoreset_mode="SameStep", max_num_frames_per_episode=cap, noop_max=0,
                               repeat_action_probability=0.25, use_fire_reset=False, reward_clipping=False)
        alone.reset(seed=seeds[0][i : i + 1])
        for t in range(end + 1):
            obs, rewards, terminated, truncated, info = alone.step(actions[t, i : i + 1])
            made = record[t][0]
            assert rewards[0] == made.rewards[i] and terminated[0] == made.terminated[i]
            assert (terminated[0] or truncated[0]) == made.ended[i] == (t == end)
            if t < end:
                assert np.array_equal(obs[0], record[t][1][i])
        assert truncated[0] == (cap == 120) and not (truncated[0] and terminated[0])
        assert np.array_equal(info["final_obs"][0][-1], record[end][0].last_frames[i])


def test_protocol(eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Machado et al. (2018) and Dopamine ask for is handed to ale-py, whose other defaults hold."""
    given: dict[str, Any] = {}

    class Spy(AtariVectorEnv):
        """Notes how it is made."""

        def __init__(self, game: str, num_envs: int, **options: Any) -> None:
            given.update(options, game=game)
            super().__init__(game, num_envs, **options)

    monkeypatch.setattr(eaudeqn, "AtariVectorEnv", Spy)
    envs = eaudeqn.AtariEnvs("breakout", 2, 1)
    wanted = {"game": "breakout", "repeat_action_probability": 0.25, "noop_max": 0, "use_fire_reset": False,
              "reward_clipping": False, "max_num_frames_per_episode": 27_000 * 4}
    assert wanted.items() <= given.items()
    others = {"frameskip": 4, "maxpool": True, "grayscale": True, "stack_num": 4, "img_height": 84, "img_width": 84,
              "episodic_life": False, "life_loss_info": False, "full_action_space": False}
    assert all(given.get(name, value) == value for name, value in others.items())
    assert envs.num_actions == 4  # the minimal set: no-op, fire, right, left


def test_a_lost_life_ends_nothing(eaudeqn: ModuleType) -> None:
    """Breakout has five lives: random play loses the first within 60 steps, and an episode takes over 100."""
    record = play(eaudeqn.AtariEnvs("breakout", 2, 0), np.random.default_rng(0), 400)
    lengths = [length for _, made in record for _, length in made.episodes]
    assert lengths and min(lengths) > 100


# Names and scores


@pytest.mark.parametrize(
    ("env_id", "rom", "title"),
    [
        ("Breakout", "breakout", "Breakout"),
        ("ALE/Breakout-v5", "breakout", "Breakout"),
        ("BreakoutNoFrameskip-v4", "breakout", "Breakout"),
        ("MsPacman", "ms_pacman", "MsPacman"),
        ("ms_pacman", "ms_pacman", "MsPacman"),
        ("ALE/UpNDown-v5", "up_n_down", "UpNDown"),
        ("YarsRevengeNoFrameskip-v4", "yars_revenge", "YarsRevenge"),
    ],
)
def test_find_rom(eaudeqn: ModuleType, env_id: str, rom: str, title: str) -> None:
    assert eaudeqn.find_rom(env_id) == (rom, title)


@pytest.mark.parametrize(
    ("env_id", "nearest"), [("Brekout", "Breakout"), ("ALE/MsPackman-v5", "MsPacman"), ("Q*bert", "Qbert")]
)
def test_unknown_games(eaudeqn: ModuleType, env_id: str, nearest: str) -> None:
    with pytest.raises(eaudeqn.Exit) as error:
        eaudeqn.find_rom(env_id)
    assert error.value.status == 2
    assert str(error.value).startswith(f"--env-id {env_id}") and "\n" not in str(error.value)
    assert nearest in str(error.value).removeprefix(f"--env-id {env_id}")


@pytest.mark.parametrize("env_id", ["", "xyzzy", "ALE/", "CartPole-v1", "../breakout"])
def test_no_game_at_all(eaudeqn: ModuleType, env_id: str) -> None:
    with pytest.raises(eaudeqn.Exit) as error:
        eaudeqn.find_rom(env_id)
    assert error.value.status == 2


def test_human_normalized(eaudeqn: ModuleType) -> None:
    assert eaudeqn.human_normalized("Breakout", 1.7) == 0
    assert eaudeqn.human_normalized("Breakout", 30.5) == 1
    assert eaudeqn.human_normalized("Breakout", 46.1) == pytest.approx(44.4 / 28.8)
    assert eaudeqn.human_normalized("Pong", -20.7 - 35.3) == pytest.approx(-1)
    assert eaudeqn.human_normalized("Skiing", -10717.5) == pytest.approx(0.5)  # 6,380.6 of 12,761.2
    assert eaudeqn.human_normalized("MsPacman", 6951.6) == pytest.approx(1)
    assert eaudeqn.human_normalized("Surround", 3.0) is None


def test_every_score_has_its_game(eaudeqn: ModuleType) -> None:
    """55 of the 60 games of the suites have a human score, under the title that find_rom gives."""
    titles = [entry.split()[0] for entry in eaudeqn.HUMAN_SCORES.split(";")]
    assert len(set(titles)) == len(titles) == 55
    for title in titles:
        assert eaudeqn.find_rom(title)[1] == title
        assert eaudeqn.human_normalized(title, 0.0) is not None
