"""Hooks of mkdocs: pages that lie beside ``docs/``, and links to what is no page.

./isaaclab.sh -p -m mkdocs build --strict
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Page beside ``docs/`` -> its name on the site."""

LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside ``docs/``, and the files that pages link to."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    texts = [path.read_text(encoding="utf-8") for path in (*(ROOT / "docs").glob("*.md"), *map(ROOT.joinpath, PAGES))]
    linked = {target.split("#")[0] for text in texts for target in LINK.findall(text)}
    for path in sorted({target.removeprefix("../") for target in linked}):
        if (ROOT / path).is_file() and not path.endswith(".md"):
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where things are on the site; what is not there becomes plain text."""

    def link(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        path = path.removeprefix("../").removeprefix("docs/")
        path = PAGES.get(path, path)
        there = not path.startswith(".") and (path == "" or files.get_file_from_path(path) is not None)
        return f"]({path}{'#' + anchor if anchor else ''})" if there else f"] (`{path}`)"

    return LINK.sub(link, markdown)
