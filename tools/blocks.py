"""Keep every copy of the text that the scripts of cleanrl_sparse/ share identical.

The scripts import nothing from each other, so what they share stands in each of them, between two
fence lines:

    # >>> shared: NAME                      # >>> forked: NAME (reason)
    ...                                     ...
    # <<< shared: NAME                      # <<< forked: NAME

Shared copies of one name must be equal byte for byte, fences, indentation and line endings
included. A copy which must differ is forked; it needs a reason and is not compared. Blocks do not
nest, and a file has at most one of each name.

    python tools/blocks.py                         check: list blocks, print differences
    python tools/blocks.py write NAME --from FILE  write FILE's copy to the others which share NAME

Exit status: 0 all equal or written; 1 copies differ or a fence is malformed; 2 the request cannot
be followed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "cleanrl_sparse"
# Wider than a correct fence, so that a misspelt one is reported and not passed over as a comment.
FENCE_LIKE = re.compile(r"\s*#\s*(<<|>>)")
START = re.compile(r"\s*# >>> (?:shared: (\S+)|forked: (\S+) \((.*\S.*)\))")
END = re.compile(r"\s*(# <<< (?:shared|forked): \S+)")
ACCEPTED = (
    '"# >>> shared: NAME", "# >>> forked: NAME (reason)", "# <<< shared: NAME" or "# <<< forked: '
    'NAME"'
)


class Malformed(ValueError):
    """A fence which is not accepted; the message is `FILE:LINE: what is wrong and what is
    accepted`.
    """


@dataclass
class Block:
    """One copy of a block: lines [start, stop) of `source`, counted from 0, both fences
    included.
    """

    path: Path
    source: list[str]  # every line of the file, with its ending
    name: str
    reason: str | None  # why it is forked, None in a shared copy
    start: int
    stop: int = 0

    @property
    def lines(self) -> list[str]:
        """The lines of this copy with their endings, fences included."""
        return self.source[self.start : self.stop]

    @property
    def closing(self) -> str:
        """The fence which must end this block."""
        return f"# <<< {'shared' if self.reason is None else 'forked'}: {self.name}"


def parse(path: Path) -> dict[str, Block]:
    """Return the blocks of one file by name; raise Malformed at the first fence which is not
    accepted.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            source = file.readlines()
    except UnicodeDecodeError as error:
        raise Malformed(
            f"{path}:1: the file is not UTF-8, which a script must be ({error.reason})"
        ) from error
    blocks: dict[str, Block] = {}
    block: Block | None = None  # the one which is open
    for index, line in enumerate(source):
        if not FENCE_LIKE.match(line):
            continue
        text = line.rstrip("\r\n")
        start, end = START.fullmatch(text), END.fullmatch(text)
        name = start[1] or start[2] if start else ""
        if (
            text == line
        ):  # written into the middle of another file, it would swallow the next line there
            wrong = "the fence ends the file without a line ending; one must follow it"
        elif start and block:
            wrong = (
                f'{name} starts inside {block.name}; blocks do not nest, "{block.closing}" must '
                "come first"
            )
        elif start and name in blocks:
            wrong = (
                f"a second block {name}, after line {blocks[name].start + 1}; a file has at most "
                "one of a name"
            )
        elif start:
            block = Block(path, source, name, start[3], index)
            continue
        elif end and block and end[1] == block.closing:
            block.stop = index + 1
            blocks[block.name] = block
            block = None
            continue
        elif end and block:
            wrong = (
                f'"{end[1]}" cannot end the block of line {block.start + 1}; accepted: '
                f'"{block.closing}"'
            )
        elif end:
            wrong = (
                f'"{end[1]}" ends no block; "{end[1].replace("<<<", ">>>")}" must come before it'
            )
        elif text.lstrip().startswith("# >>> forked: "):
            wrong = (
                f'"{text.strip()}" lacks a name or a reason; accepted: "# >>> forked: NAME '
                '(reason)"'
            )
        else:
            wrong = f'"{text.strip()}" is not a fence; accepted: {ACCEPTED}'
        raise Malformed(f"{path}:{index + 1}: {wrong}")
    if block:
        raise Malformed(
            f'{path}:{block.start + 1}: {block.name} is not closed; "{block.closing}" must follow'
        )
    return blocks


def scan(paths: list[Path]) -> tuple[dict[str, list[Block]], list[str]]:
    """Return the copies of every block by name, in the order of `paths`, and one message per
    malformed file.
    """
    copies: dict[str, list[Block]] = {}
    problems = []
    for path in paths:
        try:
            for name, block in parse(path).items():
                copies.setdefault(name, []).append(block)
        except Malformed as error:
            problems.append(str(error))
    return copies, problems


def diff(first: Block, other: Block) -> str:
    """Return a unified diff between two copies; its line numbers count from each copy's own start
    fence.
    """
    old, new = (
        f"{block.path}\t{block.name}, from line {block.start + 1}" for block in (first, other)
    )
    lines = difflib.unified_diff(first.lines, other.lines, old, new)
    # A carriage return does not show on a screen, and may be the only difference.
    return "\n".join(line.rstrip("\n").replace("\r", "\\r") for line in lines)


def check(copies: dict[str, list[Block]], files: int) -> int:
    """Print one line per block, and diffs where shared copies differ; return the exit status."""
    differing = 0
    for name, blocks in sorted(copies.items()):
        shared = [block for block in blocks if block.reason is None]
        unequal = [block for block in shared if block.lines != shared[0].lines]
        carriers = [
            b.path.name if b.reason is None else f"{b.path.name} [forked: {b.reason}]"
            for b in blocks
        ]
        length = len((shared or blocks)[0].lines) - 2  # between the fences, in the first copy
        print(f"{name}: {length} lines: {', '.join(carriers)}{' DIFFERS' if unequal else ''}")
        for block in unequal:
            print(diff(shared[0], block))
        differing += bool(unequal)
    print(f"blocks: {len(copies)} in {files} files; with copies that differ: {differing}")
    if differing:
        print("To make copies equal: python tools/blocks.py write NAME --from FILE")
    return 1 if differing else 0


def replace_file(path: Path, text: str) -> None:
    """Replace the contents of a file at once: whoever reads it, or stops this, finds all the old or
    all the new.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def refuse(message: str) -> int:
    """Print in one line why a request cannot be followed, and return the exit status."""
    print(f"blocks.py: {message}", file=sys.stderr)
    return 2


def write(copies: dict[str, list[Block]], paths: list[Path], name: str, source: str) -> int:
    """Write the copy of block `name` in the file `source` to its other shared carriers; return the
    exit status.
    """
    chosen = [
        path for path in paths if source == path.name or Path(source).resolve() == path.resolve()
    ]
    shared = [block for block in copies.get(name, []) if block.reason is None]
    origin = next((block for block in shared if block.path in chosen), None)
    if name not in copies:
        return refuse(f"no block is named {name}; blocks: {', '.join(sorted(copies)) or 'none'}")
    if not chosen:
        return refuse(f"no script is {source}; scripts: {', '.join(path.name for path in paths)}")
    if not origin:
        names = ", ".join(block.path.name for block in shared) or "none"
        return refuse(f"{source} has no shared copy of {name}; files which have one: {names}")
    changed = [block for block in shared if block.lines != origin.lines]
    for block in changed:
        replace_file(
            block.path,
            "".join(block.source[: block.start] + origin.lines + block.source[block.stop :]),
        )
        print(f"{name}: written to {block.path}")
    if not changed:
        print(f"{name}: every shared copy is equal already, nothing written")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    common = argparse.ArgumentParser(add_help=False)
    # No default here: that of the subcommand would overwrite a --root given before it.
    text = "folder of the scripts (default: cleanrl_sparse)"
    common.add_argument("--root", type=Path, metavar="DIR", default=argparse.SUPPRESS, help=text)
    parser = argparse.ArgumentParser(
        description="Keep the text shared by the scripts equal.", parents=[common]
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(
        "check", parents=[common], help="list the blocks and compare their copies (default)"
    )
    writer = commands.add_parser(
        "write", parents=[common], help="write one copy of a block to the others"
    )
    writer.add_argument("name", help="name of the block")
    writer.add_argument(
        "--from", dest="source", required=True, metavar="FILE", help="script with the right copy"
    )
    args = parser.parse_args(argv)

    root = getattr(args, "root", SCRIPTS)
    paths = sorted(path for path in root.glob("*.py") if path.is_file())
    if not paths:
        return refuse(f"no *.py file in {root}")
    copies, problems = scan(paths)
    if problems:
        print("\n".join(problems))
        return 1
    if args.command == "write":
        return write(copies, paths, args.name, args.source)
    return check(copies, len(paths))


if __name__ == "__main__":
    sys.exit(main())
