"""Results of long work, one JSON line each, so that a killed run goes on where it was."""

import fcntl
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from typing_extensions import Self

from advmoe_deploy.errors import UsageError

Row = dict[str, Any]


class ResultJournal:
    """The rows of one job, in order. ``rows`` are those that an earlier run left.

    The first line names the job; a file of another job is begun anew. A line that a killed run left
    torn is cut off. Without a path nothing is kept.

    Raises:
        UsageError: another process is writing the file.
    """

    def __init__(self, path: Path | None, job: Row) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._job = job
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Open and lock the file, and read what is there."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            try:
                _lock(self._file, self._path)
                self.rows = self._read()
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def append(self, row: Row) -> None:
        """Add a row and hand it to the operating system at once."""
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def _read(self) -> list[Row]:
        assert self._file is not None
        self._file.seek(0)
        if _parsed(self._file.readline()) != self._job:
            self._file.truncate(0)
            self._file.write(_line(self._job))
            self._file.flush()
            return []
        rows, end = [], self._file.tell()
        while (row := _parsed(self._file.readline())) is not None:
            rows.append(row)
            end = self._file.tell()
        self._file.truncate(end)
        return rows


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


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is writing {path}; wait for it or stop it") from None
