"""Batch inference: one row per input, unreadable ones included, resumable after kill -9."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import DecodedImage, decode_file
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, MachineError, UsageError
from advmoe_deploy.journal import Journal, Row
from advmoe_deploy.process import default_threads, usable_cpus
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.inputs import Listing, list_inputs
from advmoe_deploy.serving.names import readable, shown
from advmoe_deploy.serving.resume import open_journal
from advmoe_deploy.serving.rows import RowFormat, write_rows, writer_for
from advmoe_deploy.serving.search import Skipped
from advmoe_deploy.specs import Frozen

_MOST_DECODERS = 4
_BATCHES_AHEAD = 2

Decoded = DecodedImage | str


class BatchReport(Frozen):
    """What a batch job did: ``images`` rows, of which ``errors`` have no answer.

    ``resumed`` rows came from an earlier, interrupted run; ``images_per_s`` is about the others.
    ``skipped`` says what else is there and why it has no row.
    """

    output: str
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
    engine: str = "onnxruntime",
    threads: int = 0,
    batch: int = 64,
    top_k: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BatchReport:
    """Classify every image of ``source`` into ``output`` and return what came of it.

    Args:
        bundle: an opened bundle.
        source: a folder, a pattern, an image, or a .txt list; see :func:`list_inputs`.
        output: a .jsonl or .parquet file; it appears when it is whole. Until then the rows are in
            a hidden ``.partial.jsonl`` beside it.
        engine: a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``.
        threads: of the engine, and at most of the decoding; 0 is
            :func:`~advmoe_deploy.process.default_threads`.
        batch: images per inference.
        top_k: how many classes the column ``top_k`` lists; 0 leaves it out.
        resume: continue an interrupted run, if there is one.
        overwrite: replace an existing output, or an interrupted run.
        progress: who listens.

    Raises:
        UsageError: the output is in the way or of an unknown kind, or the run to resume is of
            another bundle, other inputs or other settings.
        DataError: ``source`` gives no input at all. An unreadable image is a row, not an error.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    columns = _columns(bundle, batch, top_k)
    writer_for(output)
    inputs = list_inputs(source)
    names = [shown(path) for path in inputs]
    job = _job(bundle, inputs, engine=engine, top_k=top_k, batch=batch)
    journal, done = open_journal(
        output, job, names, batch=batch, resume=resume, overwrite=overwrite
    )
    errors = _errors(done)
    with journal, _keeping_what_is_done(journal, len(inputs), progress):
        if len(done) < len(inputs):
            with open_runner(bundle, engine, threads=threads) as runner:
                decoders = min(_MOST_DECODERS, threads or default_threads() or usable_cpus())
                decoding = bundle.manifest.decoding
                inference = _Inference(runner, columns, decoding, decoders, progress)
                errors = inference.run(journal, inputs, names, batch, errors)
        write_rows(output, journal.lines(), columns)
        journal.discard()
    seconds = time.perf_counter() - started
    return BatchReport(
        output=str(output),
        images=journal.count,
        errors=errors,
        resumed=len(done),
        seconds=seconds,
        images_per_s=(journal.count - len(done)) / seconds,
        skipped=inputs.skipped,
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


class _Inference:
    """Inference on batches of decoded files, the next of which are decoded meanwhile."""

    def __init__(
        self,
        runner: Runner,
        columns: RowFormat,
        decoding: Decoding,
        decoders: int,
        progress: Progress,
    ) -> None:
        self._runner, self._columns, self._decoding = runner, columns, decoding
        self._decoders = decoders
        self._progress = progress
        self._said_resized = False

    def run(
        self, journal: Journal, inputs: Listing, names: Sequence[str], batch: int, errors: int
    ) -> int:
        """Append the rows that ``journal`` lacks; return how many have errors, of all."""
        with task(self._progress, "classify", len(inputs)):
            self._progress.advance("classify", journal.count, errors=errors)
            windows = _decoded_ahead(inputs, journal.count, self._decoding, batch, self._decoders)
            with closing(windows):
                for window in windows:
                    rows = self._rows(names[journal.count :][: len(window)], window)
                    journal.append(*rows)
                    errors += _errors(rows)
                    self._progress.advance("classify", len(window), errors=errors)
        return errors

    def _rows(self, names: Sequence[str], window: Sequence[Decoded]) -> list[Row]:
        images = [(i, item) for i, item in enumerate(window) if isinstance(item, DecodedImage)]
        rows = [
            self._columns.unreadable(name, item if isinstance(item, str) else "")
            for name, item in zip(names, window, strict=True)
        ]
        if images:
            self._say_resized([image for _, image in images])
            prediction = self._runner.infer(to_float(np.stack([i.pixels for _, i in images])))
            answers = self._columns.answered([names[i] for i, _ in images], prediction)
            for (i, _), answer in zip(images, answers, strict=True):
                rows[i] = answer
        return rows

    def _say_resized(self, images: Sequence[DecodedImage]) -> None:
        size = self._decoding.size
        other = next((image.original for image in images if image.original != (size, size)), None)
        if other and not self._said_resized:
            self._said_resized = True
            self._progress.note(
                f"some images are not {size} x {size} (the first: {other[0]} x {other[1]}); their "
                "central square is cut out and resized, as in training"
            )


def _errors(rows: Sequence[Row]) -> int:
    return sum(row["error"] is not None for row in rows)


def _columns(bundle: Bundle, batch: int, top_k: int) -> RowFormat:
    names = bundle.manifest.class_names
    if batch < 1:
        raise UsageError(f"batch={batch} is below 1; pass --batch 64, say")
    if not 0 <= top_k <= len(names):
        raise UsageError(f"top_k={top_k} is outside 0..{len(names)}, the number of classes")
    return RowFormat(class_names=names, routes=bundle.manifest.plan.routes, top_k=top_k)


def _job(bundle: Bundle, inputs: Listing, **options: str | int) -> Row:
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(os.fsencode(path) + b"\0")
    for path, error in sorted(inputs.errors.items()):
        digest.update(os.fsencode(f"{path}\0{error}\0"))
    return {
        "bundle": bundle.identity,
        "inputs": digest.hexdigest(),
        **options,
    }


def _decoded_ahead(
    inputs: Listing, start: int, decoding: Decoding, batch: int, decoders: int
) -> Generator[list[Decoded], None, None]:
    """Yield decoded batches from ``start`` on while a small pool works on the following ones."""
    waiting: deque[list[Future[Decoded]]] = deque()
    pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
    try:
        for first in range(start, len(inputs), batch):
            window = inputs[first : first + batch]
            waiting.append([pool.submit(_decode, path, inputs.errors, decoding) for path in window])
            if len(waiting) > _BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(path: str, errors: Mapping[str, str], decoding: Decoding) -> Decoded:
    if path in errors:
        return readable(errors[path])
    try:
        return decode_file(Path(path), decoding)
    except (DataError, MachineError) as error:
        return readable(str(error).removeprefix(f"{Path(path)}: "))
