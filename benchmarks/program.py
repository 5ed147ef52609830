"""Shared parts of the programs here: what they may be asked for, how they write, how they end."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe_deploy.errors import INTERNAL, UsageError, unknown_name
from advmoe_deploy.files import write_atomically

Row = Mapping[str, Any]


def run_program(main: Callable[[], None]) -> None:
    """Run a program; an error is one line and an exit code as of ``advmoe``, a fault of ours whole.

    Raises:
        SystemExit: there was an error.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        from advmoe_deploy.cli.failures import describe

        code, line = describe(error)
        if code == INTERNAL:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(code) from None


def with_part(asked: str, known: Iterable[str]) -> list[str]:
    """Return those of ``known`` that have a part which ``asked`` names; without any, all of them.

    Raises:
        UsageError: none of ``known`` has one of the parts.
    """
    names, parts = list(known), [part for part in asked.lower().split(",") if part]
    for part in parts:
        if not any(part in name.lower() for name in names):
            raise UsageError(f"'{part}' is part of no name here; choose from {'; '.join(names)}")
    return [name for name in names if not parts or any(part in name.lower() for part in parts)]


def named(kind: str, asked: str, known: Iterable[str]) -> list[str]:
    """Return the names in ``asked``, with commas between them.

    Raises:
        UsageError: one of them is not in ``known``.
    """
    names, choices = asked.split(","), list(known)
    for name in names:
        if name not in choices:
            raise unknown_name(kind, name, choices)
    return names


def write(path: Path, result: Row) -> None:
    """Write ``result`` as JSON, in a folder that is made if need be: whole or not at all."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def with_kept_rows(
    path: Path, facts: Row, rows: Sequence[Row], key: Sequence[str]
) -> dict[str, Any]:
    """Return ``facts`` and ``rows``, before them the rows of an earlier result that stay.

    Rows of which all values of ``key`` are the same replace each other. Where one of the ``facts``,
    such as a version, was another when a row that stays was measured, it stands in that row.
    """
    now = json.loads(json.dumps({"facts": facts, "rows": rows}))  # as they will be read
    earlier = json.loads(path.read_text()) if path.exists() else {}
    kept = earlier.pop("rows", [])
    other = {
        name: earlier[name]
        for name, value in now["facts"].items()
        if name in earlier and earlier[name] != value
    }
    done = [[row[name] for name in key] for row in now["rows"]]
    left = [{**other, **row} for row in kept if [row[name] for name in key] not in done]
    return {**now["facts"], "rows": [*left, *now["rows"]]}
