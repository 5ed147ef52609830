"""YAML of plain values, in block style; strings are quoted as JSON's unless they need not be."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9./-]*")
# What older readers take for something else than a string.
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


def yaml_text(value: Mapping[str, Any]) -> str:
    """Return one document, which ends with a newline.

    Args:
        value: of mappings and sequences, none of them empty, strings, booleans and whole numbers.
    """
    return "".join(f"{line}\n" for line in _lines(value))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, Mapping | list | tuple):
                yield f"{_scalar(key)}:"
                yield from (f"  {line}" for line in _lines(item))
            else:
                yield f"{_scalar(key)}: {_scalar(item)}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            for number, line in enumerate(_lines(item)):
                yield f"{'  ' if number else '- '}{line}"
    else:
        yield _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if not isinstance(value, str | bool | int):
        raise TypeError(f"{value!r} has no place in a manifest")
    return json.dumps(value)
