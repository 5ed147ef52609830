"""Search for the layout of a folder, with advice where it has none that can be read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from advmoe_deploy.data.layouts.batches import cifar_batches
from advmoe_deploy.data.layouts.class_folders import class_folders, images_of
from advmoe_deploy.data.layouts.listing import Listing, Wanted, in_order_of
from advmoe_deploy.data.layouts.shards import webdataset_shards
from advmoe_deploy.data.layouts.tables import image_tables
from advmoe_deploy.data.layouts.tree import Tree, parent_of, require_text, tree_of
from advmoe_deploy.data.layouts.unsplit import unsplit_class_folders
from advmoe_deploy.errors import DataError, missing_folder

LayoutReader = Callable[[Tree, Wanted], tuple[Listing, Listing] | None]
TABLES_FIRST: tuple[LayoutReader, ...] = (
    image_tables,
    cifar_batches,
    webdataset_shards,
    class_folders,
)
FOLDERS_FIRST: tuple[LayoutReader, ...] = (
    class_folders,
    image_tables,
    webdataset_shards,
    cifar_batches,
    unsplit_class_folders,
)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


def listings_of(
    root: Path, wanted: Wanted, layouts: Sequence[LayoutReader], way_out: str
) -> tuple[Listing, Listing]:
    """Return the training and test images below ``root``, by the first layout that is there.

    Labels of both are as the training images number the classes.

    Raises:
        DataError: there is none that can be read; the message says what was found, and ends with
            ``way_out`` where nothing better is known. Or the test images have other classes.
    """
    require_folder(root, f"name where the data lie: {way_out}")
    tree = tree_of(root)
    for layout in layouts:
        if found := layout(tree, wanted):
            train, test = found
            return train, in_order_of(train, test)
    raise DataError(_hint(tree, wanted, way_out))


def require_folder(root: Path, way_out: str) -> None:
    """Refuse what is no folder, with ``way_out`` where nothing better is known.

    Raises:
        DataError: ``root`` is a file, or not there, or its name is no UTF-8.
    """
    if root.is_file():
        raise DataError(f"{root} is a file; {_unpack(root.name) or way_out}")
    if not root.is_dir():
        raise DataError(missing_folder(root, "folder", way_out))
    require_text(root)


def _hint(tree: Tree, wanted: Wanted, way_out: str) -> str:
    root, train, test = tree.root, wanted.train[0], wanted.test[0]
    for file in tree.files:
        if advice := _unpack(file):
            return f"{root} holds the archive {file}; {advice}"
    for folder in tree.folders:
        if folder.rpartition("/")[2].lower() in wanted.train and tree.subfolders(folder):
            return f"{root} holds {folder}/CLASS/; name {root / parent_of(folder)} instead"
    classes = [name for name in tree.subfolders() if images_of(tree.below(name))]
    if classes:
        return (
            f"{root} holds no folder {train} and no folder {test}, but images below "
            f"{', '.join(classes[:3])}{'...' if len(classes) > 3 else ''}; move them to "
            f"{train}/CLASS/, and some of each class to {test}/CLASS/"
        )
    if loose := images_of(tree.files_in()):
        return (
            f"{root} holds {len(loose):,} images and no class folders; put those of each class "
            f"into {root}/CLASS/"
        )
    return (
        f"{root} holds no {train}-*.parquet, no {train}/CLASS/, no CIFAR batches and no "
        f"{train}-*.tar, but {tree.what_is_there()}; {way_out}"
    )


def _unpack(name: str) -> str:
    """Return what to do with a file of this name if it is an archive."""
    if not name.lower().endswith(_ARCHIVES):
        return ""
    tool = "unzip" if name.lower().endswith(".zip") else "tar -xf"
    if name.lower().endswith((".7z", ".rar")):
        tool = "unpack"
    return f"unpack it ({tool} {name.rpartition('/')[2]}) and name the folder that comes out"
