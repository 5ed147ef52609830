"""Checkpoint: one copy of each weight in safetensors, everything else in JSON; no pickle.

checkpoint.json        spec, threat model, recipe, metrics, and the weights' SHA-256
weights.safetensors    the state dict
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from advmoe_deploy.errors import CheckpointError
from advmoe_deploy.files import sha256_of
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.reports.checkpoint import (
    CHECKPOINT,
    CHECKPOINT_VERSION,
    WEIGHTS,
    Checkpoint,
    read_checkpoint,
    read_weights,
)
from advmoe_deploy.specs import ModelSpec

__all__ = [
    "CHECKPOINT",
    "CHECKPOINT_VERSION",
    "WEIGHTS",
    "Checkpoint",
    "first_not_finite",
    "load_checkpoint",
    "model_from_weights",
    "read_checkpoint",
    "require_finite",
    "save_checkpoint",
    "state_of",
]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, model: Classifier) -> Checkpoint:
    """Write ``model`` and ``checkpoint`` into an existing directory; return what was written."""
    # Through Python's own file, whose error says that a disk is full.
    (directory / WEIGHTS).write_bytes(save(state_of(model)))
    sealed = checkpoint.model_copy(update={"weights_sha256": sha256_of(directory / WEIGHTS)})
    (directory / CHECKPOINT).write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return sealed


def load_checkpoint(directory: Path) -> tuple[Checkpoint, Classifier]:
    """Return the checkpoint in ``directory`` and its model, in eval mode.

    Raises:
        CheckpointError: a file is missing, truncated, changed, of another version, does not fit
            the spec, or holds values that are not finite.
    """
    checkpoint = read_checkpoint(directory)
    content = read_weights(directory, checkpoint.weights_sha256)
    return checkpoint, model_from_weights(checkpoint.model, content, directory / WEIGHTS)


def model_from_weights(spec: ModelSpec, content: bytes, weights: Path) -> Classifier:
    """Return the network of ``spec`` with the ``content`` of a safetensors file, in eval mode."""
    try:
        state = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from None
    require_finite(state, str(weights))
    model = build_model(spec)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        ours, theirs = model.state_dict(), state
        odd = sorted(ours.keys() ^ theirs.keys())
        odd += [k for k in ours.keys() & theirs.keys() if ours[k].shape != theirs[k].shape]
        raise CheckpointError(
            f"{weights} does not fit its spec: {len(odd)} tensors differ, first {odd[0]}"
        ) from None
    return model.eval()


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` on the CPU, contiguous, as safetensors wants it."""
    return {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}


def require_finite(state: dict[str, Tensor], where: str) -> None:
    """Raise :class:`CheckpointError` naming the first tensor of ``state`` with NaN or infinity."""
    if bad := first_not_finite(state):
        raise CheckpointError(f"{where}: {bad}; use an earlier checkpoint or train again")


def first_not_finite(state: dict[str, Tensor]) -> str | None:
    """Return what is wrong with the first tensor that holds NaN or infinity, or ``None``."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            return f"{name} holds {bad} values that are not finite"
    return None
