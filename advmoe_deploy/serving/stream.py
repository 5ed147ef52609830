"""Batch inference whose rows are handed on as they come; nothing is kept."""

import json
import time
from collections.abc import Callable

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import DataError
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.serving.inputs import open_inputs
from advmoe_deploy.serving.job import BatchReport, Place, job_of, require_limit, tally_of


def stream_files(
    bundle: Bundle,
    source: str,
    write: Callable[[str], object],
    *,
    engine: str | None = None,
    threads: int = 0,
    batch: int = 64,
    top_k: int = 0,
    max_errors: int | None = None,
    on: Place = "local",
    progress: Progress | None = None,
) -> BatchReport:
    """Classify every image of ``source`` and hand each row to ``write``, a line of JSON.

    Args:
        bundle: as for :func:`~advmoe_deploy.serving.batch.classify_files`, like all the rest.
        source: see there.
        write: called with each line, in order.
        engine: see there.
        threads: see there.
        batch: see there.
        top_k: see there.
        max_errors: one input more than that without an answer ends the run, its rows written.
        on: see there.
        progress: who listens.

    Raises:
        UsageError: a value makes no sense.
        DataError: ``source`` gives no input at all, or more than ``max_errors`` cannot be read.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    job = job_of(bundle, engine, threads, batch, top_k, on, progress)
    require_limit(max_errors)
    inputs = open_inputs(source)
    tally = tally_of(source, inputs, bundle, progress)
    errors = count = 0
    with job.windows(inputs, 0) as windows, task(progress, "classify", len(inputs)):
        for window in windows:
            for row in window.rows:
                tally.add(row)
                write(json.dumps(row, allow_nan=False) + "\n")
            count, errors = count + len(window.rows), errors + window.errors
            progress.advance("classify", len(window.rows), errors=errors)
            if max_errors is not None and errors > max_errors:
                raise DataError(
                    f"{errors} of the first {count} inputs could not be read, more than "
                    f"--max-errors {max_errors}; the field error of their lines says why"
                )
    counts = {"images": count, "errors": errors, "resumed": 0}
    return job.report("-", tally, inputs, started, **counts)
