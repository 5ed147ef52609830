"""Robust Experts: where the experts are, two executions of one model, what a gate sees."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import is_router_parameter
from advmoe_deploy.models.families.robust_experts import BatchNorm2d, ExpertBank, RobustExperts
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.gates import build_gate
from advmoe_deploy.models.routing.routing import Routes, Routing, forced_route
from advmoe_deploy.specs import ModelSpec, build_spec

GATES = ["gap-fc", "conv-gap", "conv3-gap", "double-conv", "fixed-gap-fc", "fixed-conv-gap"]


def spec_of(**changes: object) -> ModelSpec:
    layers = {"kind": "conv", "layers": ["layer4.1"], "gate": "gap-fc"}
    for key in layers.keys() & changes.keys():
        layers[key] = changes.pop(key)
    weighting = "one" if changes.get("top_k", 1) == 1 else "renormalised"
    fields = {
        "family": "robust-experts",
        "num_experts": 4,
        "weighting": weighting,
        "width": 8,
        "image_size": 8,
        "in_channels": 1,
        "mean": [0.3],
        "std": [0.4],
    }
    return build_spec(**{**fields, **changes, "expert_layers": layers})


def images(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_of(spec: ModelSpec) -> RobustExperts:
    """A model in double whose experts are all about equally likely, and whose norms fit."""
    torch.manual_seed(0)
    model = build_model(spec).double().train()
    assert isinstance(model, RobustExperts)
    for _ in range(3):
        model(images(32))
    for module in model.modules():
        if isinstance(module, ExpertBank) and isinstance(module.gate, nn.Sequential):
            # Centred, or one expert would win everywhere.
            seen: list[Tensor] = []
            handle = module.gate.register_forward_hook(lambda _, __, y, s=seen: s.append(y))
            model.eval()(images())
            handle.remove()
            shift = seen[0].detach().mean(dim=0)
            module.gate.append(Centre(shift, 20 / float(seen[0].detach().std())))
    return model.eval()


class Centre(nn.Module):
    def __init__(self, shift: Tensor, scale: float) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, scores: Tensor) -> Tensor:
        return (scores - self.shift) * self.scale / 10


def run(model: RobustExperts, execution: str) -> dict[str, Tensor]:
    x = images().requires_grad_(True)
    routes = Routes(surrogate="probability", execution=execution)
    logits = model(x, routes)
    named = dict(model.named_parameters())
    loss = F.cross_entropy(logits, torch.arange(len(x)) % 10)
    gradients = torch.autograd.grad(loss, [x, *named.values()], materialize_grads=True)
    results = dict(zip(["input", *named], gradients, strict=True)) | {"logits": logits.detach()}
    for layer, routing in routes.taken.items():
        results[f"{layer} ids"] = routing.expert_ids_NK
    return results


@pytest.mark.parametrize("kind", ["block", "conv"])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(2, 1), (2, 2), (4, 1), (4, 3), (8, 2), (16, 4), (32, 1)]
)
def test_masked_and_grouped_execution_are_the_same_model(
    kind: str, num_experts: int, top_k: int
) -> None:
    model = model_of(spec_of(kind=kind, num_experts=num_experts, top_k=top_k))
    masked, grouped = run(model, "masked"), run(model, "grouped")
    for name, tensor in masked.items():
        torch.testing.assert_close(grouped[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
    ids = [ids for name, ids in masked.items() if name.endswith(" ids")]
    assert max(len(i.unique()) for i in ids) > 1, "the test is empty if one expert serves all"
    gates = [name for name in masked if ".gate." in name]
    assert gates
    if top_k < num_experts:
        assert all(masked[name].abs().max() > 0 for name in gates)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_a_conv_moe_the_same_either_way(gate: str) -> None:
    # BatchNorm behind a bank of convolutions sees the whole batch, grouped or not.
    model = model_of(spec_of(layers=["layer3", "layer4.0.conv2"], gate=gate, top_k=2)).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    masked = run(model, "masked")
    model.load_state_dict(state)
    grouped = run(model, "grouped")
    for name, tensor in masked.items():
        torch.testing.assert_close(grouped[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_norms_of_block_experts_see_their_own_rows_only() -> None:
    model = model_of(spec_of(kind="block", layers=["layer4.1"])).train()
    bank = model.get_submodule("layer4.1")
    assert isinstance(bank, ExpertBank)
    seen = [e.get_submodule("bn1").num_batches_tracked.item() for e in bank.experts]
    routes = Routes()
    model(images(), routes)
    used = routes.taken["layer4.1"].expert_load_E > 1
    after = [e.get_submodule("bn1").num_batches_tracked.item() for e in bank.experts]
    assert [a - b for a, b in zip(after, seen, strict=True)] == used.int().tolist()


@pytest.mark.parametrize("kind", ["block", "conv"])
def test_a_forced_expert_is_the_dense_network_with_that_expert(kind: str) -> None:
    model = model_of(spec_of(kind=kind, layers=["layer4"]))
    for expert in range(4):
        forced = model(images(), model.forced(expert))
        dense = model_of(spec_of(kind=kind, layers=["layer4"]))
        for rule in dense.rules:
            bank = model.get_submodule(rule.layer)
            assert isinstance(bank, ExpertBank)
            dense.set_submodule(rule.layer, Chosen(bank.experts[expert], kind))
        torch.testing.assert_close(dense(images()), forced)


class Chosen(nn.Module):
    def __init__(self, expert: nn.Module, kind: str) -> None:
        super().__init__()
        self.expert, self.kind = expert, kind

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        return self.expert(x)


@pytest.mark.parametrize(
    ("backbone", "kind", "layers", "expected"),
    [
        ("resnet18", "block", ["layer4"], ["layer4.0", "layer4.1"]),
        ("resnet18", "block", ["layer4.1", "layer3.0"], ["layer3.0", "layer4.1"]),
        ("resnet18", "conv", ["layer4.1"], ["layer4.1.conv1", "layer4.1.conv2"]),
        ("resnet18", "conv", ["layer4.1.conv2"], ["layer4.1.conv2"]),
        (
            "resnet18",
            "conv",
            ["layer4.0"],
            ["layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0"],
        ),
        (
            "resnet50",
            "conv",
            ["layer4.2", "layer3.5.conv2"],
            ["layer3.5.conv2", "layer4.2.conv1", "layer4.2.conv2", "layer4.2.conv3"],
        ),
    ],
)
def test_every_routed_layer_answers(
    backbone: str, kind: str, layers: list[str], expected: list[str]
) -> None:
    model = model_of(spec_of(backbone=backbone, kind=kind, layers=layers))
    routes = Routes()
    assert model(images(3), routes).shape == (3, 10)
    assert list(routes.taken) == [rule.layer for rule in model.rules] == expected
    for routing in routes.taken.values():
        assert routing.scores_NE.shape == (3, 4)
        assert (routing.weights_NK == 1).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": ["layer4.2"]}, "'layer4.2' names no conv of resnet18"),
        ({"layers": ["layer4.1.downsample.0"]}, "names no conv of resnet18"),
        ({"layers": ["layer4.0.conv3"]}, "names no conv of resnet18"),
        ({"layers": ["layer1.0.downsample.0"]}, "names no conv of resnet18"),
        ({"layers": ["layer5"]}, "use layer1 to layer4"),
        ({"layers": ["layer"]}, "use layer1 to layer4"),
        ({"kind": "block", "layers": ["layer4.1.conv1"]}, "layer4.0, layer4.1"),
        ({"layers": ["layer4", "layer3.6"], "backbone": "resnet50"}, "'layer3.6' names no conv"),
        ({"layers": ["layer1"], "num_experts": 16, "gate": "fixed-conv-gap"}, "raise width"),
        ({"ratio": 0.5}, "ratio=1, not 0.5"),
        ({"top_k": 5}, "top_k=5 exceeds num_experts=4"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_in_one_line(
    changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        spec_of(**changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gates_by_hand() -> None:
    # Channel means 1 and 4.
    x = torch.stack([torch.ones(4, 4), torch.arange(16.0).view(4, 4) - 3.5])[None]
    gap = build_gate("gap-fc", 2, 3)
    nn.init.ones_(gap[2].weight)
    nn.init.zeros_(gap[2].bias)
    torch.testing.assert_close(gap(x), torch.full((1, 3), 5.0))
    assert build_gate("fixed-conv-gap", 2, 2)(x).tolist() == [[1.0, 4.0]]
    conv3 = build_gate("conv3-gap", 2, 3)
    conv3[0].weight.data.fill_(1.0)
    torch.testing.assert_close(conv3(x), torch.full((1, 3), 45.0))  # 9 * (1 + 4), no border


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_gates_score_maps_of_any_size(gate: str, size: int) -> None:
    scores = build_gate(gate, 8, 4).eval()(torch.rand(5, 8, size, size))
    assert scores.shape == (5, 4)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("gate", GATES)
def test_fixed_gates_have_no_parameters_and_are_saved(gate: str) -> None:
    model = build_model(spec_of(gate=gate))
    trained = [name for name, _ in model.named_parameters() if is_router_parameter(name)]
    saved = [name for name in model.state_dict() if is_router_parameter(name)]
    assert saved
    assert bool(trained) == (not gate.startswith("fixed"))


@pytest.mark.parametrize("gate", ["fixed-gap-fc", "fixed-conv-gap"])
def test_fixed_gates_keep_the_gradient_of_their_input(gate: str) -> None:
    x = torch.rand(2, 8, 2, 2, requires_grad=True)
    build_gate(gate, 8, 4)(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_a_single_value_per_channel_meets_the_running_statistics() -> None:
    norm = BatchNorm2d(2).train()
    assert norm.running_mean is not None
    norm.running_mean += 1
    x = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([2.0, 4.0]), rtol=1e-4, atol=0)
    assert norm.running_mean.tolist() == [1.0, 1.0]
    two = torch.cat([x, x + 2])
    torch.testing.assert_close(norm(two), F.batch_norm(two, None, None, training=True))


def test_a_training_step_survives_an_expert_with_one_row() -> None:
    model = build_model(spec_of(kind="block", layers=["layer4"])).double().train()
    routes = Routes({"layer4.0": one_row_for_expert_1(6), "layer4.1": one_row_for_expert_1(6)})
    model(images(6), routes).sum().backward()
    bank = model.get_submodule("layer4.1")
    assert isinstance(bank, ExpertBank)
    gradient = bank.experts[1].get_submodule("conv1").weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()


def one_row_for_expert_1(n: int) -> Routing:
    ids = torch.zeros(n, dtype=torch.int64)
    ids[0] = 1
    return forced_route(ids, 4, like=torch.zeros(1, dtype=torch.float64))


def test_imagenet_stem_shrinks_the_image_fourfold() -> None:
    model = build_model(spec_of(stem="imagenet", image_size=64))
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 10)
    assert model.conv1.stride == (2, 2)
