"""Settings of commands: ``key=value``, keys dotted, values JSON or plain words."""

import json
from collections.abc import Collection
from typing import Any

from advmoe_deploy.errors import UsageError, unknown_name

Fields = dict[str, Any]


def put_setting(fields: Fields, setting: str, known: Collection[str]) -> str:
    """Put the value of ``setting`` into nested ``fields`` and return its key.

    Raises:
        UsageError: there is no ``=``, the key is not ``known``, or a part above it holds a value.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise UsageError(f"'{setting}' is no setting; write key=value, such as epochs=3")
    if key not in known:
        raise unknown_name("setting", key, known)
    *path, last = key.split(".")
    target = fields
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UsageError(f"{key} has no place once {part} is {target!r}; set it whole")
    target[last] = _value(text)
    return key


def dotted_keys(fields: Fields, prefix: str = "") -> list[str]:
    """Return the keys of nested ``fields``, dotted; parts below the first level also whole."""
    keys = []
    for name, value in fields.items():
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{name}.")
            keys += [f"{prefix}{name}"] if prefix else []
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
