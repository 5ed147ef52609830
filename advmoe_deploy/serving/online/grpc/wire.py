"""Bytes of an inference request, cut into the numbers and a small message around them.

A message of two bytes each per field grows to forty times its size when protobuf parses it, so only
what lies beside the numbers is parsed, and that is bounded. The format is that of
https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

# Bytes beside the numbers, and fields in all.
MAX_ENVELOPE = 128 << 10
_MAX_FIELDS = 1024
# Field numbers of ModelInferRequest, of its input tensors, and of their contents.
_INPUTS, _RAW = 5, 7
_CONTENTS = 5
_FP32 = 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are no message, or one that no client needs."""


@dataclass
class Cut:
    """A request without its numbers, as ``envelope``; the numbers are views of the request.

    ``contents`` has a view of float32 for each input, in order, ``None`` where it has none.
    """

    envelope: bytearray = field(default_factory=bytearray)
    raw: list[memoryview] = field(default_factory=list)
    contents: list[memoryview | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Field:
    number: int
    kind: int
    start: int  # of the field
    value: int  # where its value starts; that of bytes is behind their length
    end: int


def cut(request: bytes) -> Cut:
    """Return the parts of a serialised ``ModelInferRequest``.

    Raises:
        WireError: it is malformed, or has more fields, or more beside its numbers, than one needs.
    """
    result, walk, view = Cut(), _Walk(request), memoryview(request)
    for each in walk.fields(0, len(request)):
        if each.number == _RAW:
            result.raw.append(view[each.value : _bytes_end(each)])
        elif each.number == _INPUTS:
            _cut_input(result, walk, view, each)
        else:
            result.envelope += view[each.start : each.end]
        if len(result.envelope) > MAX_ENVELOPE:
            raise WireError(f"what lies beside the numbers is longer than {MAX_ENVELOPE} bytes")
    return result


def _cut_input(result: Cut, walk: "_Walk", view: memoryview, tensor: _Field) -> None:
    rest, numbers, found = bytearray(), None, False
    for each in walk.fields(tensor.value, _bytes_end(tensor)):
        if each.number != _CONTENTS:
            rest += view[each.start : each.end]
            continue
        for part in walk.fields(each.value, _bytes_end(each)):
            if part.number != _FP32 or part.kind != _BYTES or found:
                raise WireError("contents must be fp32_contents alone, packed; or send them raw")
            numbers, found = view[part.value : part.end], True
    result.contents.append(numbers)
    result.envelope += bytes([_INPUTS << 3 | _BYTES]) + _varint(len(rest)) + rest


class _Walk:
    """Goes from field to field, so many times at most."""

    def __init__(self, data: bytes) -> None:
        self._data, self._left = data, _MAX_FIELDS

    def fields(self, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise WireError(
                    f"the message has more than {_MAX_FIELDS} fields; send numbers packed or raw"
                )
            start = at
            tag, at = self._number(at, end)
            length, value = self._length(tag & 7, at, end)
            at = value + length
            if at > end or not 0 < tag >> 3 < 1 << 29:
                raise WireError("the message is cut off, or is no protobuf")
            yield _Field(tag >> 3, tag & 7, start, value, at)

    def _length(self, kind: int, at: int, end: int) -> tuple[int, int]:
        """Return how long the value is, and where it starts."""
        if kind == _VARINT:
            return self._number(at, end)[1] - at, at
        if kind == _BYTES:
            return self._number(at, end)
        if kind not in {_FIXED32, _FIXED64}:
            raise WireError("the message has groups, or is no protobuf")
        return (4 if kind == _FIXED32 else 8), at

    def _number(self, at: int, end: int) -> tuple[int, int]:
        """Return the number at ``at``, and where it ends."""
        number = 0
        for place, byte in enumerate(self._data[at : min(at + 10, end)]):
            number |= (byte & 127) << 7 * place
            if byte < 128:
                return number, at + place + 1
        raise WireError("the message is cut off, or is no protobuf")


def _bytes_end(each: _Field) -> int:
    """Return where the value ends, which must be bytes."""
    if each.kind != _BYTES:
        raise WireError("the message is no ModelInferRequest")
    return each.end


def _varint(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    return bytes(result + bytes([number]))
