"""Runners: from images to a prediction, whatever is underneath."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.closing import Closing
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.onnxruntime.custom_ops import CustomOps
from advmoe_deploy.runtime.onnxruntime.engine import CPU, OrtEngine, Provider, rounds_to_tf32
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.specs import Precision


class Runner(Protocol):
    """Answers batches of images; a context manager, safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """The engine, as ``runtime.select.ENGINES`` spells it."""

    @property
    def precision(self) -> Precision:
        """What the answers were computed in, at the lowest."""

    @property
    def tf32(self) -> bool:
        """Whether float32 is rounded to TF32, where that is faster."""

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""

    def close(self) -> None:
        """Release what the runner holds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def is_exact(runner: Runner) -> bool:
    """Return whether ``runner`` computes in float32, and rounds it nowhere."""
    return runner.precision == "fp32" and not runner.tf32


class GraphRunner(Closing):
    """Runs one ONNX graph that routes inside."""

    def __init__(
        self,
        model: bytes | Path,
        image_shape: tuple[int, int, int],
        *,
        routes: tuple[RouteStep, ...] = (),
        threads: int = 0,
        custom_ops: str | None = None,
        provider: Provider = CPU,
        name: str = "onnxruntime",
    ) -> None:
        """Load ``model``; ``routes`` says which of its outputs are routes.

        ``threads``, ``custom_ops`` and ``provider`` are those of
        :class:`~advmoe_deploy.runtime.onnxruntime.engine.OrtEngine`; ``name`` is what the runner is called.
        """
        self.name = name
        self.precision: Precision = "fp32"
        self.tf32 = rounds_to_tf32(provider)
        self._engine = OrtEngine(model, threads=threads, custom_ops=custom_ops, provider=provider)
        self._routes = routes
        self._image_shape = image_shape

    @property
    def custom_ops(self) -> CustomOps | None:
        """The form of our operators that runs, ``None`` where the graph has none."""
        return self._engine.custom_ops

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""
        checked = checked_images(images, self._image_shape)
        return prediction_of(self._routes, self._engine.run({"images": checked}))

    def close(self) -> None:
        """Release the session."""
        self._engine.close()


def prediction_of(routes: tuple[RouteStep, ...], tensors: dict[str, NDArray[Any]]) -> Prediction:
    """Return the prediction in ``tensors``, which are named as a plan names them."""
    return Prediction(
        logits=tensors["logits"],
        expert_ids={route.layer: tensors[route.expert_ids] for route in routes},
        weights={route.layer: tensors[route.weights] for route in routes},
    )
