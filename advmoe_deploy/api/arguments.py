"""Arguments of the public Python API: a wrong one is refused in a line, before anything is done.

The command line's parser does the same for its options.
"""

import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.settings import epsilon_of

# From the name and the value of an argument to the value that the function gets.
Rule = Callable[[str, Any], Any]
P = ParamSpec("P")
T = TypeVar("T")


def checked(**own: Rule) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that holds every argument against the rule of its name.

    ``own`` are rules of this function alone. ``None`` is let through where it is the default.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        form = signature(function)
        rules = {name: own.get(name) or _RULES[name] for name in form.parameters}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                given = form.bind(*args, **kwargs)
            except TypeError as error:  # as Python says it of a function without this decorator
                raise TypeError(f"{function.__name__}() {error}") from None
            for name, value in given.arguments.items():
                if value is not None or form.parameters[name].default is not None:
                    given.arguments[name] = rules[name](name, value)
            return function(*given.args, **given.kwargs)

        return call

    return decorate


def place(name: str, value: Any) -> Any:
    """Return ``value``, which is a path or text that names something as a path does."""
    if not isinstance(value, str | os.PathLike):
        raise _refusal(name, value, "is no path; pass a string or a pathlib.Path")
    if "\0" in os.fsdecode(value):
        raise _refusal(name, value, "holds a NUL, which no path does")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refusal(name, value, "is no text; pass a string")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refusal(name, value, "is neither True nor False; pass one of them")
    return value


def _whole(least: int) -> Rule:
    def rule(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _refusal(name, value, f"is no whole number; pass one of at least {least}")
        if value < least:
            raise UsageError(f"{name}={value} is too small; the least is {least}")
        return int(value)

    return rule


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal(name, value, "is no number; pass one")
    try:
        return float(value)
    except OverflowError:
        raise _refusal(name, value, "is too large; pass a smaller number") from None


def _no_less_than_zero(name: str, value: Any) -> float:
    number = _number(name, value)
    if math.isnan(number) or number < 0:
        raise UsageError(f"{name}={number:g} makes no sense; pass a number of at least 0")
    return number


def _share(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise UsageError(f"{name}={number:g} is no share; pass a number from 0 to 1")
    return number


def _radius(name: str, value: Any) -> float:
    return epsilon_of(repr(_number(name, value)))


def _several(kind: str, rule: Rule) -> Rule:
    """Return the rule for a list whose parts have ``rule``; a string alone is a list of one."""

    def each(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, Mapping | bytes) or not isinstance(value, Sequence):
            raise _refusal(name, value, f"is no list; pass a list of {kind}")
        return tuple(rule(f"{name}[{index}]", part) for index, part in enumerate(value))

    return each


_strings = _several("strings", _text)


def _classes(name: str, value: Any) -> Any:
    return value if isinstance(value, str | os.PathLike) else _strings(name, value)


def _renamed(name: str, value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise _refusal(name, value, "is no mapping; pass a dict such as {'automobile': 'car'}")
    return {_text(f"a key of {name}", old): _text(name, new) for old, new in value.items()}


def _bundle(name: str, value: Any) -> Any:
    return value if isinstance(value, Bundle) else place(name, value)


def _options(name: str, value: Any) -> BuildOptions:
    if not isinstance(value, BuildOptions):
        raise _refusal(name, value, "is no advmoe_deploy.BuildOptions; pass one")
    return value


def _listener(name: str, value: Any) -> Any:
    verbs = [verb for verb in vars(Silent) if not verb.startswith("_")]
    if lacking := [verb for verb in verbs if not callable(getattr(value, verb, None))]:
        raise _refusal(name, value, f"has no method {lacking[0]}; pass one with {', '.join(verbs)}")
    return value


def _refusal(name: str, value: object, reason: str) -> UsageError:
    return UsageError(f"{name}={reprlib.repr(value)} {reason}")


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("out", "start", "run", "file", "path", "signed_by", "examples"), place),
    **dict.fromkeys(
        ("recipe", "source", "key", "data", "format", "engine", "attacks", "aim"), _text
    ),
    **dict.fromkeys(("resume", "overwrite", "with_reference", "onnx_only"), _flag),
    **dict.fromkeys(("prune_unused", "allow_fragile"), _flag),
    **dict.fromkeys(("devices", "images"), _whole(1)),
    **dict.fromkeys(("settings", "precisions", "engines", "against"), _strings),
    **dict.fromkeys(("max_drop", "budget"), _no_less_than_zero),
    **dict.fromkeys(("bundle", "model"), _bundle),
    "threads": _whole(0),
    "batches": _several("whole numbers", _whole(1)),
    "epsilon": _radius,
    "least_route_agreement": _share,
    "classes": _classes,
    "class_map": _renamed,
    "build": _options,
    "progress": _listener,
}
