"""Tables of encoded images and labels: parquet as the hub has it, and arrow files.

``SPLIT-00000-of-00001.parquet``, ``SPLIT.parquet`` or ``SPLIT/0000.parquet``, in any folder.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.data.layouts.copies import split_files
from advmoe_deploy.data.layouts.listing import Listing, Wanted, joined
from advmoe_deploy.data.layouts.tree import Tree
from advmoe_deploy.errors import DataError, missing_extra, reason_of

_SUFFIXES = (".parquet", ".arrow")
_PART = re.compile(r"(?:^|-)(\d+)-of-(\d+)")


def image_tables(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return the training and test tables below a folder, or ``None`` if there are none.

    Raises:
        DataError: a split or a part of one is missing or there twice, or a file is damaged.
    """
    files = split_files(tree, _SUFFIXES, wanted)
    if files is None:
        return None
    train, test = (_listing(tree.root, each, wanted) for each in files)
    return train, test


def _listing(root: Path, files: list[str], wanted: Wanted) -> Listing:
    _require_each_part_once([root / file for file in files])
    return joined([_table(root / file, wanted) for file in files])


def _require_each_part_once(files: list[Path]) -> None:
    """Refuse names such as 00000-of-00002 with one missing, or one beside another of its number."""
    parts: dict[str, Path] = {}
    for file in files:
        match = _PART.search(file.stem)
        twin = parts.setdefault(match[1] if match else file.name, file)
        if twin != file:
            raise DataError(f"{twin} and {file} are the same part of a split; keep one of them")
    for file in files:
        match = _PART.search(file.stem)
        if match and int(match[2]) != len(files):
            raise DataError(
                f"{file} is one of {int(match[2])} parts, and {len(files)} are there; download the "
                "others, or remove what does not belong to them"
            )


def _table(file: Path, wanted: Wanted) -> Listing:
    """Return one file's images and labels, from the first columns of ``wanted`` that it has."""
    try:
        import pyarrow
    except ImportError:
        raise missing_extra("pyarrow", "train") from None
    try:
        schema = _schema(file)
        image, label = (_column(file, schema, names) for names in (wanted.images, wanted.labels))
        table = _read(file, [image, label])
        encoded, labels = encoded_in(table.column(image)), table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{file}: {reason_of(error, 'read')}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file} is no readable table of images ({reason}); download it again"
        ) from None
    if not all(isinstance(each, int) and 0 <= each < 1 << 31 for each in labels):
        raise DataError(
            f"{file} holds labels in column {label} that are no class numbers; number them from 0"
        )
    return Listing(
        labels_N=np.asarray(labels, dtype=np.int64),
        class_names=_names_in(schema.metadata or {}, label),
        encoded=encoded.__getitem__,
        where=lambda row: f"{file}, row {row}",
        stamp=lambda row: hashlib.sha256(encoded[row] or b"").hexdigest(),
    )


def encoded_in(column: Any) -> list[Any]:
    """Return the bytes of each image of a column, in whose structures they may be a field."""
    import pyarrow.compute

    if pyarrow.types.is_struct(column.type):
        column = pyarrow.compute.struct_field(column, "bytes")
    return list(column.to_pylist())  # not as one array, which holds 2 GiB at most


def _schema(file: Path) -> Any:
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_schema(file)
    with pyarrow.ipc.open_stream(file) as stream:
        return stream.schema


def _read(file: Path, columns: list[str]) -> Any:
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        # partitioning=None: a folder called a=b is no column
        return pyarrow.parquet.read_table(file, columns=columns, partitioning=None)
    with pyarrow.ipc.open_stream(file) as stream:
        return stream.read_all().select(columns)


def _column(file: Path, schema: Any, names: tuple[str, ...]) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise DataError(
        f"{file} has the columns {', '.join(schema.names)}, and none of {', '.join(names)}; "
        "rename one"
    )


def _names_in(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the hub's library leaves in a table, if it did."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
