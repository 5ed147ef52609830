"""Options that several commands share, and how their values are read."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="NAME[:PATH]", help="Data source; 'advmoe list data' names them."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Threads of the engine; 0 leaves it the choice.")
]
TorchThreads = Annotated[
    int, typer.Option("--threads", min=0, help="CPU threads; 0 leaves it to PyTorch.")
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="NAME[:PRECISION]",
        help="'advmoe list engines' names them; openvino:bf16 runs one at that precision.",
    ),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="What 'advmoe export' wrote.")]


class OnError(str, Enum):
    """What unreadable inputs do to the exit code of a batch job."""

    keep = "keep"
    fail = "fail"


class Suite(str, Enum):
    """How hard ``verify`` attacks."""

    quick = "quick"
    standard = "standard"
    full = "full"


def use_torch_threads(threads: int) -> None:
    """Let PyTorch compute on so many threads; 0 leaves it the choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,8,64``; nonsense raises :class:`UsageError`."""
    parts = names(text)
    if not parts or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{option} '{text}' is no list of positive numbers; write 1,8,64")
    return tuple(int(part) for part in parts)


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a list such as ``dense,s-dense``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
