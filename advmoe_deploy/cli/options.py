"""Options that several commands share, and the parsing of their values."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.completion import data_sets, engines, named_models
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import require_writable
from advmoe_deploy.process import use_threads
from advmoe_deploy.settings import epsilon_of

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FOLDER|NAME[:PATH]",
        autocompletion=data_sets,
        help="A folder of images by class, or a data set of 'advmoe list data'.",
    ),
]
ClassMap = Annotated[
    str | None,
    typer.Option(
        "--class-map",
        metavar="OLD=NEW,...|FILE",
        help="What the model calls classes that --data calls otherwise.",
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(
        "--epsilon",
        metavar="RADIUS",
        parser=epsilon_of,
        help="l-inf radius in [0, 1] pixels, such as 8/255; by default the model's own.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        min=0,
        help="CPU threads of engine and PyTorch; 0: OMP_NUM_THREADS, else the usable CPUs.",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME[:PRECISION]",
        autocompletion=engines,
        help="'advmoe list engines' names them, as in openvino:bf16; by default what the bundle "
        "was exported for.",
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME[:PRECISION]",
        autocompletion=engines,
        help="Repeatable; by default what the bundle was exported for.",
    ),
]
# The end of the help of whatever takes a run or a bundle.
NAMED = ", or zoo:NAME, or hub:USER/NAME[@REVISION]."
# Not "readable": whether a file can be read, reading it shows, with one text and one exit code.
BundlePath = Annotated[
    Path,
    typer.Argument(
        readable=False,
        metavar="BUNDLE",
        help=f"What 'advmoe export' wrote{NAMED}",
        autocompletion=named_models,
    ),
]
SignedBy = Annotated[
    Path | None,
    typer.Option(
        "--require-signature",
        readable=False,
        metavar="KEY.pub",
        help="Refuse a bundle that 'advmoe sign' did not sign with the key of this public one.",
    ),
]

Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        readable=False,
        metavar="FILE.json",
        help="Of 'verify --json', 'report', 'train' or a benchmark, for the card; repeatable.",
    ),
]
License = Annotated[
    str, typer.Option("--license", metavar="ID", help="Of the weights, such as apache-2.0.")
]


AllowFragile = Annotated[
    bool,
    typer.Option(
        "--allow-fragile",
        help="Let a model pass that is no more robust than chance: to try the tools on.",
    ),
]


class LogFormat(str, Enum):
    """Format of the server's log."""

    text = "text"
    json = "json"


class OnError(str, Enum):
    """Policy on unreadable inputs: what they do to the exit code of a batch job."""

    keep = "keep"
    fail = "fail"


class Place(str, Enum):
    """Place where a batch job runs."""

    local = "local"
    ray = "ray"


class Suite(str, Enum):
    """Attack suites of ``verify``, by effort."""

    quick = "quick"
    standard = "standard"
    full = "full"


def use_torch_threads(threads: int, *, processes: int = 1) -> None:
    """Bound all threads as :func:`use_threads` does, and PyTorch's second pool as well."""
    use_threads(threads, processes=processes)
    if threads:
        import torch

        # Its size can be set once; who runs several commands in one process keeps the first.
        with suppress(RuntimeError):
            torch.set_num_interop_threads(threads)


def require_places(files: Mapping[str, Path | None]) -> None:
    """Refuse an option's file that cannot be written, before the work whose result it takes.

    Raises:
        UsageError: it is a folder.
        OSError: it has no place.
    """
    for option, file in files.items():
        try:
            if file is not None:
                require_writable(file)
        except UsageError as error:
            raise UsageError(f"{option}: {error}") from None


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,8,64``; nonsense raises :class:`UsageError`."""
    parts = names(text)
    if not parts or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{option} '{text}' is no list of positive numbers; write 1,8,64")
    return tuple(int(part) for part in parts)


def seconds_of(budget: str) -> float:
    """Return the seconds that ``90s``, ``10m`` or ``1h`` are."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found:
        raise UsageError(f"--budget {budget!r} is no time; use 90s, 10m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a list such as ``dense,s-dense``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


# The option that is short for each of these settings, and the sizes that image files come in.
_SHORT = {
    "epochs": "--epochs",
    "seed": "--seed",
    "model.image_size": "--image-size",
    "threat.epsilon": "--epsilon",
}
_SIZES = range(8, 513)


def with_short(short: Mapping[str, object], settings: Sequence[str]) -> list[str]:
    """Return ``settings`` and what the options that are ``short`` for some say, each once.

    Raises:
        UsageError: a value makes no sense, or ``--set`` says the same setting.
    """
    said = {key: value for key, value in short.items() if value is not None}
    for key, value in said.items():
        if twice := [each for each in settings if each.partition("=")[0] == key]:
            raise UsageError(
                f"{_SHORT[key]} {value} and --set {twice[0]} are one setting; give one"
            )
    if "threat.epsilon" in said:
        epsilon_of(str(said["threat.epsilon"]))
    size = said.get("model.image_size", _SIZES[0])
    if size not in _SIZES:
        raise UsageError(
            f"--image-size {size} is outside {_SIZES[0]}..{_SIZES[-1]}; write --image-size 32"
        )
    return [*settings, *(f"{key}={value}" for key, value in said.items())]
