# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "numpy>=1.26", "gymnasium>=1.2", "ale-py>=0.12.1", "mujoco>=3.3",
#                 "tyro>=0.9", "safetensors>=0.5", "tqdm>=4.66", "imageio>=2.14",
#                 "imageio-ffmpeg>=0.5"]
# ///
"""Evaluate the network of a finished run: play, print the scores, record a film.

    python evaluate.py RUN_DIR
    python evaluate.py RUN_DIR --episodes 100 --epsilon 0.05 --video breakout.mp4
    python evaluate.py RUN_DIR --episodes 100 --card       # a model card: hf upload NAME RUN_DIR
    python evaluate.py RUN_DIR/export                      # an agent written by export.py, in C

It needs only RUN_DIR/model.safetensors, which has the script and its flags in its metadata
(--card: final.json too). To use a model elsewhere, load_model() and then q_values() or
mean_actions() are all you need.

The protocol is that of training's own evaluations by default. Atari: sticky actions 0.25, losing a
life does not end an episode, 27,000 steps at most, scores undiscounted and unclipped. MinAtar
(which needs pip install --no-deps minatar): sticky actions 0.1, 10,000 steps at most. MuJoCo: the
policy's mean action, 1,000 steps at most.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import torch
import tyro
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm


@dataclass
class Args:
    """Flags."""

    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of a finished run or of its export
    episodes: int = 10  # episodes to play, at least 1
    # steps after which an episode is cut off, at least 1; by default, and at most on Atari and
    # MuJoCo: 27,000 on Atari, 10,000 on MinAtar, 1,000 on MuJoCo
    steps: int | None = None
    epsilon: float = 0.001  # Atari, MinAtar: probability of a random action, in [0, 1]
    seed: int = 0  # seed of the episodes, which training never sees; at least 0
    device: str = "cpu"  # cpu, cuda or cuda:INDEX
    video: Path | None = None  # film the first episode into this .mp4 file
    card: bool = False  # write RUN_DIR/README.md, a model card for the Hugging Face hub

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the flag."""
        require(self.episodes >= 1, f"--episodes {self.episodes}: must be at least 1")
        require(self.steps is None or self.steps >= 1, f"--steps {self.steps}: must be at least 1")
        require(0 <= self.epsilon <= 1, f"--epsilon {self.epsilon}: must be in [0, 1]")
        require(self.seed >= 0, f"--seed {self.seed}: must be at least 0")
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        found = self.device in known or (self.device == "cuda" and len(known) > 1)
        require(found, f"--device {self.device}: this machine has {', '.join(known)}")
        if self.video:
            place = self.video if self.video.exists() else self.video.parent
            writable = self.video.suffix == ".mp4" and os.access(place, os.W_OK)
            writable &= not self.video.is_dir()
            require(writable, f"--video {self.video}: must be an .mp4 file in a writable folder")


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
# >>> shared: agents
def mean_actions(weights: dict[str, Tensor], obs: Tensor) -> Tensor:
    """Return a policy's mean actions [B, A] in [-1, 1] for obs [B, O]."""
    x, i = obs, 1
    while f"actor.dense{i}.weight" in weights:
        x = F.relu(F.linear(x, weights[f"actor.dense{i}.weight"], weights[f"actor.dense{i}.bias"]))
        i += 1
    x = F.linear(x, weights["actor.output.weight"], weights["actor.output.bias"])
    return x.chunk(2, 1)[0].tanh()  # the other half is log standard deviations


def load_agent(folder: Path, use_c: bool = True) -> Any:
    """Return the agent in a folder that export.py wrote, loaded by its agent.py."""
    spec = importlib.util.spec_from_file_location("agent", folder / "agent.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Agent(folder, use_c)


# <<< shared: agents
class AtariGames:
    """N games under Dopamine's protocol; `obs` [N, 4, 84, 84] uint8, or [N, 1, 210, 160, 3]."""

    def __init__(self, env_id: str, num_envs: int, seed: int, colour: bool = False) -> None:
        titles = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
        name = re.sub(r"^ALE/|(NoFrameskip)?(-v[45])?$|_", "", env_id).lower()
        self.title = titles[name].title().replace("_", "")
        protocol: dict[str, Any] = {"repeat_action_probability": 0.25, "reward_clipping": False}
        protocol |= {"noop_max": 0, "use_fire_reset": False, "max_num_frames_per_episode": 108_000}
        if colour:
            protocol |= {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        threads = min(num_envs, os.cpu_count() or 1)
        self.envs = AtariVectorEnv(titles[name], num_envs, num_threads=threads, **protocol)
        self.num_actions = len(self.envs.ale.get_action_set())
        self.obs, _ = self.envs.reset(seed=np.array(first_seeds(seed, num_envs)) >> 1)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a step with actions [N]; return rewards and whether the episodes ended, [N]."""
        self.obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        return rewards, terminated | truncated


class MinAtarGames:
    """N MinAtar games; `obs` [N, C, 10, 10] float32, 0 or 1."""

    def __init__(self, env_id: str, num_envs: int, seed: int) -> None:
        logging.disable()  # else it warns that it cannot draw without seaborn
        from minatar import Environment

        logging.disable(logging.NOTSET)
        name = re.sub(r"^MinAtar/|-v[01]$|_", "", env_id).lower()
        name = name.replace("spaceinvaders", "space_invaders")
        self.title = name.title().replace("_", "")
        self.envs = [Environment(name) for _ in range(num_envs)]
        for env, n in zip(self.envs, first_seeds(seed, num_envs)):
            env.seed(n)
            env.reset()
        self.moves = self.envs[0].minimal_action_set()
        self.num_actions = len(self.moves)
        self.look()

    def look(self) -> None:
        """Update `obs`."""
        seen = np.stack([env.state() for env in self.envs])
        self.obs = seen.transpose(0, 3, 1, 2).astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a step with actions [N]; return rewards and whether the episodes ended, [N]."""
        results = [env.act(self.moves[action]) for env, action in zip(self.envs, actions)]
        rewards, ended = zip(*results)
        for i in np.flatnonzero(ended).tolist():  # its score no longer counts
            self.envs[i].reset()
        self.look()
        return np.array(rewards, float), np.array(ended)

    def picture(self) -> np.ndarray:
        """Return a picture of the first game, [320, 320, 3] uint8, one colour per channel."""
        shades = np.arange(1, len(self.obs[0]) + 1) / len(self.obs[0])
        colours = np.stack([shades, 1 - shades, 0.4 + 0.6 * (shades * 3 % 1)], 1)
        cells = np.zeros((10, 10, 3))
        for layer, colour in zip(self.obs[0], colours):
            cells[layer > 0] = colour
        return (255 * cells.repeat(32, 0).repeat(32, 1)).astype(np.uint8)


class Environments:
    """N Gymnasium environments, actions in [-1, 1] rescaled; `obs` [N, O] float32."""

    def __init__(self, env_id: str, num_envs: int, seed: int, **options: Any) -> None:
        import mujoco  # here, as MUJOCO_GL may be wrong

        mujoco.set_mju_user_warning(lambda x: "deprecated" in x or sys.stderr.write(f"{x}\n"))
        name = env_id if env_id in gym.registry else f"{env_id}-v5"
        self.envs = [gym.make(name, disable_env_checker=True, **options) for _ in range(num_envs)]
        space: Any = self.envs[0].action_space
        self.title, self.num_actions = name, len(space.low)
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2
        seeds = first_seeds(seed, num_envs)
        self.observe([env.reset(seed=n)[0] for env, n in zip(self.envs, seeds)])

    def observe(self, obs: Any) -> None:
        """Update `obs`."""
        self.obs = np.array(obs, np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a step with actions [N, A]; return rewards and whether the episodes ended, [N]."""
        moves = self.middle + self.half * actions
        results = [env.step(move) for env, move in zip(self.envs, moves)]
        obs, rewards, terminated, truncated, _ = zip(*results)
        self.observe(obs)
        ended = np.array(terminated) | np.array(truncated)
        for i in np.flatnonzero(ended).tolist():  # its score no longer counts
            self.envs[i].reset()
        return np.array(rewards), ended


def first_seeds(seed: int, num_envs: int) -> list[int]:
    """Return one seed for each of N environments."""
    keys = [np.random.SeedSequence((seed, i, 0)) for i in range(num_envs)]
    return [int(key.generate_state(1)[0]) for key in keys]


Games = AtariGames | MinAtarGames | Environments


def film_of(args: Args, envs: Games, env_id: str, seed: int) -> Any:
    """Return a generator that films the first episode; send it the actions of each step."""
    atari, mujoco = isinstance(envs, AtariGames), isinstance(envs, Environments)
    if mujoco and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a screen
    try:  # play the same episode again in pictures, by seed and actions
        if atari:
            film: Any = AtariGames(env_id, 1, seed, colour=True)
        elif not mujoco:
            film = MinAtarGames(env_id, 1, seed)
        else:
            options = {"render_mode": "rgb_array"}
            if isinstance(envs, Environments) and hasattr(envs.envs[0].unwrapped, "camera_name"):
                options["camera_name"] = "track"  # else a robot runs out of Gymnasium 1.4's picture
            film = Environments(env_id, 1, seed, **options)
            with suppress(KeyError, AttributeError):  # MuJoCo's floors end; the robot runs on
                film.envs[0].unwrapped.model.geom("floor").size[:2] = 0  # infinite
            film.envs[0].render()
    except Exception as error:  # of any kind, depending on the drawing library
        hint = "without a screen MuJoCo draws with EGL (libegl1), or OSMesa if MUJOCO_GL=osmesa"
        reason = " ".join(str(error).split())
        require(False, f"--video: {env_id} cannot be filmed here: {reason} ({hint})")

    def picture() -> np.ndarray:
        """Return the current picture, [H, W, 3] uint8."""
        if atari:
            return np.ascontiguousarray(film.obs[0, 0])
        return np.ascontiguousarray(film.envs[0].render()) if mujoco else film.picture()

    def write() -> Any:
        """Write the picture before each step."""
        height, width, _ = picture().shape
        rate = film.envs[0].metadata["render_fps"] if mujoco else 15
        options: Any = {"fps": rate, "macro_block_size": 2}
        path = str(args.video.absolute()) if args.video else ""
        writer = imageio_ffmpeg.write_frames(path, (width, height), **options)
        writer.send(None)
        try:
            while True:
                actions = yield
                writer.send(picture())
                film.step(actions[:1])
        finally:
            writer.close()

    filming = write()
    next(filming)
    return filming


@torch.no_grad()
def play(
    args: Args, envs: Games, act: Callable[[np.ndarray], np.ndarray], film: Any
) -> tuple[list[float], str]:
    """Play one episode in each environment; return their undiscounted returns, and in words how
    many were cut off.
    """
    scores, over = np.zeros(args.episodes), np.zeros(args.episodes, bool)
    limit = args.steps or {MinAtarGames: 10_000, Environments: 1_000}.get(type(envs), 27_000)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between its updates
    with tqdm(total=limit, unit=" step", dynamic_ncols=True, mininterval=pause) as bar:
        for _ in range(limit):
            actions = act(envs.obs)
            if film and not over[0]:
                film.send(actions)
            rewards, ended = envs.step(actions)
            scores += np.where(over, 0, rewards)
            over |= ended
            bar.set_postfix_str(f"{over.sum()} of {len(over)} episodes over", refresh=False)
            bar.update()
            if over.all():
                break
    cut = len(over) - over.sum()
    return scores.tolist(), f"; {cut} cut off after {limit:,} steps" if cut else ""


def mean_interval(scores: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of scores, from 10,000 resamples."""
    rng, size = np.random.default_rng(0), (100, len(scores))  # in parts, which need less memory
    draws = np.concatenate([rng.choice(scores, size=size).mean(1) for _ in range(100)])
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


# Random and human scores as in Dopamine and rliable, for 55 of the 60 games.
HUMAN_SCORES = """
Alien 227.8 7127.7; Amidar 5.8 1719.5; Assault 222.4 742.0; Asterix 210.0 8503.3; Asteroids 719.1
47388.7; Atlantis 12850.0 29028.1; BankHeist 14.2 753.1; BattleZone 2360.0 37187.5; BeamRider
363.9 16926.5; Berzerk 123.7 2630.4; Bowling 23.1 160.7; Boxing 0.1 12.1; Breakout 1.7 30.5;
Centipede 2090.9 12017.0; ChopperCommand 811.0 7387.8; CrazyClimber 10780.5 35829.4; DemonAttack
152.1 1971.0; DoubleDunk -18.6 -16.4; Enduro 0.0 860.5; FishingDerby -91.7 -38.7; Freeway 0.0
29.6; Frostbite 65.2 4334.7; Gopher 257.6 2412.5; Gravitar 173.0 3351.4; Hero 1027.0 30826.4;
IceHockey -11.2 0.9; Jamesbond 29.0 302.8; Kangaroo 52.0 3035.0; Krull 1598.0 2665.5;
KungFuMaster 258.5 22736.3; MontezumaRevenge 0.0 4753.3; MsPacman 307.3 6951.6; NameThisGame
2292.3 8049.0; Phoenix 761.4 7242.6; Pitfall -229.4 6463.7; Pong -20.7 14.6; PrivateEye 24.9
69571.3; Qbert 163.9 13455.0; Riverraid 1338.5 17118.0; RoadRunner 11.5 7845.0; Robotank 2.2
11.9; Seaquest 68.4 42054.7; Skiing -17098.1 -4336.9; Solaris 1236.3 12326.7; SpaceInvaders 148.0
1668.7; StarGunner 664.0 10250.0; Tennis -23.8 -8.3; TimePilot 3568.0 5229.2; Tutankham 11.4
167.6; UpNDown 533.4 11693.2; Venture 0.0 1187.5; VideoPinball 0.0 17667.9; WizardOfWor 563.5
4756.5; YarsRevenge 3092.9 54576.9; Zaxxon 32.5 9173.3"""


def human_normalized(title: str, score: float) -> float | None:
    """Return (score - random) / (human - random), or None for a game without a human score."""
    if not (found := re.search(rf"\b{title}\s(\S+)\s([^;\s]+)", HUMAN_SCORES)):
        return None
    return (score - float(found[1])) / (float(found[2]) - float(found[1]))


def write_card(
    run_dir: Path,
    steps: int,
    flags: dict[str, Any],
    name: str,
    scores: list[float],
    lines: list[str],
) -> None:
    """Write RUN_DIR/README.md: metadata for the Hugging Face hub, and the printed lines."""
    script, task = flags["script"].removesuffix(".py"), "reinforcement-learning"
    reward = f"{np.mean(scores):.2f} +/- {np.std(scores):.2f}"
    result = {
        "task": {"type": task, "name": task},
        "dataset": {"type": name, "name": name},
        "metrics": [{"type": "mean_reward", "name": "mean_reward", "value": reward}],
    }
    metadata = {
        "library_name": "cleanrl-sparse",
        "tags": [task, "deep-reinforcement-learning", "sparse", "pruning", script, name],
        "model-index": [{"name": script, "results": [result]}],
    }
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    rows = "".join(f"| `{key}` | {value} |\n" for key, value in flags.items() if value != "")
    (run_dir / "README.md").write_text(
        f"---\n{head}---\n\n# {script}.py on {name}\n\n"
        f"A network of cleanrl-sparse, after {steps:,} steps.\n\n"
        "```text\n" + "\n".join(lines) + "\n```\n\n"
        "`python cleanrl_sparse/evaluate.py FOLDER`, with the folder of this file, plays it; "
        "`load_model` in `evaluate.py` reads `model.safetensors`.\n\n"
        f"| flag | value |\n|---|---|\n{rows}"
    )


def require(accepted: bool, line: str, status: int = 2) -> None:
    """Unless `accepted`, exit with a line that names the flag or file and what is accepted."""
    if not accepted:
        tqdm.write(f"{Path(__file__).name}: {line}", sys.stderr)
        sys.exit(status)


def main(args: Args) -> None:
    """Evaluate and print."""
    agent, exported = None, (args.run_dir / "agent.bin").exists()
    require(not exported or not args.card, "--card: not for an exported agent; give its run")
    try:
        if exported:
            agent = load_agent(args.run_dir)
            flags, weights = agent.describe()
            weights = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        else:
            flags, weights = load_model(args.run_dir)
        env_id, _ = flags["env_id"], flags["script"]  # a foreign model has neither
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        line = str(error).splitlines()[0]
        require(False, line if exported else f"{args.run_dir}: no finished run is there ({line})")
    try:
        trained = json.loads((args.run_dir / "final.json").read_text())["step"] if args.card else 0
    except (OSError, ValueError, KeyError, TypeError):
        line = "final.json is missing or damaged; it needs a run's own folder"
        require(False, f"--card: {args.run_dir}/{line}")
    seed, rng = args.seed + 2_000_000, np.random.default_rng(args.seed)
    weights = {name: weight.to(args.device) for name, weight in weights.items()}
    policy = "actor.output.weight" in weights
    try:
        kind: Any = MinAtarGames if "conv.weight" in weights else AtariGames
        kind = Environments if policy else kind
        envs = kind(env_id, args.episodes, seed)
    except Exception as error:  # of any kind: a missing package, a removed environment
        require(False, f"{env_id} cannot be made: {' '.join(str(error).split())}")

    def act(obs: np.ndarray) -> np.ndarray:
        """Return the actions of all environments."""
        if agent and policy:
            return np.stack([agent.act(x) for x in obs])
        if agent:
            greedy = np.array([agent.act(x) for x in obs])
        else:
            inputs = torch.from_numpy(obs).to(args.device)
            if policy:
                return mean_actions(weights, inputs).cpu().numpy()
            inputs = inputs if kind is MinAtarGames else inputs / 255
            greedy = q_values(weights, flags, inputs).argmax(1).cpu().numpy()
        explore = rng.random(len(obs)) < args.epsilon
        return np.where(explore, rng.integers(envs.num_actions, size=len(obs)), greedy)

    if policy:
        require(args.epsilon == 0.001, f"--epsilon {args.epsilon}: not for {env_id}")
        weights = {name: w for name, w in weights.items() if name.startswith("actor.")}
    elif not agent:
        outputs, n = len(weights["output.bias"]), envs.num_actions
        require(outputs in (n, 51 * n), f"{args.run_dir}: {outputs} outputs, not {n} or 51 * {n}")
    film = film_of(args, envs, env_id, seed) if args.video else None
    scores, cut = play(args, envs, act, film)
    if film:
        film.close()
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)
    player = "an actor" if policy else "a network"
    how = "by the mean action" if policy else f"at epsilon {args.epsilon:g}"
    count = "1 episode" if args.episodes == 1 else f"{args.episodes} episodes"
    world = {AtariGames: "ALE/", MinAtarGames: "MinAtar/"}.get(kind, "")
    lines = [f"{world}{envs.title}: {count} {how}, {player} of {zeros:.1%} sparsity"]
    low, high = mean_interval(scores)
    interval = f"95 % interval [{low:.2f}, {high:.2f}], from {min(scores):g} to {max(scores):g}"
    lines += [f"return {np.mean(scores):.2f}, {interval}{cut}"]
    if kind is AtariGames:
        human = human_normalized(envs.title, float(np.mean(scores)))
        score = "this game has no human score" if human is None else f"{human:.3f}"
        lines += [f"human-normalised score: {score}"]
    for name, weight in weights.items():
        if weight.ndim > 1:
            share = float((weight == 0).float().mean())
            what = f"{share:7.2%} of {weight.numel():,} weights are zero"
            lines += [f"  {name.removesuffix('.weight'):20} {what}"]
    print("\n".join(lines))
    if args.video:
        print(f"film of the first episode: {args.video}")
    if args.card:
        write_card(args.run_dir, trained, flags, world + envs.title, scores, lines)
        print(f"model card: {args.run_dir / 'README.md'}; to publish it:")
        print(f"hf upload NAME {args.run_dir}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently at `| head`
    try:
        main(tyro.cli(Args, description=(__doc__ or "").partition("\n")[0]))
    except KeyboardInterrupt:
        require(False, "stopped; nothing was scored", 130)
