"""Parquet files as inputs: a column of encoded images, as the Hugging Face hub has it.

The column is binary, or a struct with a field ``bytes``; labels and other columns are not read.
Rows are read a few at a time, whatever the size of a row group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from advmoe_deploy.data.layouts.listing import Wanted
from advmoe_deploy.data.pixels import decode_bytes
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, reason_of
from advmoe_deploy.serving.names import shown
from advmoe_deploy.serving.parts import Decoded, Files, Part, Read, image_or_reason, said
from advmoe_deploy.serving.rows import arrow_module

_BYTES_AT_ONCE = 16 << 20
_ROWS_AT_ONCE = 64
# Times; image files are compressed already.
_MOST_COMPRESSED = 200


@dataclass(frozen=True)
class ParquetTable:
    """The rows of one parquet file, whose images are the leaf ``column`` of its schema."""

    path: str
    column: str
    groups: tuple[int, ...]
    size: int

    def __len__(self) -> int:
        return sum(self.groups)

    def names(self, start: int) -> Iterator[str]:
        """Yield ``file.parquet#row``, counted from 0."""
        file = shown(self.path)
        return (f"{file}#{row}" for row in range(start, len(self)))

    def reads(self, start: int) -> Iterator[Read]:
        """Yield what decodes the image of each row."""
        names = self.names(start)
        for group, count in enumerate(self.groups):
            if start < count:
                for value in self._values(group, start, count):
                    yield partial(_image, value, next(names))
            start = max(0, start - count)

    def stamp(self) -> Iterator[str]:
        """Yield the path, the column and the sizes."""
        yield f"{self.path}\0{self.column} {self.groups} {self.size}"

    def _values(self, group: int, start: int, count: int) -> Iterator[bytes | str | None]:
        """Yield the values of a row group from row ``start`` on, or why there is none."""
        done = start
        try:
            for value in islice(self._read(group), start, count):
                yield value
                done += 1
            reason = "the file has fewer rows than it says"
        except _arrow_errors() as error:
            reason = _reason(error)
        for _ in range(done, count):
            yield reason

    def _read(self, group: int) -> Iterator[bytes | None]:
        with _opened(self.path) as file:
            # Of the columns by themselves pyarrow's metadata ends the process if they are damaged.
            size = max(1, file.metadata.row_group(group).total_byte_size)
            if size > max(_BYTES_AT_ONCE, _MOST_COMPRESSED * self.size):
                raise ValueError(f"{size} bytes in a file of {self.size}; images do not shrink so")
            at_once = max(1, _BYTES_AT_ONCE * self.groups[group] // size)
            for batch in file.iter_batches(
                min(_ROWS_AT_ONCE, at_once),
                row_groups=[group],
                columns=[self.column],
                use_threads=False,
            ):
                for value in batch.column(0).to_pylist():
                    yield value["bytes"] if isinstance(value, dict) else value


def open_table(path: str) -> list[Part]:
    """Return the rows of the parquet file at ``path``; of a damaged one, a row with its error.

    Raises:
        BackendUnavailableError: pyarrow is not installed.
    """
    errors = _arrow_errors()
    try:
        with _opened(path) as file:
            column, metadata = _image_column(file.schema_arrow), file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        size = Path(path).stat().st_size
        if not 0 < sum(groups) <= size or min(groups) < 0:
            raise DataError(f"says that it has {sum(groups)} rows, in {size} bytes")
        return [ParquetTable(path, column, groups, size)]
    except DataError as error:
        return [Files((path,), {path: str(error)})]
    except errors as error:
        return [Files((path,), {path: _reason(error)})]


def _image_column(schema: Any) -> str:
    """Return the column of images, by its usual name or as the only one that may be it."""
    leaves = {field.name: leaf for field in schema if (leaf := _leaf(field))}
    usual = [name for name in Wanted().images if name in leaves]
    if usual or len(leaves) == 1:
        return leaves[usual[0] if usual else next(iter(leaves))]
    raise DataError(
        f"has the columns {', '.join(schema.names)}, and none that is binary, or a struct with "
        f"bytes, is called {', '.join(Wanted().images)}; rename one"
    )


def _leaf(field: Any) -> str | None:
    """Return the path of what holds the bytes of a column of images, if it can be one."""
    types = arrow_module("pyarrow.types")

    def is_bytes(type_: Any) -> bool:
        return bool(types.is_binary(type_) or types.is_large_binary(type_))

    if is_bytes(field.type):
        return str(field.name)
    parts = field.type if types.is_struct(field.type) else ()
    inside = any(part.name == "bytes" and is_bytes(part.type) for part in parts)
    return f"{field.name}.bytes" if inside else None


def _image(value: bytes | str | None, name: str, decoding: Decoding) -> Decoded:
    if value is None:
        return "holds no encoded image, at most a path; store the images' bytes"
    if isinstance(value, str):
        return said(value)(decoding)
    return image_or_reason(partial(decode_bytes, value, name, decoding), name)


def _opened(path: str) -> Any:
    parquet = arrow_module("pyarrow.parquet")
    return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _arrow_errors() -> tuple[type[Exception], ...]:
    return (arrow_module("pyarrow").ArrowException, OSError, ValueError, LookupError)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return reason_of(error, "read")
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no readable parquet file ({text:.200}); download it again"
