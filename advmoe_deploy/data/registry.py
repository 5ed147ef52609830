"""Data sets by name."""

from pathlib import Path

from advmoe_deploy.data.cifar10 import load_cifar10
from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.digits import load_digits
from advmoe_deploy.errors import UsageError, unknown_name

DATASETS = ("digits", "cifar10")


def load_dataset(source: str) -> Dataset:
    """Return the data set ``source`` names: ``digits``, ``cifar10`` or ``cifar10:PATH``.

    Raises:
        UsageError: no such name, or ``digits`` with a path.
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
    return load_cifar10(source, Path(path).expanduser() if path else None)
