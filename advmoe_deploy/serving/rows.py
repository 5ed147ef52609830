"""Rows of a batch job, one per input, and their .jsonl, .parquet and .csv files."""

import csv
import importlib
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import UsageError, missing_extra, writing
from advmoe_deploy.files import is_stream, staged_file
from advmoe_deploy.journal import Row
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.routing import softmax
from advmoe_deploy.runtime.runner import Prediction

_ROWS_PER_GROUP = 4096


@dataclass(frozen=True)
class RowFormat:
    """The columns: ``top_k`` best classes (0: no such column), ids for each routed layer.

    Ids are a list per image or, where tokens are routed, a list of lists.
    """

    class_names: tuple[str, ...]
    routes: tuple[RouteStep, ...]
    top_k: int = 0

    def unreadable(self, path: str, reason: str) -> Row:
        """Return the row of an input without an answer."""
        row: Row = {"path": path, "label": None, "label_id": None, "probability": None}
        if self.top_k:
            row["top_k"] = None
        return {**row, "expert_ids": None, "error": reason}

    def answered(self, paths: Sequence[str], prediction: Prediction) -> list[Row]:
        """Return one row per image of ``prediction``, in its order."""
        probabilities_NC = softmax(prediction.logits)
        return [
            self._row(
                path, probabilities_NC[i], {k: v[i] for k, v in prediction.expert_ids.items()}
            )
            for i, path in enumerate(paths)
        ]

    def _row(
        self, path: str, probabilities_C: NDArray[np.float64], ids: dict[str, NDArray[np.int64]]
    ) -> Row:
        if not np.isfinite(probabilities_C).all():
            return self.unreadable(path, "the model's logits are not finite")
        order = np.argsort(-probabilities_C, kind="stable")
        best = [self._class(int(c), probabilities_C) for c in order[: max(1, self.top_k)]]
        row: Row = {"path": path, **best[0]}
        if self.top_k:
            row["top_k"] = best
        expert_ids = {layer: ids_K.tolist() for layer, ids_K in ids.items()} or None
        return {**row, "expert_ids": expert_ids, "error": None}

    def _class(self, label_id: int, probabilities_C: NDArray[np.float64]) -> Row:
        return {
            "label": self.class_names[label_id],
            "label_id": label_id,
            "probability": round(float(probabilities_C[label_id]), 6),
        }


def writer_for(output: Path) -> Callable[[BinaryIO, Iterable[bytes], RowFormat], None]:
    """Return what writes JSON lines into a file of the kind that ``output`` names.

    Raises:
        UsageError: another suffix than .jsonl, .parquet or .csv.
        BackendUnavailableError: .parquet without pyarrow.
    """
    match output.suffix.lower():
        case ".jsonl":
            return _write_jsonl
        case ".csv":
            return _write_csv
        case ".parquet":
            arrow_module("pyarrow")
            return _write_parquet
    raise UsageError(f"output '{output}' ends in none of .jsonl, .parquet and .csv; rename it")


def write_rows(output: Path, lines: Iterable[bytes], columns: RowFormat) -> None:
    """Write JSON ``lines`` to ``output``, which appears only when it is whole.

    A link is followed; a pipe or a device is written through, once all rows are there.
    """
    write = writer_for(output)
    if is_stream(output):
        with writing(output), tempfile.TemporaryFile() as whole:  # for Parquet, which seeks
            write(whole, lines, columns)
            whole.seek(0)
            with output.open("ab") as stream:
                shutil.copyfileobj(whole, stream)
        return
    with staged_file(output.resolve()) as file:
        write(file, lines, columns)


def _write_jsonl(file: BinaryIO, lines: Iterable[bytes], _: RowFormat) -> None:
    file.writelines(lines)


def _write_csv(file: BinaryIO, lines: Iterable[bytes], columns: RowFormat) -> None:
    """Write one line per row, UTF-8: of lists a column per class and, of experts, per layer.

    Ids of experts are separated by spaces; of tokens they are a list of lists, as JSON has it.
    """
    places = range(1, columns.top_k + 1)
    best = [f"{what}_{place}" for place in places for what in ("label", "probability")]
    experts = [f"expert_ids_{route.layer}" for route in columns.routes]
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "label_id", "probability", *best, *experts, "error"])
    writer.writerows(_cells(row, columns) for row in map(json.loads, lines))
    text.detach()  # the file is not ours to close


def _cells(row: Row, columns: RowFormat) -> list[Any]:
    """Return the cells of a row; what it lacks is empty."""
    found, ids = row.get("top_k"), row["expert_ids"]
    best: list[Any] = [""] * (2 * columns.top_k)
    if found:
        best = [each[what] for each in found for what in ("label", "probability")]
    experts = [""] * len(columns.routes)
    if ids:
        experts = [
            " ".join(map(str, ids[route.layer])) if route.tokens is None else str(ids[route.layer])
            for route in columns.routes
        ]
    first = [row[name] for name in ("path", "label", "label_id", "probability")]
    return [*first, *best, *experts, row["error"]]


def _write_parquet(file: BinaryIO, lines: Iterable[bytes], columns: RowFormat) -> None:
    arrow, parquet = arrow_module("pyarrow"), arrow_module("pyarrow.parquet")
    schema, rows = _schema(arrow, columns), map(json.loads, lines)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))


def _schema(arrow: Any, columns: RowFormat) -> Any:
    answer = [
        ("label", arrow.string()),
        ("label_id", arrow.int64()),
        ("probability", arrow.float64()),
    ]
    of_image = arrow.list_(arrow.int64())
    ids = arrow.struct(
        [(r.layer, of_image if r.tokens is None else arrow.list_(of_image)) for r in columns.routes]
    )
    best = [("top_k", arrow.list_(arrow.struct(answer)))] if columns.top_k else []
    return arrow.schema(
        [
            ("path", arrow.string()),
            *answer,
            *best,
            # Parquet has no struct without fields: a model without routes has a column of nulls.
            ("expert_ids", ids if columns.routes else arrow.null()),
            ("error", arrow.string()),
        ]
    )


def arrow_module(module: str) -> Any:
    """Return pyarrow, or a module of it.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra("pyarrow", "serve") from None
