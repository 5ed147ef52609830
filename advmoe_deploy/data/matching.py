"""Matching of data to a model: images of its size, and labels in the order of its classes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import BundleManifest
from advmoe_deploy.data.dataset import Dataset, Split, to_float
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.data.registry import load_dataset, load_first_of_test
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import InputError, UsageError
from advmoe_deploy.files import names_file
from advmoe_deploy.specs import Fingerprint, ModelSpec

_SHOWN = 5


@dataclass(frozen=True)
class Trained:
    """Spec of a trained model, its class names, its decoder of images, and its data."""

    spec: ModelSpec
    class_names: tuple[str, ...]
    decoding: Decoding | None = None
    fingerprint: Fingerprint | None = None

    @classmethod
    def of(cls, manifest: BundleManifest) -> "Trained":
        """Return what the model of a bundle was made for."""
        return cls(manifest.model, manifest.class_names, manifest.decoding, manifest.fingerprint)


@dataclass(frozen=True)
class LabelMap:
    """The model's label of each label of the data, and in words what was done, if anything was."""

    labels_C: NDArray[np.int64]
    note: str = ""
    by_name: bool = True


def matching_test_images(
    source: str,
    trained: Trained,
    count: int | None = None,
    *,
    class_map: Mapping[str, str] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the first ``count`` test images of ``source``, by default all, and their labels.

    Where all are asked for, it is said if the data are not those that the model was trained on.

    Images are float32 [N, C, H, W] in [0, 1], read from files as the model's are, labels in the
    order of its classes.

    Raises:
        UsageError: no source, no image, images that the model does not take, or other classes.
        DataError: the data set cannot be read.
    """
    if count is not None and count < 1:
        raise UsageError(f"images={count} is too few; take at least one")
    (names, split), spec = _test_images(source, trained, count), trained.spec
    if split.images.shape[1:] != spec.image_shape or len(names) != spec.num_classes:
        raise UsageError(
            f"{source} has images {split.images.shape[1:]} of {len(names)} classes, "
            f"the model takes {spec.image_shape} of {spec.num_classes}; pass matching --data"
        )
    mapped = label_map(names, trained.class_names, class_map or {})
    if mapped.note:
        say_once(f"{source}: {mapped.note}")
    return to_float(split.images), mapped.labels_C[split.labels]


def _test_images(source: str, trained: Trained, count: int | None) -> tuple[tuple[str, ...], Split]:
    """Return classes and test images; of a few of them the rest is neither read nor compared."""
    if count is not None:
        return load_first_of_test(source, trained.decoding, count)
    dataset = load_dataset(source, trained.decoding)
    _say_other_data(dataset, trained.fingerprint)
    return dataset.class_names, dataset.test


def in_order_of(dataset: Dataset, class_names: tuple[str, ...], mapped: LabelMap) -> Dataset:
    """Return ``dataset`` with its labels mapped and its classes called as the model calls them."""

    def relabelled(split: Split) -> Split:
        return Split(split.images, mapped.labels_C[split.labels])

    return replace(
        dataset,
        class_names=class_names,
        train=relabelled(dataset.train),
        holdout=relabelled(dataset.holdout),
        test=relabelled(dataset.test),
    )


def label_map(data: Sequence[str], model: Sequence[str], class_map: Mapping[str, str]) -> LabelMap:
    """Return which of the ``model``'s classes each class of the ``data`` is, of as many.

    Classes are matched by name, once ``class_map`` has renamed those of the data. Where one side
    has numbers or placeholders for names, they are matched by number, and the note says so.

    Raises:
        UsageError: the names differ, or ``class_map`` renames what is not there.
    """
    renamed = _renamed(data, model, class_map)
    if renamed == tuple(model):
        return LabelMap(np.arange(len(data)))
    if set(renamed) == set(model) and len(set(model)) == len(model):
        places = {name: label for label, name in enumerate(model)}
        labels_C = np.asarray([places[name] for name in renamed], dtype=np.int64)
        return LabelMap(labels_C, "its classes are in another order; labels follow the model's")
    if class_map or not (_is_nameless(renamed) or _is_nameless(model)):
        raise _other_classes(renamed, model)
    side = "its" if _is_nameless(renamed) else "the model's"
    label_of = {number: label for label, number in enumerate(_numbers(model))}
    labels_C = np.asarray([label_of[number] for number in _numbers(renamed)], dtype=np.int64)
    note = f"{side} classes have numbers and no names; labels are taken as the model's by number"
    return LabelMap(labels_C, note, by_name=not _is_nameless(renamed))


def read_class_map(text: str | None) -> dict[str, str]:
    """Return the renamings in ``text``: OLD=NEW,OLD=NEW, or the name of a file with one a line.

    Raises:
        UsageError: a part has no ``=``, or renames a class twice.
        InputError: the file cannot be read.
    """
    if not text:
        return {}
    parts: Iterable[str] = text.split(",")
    if "=" not in text or names_file(text):
        try:
            parts = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--class-map {text} cannot be read ({error}); write OLD=NEW,OLD=NEW or name a "
                "text file of such lines"
            ) from None
    pairs = [part.strip().partition("=") for part in parts if part.strip()]
    renamings = {old.strip(): new.strip() for old, _, new in pairs}
    if not all(all(pair) for pair in pairs) or len(renamings) < len(pairs):
        raise UsageError(f"--class-map '{text}' is no list of renamings; write OLD=NEW,OLD=NEW")
    return renamings


def _renamed(
    data: Sequence[str], model: Sequence[str], class_map: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the classes of the data as ``class_map`` renames them; it may say NEW=OLD as well."""
    names = dict(zip(data, data, strict=True))
    for old, new in class_map.items():
        if old in data and new in model:
            names[old] = new
        elif new in data and old in model:
            names[new] = old
        else:
            lacking = old if old not in (*data, *model) else new
            raise UsageError(
                f"--class-map {old}={new}: no class is called {lacking}; the data have "
                f"{_some(data)}, the model {_some(model)}"
            )
    return tuple(names[name] for name in data)


def _is_nameless(names: Sequence[str]) -> bool:
    """Return whether ``names`` are numbers from 0 on, or placeholders such as ``class 3``."""
    plain = {name.removeprefix("class ") for name in names}
    return plain == {str(label) for label in range(len(names))}


def _numbers(names: Sequence[str]) -> list[int]:
    """Return the number that each class is called by, or else its place."""
    if _is_nameless(names):
        return [int(name.rpartition(" ")[2]) for name in names]
    return list(range(len(names)))


def _other_classes(data: Sequence[str], model: Sequence[str]) -> UsageError:
    lone = [name for name in data if name not in model]
    lacking = [name for name in model if name not in data]
    example = ",".join(f"{old}={new}" for old, new in list(zip(lone, lacking, strict=False))[:1])
    return UsageError(
        f"the data have the classes {_some(lone)}, which the model does not know; it has "
        f"{_some(lacking)} instead: pass other --data, or say what is what by "
        f"--class-map {example},..."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _say_other_data(dataset: Dataset, trained: Fingerprint | None) -> None:
    if trained and dataset.fingerprint and dataset.fingerprint.images != trained.images:
        say_once(
            f"{dataset.source} holds other images than the model was trained and measured on "
            f"(content {dataset.fingerprint.images[:12]}, then {trained.images[:12]})"
        )
