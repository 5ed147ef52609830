"""Class folders without a split: ``CLASS/*``, or ``train/CLASS/*`` alone, of which one is made.

Beside ``CLASS/*`` may be ``test/CLASS/*``, which is taken; other splits there are not read.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from advmoe_deploy.data.dataset import stratified_parts
from advmoe_deploy.data.layouts.class_folders import (
    by_folder,
    images_of,
    some_of,
    split_folders,
)
from advmoe_deploy.data.layouts.listing import Listing, Wanted
from advmoe_deploy.data.layouts.tree import Tree, parent_of
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.errors import DataError

# One image in so many is for the test.
_TESTED = 5
# One to test, one to hold out, and some to train on.
_LEAST = 5


def unsplit_class_folders(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return training and test images, a fifth of each class, or ``None`` without class folders.

    Raises:
        DataError: there is one class, or a class holds under five images.
    """
    train = next(iter(split_folders(tree, Wanted().train)), "")
    train = train if tree.subfolders(train) else ""
    if wanted.may_split and not train and (found := _beside_a_test(tree, wanted)):
        return found
    names = tree.subfolders(train)
    if not wanted.may_split or not names or (not train and _tells_splits(tree)):
        return None
    if len(names) < 2:
        raise DataError(_one_class(tree, train, names[0]))
    everything = by_folder(tree, train, names)
    for name, count in zip(names, np.bincount(everything.labels_N), strict=True):
        if count < _LEAST:
            raise DataError(
                f"{tree.root / train / name} holds {count} image{'s' if count > 1 else ''}; give "
                f"each class at least {_LEAST}, of which one is to test on and one to choose by"
            )
    test_rows, train_rows = stratified_parts(everything.labels_N, (len(everything) // _TESTED,))
    say_once(
        f"{tree.root} has no test images of its own: a fifth of each class, {len(test_rows):,} in "
        "all, is kept for the test, always the same"
    )
    test = everything.take(np.sort(test_rows), split_off=True)
    return (test if wanted.is_test_alone else everything.take(np.sort(train_rows))), test


def _beside_a_test(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return the classes in the root to train on and those in a split beside them to test on.

    Raises:
        DataError: what lies in a folder called like a split may be a class or not, or has others.
    """
    usual = {*Wanted().train, *Wanted().test}
    folders = tree.subfolders()
    splits = [name for name in folders if name.lower() in usual and images_of(tree.below(name))]
    names = [n for n in folders if n.lower() not in usual and images_of(tree.below(n))]
    if not splits or not names or _is_vehicle(tree, splits):
        return None
    sorted_by_class = [each for each in split_folders(tree, wanted.test) if tree.subfolders(each)]
    if not sorted_by_class:
        raise DataError(_class_or_split(tree, splits[0], names))
    # What is called test is it, where val lies beside it.
    test = min(sorted_by_class, key=lambda name: not name.lower().startswith("test"))
    if {*tree.subfolders(test)} != {*names}:
        raise DataError(
            f"{tree.root} holds the classes {some_of(names)}, and {test} beside them holds "
            f"{some_of(tree.subfolders(test))}; name them alike, or move {test} elsewhere"
        )
    if unread := [name for name in splits if name != test]:
        say_once(f"{tree.root}: {test} is the test, and {some_of(unread)} beside it is not read")
    return by_folder(tree, "", names, beside=splits), by_folder(tree, test, names)


def _class_or_split(tree: Tree, split: str, names: Sequence[str]) -> str:
    return (
        f"{tree.root} holds the classes {some_of(names)} and a folder {split} with images in it, "
        f"which may be a class or not; rename it if it is one, else sort its images into "
        f"{split}/CLASS/ or move it elsewhere"
    )


def _tells_splits(tree: Tree) -> bool:
    """Return whether a folder at any depth is called like a split that is no class."""
    usual = Wanted()
    here = [name for name in tree.subfolders() if name.lower() in (*usual.train, *usual.test)]
    deep = {PurePosixPath(folder).name.lower() for folder in tree.folders if parent_of(folder)}
    return bool(deep & {*usual.train}) or (bool(here) and not _is_vehicle(tree, here))


def _is_vehicle(tree: Tree, splits: Sequence[str]) -> bool:
    """Return whether the one folder called like a split is a class, such as car, plane, train.

    Images right in ``test`` are more likely without labels than of a class.
    """
    name = splits[0]
    is_class = len(splits) == 1 and name.lower() in Wanted().train and not tree.subfolders(name)
    return is_class and len(tree.subfolders()) > 2


def _one_class(tree: Tree, train: str, name: str) -> str:
    folder = f"{train}/{name}" if train else name
    inner = [one for one in tree.subfolders(folder) if images_of(tree.below(f"{folder}/{one}"))]
    told = f"{tree.root / train} holds 1 class folder, {name}"
    if len(inner) > 1:
        return f"{told}; name {tree.root / folder}, which holds {', '.join(inner[:3])}"
    return f"{told}; give at least two"
