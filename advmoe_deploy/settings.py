"""Settings of commands: ``key=value``, keys dotted, values JSON, fractions or plain words."""

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from advmoe_deploy.errors import UsageError, one_line, unknown_name

Fields = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


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


def checked_model(kind: type[Model], fields: Fields) -> Model:
    """Return the model of type ``kind`` that ``fields`` are.

    Raises:
        UsageError: a value makes no sense, or is a truth where a number is wanted.
    """
    try:
        made = kind.model_validate(fields)
    except ValidationError as error:
        raise UsageError(one_line(error)) from None
    for key, truth in _mistaken(fields, made.model_dump()):
        raise UsageError(f"{key}: {json.dumps(truth)} is no number; write {truth:d}, say")
    return made


def _mistaken(given: Any, taken: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Yield true and false where what was made of them is no truth: they would count as 1 and 0."""
    if isinstance(given, bool) and not isinstance(taken, bool):
        yield key, given
    elif isinstance(given, dict) and isinstance(taken, dict):
        for name in (each for each in given if each in taken):
            yield from _mistaken(given[name], taken[name], f"{key}.{name}" if key else name)
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for part, other in zip(given, taken, strict=False):
            yield from _mistaken(part, other, key)


def number_of(text: str) -> float:
    """Return the number that ``0.03`` or a fraction such as ``8/255`` is.

    Raises:
        ValueError: it is neither.
    """
    above, slash, below = text.partition("/")
    if slash and not float(below):
        raise ValueError(f"'{text}' divides by zero; write 8/255")
    return float(above) / float(below) if slash else float(text)


def epsilon_text(epsilon: float) -> str:
    """Return a radius as people write it: in 255ths of the range where it is a whole number."""
    levels = round(255 * epsilon)
    whole = 0 < levels < 255 and abs(255 * epsilon - levels) < 1e-6
    return f"{levels}/255" if whole else f"{epsilon:.4g}"


def epsilon_of(text: str) -> float:
    """Return the l-inf radius in [0, 1] pixels that ``text`` is, a number or a fraction.

    Raises:
        UsageError: it is no number in (0, 1].
    """
    try:
        epsilon = number_of(text)
    except ValueError:
        raise UsageError(f"epsilon '{text}' is no number; write 8/255, or 0.03") from None
    if not 0 < epsilon <= 1:
        near = f"{text}/255" if 1 < epsilon <= 255 and "/" not in text else "8/255"
        raise UsageError(f"epsilon={text} is outside (0, 1], in [0, 1] pixels; write {near}")
    return epsilon


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


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """Return what ``--set key=value`` says: numbers, lists such as ``0.5,0.4,0.3``, or text.

    Raises:
        UsageError: a setting is no ``key=value``, or its value is true or false, which none takes.
    """
    parsed: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals or not text:
            raise UsageError(f"--set '{setting}' is no KEY=VALUE; write image_size=64")
        value = _value_or_list(text, as_list=key in ("mean", "std"))
        if any(isinstance(each, bool) for each in (value if isinstance(value, tuple) else [value])):
            raise UsageError(f"--set '{setting}' is no number; write image_size=64")
        parsed[key] = value
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_or_list(text: str, *, as_list: bool) -> object:
    try:
        values = json.loads(f"[{text}]")
    except json.JSONDecodeError:
        return text
    return tuple(values) if as_list or len(values) > 1 else values[0]
