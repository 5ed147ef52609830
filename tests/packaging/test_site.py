"""The site of the docs: no link of it is broken, and nothing on it comes from another host."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the extra docs is not installed")

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself, unlike the links that a reader follows.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon)[^>]*\bhref=[\"']?(?:https?:)?//"
    r"|@import|url\([\"']?(?:https?:)?//"
)


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", out],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there_and_what_pages_link_to(site: Path) -> None:
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    names = {page.with_name("index.md") if page.name == "README.md" else page for page in pages}
    assert not [name for name in names if not (site / name.with_suffix(".html")).is_file()]
    assert (site / "repository/CONTRIBUTING.html").is_file()
    assert (site / "repository/benchmarks/results/export_cpu.json").is_file()


def test_every_page_is_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert not [
        page
        for page in pages
        if page.name != "README.md" and f'href="{page.with_suffix(".html")}"' not in menu
    ]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert FETCHED.search('<link rel="stylesheet" href="https://fonts.example/css">')
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = FETCHED.search(file.read_text(encoding="utf-8"))
        assert not found, f"{file.name}: {found}"


@pytest.mark.parametrize(
    ("link", "complaint"), [("nowhere.md", "nowhere.md"), ("data.md#nothing", "#nothing")]
)
def test_a_broken_link_ends_the_build(link: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text(f"# Top\n\n[broken]({link}) [whole](data.md)\n")
    (tmp_path / "docs" / "data.md").write_text("# Data\n\n## Something\n")
    (tmp_path / "docs" / "programs").symlink_to(ROOT / "docs" / "programs")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("\nnav:")])
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert complaint in done.stderr
