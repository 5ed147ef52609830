"""Classification of inputs, a batch at a time, the next of which are decoded meanwhile."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import DecodedImage
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.journal import Row
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.serving.parts import Decoded, Inputs
from advmoe_deploy.serving.rows import RowFormat

MOST_DECODERS = 4
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Window:
    """The rows of one batch, and the (width, height) of an image that was resized, if one was."""

    rows: list[Row]
    resized: tuple[int, int] | None

    @property
    def errors(self) -> int:
        """Number of rows without an answer."""
        return count_errors(self.rows)


@dataclass(frozen=True)
class FileClassifier:
    """A runner with the files that it is given to read, by ``decoders`` threads."""

    runner: Runner
    columns: RowFormat
    decoding: Decoding
    decoders: int

    def windows(
        self, inputs: Inputs, start: int, stop: int, batch: int
    ) -> Generator[Window, None, None]:
        """Yield the rows of the inputs from ``start`` to ``stop``, ``batch`` at a time."""
        names = inputs.names(start)
        with closing(self._decoded(inputs, start, stop, batch)) as decoded:
            for images in decoded:
                yield self._window(list(islice(names, len(images))), images)

    def _window(self, names: Sequence[str], decoded: Sequence[Decoded]) -> Window:
        images = [(i, item) for i, item in enumerate(decoded) if isinstance(item, DecodedImage)]
        rows = [
            self.columns.unreadable(name, item if isinstance(item, str) else "")
            for name, item in zip(names, decoded, strict=True)
        ]
        if images:
            prediction = self.runner.infer(to_float(np.stack([i.pixels for _, i in images])))
            answers = self.columns.answered([names[i] for i, _ in images], prediction)
            for (i, _), answer in zip(images, answers, strict=True):
                rows[i] = answer
        own = (self.decoding.size, self.decoding.size)
        resized = next((image.original for _, image in images if image.original != own), None)
        return Window(rows, resized)

    def _decoded(
        self, inputs: Inputs, start: int, stop: int, batch: int
    ) -> Generator[list[Decoded], None, None]:
        waiting: deque[list[Future[Decoded]]] = deque()
        reads = islice(inputs.reads(start), stop - start)
        pool = ThreadPoolExecutor(self.decoders, thread_name_prefix="decode")
        try:
            while window := list(islice(reads, batch)):
                waiting.append([pool.submit(read, self.decoding) for read in window])
                if len(waiting) > _BATCHES_AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def count_errors(rows: Iterable[Row]) -> int:
    """Return how many of ``rows`` have no answer."""
    return sum(row["error"] is not None for row in rows)
