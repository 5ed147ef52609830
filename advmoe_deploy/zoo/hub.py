"""Hugging Face hub: the one module that knows its client.

Where no client is installed, the extra ``hub`` brings it. The client finds its token by itself; it
is neither read nor shown here.
"""

import errno
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from advmoe_deploy.errors import (
    AdvMoEError,
    InputError,
    MachineError,
    UsageError,
    file_error,
    missing_extra,
)
from advmoe_deploy.process import without_telemetry

README = "README.md"  # what the hub shows of a repository
_SIGN_IN = "sign in with 'hf auth login', or set HF_TOKEN"
# Modules of the exceptions that say a connection failed, by release of the client.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Repository:
    """A repository ``USER/NAME``; without a revision, its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.name}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Figure:
    """One accuracy as the hub lists it: ``value`` in percent, of ``data``'s test images."""

    name: str
    value: float
    data: str
    data_id: str


def snapshot(repository: Repository, patterns: Sequence[str]) -> Path:
    """Return the folder, in the client's own cache, with those files of a revision that match.

    Its name is the commit. Without a network it is what was downloaded before, if that is whole.

    Raises:
        InputError: the repository or the revision does not exist, or may not be read.
        MachineError: it cannot be reached and is not in the cache, or the disk is full.
        BackendUnavailableError: the client is not installed.
    """
    client = _client()
    with _explained(repository):
        folder = client.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=list(patterns)
        )
    return Path(folder)


def publish(
    repository: Repository,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    stale: Sequence[str],
) -> str:
    """Make the repository if need be, put ``files`` there in one commit, and return its address.

    What matches a pattern of ``stale`` and is not among ``files`` is deleted in the same commit.

    Raises:
        UsageError: there is no token, or the repository is public and was to be private.
        InputError: the token may not write there.
        MachineError: the hub cannot be reached.
        BackendUnavailableError: the client is not installed.
    """
    client = _client()
    if client.get_token() is None:
        raise UsageError(f"the hub wants to know who pushes to {repository.name}; {_SIGN_IN}")
    api = client.HfApi(library_name="advmoe-deploy")
    with _explained(repository):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository.name).private:
            raise UsageError(
                f"{repository.name} exists and is public; leave --private out or name another"
            )
        gone = [
            client.CommitOperationDelete(path_in_repo=name)
            for name in _matching(api.list_repo_files(repository.name), stale)
            if name not in files
        ]
        added = [
            client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=_as_given(content))
            for name, content in files.items()
        ]
        message = "Upload by advmoe-deploy"
        commit = api.create_commit(repository.name, [*gone, *added], commit_message=message)
    return str(commit.commit_url)


def front_matter(
    name: str, figures: Sequence[Figure], *, licence: str, data_ids: Sequence[str], tags: list[str]
) -> str:
    """Return the YAML at the head of a card, between its lines of dashes.

    Figures become ``model-index`` in the hub's own form.

    Source: huggingface_hub's ModelCardData and EvalResult; the metadata of
    https://huggingface.co/docs/hub/model-cards.
    """
    client = _client()
    results = [
        client.EvalResult(
            task_type="image-classification",
            dataset_type=figure.data_id,
            dataset_name=figure.data,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=figure.name,
            metric_value=figure.value,
        )
        for figure in figures
    ]
    card = client.ModelCardData(
        license=licence or None,
        library_name="advmoe-deploy",
        pipeline_tag="image-classification",
        tags=tags,
        datasets=list(data_ids) or None,
        model_name=name,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _client() -> Any:
    try:
        with without_telemetry():
            import huggingface_hub
            import huggingface_hub.utils
    except ImportError:
        raise missing_extra("huggingface_hub", "hub") from None
    # Its retries and notices go to stderr, where an error is one line.
    tools: Any = huggingface_hub.utils
    tools.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        tools.disable_progress_bars()
    return huggingface_hub


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _as_given(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Say in one line of ours what the client's errors are about."""
    try:
        with warnings.catch_warnings():  # of a disk that is too small, before the error says so
            warnings.simplefilter("ignore")
            yield
    except AdvMoEError:
        raise
    except Exception as error:
        explained = _explanation(error, repository)
        if explained is None:
            raise
        raise explained from error


def _explanation(error: Exception, repository: Repository) -> AdvMoEError | None:
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):
        return _explanation(cause, repository)  # of one file among several
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(f"{repository}: HF_HUB_OFFLINE forbids the network; unset it")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{repository} is gated: accept its terms on its page, then {_SIGN_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{repository} does not exist, or is private; check the name, or {_SIGN_IN}"
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
            f"{repository}: the hub refuses this token or its rights (HTTP {status}); {_SIGN_IN}"
        )
    said = " ".join(str(error.server_message or "").split())
    return MachineError(
        f"{repository}: the hub answers HTTP {status}{f' ({said})' if said else ''}; "
        "try again later"
    )


def _of_the_disk(error: OSError, repository: Repository) -> AdvMoEError | None:
    from huggingface_hub import constants

    if error.errno in _FULL:
        return MachineError(
            f"{constants.HF_HUB_CACHE}: the disk of the hub's cache is full; free some space, or "
            "set HF_HOME to a folder on another disk"
        )
    if error.errno is None:  # the client's own: the size is not the one that was announced
        text = " ".join(str(error).split())
        return MachineError(f"{repository} came only in part ({text}); try again")
    return file_error(error)
