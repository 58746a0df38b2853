"""Tests of the shared blocks `frame-replay` and `atari-env`, through eaudeqn_atari.py.

The replay is compared with a list that keeps whole stacks, over every transition that may be sampled, and with what the
real game showed. The environments are compared with themselves, interrupted and not, and with ale-py used by hand.
"""

from __future__ import annotations

import inspect
import itertools
import json
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv

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
    """N made-up environments whose frames are all different; it keeps every transition with whole stacks."""

    def __init__(self, module: ModuleType, num_envs: int, seed: int, longest: int = 12) -> None:
        self.module, self.num_envs, self.longest = module, num_envs, longest
        self.rng = np.random.default_rng(seed)
        self.frames = self.endings = self.truncations = 0
        self.stacks = [self.begin() for _ in range(num_envs)]
        self.left = np.array([self.length() for _ in range(num_envs)])
        self.capped = self.left == longest
        self.steps: list[list[Transition]] = []  # by step and environment

    def length(self) -> int:
        """Draw an episode's length; half of them reach the cap and are truncated there."""
        return self.longest if self.rng.random() < 0.5 else int(self.rng.integers(1, max(2, self.longest)))

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
            row.append(Transition(obs, np.array(after), int(actions[i]), reward, discount, bool(ended[i])))
            last_frames.append(after[-1])
            self.stacks[i] = after
            if ended[i]:
                self.stacks[i] = self.begin()
                self.endings += 1
                self.truncations += int(self.capped[i])
                self.left[i] = self.length()
                self.capped[i] = self.left[i] == self.longest
        self.steps.append(row)
        steps = self.module.Steps(np.array(last_frames), rewards, terminated, ended, [])
        return actions, steps, self.now()

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
        return first._replace(next_obs=last.next_obs, reward=reward, discount=discount, ended=last.ended)


def replay_of(
    module: ModuleType, capacity: int, num_envs: int, seed: int = 0, longest: int = 12, n_step: int = 1
) -> Any:
    return module.FrameReplay(capacity, num_envs, CPU, seed, GAMMA, n_step, frame_shape=SHAPE, episode_cap=longest)


def everything(replay: Any) -> Any:
    """Gather every transition that may be sampled, oldest first."""
    first, count = replay.range.tolist()
    return replay.gather(torch.arange(first, first + count) % replay.slots)


def assert_same(batch: Any, transitions: list[Transition]) -> None:
    assert len(batch.obs) == len(transitions)
    obs, next_obs, actions, rewards, discounts, _ = map(np.array, zip(*transitions))
    terminated = discounts == 0
    assert np.array_equal(batch.obs, obs) and np.array_equal(batch.actions, actions)
    assert np.array_equal(batch.next_obs[~terminated], next_obs[~terminated])  # of no meaning after a terminal step
    assert np.array_equal(batch.rewards, rewards) and np.array_equal(batch.discounts, discounts)  # exact in binary
    assert batch.actions.dtype == torch.int64 and batch.rewards.dtype == batch.discounts.dtype == torch.float32
    assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8


def check(replay: Any, world: World, capacity: int) -> None:
    window = world.window(capacity, replay.n_step)
    assert len(replay) == len(window)
    if window:
        assert_same(everything(replay), window)


# The replay against the reference


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize(("capacity", "num_envs"), [(40, 1), (7, 1), (61, 3), (9, 3), (200, 8)])
def test_every_transition(eaudeqn: ModuleType, capacity: int, num_envs: int, n_step: int) -> None:
    """Many small episodes, checked after every step: before the ring is full, at its seam, and many rounds later."""
    for seed in range(3):
        world, replay = World(eaudeqn, num_envs, seed), replay_of(eaudeqn, capacity, num_envs, n_step=n_step)
        replay.see(world.now())
        check(replay, world, capacity)
        for _ in range(12 * replay.rows + 5):
            replay.add(*world.step())
            check(replay, world, capacity)
        assert world.endings > world.truncations > 3


def test_truncations_as_often_as_can_be(eaudeqn: ModuleType) -> None:
    """Every environment is truncated every few steps, all in the same one: the ring of last frames is long enough."""
    for capacity, num_envs, longest in ((100, 1, 3), (99, 3, 2), (300, 4, 5), (300, 2, 1)):
        world, replay = World(eaudeqn, num_envs, 7, longest), replay_of(eaudeqn, capacity, num_envs, longest=longest)
        world.length = lambda longest=longest: longest  # type: ignore[method-assign]
        world.left[:], world.capped[:] = longest, True
        replay.see(world.now())
        for _ in range(4 * replay.rows):
            replay.add(*world.step())
            check(replay, world, capacity)
        assert world.endings == world.truncations == 4 * replay.rows // longest * num_envs


def test_every_episode_under_n_steps(eaudeqn: ModuleType) -> None:
    """All ways in which six steps may end, by termination or truncation: 3 ** 6 worlds, over 3 steps each."""
    for ends in itertools.product((None, True, False), repeat=6):
        world, replay = World(eaudeqn, 1, 0), replay_of(eaudeqn, 3, 1, longest=1, n_step=3)
        replay.see(world.now())
        for terminates in ends:
            world.left[:], world.capped[:] = (99, False) if terminates is None else (1, not terminates)
            replay.add(*world.step())
        assert len(replay) == 3
        check(replay, world, 3)


def test_episodes_that_fill_the_ring(eaudeqn: ModuleType) -> None:
    """One episode without an end, longer than the ring: no stack is cut but at its start."""
    world, replay = World(eaudeqn, 2, 0, 10**6), replay_of(eaudeqn, 30, 2, longest=10**6)
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
    replay = eaudeqn.FrameReplay(1_000_000, num_envs, CPU, 0, GAMMA)
    arrays = [v for v in vars(replay).values() if isinstance(v, torch.Tensor | np.ndarray)]
    assert replay.nbytes == pytest.approx(sum(array.nbytes for array in arrays), rel=1e-6)
    assert 7_056 * 1_000_000 < replay.nbytes <= 7_130 * 1_000_000


# Against the real game


@pytest.mark.parametrize("cap", [108_000, 320])
def test_replay_gives_what_the_agent_saw(eaudeqn: ModuleType, cap: int) -> None:
    """Breakout with random actions: episodes that terminate, and with a cap of 80 steps episodes that are truncated."""
    envs, rng = eaudeqn.AtariEnvs("breakout", 2, 5, max_num_frames_per_episode=cap), np.random.default_rng(0)
    replay = eaudeqn.FrameReplay(600, 2, CPU, 0, GAMMA, episode_cap=cap // 4)
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
            discount = 0.0 if steps.terminated[i] else GAMMA
            row.append(Transition(obs[i], after, int(actions[i]), reward, discount, bool(steps.ended[i])))
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


@pytest.mark.parametrize(
    ("num_envs", "steps", "capacity"),
    [(1, 1, 150), (1, 1000, 150), (3, 5, 150), (3, 1000, 150), (3, 1000, 5000)],
)
def test_restored_games_and_replay_go_on(
    eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch, num_envs: int, steps: int, capacity: int
) -> None:
    """At any step, several episodes and seedings in, where episodes end by themselves and by the cap of 180 steps.

    The replay reaches back to the last seeding, over several of them, or to the start.
    """
    monkeypatch.setattr(eaudeqn.AtariEnvs, "RESEED_AFTER", 250)

    def begin() -> tuple[Any, Any]:
        envs = eaudeqn.AtariEnvs("breakout", num_envs, 9, max_num_frames_per_episode=720)
        replay = eaudeqn.FrameReplay(capacity, num_envs, CPU, 3, GAMMA, episode_cap=180)
        replay.see(envs.obs[:, -1])
        return envs, replay

    def play_on(envs: Any, replay: Any, rng: np.random.Generator, steps: int) -> list[tuple[np.ndarray, Any]]:
        record = []
        for _ in range(steps):
            actions = rng.integers(0, envs.num_actions, num_envs)
            envs.send(actions)
            made = envs.recv()
            replay.add(actions, made, envs.obs[:, -1])
            record.append((envs.obs.copy(), made._replace(last_frames=made.last_frames.copy())))
        return record

    (envs, replay), rng = begin(), np.random.default_rng(1)
    before = play_on(envs, replay, rng, steps)
    if steps == 1000:
        assert sum(len(made.episodes) for _, made in before) >= 5 * num_envs
        assert min(map(len, envs.seeded)) >= 3  # 1 is the first
        assert len({seeded[-1] for seeded in envs.seeded}) == num_envs  # they are not in step with each other
        assert any(made.terminated.any() for _, made in before)
        assert any((made.ended & ~made.terminated).any() for _, made in before)
    past, obs = json.loads(json.dumps(envs.past())), envs.obs.copy()
    returns, lengths, contents = envs.returns.copy(), envs.lengths.copy(), everything(replay)

    other, again = begin()
    count = 0
    for step, actions, made in other.restore(past, steps - again.rows):
        again.step = step
        again.add(actions, made, other.obs[:, -1])
        count += 1
    assert count == steps or (steps == 1000 and count < 1000 - 150 + 600), "not from the start where it need not"
    assert np.array_equal(other.obs, obs) and other.past() == past
    assert np.array_equal(other.returns, returns) and np.array_equal(other.lengths, lengths)
    assert again.range.tolist() == replay.range.tolist() and np.array_equal(again.ages, replay.ages)
    for ours, theirs, name in zip(everything(again), contents, contents._fields):
        ok = slice(None) if name != "next_obs" else contents.discounts > 0
        assert torch.equal(ours[ok], theirs[ok]), name
    bits = rng.bit_generator.state
    future = play_on(envs, replay, rng, 200)
    rng.bit_generator.state = bits
    assert_equal_records(play_on(other, again, rng, 200), future)
    assert other.past() == envs.past()
    for ours, theirs, name in zip(everything(again), everything(replay), contents._fields):
        assert name == "next_obs" or torch.equal(ours, theirs), name


def test_when_and_how_environments_are_seeded_anew(eaudeqn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first ending so many steps after the last seeding, each time and for each one with another seed."""
    given: list[list[int]] = []

    class Spy(AtariVectorEnv):
        """Notes the seeds of each reset; -1 is none."""

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            given.append(np.array(seed).tolist())
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(eaudeqn, "AtariVectorEnv", Spy)
    monkeypatch.setattr(eaudeqn.AtariEnvs, "RESEED_AFTER", 100)
    envs = eaudeqn.AtariEnvs("ms_pacman", 2, 9, max_num_frames_per_episode=200)  # every episode has 50 steps
    play(envs, np.random.default_rng(1), 410)
    assert envs.seeded == [[0, 100, 200, 300, 400]] * 2
    assert len(given) == 9 and all(min(seeds) >= 0 for seeds in given[::2]) and given[1::2] == [[-1, -1]] * 4
    assert len({seed for seeds in given[::2] for seed in seeds}) == 10


def test_restoring_another_game_is_refused(eaudeqn: ModuleType) -> None:
    envs = eaudeqn.AtariEnvs("breakout", 1, 9)
    play(envs, np.random.default_rng(1), 40)
    past = envs.past()
    past["digest"] = "0" * 64
    with pytest.raises(eaudeqn.Exit) as error:
        list(eaudeqn.AtariEnvs("breakout", 1, 9).restore(past, 0))
    assert error.value.args[0] == 1


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
    defaults = {name: p.default for name, p in inspect.signature(AtariVectorEnv.__init__).parameters.items()}
    assert others.items() <= (defaults | given).items()
    assert envs.num_actions == 4  # the minimal set: no-op, fire, right, left


def shares(pixels: int, out: int) -> np.ndarray:
    """Return [out, pixels]: how much of each output pixel an input pixel makes up when a line is resized by area."""
    edges = np.arange(out + 1) * pixels / out
    starts = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return overlap.clip(0) * out / pixels


def test_frames_are_those_of_a_plain_emulator(eaudeqn: ModuleType) -> None:
    """Four frames to a step, the maximum of the last two, grey, resized by area; rewards are their sum."""
    envs = eaudeqn.AtariEnvs("space_invaders", 1, 7)
    ale = ALEInterface()
    ale.setInt("random_seed", int(np.random.SeedSequence((7, 0, 0)).generate_state(1)[0] >> 1))
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(roms.get_rom_path("space_invaders"))
    actions, rng, total = ale.getMinimalActionSet(), np.random.default_rng(0), 0
    for _ in range(120):
        action = rng.integers(len(actions), size=1)
        envs.send(action)
        steps = envs.recv()
        reward, screens = 0, list[np.ndarray]()
        for _ in range(4):
            reward += ale.act(actions[action[0]])
            screens.append(ale.getScreenGrayscale())
        wanted = shares(210, 84) @ np.maximum(*screens[2:]) @ shares(160, 84).T
        assert np.abs(wanted - envs.obs[0, -1]).max() <= 0.51 and steps.rewards.tolist() == [reward]
        total += reward
    assert total > 0 and not steps.ended.any()


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
    assert error.value.args[0] == 2
    assert error.value.args[1].startswith(f"--env-id {env_id}") and "\n" not in error.value.args[1]
    assert nearest in error.value.args[1].removeprefix(f"--env-id {env_id}")


@pytest.mark.parametrize("env_id", ["", "xyzzy", "ALE/", "CartPole-v1", "../breakout"])
def test_no_game_at_all(eaudeqn: ModuleType, env_id: str) -> None:
    with pytest.raises(eaudeqn.Exit) as error:
        eaudeqn.find_rom(env_id)
    assert error.value.args[0] == 2


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
