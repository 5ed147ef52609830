"""Execution slot on the GPU: engines and the tensors they read and write, for one batch.

Written against the documented interface; not run on a GPU yet.
"""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import BundleError, UsageError
from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, Event, PinnedBuffer, Stream
from advmoe_deploy.runtime.tensorrt.program import Program, QueuedRuns, TensorPlace, bound_context
from advmoe_deploy.runtime.tensorrt.rows import fitting_batch
from advmoe_deploy.runtime.tensorrt.slots import ArrayCheck, GraphCall, View

# Prepared runs per execution slot: each of a batch size, or of a number of an expert's rows. Then
# the least recently used one goes.
_MOST_PREPARED = 512
_ENGINE = "engine"
# On their way to the GPU while the next ones are checked; few enough for a CPU's cache.
_PIECE_BYTES = 1 << 20
# Queued together when time is taken: the GPU would else wait for the host to queue the next.
_RUNS_PER_ROUND = 4


@dataclass(frozen=True)
class Stored:
    """A tensor that an execution slot holds: its type, its rows, and the rest of its shape."""

    dtype: np.dtype[Any]
    rows: int
    rest: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.dtype.itemsize * prod(self.rest)

    @property
    def bytes(self) -> int:
        """The bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass
class DeviceArray:
    """An array in the GPU's memory, as CuPy, Numba and PyTorch take it, until it is taken back."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_lent: bool = True

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Description by version 3 of the protocol: row by row, and everything queued is done.

        Raises:
            UsageError: it was taken back, for its memory is used again.
        """
        if not self.is_lent:
            raise UsageError("these outputs are gone; copy them before the block of on_device ends")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "stream": None,
        }


class TensorRtSlot(Closing):
    """A :class:`~advmoe_deploy.runtime.tensorrt.slots.ExecutionSlot` on the GPU."""

    def __init__(
        self, programs: Mapping[str, Program], tensors: Mapping[str, Stored], streams: int
    ) -> None:
        """Make room for ``tensors``; ``programs`` stay their owner's.

        Raises:
            MachineError: memory is used up.
        """
        self._programs = programs
        self._tensors = tensors
        with ExitStack() as stack:
            self._streams = [stack.enter_context(Stream()) for _ in range(streams)]
            self._events = [stack.enter_context(Event()) for _ in range(streams)]
            self._begun = stack.enter_context(Event(timed=True))
            self._fetched = [stack.enter_context(Event(timed=True)) for _ in range(streams)]
            self._buffers = {
                name: stack.enter_context(DeviceBuffer(stored.bytes))
                for name, stored in tensors.items()
            }
            self._stack = stack.pop_all()
        # What an engine needs while it runs: of each stream its own, for one engine, that which
        # gathers rows, runs on several at once.
        self._scratch: dict[tuple[str, int], DeviceBuffer] = {}
        self._pinned: dict[str, PinnedBuffer] = {}
        self._works: OrderedDict[tuple[Any, ...], QueuedRuns] = OrderedDict()
        # Which stream makes what lies from a row on, unless that is done for sure.
        self._makers: dict[tuple[str, int], int] = {}
        self._busy: set[int] = set()
        # The streams that rows were fetched on since time is taken; nothing while it is not.
        self._timed: set[int] | None = None

    def put(
        self, tensor: str, values: NDArray[Any], stream: int = 0, check: ArrayCheck | None = None
    ) -> None:
        """Write ``values`` into the first rows of ``tensor``, cast to its type.

        They are given to ``check`` piece by piece, each before it is written and sent.
        """
        stored, target, pinned = self._tensors[tensor], self._buffers[tensor], self._staging(tensor)
        written = pinned.array(values.shape, stored.dtype)
        rows = max(1, _PIECE_BYTES // stored.row_bytes)
        self._made(View(tensor, len(values)), stream)
        for first in range(0, len(values), rows):
            piece, offset = values[first : first + rows], first * stored.row_bytes
            if check is not None:
                check(piece)
            written[first : first + rows] = piece
            size = len(piece) * stored.row_bytes
            self._streams[stream].upload(target.address + offset, pinned.address + offset, size)

    def run(self, *calls: GraphCall, stream: int = 0) -> None:
        """Queue runs of engines; the streams that make their inputs are waited for."""
        self.start(*calls, stream=stream)

    def start(self, *calls: GraphCall, stream: int = 0) -> QueuedRuns:
        """Queue runs of engines, and return what was prepared for them."""
        for call in calls:
            for view in call.inputs.values():
                self._wait_for(view.tensor, stream)
        work = self._work(calls, stream)
        work.start(self._streams[stream])
        for call in calls:
            for view in call.outputs.values():
                self._made(view, stream)
        return work

    def get(self, *views: View) -> list[NDArray[Any]]:
        """Return copies of these rows; waits for what makes them."""
        arrays, waited = [], dict.fromkeys(map(self._download, views))
        if self._timed is not None:
            self._timed.update(waited)
            for stream in waited:
                self._fetched[stream].record(self._streams[stream])
        for stream in waited:
            self._finish(stream)
        for view in views:
            stored = self._tensors[view.tensor]
            whole = self._staging(view.tensor).array((stored.rows, *stored.rest), stored.dtype)
            arrays.append(whole[view.start : view.start + view.rows].copy())
        return arrays

    def begin(self) -> None:
        """Take the GPU's time from here on, behind everything put so far."""
        self._begun.record(self._streams[0])
        self._timed = set()

    def elapsed_ms(self) -> float:
        """Return its milliseconds from then on until the last rows were fetched."""
        streams, self._timed = self._timed or (), None
        return max((self._fetched[each].ms_since(self._begun) for each in streams), default=0.0)

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        for stream in sorted(self._busy):
            self._finish(stream)

    def place(self, view: View) -> TensorPlace:
        """Return where ``view`` lies."""
        stored = self._tensors[view.tensor]
        address = self._buffers[view.tensor].address + view.start * stored.row_bytes
        return TensorPlace(address, (view.rows, *stored.rest))

    def close(self) -> None:
        """Release contexts and memory."""
        for work in self._works.values():
            work.close()
        self._works.clear()
        for pinned in self._pinned.values():
            pinned.close()
        self._pinned.clear()
        self._stack.close()

    def _work(self, calls: tuple[GraphCall, ...], stream: int) -> QueuedRuns:
        """Return what is prepared for these runs, prepared now if it was not."""
        key = (stream, *((c.graph, *c.inputs.items(), *c.outputs.items()) for c in calls))
        work = self._works.get(key)
        if work is None:
            contexts = [self._context(call, stream) for call in calls]
            can_capture = all(self._programs[call.graph].can_capture for call in calls)
            self._works[key] = work = QueuedRuns(contexts, can_capture=can_capture)
            if len(self._works) > _MOST_PREPARED:
                self.settle()  # the one that goes may be under way
                self._works.popitem(last=False)[1].close()
        self._works.move_to_end(key)
        return work

    def _context(self, call: GraphCall, stream: int) -> Any:
        views = {**call.inputs, **call.outputs}
        places = {name: self.place(view) for name, view in views.items()}
        program, key = self._programs[call.graph], (call.graph, stream)
        if key not in self._scratch:
            buffer = DeviceBuffer(program.memory_bytes)
            self._scratch[key] = self._stack.enter_context(buffer)
        return bound_context(program, self._scratch[key], places)

    def _wait_for(self, tensor: str, stream: int) -> None:
        others = {by for (name, _), by in self._makers.items() if name == tensor} - {stream}
        for other in sorted(others):
            event = self._events[other]
            event.record(self._streams[other])
            self._streams[stream].wait_for(event)

    def _download(self, view: View) -> int:
        """Queue a copy to pinned memory behind what makes it; return on which stream."""
        stream = self._makers.get((view.tensor, view.start), 0)
        stored, size = self._tensors[view.tensor], view.rows
        offset = view.start * stored.row_bytes
        target = self._staging(view.tensor).address + offset
        source = self._buffers[view.tensor].address + offset
        self._streams[stream].download(target, source, size * stored.row_bytes)
        self._busy.add(stream)
        return stream

    def _made(self, view: View, stream: int) -> None:
        self._makers[view.tensor, view.start] = stream
        self._busy.add(stream)

    def _finish(self, stream: int) -> None:
        self._streams[stream].wait()
        self._busy.discard(stream)
        self._makers = {place: by for place, by in self._makers.items() if by != stream}

    def _staging(self, tensor: str) -> PinnedBuffer:
        if tensor not in self._pinned:
            self._pinned[tensor] = PinnedBuffer(self._tensors[tensor].bytes)
        return self._pinned[tensor]


class SingleSlot(TensorRtSlot):
    """An execution slot of one engine, whose tensors are called as the engine calls them."""

    def __init__(self, program: Program) -> None:
        """Make room for the largest batch that ``program`` was built for."""
        self._program = program
        super().__init__({_ENGINE: program}, _stored(program), streams=1)

    def start_on(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, DeviceArray]:
        """Queue a run; return where its answers will be.

        Raises:
            BundleError: the engine does not take these inputs.
            UsageError: it was not built for so large a batch.
        """
        call, rows, size = self._call(inputs)
        for name, values in inputs.items():
            self.put(name, values)
        made = self.start(call).made(0, self._program.outputs)
        return {
            name: DeviceArray(
                self._buffers[name].address,
                (shape[0] * rows // size, *shape[1:]),
                self._tensors[name].dtype,
            )
            for name, shape in made.items()
        }

    def device_ms(self, inputs: Mapping[str, NDArray[Any]], rounds: int) -> list[float]:
        """Return the milliseconds of a run on the GPU, so many times."""
        self.start_on(inputs)
        call, _, _ = self._call(inputs)
        work, (stream,), milliseconds = self.start(call), self._streams, []
        with Event(timed=True) as begun, Event(timed=True) as done:
            for turn in range(rounds + 3):  # the first ones prepare
                begun.record(stream)
                for _ in range(_RUNS_PER_ROUND):
                    work.start(stream)
                done.record(stream)
                stream.wait()
                milliseconds += [done.ms_since(begun) / _RUNS_PER_ROUND] if turn >= 3 else []
        return milliseconds

    def _call(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[GraphCall, int, int]:
        """Return the run for these inputs, how many rows they have and how many it has."""
        taken = self._program.inputs
        if inputs.keys() != taken.keys() or any(
            values.shape[1:] != taken[name].shape[1:] for name, values in inputs.items()
        ):
            wanted = ", ".join(f"{name} {facts.shape}" for name, facts in taken.items())
            raise BundleError(f"{self._program.name} takes at most {wanted}; give it these inputs")
        given = {name: len(values) for name, values in inputs.items()}
        least = {name: facts.least[0] for name, facts in taken.items()}
        most = {name: facts.shape[0] for name, facts in taken.items()}
        rows, size = fitting_batch(given, least, most)
        views = {name: View(name, given[name] * size // rows) for name in taken}
        outputs = {name: View(name, self._tensors[name].rows) for name in self._program.outputs}
        return GraphCall(_ENGINE, views, outputs), rows, size

    def fetch(self, answers: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        """Return copies of what :meth:`start_on` queued."""
        arrays = self.get(*(View(name, answer.shape[0]) for name, answer in answers.items()))
        return dict(zip(answers, arrays, strict=True))


def _stored(program: Program) -> dict[str, Stored]:
    """Return the room that the tensors of ``program`` take at its largest batch."""
    shapes = {name: facts.shape for name, facts in program.inputs.items()}
    shapes |= program.largest_outputs()
    return {
        name: Stored(program.tensors[name].dtype, shape[0], tuple(shape[1:]))
        for name, shape in shapes.items()
    }
