"""Tables that fit the terminal: whole columns, of which the least important give way."""

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table

from advmoe_deploy.cli.tables.escape import escape

_UNBOUNDED = 10_000  # columns: more than any table


class FittedTable:
    """A table whose first column is text and all others figures, right-justified.

    Where it is too wide, the columns of ``least`` are left out, the first of them first, and named
    below. Where that is not enough the first column folds; nothing is cut.
    """

    def __init__(self, title: str, columns: Sequence[str], least: Sequence[str] = ()) -> None:
        self._title, self._columns, self._least = title, tuple(columns), tuple(least)
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row; what is missing at its end is empty."""
        self._rows.append(cells + ("",) * (len(self._columns) - len(cells)))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the widest table that fits, and what it leaves out."""
        left_out: tuple[str, ...] = ()
        while self._width(console, left_out) > options.max_width and left_out != self._least:
            left_out = self._least[: len(left_out) + 1]
        yield self._table(left_out)
        if left_out:
            yield escape(f"for want of width without {', '.join(left_out)}; --json has all")

    def _width(self, console: Console, left_out: Sequence[str]) -> int:
        unbounded = console.options.update(width=_UNBOUNDED)
        return Measurement.get(console, unbounded, self._table(left_out)).maximum

    def _table(self, left_out: Sequence[str]) -> Table:
        shown = [n for n, column in enumerate(self._columns) if column not in left_out]
        table = Table(title=escape(self._title), title_justify="left", box=None, pad_edge=False)
        for number in shown:
            first = number == 0
            name = escape(self._columns[number])
            table.add_column(
                name, justify="left" if first else "right", no_wrap=not first, overflow="fold"
            )
        for row in self._rows:
            table.add_row(*(row[number] for number in shown))
        return table
