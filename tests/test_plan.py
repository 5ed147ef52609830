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


def renamed(segment: Segment, **changes: object) -> Segment:
    """Return ``segment`` with another output."""
    output = segment.outputs[0].model_copy(update=changes)
    return segment.model_copy(update={"outputs": (output,)})


@pytest.mark.parametrize(
    ("segments", "steps", "reason"),
    [
        ((ROUTER, *EXPERTS), (RUN, ROUTE, ROUTE, SEND), "'router.expert_ids' is made twice"),
        ((ROUTER, *EXPERTS), (RUN, RUN, ROUTE, SEND), "'scores' is made twice"),
        (
            (renamed(ROUTER, shape=("N", 3)), *EXPERTS),
            (RUN, ROUTE, SEND),
            r"routes scores of shape \('N', 3\)",
        ),
        (
            (ROUTER, *EXPERTS),
            (RUN, ROUTE.model_copy(update={"tokens": 4}), SEND),
            r"not \('4\*N', 2\)",
        ),
        (
            (ROUTER, EXPERTS[0], renamed(EXPERTS[1], shape=("R", 11))),
            (RUN, ROUTE, SEND),
            "not of one shape",
        ),
        (
            (ROUTER, *EXPERTS),
            (RUN, ROUTE, SEND.model_copy(update={"input": "scores"})),
            "was made",
        ),
    ],
)
def test_tensors_are_read_as_they_were_made(
    segments: tuple[Segment, ...], steps: tuple[RunStep, ...], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        Plan(segments=segments, steps=steps)


def test_a_plan_knows_every_tensor() -> None:
    tokens = RouteStep(
        layer="b", scores="scores", num_experts=3, top_k=2, weighting="renormalised", tokens=16
    )
    scores = TensorInfo(name="scores", dtype="float32", shape=("16*N", 3))
    plan = Plan(
        segments=(Segment(name="s", file="s.onnx", inputs=(IMAGE,), outputs=(scores,)),),
        steps=(RunStep(segment="s"), tokens),
        outputs=("b.expert_ids",),
    )
    assert plan.tensors()["images"] == IMAGE
    assert plan.tensors()["b.expert_ids"].shape == ("N", 16, 2)
    assert plan.tensors()["b.weights"].dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"top_k": 3, "weighting": "probability"}, "top_k=3 exceeds num_experts=2"),
        ({"top_k": 2}, "weighting 'one' is for top_k=1"),
    ],
)
def test_a_route_that_cannot_be_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RouteStep(layer="router", scores="scores", num_experts=2, **fields)
