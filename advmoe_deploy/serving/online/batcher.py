"""Batches of many requests' images, routed once and computed by pathway.

One thread computes. What arrives is routed in slices; the rows of each pathway wait for each other
until they fill a batch, or until nothing else is to be done. A model whose routing lies inside its
graphs is one pathway here, and the graph itself sends each row to its experts. Large requests take
turns with small ones, slice by slice.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.runtime.pathways import Rows, Work, joined_rows
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.serving.online.job import Done, Job, OverloadedError, Piece, Slice, Times
from advmoe_deploy.serving.online.limits import Limits

_log = logging.getLogger(__name__)

# How much a batch weighs in the estimate of the pace.
_FRESH = 0.2
# How long no dead jobs are looked for, as a multiple of what that took; unless jobs are few.
_REST, _FEW = 200.0, 256


class Batcher:
    """Queue of jobs and the thread that computes them; jobs come from one event loop."""

    def __init__(
        self,
        work: Work,
        limits: Limits,
        *,
        expecting: Callable[[], bool] = lambda: False,
        watch: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """Begin with an empty queue.

        Args:
            work: what routes and computes.
            limits: on the queue and its batches.
            expecting: whether requests are about to come, so that waiting for them may pay.
            watch: called after each batch, in the thread that computed it.
        """
        self._work, self._limits = work, limits
        self._expecting, self._watch = expecting, watch
        self._changed = threading.Condition()
        self._jobs: dict[Job, None] = {}  # the oldest first
        self._ended: list[tuple[Job, Exception | None]] = []  # not handed over yet
        self._next_sweep = 0.0
        self._waiting = 0  # images of jobs without an answer
        self._arrived: deque[Job] = deque()
        self._pieces: dict[int, deque[Piece]] = {}  # by pathway
        self._route_s = self._run_s = 0.0  # seconds per image
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="infer", daemon=True)

    @property
    def waiting(self) -> int:
        """Images without an answer."""
        return self._waiting

    @property
    def _wait_s(self) -> float:
        """Seconds until what waits has an answer: each image is routed and run."""
        return self._waiting * (self._route_s + self._run_s)

    def start(self) -> None:
        """Begin to compute for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(
        self,
        images: NDArray[np.float32],
        timeout_s: float,
        is_gone: Callable[[], bool],
        times: Times | None = None,
    ) -> "asyncio.Future[Prediction]":
        """Return the prediction to come for float32 ``images`` [N, C, H, W] in [0, 1].

        Args:
            images: of one request.
            timeout_s: after which it is not begun any more.
            is_gone: whether nobody waits for the answer any more; asked before each batch.
            times: of the request, whose wait and computation are added before the answer comes.

        Raises:
            OverloadedError: the queue is full, so long that the time would run out, or closed.
        """
        answer: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        job = Job(images, answer, is_gone, time.monotonic() + timeout_s, times or Times())
        with self._changed:
            if self._closing:
                raise OverloadedError("it computes no more", 1.0)
            if overload := self._overload(len(images), timeout_s):
                raise overload
            self._jobs[job] = None
            self._waiting += len(images)
            self._arrived.append(job)
            self._changed.notify()
        return answer

    def overload(self, timeout_s: float) -> OverloadedError | None:
        """Return why not even a single image would be taken now, if that is so."""
        if self._has_room(1, timeout_s):
            return None
        with self._changed:
            return self._overload(1, timeout_s)

    def drop_dead(self) -> None:
        """Let go of the jobs whose clients have left or whose time is over."""
        with self._changed:
            self._sweep()

    def close(self) -> None:
        """Wait for the running batch and end the thread; what waits is not computed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _overload(self, count: int, timeout_s: float) -> OverloadedError | None:
        if self._has_room(count, timeout_s):
            return None
        self._sweep()
        if self._has_room(count, timeout_s):
            return None
        reason = f"its turn would come in {self._wait_s:.1f} s only"
        if self._waiting + count > self._limits.queue:
            reason = f"{self._waiting} images wait already, of {self._limits.queue} at most"
        return OverloadedError(reason, self._wait_s)

    def _has_room(self, count: int, timeout_s: float) -> bool:
        return self._waiting + count <= self._limits.queue and self._wait_s <= timeout_s

    def _sweep(self) -> None:
        """Drop the dead, unless it was done so lately that it would be half a percent of all work.

        Each request that is refused asks for it, and goes through all that wait.
        """
        began = time.monotonic()
        if len(self._jobs) < _FEW or began >= self._next_sweep:
            self._drop_dead()
            ended = time.monotonic()
            self._next_sweep = ended + _REST * (ended - began)

    def _drop_dead(self) -> None:
        dead = [(job, reason) for job in self._jobs if (reason := job.dead())]
        for job, reason in dead:
            self._end(job, OverloadedError(reason, self._wait_s))
        if dead:  # else they would stay until the running batch has ended
            self._arrived = deque(job for job in self._arrived if job in self._jobs)
            self._hand_over()

    def _end(self, job: Job, failure: Exception | None = None) -> None:
        if job in self._jobs:
            del self._jobs[job]
            self._waiting -= job.left
            if failure is not None:
                job.release()  # rows of it may wait at a pathway for a while
            self._ended.append((job, failure))

    def _hand_over(self) -> None:
        """Tell the event loop what has ended: all of a batch at once, since each call wakes it."""
        ended, self._ended = self._ended, []
        if ended:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_end_all, ended)

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception as error:
                _log.exception("no batch could be made; what waits has failed")
                with self._changed:
                    self._pieces.clear()
                    for job in list(self._jobs):
                        self._end(job, error)
                    self._hand_over()

    def _turn(self) -> None:
        if not self._wait():
            return
        self._route(self._next_slices())  # kept no longer: they are parts of their requests
        if taken := self._next_batch():
            self._compute(*taken)

    def _wait(self) -> bool:
        """Wait until there is something to do, and a moment longer if more of it is coming."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._jobs)
            self._sweep()
            until = next((job.came for job in self._jobs), 0.0) + self._limits.delay_s
            while (rest := until - time.monotonic()) > 0 and self._is_worth_waiting():
                self._changed.wait(rest)
            return not self._closing

    def _is_worth_waiting(self) -> bool:
        more = self._waiting < self._limits.batch and not self._closing
        return more and self._expecting()

    def _next_slices(self) -> list[Slice]:
        """Return slices of jobs in turns, so many that each pathway's batch could be full."""
        inside = sum(len(piece.numbers) for pathway in self._pieces.values() for piece in pathway)
        room, slices = self._limits.batch * self._work.pathways - inside, list[Slice]()
        with self._changed:
            while self._arrived and room > 0:
                job = self._arrived.popleft()
                if reason := job.dead():
                    self._end(job, OverloadedError(reason, self._wait_s))
                if job not in self._jobs:
                    continue
                start, stop = job.routed, min(job.routed + min(room, self._limits.batch), job.size)
                slices.append(Slice(job, np.arange(start, stop), job.images[start:stop]))
                room -= stop - start
                job.routed = stop
                if stop < job.size:
                    self._arrived.append(job)
            self._hand_over()
        return slices

    def _route(self, slices: list[Slice]) -> None:
        if not slices:
            return
        parts, began = [each.images for each in slices], time.monotonic()
        jobs = dict.fromkeys((each.job for each in slices), 0)
        try:
            # A part of a request is copied: rows of it must not keep the memory of all.
            is_whole = len(parts) == 1 and len(parts[0]) == slices[0].job.size
            images = parts[0] if is_whole else np.concatenate(parts)
            self._sort(slices, *self._work.route(images))
        except Exception as error:  # noqa: BLE001, RUF100 - it is the answer to these jobs
            self._finish(jobs, error)
            return
        seconds = time.monotonic() - began
        self._route_s += _FRESH * (seconds / len(images) - self._route_s)
        for job in jobs:
            job.times.compute += seconds

    def _sort(self, slices: list[Slice], pathways: NDArray[np.int64], rows: Rows) -> None:
        """Put the rows of the slices where those of their pathways wait."""
        at, now = 0, time.monotonic()
        for job, numbers, _ in slices:
            own_pathways, own_rows = pathways[at : at + len(numbers)], rows[at : at + len(numbers)]
            at += len(numbers)
            for pathway, own in _by_pathway(own_pathways):
                piece = Piece(job, numbers[own], own_rows[own], now)
                self._pieces.setdefault(pathway, deque()).append(piece)

    def _next_batch(self) -> tuple[int, list[Piece]] | None:
        """Return the pathway whose batch is full, or that waits longest, and rows of it."""
        with self._changed:
            for pathway, pieces in self._pieces.items():
                self._pieces[pathway] = deque(piece for piece in pieces if piece.job in self._jobs)
        sizes = {
            pathway: sum(len(p.numbers) for p in pieces) for pathway, pieces in self._pieces.items()
        }
        waiting = [pathway for pathway, size in sizes.items() if size]
        if not waiting:
            return None
        first = min(waiting, key=lambda pathway: self._pieces[pathway][0].since)
        fresh = time.monotonic() - self._pieces[first][0].since < self._limits.delay_s
        full = [pathway for pathway in waiting if sizes[pathway] >= self._limits.batch]
        pathway = full[0] if full and fresh else first
        count = self._work.count(min(sizes[pathway], self._limits.batch))
        return pathway, self._taken(pathway, count)

    def _taken(self, pathway: int, count: int) -> list[Piece]:
        taken, pieces = [], self._pieces[pathway]
        while count:
            piece = pieces.popleft()
            if len(piece.numbers) > count:
                pieces.appendleft(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece.numbers)
        return taken

    def _compute(self, pathway: int, pieces: list[Piece]) -> None:
        began, at, done = time.monotonic(), 0, Counter[Job]()
        for piece in pieces:
            done[piece.job] += len(piece.numbers)
        for job in done:
            if not job.begun:
                routing_s = job.times.compute
                job.times.wait, job.begun = began - job.came - routing_s, True
        try:
            answer = self._work.run(pathway, joined_rows([piece.rows for piece in pieces]))
            for piece in pieces:
                piece.job.put(piece.numbers, answer[at : at + len(piece.numbers)])
                at += len(piece.numbers)
        except Exception as error:  # noqa: BLE001, RUF100 - it is the answer to these jobs
            self._finish(done, error)
            return
        seconds = time.monotonic() - began
        self._run_s += _FRESH * (seconds / done.total() - self._run_s)
        for job in done:
            job.times.compute += seconds
        self._finish(done, None)
        try:
            self._watch(Done(answer, seconds))
        except Exception:  # noqa: BLE001, RUF100 - whoever watches must not end this thread
            _log.exception("a batch was not counted")

    def _finish(self, done: Mapping[Job, int], failure: Exception | None) -> None:
        """Count the images that are ``done``, and end the jobs that are, or that failed."""
        with self._changed:
            for job, count in done.items():
                if job in self._jobs:
                    job.left -= count
                    self._waiting -= count
                    if failure is not None or not job.left:
                        self._end(job, failure)
            self._hand_over()


def _by_pathway(
    pathways: NDArray[np.int64],
) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
    """Yield each of the ``pathways`` of some rows, and which rows: without a copy if all are."""
    first = int(pathways[0])
    if (pathways == first).all():
        yield first, slice(None)
        return
    for pathway in np.unique(pathways):
        yield int(pathway), np.flatnonzero(pathways == pathway)


def _end_all(ended: list[tuple[Job, Exception | None]]) -> None:
    for job, failure in ended:
        job.end(failure)
