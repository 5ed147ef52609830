"""Runner of one ONNX graph that routes inside, on ONNX Runtime."""

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.onnxruntime.custom_ops import CustomOps
from advmoe_deploy.runtime.onnxruntime.engine import CPU, OrtEngine, Provider, rounds_to_tf32
from advmoe_deploy.runtime.runner import Prediction, prediction_of
from advmoe_deploy.specs import Precision


class GraphRunner(Closing):
    """Runs one ONNX graph that routes inside."""

    def __init__(
        self,
        model: Source,
        image_shape: tuple[int, int, int],
        *,
        routes: tuple[RouteStep, ...] = (),
        threads: int = 0,
        custom_ops: str | None = None,
        provider: Provider = CPU,
        name: str = "onnxruntime",
    ) -> None:
        """Load ``model``; ``routes`` says which of its outputs are routes.

        ``threads``, ``custom_ops`` and ``provider`` are those of :class:`OrtEngine`; ``name`` is
        what the runner is called.
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
        return prediction_of(self._routes, self._engine.run({"images": checked}), len(images))

    def close(self) -> None:
        """Release the session."""
        self._engine.close()
