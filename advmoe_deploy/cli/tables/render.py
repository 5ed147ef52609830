"""Rendering of results with rich, on stdout."""

import io
from typing import TextIO

from rich.console import Console, RenderableType

_PLAIN_WIDTH = 120


def draw_on(stream: TextIO, picture: RenderableType) -> None:
    """Draw ``picture`` on ``stream``, wide enough for tables where it is no terminal."""
    if stream.isatty():
        Console(file=stream, highlight=False).print(picture)
        return
    console = Console(file=io.StringIO(), width=_PLAIN_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(picture)
    stream.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
