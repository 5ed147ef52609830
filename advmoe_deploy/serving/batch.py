"""Batch inference: one row per input, unreadable ones included, resumable after kill -9."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal, get_args

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import DataError, UsageError, unknown_name
from advmoe_deploy.journal import Journal, Row
from advmoe_deploy.process import default_threads, usable_cpus
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.runtime.select import engine_for, open_runner, resolved
from advmoe_deploy.serving.classify import MOST_DECODERS, Classifier, Window, count_errors
from advmoe_deploy.serving.inputs import open_inputs
from advmoe_deploy.serving.parts import Inputs
from advmoe_deploy.serving.resume import open_journal
from advmoe_deploy.serving.rows import RowFormat, write_rows, writer_for
from advmoe_deploy.serving.search import Skipped
from advmoe_deploy.serving.spread import SpreadJob, windows_by_ray
from advmoe_deploy.specs import Frozen, Precision

# Where a job runs.
Place = Literal["local", "ray"]


class BatchReport(Frozen):
    """What a batch job did: ``images`` rows, of which ``errors`` have no answer.

    ``resumed`` rows came from an earlier, interrupted run; ``images_per_s`` is about the others.
    ``skipped`` says what else is there and why it has no row.
    """

    output: str
    engine: str
    precision: Precision
    images: int
    errors: int
    resumed: int
    seconds: float
    images_per_s: float
    skipped: tuple[Skipped, ...] = ()


def classify_files(
    bundle: Bundle,
    source: str,
    output: Path,
    *,
    engine: str | None = None,
    threads: int = 0,
    batch: int = 64,
    top_k: int = 0,
    max_errors: int | None = None,
    on: Place = "local",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BatchReport:
    """Classify every image of ``source`` into ``output`` and return what came of it.

    Args:
        bundle: an opened bundle.
        source: a folder, a pattern, a file, a .txt list, or - for a list on standard input; files
            are images, .tar shards or .parquet tables; see :func:`open_inputs`.
        output: a .jsonl or .parquet file; it appears when it is whole. Until then the rows are in
            a hidden ``.partial.jsonl`` beside it.
        engine: a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``; by default what the
            bundle was made for.
        threads: of the engine, and at most of the decoding; 0 is
            :func:`~advmoe_deploy.process.default_threads`, and one for each of Ray's workers.
        batch: images per inference.
        top_k: how many classes the column ``top_k`` lists; 0 leaves it out.
        max_errors: how many inputs may have no answer; one more ends the run, and its rows are
            kept for ``resume``. ``None`` sets no limit.
        on: ``local``, in this process, or ``ray``, by many; see
            :func:`~advmoe_deploy.serving.spread.windows_by_ray`. The rows are the same, and either
            resumes what the other began.
        resume: continue an interrupted run, if there is one.
        overwrite: replace an existing output, or an interrupted run.
        progress: who listens.

    Raises:
        UsageError: the output is in the way or of an unknown kind, or the run to resume is of
            another bundle, other inputs or other settings.
        DataError: ``source`` gives no input at all, or more than ``max_errors`` cannot be read. An
            unreadable image is a row, not an error.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    columns = _columns(bundle, batch, top_k)
    engine = engine_for(bundle, engine, progress.note)
    name, precision = resolved(bundle, engine)
    if max_errors is not None and max_errors < 0:
        raise UsageError(f"max_errors={max_errors} is below 0; pass --max-errors 0 for none")
    if on not in get_args(Place):
        raise unknown_name("place", on, get_args(Place))
    writer_for(output)
    inputs = open_inputs(source)
    job: Row = {
        "bundle": bundle.identity,
        "inputs": inputs.digest(),
        "engine": engine,
        "top_k": top_k,
        "batch": batch,
    }
    journal, done = open_journal(
        output, job, inputs.names(), len(inputs), batch=batch, resume=resume, overwrite=overwrite
    )
    errors = count_errors(done)
    with journal, _keeping_what_is_done(journal, len(inputs), progress):
        _require_few(errors, journal, max_errors)
        if len(done) < len(inputs):
            if on == "ray":
                spread = SpreadJob.of(bundle, columns, engine, threads, batch)
                opened = windows_by_ray(spread, inputs, journal.count)
            else:
                opened = _windows(bundle, inputs, columns, engine, threads, batch, journal.count)
            with opened as windows:
                said = _saying_resized(windows, bundle.manifest.decoding.size, progress)
                errors = _append(said, journal, len(inputs), errors, max_errors, progress)
        write_rows(output, journal.lines(), columns)
        journal.discard()
    seconds = time.perf_counter() - started
    return BatchReport(
        output=str(output),
        engine=name,
        precision=precision,
        images=journal.count,
        errors=errors,
        resumed=len(done),
        seconds=seconds,
        images_per_s=(journal.count - len(done)) / seconds,
        skipped=inputs.skipped,
    )


def _append(
    windows: Iterator[Window],
    journal: Journal,
    total: int,
    errors: int,
    max_errors: int | None,
    progress: Progress,
) -> int:
    """Append all rows to ``journal``; return how many have errors, with the ``errors`` before."""
    with task(progress, "classify", total):
        progress.advance("classify", journal.count, errors=errors)
        for window in windows:
            journal.append(*window.rows)
            errors += window.errors
            progress.advance("classify", len(window.rows), errors=errors)
            _require_few(errors, journal, max_errors)
    return errors


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
        classifier = Classifier(runner, columns, bundle.manifest.decoding, decoders)
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


def _require_few(errors: int, journal: Journal, max_errors: int | None) -> None:
    if max_errors is not None and errors > max_errors:
        raise DataError(
            f"{errors} of the first {journal.count} inputs could not be read, more than "
            f"--max-errors {max_errors}; the column error of {journal.path} says why, and --resume "
            "with a higher limit goes on"
        )


@contextmanager
def _keeping_what_is_done(journal: Journal, total: int, progress: Progress) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if journal.count:
            kept = f"{journal.count} of {total} rows are kept"
            progress.note(f"{kept}; --resume continues from there")
        else:
            journal.discard()
        raise


def _columns(bundle: Bundle, batch: int, top_k: int) -> RowFormat:
    names = bundle.manifest.class_names
    if batch < 1:
        raise UsageError(f"batch={batch} is below 1; pass --batch 64, say")
    if not 0 <= top_k <= len(names):
        raise UsageError(f"top_k={top_k} is outside 0..{len(names)}, the number of classes")
    return RowFormat(class_names=names, routes=bundle.manifest.plan.routes, top_k=top_k)
