# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=2", "gymnasium>=1.2", "mujoco>=3.3", "imageio>=2.14",
#                 "ale-py>=0.12.1", "tyro>=0.9", "safetensors>=0.5", "tqdm>=4.66", "minari>=0.5",
#                 "h5py>=3.11", "pillow>=10"]
# ///
"""Record datasets for the offline scripts: MuJoCo's from SAC runs, trained first, and Atari's.

    python make_datasets.py --env-id Hopper-v5  # local/hopper/{random,medium,...}-v0
    python make_datasets.py --env-id Hopper-v5 --medium-steps 40000 --expert-steps 400000
    python make_datasets.py --env-id Breakout --run RUN_DIR    # data/Breakout/1/replay_logs

MuJoCo, for cql_offline_snip.py. First it trains two runs of sac_mujoco_gmp.py (dense, 256 units,
one seed). They differ only in length, so the medium run is the beginning of the expert run. Then
it records these datasets:

    random          uniformly random actions
    medium          the medium run's final policy, with actions drawn from it
    medium-replay   everything the medium run did, from its first step to its last
    expert          the expert run's final policy, with actions drawn from it
    medium-expert   medium and expert, one after the other

The names are relative to these runs: results are not comparable with D4RL's datasets of the same
names. A policy is recorded in whole episodes, until the first one that ends after --transitions.
Minari keeps its datasets in ~/.minari, or in MINARI_DATASETS_PATH. A dataset of the same
name is replaced if the same flags made it; otherwise it is kept and this refuses to run. Ctrl-C or
SIGTERM stops with a checkpoint; the same command continues. The printed table is also written to
--runs.

Atari, for cql_atari_eaudeqn.py and cql_atari_gmp.py: replay logs in Dopamine's format, like those
of the public DQN replay. Nothing is trained: the network of a finished run plays. The first of the
--checkpoints is random play, and in each of the others fewer actions are random, down to --epsilon
in the last, so that together they go from bad play to good, as a run's replay does. Without --run
all play is random. Each has --transitions rows, including the three black rows that Dopamine writes
before each episode; rewards are clipped. The folder must be new.
"""

from __future__ import annotations

import difflib
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

try:
    import minari
    from minari.data_collector import EpisodeBuffer
except ImportError as error:
    sys.exit(f"{error}: pip install 'minari[hf]' h5py pillow, or pip install -e '.[offline]'")


class Exit(Exception):
    """Exit(status, line) ends the program: status 2 bad input, 1 a fault while running, 75 stopped
    and resumable.
    """


def require(accepted: bool, line: str) -> None:
    """Unless `accepted`, exit with a line that names the flag or file and what is accepted."""
    if not accepted:
        raise Exit(2, line)


# flags of one kind only
ATARI = ("run", "data", "checkpoints", "epsilon")
MUJOCO = ("medium_steps", "expert_steps", "precision", "runs", "name")


@dataclass
class Args:
    """Flags."""

    # Atari game, or an environment with a vector of observations and bounded continuous actions
    env_id: str = "Hopper-v5"
    medium_steps: int = 60_000  # steps of the medium run (>= 300; before 256 nothing is learned)
    expert_steps: int = 300_000  # steps of the expert run (> --medium-steps)
    transitions: int = 50_000  # smallest number recorded of each policy (>= 1)
    seed: int = 1  # seed of the runs and of the recording, in [0, 2^32)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the runs
    runs: Path = Path("runs", "datasets")  # folder for the two runs and the table
    name: str = "local"  # first part of the datasets' names
    run: Path | None = None  # Atari: folder of a finished run whose network plays; default: random
    data: Path = Path("data")  # Atari: folder for GAME/SEED/replay_logs
    checkpoints: int = 5  # Atari: checkpoints to record, --transitions rows each (>= 1)
    epsilon: float = 0.01  # Atari: share of random actions in the last one, in [0, 1]

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        for name, least in (("medium_steps", 300), ("transitions", 1), ("checkpoints", 1)):
            value = getattr(self, name)
            require(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
        line = f"--expert-steps {self.expert_steps}: must be above --medium-steps"
        require(self.expert_steps > self.medium_steps, f"{line}, {self.medium_steps}")
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: must be in [0, 2^32)")
        require(0 <= self.epsilon <= 1, f"--epsilon {self.epsilon}: must be in [0, 1]")
        fits = bool(re.fullmatch(r"[\w.-]+", self.name)) and self.name not in ("mujoco", "D4RL")
        line = "must be letters, digits, _ . - but not Minari's own mujoco or D4RL"
        require(fits, f"--name {self.name}: {line}")


def make_env(env_id: str) -> gym.Env:
    """Make a Gymnasium environment (Hopper: Hopper-v5) with vectors of real numbers."""
    try:
        import mujoco
    except Exception as error:  # of any kind, depending on the drawing library
        text = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: mujoco cannot be imported with it"
        raise Exit(2, f"{text} ({' '.join(str(error).split())})") from None

    mujoco.set_mju_user_warning(
        lambda text: None if "deprecated" in text else print(text, file=sys.stderr)
    )
    name = next((n for n in (env_id, f"{env_id}-v5") if n in gym.registry), "")
    known = [n for n in gym.registry if not n.startswith("ALE/") and "NoFrameskip" not in n]
    near = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)) or "none"
    require(bool(name), f"--env-id {env_id}: no such environment; the nearest are: {near}")
    try:
        env = gym.make(name, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:
        raise Exit(2, f"--env-id {env_id} cannot be made: {' '.join(str(error).split())}") from None
    obs: Any = env.observation_space
    actions: Any = env.action_space
    fits = all(
        isinstance(s, gym.spaces.Box) and len(s.shape) == 1 and s.shape[0] > 0
        for s in (obs, actions)
    )
    bounded = fits and actions.dtype.kind == "f" and np.isfinite([actions.low, actions.high]).all()
    line = "needs a vector of observations and one of bounded continuous actions"
    require(bool(bounded), f"--env-id {env_id}: {line}")
    return env


class Step(NamedTuple):
    """One step of an environment."""

    obs: np.ndarray  # [O] float32
    action: np.ndarray  # [A] float32, in [-1, 1]
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray  # [O] float32, before any reset


class MujocoEnv:
    """An environment with actions in [-1, 1], rescaled to its bounds.

    `obs` [O] float32 is the current observation: after an episode has ended, the first of the next.
    Each episode has its own seed, from (seed, 0, step), as in the training scripts with one
    environment, so a run's actions suffice to replay it.
    """

    def __init__(self, env_id: str, seed: int) -> None:
        self.env = make_env(env_id)
        space: Any = self.env.action_space
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2
        self.num_actions, self.seed, self.steps = len(space.low), seed, 0
        self.begin()

    def begin(self) -> None:
        """Start an episode."""
        seed = np.random.SeedSequence((self.seed, 0, self.steps)).generate_state(1)[0]
        self.obs = self.env.reset(seed=int(seed))[0].astype(np.float32)

    def step(self, action: np.ndarray) -> Step:
        """Take a step with an action [A] in [-1, 1]; after an end the next episode starts."""
        obs, scaled = self.obs, self.middle + self.half * action
        next_obs, reward, terminated, truncated, _ = self.env.step(scaled)
        self.obs = next_obs = next_obs.astype(np.float32)
        self.steps += 1
        if terminated or truncated:
            self.begin()
        return Step(obs, action, float(reward), bool(terminated), bool(truncated), next_obs)


STOPS = (signal.SIGINT, signal.SIGTERM)
# observations [T + 1, O], actions [T, A], rewards, terminations, truncations [T]
Episode = dict[str, np.ndarray]


def train(args: Args, env_id: str, steps: int) -> Path:
    """Return the folder of a finished run of that many steps, trained now if it is missing."""
    folder = args.runs / f"{env_id}__{args.seed}__{steps}"
    script = str(Path(__file__).with_name("sac_mujoco_gmp.py"))
    starts = min(5000, max(256, args.medium_steps // 10))
    flags = {
        "env-id": env_id,
        "seed": args.seed,
        "total-timesteps": steps,
        "learning-starts": starts,
        "sparsity": 0,
        "width": 1,
        "learning-rate": 1e-3,
        "reward-scale": 1,
        "target-entropy": -1,
        "weight-decay": 0,
        "precision": args.precision,
    }
    command = ["--run-dir", folder, "--keep-checkpoint"]
    command += [x for flag, value in flags.items() for x in (f"--{flag}", value)]
    if (folder / "args.json").exists():
        try:
            command, made = ["--resume", folder], json.loads((folder / "args.json").read_text())
        except ValueError:
            raise Exit(2, f"{folder}: its args.json is damaged; delete the folder") from None
        for flag, value in flags.items():
            other = made.get(flag.replace("-", "_"))
            line = f"{folder}: made with --{flag} {other}, not {value}; give another --runs"
            require(other == value, line)
    args.runs.mkdir(parents=True, exist_ok=True)
    # The run inherits the lock and keeps it if this program is killed.
    with open(f"{folder}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            line = f"{folder}: this run is already running; wait for it or stop it"
            raise Exit(1, line) from None
        run, stops = None, list[int]()

        def stop(signum: int, _: Any) -> None:
            """Let the run stop with a checkpoint; train() waits for it."""
            stops.append(signum)
            if run:
                run.terminate()

        handlers = [signal.signal(signum, stop) for signum in STOPS]
        run = subprocess.Popen(
            [sys.executable, script, *map(str, command)], pass_fds=[lock.fileno()]
        )
        if stops:  # while it was being started
            run.terminate()
        status = run.wait()
        for signum, handler in zip(STOPS, handlers):
            signal.signal(signum, handler)
    if status or stops:
        line = f"the run in {folder} did not finish; start this again to continue it"
        raise Exit(75 if stops else max(1, status), line)
    return folder


def episodes_of(steps: Iterable[Step]) -> list[Episode]:
    """Return the steps as episodes; the last one is truncated where the steps end."""
    parts: list[list[Step]] = [[]]
    for step in steps:
        parts[-1].append(step)
        if step.terminated or step.truncated:
            parts.append([])
    episodes = list[Episode]()
    for part in filter(None, parts):
        obs, actions, rewards, terminated, _, next_obs = map(np.array, zip(*part))
        final = np.arange(len(part)) == len(part) - 1
        episodes.append(
            {
                "observations": np.concatenate([obs, next_obs[-1:]]),
                "actions": actions,
                "rewards": rewards,
                "terminations": terminated,
                "truncations": final & ~terminated,
            }
        )
    return episodes


def play(args: Args, seed: int, weights: dict[str, Tensor]) -> Iterator[Step]:
    """Yield the steps of whole episodes of an actor; without weights actions are uniform."""
    env, rng, ended = MujocoEnv(args.env_id, seed), np.random.default_rng(seed), False
    # Clones are aligned in memory, wherever the weights lie in the file; that affects rounding.
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    while env.steps < args.transitions or not ended:
        if weights:
            noise = torch.from_numpy(rng.standard_normal((1, env.num_actions), np.float32))
            action = sample(weights, torch.from_numpy(env.obs)[None], noise)[0].numpy()
        else:
            action = rng.uniform(-1, 1, env.num_actions).astype(np.float32)
        step = env.step(action)
        ended = step.terminated or step.truncated
        yield step


def sample(weights: dict[str, Tensor], obs: Tensor, noise: Tensor) -> Tensor:
    """Return an actor's actions [B, A] in [-1, 1] for obs [B, O] and standard normal noise [B, A].

    It is a Gaussian, squashed by tanh, whose log standard deviation is kept in [-20, 2].
    """
    x = obs
    for name in ("dense1", "dense2"):
        x = F.relu(F.linear(x, weights[f"actor.{name}.weight"], weights[f"actor.{name}.bias"]))
    x = F.linear(x, weights["actor.output.weight"], weights["actor.output.bias"])
    mean, log_std = x.chunk(2, 1)
    return (mean + log_std.clamp(-20, 2).exp() * noise).tanh()


def replay(args: Args, folder: Path) -> Iterator[Step]:
    """Yield every step of a run, by replaying its actions.

    They are in its last checkpoint, which --keep-checkpoint has kept.
    """
    paths = sorted((folder / "checkpoint").glob("[0-9]*"))
    require(len(paths) > 0, f"{folder}: its checkpoint is gone; delete the folder")
    past, _, last = torch.load(paths[-1], weights_only=True)["episodes"]
    env = MujocoEnv(args.env_id, args.seed)
    for action in np.frombuffer(past, np.float32).reshape(-1, env.num_actions):
        yield env.step(action)
    if not np.array_equal(env.obs, last[0].numpy()):
        line = f"{folder}: its episodes went differently; install the packages in versions.json"
        raise Exit(1, line)


def described(args: Args, env_id: str, kind: str) -> str:
    """Return a dataset's description, by which it is recognised."""
    runs = f"runs of {args.medium_steps} and {args.expert_steps} steps, {args.precision}"
    who = f"{kind} of {env_id}, recorded by cleanrl-sparse"
    return f"{who}: seed {args.seed}, {runs}, {args.transitions} transitions per policy"


def dataset_name(args: Args, env_id: str, kind: str) -> str:
    """Return a dataset's Minari id; Exit if another dataset has it."""
    name = f"{args.name}/{env_id.partition('-')[0].lower()}/{kind}-v0"
    path = Path(minari.storage.get_dataset_path(name))
    try:
        other = json.loads((path / "data" / "metadata.json").read_text()).get("description", "")
    except (OSError, ValueError):  # there is none, or writing it was interrupted
        return name
    line = f"{path} holds another dataset ({other}); give another name or delete it"
    require(other == described(args, env_id, kind), f"--name {args.name}: {line}")
    return name


def write(args: Args, kind: str, episodes: list[Episode]) -> str:
    """Write a Minari dataset, replacing one made by the same flags; return its row of the table."""
    env: Any = make_env(args.env_id)
    middle, half = ((env.action_space.high + sign * env.action_space.low) / 2 for sign in (1, -1))
    name = dataset_name(args, env.spec.id, kind)
    actions = [middle + half * episode["actions"] for episode in episodes]
    buffers = [
        EpisodeBuffer(id=i, **episode | {"actions": a})
        for i, (episode, a) in enumerate(zip(episodes, actions))
    ]
    shutil.rmtree(minari.storage.get_dataset_path(name), ignore_errors=True)
    text = described(args, env.spec.id, kind)
    space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that author and address are missing
        minari.create_dataset_from_buffers(
            name, buffers, env=env.spec, observation_space=space, description=text
        )
    digest = hashlib.sha256()
    for episode, a in zip(episodes, actions):
        keys = ("observations", "rewards", "terminations", "truncations")
        for array in (a, *(episode[key] for key in keys)):
            digest.update(array.astype(np.float32).tobytes())
    returns = [episode["rewards"].sum() for episode in episodes]
    count = sum(len(a) for a in actions)
    numbers = (
        f"{len(episodes)} | {count:,} | {np.mean(returns):,.0f} | {min(returns):,.0f} | "
        f"{max(returns):,.0f}"
    )
    return f"| {name} | {numbers} | {digest.hexdigest()[:12]} |"


# >>> shared: forward
def load_model(run_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the flags ("script" among them) and the tensors of RUN_DIR/model.safetensors."""
    with safe_open(run_dir / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["flags"]), weights


def q_values(weights: dict[str, Tensor], flags: dict[str, Any], obs: Tensor) -> Tensor:
    """Return Q-values [B, actions] for stacked frames obs [B, 4, 84, 84], floats in [0, 1], or for
    MinAtar's cells [B, C, 10, 10], 0 or 1.
    """

    def parameters(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    if "conv.weight" in weights:  # MinAtar
        x = F.relu(F.conv2d(obs, *parameters("conv"))).flatten(1)
        return F.linear(F.relu(F.linear(x, *parameters("dense"))), *parameters("output"))
    if "conv1.weight" in weights:
        x = F.relu(F.conv2d(obs, *parameters("conv1"), stride=4, padding=2))
        x = F.relu(F.conv2d(F.pad(x, (1, 2, 1, 2)), *parameters("conv2"), stride=2))
        x = F.relu(F.conv2d(x, *parameters("conv3"), padding=1))
    else:  # Impala
        x = obs
        for i, padding in ((1, 0), (2, 0), (3, 1)):
            x = F.conv2d(x, *parameters(f"stack{i}.entry"), padding=1)
            x = F.max_pool2d(x, 3, 2, padding, ceil_mode=True)
            for first in (0, 2):
                y = F.conv2d(F.relu(x), *parameters(f"stack{i}.blocks.{first}"), padding=1)
                y = F.conv2d(F.relu(y), *parameters(f"stack{i}.blocks.{first + 1}"), padding=1)
                x = x + y
        x = F.relu(x)
    x = F.relu(F.linear(x.permute(0, 2, 3, 1).flatten(1), *parameters("dense")))
    if flags.get("regulariser") == "l2-features":
        x = F.normalize(x, dim=1)
    features, x = x, F.linear(x, *parameters("output"))
    if x.shape[1] > 18 or "value.weight" in weights:  # more outputs than a game has actions
        # Logits of 51 returns from -10 to 10; dueling networks add a state value to advantages.
        returns = torch.linspace(-10, 10, 51, device=x.device)
        x = x.unflatten(1, (-1, 51))
        if "value.weight" in weights:
            x = x - x.mean(1, keepdim=True) + F.linear(features, *parameters("value"))[:, None]
        return (x.softmax(2) * returns).sum(2)
    return x


# <<< shared: forward
def find_rom(env_id: str) -> str:
    """Return the ROM (ms_pacman) of MsPacman, ALE/MsPacman-v5 or MsPacmanNoFrameskip-v4, or ""."""
    titles = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    return titles.get(re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", env_id).lower(), "")


def atari_rows(args: Args, rom: str, flags: Any, weights: Any) -> Iterator[tuple[Any, ...]]:
    """Yield rows forever: the newest frame, the action taken, its clipped reward, terminal.

    Three black rows precede each episode. Weights, if any, are a Q-network's.
    """
    protocol: dict[str, Any] = {"repeat_action_probability": 0.25, "noop_max": 0}
    protocol |= {"use_fire_reset": False, "max_num_frames_per_episode": 108_000}
    env = AtariVectorEnv(rom, 1, num_threads=1, autoreset_mode="SameStep", **protocol)
    num_actions = len(env.ale.get_action_set())
    rng, last = np.random.default_rng((args.seed, 1)), max(1, args.checkpoints - 1)
    seed = np.random.SeedSequence((args.seed + 3_000_000, 0, 0)).generate_state(1) >> 1
    obs, _ = env.reset(seed=seed.astype(np.int64))
    count, begins = 0, True
    while True:
        for _ in range(3 if begins else 0):
            yield np.zeros((84, 84), np.uint8), 0, 0.0, 0
            count += 1
        level = 1.0 if args.checkpoints > 1 else 0.0  # 1 in the first checkpoint, 0 in the last
        level *= 1 - min(count // args.transitions, last) / last
        epsilon = args.epsilon + (1 - args.epsilon) * level
        action = int(rng.integers(num_actions))
        if weights and rng.random() >= epsilon:
            with torch.no_grad():
                action = int(q_values(weights, flags, torch.from_numpy(obs) / 255).argmax())
        frame = obs[0, -1].copy()
        obs, rewards, terminated, truncated, _ = env.step(np.array([action]))
        yield frame, action, float(np.clip(rewards[0], -1, 1)), int(terminated[0])
        count, begins = count + 1, bool(terminated[0] or truncated[0])


def record_atari(args: Args, rom: str) -> None:
    """Write --checkpoints checkpoints of replay logs, with all that Dopamine needs to load them."""
    game, flags, weights = rom.title().replace("_", ""), dict[str, Any](), dict[str, Tensor]()
    folder, n = args.data / game / str(args.seed) / "replay_logs", args.transitions
    require(not folder.exists(), f"--data {args.data}: {folder} exists; delete it or name another")
    if args.run:
        try:
            flags, weights = load_model(args.run)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            require(False, f"--run {args.run}: no finished run is there ({line})")
        atari = "output.weight" in weights and "conv.weight" not in weights  # MinAtar's
        mine = atari and find_rom(flags["env_id"]) == rom
        require(mine, f"--run {args.run}: its network is not one of {game}")
    temporary = folder.with_name(".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows = atari_rows(args, rom, flags, weights)
    for number in range(args.checkpoints):
        frames, actions, rewards, terminal = zip(*(next(rows) for _ in range(n)))
        arrays = {
            "$store$_observation": np.stack(frames),
            "$store$_action": np.array(actions, np.int32),
            "$store$_reward": np.array(rewards, np.float32),
            "$store$_terminal": np.array(terminal, np.uint8),
            "add_count": np.array((number + 1) * n),
            "invalid_range": (np.arange(5) - 1) % n,  # across the ring's seam
        }
        for name, array in arrays.items():
            path = temporary / f"{name}_ckpt.{number}.gz"
            with gzip.GzipFile(path, "wb", 6, mtime=0) as file:
                np.save(file, array, allow_pickle=False)
        text = f"{sum(terminal)} episodes ended, clipped rewards add up to {sum(rewards):g}"
        print(f"{folder}: checkpoint {number}: {n:,} rows, {text}")
    temporary.rename(folder)


class Output(io.FileIO):
    """Standard output or error; what nobody reads any more is dropped."""

    def write(self, data: Any) -> int:
        """Write, or drop what cannot be written."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def outlive_readers() -> None:
    """Keep a broken pipe, a lost terminal or a closed stream from ending a run."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        stream = io.BufferedWriter(Output(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, errors="replace", line_buffering=True))


def command_line() -> None:
    """Run main; a fault ends the program with one line and an exit status."""
    try:
        main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
    except (Exit, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a bug of this script: show its traceback
        hint = "" if isinstance(error, OSError) else "these flags need more memory than there is: "
        status, line = (
            error.args if isinstance(error, Exit) else (1, hint + str(error).partition("\n")[0])
        )
        print(f"{Path(__file__).name}: {line}", file=sys.stderr)
        sys.exit(status)


def main(args: Args) -> None:
    """Train, record, and print what came out."""

    def stop(signum: int, _: Any) -> None:
        """Stop at once; an unfinished recording is made again."""
        raise Exit(75, "stopped; start this again to continue")

    for signum in STOPS:
        signal.signal(signum, stop)
    rom = find_rom(args.env_id)
    for flag in MUJOCO if rom else ATARI:
        what = "MuJoCo, and this is an Atari game" if rom else "Atari games"
        value = getattr(args, flag)
        line = f"--{flag.replace('_', '-')} {value}: is for {what}"
        require(value == getattr(Args, flag), line)
    if rom:
        return record_atari(args, rom)
    spec: Any = make_env(args.env_id).spec
    for kind in ("random", "medium", "medium-replay", "expert", "medium-expert"):
        dataset_name(args, spec.id, kind)  # refuse now what could not be written later
    medium = train(args, spec.id, args.medium_steps)
    expert = train(args, spec.id, args.expert_steps)
    kinds = {
        "random": episodes_of(play(args, args.seed + 3_000_000, {})),
        "medium": episodes_of(play(args, args.seed + 3_000_001, load_model(medium)[1])),
        "medium-replay": episodes_of(replay(args, medium)),
        "expert": episodes_of(play(args, args.seed + 3_000_002, load_model(expert)[1])),
    }
    kinds["medium-expert"] = kinds["medium"] + kinds["expert"]
    head = "| dataset | episodes | transitions | return: mean | lowest | highest | SHA-256 |"
    lines = [write(args, kind, episodes) for kind, episodes in kinds.items()]
    table = "\n".join([head, "|---|---|---|---|---|---|---|", *lines])
    (args.runs / f"{args.name}-{spec.id}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    outlive_readers()
    command_line()
