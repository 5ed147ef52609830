"""Class folders: ``train/CLASS/*`` and ``val/CLASS/*``, as ImageNet is unpacked.

Also as Tiny-ImageNet's archive has it: the validation images in one folder, and a text file
beside it whose lines say FILE, a tab, CLASS.
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from advmoe_deploy.data.layouts.listing import Listing, Wanted
from advmoe_deploy.data.layouts.tree import Tree, require_text
from advmoe_deploy.data.notices import say_once
from advmoe_deploy.decoding import IMAGE_SUFFIXES
from advmoe_deploy.errors import DataError, reason_of

_ANNOTATIONS = "_annotations.txt"


def class_folders(tree: Tree, wanted: Wanted) -> tuple[Listing, Listing] | None:
    """Return the training and test images below a folder, or ``None`` without class folders.

    The classes are the folders of the training split, in alphabetical order.

    Raises:
        DataError: the test split is missing, has other classes or does not tell them, or a class
            has no image.
    """
    train = next(iter(split_folders(tree, wanted.train)), "")
    names = tree.subfolders(train) if train else ()
    if not names:
        return None
    if len(names) < 2:
        raise DataError(f"{tree.root / train} holds 1 class folder, {names[0]}; give at least two")
    tests = split_folders(tree, wanted.test)
    if not tests and wanted.may_split:
        return None
    if not tests:
        raise DataError(
            f"{tree.root} holds a folder {train} and no folder {' or '.join(wanted.test)}; move "
            f"some images of each class to {wanted.test[0]}/CLASS/"
        )
    # Test images without labels may lie beside validation images that have them.
    labelled = [each for each in tests if _tells_classes(tree, each, names)]
    test = (labelled or tests)[0]
    if unread := labelled[1:]:
        say_once(f"{tree.root}: {test} is the test, and {some_of(unread)} beside it is not read")
    return by_folder(tree, train, names), _test_images(tree, test, names, train)


def images_of(files: Iterable[str]) -> list[str]:
    """Return those of ``files`` that are images by name."""
    return [file for file in files if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES]


def split_folders(tree: Tree, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are folders, each in its own spelling."""
    spelled = {folder.lower(): folder for folder in tree.subfolders()}
    return [spelled[name] for name in names if name in spelled]


def _tells_classes(tree: Tree, folder: str, names: Iterable[str]) -> bool:
    return bool({*tree.subfolders(folder)} & {*names} or _annotations(tree, folder))


def _annotations(tree: Tree, folder: str) -> list[str]:
    return [file for file in tree.files_in(folder) if file.endswith(_ANNOTATIONS)]


def _test_images(tree: Tree, folder: str, names: Sequence[str], train: str) -> Listing:
    if annotations := _annotations(tree, folder):
        return _by_annotation(tree, folder, annotations[0], names)
    found, images = tree.subfolders(folder), images_of(tree.below(folder))
    if images and found in ((), ("images",)):
        raise DataError(
            f"{tree.root / folder} holds {len(images):,} images such as {images[0]} and no class "
            f"folders; sort them into {folder}/CLASS/, or list them in {folder}/"
            f"{folder}{_ANNOTATIONS}, a line each: file name, tab, class"
        )
    if found != tuple(names):
        raise DataError(
            f"{tree.root / train} and {tree.root / folder} hold different classes: "
            f"{_difference(names, found)}; name them alike"
        )
    return by_folder(tree, folder, names)


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    sides = ((ours, theirs, "the first"), (theirs, ours, "the second"))
    lone = [(sorted(set(a) - set(b)), side) for a, b, side in sides]
    return ", ".join(f"only {side} has {some_of(names)}" for names, side in lone if names)


def some_of(names: Sequence[str]) -> str:
    """Return the first few of ``names``, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def by_folder(
    tree: Tree, folder: str, names: Sequence[str], *, beside: Sequence[str] = ()
) -> Listing:
    """Return the images of the class folders ``names`` in ``folder``; the root's are empty.

    Of files in the root's folders ``beside`` nothing is said.

    Raises:
        DataError: one of them holds no image, or its name is no UTF-8.
    """
    top = f"{folder}/" if folder else ""
    files: list[str] = []
    labels: list[int] = []
    by_class: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        require_text(tree.root / folder / name)
    below_it = tree.below(folder) if folder else tree.files
    there = [file for file in below_it if file.split("/")[0] not in beside]
    images = images_of(there)
    below = f" below {folder}" if folder else ""
    if others := sorted({*there} - {*images}):
        say_once(
            f"{tree.root}: {len(others):,} files{below} are no images by their suffix and not "
            f"read, such as {others[0]}"
        )
    loose: list[str] = []
    for file in images:
        name = file.removeprefix(top).split("/")[0]
        by_class.get(name, loose).append(file)
    if loose:
        say_once(
            f"{tree.root}: {len(loose):,} images{below} lie in no class folder and are not read, "
            f"such as {loose[0]}"
        )
    for label, (name, found) in enumerate(by_class.items()):
        if not found:
            raise DataError(
                f"{tree.root / folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)}); put "
                "some there, or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return _of_files(tree, files, labels, names)


def _by_annotation(tree: Tree, folder: str, annotations: str, names: Sequence[str]) -> Listing:
    """Return the images that the lines of a text file name, with the class that they say."""
    classes = {name: label for label, name in enumerate(names)}
    images = images_of(tree.below(folder))
    by_name = {PurePosixPath(file).name: file for file in images}
    files: list[str] = []
    labels: list[int] = []
    text = (tree.root / annotations).read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        image, *rest = line.split("\t")
        if not line.strip():
            continue
        if image not in by_name or not rest or rest[0] not in classes:
            raise DataError(
                f"{tree.root / annotations}, line {number}: '{line[:60]}' names no image there, or "
                "no class that is trained on; write file name, tab, class"
            )
        files.append(by_name[image])
        labels.append(classes[rest[0]])
    if not len(set(files)) == len(files) == len(images):
        raise DataError(
            f"{tree.root / annotations} names {len(files):,} images, and {len(images):,} are "
            "there; give each image one line, and a name of its own"
        )
    return _of_files(tree, files, labels, names)


def _of_files(
    tree: Tree, files: Sequence[str], labels: Sequence[int], names: Sequence[str]
) -> Listing:
    def encoded(row: int) -> bytes:
        file = tree.root / files[row]
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {reason_of(error, 'read')}") from None

    return Listing(
        labels_N=np.asarray(labels, dtype=np.int64),
        class_names=tuple(names),
        encoded=encoded,
        where=lambda row: str(tree.root / files[row]),
        stamp=lambda row: f"{tree.root / files[row]} {(tree.root / files[row]).stat().st_mtime_ns}",
    )
