"""Hooks of mkdocs: what pages link to outside of docs/ comes along, below repository/.

Pages link as GitHub has them, ``../CONTRIBUTING.md`` or ``../benchmarks/results/x.json``. A site
that ends at docs/ would break those; here files are copied, Markdown is made a page, and a link to
a folder, which a site cannot show, becomes its text.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s]+)\)")
_BESIDE = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page links to, or a page among those added."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in targets(page):
            if target.is_dir() or files.get_file_from_path(place_of(target)):
                continue
            files.append(File.generated(config, place_of(target), abs_src_path=str(target)))
            waiting += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with links that are right on the site."""
    source = source_of(page.file.src_uri)

    def of_the_site(found: re.Match[str]) -> str:
        text, link = found[1], found[2]
        name, mark, anchor = link.partition("#")
        if not name or "://" in link:
            return found[0]
        target = Path(os.path.normpath(source.parent / name))
        if target.is_dir():
            return text
        place = os.path.relpath(place_of(target), Path(page.file.src_uri).parent)
        return f"[{text}]({place}{mark}{anchor})"

    return _LINK.sub(of_the_site, markdown)


def targets(page: Path) -> Iterator[Path]:
    """Yield what the page links to in the repository."""
    for found in _LINK.finditer(page.read_text(encoding="utf-8")):
        name = found[2].partition("#")[0]
        if name and "://" not in name:
            yield Path(os.path.normpath(page.parent / name))


def place_of(target: Path) -> str:
    """Return where a file of the repository lies on the site, which shows nothing hidden."""
    first, *rest = target.relative_to(ROOT).parts
    return "/".join(rest if first == "docs" else [_BESIDE, first.lstrip("."), *rest])


def source_of(place: str) -> Path:
    """Return the file of the repository that lies there on the site."""
    beside = Path(place).parts[0] == _BESIDE
    return ROOT / Path(place).relative_to(_BESIDE) if beside else ROOT / "docs" / place
