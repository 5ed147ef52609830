"""Stored model: the torch model of a run, a checkpoint or a bundle's reference weights."""

from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.bundle import MANIFEST, REFERENCE, Bundle, open_bundle
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import BundleError, UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint, model_from_weights
from advmoe_deploy.reports.checkpoint import checkpoint_folder
from advmoe_deploy.settings import epsilon_of
from advmoe_deploy.specs import Fingerprint, ThreatModel


@dataclass(frozen=True)
class StoredModel:
    """A model in eval mode with what was stored beside it.

    ``data`` is the source it was trained on, empty if unknown, and ``fingerprint`` its content;
    ``recipe`` is the recipe's name.
    ``sealed`` says that it comes from a bundle, to which nothing may be added.
    """

    path: Path
    model: Classifier
    decoding: Decoding
    threat: ThreatModel | None
    class_names: tuple[str, ...]
    data: str
    recipe: str
    sealed: bool
    fingerprint: Fingerprint | None = None

    def threat_model(self, epsilon: float | None) -> ThreatModel:
        """Return the l-inf ball of radius ``epsilon``, by default the one it was trained for."""
        return threat_or(epsilon, self.threat, self.path)


def open_stored(path: Path) -> StoredModel:
    """Return the model at ``path``: a run, one of its checkpoints, or a bundle.

    Raises:
        InputError: ``path`` is none of them, or a file of it is missing or damaged.
    """
    if (path / MANIFEST).is_file():
        return _from_bundle(open_bundle(path))
    return _from_checkpoint(path, checkpoint_folder(path))


def reference_model(bundle: Bundle) -> Classifier:
    """Return the torch model of ``bundle``, rebuilt from its own reference weights.

    Raises:
        BundleError: it was exported without them.
    """
    if not bundle.has(REFERENCE):
        raise BundleError(
            f"{bundle.path} was exported without its reference weights, which the attacks need; "
            "export it again without --no-reference"
        )
    content = bundle.read(REFERENCE)
    return model_from_weights(bundle.manifest.model, content, bundle.file(REFERENCE))


def threat_or(epsilon: float | None, own: ThreatModel | None, where: Path) -> ThreatModel:
    """Return the threat model of radius ``epsilon``, or, without one, ``own``.

    Raises:
        UsageError: ``epsilon`` makes no sense, or there is neither.
    """
    if epsilon is not None:
        return ThreatModel(epsilon=epsilon_of(str(epsilon)))
    if own is None:
        raise UsageError(f"{where} names no threat model; pass --epsilon, such as 8/255")
    return own


def _from_bundle(bundle: Bundle) -> StoredModel:
    manifest = bundle.manifest
    return StoredModel(
        path=bundle.path,
        model=reference_model(bundle),
        decoding=manifest.decoding,
        threat=manifest.threat,
        class_names=manifest.class_names,
        data=manifest.data,
        recipe=str((manifest.training.get("recipe") or {}).get("name", "")),
        sealed=True,
        fingerprint=manifest.fingerprint,
    )


def _from_checkpoint(path: Path, folder: Path) -> StoredModel:
    checkpoint, model = load_checkpoint(folder)
    return StoredModel(
        path=path,
        model=model,
        decoding=checkpoint.decoding,
        threat=checkpoint.threat,
        class_names=checkpoint.class_names,
        data=checkpoint.data,
        recipe=str(checkpoint.recipe.get("name", "")),
        sealed=False,
        fingerprint=checkpoint.fingerprint,
    )
