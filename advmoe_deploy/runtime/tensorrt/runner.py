"""Runner of a plan on engines that have a memory of their own, where tensors stay.

The host waits for the experts' ids and for the answer; from ids it makes row numbers, by which
small graphs (``export/tensorrt/row_graphs.py``) gather each expert's rows and scatter the answers.
Rows are padded to few sizes, for which engines are prepared once.

Shapes: N images, R rows of one expert, K experts per row.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import InputError, UsageError
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep
from advmoe_deploy.runtime.dispatch import Dispatch, combined, dispatch
from advmoe_deploy.runtime.engine import OpenEngine, Source
from advmoe_deploy.runtime.images import require_pixels, shaped_images
from advmoe_deploy.runtime.routing import route as routed
from advmoe_deploy.runtime.runner import Prediction, joined, prediction_of
from advmoe_deploy.runtime.tensorrt.layout import Layer, Layout, grouped_name, positions_name
from advmoe_deploy.runtime.tensorrt.rows import (
    ALL_ROWS,
    GROUPED,
    OWN_ROWS,
    POSITIONS,
    ROWS,
    bucket,
    combine_name,
    dispatch_name,
    padded,
)
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.runtime.tensorrt.slot_pool import SlotPool
from advmoe_deploy.runtime.tensorrt.slots import ExecutionSlot, GraphCall, HostSlot, View
from advmoe_deploy.specs import Precision


class DeviceRunner(Closing):
    """Runs a plan over execution slots; safe to call from more threads than there are slots."""

    def __init__(
        self,
        layout: Layout,
        slots: Sequence[ExecutionSlot],
        image_shape: tuple[int, int, int],
        *,
        name: str,
        precision: Precision = "fp32",
        tf32: bool = False,
        resources: ExitStack,
    ) -> None:
        """Take over ``slots``.

        Args:
            layout: the plan, and the batches that execution slots take; larger ones are split.
            slots: one for each batch that may be under way.
            image_shape: channels, height, width.
            name: what the runner is called.
            precision: what its answers are computed in, at the lowest.
            tf32: whether float32 is rounded to TF32.
            resources: what is closed with the runner, execution slots included.
        """
        self.name = name
        self.precision = precision
        self.tf32 = tf32
        self._layout = layout
        self._image_shape = image_shape
        self._resources = resources
        self._slots = SlotPool(slots)

    @classmethod
    def over_engines(
        cls,
        plan: Plan,
        graphs: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        *,
        open_engine: OpenEngine,
        batch: BatchProfile,
        name: str,
        precision: Precision = "fp32",
    ) -> "DeviceRunner":
        """Return a runner over engines of any kind, whose tensors cross through the host.

        ``graphs`` are those of the plan and those that move rows, by name; ``open_engine`` makes
        the engine of each. The rest is as for :class:`Layout` and the constructor.
        """
        layout = Layout(plan, batch)
        with ExitStack() as stack:
            engines = {}
            for graph, source in graphs.items():
                engines[graph] = stack.enter_context(open_engine(graph, source))
            slot = HostSlot(engines, layout.capacity)
            return cls(
                layout,
                [slot],
                image_shape,
                name=name,
                precision=precision,
                resources=stack.pop_all(),
            )

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order."""
        shaped = shaped_images(images, self._image_shape)
        most = self._layout.batch.max
        try:
            parts = [self._infer(shaped[i : i + most]) for i in range(0, len(shaped), most)]
        except InputError:
            require_pixels(shaped)  # says it of all images, not of those that were written together
            raise
        return parts[0] if len(parts) == 1 else joined(parts)

    def _infer(self, images: NDArray[np.float32]) -> Prediction:
        with self._slots.slot() as slot:
            return _Batch(self._layout, slot, images).run()

    def prepare(self, images: NDArray[np.float32]) -> None:
        """Run a batch on every execution slot, so that none prepares for this size later."""
        shaped = shaped_images(images, self._image_shape)[: self._layout.batch.max]
        with self._slots.every_slot() as slots:
            for slot in slots:
                _Batch(self._layout, slot, shaped).run()

    def device_ms(self, images: NDArray[np.float32]) -> float:
        """Return the device's milliseconds for a batch, from images there to answers here.

        On a GPU by events around all that is queued, so waits for the host between engines count,
        and checking and sending the images does not.

        Raises:
            UsageError: there are more images than engines take at once.
        """
        shaped = shaped_images(images, self._image_shape)
        if len(shaped) > self._layout.batch.max:
            raise UsageError(f"{len(shaped)} images; time at most {self._layout.batch.max} at once")
        with self._slots.slot() as slot:
            batch = _Batch(self._layout, slot, shaped)
            slot.begin()
            batch.run()
            return slot.elapsed_ms()

    def close(self) -> None:
        """Release every execution slot, once nobody runs on it any more."""
        self._slots.close()
        self._resources.close()


class _Batch:
    """One batch on one execution slot: where its tensors lie, and what has come to the host."""

    def __init__(self, layout: Layout, slot: ExecutionSlot, images: NDArray[np.float32]) -> None:
        self.layout, self.plan, self.slot = layout, layout.plan, slot
        self.count = len(images)
        self.padded = max(bucket(self.count, layout.batch.max), layout.batch.min)
        self.moved: dict[str, View] = {}
        self.host: dict[str, NDArray[Any]] = {}
        slot.put(self.plan.inputs[0], images, check=require_pixels)

    def run(self) -> Prediction:
        """Run the steps of the plan; experts run on their rows, once these are known."""
        for step in self.plan.steps:
            if isinstance(step, ExpertsStep):
                self._experts(self.layout.layers[step.output])
            else:
                self._run(step)
        return self._prediction()

    def _run(self, step: RunStep | RouteStep) -> None:
        if isinstance(step, RouteStep):
            self._route(step)
            return
        inputs, outputs = self.layout.ends[step.segment]
        given = {name: self._view(name) for name in inputs}
        self.slot.run(GraphCall(step.segment, given, {name: self._view(name) for name in outputs}))

    def _route(self, step: RouteStep) -> None:
        """Decide on the host, by scores that no segment has made a decision of."""
        (scores,) = self.slot.get(self._view(step.scores, self.count))
        self.host |= routed(step, scores)
        if step.weighting != "one":
            self.slot.put(step.weights, self.host[step.weights])

    def _experts(self, layer: Layer) -> None:
        given = dispatch(self._ids(layer.route))
        if given.only is not None:  # always so for one image: nothing to gather, one stream to use
            every = self._view(layer.step.input)
            self.slot.run(self._expert(layer, *layer.regions[given.only], every))
        else:
            for expert, rows in given.rows():
                self._dispatch(layer, *layer.regions[expert], rows)
        if layer.is_read_later:
            self._combine(layer, given)
        else:
            self._fetch(layer, given)

    def _dispatch(self, layer: Layer, region: int, name: str, rows: NDArray[np.int64]) -> None:
        """Gather an expert's rows and run it on them, on a stream of its own."""
        size = bucket(len(rows), self.layout.capacity[layer.step.input])
        numbers, own = View(f"{name}.{ROWS}", size), View(f"{name}.{OWN_ROWS}", size)
        every = self._view(layer.step.input, self.layout.batch.max)
        gather = GraphCall(
            dispatch_name(layer.step), {ALL_ROWS: every, ROWS: numbers}, {OWN_ROWS: own}
        )
        self.slot.put(numbers.tensor, padded(rows, size), stream=1 + region)
        self.slot.run(gather, self._expert(layer, region, name, own), stream=1 + region)

    def _expert(self, layer: Layer, region: int, name: str, rows: View) -> GraphCall:
        segment = layer.segments[name]
        (given,), (answer,) = segment.inputs, segment.outputs
        return GraphCall(name, {given.name: rows}, {answer.name: layer.answer(region, rows.rows)})

    def _combine(self, layer: Layer, given: Dispatch) -> None:
        """Put the answers in order where they are, unless they already are in order."""
        step, route, made = layer.step, layer.route, self._view(layer.step.output)
        if given.only is not None and route.weighting == "one":
            region, _ = layer.regions[given.only]
            self.moved[step.output] = layer.answer(region, made.rows)
            return
        starts = {expert: region * layer.rows_each for expert, (region, _) in layer.regions.items()}
        positions = View(positions_name(step), made.rows * route.top_k)
        self.slot.put(positions.tensor, padded(given.positions(starts), positions.rows))
        grouped = View(grouped_name(step), self.layout.capacity[grouped_name(step)])
        inputs = {GROUPED: grouped, POSITIONS: positions}
        if route.weighting != "one":
            inputs[route.weights] = self._view(route.weights)
        self.slot.run(GraphCall(combine_name(step), inputs, {step.output: made}))

    def _fetch(self, layer: Layer, given: Dispatch) -> None:
        """Put the answers in order on the host, where they are wanted."""
        views = [layer.answer(layer.regions[e][0], len(c)) for e, c in given.choices.items()]
        parts = dict(zip(given.choices, self.slot.get(*views), strict=True))
        weights = self._weights(layer.route)
        self.host[layer.step.output] = combined(layer.route, given, parts, weights)

    def _ids(self, route: RouteStep) -> NDArray[np.int64]:
        """Return where a layer's rows go; the host waits for it."""
        if route.expert_ids not in self.host:
            self._with_ids(route)
        return self.host[route.expert_ids]

    def _with_ids(self, route: RouteStep, *views: View) -> list[NDArray[Any]]:
        """Return these rows; where a layer's rows go, if it is not known, comes with them."""
        unknown = [] if route.expert_ids in self.host else [View(route.expert_ids, self.count)]
        values = self.slot.get(*unknown, *views)
        if unknown:
            self.host[route.expert_ids] = values.pop(0).astype(np.int64)
        return values

    def _weights(self, route: RouteStep) -> NDArray[np.float32]:
        if route.weights not in self.host:
            if route.weighting == "one":
                self.host[route.weights] = np.ones(self._ids(route).shape, np.float32)
            else:
                (self.host[route.weights],) = self.slot.get(View(route.weights, self.count))
        return self.host[route.weights]

    def _prediction(self) -> Prediction:
        """Return the answer; all that has not come to the host yet comes at once."""
        routes = self.layout.routes
        weighted = [route.weights for route in routes if route.weighting != "one"]
        wanted = (*(route.expert_ids for route in routes), *weighted, *self.plan.outputs)
        missing = [name for name in dict.fromkeys(wanted) if name not in self.host]
        if missing:
            values = self.slot.get(*(self._view(name, self.count) for name in missing))
            self.host |= dict(zip(missing, values, strict=True))
        for route in routes:
            self._weights(route)
        tensors = self.layout.tensors
        typed = {n: v.astype(tensors[n].dtype, copy=False) for n, v in self.host.items()}
        return prediction_of(routes, typed, self.count)

    def _view(self, tensor: str, images: int | None = None) -> View:
        """Return the rows of so many images, by default those of the padded batch."""
        rows = self.layout.rows(tensor, self.padded if images is None else images)
        moved = self.moved.get(tensor)
        return View(moved.tensor, rows, moved.start) if moved else View(tensor, rows)
