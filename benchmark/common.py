"""What the launcher and the plotter share: on/off environment variables, one name for one game,
messages, output that nobody needs to read.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ANCHORS = Path(__file__).parent / "anchors"
with open(ANCHORS / "atari_human_normalisation.csv", newline="") as _table:
    HUMAN = {
        row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(_table)
    }  # scores of random play and of a human, of the 55 games that have the latter
GAMES = {*HUMAN, "AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan"}
MINATAR = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
OFF, ON = ("", "0", "false", "no", "off"), ("1", "true", "yes", "on")


def say(line: str) -> None:
    """Write a line to standard error, with the program's name before it."""
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def refuse(line: str) -> NoReturn:
    """End with a line about bad input, and status 2."""
    say(line)
    sys.exit(2)


def switch(name: str) -> bool:
    """Return whether an environment variable, such as DRY, is on; exit if neither on nor off."""
    value = os.environ.get(name, "").lower()
    if value not in OFF + ON:
        refuse(f"{name}={value}: must be 1 or 0")
    return value in ON


def runs_folder() -> Path:
    """Return the folder of the runs: RUNS, by default runs; its part smoke where SMOKE is on."""
    return Path(os.environ.get("RUNS") or "runs") / ("smoke" if switch("SMOKE") else "")


def canonical(env_id: str, script: str) -> str:
    """Return the one name of an environment, of all that a script takes for it.

    Atari: MsPacman, for ms_pacman, ALE/MsPacman-v5 and MsPacmanNoFrameskip-v4. MinAtar:
    MinAtar/Breakout. Gymnasium: Hopper-v5, for Hopper. A name that is not known comes back as it
    is.
    """
    if re.search("atari|minatar|rainbow", script):
        plain = re.sub(r"^(ALE|MinAtar)/|(NoFrameskip)?(-v\d+)?$|_", "", env_id).lower()
        small = "minatar" in script
        known = {game.lower(): game for game in (MINATAR if small else GAMES)}
        return ("MinAtar/" if small else "") + known[plain] if plain in known else env_id
    if env_id and not re.search(r"-v\d+$", env_id):
        from gymnasium.envs.registration import find_highest_version

        if (version := find_highest_version(None, env_id)) is not None:
            return f"{env_id}-v{version}"
    return env_id


class Output(io.FileIO):
    """Standard output or error, whose reader may go away (| head, a closed terminal): then it is
    silent.
    """

    def write(self, data: Any) -> int:
        """Write, or drop what cannot be written."""
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def outlive_readers() -> None:
    """Let no output end a program: not a broken pipe, not a terminal that is gone, not a closed
    stream.
    """
    for fd, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        stream = io.BufferedWriter(Output(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, errors="replace", line_buffering=True))
