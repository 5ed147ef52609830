"""Plan: the steps over named tensors that join a routed model's dense segments.

A routed model is cut at its routing points into segments, dense graphs without data-dependent
control flow. Every export and every runner is a lowering of the same plan. AdvMoE's plan has three
steps: run the router, route, send each image to its pathway.

Shapes: N images, T tokens per image, R rows (images, or all tokens of all images), E experts,
K experts per row.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from advmoe_deploy.specs import Frozen, Weighting

# What Robust Experts (arXiv 2509.05086) adds to the sum that renormalised weights are divided by.
RENORMALISER = 1e-5


class TensorInfo(Frozen):
    """A named tensor; in the shape ``"N"`` is the batch, ``"16*N"`` 16 tokens of each image.

    ``"R"`` are the rows that an expert is given.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class Segment(Frozen):
    """A dense graph: a file of the bundle, its inputs and its outputs.

    Names become those of files and folders, so they lead nowhere.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class RunStep(Frozen):
    """Run one segment on every row; inputs and outputs go by the segment's tensor names."""

    kind: Literal["run"] = "run"
    segment: str


class RouteStep(Frozen):
    """Turn scores [R, E] into ids, best first, and weights; ties go to the lowest index.

    Both are [N, K], or [N, T, K] where a layer routes tokens; the rows of ``scores`` are then those
    of the images one after the other. Weights are 1 (``one``), the softmax over all experts
    (``probability``), or that divided by its sum over the chosen and :data:`RENORMALISER`
    (``renormalised``). With ``experts``, in ascending order, scores are of those alone; ids keep
    the model's numbering, in which there are ``num_experts``.
    """

    kind: Literal["route"] = "route"
    layer: str
    scores: str
    num_experts: int = Field(ge=1)
    top_k: int = Field(1, ge=1)
    weighting: Weighting = "one"
    tokens: int | None = Field(None, ge=1)
    experts: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")
        if self.top_k > len(self.kept):
            raise ValueError(f"top_k={self.top_k} exceeds the {len(self.kept)} experts left")
        if list(self.kept) != sorted({*self.kept} & {*range(self.num_experts)}):
            raise ValueError(f"experts={self.kept} are no ids below num_experts={self.num_experts}")
        if self.weighting == "one" and self.top_k != 1:
            raise ValueError(f"weighting 'one' is for top_k=1, not {self.top_k}")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts that rows can be sent to, ascending: those that the scores are of."""
        return tuple(range(self.num_experts)) if self.experts is None else self.experts

    @property
    def expert_ids(self) -> str:
        """Name of the chosen ids, int64 [N, K] or [N, T, K]."""
        return f"{self.layer}.expert_ids"

    @property
    def weights(self) -> str:
        """Name of the weights, float32 [N, K] or [N, T, K]."""
        return f"{self.layer}.weights"

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Shape of ids and weights."""
        return ("N", self.top_k) if self.tokens is None else ("N", self.tokens, self.top_k)

    @property
    def rows(self) -> str:
        """Number of rows that are routed, as a shape says it."""
        return "N" if self.tokens is None else f"{self.tokens}*N"

    @property
    def made(self) -> tuple[TensorInfo, TensorInfo]:
        """The declarations of ids and weights."""
        return (
            TensorInfo(name=self.expert_ids, dtype="int64", shape=self.shape),
            TensorInfo(name=self.weights, dtype="float32", shape=self.shape),
        )


class ExpertsStep(Frozen):
    """Each row's output is the sum over its experts of weight times the expert's segment of it.

    With weighting ``one`` nothing is multiplied. Rows keep their order. ``segments`` are those of
    the experts that the layer's route keeps, in that order.
    """

    kind: Literal["experts"] = "experts"
    layer: str
    input: str
    output: str
    segments: tuple[str, ...]


Step = Annotated[RunStep | RouteStep | ExpertsStep, Field(discriminator="kind")]


class Plan(Frozen):
    """Segments and the steps that join them; ``inputs`` are given, ``outputs`` come back.

    ``inside`` are routing points that a segment decides itself: it makes their ids and weights.
    """

    segments: tuple[Segment, ...]
    steps: tuple[Step, ...]
    inside: tuple[RouteStep, ...] = ()
    inputs: tuple[str, ...] = ("images",)
    outputs: tuple[str, ...] = ("logits",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({segment.name for segment in self.segments}) != len(self.segments):
            raise ValueError("two segments share a name")
        if missing := set(self.outputs) - self.tensors().keys():
            raise ValueError(f"no step makes the outputs {sorted(missing)}")
        return self

    def tensors(self) -> dict[str, TensorInfo]:
        """Return the declaration of every tensor that is given or made by a step.

        Raises:
            ValueError: the steps do not fit together.
        """
        walk = _Walk(self.segments, self.inputs, self.inside)
        for step in self.steps:
            walk.take(step)
        return {name: info for name, info in walk.made.items() if info is not None}

    def segment(self, name: str) -> Segment:
        """Return the segment called ``name``."""
        return next(segment for segment in self.segments if segment.name == name)

    def route(self, layer: str) -> RouteStep:
        """Return the routing point called ``layer``."""
        return next(route for route in self.routes if route.layer == layer)

    @property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """The segments that belong together: one of the trunk, or all experts of a layer."""
        layers = [step.segments for step in self.steps if isinstance(step, ExpertsStep)]
        experts = {name for layer in layers for name in layer}
        return (*((s.name,) for s in self.segments if s.name not in experts), *layers)

    @property
    def routes(self) -> tuple[RouteStep, ...]:
        """The routing points: those among the steps, in order, and those inside of segments."""
        return (*(step for step in self.steps if isinstance(step, RouteStep)), *self.inside)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The segments that make scores."""
        scores = {route.scores for route in self.routes}
        return tuple(s.name for s in self.segments if scores & {t.name for t in s.outputs})


class _Walk:
    """Goes through the steps and knows which tensors there are by now.

    An input of the plan is declared by the step that reads it first.
    """

    def __init__(
        self, segments: Iterable[Segment], inputs: Iterable[str], inside: Iterable[RouteStep]
    ) -> None:
        self.segments = {segment.name: segment for segment in segments}
        self.made: dict[str, TensorInfo | None] = dict.fromkeys(inputs)
        self.inside = {route.layer: route for route in inside}
        self.routes: dict[str, RouteStep] = {}

    def take(self, step: Step) -> None:
        """Check one step and add what it makes."""
        match step:
            case RunStep():
                segment = self._segment(step.segment)
                for tensor in segment.inputs:
                    self._read(tensor, step)
                self._add(*segment.outputs)
            case RouteStep():
                self._route(step)
            case ExpertsStep():
                self._experts(step)

    def _route(self, step: RouteStep) -> None:
        scores = self._known(step.scores, step)
        expected = (step.rows, len(step.kept))
        if scores.shape != expected:
            raise ValueError(
                f"layer {step.layer!r} routes scores of shape {scores.shape}, not {expected}"
            )
        self.routes[step.layer] = step
        self._add(*step.made)

    def _experts(self, step: ExpertsStep) -> None:
        route = self._route_of(step.layer)
        if route is None or len(step.segments) != len(route.kept):
            raise ValueError(
                f"layer {step.layer!r} has {len(step.segments)} expert segments and "
                f"{len(route.kept) if route else 'no'} routes"
            )
        experts = [self._segment(name) for name in step.segments]
        kinds = {(_kinds(expert.inputs), _kinds(expert.outputs)) for expert in experts}
        if len(kinds) > 1 or any(len(e.inputs) != 1 or len(e.outputs) != 1 for e in experts):
            raise ValueError(f"the experts of layer {step.layer!r} are not of one shape")
        (given,), (answer,) = experts[0].inputs, experts[0].outputs
        self._read(_with_rows(given, step.input, route.rows), step)
        self._add(_with_rows(answer, step.output, route.rows))

    def _route_of(self, layer: str) -> RouteStep | None:
        """Return what decides for ``layer`` by now: a step, or a segment inside."""
        inside = self.inside.get(layer)
        if inside is not None and self.made.get(inside.expert_ids) == inside.made[0]:
            return inside
        return self.routes.get(layer)

    def _segment(self, name: str) -> Segment:
        if name not in self.segments:
            raise ValueError(f"no segment is called {name!r}")
        return self.segments[name]

    def _known(self, name: str, step: Step) -> TensorInfo:
        info = self.made.get(name)
        if info is None:
            raise ValueError(f"{step.kind} step needs {name!r}, which no step made")
        return info

    def _read(self, tensor: TensorInfo, step: Step) -> None:
        if tensor.name in self.made and self.made[tensor.name] is None:
            self.made[tensor.name] = tensor
        if self._known(tensor.name, step) != tensor:
            raise ValueError(f"{tensor} is read, {self.made[tensor.name]} was made")

    def _add(self, *tensors: TensorInfo) -> None:
        for tensor in tensors:
            if tensor.name in self.made:
                raise ValueError(f"{tensor.name!r} is made twice")
            self.made[tensor.name] = tensor


def _kinds(tensors: tuple[TensorInfo, ...]) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
    return tuple((tensor.dtype, tensor.shape) for tensor in tensors)


def _with_rows(tensor: TensorInfo, name: str, rows: int | str) -> TensorInfo:
    return TensorInfo(name=name, dtype=tensor.dtype, shape=(rows, *tensor.shape[1:]))


def effective_routes(expert_load: tuple[int, ...]) -> float:
    """Return exp of the entropy of the load: E when all are used alike, 1 at a collapse."""
    total = sum(expert_load)
    shares = [rows / total for rows in expert_load if rows]
    return math.exp(-sum(share * math.log(share) for share in shares))
