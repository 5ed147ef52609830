"""Figures of several runs on a terminal: rows keep their names, intervals go below figures."""

import io

import pytest
from rich.console import Console

from advmoe_deploy.cli.several.presentation import WITHSTOOD, Table, drawn

CELL = "98.5 % (96.8 to 99.3)"


@pytest.mark.parametrize(("width", "left_out"), [(120, ""), (80, "RA-E"), (64, "RA-E, PGD")])
def test_rows_keep_their_names(width: int, left_out: str) -> None:
    table = Table("title", ("run", *WITHSTOOD), (("pets (2)", *[CELL] * len(WITHSTOOD)),))
    console = Console(width=width, file=io.StringIO())
    console.print(drawn(table))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    shown = len(WITHSTOOD) - (left_out.count(",") + 1 if left_out else 0)
    assert lines[2].split() == ["pets", "(2)", *["98.5", "%"] * shown]
    assert lines[3].split() == ["(96.8", "to", "99.3)"] * shown
    assert lines[4:] == ([f"for want of width without {left_out}; --json has all"] * bool(left_out))
