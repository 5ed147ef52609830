"""Publishing on the Hugging Face hub: one commit, and the metadata at the head of a card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from advmoe_deploy.bundle import MANIFEST
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import refuse_existing
from advmoe_deploy.hub.client import hub_client
from advmoe_deploy.hub.faults import SIGN_IN, Repository, explained
from advmoe_deploy.zoo.places import RUN_MARKER

README = "README.md"  # what the hub shows of a repository


def refuse_upload(target: Path, *, overwrite: bool) -> None:
    """Raise :class:`UsageError` if ``target`` is in the way, or is no upload and would be lost."""
    refuse_existing(target, overwrite=overwrite, marker=README)
    if target.exists() and not any((target / file).is_file() for file in (MANIFEST, RUN_MARKER)):
        raise UsageError(
            f"{target} exists and holds neither {MANIFEST} nor {RUN_MARKER}, so it is not "
            "replaced; choose another target"
        )


@dataclass(frozen=True)
class Figure:
    """One accuracy as the hub lists it: ``value`` in percent, of ``data``'s test images."""

    name: str
    value: float
    data: str
    data_id: str


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
    client = hub_client()
    if client.get_token() is None:
        raise UsageError(f"the hub wants to know who pushes to {repository.name}; {SIGN_IN}")
    api = client.HfApi(library_name="advmoe-deploy")
    with explained(repository):
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
    client = hub_client()
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


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _as_given(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content
