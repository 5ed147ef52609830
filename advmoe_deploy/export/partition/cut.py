"""Cut of a model at its routing points: a plan, and one dense graph per segment.

No family is known here. The model is traced once, whole, with markers where it routes, where rows
go to an expert and where the experts' outputs are combined
(:mod:`advmoe_deploy.models.routing.markers`). An expert's segment is what lies between its two
markers. The rest, the trunk, is cut by depth: what
the images alone determine, what needs the first combinations too, and so on. Gates lie in the trunk
segment before their layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, fx, nn

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.partition.lowering import (
    BATCH_AXIS,
    TracedModule,
    is_tensor,
    lower,
    shared_path,
)
from advmoe_deploy.export.partition.sample import Sample
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.markers import mark_route
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule
from advmoe_deploy.parity.rounding import DRAWS, furthest
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Segment, Step, TensorInfo
from advmoe_deploy.progress import Progress

_ROUTE = "advmoe.route.default"
_INPUT = "advmoe.dispatch.default"
_COMBINE = "advmoe.combine.default"
# Images of a sample that disturbed weights answer, too.
_DISTURBED = 4


@dataclass(frozen=True)
class Partition:
    """A plan, the graph of each of its segments, and how the torch model fills them."""

    plan: Plan
    graphs: Mapping[str, ModelProto]
    samples: Callable[[NDArray[np.float32]], dict[str, Sample]]


def partition(model: Classifier, progress: Progress | None = None) -> Partition:
    """Return the plan and the segments of ``model``; ``progress`` hears of its layers.

    Raises:
        CheckFailedError: the model uses an operator or a form that cannot be exported.
    """
    return _Cut(TracedModule(_Marked(model), model.spec.image_shape, progress)).partition()


class _Marked(nn.Module):
    """The model with markers; every expert sees every row."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model.unrolled()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images, _MarkedRoutes(execution="traced"))
        return logits


class _MarkedRoutes(Routes):
    def decide(self, rule: RoutingRule, gate: Callable[[Tensor], Tensor], x: Tensor) -> Routing:
        scores_NE = gate(x)
        routing = Routing(scores_NE, *mark_route(scores_NE, rule))
        self.taken[rule.layer] = routing
        return routing


@dataclass(frozen=True)
class _Layer:
    """A combination: the route it follows, what its experts read, and what they are."""

    name: str
    input: fx.Node
    inputs: tuple[fx.Node, ...]
    nodes: tuple[tuple[fx.Node, ...], ...]
    answers: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Piece:
    """A segment and its nodes; its parameters are called by their names below ``path``."""

    segment: Segment
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    nodes: list[fx.Node]
    path: str = "model."


class _Cut:
    """Finds the layers of a marked program, the depth of its trunk, and names what crosses."""

    def __init__(self, program: TracedModule) -> None:
        self.program = program
        every = program.needed([program.result])
        self.marks = [n for n in every if str(n.target) == _INPUT]
        self.routes = {n: str(n.args[1]) for n in every if str(n.target) == _ROUTE}
        self.layers = {n: self._layer(n) for n in every if str(n.target) == _COMBINE}
        inside = {n for layer in self.layers.values() for nodes in layer.nodes for n in nodes}
        choices = {n for n in every if n.args and n.args[0] in self.routes}
        joints = {*self.marks, *self.routes, *self.layers, *choices}
        self.trunk = [n for n in every if n not in inside | joints and is_tensor(n)]
        self.depth = self._depths(every)
        self.last = max(self.depth[n] for n in [*self.trunk, *self.layers])
        self.names = self._names()

    def partition(self) -> Partition:
        """Return what was cut."""
        segments, graphs, nodes = [], {}, {}
        for piece in [*self._trunk_pieces(), *self._expert_pieces()]:
            segment = piece.segment
            segments.append(segment)
            named = zip(piece.inputs, segment.inputs, strict=True)
            results = zip(piece.outputs, segment.outputs, strict=True)
            writer = lower(
                self.program,
                piece.nodes,
                {node: tensor.name for node, tensor in named},
                {node: tensor.name for node, tensor in results},
                piece.path,
            )
            graphs[segment.name] = writer.model(segment.name, segment.inputs, segment.outputs)
            nodes[segment.name] = piece.inputs, piece.outputs
        ids_and_weights = (name for r in self._routes() for name in (r.expert_ids, r.weights))
        plan = Plan(
            segments=tuple(segments),
            steps=tuple(self._steps()),
            outputs=("logits", *ids_and_weights),
        )
        return Partition(plan, graphs, lambda images: self._samples(plan, nodes, images))

    def _layer(self, combine: fx.Node) -> _Layer:
        ids, _, outputs = combine.args
        name = self.routes[_source(_node(ids))]
        answers = [_node(output) for output in cast("Sequence[object]", outputs)]
        inputs, nodes = [], []
        for answer in answers:
            own = [n for n in self.program.needed([answer], self.marks) if is_tensor(n)]
            read = {n for node in own for n in node.all_input_nodes if is_tensor(n)}
            read -= {*own, *self.program.constants}
            if len(read) != 1 or not read <= {*self.marks}:
                raise CheckFailedError(
                    f"cannot export this model: an expert of {name} reads something else than the "
                    "rows it is given"
                )
            inputs.append(read.pop())
            nodes.append(tuple(own))
        (source,) = {_source(mark) for mark in inputs}
        return _Layer(name, source, tuple(inputs), tuple(nodes), tuple(answers))

    def _depths(self, every: list[fx.Node]) -> dict[fx.Node, int]:
        """Return how many combinations, one after the other, each node has behind it."""
        depth = {self.program.image: 0, **dict.fromkeys(self.program.constants, 0)}
        for node in every:
            behind = max((depth[n] for n in node.all_input_nodes if is_tensor(n)), default=0)
            depth[node] = behind + (node in self.layers)
        return depth

    def _own(self, depth: int) -> list[fx.Node]:
        return [n for n in self.trunk if self.depth[n] == depth]

    def _inputs(self, own: list[fx.Node]) -> list[fx.Node]:
        read = dict.fromkeys(n for node in own for n in node.all_input_nodes if is_tensor(n))
        return [n for n in read if n not in own and n not in self.program.constants]

    def _outputs(self, own: list[fx.Node]) -> list[fx.Node]:
        """Return what others need of a segment: later ones, routes, experts, or the caller."""
        others = {*self.trunk, *self.marks, *self.routes} - {*own}
        return [n for n in own if n is self.program.result or not others.isdisjoint(n.users)]

    def _names(self) -> dict[fx.Node, str]:
        names = {
            node: f"{self._trunk_name(depth)}.{node.name}"
            for depth in range(self.last + 1)
            for node in self._outputs(self._own(depth))
        }
        names |= {node: f"{layer.name}.output" for node, layer in self.layers.items()}
        names |= {_source(node): f"{layer}.scores" for node, layer in self.routes.items()}
        return {**names, self.program.image: "images", self.program.result: "logits"}

    def _trunk_name(self, depth: int) -> str:
        if not self.layers:
            return "network"
        scores = {_source(route) for route in self.routes}
        only_scores = scores >= {*self._outputs(self._own(depth))}
        return "router" if only_scores and depth == 0 else f"trunk-{depth}"

    def _trunk_pieces(self) -> Iterator[_Piece]:
        for depth in range(self.last + 1):
            own = self._own(depth)
            if own:
                inputs, outputs = self._inputs(own), self._outputs(own)
                segment = _segment(
                    self._trunk_name(depth), self._infos(inputs), self._infos(outputs)
                )
                yield _Piece(segment, inputs, outputs, own)

    def _expert_pieces(self) -> Iterator[_Piece]:
        for combine, layer in self.layers.items():
            parts = zip(layer.inputs, layer.answers, layer.nodes, strict=True)
            for expert, (mark, answer, own) in enumerate(parts):
                given = _rows(self._info(mark, self.names[layer.input]))
                made = _rows(self._info(answer, self.names[combine]))
                name = _expert_name(layer.name, expert)
                yield _Piece(
                    _segment(name, (given,), (made,)),
                    [mark],
                    [answer],
                    list(own),
                    shared_path(self.program, own),
                )

    def _steps(self) -> Iterator[Step]:
        routes = {route.layer: route for route in self._routes()}
        for depth in range(self.last + 1):
            if self._own(depth):
                yield RunStep(segment=self._trunk_name(depth))
            yield from (routes[name] for n, name in self.routes.items() if self.depth[n] == depth)
            for node, layer in self.layers.items():
                if self.depth[node] == depth + 1:
                    yield ExpertsStep(
                        layer=layer.name,
                        input=self.names[layer.input],
                        output=self.names[node],
                        segments=tuple(
                            _expert_name(layer.name, e) for e in range(len(layer.nodes))
                        ),
                    )

    def _routes(self) -> list[RouteStep]:
        steps = []
        for node, layer in self.routes.items():
            _, _, top_k, weighting = node.args
            rows, experts = self.program.shape(_source(node))
            steps.append(
                RouteStep(
                    layer=layer,
                    scores=self.names[_source(node)],
                    num_experts=int(experts),
                    top_k=top_k,
                    weighting=weighting,
                    tokens=_tokens(rows),
                )
            )
        return steps

    def _infos(self, nodes: list[fx.Node]) -> tuple[TensorInfo, ...]:
        return tuple(self._info(node, self.names[node]) for node in nodes)

    def _info(self, node: fx.Node, name: str) -> TensorInfo:
        return TensorInfo(name=name, dtype="float32", shape=self.program.shape(node))

    def _samples(
        self,
        plan: Plan,
        nodes: Mapping[str, tuple[list[fx.Node], list[fx.Node]]],
        images: NDArray[np.float32],
    ) -> dict[str, Sample]:
        wanted = {node for both in nodes.values() for some in both for node in some}
        batch = {self.program.image: torch.from_numpy(images)}
        values = self.program.evaluate(wanted, batch)
        samples = {}
        for segment in plan.segments:
            inputs, outputs = nodes[segment.name]
            given = {**batch, **{node: values[node] for node in inputs}}
            exact = self.program.evaluate(outputs, given, torch.float64)
            few = {n: v[: _DISTURBED * (len(v) // len(images))] for n, v in given.items()}
            drawn = [
                self.program.evaluate(outputs, few, torch.float64, draw=draw) for draw in DRAWS
            ]
            moved = {
                n: furthest([each[n] for each in drawn], exact[n][: len(drawn[0][n])])
                for n in outputs
            }
            samples[segment.name] = Sample(
                {t.name: _array(values[n]) for t, n in zip(segment.inputs, inputs, strict=True)},
                {t.name: _array(values[n]) for t, n in zip(segment.outputs, outputs, strict=True)},
                {t.name: _array(exact[n]) for t, n in zip(segment.outputs, outputs, strict=True)},
                {t.name: _array(moved[n]) for t, n in zip(segment.outputs, outputs, strict=True)},
            )
        return samples


def _tokens(rows: int | str) -> int | None:
    """Return how many rows each image has; ``None`` if one, the image."""
    return None if rows == BATCH_AXIS else int(str(rows).removesuffix(f"*{BATCH_AXIS}"))


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.numpy())


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _source(node: fx.Node) -> fx.Node:
    """Return what ``node`` reads first."""
    return _node(node.args[0])


def _expert_name(layer: str, expert: int) -> str:
    return f"{layer}.expert-{expert}"


def _segment(name: str, inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...]) -> Segment:
    return Segment(name=name, file=f"segments/{name}.onnx", inputs=inputs, outputs=outputs)


def _rows(tensor: TensorInfo) -> TensorInfo:
    return tensor.model_copy(update={"shape": ("R", *tensor.shape[1:])})
