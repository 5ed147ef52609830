"""What a checkpoint says besides its weights, read without PyTorch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from advmoe_deploy.decoding import ModelDecoding
from advmoe_deploy.errors import CheckpointError, one_line
from advmoe_deploy.specs import ClassNames, Frozen, ModelSpec, ThreatModel

CHECKPOINT_VERSION = 1
CHECKPOINT = "checkpoint.json"
WEIGHTS = "weights.safetensors"


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


@dataclass(frozen=True)
class Known:
    """What is known of a model whose weights came alone; ``data`` goes into its provenance."""

    class_names: tuple[str, ...]
    threat: ThreatModel | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return ``checkpoint.json`` of ``directory``, weights unseen."""
    file = directory / CHECKPOINT
    if not file.is_file():
        raise CheckpointError(f"{directory} holds no {CHECKPOINT}; name what 'advmoe train' wrote")
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
