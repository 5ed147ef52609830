"""Entries of ``advmoe list models``: what is known of each model at hand. Needs no torch."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe_deploy.bundle import MANIFEST, SCHEMA_VERSION, open_bundle
from advmoe_deploy.errors import AdvMoEError, BundleError, file_error
from advmoe_deploy.reports.checkpoint import read_weights
from advmoe_deploy.specs import Frozen, ModelSpec, ThreatModel
from advmoe_deploy.zoo.places import RUN_MARKER, Source, models
from advmoe_deploy.zoo.record import read_fields, read_record


class ListedModel(Frozen):
    """One model. What is not known is ``None``; accuracies are shares in [0, 1].

    ``macs`` are those executed for one image, ``bytes`` the size of the folder. ``measured_on``
    says which images the accuracies are of, ``attack`` what the robust one withstands. ``note``
    says what is wrong with it, if anything.
    """

    name: str
    source: Source
    path: str
    kind: str
    family: str | None = None
    backbone: str | None = None
    data: str | None = None
    epsilon: float | None = None
    macs: int | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    measured_on: str | None = None
    attack: str | None = None
    bytes: int
    note: str = ""


def listed_models() -> list[ListedModel]:
    """Return an entry for each model, the user's own first; a damaged one is listed as such."""
    return [_entry(name, source, folder) for name, source, folder in models()]


def _entry(name: str, source: Source, folder: Path) -> ListedModel:
    known = {"name": name, "source": source, "path": str(folder), "kind": "unknown", "bytes": 0}
    try:
        is_run = (folder / RUN_MARKER).is_file()
        known["kind"] = "run" if is_run else "bundle"
        known["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        known |= _of_run(folder) if is_run else _of_bundle(folder)
        return ListedModel.model_validate(known)
    except (AdvMoEError, OSError) as error:
        said = file_error(error) if isinstance(error, OSError) else error
        return ListedModel.model_validate({**known, "note": str(said or error)})
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        # What was read beyond these may be what is damaged.
        kept = {key: known[key] for key in ("name", "source", "path", "kind", "bytes")}
        note = f"damaged ({type(error).__name__})"
        return ListedModel.model_validate({**kept, "note": note})


def _of_run(folder: Path) -> dict[str, Any]:
    fields = read_fields(folder / RUN_MARKER)
    # Hashed: what was measured says nothing of other weights than these. 12 MB take 10 ms.
    read_weights((folder / RUN_MARKER).parent, fields["weights_sha256"])
    known = _described(fields["model"], fields["threat"], fields["provenance"])
    metrics = fields["metrics"]
    if "clean_accuracy" in metrics:
        known |= {
            "clean_accuracy": metrics["clean_accuracy"],
            "robust_accuracy": metrics.get("robust_accuracy"),
            "measured_on": "hold-out",
            "attack": _attack_in_training(fields["recipe"]),
        }
    record = read_record(folder)
    if record is None:
        return known
    known |= {"macs": record.macs.executed, "data": record.data or known["data"]}
    if record.evaluations:
        hardest = min(record.evaluations, key=lambda each: each.robust.value)
        known |= {
            "clean_accuracy": hardest.clean.value,
            "robust_accuracy": hardest.robust.value,
            "epsilon": hardest.threat.epsilon,
            "measured_on": f"{hardest.robust.n} test images",
            "attack": hardest.attack_words,
        }
    return known


def _of_bundle(folder: Path) -> dict[str, Any]:
    fields = read_fields(folder / MANIFEST)
    _require_whole(folder, fields)
    known = _described(fields["model"], fields["threat"], fields["training"])
    return known | {"macs": fields["macs"]["executed"]}


def _require_whole(bundle: Path, fields: dict[str, Any]) -> None:
    try:
        open_bundle(bundle)  # which hashes every file
    except BundleError as error:
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise
        raise BundleError(f"damaged: {error}") from None


def _attack_in_training(recipe: dict[str, Any]) -> str | None:
    """Return the attack that chose the epoch of a run; an imported one had none."""
    steps = recipe.get("holdout_attack_steps")
    return f"pgd-{steps} on the model, and on its routes where it has any" if steps else None


def _described(model: Any, threat: Any, training: dict[str, Any]) -> dict[str, Any]:
    spec = ModelSpec.model_validate(model)
    return {
        "family": spec.family,
        "backbone": spec.backbone,
        "data": str(training.get("data", "")).partition(":")[0] or None,
        "epsilon": ThreatModel.model_validate(threat).epsilon if threat else None,
    }
