"""Faults of the hub, of the way there and of the client's cache, each as one line of ours."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from advmoe_deploy.errors import AdvMoEError, InputError, MachineError, UsageError, file_error

SIGN_IN = "sign in with 'hf auth login', or set HF_TOKEN"
# Modules of the exceptions that say a connection failed, by release of the client.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Repository:
    """A repository ``USER/NAME``, of a model or a data set; without a revision, its main branch."""

    name: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    def __str__(self) -> str:
        of_kind = "hub:" if self.kind == "model" else "the hub's data set "
        return f"{of_kind}{self.name}" + (f"@{self.revision}" if self.revision else "")


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Say in one line of ours what the client's errors are about."""
    try:
        with warnings.catch_warnings():  # of a disk that is too small, before the error says so
            warnings.simplefilter("ignore")
            yield
    except AdvMoEError:
        raise
    except Exception as error:
        ours = _explanation(error, repository)
        if ours is None:
            raise
        raise ours from error


def _explanation(error: Exception, repository: Repository) -> AdvMoEError | None:
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):
        return _explanation(cause, repository)  # of one file among several
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(f"{repository}: HF_HUB_OFFLINE forbids the network; unset it")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{repository} is gated: accept its terms on its page, then {SIGN_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{repository} does not exist, or is private; check the name, or {SIGN_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"{repository.name} has no revision '{repository.revision or 'main'}'; "
            "name a branch, a tag or a commit after @"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _out_of_reach(error, repository)
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repository)
    if type(error).__module__.partition(".")[0] in _TRANSPORTS:
        return MachineError(
            f"{repository}: the connection to the hub failed ({type(error).__name__}); "
            "check the network and try again"
        )
    if isinstance(error, OSError):
        return _of_the_disk(error, repository)
    if type(error) is RuntimeError:  # of Xet, the part of the client that moves large files
        text = " ".join(str(error).split())
        return MachineError(f"{repository}: the hub's client failed ({text}); try again")
    if isinstance(error, ValueError):
        return UsageError(f"{repository}: the hub's client refuses it: {error}")
    return None


def _out_of_reach(error: Exception, repository: Repository) -> AdvMoEError:
    """Return the error that neither the hub nor the cache has it."""
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        return _refusal(cause, repository)
    if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return MachineError(
            f"{repository} is not whole in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE "
            "forbids the network; unset it, or download it once where it is allowed"
        )
    return MachineError(
        f"{repository}: {constants.ENDPOINT} cannot be reached "
        f"({type(cause or error).__name__}), and the cache does not hold it whole; "
        "check the network"
    )


def _refusal(error: Any, repository: Repository) -> AdvMoEError:
    status = error.response.status_code
    if status in (401, 403):
        return InputError(
            f"{repository}: the hub refuses this token or its rights (HTTP {status}); {SIGN_IN}"
        )
    said = " ".join(str(error.server_message or "").split())
    return MachineError(
        f"{repository}: the hub answers HTTP {status}{f' ({said})' if said else ''}; "
        "try again later"
    )


def _of_the_disk(error: OSError, repository: Repository) -> AdvMoEError | None:
    from huggingface_hub import constants

    if error.errno in FULL:
        return MachineError(
            f"{constants.HF_HUB_CACHE}: the disk of the hub's cache is full; free some space, or "
            "set HF_HOME to a folder on another disk"
        )
    if error.errno is None:  # the client's own: the size is not the one that was announced
        text = " ".join(str(error).split())
        return MachineError(f"{repository} came only in part ({text}); try again")
    return file_error(error)
