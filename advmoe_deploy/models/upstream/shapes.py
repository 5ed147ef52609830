"""Shape checks for tensors of other people's files."""

from collections.abc import Mapping

from torch import Tensor

from advmoe_deploy.errors import CheckpointError


def shape_of(network: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor that has so many dimensions, none of them empty.

    Raises:
        CheckpointError: it is missing or has another number of dimensions, or an empty one.
    """
    if name not in network:
        raise CheckpointError(f"{name} is missing")
    shape = tuple(network[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name} is {[*shape]}, not {dimensions} sizes above 0")
    return shape
