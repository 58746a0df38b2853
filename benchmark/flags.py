"""What launch.py knows of a training script: its flags, read from its text, and their values."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common import canonical, refuse

SCRIPTS = Path(__file__).resolve().parent.parent / "cleanrl_sparse"
# SMOKE=1: what makes a run tiny, of the flags that a script has.
ONLINE = """total-timesteps 2000; learning-starts 1900; buffer-size 2000; batch-size 8 16;
    epoch-steps 1000; target-every 20; prune-every 5; max-sparsity-step 0.3 0.2; width 1 2;
    analysis-every 2000; eval-episodes 2; eval-steps 200"""
OFFLINE = """total-timesteps 60; dataset tests/data/hopper-random.hdf5; env-id Hopper-v5;
    batch-size 32; epoch-steps 20; eval-episodes 2"""
OFFLINE_ATARI = """total-timesteps 60; dataset tests/data/atari; env-id Breakout; transitions 300;
    checkpoints-per-epoch 5; batch-size 4; epoch-steps 20; target-every 10; prune-every 5;
    max-sparsity-step 0.3; width 1 2; feature-size 16 32; eval-episodes 2; eval-steps 200"""
WHOLE = ("int", "Count", "Index")  # the types of flags that take an integer
REAL = ("float", "Amount", "Rate", "Real", "Share")  # those that take a number
# Smallest and largest value of a type, and the range in a message; as the scripts have them.
RANGES = {
    "Count": (1, math.inf, "at least 1"),
    "Index": (0, 2**32 - 1, "in [0, 2^32)"),
    "Amount": (0, sys.float_info.max, "at least 0 and finite"),
    "Rate": (math.nextafter(0, 1), sys.float_info.max, "above 0 and finite"),
    "Real": (-sys.float_info.max, sys.float_info.max, "finite"),
    "Share": (0, 1, "in [0, 1]"),
}

Lists = dict[str, list[str]]  # the values of each flag, none for a switch


class Flag(NamedTuple):
    """A flag of a script."""

    default: object
    kind: str  # as its annotation has it: bool, Count, Literal["a", "b"]


@cache
def flags_of(script: str) -> dict[str, Flag]:
    """Return the flags of a script, by their names without the leading --.

    They are read from the text of Args and what it inherits: to import it would import torch.
    """
    texts = {path.name: path.read_text() for path in sorted(SCRIPTS.glob("*.py"))}
    texts = {name: text for name, text in texts.items() if "\n    total_timesteps: " in text}
    if script not in texts:
        refuse(f"{script}: no training script of cleanrl_sparse/, which has {', '.join(texts)}")
    text = texts[script]
    classes = dict(re.findall(r"(?ms)^class (\w+)(.*?)(?=^[\w@#]|\Z)", text))
    bases = re.findall(r"\w+", classes["Args"].partition(":")[0])
    found = dict[str, Flag]()
    for owner in [name for name in ("Args", *bases) if name in classes]:
        (tree,) = ast.parse(f"class {owner}{classes[owner]}").body
        for node in ast.iter_child_nodes(tree):
            if not isinstance(node, ast.AnnAssign) or node.value is None:
                continue
            name, kind = ast.unparse(node.target).replace("_", "-"), ast.unparse(node.annotation)
            if "ClassVar" not in kind and name not in ("run-dir", "resume"):
                try:
                    found[name] = Flag(ast.literal_eval(node.value), kind)
                except ValueError:
                    refuse(f"{script}: the default of --{name} must be a plain value")
    return found


def normal(script: str, name: str, value: object) -> object:
    """Return a flag's value, the same however it is written."""
    if name == "env-id":
        return canonical(str(value), script)
    try:
        return value if isinstance(value, bool) else float(str(value))
    except ValueError:
        return value


def identity(script: str, flags: dict[str, str], known: dict[str, Flag]) -> str:
    """Return the id of a run: the same however values are written and with or without defaults."""
    other = dict[str, object]()
    for name, text in flags.items():
        value: object = name in known if text == "" else text
        name = name.removeprefix("no-") if text == "" else name
        if normal(script, name, value) != normal(script, name, known[name].default):
            other[name] = normal(script, name, value)
    return hashlib.sha256(json.dumps([script, sorted(other.items())]).encode()).hexdigest()[:12]


def read_value(name: str, value: str, kind: str) -> str:
    """Return a value as the script will get it: 1e6 steps as 1000000. Refuse what it would."""
    if value[:1] == "@":
        return value
    try:
        number = float(value) if kind in WHOLE + REAL else 0.0
        if kind in WHOLE:
            exact = number.is_integer() and number < 2**53
            value = str(int(number) if exact else int(value))
    except ValueError:
        must = "an integer, such as 1000000" if kind in WHOLE else "a number"
        refuse(f"--{name} {value}: must be {must}")
    if kind in RANGES:
        low, high, accepted = RANGES[kind]
        if not low <= number <= high:
            refuse(f"--{name} {value}: must be {accepted}")
    if kind.startswith("Literal["):
        options = [str(option) for option in ast.literal_eval(f"({kind[8:-1]},)")]
        if value not in options:
            refuse(f"--{name} {value}: must be one of {', '.join(options)}")
    return value


def values_of(words: list[str], script: str, known: dict[str, Flag]) -> Lists:
    """Return the values of each flag, none for a switch."""
    lists, switches = Lists(), {name for name, flag in known.items() if flag.kind == "bool"}
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("_", "-")
            if name not in known and name.removeprefix("no-") not in switches:
                near = difflib.get_close_matches(name.partition("=")[0], known, 1)
                hint = f"; --{near[0]} is one, to be given as --{near[0]} VALUE" if near else ""
                refuse(f"{word}: {script} has no such flag{hint}")
            if name.removeprefix("no-") in {other.removeprefix("no-") for other in lists}:
                refuse(f"{word}: given twice")
            lists[name] = []
        elif lists:
            lists[name].append(word)
        else:
            refuse(f"{word}: expected --flag VALUE ... after the script")
    for name, values in lists.items():
        if name not in known or name in switches:
            if values:
                refuse(f"--{name}: a switch, which takes no value")
            continue
        if not values or "" in values:
            refuse(f"--{name}: a value is missing")
        lists[name] = [read_value(name, value, known[name].kind) for value in values]
        seen = set[object]()
        for value in lists[name]:
            if normal(script, name, value) in seen:
                refuse(f"{value}: twice in --{name}")
            seen.add(normal(script, name, value))
    return lists


def tiny(script: str, lists: Lists, known: dict[str, Flag]) -> Lists:
    """Return the values of a tiny grid: of each flag at most two, and short runs."""
    online, atari = "dataset" not in known, "checkpoints-per-epoch" in known
    for name in ("total-timesteps", "learning-starts")[: 1 + online]:
        if name not in known:
            refuse(f"SMOKE=1: {script} has no --{name}, without which a run cannot be made tiny")
    text = ONLINE if online else OFFLINE_ATARI if atari else OFFLINE
    values = {name: own for name, *own in map(str.split, text.split(";")) if name in known}
    if online and "env-id" in known:
        values["env-id"] = [str(known["env-id"].default)]
    few = {name: own[:2] for name, own in lists.items()}
    return few | {name: own[: len(few.get(name, [""]))] for name, own in values.items()}
