"""ViT and V-MoE: two executions of one model, its dense twin, what a token may and may not do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.backbones.vit import Attention, MoEMlp, ViT, ViTMoE
from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, Surrogate, choose
from advmoe_deploy.specs import ModelSpec, VisionTransformer, build_spec

TOKENS = 16  # 8x8 pixels in patches of 2x2


def spec_of(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "family": "vit-moe",
        "backbone": "vit",
        "num_experts": 3,
        "weighting": "probability",
        "width": 8,
        "in_channels": 1,
        "image_size": 8,
        "mean": [0.3],
        "std": [0.4],
        "transformer": VisionTransformer(
            patch_size=2, depth=3, heads=2, mlp_ratio=2, moe_blocks=(0, 2)
        ),
    }
    return build_spec(**{**fields, **changes})


SPEC = spec_of()


def vit_moe(spec: ModelSpec = SPEC) -> ViTMoE:
    torch.manual_seed(1)
    model = build_model(spec).double()
    assert isinstance(model, ViTMoE)
    with torch.no_grad():  # tokens that differ and gates that decide: all experts are used
        for name, parameter in model.named_parameters():
            if is_router_parameter(name) or name == "backbone.positions":
                parameter *= 50
    return model


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(spec: ModelSpec, execution: str) -> dict[str, Tensor]:
    model = vit_moe(spec)
    routes = Routes(surrogate="probability", execution=execution)  # type: ignore[arg-type]
    logits = model(images(), routes)
    F.cross_entropy(logits, torch.arange(6)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"logits": logits, **gradients}


@pytest.mark.parametrize(
    ("top_k", "weighting"),
    [(1, "one"), (1, "probability"), (2, "probability"), (2, "renormalised")],
)
def test_grouped_equals_masked(top_k: int, weighting: str) -> None:
    spec = spec_of(top_k=top_k, weighting=weighting)
    grouped = outputs_and_gradients(spec, "grouped")
    for name, tensor in outputs_and_gradients(spec, "masked").items():
        torch.testing.assert_close(grouped[name], tensor, rtol=1e-9, atol=1e-12)


def test_each_token_is_routed_in_each_routed_block() -> None:
    routes = Routes()
    vit_moe()(images(), routes)
    assert list(routes.taken) == ["block-0", "block-2"] == [rule.layer for rule in SPEC_RULES]
    for routing in routes.taken.values():
        assert routing.expert_ids_NK.shape == (6 * TOKENS, 1)
        assert (routing.expert_load_E > 0).all()


SPEC_RULES = (
    RoutingRule("block-0", 3, 1, "probability"),
    RoutingRule("block-2", 3, 1, "probability"),
)


def test_rules_say_how_each_block_routes() -> None:
    assert vit_moe().rules == SPEC_RULES


def with_one_mlp(model: ViTMoE, expert: int) -> Classifier:
    """Return the dense twin that has ``expert``'s MLP wherever the model has a bank."""
    dense = build_model(model.spec.dense()).double()
    state = {}
    for name, tensor in model.state_dict().items():
        if f".experts.{expert}." in name:
            state[name.replace(f".experts.{expert}.", ".")] = tensor
        elif ".experts." not in name and ".gate." not in name:
            state[name] = tensor
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("expert", range(3))
def test_forced_expert_is_that_expert_alone(expert: int) -> None:
    model = vit_moe()
    expected = with_one_mlp(model, expert)(images())
    torch.testing.assert_close(model(images(), model.forced(expert)), expected)


def test_dense_twin_costs_one_expert_less_the_gate() -> None:
    spec = spec_of()
    model, dense = build_model(spec), build_model(spec.dense())
    bank = next(m for m in model.modules() if isinstance(m, MoEMlp))
    one_mlp, gate = _size(bank.experts[0]), _size(bank.gate)
    assert one_mlp == 8 * 16 + 16 + 16 * 8 + 8
    assert gate == 3 * 8
    assert _size(model) == _size(dense) + 2 * (2 * one_mlp + gate)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_ratio_scales_the_experts_and_of_a_dense_network_every_mlp() -> None:
    spec = spec_of(ratio=0.5)
    hidden = [block.mlp for block in vit_moe(spec).backbone.blocks]
    assert [_hidden(mlp) for mlp in hidden] == [8, 16, 8]
    for dense, expected in ((spec.dense(), 16), (spec.s_dense(), 8)):
        backbone = build_model(dense).get_submodule("backbone")
        assert isinstance(backbone, ViT)
        assert {_hidden(block.mlp) for block in backbone.blocks} == {expected}


def _hidden(mlp: nn.Module) -> int:
    return next(m.out_features for n, m in mlp.named_modules() if n.endswith("fc1"))  # type: ignore[return-value]


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    model = vit_moe().eval()
    alone = torch.cat([model(image[None]) for image in images()])
    torch.testing.assert_close(model(images()), alone, rtol=1e-10, atol=1e-12)


def test_a_dropped_token_keeps_only_its_residual() -> None:
    def drop_all(rule: RoutingRule, scores_NE: Tensor, surrogate: Surrogate | None) -> Routing:
        routing = choose(scores_NE, rule, surrogate)
        return Routing(scores_NE, routing.expert_ids_NK, torch.zeros_like(routing.weights_NK))

    block = vit_moe().backbone.blocks[0]
    x_NTD = torch.rand(2, TOKENS, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x_NTD, Routes(adjust=drop_all)), block.attend(x_NTD))
    assert not torch.allclose(block(x_NTD, Routes()), block.attend(x_NTD))


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(width=4, heads=2).double()
    x_TD = torch.rand(3, 4, dtype=torch.float64)
    query, key, value = attention.qkv(x_TD).chunk(3, dim=1)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        weights_TT = (query[:, head] @ key[:, head].T / 2**0.5).softmax(dim=1)
        heads.append(weights_TT @ value[:, head])
    expected = attention.out(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(x_TD[None])[0], expected)


def test_patches_become_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    backbone = ViT(SPEC.dense()).double()
    x_NCHW = images(1)
    tokens_TD = backbone.embed(x_NCHW)[0] - backbone.positions[0]
    patch = x_NCHW[0, 0, 2:4, 4:6]  # second row, third column: token 1 * 4 + 2
    expected_D = (backbone.patches.weight[:, 0] * patch).sum(dim=(1, 2)) + backbone.patches.bias
    torch.testing.assert_close(tokens_TD[6], expected_D)


def test_traces_with_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = build_model(SPEC.dense()).eval().double()
    batch = torch.export.Dim("batch", min=1, max=64)
    traced = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(traced.module()(images(5)), model(images(5)))


def test_training_reaches_gates_and_reduces_the_loss() -> None:
    model = vit_moe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(images()), torch.arange(6))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if is_router_parameter(name):
                assert parameter.grad is not None
                assert parameter.grad.abs().sum() > 0
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_cifar_size_is_the_default() -> None:
    spec = build_spec(family="dense", backbone="vit", transformer=VisionTransformer())
    assert (spec.width, spec.transformer) == (192, VisionTransformer(patch_size=4, depth=6))
    assert _size(build_model(spec)) == 2_693_194
