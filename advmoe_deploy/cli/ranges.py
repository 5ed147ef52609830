"""Numbers in a list such as ``2,4,8``, and ranges of them such as ``0.5..1``."""

import re
from contextlib import suppress
from decimal import Decimal
from math import isfinite

from advmoe_deploy.cli.options import names

_RANGE = re.compile(r"(-?\d*\.?\d+)\.\.(-?\d*\.?\d+)")
_MOST_VALUES = 1000


def numbers_of(text: str, example: str) -> tuple[float, ...]:
    """Return the numbers of a list, each one or a range that counts by its start's last digit.

    ``example`` is what to write instead of what is no number.

    Raises:
        ValueError: a part is neither; the message has the way out.
    """
    return tuple(value for part in names(text) for value in _range(part, example))


def _range(text: str, example: str) -> tuple[float, ...]:
    """Return the one value that ``text`` is, or all from A to B of ``A..B``, by A's last digit.

    Raises:
        ValueError: it is neither; the message has the way out.
    """
    if ".." not in text:
        return (_number(text, example),)
    found = _RANGE.fullmatch(text)
    if not found:
        raise ValueError(
            f"'{text}' is no range of plain decimals; write 1..10 or 0.001..0.005, or each value"
        )
    first, last = map(Decimal, found.groups())
    step = Decimal(1).scaleb(-len(found[1].partition(".")[2]))
    count = (last - first) / step
    if not 0 <= count < _MOST_VALUES:
        raise ValueError(
            f"'{text}' goes down or has more than {_MOST_VALUES:,} values; write smaller..larger"
        )
    if count % 1:  # the end has more digits than the start
        digits = len(found[2].partition(".")[2])
        raise ValueError(
            f"'{text}' counts by {step} and never comes to {last}; write {first:.{digits}f}..{last}"
            f" for smaller steps, or end at {first + int(count) * step}"
        )
    return tuple(float(first + place * step) for place in range(int(count) + 1))


def _number(text: str, example: str) -> float:
    with suppress(ValueError):
        if isfinite(value := float(text)):
            return value
    raise ValueError(f"'{text}' is no finite number; write {example}")
