"""What holds of every page: the verdict first, green for gains alone, one file, a phone's width."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from advmoe_deploy import cli
from tests.cli.pages.shown import KINDS, Pages
from tests.serving.online.browser import CHROMIUM, browsing

PHONE = 400


class Outline(HTMLParser):
    """The headings of a page, and whatever else a reader who sees no picture depends on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_file_for_every_reader(kind: str, pages: Pages) -> None:
    page = pages[kind].read_text(encoding="utf-8")
    outline = Outline(page)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.of(
        "meta"
    )
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\((?!["']?#)|@import""", page)
    assert outline.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(b - a for a, b in pairwise(levels)) <= 1
    assert all(image["alt"] for image in outline.of("img"))
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in outline.of("svg"))
    assert all(column["scope"] in ("col", "row") for column in outline.of("th"))
    assert "prefers-color-scheme: dark" in page
    for drawing in re.findall("<svg.*?</svg>", page, re.DOTALL):
        assert "var(--ink)" in drawing
        assert "#ffffff" not in drawing


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_first_what_came_out_and_last_how(kind: str, pages: Pages) -> None:
    page = pages[kind].read_text(encoding="utf-8")
    head, rest = page.split("<main>")
    assert re.search(r"<h1 class=\"\w*\">.*\d.*</h1>", head), "no verdict"
    footer = rest[rest.index("<footer") :]
    for name in ("date", "processor", "CPU threads", "versions"):
        assert f"<dt>{name}</dt>" in footer
    assert "python 3." in footer
    assert re.search(r"\d{4}-\d\d-\d\d", footer)


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, as WCAG 2 defines it."""
    shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_what_is_written_can_be_read(shade: int, pages: Pages) -> None:
    page = pages["eval"].read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", page.split(":root {")[1 + shade]))
    assert len(colours) == 15

    def contrast(one: str, other: str) -> float:
        dark, light = sorted(luminance(colours[name]) for name in (one, other))
        return (light + 0.05) / (dark + 0.05)

    for text in ("ink", "soft", "gain", "worse", "unsure"):
        assert contrast(text, "page") >= 4.5
        assert contrast(text, "card") >= 4.5
    assert contrast("ink", "bar") >= 4.5
    for series in range(6):  # lines and bars, and the numbers in them
        assert contrast(f"series-{series}", "card") >= 4.5


@pytest.fixture(scope="module")
def width(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], int]]:
    """Return how wide a page is on a phone, in its pixels."""
    with browsing(tmp_path_factory.mktemp("browser")) as browser:

        def measured(page: Path) -> int:
            browser(
                "Emulation.setDeviceMetricsOverride",
                width=PHONE, height=800, deviceScaleFactor=1, mobile=True,
            )  # fmt: skip
            browser.open(page.as_uri())
            found: int = browser.run("return document.documentElement.scrollWidth")
            return found

        yield measured


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone(kind: str, pages: Pages, width: Callable[[Path], int]) -> None:
    assert width(pages[kind]) <= PHONE


def test_green_is_the_colour_of_gains_alone(pages: Pages) -> None:
    """Nothing on these pages is better than something else but times and operations."""
    for kind in ("report", "eval"):
        assert 'class="gain"' not in pages[kind].read_text(encoding="utf-8").split("<body>")[1]
    page = pages["profile"].read_text(encoding="utf-8")
    ratios = re.findall(r'<span class="(\w*)">([\d.]+)x', page)
    assert ratios
    for tone, shown in ratios:
        assert tone in {"", "gain" if float(shown) > 1 else "worse"}


def test_no_page_writes_an_epsilon_in_its_own_way() -> None:
    for page in Path(cli.__file__).parent.rglob("*.jinja"):
        for shown in re.findall(r"\{\{.*?\}\}", page.read_text(encoding="utf-8")):
            assert not re.search(r"\.eps(ilon)?\b(?!\|epsilon)", shown), f"{page.name}: {shown}"


def test_pages_of_what_runs_without_torch_need_none() -> None:
    program = (
        "import sys\nfor name in ('torch', 'sklearn'): sys.modules[name] = None\n"
        "import advmoe_deploy.cli.pages.eval_report, advmoe_deploy.cli.pages.profile_report\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_warnings_stand_above_all_figures(pages: Pages) -> None:
    head = pages["demo"].read_text(encoding="utf-8").split("<main>")[0]
    assert "Warning:</strong> quick form" in head
