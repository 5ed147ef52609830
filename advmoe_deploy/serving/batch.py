"""Batch inference: one row per input, unreadable ones included, resumable after kill -9."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import DataError
from advmoe_deploy.files import require_writable
from advmoe_deploy.journal import Journal, Row
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.serving.classify import Window
from advmoe_deploy.serving.inputs import open_inputs
from advmoe_deploy.serving.job import BatchReport, Place, job_of, require_limit, tally_of
from advmoe_deploy.serving.resume import open_journal
from advmoe_deploy.serving.rows import write_rows, writer_for


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
        output: a .jsonl, .parquet or .csv file; it appears when it is whole. Until then the rows
            are in a hidden ``.partial.jsonl`` beside it.
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
    job = job_of(bundle, engine, threads, batch, top_k, on, progress)
    require_limit(max_errors)
    writer_for(output)
    require_writable(output)
    inputs = open_inputs(source)
    tally = tally_of(source, inputs, bundle, progress)
    described: Row = {
        "bundle": bundle.identity,
        "inputs": inputs.digest(),
        "engine": job.engine,
        "top_k": top_k,
        "batch": batch,
    }
    journal, errors = open_journal(
        output,
        described,
        inputs.names(),
        len(inputs),
        batch=batch,
        resume=resume,
        overwrite=overwrite,
    )
    resumed = journal.count
    with journal, _keeping_what_is_done(journal, len(inputs), progress):
        _require_few(errors, journal, max_errors)
        if resumed < len(inputs):
            with job.windows(inputs, journal.count) as windows:
                errors = _append(windows, journal, len(inputs), errors, max_errors, progress)
        write_rows(output, tally.passing(journal.lines()), job.columns)
        journal.discard()
    counts = {"images": journal.count, "errors": errors, "resumed": resumed}
    return job.report(str(output), tally, inputs, started, **counts)


def _append(
    windows: Iterator[Window],
    journal: Journal,
    total: int,
    errors: int,
    max_errors: int | None,
    progress: Progress,
) -> int:
    """Append all rows to ``journal``; return how many have errors, with the ``errors`` before."""
    with task(progress, "classify", total, journal.count):
        for window in windows:
            journal.append(*window.rows)
            errors += window.errors
            progress.advance("classify", len(window.rows), errors=errors)
            _require_few(errors, journal, max_errors)
    return errors


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
