"""Exceptions that this package raises on purpose, and the exit code of each.

    AdvMoEError                    1  the check that was made failed
    ├── CheckFailedError           1  parity or robustness did not survive; a run diverged
    │   └── DivergedError          1  training met a value that is not finite
    ├── UsageError                 2  a flag, a name or a specification makes no sense
    ├── InputError                 3  a file or a folder is missing, damaged or of the wrong kind
    │   ├── BundleError            3
    │   ├── CheckpointError        3
    │   └── DataError              3
    ├── BackendUnavailableError    4  an optional dependency or a device is missing
    ├── MachineError               5  disk full, out of memory, no permission
    └── UndecidedError             6  a check ran, and the images are too few for a yes or a no

Anything else that ends a command is a fault of the program, with the exit code INTERNAL.
A message is one line: the value, the limit, and the way out.
"""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

Doing = Literal["read", "write"]

_DISTRIBUTION = "advmoe-deploy"
INTERNAL = 70  # EX_SOFTWARE of sysexits.h: never the answer of a check


class AdvMoEError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class CheckFailedError(AdvMoEError):
    """A check ran and its answer is no."""


class DivergedError(CheckFailedError):
    """Training met a loss, a gradient or a weight that is not finite."""


class UndecidedError(AdvMoEError):
    """A check ran, and its answer is neither yes nor no."""

    exit_code = 6


class UsageError(AdvMoEError):
    """The request itself makes no sense."""

    exit_code = 2


class InputError(AdvMoEError):
    """A file or a folder cannot be used."""

    exit_code = 3


class BundleError(InputError):
    """A bundle is missing, damaged, tampered with or of another version."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or of another version."""


class DataError(InputError):
    """A data set or an image is missing or unreadable."""


class BackendUnavailableError(AdvMoEError):
    """An optional dependency or a device is missing; the message names what brings it."""

    exit_code = 4


class MachineError(AdvMoEError):
    """The machine, not the request, is at fault: disk full, out of memory, no permission."""

    exit_code = 5


def install_line(*extras: str) -> str:
    """Return the command that adds one of ``extras`` to the environment this package is in.

    pip finds the package installed, from a clone or a wheel alike, and fetches only what the extra
    asks for: no index has to know the package. Of a checkout that is not installed the folder is
    named, for by its name pip would ask an index, where that is not ours.
    """
    name = _DISTRIBUTION if _is_installed() else Path(__file__).parents[1]
    return "pip install " + " or ".join(f"'{name}[{extra}]'" for extra in extras)


def _is_installed() -> bool:
    from importlib.metadata import PackageNotFoundError, distribution  # not quick to load

    try:
        distribution(_DISTRIBUTION)
    except PackageNotFoundError:
        return False
    return True


def missing_extra(package: str, *extras: str) -> BackendUnavailableError:
    """Return the error that says which extra brings ``package``, or each of which."""
    return BackendUnavailableError(f"{package} is not installed; run: {install_line(*extras)}")


# As alike as two names must be for one to be offered for the other, and how much less alike than
# the likest others that are offered may be.
_ALIKE, _BEHIND = 0.6, 0.1
_OFFERED = 3
# As alike as a path that is not there must be to the name of a folder or a model: many of them
# end alike.
LIKELY = 0.75


def unknown_name(kind: str, name: str, known: Iterable[str], *, listed_by: str = "") -> UsageError:
    """Return a :class:`UsageError` that offers the nearest known names.

    Where none is near it names them all, or the command ``listed_by`` that does.
    """
    choices = sorted(known)
    if near := nearest(name, choices):
        return UsageError(f"unknown {kind} '{name}'; did you mean {', '.join(near)}?")
    way_out = f"'{listed_by}' names them" if listed_by else f"choose from {', '.join(choices)}"
    return UsageError(f"unknown {kind} '{name}'; {way_out}")


def nearest(name: str, known: Iterable[str], *, cutoff: float = _ALIKE) -> list[str]:
    """Return those of ``known`` that ``name`` may be a slip of, the likest first."""
    alike = {each: _alike(name, each) for each in known}
    least = max(cutoff, max(alike.values(), default=0.0) - _BEHIND)
    near = sorted((each for each in alike if alike[each] >= least), key=lambda each: -alike[each])
    return near[:_OFFERED]


def _alike(name: str, known: str) -> float:
    """Return how alike both are, 1 at most; the last part of a dotted name may stand for it."""
    if known.startswith(name) and name:
        return 1.0
    spellings = {known, known.rpartition(".")[2]} if "." not in name else {known}
    return max(difflib.SequenceMatcher(None, name, each).ratio() for each in spellings)


OR_A_MODEL = "or a model that 'advmoe list models' names"


def missing_folder(path: Path, what: str, way_out: str) -> str:
    """Return the line that there is no ``what`` at ``path``: the like one beside it, and a way out.

    ``what`` is a noun, such as "run"; ``way_out`` says what else to do.
    """
    near: list[str] = []
    with suppress(OSError):
        beside = (each.name for each in path.parent.iterdir() if each.is_dir())
        near = nearest(path.name, beside, cutoff=LIKELY)
    offered = f"did you mean {path.parent / near[0]}? If not, " if near else ""
    return f"there is no {what} {path}; {offered}{way_out}"


_OUT_OF_MEMORY = "out of memory; lower the batch size"
# Of folders such as /proc, which are there.
_NO_PLACE = "nothing can be written there, though the folder is there; choose another target"
_NETWORK = "the file system of another machine does not answer; mount it again, or use a local copy"
# Where two texts stand, the first is for reading and the second for writing.
_TEXTS: dict[int, tuple[type[AdvMoEError], str] | tuple[type[AdvMoEError], str, str]] = {
    errno.ENOENT: (
        InputError,
        "no such file or folder; check the path",
        "its folder is not there; make it first, or choose another target",
    ),
    errno.EISDIR: (InputError, "it is a folder, where a file is expected; name a file"),
    errno.ENOTDIR: (
        InputError,
        "not a directory: a file stands where the path has a folder; check the path",
    ),
    errno.ENAMETOOLONG: (InputError, "the name is too long for the file system; shorten it"),
    errno.ELOOP: (InputError, "its links lead in a circle; name a file that is there"),
    errno.EINVAL: (InputError, "the file system does not accept this name or use; name another"),
    errno.EEXIST: (InputError, "something of that name is in the way; choose another target"),
    errno.ENOTEMPTY: (InputError, "the folder is not empty; choose another target"),
    errno.EACCES: (
        MachineError,
        "permission denied: you may not read it; change its permissions, or name a copy",
        "permission denied: you may not write there; choose a place you may write to",
    ),
    errno.EPERM: (
        MachineError,
        "operation not permitted: the system forbids reading it; name a copy",
        "operation not permitted: the system forbids writing there; choose a place you may "
        "write to",
    ),
    errno.EROFS: (MachineError, "the file system is read-only; choose another target"),
    errno.ENOSPC: (MachineError, "the disk is full; free some space or choose another target"),
    errno.EDQUOT: (
        MachineError,
        "the disk quota is used up; free some space or choose another target",
    ),
    errno.EFBIG: (
        MachineError,
        "the file size limit is reached; raise it (ulimit -f) or choose another target",
    ),
    errno.EIO: (
        MachineError,
        "the device failed while it was read (input/output error); use another copy",
        "the device failed while it was written (input/output error); choose another target",
    ),
    errno.EMFILE: (
        MachineError,
        "too many files are open in this process; raise the limit (ulimit -n)",
    ),
    errno.ENFILE: (MachineError, "too many files are open on this machine; end other programs"),
    errno.EBUSY: (MachineError, "another program uses it; wait for that one to end"),
    errno.ETXTBSY: (MachineError, "it is a program that runs; wait for it to end"),
    errno.ENXIO: (MachineError, "there is no such device; check the path"),
    errno.ENODEV: (MachineError, "there is no such device; check the path"),
    errno.ESTALE: (MachineError, _NETWORK),
    errno.ETIMEDOUT: (MachineError, _NETWORK),
    errno.ENOMEM: (MachineError, _OUT_OF_MEMORY),
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of an :class:`OSError` of the block that ``path`` was being read."""
    with _marked(path, "read"):
        yield


@contextmanager
def writing(path: Path | None) -> Iterator[None]:
    """Say of an :class:`OSError` of the block that ``path`` was being written.

    A file written under another name, to be renamed last, is called by the name that it will have.
    Without a path, all is written in memory.
    """
    with _marked(path, "write"):
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an :class:`OSError` of the block that does not say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def _marked(path: Path | None, doing: Doing) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = path and str(path)
        error.doing = doing  # type: ignore[attr-defined]
        raise


def file_error(error: OSError) -> AdvMoEError | None:
    """Return the error of ours that ``error`` amounts to: its file, what is wrong, the way out.

    ``None`` if this is not about a file as far as anyone can tell. An error without a number is a
    library's own, about what it was given.
    """
    if error.errno is None:
        return InputError(str(error))
    if error.errno not in _TEXTS and not error.filename:
        return None
    kind = _TEXTS[error.errno][0] if error.errno in _TEXTS else InputError
    where = f"{_name(error.filename)}: " if error.filename else ""
    return kind(f"{where}{reason_of(error)}")


def reason_of(error: OSError, doing: Doing | None = None) -> str:
    """Return what is wrong with the file of ``error``, and the way out, without its name."""
    if error.errno not in _TEXTS:
        return error.strerror or str(error)
    _, *texts = _TEXTS[error.errno]
    if (doing or _doing(error)) != "write":
        return texts[0]
    has_folder = isinstance(error.filename, str) and Path(error.filename).parent.is_dir()
    return _NO_PLACE if error.errno == errno.ENOENT and has_folder else texts[-1]


def printable(text: str) -> str:
    r"""Return ``text`` with every control character, but for line breaks, spelled as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


_MOST_FAULTS = 5


def one_line(error: ValidationError) -> str:
    """Return what ``error`` says, in one line that names each field, of many the first few."""
    parts = []
    for item in error.errors(include_url=False)[:_MOST_FAULTS]:
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field:.200}: {message}" if field else message)
    if error.error_count() > _MOST_FAULTS:
        parts.append(f"and {error.error_count() - _MOST_FAULTS:,} more")
    return printable("; ".join(parts))  # a stranger's file may have named the fields


def machine_error(error: BaseException) -> MachineError | None:
    """Return the :class:`MachineError` that ``error`` amounts to, or ``None`` if it is not one."""
    if isinstance(error, OSError):
        found = file_error(error)
        return found if isinstance(found, MachineError) else None
    # PyTorch has a class of its own on a GPU, and none on a CPU.
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return MachineError(_OUT_OF_MEMORY) if isinstance(error, MemoryError) or of_torch else None


def _doing(error: OSError) -> Doing:
    """Return what was being done to the file; where nobody said so, as far as the file tells."""
    doing: Doing | None = getattr(error, "doing", None)
    if doing:
        return doing
    if error.filename2 is not None:  # to rename or to link is to write
        return "write"
    if error.errno not in (errno.EACCES, errno.EPERM) or not isinstance(error.filename, str):
        return "read"
    # What can be read was not refused a reader; what is not there yet was refused its place.
    file = Path(error.filename)
    new = not os.path.lexists(file) and os.access(file.parent, os.X_OK)
    return "write" if new or os.access(file, os.R_OK) else "read"


def _name(filename: str | bytes | int) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else f"file {filename}"
