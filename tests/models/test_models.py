"""AdvMoE: two executions of one model, its pathways, and what it costs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.dispatch import Dispatch, run_experts
from advmoe_deploy.models.routing.routing import Routes, RoutingRule, choose, forced_route
from advmoe_deploy.specs import ModelSpec, build_spec
from tests.models.random_numbers import images

SPEC = build_spec(
    family="advmoe",
    num_experts=3,
    ratio=0.5,
    width=8,
    router_width=4,
    in_channels=1,
    image_size=8,
    mean=[0.3],
    std=[0.4],
)


def advmoe(spec: ModelSpec = SPEC) -> AdvMoE:
    torch.manual_seed(0)
    model = build_model(spec).double()
    assert isinstance(model, AdvMoE)
    with torch.no_grad():  # so that all experts are used
        model.eval()
        scores = model.score(images())
        model.router.fc.bias -= scores.mean(dim=0)
        model.router.fc.weight *= 20
        model.router.fc.bias *= 20
    return model


def outputs_and_gradients(execution: str, *, training: bool) -> dict[str, Tensor]:
    model = advmoe().train(training)
    routes = Routes(surrogate="probability", execution=execution)  # type: ignore[arg-type]
    x = images().requires_grad_(True)
    labels = torch.arange(24) % 10
    load = advmoe().train(training).route(x)["router"].expert_load_E
    assert (load > 0).sum() >= 2, "the test is empty unless several experts are used"
    logits = model(x, routes)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), [x, *named.values()])
    buffers = {name: b for name, b in model.named_buffers() if "running" in name}
    return {"logits": logits, "input": gradients[0], **buffers} | dict(
        zip(named, gradients[1:], strict=True)
    )


@pytest.mark.parametrize("training", [False, True])
def test_masked_and_grouped_execution_are_the_same_model(training: bool) -> None:
    masked = outputs_and_gradients("masked", training=training)
    grouped = outputs_and_gradients("grouped", training=training)
    for name, tensor in masked.items():
        torch.testing.assert_close(grouped[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    for name in ("router.fc.weight", "router.conv1.weight", "backbone.conv1.weight"):
        assert masked[name].abs().max() > 0, f"no gradient reaches {name}"


def test_a_pathway_is_the_model_with_that_route_forced() -> None:
    model = advmoe().eval()
    x = images()
    for expert in range(3):
        torch.testing.assert_close(model.pathway(expert)(x), model(x, model.forced(expert)))


def test_each_image_gets_the_answer_of_its_own_pathway() -> None:
    model = advmoe().eval()
    x = images()
    ids = model.route(x)["router"].expert_ids_NK[:, 0]
    by_pathway = torch.stack([model.pathway(e)(x) for e in range(3)])
    torch.testing.assert_close(model(x), by_pathway[ids, torch.arange(len(x))])


def test_grouped_rows_go_to_their_expert_and_come_back_in_order() -> None:
    # Expert 0 multiplies by 1, expert 1 by 10: a 1x1 convolution of one channel.
    routing = forced_route(torch.tensor([1, 0, 1]), 2, like=torch.zeros(1))
    weight = torch.tensor([1.0, 10.0])[:, None, None, None]
    rows = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    for execution in ("masked", "grouped"):
        dispatch = Dispatch(routing, execution)  # type: ignore[arg-type]
        y = dispatch.conv2d(dispatch.dispatch(rows), weight, stride=1, padding=0)
        assert dispatch.combine(y).flatten().tolist() == [10.0, 2.0, 30.0]


def test_a_tie_goes_to_the_first_expert_with_weight_one() -> None:
    routing = choose(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), RoutingRule("router", 2))
    assert routing.expert_ids_NK.tolist() == [[0], [1]]
    assert routing.weights_NK.tolist() == [[1.0], [1.0]]
    assert routing.margin_N.tolist() == [0.0, 2.0]


def test_macs_of_the_papers_resnet_18() -> None:
    macs = macs_of(build_spec(family="advmoe", num_experts=2, ratio=0.5))
    assert macs.dense == 555_422_720
    assert macs.s_dense == 139_299_328
    assert macs.selected == 151_718_400
    assert macs.router == 40_550_528
    assert macs.executed == macs.selected + macs.router
    assert macs.unfused == 338_545_280


def test_the_papers_router_has_269_202_parameters() -> None:
    model = build_model(build_spec(family="advmoe", num_experts=2, ratio=0.5))
    assert isinstance(model, AdvMoE)
    assert sum(p.numel() for p in model.router.parameters()) == 269_202


def test_top_k_weights_follow_the_rule() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0]]).log_softmax(dim=1)
    p = scores.exp()[0]
    probability = choose(scores, RoutingRule("gate", 3, 2, "probability"))
    assert probability.expert_ids_NK.tolist() == [[1, 2]]
    torch.testing.assert_close(probability.weights_NK[0], p[[1, 2]])
    renormalised = choose(scores, RoutingRule("gate", 3, 2, "renormalised"))
    torch.testing.assert_close(renormalised.weights_NK[0], p[[1, 2]] / (p[[1, 2]].sum() + 1e-5))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_whole_experts_grouped_and_masked_are_the_same(top_k: int) -> None:
    torch.manual_seed(0)
    experts = [torch.nn.Linear(4, 5).double() for _ in range(3)]
    x = torch.randn(16, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.nn.Linear(4, 3).double()
    rule = RoutingRule("gate", 3, top_k, "renormalised")
    results = []
    for execution in ("masked", "grouped"):
        y = run_experts(choose(gate(x), rule), x, experts, execution)  # type: ignore[arg-type]
        leaves = [x, gate.weight, *(e.weight for e in experts)]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for masked, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, masked)


def test_routes_overrule_a_gate_and_remember_what_was_taken() -> None:
    model = advmoe().eval()
    routes = Routes({"router": 2})
    model(images(), routes)
    assert routes.taken["router"].expert_load_E.tolist() == [0, 0, 24]
