"""Execution slots: engines, and the memory of their tensors, for one batch at a time.

A slot belongs to one batch from its images to its answer, so it needs no locks; a runner that is to
answer several threads at once has several.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.engine import Engine

# Raises if rows are not such as may be given.
ArrayCheck: TypeAlias = Callable[[NDArray[Any]], None]


class View(NamedTuple):
    """``rows`` rows of a tensor from row ``start`` on."""

    tensor: str
    rows: int
    start: int = 0


class GraphCall(NamedTuple):
    """One run of a graph, and the rows that its inputs and outputs stand for."""

    graph: str
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]


class ExecutionSlot(Protocol):
    """Tensors by name, of a fixed capacity of rows, and engines that read and write them."""

    def put(
        self, tensor: str, values: NDArray[Any], stream: int = 0, check: ArrayCheck | None = None
    ) -> None:
        """Write ``values`` into the first rows of ``tensor``, cast to its type.

        They are given to ``check`` piece by piece, each before it is written.
        """

    def run(self, *calls: GraphCall, stream: int = 0) -> None:
        """Run graphs one after the other; streams run side by side."""

    def get(self, *views: View) -> list[NDArray[Any]]:
        """Return copies of these rows; waits for what makes them."""

    def begin(self) -> None:
        """Take the device's time from here on, behind everything put so far."""

    def elapsed_ms(self) -> float:
        """Return its milliseconds from then on until the last rows were fetched."""

    def settle(self) -> None:
        """Wait until nothing is under way any more."""


class HostSlot:
    """An execution slot in host memory, over engines that take and give NumPy arrays.

    For running a set of graphs where its own device is not at hand: it answers one call after the
    other, on as many rows as the device would be given.
    """

    def __init__(self, engines: Mapping[str, Engine], capacity: Mapping[str, int]) -> None:
        """Run ``engines``, by graph; ``capacity`` says how many rows each tensor has."""
        self._engines = engines
        self._capacity = capacity
        self._tensors: dict[str, NDArray[Any]] = {}
        self._begun = self._fetched = 0.0

    def put(
        self, tensor: str, values: NDArray[Any], stream: int = 0, check: ArrayCheck | None = None
    ) -> None:
        """Write ``values`` into the first rows of ``tensor``."""
        if check is not None:
            check(values)
        self._place(tensor, values)[: len(values)] = values

    def run(self, *calls: GraphCall, stream: int = 0) -> None:
        """Run graphs one after the other; here, before anything else."""
        for call in calls:
            given = {name: self._rows(view) for name, view in call.inputs.items()}
            answers = self._engines[call.graph].run(given)
            for name, view in call.outputs.items():
                place = self._place(view.tensor, answers[name])
                place[view.start : view.start + view.rows] = answers[name]

    def get(self, *views: View) -> list[NDArray[Any]]:
        """Return copies of these rows."""
        rows = [self._rows(view).copy() for view in views]
        self._fetched = time.perf_counter()
        return rows

    def begin(self) -> None:
        """Take the time from here on."""
        self._begun = time.perf_counter()

    def elapsed_ms(self) -> float:
        """Return the milliseconds from then on until the last rows were fetched."""
        return 1e3 * (self._fetched - self._begun)

    def settle(self) -> None:
        """Do nothing: every call has ended before it returned."""

    def _rows(self, view: View) -> NDArray[Any]:
        return self._tensors[view.tensor][view.start : view.start + view.rows]

    def _place(self, tensor: str, like: NDArray[Any]) -> NDArray[Any]:
        if tensor not in self._tensors:
            shape = (self._capacity[tensor], *like.shape[1:])
            self._tensors[tensor] = np.zeros(shape, like.dtype)
        return self._tensors[tensor]
