"""Uploads of ``advmoe push``: files of a run's model or of a bundle, and a README.

The README is the model card, headed by metadata in the hub's own form: what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.bundle import (
    CARD,
    GOLDEN,
    MANIFEST,
    MANIFEST_HASH,
    MODEL,
    REFERENCE,
    SIGNATURE,
    Bundle,
    open_bundle,
)
from advmoe_deploy.data.hub import HUB_SETS
from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import staged_directory
from advmoe_deploy.hub.faults import Repository
from advmoe_deploy.models.checkpoint import WEIGHTS, load_checkpoint
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.zoo.card import run_card
from advmoe_deploy.zoo.evaluation import read_evaluation
from advmoe_deploy.zoo.pack import Packing, checkpoint_text, portable, record_of
from advmoe_deploy.zoo.places import RUN_MARKER
from advmoe_deploy.zoo.publish import README, Figure, front_matter, publish, refuse_upload
from advmoe_deploy.zoo.record import RECORD, Evaluation

# What an earlier push may have left in a repository.
_STALE = (
    *(MANIFEST, MANIFEST_HASH, SIGNATURE, RECORD, CARD, MODEL, REFERENCE, GOLDEN),
    *("model/*", "segments/*", "engines/*", "baselines/*"),
)


@dataclass(frozen=True)
class Upload:
    """Contents of a repository: by path in it, a file of this machine or its content."""

    kind: str
    files: Mapping[str, Path | bytes]

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.files.values()
        )


def upload_of(found: Path, name: str, how: Packing) -> Upload:
    """Return what is uploaded of the run or bundle ``found`` as the model ``name``.

    Raises:
        InputError: ``found`` is neither, or a file of it or of the results cannot be used.
        UsageError: results are of another model.
        BackendUnavailableError: the hub's client, which writes the metadata, is not installed.
    """
    if (found / MANIFEST).is_file():
        return _of_bundle(open_bundle(found), name, how)
    return _of_run(found, name, how)


def push(upload: Upload, repository: Repository, *, private: bool) -> str:
    """Upload in one commit and return its address.

    Raises:
        UsageError: there is no token, or the repository is public and was to be private.
        InputError: the token may not write there.
        MachineError: the hub cannot be reached.
    """
    return publish(repository, upload.files, private=private, stale=_STALE)


def write_upload(upload: Upload, target: Path, *, overwrite: bool) -> None:
    """Write to ``target`` what would be uploaded.

    Raises:
        UsageError: ``target`` is in the way.
    """
    refuse_upload(target, overwrite=overwrite)
    with staged_directory(target, overwrite=overwrite) as staged:
        for name, content in upload.files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            whole = content if isinstance(content, bytes) else content.read_bytes()
            (staged / name).write_bytes(whole)


def _of_run(run: Path, name: str, how: Packing) -> Upload:
    checkpoint, _ = load_checkpoint(run / "model")
    record = record_of(run, checkpoint, how)
    card = run_card(name, checkpoint, record)
    head = _head(name, checkpoint.model, record.data, record.evaluations, record.licence)
    return Upload(
        "run",
        {
            RUN_MARKER: checkpoint_text(portable(checkpoint)),
            f"model/{WEIGHTS}": run / "model" / WEIGHTS,
            RECORD: (record.model_dump_json(indent=2) + "\n").encode(),
            CARD: card.encode(),
            README: (head + card).encode(),
        },
    )


def _of_bundle(bundle: Bundle, name: str, how: Packing) -> Upload:
    manifest = bundle.manifest
    training = manifest.training
    recipe, data = training.get("recipe") or {}, str(training.get("data", ""))
    evaluations = [read_evaluation(file, recipe, data) for file in how.results]
    own = {"", training.get("weights_sha256")}
    for file, each in zip(how.results, evaluations, strict=True):
        if each.weights not in own:
            raise UsageError(
                f"{file} was measured on other weights; name results of this bundle's model"
            )
    head = _head(name, manifest.model, data.partition(":")[0], evaluations, how.licence)
    card = bundle.file(CARD).read_bytes() if bundle.has(CARD) else b""
    signature = [SIGNATURE] if (bundle.path / SIGNATURE).is_file() else []
    names = (MANIFEST, MANIFEST_HASH, *signature, *manifest.files)
    files = {each: bundle.path / each for each in names}
    return Upload("bundle", {**files, README: head.encode() + card})


def _head(
    name: str, spec: ModelSpec, data: str, evaluations: Sequence[Evaluation], licence: str
) -> str:
    figures = [figure for each in evaluations for figure in _figures(each)]
    tags = ["adversarial-robustness", "image-classification", spec.family, spec.backbone]
    tags += ["mixture-of-experts"] if spec.num_experts > 1 else []
    data_ids = [HUB_SETS[data].hub_name] if data in HUB_SETS else []
    return front_matter(name, figures, licence=licence, data_ids=data_ids, tags=tags)


def _figures(measured: Evaluation) -> list[Figure]:
    """Return the accuracies of one evaluation; the hub merges those of one data set."""
    data = measured.data
    data_id = HUB_SETS[data].hub_name if data in HUB_SETS else data
    radius = f"{measured.threat.norm}, epsilon {epsilon_text(measured.threat.epsilon)}"
    robust = f"robust accuracy ({radius}; {measured.attack_words}; n = {measured.robust.n})"
    clean = f"clean accuracy (n = {measured.clean.n})"
    return [
        Figure(clean, round(100 * measured.clean.value, 2), data, data_id),
        Figure(robust, round(100 * measured.robust.value, 2), data, data_id),
    ]
