"""Hooks of mkdocs: pages that lie beside ``docs/``, and links to what is no page.

./isaaclab.sh -p -m mkdocs build --strict
"""

from __future__ import annotations

import os
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
    pages = [*(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")), *map(Path, PAGES)]
    linked = {_place(page, target) for page in pages for target in LINK.findall((ROOT / page).read_text("utf-8"))}
    for path in sorted(linked):
        if (ROOT / path).is_file() and not path.startswith("docs/") and not path.endswith(".md"):
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def _place(page: Path, target: str) -> str:
    """Where a link of a page leads, from the root of the repository; paths of both are relative to that."""
    return os.path.normpath(page.parent / target.partition("#")[0])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where things are on the site; what is not there becomes plain text."""
    own = page.file.src_uri
    source = Path({name: file for file, name in PAGES.items()}.get(own, f"docs/{own}"))

    def link(match: re.Match[str]) -> str:
        place, anchor = _place(source, match[1]), match[1].partition("#")[2]
        name = PAGES.get(place, place.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return f"] (`{place}`)"
        return f"]({os.path.relpath(name, os.path.dirname(own) or '.')}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, markdown)
