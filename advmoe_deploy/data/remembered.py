"""Classes, data and threat model that an imported run remembers, held against it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.data.layouts.find import require_folder
from advmoe_deploy.data.matching import label_map
from advmoe_deploy.data.registry import absolute, folder_in, load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import InputError, UsageError
from advmoe_deploy.files import names_file
from advmoe_deploy.reports.checkpoint import Known
from advmoe_deploy.specs import ModelSpec, ThreatModel

# Any size: that of the model is not known yet.
_SIZE = 32


@dataclass(frozen=True)
class Remembered:
    """Classes, data and threat that were named for a model; ``note`` hears what is assumed."""

    class_names: tuple[str, ...]
    source: str
    threat: ThreatModel | None
    note: Callable[[str], None]

    def of(self, spec: ModelSpec) -> Known:
        """Return what is known of the model of ``spec``; unnamed classes are called by their data.

        Raises:
            UsageError: there are more or fewer classes, or other ones, or other images.
            DataError: the data cannot be read.
        """
        names = self.class_names
        if names and len(names) != spec.num_classes:
            raise UsageError(
                f"--classes names {len(names)} classes, and the model has {spec.num_classes}; name "
                "each once, in the order of its outputs"
            )
        if not self.source:
            numbers = tuple(map(str, range(spec.num_classes)))
            return Known(names or numbers, self.threat)
        data = load_dataset(self.source, Decoding.of(spec.image_size, spec.in_channels))
        if len(data.class_names) != spec.num_classes:
            raise UsageError(
                f"{data.source} has {len(data.class_names)} classes, and the model has "
                f"{spec.num_classes}; pass the data that it was trained on"
            )
        if data.image_shape != spec.image_shape:
            raise UsageError(
                f"{data.source} has images of {data.image_shape}, the model takes "
                f"{spec.image_shape}; pass matching --data, or --set image_size=N if it is wrong"
            )
        if names:
            label_map(data.class_names, names, {})
        else:
            self.note(
                f"classes are taken to be those of the data, in its order: "
                f"{', '.join(data.class_names[:5])}...; --classes says otherwise"
            )
        found = data.fingerprint
        known = {"data": data.source, "fingerprint": found.model_dump() if found else None}
        return Known(names or data.class_names, self.threat, known)


def remembered(
    classes: str | os.PathLike[str] | Sequence[str] | None,
    data: str | None,
    epsilon: float | None,
    note: Callable[[str], None],
) -> Remembered:
    """Return what an import is to remember, refused as far as it can be before the file is read.

    Raises:
        UsageError: a class is named twice or not at all, or the data have no such name.
        InputError: a file or a folder is not there.
    """
    source = absolute(data, _SIZE) if data else ""
    if data and (folder := folder_in(data)):
        require_folder(folder[0], "name where the data lie")
        source = data if folder[1] else f"folder:{os.path.realpath(folder[0])}"
    threat = ThreatModel(epsilon=epsilon) if epsilon is not None else None
    return Remembered(_names(classes), source, threat, note)


def _names(classes: str | os.PathLike[str] | Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes of a list, of a text file with a name a line, or of CAT,DOG,..."""
    if classes is None:
        return ()
    if isinstance(classes, str | os.PathLike):
        classes = _read(os.fspath(classes))
    names = tuple(name.strip() for name in classes if name.strip())
    twice = [name for name in names if names.count(name) > 1]
    if twice or len(names) < 2:
        why = f"{twice[0]} twice" if twice else f"{len(names)} classes"
        raise UsageError(f"--classes names {why}; name each once, in the order of the outputs")
    return names


def _read(text: str) -> list[str]:
    if not names_file(text):
        if "," in text:
            return text.split(",")
        raise InputError(f"--classes {text} is no file; name one with a class a line, or A,B,C")
    try:
        return Path(text).read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise InputError(f"--classes {text} is no text ({error}); save it as UTF-8") from None
