"""Names that a stranger chose are shown as they are, and do nothing."""

import io
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.pages.plots import draw_expert_load, plot_of
from advmoe_deploy.cli.tables.bundle import bundle_contents
from advmoe_deploy.cli.tables.progress import PlainProgress
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.export.model_card import model_card
from advmoe_deploy.models.checkpoint import read_checkpoint
from advmoe_deploy.reports.text import in_markdown

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07",
    "[bold red]b[/]",
    "$\\frac{1}{2}$",
    "<script>alert(1)</script>",
)
NAMES = (*HOSTILE, "[x](http://a)", "a|b", "`c`", "# d\n# e", "a_b_c", "plain")


@pytest.fixture
def hostile(tiny_bundle: Bundle) -> Bundle:
    manifest = tiny_bundle.manifest.model_copy(update={"class_names": NAMES})
    return Bundle(tiny_bundle.path, manifest)


def test_the_terminal_gets_no_commands(hostile: Bundle) -> None:
    stream = io.StringIO()
    draw_on(stream, bundle_contents(hostile))
    shown = stream.getvalue()
    assert shown.replace("\n", "").isprintable()
    assert r"\x1b[2J" in shown
    assert "[bold red]b[/]" in shown


def test_notes_get_none_either() -> None:
    stream = io.StringIO()
    PlainProgress(stream).note("class \x1b[2J")
    assert stream.getvalue() == "class \\x1b[2J\n"


def test_the_card_shows_names_as_they_are(tiny_run: Path, hostile: Bundle) -> None:
    manifest = hostile.manifest
    checkpoint = read_checkpoint(tiny_run / "model").model_copy(update={"class_names": NAMES})
    card = model_card(checkpoint, manifest.macs, manifest.parity, {})
    (line,) = [line for line in card.splitlines() if line.startswith("Classes: ")]
    assert line.isprintable()
    for raw in ("<script>", "[x](", "a|b", "`c`", "$\\"):
        assert raw not in line.replace("\\\\", "")
    assert in_markdown("a_b") == r"a\_b"
    assert in_markdown("plain name, 3") == "plain name, 3"


def test_plots_draw_no_formulas() -> None:
    figure = Figure()
    draw_expert_load(figure.add_subplot(), [[1, 2]] * 4, HOSTILE)
    figure.draw_without_rendering()  # an unfinished formula would raise
    names = ("$x^{$", "$a$ <b>", "\x1b", "c")
    svg = plot_of("load", lambda axes: draw_expert_load(axes, [[1, 2]] * 4, names)).svg
    assert "<b>" not in svg
    assert "\x1b" not in svg
