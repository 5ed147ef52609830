"""Registry of data sets by name."""

from pathlib import Path

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.digits import load_digits
from advmoe_deploy.data.folder import load_image_folder
from advmoe_deploy.data.hub import HUB_SETS, load_hub_set
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError, unknown_name

DATASETS = ("digits", *HUB_SETS, "imagenet", "folder")
_IMAGENET_SIZE = 224
_SIZE = "?size="
_FOLDER_SIZES = range(8, 513)


def load_dataset(source: str, decoding: Decoding | None = None) -> Dataset:
    """Return the data set ``source`` names.

    ``digits`` is embedded. ``cifar10``, ``cifar100`` and ``tiny-imagenet`` come from ``NAME:PATH``
    in any layout, or from the hub. ``imagenet:PATH`` and ``folder:PATH?size=64`` read
    ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``, or tables and shards. Image files are read as
    ``decoding`` says, if it is for their size, and else in colour by the default of
    :class:`Decoding`.

    Raises:
        UsageError: no such name, a path that is missing or too much, or a size out of range.
        DataError: a file is missing or damaged, or the hub cannot be reached.
    """
    source = absolute(source)
    name, _, path = source.partition(":")
    if name == "digits":
        return load_digits()
    if name in HUB_SETS:
        hub_set, folder = HUB_SETS[name], Path(path) if path else None
        return load_hub_set(hub_set, source, folder, _for_size(hub_set.size, decoding))
    path, _, size = path.rpartition(_SIZE) if name == "folder" else (path, "", "")
    pixels = int(size) if size else _IMAGENET_SIZE
    return load_image_folder(source, Path(path), _for_size(pixels, decoding))


def _for_size(size: int, decoding: Decoding | None) -> Decoding:
    return decoding if decoding and decoding.size == size else Decoding.of(size)


def absolute(source: str) -> str:
    """Return ``source`` with its path absolute, so that it means the same in any working folder.

    Raises:
        UsageError: no such name, a path that is missing or too much, or a size out of range.
    """
    name, colon, path = source.partition(":")
    if not source:
        raise UsageError("the model does not say what it was trained on; pass --data")
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    if colon and not path:
        raise UsageError(f"'{source}' names no folder after the colon; drop it or give a path")
    if name == "digits" and path:
        raise UsageError(f"digits is embedded and takes no path, not '{path}'")
    if name in ("imagenet", "folder") and not path:
        raise UsageError(f"{name} needs a folder: {name}:PATH, with train/CLASS/ and val/CLASS/")
    size = ""
    if name == "folder":
        path, mark, text = path.rpartition(_SIZE)
        if not text.isdecimal() or int(text) not in _FOLDER_SIZES or not path:
            raise UsageError(f"'{source}' names no size in 8..512; write folder:PATH?size=64")
        size = mark + text
    return f"{name}:{Path(path).expanduser().resolve()}{size}" if path else name
