"""Models without some of their experts: what they cost, how they route, and what is refused."""

import pytest
import torch

from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.unfused import unfused_graph
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.passes.report import PassReport
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.reference import Reference, reference_answers
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.specs import ModelSpec, build_spec
from advmoe_deploy.train.recipes import apply_overrides, recipe
from tests.export.pruned import ADVMOE, IMAGES, RENORMALISED
from tests.families import spec_of


def test_left_out_experts_are_not_counted() -> None:
    pruned = macs_of(ADVMOE.model_copy(update={"dropped_experts": {"router": (1,)}}))
    whole, two = macs_of(ADVMOE), macs_of(ADVMOE.model_copy(update={"num_experts": 2}))
    assert (pruned.executed, pruned.dense) == (whole.executed, whole.dense)
    assert pruned.unfused - pruned.router == two.unfused - two.router
    dropped = {"layer4.0.conv1": (0, 3), "layer4.0.conv2": (2,)}
    some = macs_of(RENORMALISED.model_copy(update={"dropped_experts": dropped}))
    conv1, conv2 = 9 * 32 * 64, 9 * 64 * 64  # on maps of one pixel
    whole = macs_of(RENORMALISED)
    assert some.executed == whole.executed
    assert whole.unfused - some.unfused == 2 * conv1 + conv2


def answers_alike(spec: ModelSpec) -> list[PassReport]:
    """Check every graph of an untrained ``spec`` against torch; return what went across."""
    model = untrained_model(spec, torch.from_numpy(IMAGES))
    expected, rounding = reference_answers(model, IMAGES), Reference(model).rounding(IMAGES)
    parts, reports = apply_passes(partition(model), IMAGES, model.rules)
    routes = parts.plan.routes
    graphs = (graph_from_plan(parts.plan, parts.graphs), unfused_graph(parts.plan, parts.graphs))
    for graph in graphs:
        with GraphRunner(graph.SerializeToString(), spec.image_shape, routes=routes) as runner:
            assert compare_answers(expected, runner.infer(IMAGES), rounding=rounding).passed
    return [*reports["plan"]]


@pytest.mark.parametrize(
    ("spec", "dropped"),
    [
        (ADVMOE, {"router": (0, 2)}),
        (spec_of("conv experts"), {"layer4.0.conv1": (0,), "layer4.0.downsample.0": (2,)}),
        (spec_of("token experts"), {"block-0": (1,), "block-1": (0,)}),
        (spec_of("dual model"), {"robust": (0,)}),
    ],
    ids=["one is left", "gates without a linear layer", "tokens", "one router of two"],
)
def test_any_gate_loses_scores(spec: ModelSpec, dropped: dict[str, tuple[int, ...]]) -> None:
    reports = answers_alike(spec.model_copy(update={"dropped_experts": dropped}))
    assert reports[0] == PassReport("drop_experts", len(dropped))


@pytest.mark.parametrize(
    ("dropped", "says"),
    [
        ({"router": (3,)}, "ids below num_experts=3"),
        ({"router": (1, 0)}, "in ascending order"),
        ({"router": (1, 1)}, "in ascending order"),
        ({"router": (0, 1, 2)}, "fewer than top_k=1; drop fewer"),
    ],
)
def test_nonsense_is_refused(dropped: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_spec(**{**ADVMOE.model_dump(), "dropped_experts": dropped})


def test_only_routed_layers_drop_experts() -> None:
    spec = ADVMOE.model_copy(update={"dropped_experts": {"layer1": (0,)}})
    with pytest.raises(UsageError, match="layer1, which is no routed layer; those are router"):
        build_model(spec)


def test_dense_counterparts_drop_nothing() -> None:
    spec = ADVMOE.model_copy(update={"dropped_experts": {"router": (0,)}})
    assert spec.dense().dropped_experts == spec.s_dense().dropped_experts == {}
    assert build_model(spec).pathway(1).spec.dropped_experts == {}


def test_training_drops_nothing() -> None:
    with pytest.raises(UsageError, match="says what an export left out; train all experts"):
        apply_overrides(recipe("digits-advmoe"), ['model.dropped_experts={"router":[1]}'])


def test_a_dropped_expert_is_never_chosen() -> None:
    torch.manual_seed(0)
    model = build_model(ADVMOE.model_copy(update={"dropped_experts": {"router": (0, 2)}})).eval()
    routing = model.route(torch.from_numpy(IMAGES))["router"]
    assert routing.expert_load_E.tolist() == [0, len(IMAGES), 0]
    assert torch.isinf(routing.margin_N).all()
    assert model.experts_in_use == (1,)
    preferred = reference_answers(model, IMAGES, preferred=0).routes["router"]
    assert (preferred.expert_ids == 1).all()
