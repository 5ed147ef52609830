"""Jobs over many files: how inputs are classified, and what came of it."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.process import default_threads, usable_cpus
from advmoe_deploy.progress import Progress
from advmoe_deploy.runtime.select import engine_for, open_runner, resolved
from advmoe_deploy.serving.classify import MOST_DECODERS, FileClassifier, Window
from advmoe_deploy.serving.parts import Inputs
from advmoe_deploy.serving.rows import RowFormat
from advmoe_deploy.serving.search import Skipped
from advmoe_deploy.serving.spread import SpreadJob, windows_by_ray
from advmoe_deploy.serving.tally import FolderAccuracy, Tally, Unread, labels_in, trained_on
from advmoe_deploy.specs import Frozen, Precision

# Where a job runs.
Place = Literal["local", "ray"]


class BatchReport(Frozen):
    """Results of a batch job: ``images`` rows, of which ``errors`` have no answer.

    ``resumed`` rows came from an earlier, interrupted run; ``images_per_s`` is about the others.
    ``unread`` are the first few without an answer, ``skipped`` says what else is there and why it
    has no row. ``accuracy`` is known where the input is a folder, whose sub-folders are classes.
    """

    output: str
    engine: str
    precision: Precision
    images: int
    errors: int
    resumed: int
    seconds: float
    images_per_s: float
    unread: tuple[Unread, ...] = ()
    accuracy: FolderAccuracy | None = None
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Job:
    """Settings of a batch job."""

    bundle: Bundle
    columns: RowFormat
    engine: str
    threads: int
    batch: int
    on: Place
    progress: Progress

    @contextmanager
    def windows(self, inputs: Inputs, start: int) -> Iterator[Iterator[Window]]:
        """Yield what yields the rows of the inputs from ``start`` on, a batch at a time."""
        bundle, columns = self.bundle, self.columns
        if self.on == "ray":
            spread = SpreadJob.of(bundle, columns, self.engine, self.threads, self.batch)
            opened = windows_by_ray(spread, inputs, start)
        else:
            opened = _windows(bundle, inputs, columns, self.engine, self.threads, self.batch, start)
        with opened as windows:
            yield _saying_resized(windows, bundle.manifest.decoding.size, self.progress)

    def report(
        self,
        output: str,
        tally: Tally,
        inputs: Inputs,
        started: float,
        *,
        images: int,
        errors: int,
        resumed: int,
    ) -> BatchReport:
        """Return what came of it."""
        seconds = time.perf_counter() - started
        name, precision = resolved(self.bundle, self.engine)
        return BatchReport(
            output=output,
            engine=name,
            precision=precision,
            images=images,
            errors=errors,
            resumed=resumed,
            seconds=seconds,
            images_per_s=(images - resumed) / seconds,
            unread=tuple(tally.unread),
            accuracy=tally.accuracy,
            skipped=inputs.skipped,
        )


def job_of(
    bundle: Bundle,
    engine: str | None,
    threads: int,
    batch: int,
    top_k: int,
    on: Place,
    progress: Progress,
) -> Job:
    """Return the job; values that make no sense raise :class:`UsageError`."""
    columns = columns_of(bundle, batch, top_k)
    if on not in get_args(Place):
        raise unknown_name("place", on, get_args(Place))
    chosen = engine_for(bundle, engine, progress.note)
    resolved(bundle, chosen)  # refuses an unknown one before anything is read
    return Job(bundle, columns, chosen, threads, batch, on, progress)


def require_limit(max_errors: int | None) -> None:
    """Raise :class:`UsageError` if ``max_errors`` is no limit."""
    if max_errors is not None and max_errors < 0:
        raise UsageError(f"max_errors={max_errors} is below 0; pass --max-errors 0 for none")


def tally_of(source: str, inputs: Inputs, bundle: Bundle, progress: Progress) -> Tally:
    """Return a tally that knows the labels of ``inputs``, where ``source`` has any."""
    labels, note = labels_in(source, inputs.names(), bundle.manifest.class_names)
    if note:
        progress.note(note)
    return Tally(labels, trained_on=trained_on(source, bundle.manifest.data))


@contextmanager
def _windows(
    bundle: Bundle,
    inputs: Inputs,
    columns: RowFormat,
    engine: str,
    threads: int,
    batch: int,
    start: int,
) -> Iterator[Iterator[Window]]:
    decoders = min(MOST_DECODERS, threads or default_threads() or usable_cpus())
    with open_runner(bundle, engine, threads=threads) as runner:
        classifier = FileClassifier(runner, columns, bundle.manifest.decoding, decoders)
        with closing(classifier.windows(inputs, start, len(inputs), batch)) as windows:
            yield windows


def _saying_resized(windows: Iterator[Window], size: int, progress: Progress) -> Iterator[Window]:
    said = False
    for window in windows:
        if window.resized and not said:
            said = True
            width, height = window.resized
            progress.note(
                f"some images are not {size} x {size} (the first: {width} x {height}); their "
                "central square is cut out and resized, as in training"
            )
        yield window


def columns_of(bundle: Bundle, batch: int, top_k: int) -> RowFormat:
    """Return the columns of the rows that ``bundle`` answers; nonsense raises UsageError."""
    names = bundle.manifest.class_names
    if batch < 1:
        raise UsageError(f"batch={batch} is below 1; pass --batch 64, say")
    if not 0 <= top_k <= len(names):
        raise UsageError(f"top_k={top_k} is outside 0..{len(names)}, the number of classes")
    return RowFormat(class_names=names, routes=bundle.manifest.plan.routes, top_k=top_k)
