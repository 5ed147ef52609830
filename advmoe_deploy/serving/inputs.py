"""What a batch job reads: a folder, a pattern, one image, or a text file that lists images."""

import glob
from pathlib import Path

from advmoe_deploy.decoding import SUFFIXES
from advmoe_deploy.errors import DataError, reading


def list_inputs(source: str) -> tuple[str, ...]:
    """Return the paths that ``source`` stands for, sorted.

    A folder gives every image below it, by suffix, hidden files aside. A ``.txt`` file gives one
    path per line, relative to the file itself, whether or not the path exists: what cannot be read
    becomes a row that says so. Anything else that exists is one image; the rest is a pattern, in
    which ``**`` crosses folders.

    Raises:
        DataError: nothing is there.
    """
    path = Path(source)
    if path.is_dir():
        found = [str(file) for file in path.rglob("*") if _is_image(file, path)]
        return _some(found, f"{source} holds no {', '.join(sorted(SUFFIXES))} file")
    if path.is_file() and path.suffix.lower() == ".txt":
        return _some(_listed(path), f"{source} lists no path")
    if path.exists():
        return (source,)
    matches = [name for name in glob.glob(source, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    return _some(matches, f"{source}: no such file or folder, and no file matches it as a pattern")


def _is_image(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _listed(path: Path) -> list[str]:
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; list one image path per line") from None
    lines = [line.strip() for line in text.splitlines()]
    return [str(path.parent / line) for line in lines if line]


def _some(paths: list[str], complaint: str) -> tuple[str, ...]:
    if not paths:
        raise DataError(f"{complaint}; name a folder, a pattern, an image or a .txt list")
    return tuple(sorted(paths))
