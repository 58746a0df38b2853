"""The commands of README, docs and docstrings are accepted by the scripts that they call."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import SCRIPTS, load_script

ROOT = SCRIPTS.parent


def commands() -> list[tuple[str, str]]:
    """Return (script, arguments) of every command line that calls a script."""
    found = []
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(SCRIPTS.glob("*.py")),
    ]:
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^ *python (?:cleanrl_sparse/)?(\w+)\.py([^\n#]*)", text, re.MULTILINE)
    return found


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_command_is_accepted(script: str, arguments: str) -> None:
    args = tyro.cli(load_script(script).Args, args=shlex.split(arguments))
    assert args is not None


def test_docs_page_names_every_flag_difference() -> None:
    """What the docstring lists as a difference or a guess is in the docs page too, by its flag."""
    docstring = load_script("eaudeqn_atari").__doc__ or ""
    page = (ROOT / "docs" / "eaudeqn_atari.md").read_text()
    for flag in set(re.findall(r"\((--[\w-]+)", docstring)):
        assert flag in page, flag


def test_readme_lists_every_script() -> None:
    readme = (ROOT / "README.md").read_text()
    for script in SCRIPTS.glob("*.py"):
        assert Path(script).name in readme
