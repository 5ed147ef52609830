"""Whole networks as experts, and the dual model: executions, routes, the blend."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.families.dual import DualModel, ExpertNetworks, second_expert
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes, RoutingRule, choose, forced_route
from advmoe_deploy.specs import ModelSpec, VisionTransformer, build_spec
from tests.models.random_numbers import images

VIT = {
    "backbone": "vit",
    "width": 8,
    "transformer": VisionTransformer(patch_size=4, depth=1, heads=2, mlp_ratio=2),
}
RESNET = {"backbone": "resnet18", "width": 4}


def spec_of(family: str, **changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "family": family,
        "num_experts": 3,
        "in_channels": 1,
        "image_size": 8,
        "mean": [0.3],
        "std": [0.4],
        "alpha": 0.7 if family == "dual-model" else None,
        **RESNET,
    }
    return build_spec(**{**fields, **changes})


def built(spec: ModelSpec) -> Classifier:
    torch.manual_seed(0)
    model = build_model(spec).double().eval()
    with torch.no_grad():  # so that all experts are used
        for mixture in model.modules():
            if isinstance(mixture, ExpertNetworks):
                mixture.router.bias -= mixture.score(images()).mean(dim=0)
    return model


def experts(**changes: object) -> ExpertNetworks:
    model = built(spec_of("expert-networks", **changes))
    assert isinstance(model, ExpertNetworks)
    return model


def dual(**changes: object) -> DualModel:
    model = built(spec_of("dual-model", **changes))
    assert isinstance(model, DualModel)
    return model


LABELS = torch.arange(24) % 10


def outputs_and_gradients(model: Classifier, execution: str) -> dict[str, Tensor]:
    routes = Routes(surrogate="probability", execution=execution)  # type: ignore[arg-type]
    logits = model(images(), routes)
    for routing in routes.taken.values():
        assert (routing.expert_load_E > 0).all()
    F.cross_entropy(logits, LABELS).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"logits": logits, **gradients}


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet18", "vit"])
@pytest.mark.parametrize("family", ["expert-networks", "dual-model"])
def test_grouped_equals_masked(family: str, backbone: dict[str, object]) -> None:
    spec = spec_of(family, **backbone)
    grouped = outputs_and_gradients(built(spec), "grouped")
    for name, tensor in outputs_and_gradients(built(spec), "masked").items():
        torch.testing.assert_close(grouped[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet18", "vit"])
@pytest.mark.parametrize("expert", range(3))
def test_forced_expert_is_that_expert_alone(expert: int, backbone: dict[str, object]) -> None:
    model = experts(**backbone)
    alone = model.pathway(expert)
    assert alone.spec == model.spec.s_dense()
    torch.testing.assert_close(model(images(), model.forced(expert)), alone(images()))


def test_each_image_is_answered_by_the_expert_it_is_routed_to() -> None:
    model = experts()
    ids_N = model.route(images())["router"].expert_ids_NK[:, 0]
    every_EN = torch.stack([model.pathway(e)(images()) for e in range(3)])
    torch.testing.assert_close(model(images()), every_EN[ids_N, torch.arange(24)])


def test_router_is_linear_in_the_normalised_image() -> None:
    model = experts()
    flat = ((images() - 0.3) / 0.4).flatten(1)
    expected = flat @ model.router.weight.T + model.router.bias
    torch.testing.assert_close(model.route(images())["router"].scores_NE, expected)


def test_dual_model_blends_logits() -> None:
    model = dual(alpha=0.25)
    expected = 0.75 * model.standard(images()) + 0.25 * model.robust(images())
    torch.testing.assert_close(model(images()), expected)


def test_dual_model_has_two_routers_and_shares_its_parts() -> None:
    model = dual()
    assert model.rules == (RoutingRule("standard", 3), RoutingRule("robust", 3))
    assert {name for name, _ in model.named_parameters() if is_router_parameter(name)} == {
        f"{part}.router.{kind}" for part in ("standard", "robust") for kind in ("weight", "bias")
    }
    assert isinstance(model.robust, ExpertNetworks)
    assert model.robust.spec == spec_of("expert-networks")
    routes = Routes({"standard": 2})
    model(images(), routes)
    assert set(routes.taken) == {"standard", "robust"} == set(model.route(images()))
    assert (routes.taken["standard"].expert_ids_NK == 2).all()
    ids_NK = model.route(images())["robust"].expert_ids_NK
    torch.testing.assert_close(routes.taken["robust"].expert_ids_NK, ids_NK)


@pytest.mark.parametrize("family", ["expert-networks", "dual-model"])
def test_an_image_does_not_depend_on_its_neighbours(family: str) -> None:
    model = built(spec_of(family))
    alone = torch.cat([model(image[None]) for image in images()])
    torch.testing.assert_close(model(images()), alone, rtol=1e-10, atol=1e-12)


def test_second_expert_is_the_runner_up_and_ties_go_to_the_lowest() -> None:
    scores_NE = torch.tensor([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    routing = choose(scores_NE, RoutingRule("router", 3))
    assert second_expert(routing).tolist() == [2, 2, 1]


@pytest.mark.parametrize("family", ["expert-networks", "dual-model"])
def test_training_reduces_the_loss_and_reaches_the_router(family: str) -> None:
    model = built(spec_of(family)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images(), Routes(surrogate="probability")), LABELS)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if is_router_parameter(name):
                assert parameter.grad is not None
                assert parameter.grad.abs().sum() > 0
        optimizer.step()
    assert losses[-1] < losses[0]


def test_one_image_for_an_expert_does_not_stop_training() -> None:
    # Its last maps are 1x1: one value per channel, of which no variance can be taken.
    model = experts().train()
    routing = forced_route(torch.tensor([0] * 23 + [1]), 3, like=images())
    logits = model(images(), Routes({"router": routing}))
    F.cross_entropy(logits, LABELS).backward()
    gradient = model.experts[1].get_submodule("linear").weight.grad
    assert isinstance(gradient, Tensor)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_s_dense_is_one_expert() -> None:
    model = experts(ratio=0.5)
    s_dense = build_model(model.spec.s_dense())
    sizes = {name: p.shape for name, p in s_dense.get_submodule("backbone").named_parameters()}
    assert {name: p.shape for name, p in model.experts[0].named_parameters()} == sizes
