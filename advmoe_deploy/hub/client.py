"""Client of the Hugging Face hub, made quiet, and what is downloaded by it.

Where it is not installed, the extra ``hub`` brings it. It finds its token by itself, which is
neither read nor shown here.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advmoe_deploy.errors import missing_extra
from advmoe_deploy.hub.faults import Repository, explained
from advmoe_deploy.process import without_telemetry


def snapshot(repository: Repository, patterns: Sequence[str]) -> Path:
    """Return the folder, in the client's own cache, with those files of a revision that match.

    Its name is the commit. Without a network it is what was downloaded before, if that is whole.

    Raises:
        InputError: the repository or the revision does not exist, or may not be read.
        MachineError: it cannot be reached and is not in the cache, or the disk is full.
        BackendUnavailableError: the client is not installed.
    """
    client = hub_client()
    with explained(repository):
        folder = client.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=list(patterns),
        )
    return Path(folder)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one process at a time into the block, by the kind of lock that the client itself uses.

    The folder of the file ``lock`` is made if need be.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with hub_client().utils.WeakFileLock(lock):
        yield


def hub_client() -> Any:
    """Return the client, quiet.

    Raises:
        BackendUnavailableError: it is not installed.
    """
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
