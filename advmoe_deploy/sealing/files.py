"""Files of a sealed folder: named plainly, alone there, and read once."""

import errno
import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from advmoe_deploy.errors import BundleError, reading

# What a process that was killed while it replaced one of them leaves behind; never read.
_HALF_WRITTEN = re.compile(
    r"\.(MODEL_CARD\.md|manifest\.json|manifest\.sha256|manifest\.sig)\.partial-[\w.-]+"
)


_LONGEST = 200  # of a name with its folders
_LONGEST_PART = 255  # bytes that file systems take
# What opening says of a link, a folder or a socket in the place of a file, or if there is nothing.
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.ENXIO}


@dataclass(frozen=True)
class Sealed:
    """A file of a sealed folder that is read, and its hash compared, when it is loaded."""

    path: Path
    reader: Callable[[], bytes]

    def read(self) -> bytes:
        """Return its content, which is what was hashed.

        Raises:
            BundleError: it is not what was sealed.
        """
        return self.reader()

    def __str__(self) -> str:
        return str(self.path)


def is_plain(name: str) -> bool:
    """Return whether ``name`` can only be that of a file below the folder it is joined to."""
    return (
        0 < len(name) <= _LONGEST
        and name.isprintable()  # so neither NUL nor a lone surrogate
        and "\\" not in name
        and not PurePosixPath(name).is_absolute()
        and not {"", ".", ".."} & set(name.split("/"))
        and all(len(os.fsencode(part)) <= _LONGEST_PART for part in name.split("/"))
    )


def require_alone(folder: Path, listed: Collection[str]) -> None:
    """Refuse what lies below ``folder`` and is not ``listed``: a file, a link, a folder of none.

    Raises:
        BundleError: there is such a thing; the message names the first that was found.
    """
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    waiting = [folder]
    while waiting:
        with reading(folder), os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_symlink():
                    raise BundleError(
                        f"{folder}: {name!r} is a link and may point outside the bundle; put what "
                        "it leads to there, or do not use this bundle"
                    )
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder and name in folders:
                    waiting.append(Path(entry.path))
                elif is_folder or (name not in listed and not _HALF_WRITTEN.fullmatch(name)):
                    raise BundleError(
                        f"{folder}: {name!r} is not listed in its manifest, so no hash covers it; "
                        "move it out of the folder, or do not use this bundle"
                    )


def read_regular(file: Path, size: int) -> bytes | None:
    """Return the content of a regular file of ``size`` bytes; ``None`` if it is anything else."""
    content = read_at_most(file, size)
    return content if content is not None and len(content) == size else None


def read_at_most(file: Path, most: int) -> bytes | None:
    """Return the content of a regular file of ``most`` bytes or fewer, ``None`` of anything else.

    A link is not followed, and a pipe that nobody writes to is not waited for.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        opened = open(file, "rb", opener=lambda path, _: os.open(path, flags))  # noqa: SIM115
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return None
    with opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            return None
        content = opened.read(most + 1)
    return content if len(content) <= most else None
