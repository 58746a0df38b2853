"""What README, docs and docstrings say is so: commands are accepted, links lead somewhere, the
flags' defaults are those of the scripts.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import tyro
from conftest import SCRIPTS, load_script

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/*.md", "agents/*.md", "benchmark/**/*.md")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place))
# What else a page may call.
OTHERS = {"pip", ".", "pytest", "ruff", "mypy", "mkdocs", "hf", "cc", "diff", "grep", "update()"}
OTHERS |= {"arm-none-eabi-gcc", "aarch64-linux-gnu-gcc"}
FORM = ("Idea", "Run", "Flags that matter", "Differences from the paper", "Results", "Speed")


def blocks(page: str, language: str) -> list[str]:
    """Return the code of a page that is fenced as a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    """Return a file's name inside the repository."""
    return path.relative_to(ROOT).as_posix()


def commands() -> list[str]:
    """Return every command: of fenced bash, of `code` in sentences, and of docstrings."""
    found = []
    for path in PAGES:
        page = path.read_text()
        for block in blocks(page, "bash"):
            variables: dict[str, str] = {}
            for line in block.replace("\\\n", " ").splitlines():
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                    variables[assignment[1]] = assignment[2]
                elif line and not line.startswith("#"):
                    found += line.split(" && ")
        prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", prose):
            if re.match(r"(python|pytest|pip) |(\w+=\S+ )*benchmark/[\w*]+\.sh", code):
                found.append(" ".join(code.split()))
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^ *(python [^\n#]*)", text, re.MULTILINE)
    return sorted(set(found))


def load_benchmark(name: str) -> ModuleType:
    """Import benchmark/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmark" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of what is called takes the flags; a file that is named is there."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmark"), *sys.path])
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z]+=", words[0]):
        words.pop(0)
    program, *flags = words
    if program == "python" and flags[0] != "-m":
        program, *flags = flags
    with patch.dict(os.environ, DRY="1"):  # launch.py prints what it would do
        folder, name = Path(program).parent.name, Path(program).stem
        if program.endswith(".sh"):
            found = sorted(ROOT.glob(program))  # a * stands for some of them
            assert found
            for script in found:
                assert os.access(script, os.X_OK)
                subprocess.run(["bash", "-n", script], check=True)
            load_benchmark("launch").parser().parse_args(["launch", "grid", *flags])
        elif name == "launch":
            assert load_benchmark(name).main(flags) == 0
        elif program.endswith(".py") and folder in ("", "cleanrl_sparse", "benchmark"):
            module = load_benchmark(name) if folder == "benchmark" else load_script(name)
            assert tyro.cli(module.Args, args=flags)
        elif program == "python":
            assert flags[:2] == ["-m", "venv"]
        elif program not in OTHERS:
            assert (ROOT / program).is_file()
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    for file in re.findall(r"(?:tests|tools|benchmark|cleanrl_sparse)/\w+\.py", command):
        assert (ROOT / file).exists()


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    page = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    page = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", page):
        file, _, anchor = "".join(link).partition("#")
        if not file.startswith("http"):
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), file
            assert not anchor or anchor in anchors(target), link


def titled(path: Path) -> list[ModuleType]:
    """Return the scripts that a page's title names."""
    names = re.findall(r"(\w+)\.py", path.read_text().partition("\n")[0])
    return [load_script(name) for name in names]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_flags_are_those_of_the_script(path: Path) -> None:
    """A table of flags has the defaults; a script's page has the headings, in order."""
    page, scripts = path.read_text(), titled(path)
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| .* \|$", page, re.MULTILINE)
    if "\n## Idea\n" in page and path.stem != "export":
        assert rows
        headings = re.findall(r"^## (.*)", page, re.MULTILINE)
        assert tuple(headings[: len(FORM)]) == FORM, headings
    for names, values in rows:
        flags = re.findall(r"--([\w-]+)", names)
        listed = values.strip().split(", ") if values.strip() else [""] * len(flags)
        for flag, value in zip(flags, listed, strict=True):
            field = flag.replace("-", "_")
            having = [script for script in scripts if hasattr(script.Args, field)]
            assert having, flag
            for script in having:
                default = getattr(script.Args, field)
                if isinstance(default, bool):
                    assert value == ("on" if default else "off"), flag
                elif isinstance(default, str):
                    assert value == default, flag
                else:
                    assert ast.literal_eval(value.replace(",", "")) == default, flag


def test_every_flag_exists() -> None:
    """A flag that a sentence names is one of some script or tool."""
    known = "".join(path.read_text() for path in [*ROOT.glob("*/*.py"), *SCRIPTS.glob("*.py")])
    for path in PAGES:
        if path.name != "CHANGELOG.md":
            for flag in re.findall(r"`--(?:no-)?([a-z][\w-]+)", path.read_text()):
                assert re.search(rf"\b{flag}\b|\b{flag.replace('-', '_')}\b", known), (path, flag)


def test_a_twins_difference_is_as_shown() -> None:
    page = (ROOT / "docs" / "reading_order.md").read_text()
    (command,), (shown,) = blocks(page, "bash"), blocks(page, "diff")
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "".join(result.stdout.splitlines(keepends=True)[3:]) == shown


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


def test_readmes_table_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it says what a hand would find: Hopper's dense mean, of three seeds' last evaluations."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    table = importlib.import_module("front").table()
    assert f"\n\n{table}\n\n" in (ROOT / "README.md").read_text()
    results = ROOT / "benchmark" / "results"
    lines = (results / "eaudesac_mujoco.csv").read_text().splitlines()
    dense = [line.split(",") for line in lines if line.startswith("SAC dense,Hopper-v5")]
    late = [float(row[6]) for row in dense if int(row[4]) > 150_000]
    hopper = next(line for line in table.splitlines() if line.startswith("| Hopper-v5 |"))
    assert len(late) == 15 and hopper.split(" | ")[1] == f"{sum(late) / 15:,.0f}"
    eau_de = [line for line in lines if line.startswith('"EauDeSAC, pruned actor",Hopper')]
    late += [float(line.split(",")[7]) for line in eau_de if int(line.split(",")[5]) > 150_000]
    share = f"{100 * sum(late[15:]) / sum(late[:15]):.0f} %"
    assert hopper.split(" | ")[3] == f"{sum(late[15:]) / 15:,.0f} ({share})"


def test_citation_has_the_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_site_lists_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f" {path.name}\n" in site, path.name
