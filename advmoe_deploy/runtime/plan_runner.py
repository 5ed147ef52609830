"""Runs a plan: one engine per segment, and the rows sent to experts and back by NumPy.

The engines know nothing of experts. That is the point: any vendor's engine for dense graphs will
do.

Shapes: N images, R rows (images or tokens), E experts, K experts per row, S = R * K choices.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import RENORMALISER, ExpertsStep, Plan, RouteStep, RunStep
from advmoe_deploy.runtime.closing import Closing
from advmoe_deploy.runtime.engine import Engine, OpenEngine, Source
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.runner import prediction_of
from advmoe_deploy.specs import Precision

Tensors = dict[str, NDArray[Any]]


class PlanRunner(Closing):
    """Runs the steps of a plan over engines of any kind."""

    def __init__(
        self,
        plan: Plan,
        graphs: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        *,
        routes: tuple[RouteStep, ...] | None = None,
        threads: int = 0,
        open_engine: OpenEngine | None = None,
        name: str = "onnxruntime-plan",
        precision: Precision = "fp32",
    ) -> None:
        """Load every segment.

        Args:
            plan: what to run.
            graphs: of the segments by name; files are verified already.
            image_shape: channels, height, width.
            routes: what to report as routes; by default those of ``plan``. A plan whose segments
                route inside has none of its own.
            threads: of the default engines.
            open_engine: makes the engine of a segment; by default ONNX Runtime.
            name: what the runner is called.
            precision: what its answers were computed in, at the lowest.
        """
        self.name = name
        self.precision = precision
        self.tf32 = False
        self._plan = plan
        self._routes = plan.routes if routes is None else routes
        self._image_shape = image_shape
        self._engines: dict[str, Engine] = {}
        open_engine = open_engine or (lambda _, graph: OrtEngine(graph, threads=threads))
        with ExitStack() as stack:
            for segment in plan.segments:
                engine = open_engine(segment.name, graphs[segment.name])
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
        return prediction_of(self._routes, tensors)

    def _run(self, name: str, tensors: Tensors) -> Tensors:
        segment = self._plan.segment(name)
        return self._engines[name].run({t.name: tensors[t.name] for t in segment.inputs})

    def _experts(self, step: ExpertsStep, tensors: Tensors) -> NDArray[Any]:
        """Return the weighted answers in the rows' order; an expert without rows does not run."""
        x = tensors[step.input]
        route = self._plan.route(step.layer)
        ids_S = tensors[route.expert_ids].reshape(-1)
        segments = dict(zip(route.kept, step.segments, strict=True))
        chosen = {int(e): segments[int(e)] for e in np.flatnonzero(np.bincount(ids_S))}
        if len(chosen) == 1:  # always so for a single image: nothing to gather or to bring back
            (name,) = chosen.values()
            each = self._run_expert(name, x)
        else:
            each = self._scattered(ids_S, chosen, x)
        if route.weighting == "one":
            return each
        rest = each.shape[1:]
        weights_RK = tensors[route.weights].reshape(-1, route.top_k, *([1] * len(rest)))
        weighted: NDArray[Any] = (each.reshape(-1, route.top_k, *rest) * weights_RK).sum(axis=1)
        return weighted

    def _scattered(
        self, ids_S: NDArray[np.int64], chosen: Mapping[int, str], x: NDArray[Any]
    ) -> NDArray[Any]:
        """Return one answer per choice, in their order; ``chosen`` are segments by expert."""
        top_k = len(ids_S) // len(x)
        parts = {}
        for expert, name in chosen.items():
            choices = np.flatnonzero(ids_S == expert)
            parts[expert] = choices, self._run_expert(name, x[choices // top_k])
        _, first = next(iter(parts.values()))
        each = np.empty((len(ids_S), *first.shape[1:]), first.dtype)
        for choices, part in parts.values():
            each[choices] = part
        return each

    def _run_expert(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        segment = self._plan.segment(name)
        answer = self._engines[name].run({segment.inputs[0].name: x})
        return answer[segment.outputs[0].name]

    def close(self) -> None:
        """Release every engine."""
        self._stack.close()


def route(step: RouteStep, scores_RE: NDArray[np.float32]) -> Tensors:
    """Return ids, best first, and weights by the rule of ``step``; ties to the lowest index."""
    if step.top_k == 1:
        ids_RK = scores_RE.argmax(axis=1)[:, None].astype(np.int64)
    else:
        descending_RE = np.where(np.isnan(scores_RE), -np.inf, -scores_RE)  # NaN first, as argmax
        ids_RK = np.argsort(descending_RE, axis=1, kind="stable")[:, : step.top_k].astype(np.int64)
    shape = (-1, *(int(size) for size in step.shape[1:]))
    weights_RK = weights_of(step, scores_RE, ids_RK)
    if step.experts is not None:
        ids_RK = np.array(step.experts)[ids_RK]
    return {step.expert_ids: ids_RK.reshape(shape), step.weights: weights_RK.reshape(shape)}


def weights_of(
    step: RouteStep, scores_RE: NDArray[np.float32], ids_RK: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the weights [R, K] of the chosen experts."""
    if step.weighting == "one":
        return np.ones(ids_RK.shape, np.float32)
    powers_RE = np.exp(scores_RE - scores_RE.max(axis=1, keepdims=True))
    shares_RE = powers_RE / powers_RE.sum(axis=1, keepdims=True)
    chosen_RK: NDArray[np.float32] = np.take_along_axis(shares_RE, ids_RK, axis=1)
    if step.weighting == "probability":
        return chosen_RK
    total_R1: NDArray[np.float32] = chosen_RK.sum(axis=1, keepdims=True) + np.float32(RENORMALISER)
    return np.asarray(chosen_RK / total_R1)
