"""Transfer of a trained model's weights into a new one, its head aside where classes differ."""

from pathlib import Path

import torch

from advmoe_deploy.errors import CheckpointError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.fields import Start
from advmoe_deploy.train.origin import origin_of


@torch.no_grad()
def transfer(model: Classifier, start: Start) -> None:
    """Give ``model`` the weights of ``start``, but for a head that is to learn other classes.

    Raises:
        CheckpointError: the weights are not those that the run was asked to begin with, or do not
            fit the network.
    """
    if origin_of(start.source, Path(start.path)).weights_sha256 != start.weights_sha256:
        raise CheckpointError(
            f"{start.source} has other weights than when the run was asked for (SHA-256 differs); "
            "train again"
        )
    state = open_stored(Path(start.path)).model.state_dict()
    head = head_of(model.spec) if start.new_head else frozenset()
    taken = {name: tensor for name, tensor in state.items() if name not in head}
    try:
        odd = model.load_state_dict(taken, strict=False)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{start.source} does not fit: {why}; train without --from") from None
    if odd.unexpected_keys or {*odd.missing_keys} != head:
        names = sorted({*odd.unexpected_keys} | ({*odd.missing_keys} ^ head))
        raise CheckpointError(
            f"{start.source} does not fit in {len(names)} tensors, first {names[0]}; train without "
            "--from"
        )


def head_of(spec: ModelSpec) -> frozenset[str]:
    """Return the names of the tensors whose shapes follow the number of classes."""
    other = spec.model_copy(update={"num_classes": spec.num_classes + 1})
    with torch.device("meta"):
        ours, theirs = (build_model(each).state_dict() for each in (spec, other))
    return frozenset(name for name in ours if ours[name].shape != theirs[name].shape)
