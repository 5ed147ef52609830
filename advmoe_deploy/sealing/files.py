"""Files of a sealed folder: named plainly, alone there, and read once."""

import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from advmoe_deploy.errors import BundleError, reading

# What a process that was killed while it replaced one of them leaves behind; never read.
_HALF_WRITTEN = re.compile(r"\.(MODEL_CARD\.md|manifest\.json|manifest\.sha256)\.partial-[\w.-]+")


_LONGEST = 200  # of a name with its folders; file systems take 255 bytes a part


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
    )


def require_alone(folder: Path, listed: Collection[str]) -> None:
    """Refuse a file or a link below ``folder`` that is not ``listed``.

    Raises:
        BundleError: there is one; the message names the first that was found.
    """

    def fail(error: OSError) -> None:
        raise error

    with reading(folder):
        for where, folders, files in os.walk(folder, onerror=fail):
            links = [name for name in folders if Path(where, name).is_symlink()]
            for name in sorted([*files, *links]):
                found = Path(where, name).relative_to(folder).as_posix()
                if Path(where, name).is_symlink():
                    raise BundleError(
                        f"{folder}: {found!r} is a link and may point outside the bundle; put what "
                        "it leads to there, or do not use this bundle"
                    )
                if found not in listed and not _HALF_WRITTEN.fullmatch(found):
                    raise BundleError(
                        f"{folder}: {found!r} is not listed in its manifest, so no hash covers it; "
                        "move it out of the folder, or do not use this bundle"
                    )


def read_regular(file: Path, size: int) -> bytes | None:
    """Return the content of a regular file of ``size`` bytes; ``None`` if it is anything else.

    A link is not followed, and a pipe that nobody writes to is not waited for.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        opened = open(file, "rb", opener=lambda path, _: os.open(path, flags))  # noqa: SIM115
    except PermissionError:
        raise
    except OSError:  # a link, a folder, a socket, or gone
        return None
    with opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            return None
        content = opened.read(size)
    return content if len(content) == size else None
