"""Runners, which answer batches of images, and predictions, their answers.

Shapes: N images, C classes, K experts per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from advmoe_deploy.errors import BundleError
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.specs import Precision


@dataclass(frozen=True)
class Prediction:
    """Logits float32 [N, C], and for each routed layer the ids int64 [N, K] and weights [N, K].

    ``margins`` [N], or [N, T] of tokens, say by how much the best expert's share exceeds the
    second's, of the layers whose scores are known outside of a graph.
    """

    logits: NDArray[np.float32]
    expert_ids: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    margins: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __getitem__(self, images: slice) -> "Prediction":
        return Prediction(
            self.logits[images],
            {layer: ids[images] for layer, ids in self.expert_ids.items()},
            {layer: weights[images] for layer, weights in self.weights.items()},
            {layer: margins[images] for layer, margins in self.margins.items()},
        )


class Runner(Protocol):
    """Answers batches of images; a context manager, safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """The engine, as ``runtime.select.ENGINES`` spells it."""

    @property
    def precision(self) -> Precision:
        """Lowest precision that answers were computed in."""

    @property
    def tf32(self) -> bool:
        """True if float32 is rounded to TF32, where that is faster."""

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""

    def close(self) -> None:
        """Release what the runner holds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def is_exact(runner: Runner) -> bool:
    """Return whether ``runner`` computes in float32, and rounds it nowhere."""
    return runner.precision == "fp32" and not runner.tf32


def margins_of(route: RouteStep) -> str:
    """Return what the margins of a route are called among tensors, where there are such."""
    return f"{route.layer}.margins"


def prediction_of(
    routes: tuple[RouteStep, ...], tensors: dict[str, NDArray[Any]], images: int
) -> Prediction:
    """Return the prediction for ``images`` in ``tensors``, which are named as a plan names them.

    Raises:
        BundleError: the engine answered fewer images, or more.
    """
    if len(tensors["logits"]) != images:
        raise BundleError(
            f"the engine answers {len(tensors['logits'])} of {images} images; it is broken on this "
            "machine: choose another with --engine, or export again here"
        )
    return Prediction(
        logits=tensors["logits"],
        expert_ids={route.layer: tensors[route.expert_ids] for route in routes},
        weights={route.layer: tensors[route.weights] for route in routes},
        margins={r.layer: tensors[margins_of(r)] for r in routes if margins_of(r) in tensors},
    )


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Return the predictions of consecutive images as one; there is at least one."""
    first = parts[0]
    return Prediction(
        np.concatenate([part.logits for part in parts]),
        {n: np.concatenate([part.expert_ids[n] for part in parts]) for n in first.expert_ids},
        {n: np.concatenate([part.weights[n] for part in parts]) for n in first.weights},
        {n: np.concatenate([part.margins[n] for part in parts]) for n in first.margins},
    )
