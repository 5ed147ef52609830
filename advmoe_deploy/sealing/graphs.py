"""ONNX graphs whose tensors lie in other files: put into the graph, if a hash covers them."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from advmoe_deploy.errors import BundleError
from advmoe_deploy.sealing.files import is_plain

# Words without which no graph names a file: the key of a tensor's data, and the operator that
# holds an engine. Only what has one of them is parsed here.
_WORDS = (b"location", b"EPContext")
# What protobuf can write of a graph.
_MOST_BYTES = (1 << 31) - 1

# From a name in the bundle to the content of that file, or to None where it is not listed.
ReadListed = Callable[[str], bytes | None]


def self_contained(content: bytes, name: str, read: ReadListed) -> bytes:
    """Return the graph of ``content`` with all its tensors inside: nobody opens a file for it.

    Args:
        content: the serialised graph.
        name: of its file in the bundle; what it names lies beside it.
        read: gives the content of a file that the bundle lists.

    Raises:
        BundleError: it names a file that is not listed, a place that is not in that file, or an
            engine.
    """
    if not any(word in content for word in _WORDS):
        return content
    import onnx  # only now: few graphs come here
    from google.protobuf.message import DecodeError, EncodeError

    try:
        model, data = onnx.load_model_from_string(content), _Data(name, read)
        changed = [_filled(each, name, data) for each in _messages(model)]
        return model.SerializeToString() if any(changed) else content
    except (DecodeError, EncodeError, ValueError) as error:
        raise BundleError(f"{name} cannot be read: {error}; export the bundle again") from None


def _messages(message: Any) -> Iterator[Any]:
    """Yield ``message`` and every message in it, those of branches and functions included."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)


class _Data:
    """The files that a graph's tensors lie in, each read once, and how much of them was given."""

    def __init__(self, graph: str, read: ReadListed) -> None:
        self.graph, self._read = graph, read
        self._files: dict[str, bytes | None] = {}
        self._given = 0

    def file(self, location: str) -> bytes | None:
        """Return the file that a graph calls ``location``, ``None`` if it is not listed."""
        if location not in self._files:
            where = (PurePosixPath(self.graph).parent / location).as_posix()
            self._files[location] = self._read(where) if is_plain(location) else None
        return self._files[location]

    def part(self, content: bytes, begin: int, length: int) -> bytes:
        """Return a part of a file.

        Raises:
            BundleError: all parts are more than the files, or than a graph can hold.
        """
        self._given += length
        if self._given > min(_MOST_BYTES, sum(len(each or b"") for each in self._files.values())):
            raise BundleError(
                f"{self.graph}: its tensors are more than the files they lie in, or than 2 GiB; do "
                "not use this bundle, or export it again"
            )
        return content[begin : begin + length]


def _filled(message: Any, name: str, data: _Data) -> bool:
    """Return whether ``message`` is a tensor whose data were elsewhere; they are in it now."""
    kind = message.DESCRIPTOR.name
    if kind == "NodeProto" and message.op_type == "EPContext":
        files = [a.s.decode(errors="replace") for a in message.attribute]
        raise BundleError(f"{name} names an engine in {max(files, key=len)!r}; export it again")
    if kind != "TensorProto" or not (message.data_location or message.external_data):
        return False
    fields = {entry.key: entry.value for entry in message.external_data}
    location = fields.get("location", "")
    content = data.file(location)
    if content is None:
        raise BundleError(
            f"{name}: the data of {message.name!r} are in {location!r}, which the manifest does "
            "not list; do not use this bundle, or export it again"
        )
    begin = _number(fields.get("offset", "0"))
    length = _number(fields.get("length", str(len(content) - (begin or 0))))
    if begin is None or length is None or begin + length > len(content):
        raise BundleError(
            f"{name}: the data of {message.name!r} are outside the file {location!r}; "
            "export it again"
        )
    message.raw_data = data.part(content, begin, length)
    message.ClearField("external_data")
    message.ClearField("data_location")
    return True


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 20 else None
