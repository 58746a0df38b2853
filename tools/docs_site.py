"""A hook of mkdocs.yml: the site has docs/ at its root, and beside it what docs/ links to."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of benchmark/, agents/ and the root, with the files that they link to."""
    pages = ("CHANGELOG.md", "CONTRIBUTING.md", "agents/README.md", "benchmark/**/README.md")
    for pattern in (
        *pages,
        "benchmark/*.sh",
        "benchmark/*.csv",
        "benchmark/**/*.png",
        "agents/*.gif",
    ):
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a link from docs/ to its parent, or from elsewhere to docs/, find the site's page."""
    if page.file.generated_by is None:
        return markdown.replace("](../", "](")
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
