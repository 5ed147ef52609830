"""Runner of a plan: one engine per segment, and rows dispatched to experts and back by NumPy.

Engines need to know nothing of experts, so any vendor's engine for dense graphs will do.

Shapes: R rows (images or tokens).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Step
from advmoe_deploy.runtime.dispatch import combined, dispatch
from advmoe_deploy.runtime.engine import Engine, OpenEngine, Source
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.routing import Tensors, route
from advmoe_deploy.runtime.runner import Prediction, prediction_of
from advmoe_deploy.specs import Precision


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
        self.plan = plan
        self.routes = plan.routes if routes is None else routes
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
        tensors = self.before_last(images)
        self._take(self.plan.steps[-1], tensors)
        return prediction_of(self.routes, tensors, len(images))

    def before_last(self, images: NDArray[np.float32]) -> Tensors:
        """Return the tensors that the plan's last step finds, for images as :meth:`infer` takes."""
        tensors: Tensors = {self.plan.inputs[0]: checked_images(images, self._image_shape)}
        for step in self.plan.steps[:-1]:
            self._take(step, tensors)
        return tensors

    def run_expert(self, step: ExpertsStep, expert: int, x: NDArray[Any]) -> NDArray[Any]:
        """Return the answers of one expert of ``step``, without weights, to rows ``x``."""
        return self._run_expert(step.segments[self.plan.route(step.layer).kept.index(expert)], x)

    def _take(self, step: Step, tensors: Tensors) -> None:
        match step:
            case RunStep():
                tensors |= self._run(step.segment, tensors)
            case RouteStep():
                tensors |= route(step, tensors[step.scores])
            case ExpertsStep():
                tensors[step.output] = self._experts(step, tensors)

    def _run(self, name: str, tensors: Tensors) -> Tensors:
        segment = self.plan.segment(name)
        return self._engines[name].run({t.name: tensors[t.name] for t in segment.inputs})

    def _experts(self, step: ExpertsStep, tensors: Tensors) -> NDArray[Any]:
        """Return the weighted answers in the rows' order; an expert without rows does not run."""
        x, route = tensors[step.input], self.plan.route(step.layer)
        given = dispatch(tensors[route.expert_ids])
        segments = dict(zip(route.kept, step.segments, strict=True))
        if given.only is not None:  # always so for a single image: nothing to gather
            parts = {given.only: self._run_expert(segments[given.only], x)}
        else:
            parts = {e: self._run_expert(segments[e], x[rows]) for e, rows in given.rows()}
        return combined(route, given, parts, tensors[route.weights])

    def _run_expert(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        segment = self.plan.segment(name)
        answer = self._engines[name].run({segment.inputs[0].name: x})
        return answer[segment.outputs[0].name]

    def close(self) -> None:
        """Release every engine."""
        self._stack.close()
