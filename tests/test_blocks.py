"""Tests of tools/blocks.py: the scripts' blocks are equal, and on made-up files it sees and repairs
copies.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "blocks.py"


def load_tool() -> ModuleType:
    """Import tools/blocks.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("blocks", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["blocks"] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


blocks = load_tool()

# Four scripts with one block, `decay`: c.py lacks a character in its third line, d.py is forked.
# Between them the lines
# outside the fences have what a careless rewrite would lose: a Windows line ending, a form feed, an
# accent, trailing
# spaces, a line separator, and a last line without its ending.
A = b"""import math
# >>> shared: decay
def decay(t: int) -> float:
    return 0.5**t
# <<< shared: decay
print(decay(1))
"""
B = b"""\xef\xbb\xbf# caf\xc3\xa9   \r
\x0c
# >>> shared: decay
def decay(t: int) -> float:
    return 0.5**t
# <<< shared: decay
x = '\xe2\x80\xa8'  # no line ending after this"""
C = b"""# first line
# >>> shared: decay
def decay(t: int) -> float:
    return 0.5*t
# <<< shared: decay
# last line, Windows\r
"""
C_REPAIRED = b"""# first line
# >>> shared: decay
def decay(t: int) -> float:
    return 0.5**t
# <<< shared: decay
# last line, Windows\r
"""
D = b"""# >>> forked: decay (decays (much) more slowly)
def decay(t: int) -> float:
    return 0.9**t
# <<< forked: decay
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the four scripts above, and a file which is not a script."""
    for name, contents in {"a.py": A, "b.py": B, "c.py": C, "d.py": D, "notes.txt": C}.items():
        (tmp_path / name).write_bytes(contents)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_blocks_of_the_scripts_are_equal() -> None:
    """The repository's own scripts pass the check, run as a user runs it: from any folder, without
    arguments.
    """
    result = subprocess.run(
        [sys.executable, str(TOOL)], cwd="/", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "with copies that differ: 0\n" in result.stdout
    assert "blocks: 0 in" not in result.stdout


def test_equal_copies_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal copies, a forked one and a block with a single, indented copy pass, and each block is
    one line.
    """
    (folder / "c.py").write_bytes(C_REPAIRED)
    single = (
        "class Args:\n    # >>> shared: flags\n    seed: int = 1\n    # <<< shared: flags\n    "
        "own: int = 2\n"
    )
    (folder / "e.py").write_text(single)
    assert blocks.main(["--root", str(folder)]) == 0
    assert capsys.readouterr().out == (
        "decay: 2 lines: a.py, b.py, c.py, d.py [forked: decays (much) more slowly]\n"
        "flags: 1 lines: e.py\n"
        "blocks: 2 in 5 files; with copies that differ: 0\n"
    )
    assert blocks.main(["check", "--root", str(folder)]) == 0


def test_a_changed_byte_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One missing character fails the check; the diff names both files and where the blocks begin
    in them.
    """
    assert blocks.main(["check", "--root", str(folder)]) == 1
    assert capsys.readouterr().out == (
        "decay: 2 lines: a.py, b.py, c.py, d.py [forked: decays (much) more slowly] DIFFERS\n"
        f"--- {folder}/a.py\tdecay, from line 2\n"
        f"+++ {folder}/c.py\tdecay, from line 2\n"
        "@@ -1,4 +1,4 @@\n"
        " # >>> shared: decay\n"
        " def decay(t: int) -> float:\n"
        "-    return 0.5**t\n"
        "+    return 0.5*t\n"
        " # <<< shared: decay\n"
        "blocks: 1 in 4 files; with copies that differ: 1\n"
        "To make copies equal: python tools/blocks.py write NAME --from FILE\n"
    )


@pytest.mark.parametrize(
    ("copy", "shown"),
    [
        (b"# >>> shared: n\nx = 1\r\n# <<< shared: n\n", "+x = 1\\r\n"),
        (b"# >>> shared: n\nx = 1 \n# <<< shared: n\n", "+x = 1 \n"),
        (b"  # >>> shared: n\nx = 1\n# <<< shared: n\n", "+  # >>> shared: n\n"),
        (b"# >>> shared: n\nx = 1\n  # <<< shared: n\n", "+  # <<< shared: n\n"),
        (b"# >>> shared: n\nx = 1\n\n# <<< shared: n\n", "+\n"),
    ],
    ids=["carriage return", "trailing space", "indented start", "indented end", "empty line"],
)
def test_a_difference_which_is_hard_to_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], copy: bytes, shown: str
) -> None:
    """Line endings, trailing spaces and the fences themselves are compared, and the diff shows
    them.
    """
    (tmp_path / "a.py").write_bytes(b"# >>> shared: n\nx = 1\n# <<< shared: n\n")
    (tmp_path / "b.py").write_bytes(copy)
    assert blocks.main(["--root", str(tmp_path)]) == 1
    assert shown in capsys.readouterr().out


def test_write_repairs_the_shared_copies_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wrong copy is replaced and nothing else: not the forked copy, nor a byte outside the
    fences, nor the mode.
    """
    (folder / "c.py").chmod(0o754)
    before = (folder / "b.py").stat().st_ino
    assert blocks.main(["write", "decay", "--from", "a.py", "--root", str(folder)]) == 0
    assert capsys.readouterr().out == f"decay: written to {folder}/c.py\n"
    assert contents(folder) == {"a.py": A, "b.py": B, "c.py": C_REPAIRED, "d.py": D, "notes.txt": C}
    assert (folder / "c.py").stat().st_mode & 0o777 == 0o754
    assert (folder / "b.py").stat().st_ino == before  # equal already, so not written again
    assert blocks.main(["--root", str(folder)]) == 0


def test_write_from_a_path(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FILE may be a path, and the chosen copy wins against a majority; what stands around the
    others is kept.
    """
    monkeypatch.chdir(folder)
    assert blocks.main(["--root", str(folder), "write", "decay", "--from", "./c.py"]) == 0
    assert (
        capsys.readouterr().out
        == f"decay: written to {folder}/a.py\ndecay: written to {folder}/b.py\n"
    )
    assert contents(folder) == {
        "a.py": A.replace(b"0.5**t", b"0.5*t"),
        "b.py": B.replace(b"0.5**t", b"0.5*t"),
        "c.py": C,
        "d.py": D,
        "notes.txt": C,
    }


def test_write_of_equal_copies_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When every shared copy is equal, write says so and leaves the files."""
    (folder / "c.py").write_bytes(C_REPAIRED)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert blocks.main(["write", "decay", "--from", "b.py", "--root", str(folder)]) == 0
    assert capsys.readouterr().out == "decay: every shared copy is equal already, nothing written\n"
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("decoy", "a.py", "no block is named decoy; blocks: decay"),
        ("decay", "z.py", "no script is z.py; scripts: a.py, b.py, c.py, d.py"),
        ("decay", "elsewhere/a.py", "no script is elsewhere/a.py; scripts: a.py, b.py, c.py, d.py"),
        (
            "decay",
            "d.py",
            "d.py has no shared copy of decay; files which have one: a.py, b.py, c.py",
        ),
    ],
    ids=["unknown block", "unknown file", "file of another folder", "forked copy"],
)
def test_write_refuses_what_does_not_exist(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, source: str, message: str
) -> None:
    """An unknown block or file is refused with status 2 in one line naming what there is, and
    nothing is written.
    """
    before = contents(folder)
    assert blocks.main(["write", name, "--from", source, "--root", str(folder)]) == 2
    assert capsys.readouterr() == ("", f"blocks.py: {message}\n")
    assert contents(folder) == before


def test_a_folder_without_scripts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped --root does not pass as a folder in which all is equal."""
    assert blocks.main(["--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr() == ("", f"blocks.py: no *.py file in {tmp_path}/none\n")


ACCEPTED = (
    '"# >>> shared: NAME", "# >>> forked: NAME (reason)", "# <<< shared: NAME" or "# <<< forked: '
    'NAME"'
)
MALFORMED = {
    "unclosed": (
        b"x = 1\n# >>> shared: n\ny = 2\n",
        '2: n is not closed; "# <<< shared: n" must follow',
    ),
    "nested": (
        b"# >>> shared: n\n# >>> forked: m (why)\n# <<< forked: m\n# <<< shared: n\n",
        '2: m starts inside n; blocks do not nest, "# <<< shared: n" must come first',
    ),
    "end without start": (
        b"x = 1\n\n    # <<< forked: n\n",
        '3: "# <<< forked: n" ends no block; "# >>> forked: n" must come before it',
    ),
    "other name": (
        b"# >>> shared: n\n# <<< shared: m\n",
        '2: "# <<< shared: m" cannot end the block of line 1; accepted: "# <<< shared: n"',
    ),
    "other kind": (
        b"# >>> forked: n (why)\n# <<< shared: n\n",
        '2: "# <<< shared: n" cannot end the block of line 1; accepted: "# <<< forked: n"',
    ),
    "second of a name": (
        b"# >>> shared: n\n# <<< shared: n\n# >>> forked: n (why)\n# <<< forked: n\n",
        "3: a second block n, after line 1; a file has at most one of a name",
    ),
    "no reason": (
        b"# >>> forked: n\n# <<< forked: n\n",
        '1: "# >>> forked: n" lacks a name or a reason; accepted: "# >>> forked: NAME (reason)"',
    ),
    "empty reason": (
        b"# >>> forked: n ( )\n# <<< forked: n\n",
        '1: "# >>> forked: n ( )" lacks a name or a reason; accepted: "# >>> forked: NAME '
        '(reason)"',
    ),
    "misspelt": (
        b"#>> share: n\nx = 1\n",
        f'1: "#>> share: n" is not a fence; accepted: {ACCEPTED}',
    ),
    "name with a space": (
        b"# >>> shared: n m\nx = 1\n",
        f'1: "# >>> shared: n m" is not a fence; accepted: {ACCEPTED}',
    ),
    "no last line ending": (
        b"# >>> shared: n\n# <<< shared: n",
        "2: the fence ends the file without a line ending; one must follow it",
    ),
    "not UTF-8": (
        b"# caf\xe9\n",
        "1: the file is not UTF-8, which a script must be (invalid continuation byte)",
    ),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_fences_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    """A malformed fence is one line with its file and line, status 1; until it is put right nothing
    is written.
    """
    (folder / "e.py").write_bytes(text)
    before = contents(folder)
    assert blocks.main(["--root", str(folder)]) == 1
    assert capsys.readouterr().out == f"{folder}/e.py:{message}\n"
    assert blocks.main(["write", "decay", "--from", "a.py", "--root", str(folder)]) == 1
    assert capsys.readouterr().out == f"{folder}/e.py:{message}\n"
    assert contents(folder) == before


def test_every_malformed_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two malformed files are two lines, in the order of their names."""
    (tmp_path / "b.py").write_text("# >>> shared: n\n")
    (tmp_path / "a.py").write_text("# >>> shared: m\n")
    assert blocks.main(["--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        f'{tmp_path}/a.py:1: m is not closed; "# <<< shared: m" must follow\n'
        f'{tmp_path}/b.py:1: n is not closed; "# <<< shared: n" must follow\n'
    )


def test_a_write_which_fails_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new text goes to a second file which then takes the name: an error before that loses and
    leaves nothing.
    """

    def fail(source: str, target: str) -> None:
        """Stand in for a full or vanished disk."""
        raise OSError("no space")

    before = contents(folder)
    monkeypatch.setattr(blocks.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        blocks.main(["write", "decay", "--from", "a.py", "--root", str(folder)])
    assert contents(folder) == before
