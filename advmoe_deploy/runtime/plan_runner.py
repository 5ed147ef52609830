"""Runs a plan: one engine per segment, and the rows sent to experts and back by NumPy.

The engines know nothing of experts. That is the point: any vendor's engine for dense graphs will
do.

Shapes: N rows, E experts, K experts per row.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep
from advmoe_deploy.runtime.closing import Closing
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.ort_engine import OrtEngine
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.runner import prediction_of

Tensors = dict[str, NDArray[Any]]


class PlanRunner(Closing):
    """Runs the steps of a plan over ONNX Runtime engines."""

    name = "onnxruntime-plan"

    def __init__(
        self,
        plan: Plan,
        files: Mapping[str, Path],
        image_shape: tuple[int, int, int],
        *,
        threads: int = 0,
    ) -> None:
        """Load every segment; ``files`` maps segment names to verified files."""
        self._plan = plan
        self._image_shape = image_shape
        self._engines: dict[str, OrtEngine] = {}
        with ExitStack() as stack:
            for segment in plan.segments:
                engine = OrtEngine(files[segment.name], threads=threads)
                self._engines[segment.name] = stack.enter_context(engine)
            self._stack = stack.pop_all()

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""
        tensors: Tensors = {self._plan.inputs[0]: checked_images(images, self._image_shape)}
        for step in self._plan.steps:
            match step:
                case RunStep():
                    tensors |= self._run(step.segment, tensors)
                case RouteStep():
                    tensors |= route(step, tensors[step.scores])
                case ExpertsStep():
                    tensors[step.output] = self._experts(step, tensors)
        return prediction_of(self._plan.routes, tensors)

    def _run(self, name: str, tensors: Tensors) -> Tensors:
        segment = self._plan.segment(name)
        return self._engines[name].run({t.name: tensors[t.name] for t in segment.inputs})

    def _experts(self, step: ExpertsStep, tensors: Tensors) -> NDArray[Any]:
        """Return the experts' rows in the original order; an expert without rows does not run."""
        x = tensors[step.input]
        ids_N = tensors[f"{step.layer}.expert_ids"][:, 0]
        chosen = np.flatnonzero(np.bincount(ids_N, minlength=len(step.segments)))
        if len(chosen) == 1:  # always so for a single image: nothing to gather or to bring back
            return self._run_expert(step.segments[chosen[0]], x)
        parts = {}
        for expert in chosen:
            rows = np.flatnonzero(ids_N == expert)
            parts[expert] = rows, self._run_expert(step.segments[expert], x[rows])
        _, first = next(iter(parts.values()))
        combined = np.empty((len(x), *first.shape[1:]), first.dtype)
        for rows, part in parts.values():
            combined[rows] = part
        return combined

    def _run_expert(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        segment = self._plan.segment(name)
        answer = self._engines[name].run({segment.inputs[0].name: x})
        return answer[segment.outputs[0].name]

    def close(self) -> None:
        """Release every engine."""
        self._stack.close()


def route(step: RouteStep, scores_NE: NDArray[np.float32]) -> Tensors:
    """Return ids int64 [N, 1] and weights 1 for the best score; ties go to the lowest index."""
    assert step.top_k == 1, "top-1 is the only route so far"
    ids_NK = scores_NE.argmax(axis=1)[:, None].astype(np.int64)
    return {step.expert_ids: ids_NK, step.weights: np.ones(ids_NK.shape, np.float32)}
