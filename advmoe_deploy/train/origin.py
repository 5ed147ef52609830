"""Origin of a run that begins with the weights of a trained model, read without PyTorch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe_deploy.bundle import MANIFEST, REFERENCE, open_bundle
from advmoe_deploy.errors import CheckpointError, InputError, UsageError, one_line, unknown_name
from advmoe_deploy.reports.checkpoint import CHECKPOINT, WEIGHTS, read_checkpoint
from advmoe_deploy.settings import dotted_keys
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.fields import Start

# Keys of the network that follow from the data, and not from where the weights come from.
_OF_DATA = ("model.num_classes",)


@dataclass(frozen=True)
class Origin:
    """A trained model as it was named, where it lies, its architecture and its classes."""

    source: str
    path: Path
    spec: ModelSpec
    class_names: tuple[str, ...]
    weights_sha256: str

    def start(self, class_names: Sequence[str]) -> Start:
        """Return what a run for these classes records of it."""
        return Start(
            source=self.source,
            path=str(self.path.resolve()),
            weights_sha256=self.weights_sha256,
            new_head=tuple(class_names) != self.class_names,
        )

    def require_agreement(self, given: Mapping[str, str]) -> None:
        """Refuse settings of the network that are not this one's.

        Raises:
            UsageError: one of them differs, or is unknown.
        """
        if given.get("shared_start", "0") not in ("0", "0.0"):
            raise UsageError(
                f"--from {self.source} brings its experts along, and shared_start="
                f"{given['shared_start']} begins with one; leave the setting out"
            )
        ours = {"model": self.spec.model_dump(mode="json")}
        known = dotted_keys(ours)
        for key, text in given.items():
            if not key.startswith("model.") or key in _OF_DATA:
                continue
            if key not in known:
                raise unknown_name("setting", key, known)
            own: Any = ours
            for part in key.split("."):
                own = own[part]
            if text not in (json.dumps(own), str(own)):
                raise UsageError(
                    f"--from {self.source} has {key}={json.dumps(own)}, not {text}: the network is "
                    "that of the weights; leave the setting out"
                )

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return ``config`` for this network: its experts and its router are there already.

        Raises:
            UsageError: the recipe is for another family, or its method does not train this one.
        """
        family = self.spec.family
        if config.model.family != family:
            raise UsageError(
                f"--from {self.source} is of family {family}, and {config.name} trains family "
                f"{config.model.family}; name a recipe of family {family}"
            )
        begun = {"model": self.spec.model_dump(), "shared_start": 0.0, "balanced_start": False}
        try:
            return TrainConfig.model_validate({**config.model_dump(), **begun})
        except ValidationError as error:
            raise UsageError(f"--from {self.source}: {one_line(error)}") from None


def origin_of(source: str, path: Path) -> Origin:
    """Return the model at ``path``, which ``source`` named: a run, a checkpoint or a bundle.

    Raises:
        InputError: it is none of them, or damaged.
    """
    if (path / MANIFEST).is_file():
        bundle = open_bundle(path)
        if not bundle.has(REFERENCE):
            raise InputError(f"{source} was exported with --no-reference; name its run")
        kept, sha256 = bundle.manifest, bundle.manifest.files[REFERENCE].sha256
        return Origin(source, path, kept.model, kept.class_names, sha256)
    folder = _folder(source, path)
    found = read_checkpoint(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} is missing; copy the run again")
    return Origin(source, folder, found.model, found.class_names, found.weights_sha256)


def _folder(source: str, path: Path) -> Path:
    """Return the folder of a checkpoint."""
    if path.is_file() and path.name == WEIGHTS:
        path = path.parent
    for folder in (path / "model", path):
        if (folder / CHECKPOINT).is_file():
            return folder
    if path.is_file():
        raise CheckpointError(
            f"{source} says nothing of its network; name {WEIGHTS} with {CHECKPOINT} beside it, or "
            "make a run of it: advmoe import"
        )
    what = "no finished run, no checkpoint and no bundle" if path.is_dir() else "not there"
    raise InputError(f"--from {source} is {what}; name what 'advmoe train' or 'export' wrote")
