"""Totals of the rows of a batch job: errors, and accuracy where folders name the classes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from advmoe_deploy.data.layouts.listing import Wanted
from advmoe_deploy.data.registry import folder_in
from advmoe_deploy.journal import Row
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.specs import Frozen

_FIRST = 5
# How a row ends that has an answer: the error is its last column.
_ANSWERED = b'"error": null}\n'


class Unread(Frozen):
    """An input without an answer, and why."""

    path: str
    error: str


class FolderAccuracy(Frozen):
    """Share of the images with an answer whose class is what their folder is called.

    ``interval`` is the 95 % Wilson interval. With ``trained_on`` the model was trained on images of
    that folder, and the share flatters it.
    """

    correct: int
    images: int
    share: float
    interval: tuple[float, float]
    trained_on: bool = False


@dataclass(frozen=True)
class FolderLabels:
    """A folder whose sub-folders are classes."""

    folder: str

    def of(self, name: str) -> str | None:
        """Return the sub-folder that the input called ``name`` lies in, directly or deeper."""
        try:
            parts = PurePath(name).relative_to(self.folder).parts
        except ValueError:  # an escaped name
            return None
        return parts[0] if len(parts) > 1 else None


def labels_in(
    source: str, names: Iterable[str], class_names: Sequence[str]
) -> tuple[FolderLabels | None, str]:
    """Return the labels in the ``names`` of the inputs that the folder ``source`` gave, if any.

    There are labels if every input lies in a sub-folder that is called as a class. If only some
    do, there are none, and the second value says so.
    """
    if not Path(source).is_dir():
        return None, ""
    labels = FolderLabels(source)
    folders = {labels.of(name) for name in names}
    known = folders & {*class_names}
    if folders == known:
        return labels, ""
    others = sorted(folder or "images beside them" for folder in folders - known)
    shown = ", ".join(map(repr, others[:_FIRST])) + (", ..." if len(others) > _FIRST else "")
    return None, (
        f"no accuracy: of the sub-folders of {source}, {len(known)} are classes of the model, and "
        f"others are not: {shown}"
        if known
        else ""
    )


def trained_on(source: str, data: str) -> bool:
    """Return whether ``source`` is the folder of training images that the data source has.

    That is the folder in ``data`` itself, or its split for the training.
    """
    found = folder_in(data)
    if found is None:
        return False
    root, asked = found[0].resolve(), Path(source).resolve()
    return asked == root or (asked.parent == root and asked.name.lower() in Wanted.train)


class Tally:
    """Counts of rows as they come."""

    def __init__(self, labels: FolderLabels | None, *, trained_on: bool = False) -> None:
        self._labels, self._trained_on = labels, trained_on
        self._answered = self._correct = 0
        self.unread: list[Unread] = []

    def passing(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the ``lines`` of JSON, each counted."""
        for line in lines:
            if self._labels is not None or not line.endswith(_ANSWERED):
                self.add(json.loads(line))
            yield line

    def add(self, row: Row) -> None:
        """Count ``row``."""
        if row["error"] is not None:
            if len(self.unread) < _FIRST:
                self.unread.append(Unread(path=row["path"], error=row["error"]))
        elif self._labels is not None:
            self._answered += 1
            self._correct += row["label"] == self._labels.of(row["path"])

    @property
    def accuracy(self) -> FolderAccuracy | None:
        """Accuracy by folder, if that is known of an image."""
        if not self._answered:
            return None
        return FolderAccuracy(
            correct=self._correct,
            images=self._answered,
            share=self._correct / self._answered,
            interval=wilson_interval(self._correct, self._answered),
            trained_on=self._trained_on,
        )
