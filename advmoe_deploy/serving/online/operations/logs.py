"""The server's log on stderr, as text or as JSON, in which nobody else begins a line.

Whatever a client sent, such as a path or what an exception quotes, is there in printable text.
"""

import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from advmoe_deploy.errors import printable
from advmoe_deploy.serving.online.operations.requests import Record
from advmoe_deploy.serving.online.protocol import short_line

_server = logging.getLogger("advmoe_deploy.serve")
_access = logging.getLogger("advmoe_deploy.access")
# The attribute of a log record that has fields of a request, and those its message has as well.
_FIELDS = "advmoe_fields"
_IN_MESSAGE = {"method", "path", "rpc", "status"}


class Text(logging.Formatter):
    """A line per message, with the fields of a request behind it, and tracebacks indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = _fields(record)
        told = [f"{key}={value}" for key, value in fields.items() if key not in _IN_MESSAGE]
        line = " ".join([record.getMessage().rstrip(), *told])
        lines = [printable(line).replace("\n", "\\n")]
        if record.exc_info:
            lines.append(textwrap.indent(printable(self.formatException(record.exc_info)), "  "))
        return "\n".join(lines)


class JsonLines(logging.Formatter):
    """An object per message, in ASCII; surrogates and the like are spelled as Python does."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().rstrip(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps({key: _without_surrogates(value) for key, value in line.items()})
        return text.replace("\x7f", "\\u007f")  # which JSON lets through


def log_access(record: Record) -> None:
    """Log a request that has ended."""
    kind, name = "rpc" if record.protocol == "grpc" else "path", short_line(record.name)
    fields: dict[str, Any] = {"request_id": record.id, "protocol": record.protocol}
    if record.method:
        fields["method"] = record.method
    fields[kind] = name
    if record.model is not None:
        fields |= {"model": record.model.name, "version": record.model.version}
    fields |= {"status": record.status, "ms": round(1e3 * record.seconds, 3)}
    if record.infers:
        fields["images"] = record.images
    what = f"{record.method} {name}".lstrip()
    _access.info("%s %d", what, record.status, extra={_FIELDS: fields})


@contextmanager
def logging_to_stderr(
    note: Callable[[str], None], *, as_json: bool
) -> Iterator[Callable[[str], None]]:
    """Have everything logged within the block written; yield what tells a line of our own.

    As text that is ``note``.
    """
    handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    handler.setFormatter(JsonLines() if as_json else Text())
    before = [(log, log.level) for log in (_server, _access)]
    for log, _ in before:
        log.setLevel(logging.INFO)
    root.addHandler(handler)
    if as_json:
        logging.captureWarnings(True)
    try:
        yield (lambda line: _server.info("%s", line)) if as_json else note
    finally:
        if as_json:
            logging.captureWarnings(False)
        root.removeHandler(handler)
        for log, level in before:
            log.setLevel(level)


def error_line(message: str) -> str:
    """Return the object for an error that ends the server."""
    error = {"name": _server.name, "levelname": "ERROR", "msg": message}
    return JsonLines().format(logging.makeLogRecord(error))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, _FIELDS, {})
    return found


def _without_surrogates(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
