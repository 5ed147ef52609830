"""Every error this package raises on purpose, and the exit code each one ends a command with.

    AdvMoEError                    1  the check that was made failed
    ├── CheckFailedError           1  parity or robustness did not survive; a run diverged
    │   └── DivergedError          1  training met a value that is not finite
    ├── UsageError                 2  a flag, a name or a specification makes no sense
    ├── InputError                 3  a file or a folder is missing, damaged or of the wrong kind
    │   ├── BundleError            3
    │   ├── CheckpointError        3
    │   └── DataError              3
    ├── BackendUnavailableError    4  an optional dependency or a device is missing
    └── MachineError               5  disk full, out of memory, no permission

Anything else that ends a command is a fault of the program, with the exit code INTERNAL.
A message is one line: the value, the limit, and the way out.
"""

import difflib
from collections.abc import Iterable

INTERNAL = 70  # EX_SOFTWARE of sysexits.h: never the answer of a check


class AdvMoEError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class CheckFailedError(AdvMoEError):
    """A check ran and its answer is no."""


class DivergedError(CheckFailedError):
    """Training met a loss, a gradient or a weight that is not finite."""


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


def missing_extra(package: str, extra: str) -> BackendUnavailableError:
    """Return the error that says which extra brings ``package``."""
    return BackendUnavailableError(
        f"{package} is not installed; run: pip install 'advmoe-deploy[{extra}]'"
    )


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return a :class:`UsageError` that offers the nearest known names."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    if near:
        return UsageError(f"unknown {kind} '{name}'; did you mean {', '.join(near)}?")
    return UsageError(f"unknown {kind} '{name}'; choose from {', '.join(choices)}")
