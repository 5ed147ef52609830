"""Protocol of engines: one ONNX graph, ready to run, on any vendor's runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from typing_extensions import Self

from advmoe_deploy.errors import UsageError
from advmoe_deploy.sealing.files import Sealed


class Engine(Protocol):
    """One ONNX graph, ready to run; a context manager, safe to call from several threads."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """The graph's outputs, in order."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output by name."""

    def close(self) -> None:
        """Release what the engine holds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


# A serialised graph, a file of ours that holds it, or a file of a bundle.
Source = bytes | Path | Sealed
# From the name of a segment and its graph to an engine.
OpenEngine = Callable[[str, Source], Engine]


def content_of(source: Source) -> bytes:
    """Return the serialised graph; of a bundle's file it is what was hashed.

    Runtimes get bytes, never a path: one that knows a path opens other files beside it.
    """
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if isinstance(source, Path) else source.read()


def name_of(source: Source) -> str:
    """Return what to call the graph in a message."""
    return "the graph" if isinstance(source, bytes) else str(source)


def require_threads(threads: int) -> None:
    """Raise :class:`UsageError` if ``threads`` is negative; 0 leaves the choice to the engine."""
    if threads < 0:
        raise UsageError(f"threads={threads} is negative; use 0 to let the engine choose")
