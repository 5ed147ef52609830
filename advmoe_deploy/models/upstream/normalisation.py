"""Normalisation that a file keeps in its network or before it, moved into the spec."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.models.upstream.wrappers import Found
from advmoe_deploy.specs import ModelSpec, build_spec

# mean and std, mu and sigma, image_mean and image_std, means and stds.
_MEAN = re.compile(r"(.*?)(?:mean|mu)(s?)")
_CHANNELS = 4  # more than that is no image's


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, and the names of both in the file."""

    mean: Tensor
    std: Tensor
    names: tuple[str, str]

    def applied_to(self, spec: ModelSpec, overrides: Mapping[str, object]) -> ModelSpec:
        """Return ``spec`` with this normalisation.

        Raises:
            CheckpointError: it is for another number of channels.
            UsageError: the overrides say another one, or it makes no sense.
        """
        found = {}
        for field, values, name in zip(
            ("mean", "std"), (self.mean, self.std), self.names, strict=True
        ):
            channels = values.flatten()
            if len(channels) not in (1, spec.in_channels):
                raise CheckpointError(
                    f"{name} has {len(channels)} channels, the network {spec.in_channels}"
                )
            channels = channels.expand(spec.in_channels)
            told = getattr(spec, field)
            if field not in overrides:
                found[field] = _decimals(channels)
            elif not _agrees(channels, told):
                raise UsageError(
                    f"--set {field} says {_text(told)}, but {name} in the file is "
                    f"{_text(_decimals(channels))}; leave out --set {field}"
                )
        return build_spec(**{**spec.model_dump(), **found})


def normalisation_of(
    tensors: Mapping[str, Tensor], network: Found, file: str
) -> Normalisation | None:
    """Return the normalisation that lies nearest to the network in the file, if there is any.

    Raises:
        CheckpointError: two that are equally near differ.
    """
    pairs = [pair for pair in _pairs(tensors) if network.may_hold(pair.names[0])]
    nearest = max((_nearness(pair, network.root) for pair in pairs), default=0)
    near = [pair for pair in pairs if _nearness(pair, network.root) == nearest]
    for pair in near:
        if not (torch.equal(pair.mean, near[0].mean) and torch.equal(pair.std, near[0].std)):
            names = f"{pair.names[0]} and {near[0].names[0]}"
            raise CheckpointError(f"{file}: {names} are two normalisations; which one is meant?")
    return near[0] if near else None


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[Normalisation]:
    for name, mean in tensors.items():
        place, dot, leaf = name.rpartition(".")
        match = _MEAN.fullmatch(leaf)
        if not match or not _is_of_channels(mean):
            continue
        for word in ("std", "sigma"):
            partner = f"{place}{dot}{match[1]}{word}{match[2]}"
            std = tensors.get(partner)
            if std is not None and std.shape == mean.shape and _is_of_channels(std):
                yield Normalisation(mean, std, (name, partner))


def _is_of_channels(values: Tensor) -> bool:
    return values.is_floating_point() and values.dim() > 0 and 0 < values.numel() <= _CHANNELS


def _nearness(pair: Normalisation, root: str) -> int:
    """Return how many parts of its name lead towards ``root``."""
    parts = pair.names[0].split(".")
    shared = 0
    for part, other in zip(parts, root.split("."), strict=False):
        if part != other:
            break
        shared += 1
    return shared


def _decimals(values: Tensor) -> tuple[float, ...]:
    """Return the shortest decimals that stand for ``values`` in their own precision."""
    exact = values.float() if values.dtype == torch.bfloat16 else values
    return tuple(float(str(value)) for value in exact.numpy())


def _agrees(values: Tensor, told: tuple[float, ...]) -> bool:
    coarse = torch.finfo(values.dtype).eps
    return torch.allclose(
        values.double(), torch.tensor(told).double(), rtol=2 * coarse, atol=coarse
    )


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
