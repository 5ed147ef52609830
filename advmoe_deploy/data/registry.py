"""Registry of data sets by name."""

import os
from pathlib import Path

from advmoe_deploy.data.dataset import Dataset, Split
from advmoe_deploy.data.digits import load_digits
from advmoe_deploy.data.folder import load_first_of_folder, load_folder_test, load_image_folder
from advmoe_deploy.data.hub import HUB_SETS, load_first_of_hub, load_hub_set, load_hub_test
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.files import at_home

DATASETS = ("digits", *HUB_SETS, "imagenet", "folder")
_IMAGENET_SIZE = 224
_SIZE = "?size="
_FOLDER_SIZES = range(8, 513)


def load_dataset(source: str, decoding: Decoding | None = None) -> Dataset:
    """Return the data set ``source`` names.

    ``digits`` is embedded. ``cifar10``, ``cifar100`` and ``tiny-imagenet`` come from ``NAME:PATH``
    in any layout, or from the hub. ``imagenet:PATH`` and ``folder:PATH?size=64`` read
    ``PATH/CLASS/*``, ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``, or tables and shards; a path
    alone is such a folder, and without a size it has that of ``decoding``. Image files are read as
    ``decoding`` says, if it is for their size, and else in colour by the default of
    :class:`Decoding`.

    Raises:
        UsageError: no such name, a path that is missing or too much, or a size out of range.
        DataError: a file is missing or damaged, or the hub refuses it.
        MachineError: the hub cannot be reached.
    """
    source = absolute(source, decoding.size if decoding else None)
    name, folder, found = _found(source, decoding)
    if name == "digits":
        return load_digits()
    if name in HUB_SETS:
        return load_hub_set(HUB_SETS[name], source, folder, found)
    return load_image_folder(source, folder or Path(), found)


def load_test_split(source: str, decoding: Decoding | None = None) -> Split:
    """Return the test split of what ``source`` names; the training images need not be there.

    Raises:
        The same as :func:`load_dataset`.
    """
    source = absolute(source, decoding.size if decoding else None)
    name, folder, found = _found(source, decoding)
    if name == "digits":
        return load_digits().test
    if name in HUB_SETS:
        return load_hub_test(HUB_SETS[name], folder, found)
    return load_folder_test(folder or Path(), found)


def load_first_of_test(
    source: str, decoding: Decoding | None, count: int
) -> tuple[tuple[str, ...], Split]:
    """Return the classes and the first ``count`` test images of what :func:`load_dataset` returns.

    No other image is read, so that copies among the training images are not looked for.

    Raises:
        The same as :func:`load_dataset`.
    """
    source = absolute(source, decoding.size if decoding else None)
    name, folder, found = _found(source, decoding)
    if name == "digits":
        digits = load_digits()
        return digits.class_names, digits.test.first(count)
    if name in HUB_SETS:
        return load_first_of_hub(HUB_SETS[name], folder, found, count)
    return load_first_of_folder(folder or Path(), found, count)


def _found(source: str, decoding: Decoding | None) -> tuple[str, Path | None, Decoding]:
    """Return a source's name, its folder where it says one, and how its images are read."""
    name, _, path = source.partition(":")
    path, _, size = path.rpartition(_SIZE) if name == "folder" else (path, "", "")
    pixels = HUB_SETS[name].size if name in HUB_SETS else int(size or _IMAGENET_SIZE)
    return name, Path(path) if path else None, _for_size(pixels, decoding)


def _for_size(size: int, decoding: Decoding | None) -> Decoding:
    return decoding if decoding and decoding.size == size else Decoding.of(size)


def folder_in(source: str) -> tuple[Path, int | None] | None:
    """Return the path and the size, if it says one, of a folder of images; else ``None``.

    Raises:
        UsageError: what it says is no size, or out of range.
    """
    name, _, path = _spelled(source).partition(":")
    if name != "folder":
        return None
    folder, mark, size = path.rpartition(_SIZE)
    if not mark:
        return at_home(path), None
    return at_home(folder), _pixels_in(source, size)


def _pixels_in(source: str, size: str) -> int:
    if not size.isdecimal() or int(size) not in _FOLDER_SIZES:
        raise UsageError(f"'{source}' names no size in 8..512; write folder:PATH?size=64")
    return int(size)


def _spelled(source: str) -> str:
    """Return ``source``, before which ``folder:`` stands if it is a path alone."""
    if not source or source.partition(":")[0] in DATASETS:
        return source
    is_path = (
        os.sep in source
        or source.startswith((".", "~"))
        or Path(source.partition(_SIZE)[0]).is_dir()
    )
    return f"folder:{source}" if is_path else source


def absolute(source: str, size: int | None = None) -> str:
    """Return ``source`` with its path absolute, so that it means the same in any working folder.

    A folder of images that says no size gets ``size``.

    Raises:
        UsageError: no such name, a path that is missing or too much, or a size out of range.
    """
    name, colon, path = _spelled(source).partition(":")
    if not source:
        raise UsageError("the model does not say what it was trained on; pass --data")
    if name not in DATASETS:
        raise UsageError(
            f"{unknown_name('data set', name, DATASETS)} And no folder is called '{source}'"
        )
    if colon and not path:
        raise UsageError(f"'{source}' names no folder after the colon; drop it or give a path")
    if name == "digits" and path:
        raise UsageError(f"digits is embedded and takes no path, not '{path}'")
    if name in ("imagenet", "folder") and not path:
        raise UsageError(f"{name} needs a folder: {name}:PATH, with a folder for each class")
    ending = ""
    if name == "folder":
        stem, _, text = path.rpartition(_SIZE) if _SIZE in path else (path, "", str(size or ""))
        path, ending = stem, f"{_SIZE}{_pixels_in(source, text if stem else '')}"
    return f"{name}:{os.path.realpath(at_home(path))}{ending}" if path else name
