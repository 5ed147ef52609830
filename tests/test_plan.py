"""A plan refuses steps that do not fit together."""

import pytest
from pydantic import ValidationError

from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Segment, TensorInfo

IMAGE = TensorInfo(name="images", dtype="float32", shape=("N", 1, 8, 8))
SCORES = TensorInfo(name="scores", dtype="float32", shape=("N", 2))
LOGITS = TensorInfo(name="logits", dtype="float32", shape=("N", 10))
ROUTER = Segment(name="router", file="r.onnx", inputs=(IMAGE,), outputs=(SCORES,))
EXPERTS = tuple(
    Segment(
        name=f"e{i}",
        file=f"e{i}.onnx",
        inputs=(TensorInfo(name="images", dtype="float32", shape=("R", 1, 8, 8)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=("R", 10)),),
    )
    for i in range(2)
)
RUN = RunStep(segment="router")
ROUTE = RouteStep(layer="router", scores="scores", num_experts=2)
SEND = ExpertsStep(layer="router", input="images", output="logits", segments=("e0", "e1"))


def test_a_sound_plan_survives_json() -> None:
    plan = Plan(segments=(ROUTER, *EXPERTS), steps=(RUN, ROUTE, SEND))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert plan.routes == (ROUTE,)


@pytest.mark.parametrize(
    ("segments", "steps", "reason"),
    [
        ((ROUTER, ROUTER), (RUN,), "share a name"),
        ((ROUTER, *EXPERTS), (ROUTE, RUN, SEND), "needs"),
        ((ROUTER, *EXPERTS), (RUN, SEND), "no routes"),
        ((ROUTER, *EXPERTS), (RUN, ROUTE), "no step makes the outputs"),
        ((ROUTER, EXPERTS[0]), (RUN, ROUTE, SEND), "no segment is called 'e1'"),
        (EXPERTS, (RUN, ROUTE, SEND), "no segment is called 'router'"),
        (
            (ROUTER, *EXPERTS),
            (RUN, ROUTE, SEND.model_copy(update={"segments": ("e0",)})),
            "1 expert segments and 2 routes",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    segments: tuple[Segment, ...], steps: tuple[RunStep, ...], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        Plan(segments=segments, steps=steps)
