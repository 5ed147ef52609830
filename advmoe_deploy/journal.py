"""Journals of long jobs: JSON lines handed to the system as they come, so that a kill loses one.

The first line says what the job is, every other line is a row.
"""

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import MachineError, UsageError, writing

Row = dict[str, Any]


class Journal(Closing):
    """An open journal of ``count`` rows, locked against other processes."""

    def __init__(self, path: Path | None) -> None:
        """Open the journal at ``path``, made if need be; without a path it lives in memory.

        Raises:
            UsageError: another process uses it, or a link or another kind of file is there.
            MachineError: the system or the file system has no locks of POSIX.
        """
        self.path = path
        self.count = 0
        self._file: BinaryIO = io.BytesIO() if path is None else _locked(path)

    def close(self) -> None:
        """Close the file, rows and all on disk."""
        with writing(self.path):
            self._file.close()

    def begin(self, job: Row) -> None:
        """Drop whatever is here and start with ``job``."""
        with writing(self.path):
            self._file.truncate(0)
            self._write(job)
        self.count = 0

    def append(self, *rows: Row) -> None:
        """Add ``rows`` and hand them to the operating system at once."""
        with writing(self.path):
            self._write(*rows)
        self.count += len(rows)

    def job(self) -> Row | None:
        """Return the job that is here; ``None`` of one that was cut off as it was written."""
        line = self._first()
        return (_parsed(line) or {}) if line.endswith(b"\n") else None

    def rows(self) -> Iterator[Row]:
        """Yield the rows, up to the first that is torn."""
        self._first()
        while (row := _parsed(self._file.readline())) is not None:
            yield row

    def keep(self, count: int) -> None:
        """Drop what comes after the first ``count`` rows."""
        self._first()
        for _ in islice(self._file, count):
            pass
        self._file.truncate(self._file.tell())
        self.count = count

    def lines(self) -> Iterator[bytes]:
        """Yield every row as a line of JSON, in order."""
        self._first()
        yield from self._file

    def discard(self) -> None:
        """Delete the file: its rows are elsewhere now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _first(self) -> bytes:
        self._file.seek(0)
        return self._file.readline()

    def _write(self, *rows: Row) -> None:
        self._file.seek(0, io.SEEK_END)
        self._file.write(b"".join(_line(row) for row in rows))
        self._file.flush()


def continued(path: Path | None, job: Row) -> tuple[Journal, list[Row]]:
    """Return the journal at ``path`` with the rows that ``job`` has there; another's are dropped.

    Raises:
        UsageError: another process uses it.
    """
    journal = Journal(path)
    if journal.job() != job:
        journal.begin(job)
    rows = list(journal.rows())
    journal.keep(len(rows))
    return journal, rows


def _locked(path: Path) -> BinaryIO:
    if sys.platform == "win32":
        raise MachineError(f"{path}: files cannot be locked on Windows yet; run it in WSL")
    import fcntl

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(path, os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"another process is writing {path}; wait for it or stop it") from None
    except OSError:  # of a network, without a service for locks
        file.close()
        raise MachineError(
            f"the file system of {path} locks no files; name a place on another one"
        ) from None
    return file


def _opened(path: Path, guards: int) -> BinaryIO:
    """Open a file of our own: what somebody planted there may lead to one that must not change."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | guards, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path} is a link, where a journal is to be; remove it") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise UsageError(f"{path} is no file of its own, where a journal is to be; remove it")
    return os.fdopen(descriptor, "a+b")


def _line(row: Row) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode("ascii")


def _parsed(line: bytes) -> Row | None:
    """Return the row of a whole line, ``None`` of a torn one or of none."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
