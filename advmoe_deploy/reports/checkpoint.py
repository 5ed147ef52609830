"""Record of a checkpoint beside its weights, read without PyTorch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from advmoe_deploy.decoding import ModelDecoding
from advmoe_deploy.errors import (
    OR_A_MODEL,
    CheckpointError,
    InputError,
    missing_folder,
    one_line,
    reading,
)
from advmoe_deploy.specs import ClassNames, Fingerprint, Frozen, ModelSpec, ThreatModel

CHECKPOINT_VERSION = 1
CHECKPOINT = "checkpoint.json"
WEIGHTS = "weights.safetensors"
_RUN_MODEL = "model"  # where a run keeps the model it selected


class Checkpoint(Frozen):
    """Everything a checkpoint says besides its weights.

    ``recipe`` is the whole typed configuration it was trained with, ``metrics`` what was measured
    on the hold-out, ``provenance`` versions, data and seed. ``decoding`` is how image files are
    read for the model; a checkpoint that lacks it was trained on the default.
    """

    version: int = CHECKPOINT_VERSION
    model: ModelSpec
    decoding: ModelDecoding = Field(None, validate_default=True)
    threat: ThreatModel | None
    class_names: ClassNames
    recipe: dict[str, Any]
    metrics: dict[str, float]
    provenance: dict[str, Any]
    weights_sha256: str = ""

    @property
    def data(self) -> str:
        """The data source that the model was trained on; empty if unknown."""
        return str(self.provenance.get("data", ""))

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Content of the data that the model was trained on, if it is recorded."""
        found = self.provenance.get("fingerprint")
        return Fingerprint.model_validate(found) if found else None


@dataclass(frozen=True)
class Known:
    """Classes and threat of a model whose weights came alone; ``data`` goes into its provenance."""

    class_names: tuple[str, ...]
    threat: ThreatModel | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_folder(path: Path) -> Path:
    """Return where the checkpoint of ``path`` lies: a run, or one of its checkpoints.

    Raises:
        InputError: it is neither.
    """
    for folder in (path / _RUN_MODEL, path):
        if (folder / CHECKPOINT).is_file():
            return folder
    way_out = f"name what 'advmoe train' or 'advmoe export' wrote, {OR_A_MODEL}"
    if not path.exists():
        raise InputError(missing_folder(path, "run or bundle", way_out))
    what = "no directory" if not path.is_dir() else "neither a finished run nor a bundle"
    raise InputError(f"{path} is {what}; {way_out}")


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return ``checkpoint.json`` of ``directory``, weights unseen."""
    file = directory / CHECKPOINT
    if not file.is_file():
        way_out = f"name what 'advmoe train' wrote, {OR_A_MODEL}"
        run = directory.parent if directory.name == _RUN_MODEL else directory
        if not run.is_dir():
            raise CheckpointError(missing_folder(run, "run", way_out))
        raise CheckpointError(f"{directory} holds no {CHECKPOINT}; {way_out}")
    try:
        fields = json.loads(file.read_bytes())
        version = fields.get("version") if isinstance(fields, dict) else None
        if version != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{file} has version {version}, not {CHECKPOINT_VERSION}; train again"
            )
        return Checkpoint.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {one_line(error)}; train again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}); copy the run again") from None


def read_weights(directory: Path, sha256: str) -> bytes:
    """Return the weights' file in ``directory``, read once: these bytes are the ones hashed.

    Raises:
        CheckpointError: it is missing, or its SHA-256 is not ``sha256``.
    """
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing; train again or copy the run again")
    with reading(weights):
        content = weights.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(
            f"{weights} is damaged: truncated or changed (SHA-256 differs); copy the run again"
        )
    return content
