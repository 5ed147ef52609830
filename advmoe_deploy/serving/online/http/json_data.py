"""JSON of inference requests, read and written so that no step keeps other threads waiting.

``json.loads`` holds the interpreter until a whole text is read: for 60 MB of pixels more than a
second, in which no health probe is answered. The one long part of a request, its array ``data``,
is therefore cut out and read in pieces; what is left has to be short.
"""

import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ENVELOPE = 128 << 10  # bytes of JSON around the data
_PIECE = 32 << 10  # bytes, about a millisecond's work
_LONGEST = 32 << 10  # bytes from one comma to the next
_NUMBERS_AT_ONCE = 2048

_DATA = re.compile(rb'(?<!\\)"data"\s*:\s*(?=\[)')
_STRUCTURE = b"[],"
_NO_STRUCTURE = bytes(set(range(256)) - set(_STRUCTURE))
_BRACKETS_TO_SPACES = bytes.maketrans(b"[]", b"  ")
_WHITESPACE = b" \t\r\n"
# A bracket opens behind a comma or another one, and a closing one is followed by either.
_MISPLACED_BRACKET = re.compile(rb"\[(?<![,\[]\[)|\](?![,\]])")

# What stands for the data in the envelope: nobody who sends a request can guess it.
_PLACEHOLDER = secrets.token_hex(16)


class JsonError(ValueError):
    """A text that is no JSON, or whose data are no numbers."""


@dataclass(frozen=True)
class Numbers:
    """A JSON array of numbers that has not been read: ``text[start:end]``."""

    text: bytes | bytearray
    start: int
    end: int

    def read(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return the numbers as float32 of ``shape``; the array is flat, or nested like it.

        Raises:
            JsonError: it is neither, or holds something else than numbers.
        """
        if self.end - self.start < 2 * math.prod(shape) + 1:  # a digit, and a comma or bracket
            raise _misfit(shape)  # before room is made for what a short text merely claims
        values = np.empty(math.prod(shape), dtype=np.float32)
        layouts, filled, at = [_flat(shape), _nested(shape)], 0, 0
        for piece, structure in self._pieces():
            layouts = [one for one in layouts if one.startswith(structure, at)]
            if not layouts or _has_misplaced_bracket(piece):
                raise _misfit(shape)
            numbers = _numbers(piece.translate(_BRACKETS_TO_SPACES))
            values[filled : filled + len(numbers)] = numbers
            filled, at = filled + len(numbers), at + len(structure)
        if filled != len(values) or at not in map(len, layouts):
            raise _misfit(shape)
        return values.reshape(shape)

    def _pieces(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the text cut at commas, and the brackets and commas up to each cut."""
        start = self.start
        while start < self.end:
            comma = self.text.find(b",", min(start + _PIECE, self.end), self.end)
            stop = self.end if comma < 0 else comma
            if stop - start > _PIECE + _LONGEST:
                raise JsonError(f"data holds more than {_LONGEST} bytes between two commas")
            piece = bytes(self.text[start:stop])
            structure = piece.translate(None, _NO_STRUCTURE)
            yield piece, structure if comma < 0 else structure + b","
            start = stop + 1


def split_data(text: bytes | bytearray) -> tuple[Any, Numbers | None]:
    """Return the JSON value in ``text`` without its first array called ``data``, and that array.

    See :func:`stands_for_data` for where the array was.

    Raises:
        JsonError: it is no JSON in UTF-8, or longer than ``MAX_ENVELOPE`` beside the data.
    """
    start, end = _find_data(text)
    if len(text) - (end - start) > MAX_ENVELOPE:
        raise JsonError(f"the JSON beside the data is longer than {MAX_ENVELOPE} bytes")
    if start == end:
        return _loads(bytes(text)), None
    envelope = b"".join((text[:start], json.dumps(_PLACEHOLDER).encode(), text[end:]))
    return _loads(envelope), Numbers(text, start, end)


def stands_for_data(value: object) -> bool:
    """Return whether ``value`` is where :func:`split_data` cut the array out."""
    return value == _PLACEHOLDER


def json_array(values: NDArray[Any]) -> str:
    """Return a flat array as JSON."""
    parts = (values[i : i + _NUMBERS_AT_ONCE] for i in range(0, len(values), _NUMBERS_AT_ONCE))
    return f"[{', '.join(json.dumps(part.tolist())[1:-1] for part in parts)}]"


def _find_data(text: bytes | bytearray) -> tuple[int, int]:
    """Return where the array called ``data`` starts and ends; twice 0 if there is none."""
    found = _DATA.search(text, 0, MAX_ENVELOPE)
    if found is None:
        return 0, 0
    start = found.end()
    # An array of numbers holds neither: the next key or the end of the object comes after it.
    stops = [at for mark in (b'"', b"}") if (at := text.find(mark, start)) >= 0]
    end = text.rfind(b"]", start, min(stops, default=len(text))) + 1
    if not end:
        raise JsonError("data holds something else than numbers")
    return start, end


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise JsonError(f"the body is no JSON, or its data are no numbers: {reason}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# Integers of any length are as good as floats here, and floats have no limit of digits.
_decoder = json.JSONDecoder(parse_int=float)


def _numbers(text: bytes) -> NDArray[np.float32]:
    try:
        values = _decoder.decode(f"[{text.decode()}]")
    except ValueError:
        values = [None]
    if not set(map(type, values)) <= {float}:
        raise JsonError("data holds something else than numbers")
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32)


def _has_misplaced_bracket(piece: bytes) -> bool:
    if b"[" not in piece and b"]" not in piece:
        return False
    compact = b",%b," % piece.translate(None, _WHITESPACE)
    return _MISPLACED_BRACKET.search(compact) is not None


def _flat(shape: Sequence[int]) -> bytes:
    return _nested([math.prod(shape)])


def _nested(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of an array of ``shape``."""
    layout = b""
    for size in reversed(shape):
        layout = b"[%b]" % ((layout + b",") * size)[:-1]
    return layout


def _misfit(shape: Sequence[int]) -> JsonError:
    return JsonError(
        f"data does not fit the shape {list(shape)}: "
        f"send {math.prod(shape)} numbers, flat or nested like the shape"
    )
