"""Data sets by name."""

from pathlib import Path

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.digits import load_digits
from advmoe_deploy.data.folder import load_image_folder
from advmoe_deploy.data.hub import HUB_SETS, load_hub_set
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError, unknown_name

DATASETS = ("digits", *HUB_SETS, "imagenet", "folder")
_IMAGENET_SIZE = 224
_FOLDER_SIZES = range(8, 513)


def load_dataset(source: str, decoding: Decoding | None = None) -> Dataset:
    """Return the data set ``source`` names.

    ``digits`` is embedded. ``cifar10``, ``cifar100`` and ``tiny-imagenet`` come from the parquet
    files of ``NAME:PATH``, or from the hub. ``imagenet:PATH`` and ``folder:PATH?size=64`` read
    ``PATH/train/CLASS/*`` and ``PATH/val/CLASS/*``. Image files are read as ``decoding`` says, if
    it is for their size, and else in colour by the default of :class:`Decoding`.

    Raises:
        UsageError: no such name, a path that is missing or too much, or a size out of range.
        DataError: a file is missing or damaged, or the hub cannot be reached.
    """
    name, colon, path = source.partition(":")
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    if colon and not path:
        raise UsageError(f"'{source}' names no folder after the colon; drop it or give a path")
    if name == "digits":
        if path:
            raise UsageError(f"digits is embedded and takes no path, not '{path}'")
        return load_digits()
    if name in HUB_SETS:
        folder = Path(path).expanduser() if path else None
        hub_set = HUB_SETS[name]
        return load_hub_set(hub_set, source, folder, _for_size(hub_set.size, decoding))
    return _from_folder(source, name, path, decoding)


def _for_size(size: int, decoding: Decoding | None) -> Decoding:
    return decoding if decoding and decoding.size == size else Decoding.of(size)


def _from_folder(source: str, name: str, path: str, decoding: Decoding | None) -> Dataset:
    if not path:
        raise UsageError(f"{name} needs a folder: {name}:PATH, with train/CLASS/ and val/CLASS/")
    size = _IMAGENET_SIZE
    if name == "folder":
        path, _, text = path.partition("?size=")
        if not text.isdecimal() or int(text) not in _FOLDER_SIZES:
            raise UsageError(f"'{source}' names no size in 8..512; write folder:PATH?size=64")
        size = int(text)
    return load_image_folder(source, Path(path).expanduser(), _for_size(size, decoding))
