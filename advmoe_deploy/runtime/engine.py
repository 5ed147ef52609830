"""Protocol of engines: one ONNX graph, ready to run, on any vendor's runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from typing_extensions import Self

from advmoe_deploy.errors import UsageError


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


# A serialised graph, or its file, already verified.
Source = bytes | Path
# From the name of a segment and its graph to an engine.
OpenEngine = Callable[[str, Source], Engine]


def require_threads(threads: int) -> None:
    """Raise :class:`UsageError` if ``threads`` is negative; 0 leaves the choice to the engine."""
    if threads < 0:
        raise UsageError(f"threads={threads} is negative; use 0 to let the engine choose")
