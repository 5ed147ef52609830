"""A plan: the steps over named tensors that join a routed model's dense segments.

A routed model is cut at its routing points into segments, dense graphs without data-dependent
control flow. Every export and every runner is a lowering of the same plan. AdvMoE's plan has three
steps: run the router, route, send each image to its pathway.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from advmoe_deploy.specs import Frozen


class TensorInfo(Frozen):
    """A named tensor; ``"N"`` in the shape is the batch."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class Segment(Frozen):
    """A dense graph: a file of the bundle, its inputs and its outputs."""

    name: str
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class RunStep(Frozen):
    """Run one segment on every row; inputs and outputs go by the segment's tensor names."""

    kind: Literal["run"] = "run"
    segment: str


class RouteStep(Frozen):
    """Turn scores [N, E] into ids [N, K] and weights [N, K]; ties go to the lowest index."""

    kind: Literal["route"] = "route"
    layer: str
    scores: str
    num_experts: int = Field(ge=1)
    top_k: int = Field(1, ge=1)
    scoring: Literal["one"] = "one"

    @property
    def expert_ids(self) -> str:
        """Name of the chosen ids, int64 [N, K]."""
        return f"{self.layer}.expert_ids"

    @property
    def weights(self) -> str:
        """Name of the weights, float32 [N, K]."""
        return f"{self.layer}.weights"


class ExpertsStep(Frozen):
    """Send each row to its expert's segment and bring the results back in the original order."""

    kind: Literal["experts"] = "experts"
    layer: str
    input: str
    output: str
    segments: tuple[str, ...]


Step = Annotated[RunStep | RouteStep | ExpertsStep, Field(discriminator="kind")]


class Plan(Frozen):
    """Segments and the steps that join them; ``inputs`` are given, ``outputs`` come back."""

    segments: tuple[Segment, ...]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...] = ("images",)
    outputs: tuple[str, ...] = ("logits",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = {segment.name for segment in self.segments}
        if len(known) != len(self.segments):
            raise ValueError("two segments share a name")
        produced = set(self.inputs)
        routes: dict[str, RouteStep] = {}
        for step in self.steps:
            needed, made = self._tensors_of(step, known, routes)
            if missing := needed - produced:
                raise ValueError(f"{step.kind} step needs {sorted(missing)}, which no step made")
            produced |= made
        if missing := set(self.outputs) - produced:
            raise ValueError(f"no step makes the outputs {sorted(missing)}")
        return self

    def _tensors_of(
        self, step: Step, known: set[str], routes: dict[str, RouteStep]
    ) -> tuple[set[str], set[str]]:
        match step:
            case RunStep():
                if step.segment not in known:
                    raise ValueError(f"no segment is called {step.segment!r}")
                segment = self.segment(step.segment)
                return {t.name for t in segment.inputs}, {t.name for t in segment.outputs}
            case RouteStep():
                routes[step.layer] = step
                return {step.scores}, {step.expert_ids, step.weights}
            case ExpertsStep():
                route = routes.get(step.layer)
                if route is None or len(step.segments) != route.num_experts:
                    raise ValueError(
                        f"layer {step.layer!r} has {len(step.segments)} expert segments and "
                        f"{route.num_experts if route else 'no'} routes"
                    )
                if missing := set(step.segments) - known:
                    raise ValueError(f"no segments are called {sorted(missing)}")
                return {step.input, route.expert_ids}, {step.output}

    def segment(self, name: str) -> Segment:
        """Return the segment called ``name``."""
        return next(segment for segment in self.segments if segment.name == name)

    @property
    def routes(self) -> tuple[RouteStep, ...]:
        """The routing points, in order."""
        return tuple(step for step in self.steps if isinstance(step, RouteStep))
