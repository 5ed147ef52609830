"""Data sets of the hub, from any layout in a folder, or from the hub's own tables."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from advmoe_deploy.data.assemble import Dealt, assemble, read_split
from advmoe_deploy.data.dataset import HOLDOUT_IMAGES, SPLIT_SEED, Dataset, Split
from advmoe_deploy.data.layouts.find import TABLES_FIRST, listings_of
from advmoe_deploy.data.layouts.listing import Listing, Wanted, require_labels
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError, InputError, MachineError
from advmoe_deploy.files import at_home
from advmoe_deploy.hub.client import snapshot
from advmoe_deploy.hub.faults import Repository

FOLDER_VARIABLE = "ADVMOE_DATA"


@dataclass(frozen=True)
class HubSet:
    """One data set of the hub: where it is, its columns, its images (``size`` pixels square)."""

    name: str
    hub_name: str
    num_classes: int
    size: int
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"

    @property
    def way_out(self) -> str:
        """Way out when the data cannot be had."""
        return f"pass --data {self.name}:PATH or set {FOLDER_VARIABLE}"

    @property
    def wanted(self) -> Wanted:
        """Names to look for in a folder: its own first, then those that others use."""
        usual = Wanted()
        validation = ("val", "valid", "validation")
        test = (*validation, "test") if self.test in validation else usual.test
        return Wanted(
            images=_led_by(self.image, usual.images),
            labels=_led_by(self.label, usual.labels),
            train=_led_by(self.train, usual.train),
            test=_led_by(self.test, test),
        )


def _led_by(first: str, others: tuple[str, ...]) -> tuple[str, ...]:
    return (first, *(name for name in others if name != first))


HUB_SETS = {
    each.name: each
    for each in (
        HubSet("cifar10", "uoft-cs/cifar10", 10, 32, image="img"),
        HubSet("cifar100", "uoft-cs/cifar100", 100, 32, image="img", label="fine_label"),
        HubSet("tiny-imagenet", "zh-plus/tiny-imagenet", 200, 64, test="valid"),
    )
}
_CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def load_hub_set(hub_set: HubSet, source: str, folder: Path | None, decoding: Decoding) -> Dataset:
    """Return the data set as uint8 [N, C, H, W], read as ``decoding`` says.

    It comes from ``folder``, in any layout of :mod:`~advmoe_deploy.data.layouts`; without one, from
    ``$ADVMOE_DATA/NAME``; without that, from the hub. The hold-out is a fixed 1,000 of the training
    images. Images keep their order, unless they come class by class: then they are dealt evenly by
    class.

    Raises:
        DataError: a file is missing or damaged, there are too few images, or the hub refuses them.
        MachineError: the hub cannot be reached and its cache does not hold them.
    """
    train, test, names = _listed(hub_set, folder)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train)).astype(np.int64)
    # A tiny copy of the data still leaves four fifths of it to train on.
    size = min(HOLDOUT_IMAGES, len(order) // 5)
    if not size:
        raise DataError(f"{source} holds {len(order)} images to train on; give at least five")
    return assemble(
        source,
        names,
        train=Dealt.mixed(train, np.sort(order[size:])),
        holdout=Dealt.mixed(train, np.sort(order[:size])),
        test=Dealt.mixed(test),
        decoding=decoding,
        exact=True,
    )


def load_first_of_hub(
    hub_set: HubSet, folder: Path | None, decoding: Decoding, count: int
) -> tuple[tuple[str, ...], Split]:
    """Return the classes and the first ``count`` test images, as :func:`load_hub_set` has them.

    No other image is read.
    """
    _, test, names = _listed(hub_set, folder)
    return names, read_split(Dealt.mixed(test).first(count), decoding, exact=True)


def _listed(hub_set: HubSet, folder: Path | None) -> tuple[Listing, Listing, tuple[str, ...]]:
    """Return training images, test images and classes, unread."""
    folder = folder or _default_folder(hub_set)
    folder = folder or _from_hub(hub_set, hub_set.train, hub_set.test)
    train, test = _in_folder(hub_set, folder, hub_set.wanted)
    names = _class_names(hub_set, str(folder), train.class_names)
    for listing in (train, test):
        require_labels(str(folder), listing, len(names))
    return train, test, names


def load_hub_test(hub_set: HubSet, folder: Path | None, decoding: Decoding) -> Split:
    """Return the test images alone, in the same order; no training images need be there.

    The rest is as for :func:`load_hub_set`; classes are as the test images' files number them.
    """
    folder = folder or _default_folder(hub_set) or _from_hub(hub_set, hub_set.test)
    _, test = _in_folder(hub_set, folder, hub_set.wanted.test_alone)
    names = _class_names(hub_set, str(folder), test.class_names)
    require_labels(str(folder), test, len(names))
    return read_split(Dealt.mixed(test), decoding, exact=True)


def _in_folder(hub_set: HubSet, folder: Path, wanted: Wanted) -> tuple[Listing, Listing]:
    way_out = f"{hub_set.way_out}, a folder of parquet files"
    return listings_of(folder, wanted, TABLES_FIRST, way_out)


def _class_names(hub_set: HubSet, where: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that the layout tells, else the data set's own, else placeholders."""
    if found and len(found) != hub_set.num_classes:
        say_once(
            f"{where} holds {len(found)} classes ({', '.join(found[:3])}...), {hub_set.name} has "
            f"{hub_set.num_classes}"
        )
    if found:
        return found
    if hub_set.name == "cifar10":
        return _CIFAR10_CLASSES
    return tuple(f"class {label}" for label in range(hub_set.num_classes))


def _default_folder(hub_set: HubSet) -> Path | None:
    root = os.environ.get(FOLDER_VARIABLE)
    return at_home(root) / hub_set.name if root else None


def _from_hub(hub_set: HubSet, *splits: str) -> Path:
    """Return the folder, in the cache of the hub's client, with the tables of ``splits``.

    Raises:
        DataError: the hub refuses them.
        MachineError: it cannot be reached and the cache does not hold them, or the disk is full.
        BackendUnavailableError: the client is not installed.
    """
    repository = Repository(hub_set.hub_name, kind="dataset")
    try:
        return snapshot(repository, [f"*/{split}-*.parquet" for split in splits])
    except MachineError as error:
        raise MachineError(f"{error}, or {hub_set.way_out}") from None
    except InputError as error:
        raise DataError(f"{error}, or {hub_set.way_out}") from None
