"""Routing and the pathways apart, so that rows of many requests meet in the pathway they share.

Shapes: N images, R rows of one pathway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.routing import Tensors, share_margins
from advmoe_deploy.runtime.runner import Prediction, Runner, margins_of, prediction_of
from advmoe_deploy.runtime.select import WARM_BATCHES

# A batch is padded to the next size that is prepared if so much of it are rows, else cut.
_WORTH_PADDING = 0.7


@dataclass(frozen=True)
class Rows:
    """Rows between routing and pathway: tensors by name, whose first axes are the rows."""

    tensors: dict[str, NDArray[Any]]

    def __getitem__(self, index: slice | NDArray[np.int64]) -> "Rows":
        return Rows({name: values[index] for name, values in self.tensors.items()})


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of ``parts``, of which there is at least one, one after the other."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].tensors
    return Rows({name: np.concatenate([part.tensors[name] for part in parts]) for name in names})


class Work(Protocol):
    """Computation of a batch: it is routed, and the rows of each pathway run together."""

    @property
    def pathways(self) -> int:
        """Number of pathways, at most."""

    def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
        """Return the pathway of each image [N, C, H, W], and the rows to hand to :meth:`run`."""

    def count(self, rows: int) -> int:
        """Return how many of so many rows should run at once."""

    def run(self, pathway: int, rows: Rows) -> Prediction:
        """Return the prediction for rows of one pathway."""


def work_of(runner: Runner) -> Work:
    """Return how ``runner`` computes: by pathway where its plan ends in one, else as a whole."""
    # OpenVINO compiles for every size that it meets; TensorRT's runner pads by itself.
    sizes = WARM_BATCHES if runner.name.startswith("openvino") else ()
    if isinstance(runner, PlanRunner) and (step := _last_pathways(runner.plan)):
        return _Pathways(runner, step, sizes)
    return _Whole(runner, sizes)


class _Whole:
    """One pathway: whatever routes does so inside, and sends rows to experts there."""

    pathways = 1

    def __init__(self, runner: Runner, sizes: Sequence[int]) -> None:
        self._runner, self._sizes = runner, sizes

    def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
        return np.zeros(len(images), np.int64), Rows({"images": images})

    def count(self, rows: int) -> int:
        return _bucket(rows, self._sizes)[0]

    def run(self, pathway: int, rows: Rows) -> Prediction:
        images = rows.tensors["images"]
        return self._runner.infer(_padded(images, self._sizes))[: len(images)]


class _Pathways:
    """A pathway for each expert of the last step, which makes the logits."""

    def __init__(self, runner: PlanRunner, step: ExpertsStep, sizes: Sequence[int]) -> None:
        self._runner, self._step, self._sizes = runner, step, sizes
        self._route = runner.plan.route(step.layer)
        self.pathways = len(self._route.kept)

    def route(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], Rows]:
        parts, start = [], 0
        while start < len(images):
            stop = start + self.count(len(images) - start)
            parts.append(self._routed(images[start:stop]))
            start = stop
        rows = joined_rows(parts)
        return rows.tensors[self._route.expert_ids][:, 0], rows

    def _routed(self, images: NDArray[np.float32]) -> Rows:
        tensors = self._runner.before_last(_padded(images, self._sizes))
        made = [name for route in self._runner.routes for name in (route.expert_ids, route.weights)]
        kept = {name: tensors[name] for name in (self._step.input, *made)}
        return Rows(kept | plan_margins(self._runner.plan, tensors))[: len(images)]

    def count(self, rows: int) -> int:
        return _bucket(rows, self._sizes)[0]

    def run(self, pathway: int, rows: Rows) -> Prediction:
        x = rows.tensors[self._step.input]
        answer = self._runner.run_expert(self._step, pathway, _padded(x, self._sizes))[: len(x)]
        if self._route.weighting != "one":
            answer = answer * rows.tensors[self._route.weights]
        return prediction_of(self._runner.routes, {**rows.tensors, "logits": answer}, len(x))


def plan_margins(plan: Plan, tensors: Tensors) -> Tensors:
    """Return the margins of a plan's routing steps, as a :class:`Prediction` has them, by name.

    A step over one expert has none.
    """
    made = {}
    for step in plan.steps:
        if isinstance(step, RouteStep) and tensors[step.scores].shape[1] > 1:
            shape = (-1, *(int(size) for size in step.shape[1:-1]))
            made[margins_of(step)] = share_margins(tensors[step.scores]).reshape(shape)
    return made


def _last_pathways(plan: Plan) -> ExpertsStep | None:
    """Return the last step if it sends each image to one expert, whose answers are the logits."""
    last = plan.steps[-1]
    if not isinstance(last, ExpertsStep) or last.output != "logits":
        return None
    route = plan.route(last.layer)
    decided = {step.layer for step in plan.steps if isinstance(step, RouteStep)}
    whole = route.top_k == 1 and route.tokens is None and route.layer in decided
    return last if whole else None


def _bucket(rows: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Return how many of ``rows`` run at once, and to how many they are padded."""
    if not sizes:
        return rows, rows
    below = max(size for size in sizes if size <= rows)
    above = min((size for size in sizes if size >= rows), default=below)
    return (rows, above) if _WORTH_PADDING * above <= rows <= above else (below, below)


def _padded(rows: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Return ``rows``, and below them zeros up to a prepared size if that is worth it."""
    more = _bucket(len(rows), sizes)[1] - len(rows)
    return (
        np.concatenate([rows, np.zeros((more, *rows.shape[1:]), rows.dtype)]) if more > 0 else rows
    )
