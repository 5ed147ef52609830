"""Code blocks of README and docs/ run, in order, page by page; links and paths lead somewhere."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from advmoe_deploy.cli.tables.bundle import _OUTCOMES
from docs.programs.generate import PAGE, SETTINGS_PAGE, api_page, settings_page

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PROSE = [
    *sorted(ROOT.glob("*.md")),
    *PAGES,
    *(page for top in ("benchmarks", "tests") for page in sorted((ROOT / top).rglob("*.md"))),
]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file of the repository or, without its name, of the package; or a folder of the repository.
PATH = re.compile(
    r"`((?:[\w.-]+/)*[\w-]+\.(?:py|c|h|yml|md)|(?:advmoe_deploy|benchmarks|docs|examples|tests)/(?:\w+/)*)`"
)


# "`NAME`, `NAME` and `NAME`, if need be, in `FILE.py`"
NAME = re.compile(r"`([A-Za-z_]\w*)`")
NAMED = re.compile(r"((?:`[A-Za-z_]\w*`(?:,?\sand\s|,\s)?)+)[^`.;|]*\b(?:in|of)\s`([\w/]+\.py)`")

# Pages whose blocks train for half a minute and more; 'make slow' runs them.
LONG = {"analysis", "gate", "quickstart", "systems", "zoo"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def page_to_run(page: Path) -> object:
    marks = [pytest.mark.slow] if page.stem in LONG else []
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [page_to_run(page) for page in PAGES])
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    for language, code in BLOCK.findall(page.read_text()):
        run_block(language, code, tmp_path)


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    commands = [code for language, code in blocks if language == "bash"]
    assert len(commands) >= 5
    for code in commands:  # the block of Python is run by test_api.py
        run_block("bash", code, tmp_path)


def test_the_readme_shows_the_columns_of_verify() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert list(_OUTCOMES) in [re.split("  +", line.strip()) for line in lines]


def run_block(language: str, code: str, folder: Path) -> None:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    start = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*start, code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,  # a hang, on the busiest machine
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_the_docs_have_blocks() -> None:
    assert any(BLOCK.search(page.read_text()) for page in PAGES)


def test_the_page_of_the_api_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == api_page(), "run 'make docs'"
    assert SETTINGS_PAGE.read_text(encoding="utf-8") == settings_page(), "run 'make docs'"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_paths_in_prose_exist(page: Path) -> None:
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    for path in (path for path in paths if not re.search("[A-Z]{3}", path)):  # NAME: a placeholder
        found = any((root / path).exists() for root in (ROOT, ROOT / "advmoe_deploy", page.parent))
        assert found, f"{page.name} speaks of {path}"


def test_names_are_defined_where_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = [(name, path) for names, path in NAMED.findall(text) for name in NAME.findall(names)]
    assert len(said) > 30
    for name, path in said:
        files = [root / path for root in (ROOT / "advmoe_deploy", ROOT) if (root / path).is_file()]
        assert files, path
        assert name in {*names_in(files[0])}, f"{name} is not defined in {path}"


def names_in(file: Path) -> Iterator[str]:
    """Yield the names that a file defines, parameters and fields included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
