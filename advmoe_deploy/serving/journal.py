"""The rows of an unfinished batch job: appended and flushed batch by batch, so kill -9 loses one.

The first line says what the job was: bundle, inputs and settings. Every other line is a row.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import refuse_existing
from advmoe_deploy.serving.rows import Row, naming

Job = dict[str, Any]


class Journal(Closing):
    """An open journal; ``done`` rows are in it, ``errors`` of them without an answer."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.done = 0
        self.errors = 0
        self._file = file

    def close(self) -> None:
        """Close the file, rows and all on disk."""
        with naming(self.path):
            self._file.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Add ``rows`` and hand them to the operating system at once."""
        with naming(self.path):
            self._file.write(b"".join(json_line(row) for row in rows))
            self._file.flush()
        self._count(rows)

    def lines(self) -> Iterator[bytes]:
        """Yield every row as a line of JSON, in order."""
        self._file.seek(0)
        self._file.readline()
        yield from self._file

    def discard(self) -> None:
        """Delete the journal: its rows are elsewhere now."""
        self.path.unlink(missing_ok=True)

    def begin(self, job: Job) -> None:
        """Drop whatever is here and start with ``job``."""
        with naming(self.path):
            self._file.truncate(0)
            self._file.write(json_line(job))
            self._file.flush()

    def resume(self, job: Job, paths: Sequence[str], multiple: int) -> None:
        """Keep the rows of the same ``job``, down to a multiple of ``multiple`` unless complete.

        Whole batches only: then every batch holds the images that it would have held without the
        interruption, and answers agree to the last bit.

        Raises:
            UsageError: the journal is of another job.
        """
        self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n"):  # killed while it wrote its very first line
            return self.begin(job)
        self._require_same(job, _parsed(first))
        whole = list(self._whole_rows(paths))
        count = len(whole) if len(whole) == len(paths) else len(whole) // multiple * multiple
        kept = whole[:count]
        self._file.truncate(kept[-1][1] if kept else len(first))
        return self._count([row for row, _ in kept])

    def _whole_rows(self, paths: Sequence[str]) -> Iterator[tuple[Row, int]]:
        """Yield the rows up to the first that is torn or not of its path, and where each ends."""
        for path in paths:
            line = self._file.readline()
            row = _parsed(line)
            if not line.endswith(b"\n") or row.get("path") != path or "error" not in row:
                return
            yield row, self._file.tell()

    def _require_same(self, job: Job, begun: Job) -> None:
        if other := [key for key in job if begun.get(key) != job[key]]:
            raise UsageError(
                f"{self.path} was begun with another {', '.join(other)}; "
                "pass --overwrite without --resume to start again"
            )

    def _count(self, rows: Sequence[Row]) -> None:
        self.done += len(rows)
        self.errors += sum(row["error"] is not None for row in rows)


def open_journal(
    output: Path, job: Job, paths: Sequence[str], *, batch: int, resume: bool, overwrite: bool
) -> Journal:
    """Return the journal beside ``output``, new or continued, locked against other processes.

    Raises:
        UsageError: something is in the way, or the journal is of another job or in use.
    """
    path = output.with_name(f".{output.name}.partial.jsonl")
    _refuse(output, path, resume=resume, overwrite=overwrite)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    journal = Journal(path, file)
    try:
        _lock(file, path)
        if resume:
            journal.resume(job, paths, batch)
        else:
            journal.begin(job)
    except BaseException:
        file.close()
        raise
    return journal


def json_line(row: Row) -> bytes:
    """Return ``row`` as one line of ASCII JSON."""
    return (json.dumps(row, allow_nan=False) + "\n").encode("ascii")


def _refuse(output: Path, journal: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and output.exists() and not overwrite:
        raise UsageError(f"{output} is finished already; pass --overwrite to do it again")
    if resume and journal.exists():
        return
    refuse_existing(output, overwrite=overwrite)
    if journal.exists() and not overwrite:
        raise UsageError(
            f"{journal} holds an unfinished run; pass --resume to continue it "
            "or --overwrite to start again"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is writing {path}; wait for it or stop it") from None


def _parsed(line: bytes) -> Row:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
