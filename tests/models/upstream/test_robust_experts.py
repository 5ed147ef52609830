"""Checkpoints of the released Robust Experts code: the same answers, and specs from shapes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from advmoe_deploy.errors import AdvMoEError, CheckpointError, UsageError
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.models.upstream.robust_experts import convert
from advmoe_deploy.specs import ExpertLayers, ModelSpec, build_spec
from tests.upstream_fixture import case_of, fill

CASES = {
    "experts-block-layer4-e8-k1": ExpertLayers(kind="block", layers=("layer4",), gate="conv-gap"),
    "experts-block-layer4.1-e4-k2": ExpertLayers(kind="block", layers=("layer4.1",), gate="gap-fc"),
    "experts-conv-layer4-e4-k2": ExpertLayers(kind="conv", layers=("layer4",), gate="conv-gap"),
    "experts-conv-layer4.1-e4-k1": ExpertLayers(kind="conv", layers=("layer4.1",), gate="gap-fc"),
}


def dense_weights(routing: Routing) -> Tensor:
    return torch.zeros_like(routing.scores_NE).scatter(1, routing.expert_ids_NK, routing.weights_NK)


@pytest.mark.parametrize(("name", "layers"), CASES.items())
def test_the_released_codes_answers(name: str, layers: ExpertLayers) -> None:
    about, state, answers = case_of(name)
    spec, weights = convert(state, {"top_k": about["kwargs"]["k"]})
    assert spec.expert_layers == layers
    assert spec.num_experts == about["kwargs"]["num_experts"]
    model = build_model(spec).eval()
    model.load_state_dict(weights)
    routes = Routes()
    with torch.no_grad():
        logits = model(torch.from_numpy(answers["x"]), routes)
    np.testing.assert_allclose(logits, answers["logits"], rtol=1e-5, atol=1e-5)
    gates = [gate.removeprefix("model.").removesuffix(".gate") for gate in about["gates"]]
    assert list(routes.taken) == gates
    for index, routing in enumerate(routes.taken.values()):
        scores, chosen = answers[f"gate{index}_scores"], answers[f"gate{index}_weights"]
        # There a gate's scores are probabilities already.
        np.testing.assert_allclose(
            torch.softmax(routing.scores_NE, dim=1), scores, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(dense_weights(routing), chosen, rtol=1e-5, atol=1e-5)
        assert routing.expert_ids_NK[:, 0].tolist() == chosen.argmax(axis=1).tolist()


def spec_of(**changes: object) -> ModelSpec:
    layers = {"kind": "conv", "layers": ("layer4.1",), "gate": "gap-fc"}
    for key in layers.keys() & changes.keys():
        layers[key] = changes.pop(key)  # type: ignore[assignment]
    fields = {"family": "robust-experts", "num_experts": 4, "width": 8, "expert_layers": layers}
    return build_spec(**{**fields, **changes})


def released(spec: ModelSpec, *, seed: int, prefix: str = "model.") -> dict[str, Tensor]:
    """A state dict of the released code's form, filled from its names."""
    state = {}
    layers = spec.expert_layers
    assert layers is not None
    for ours, tensor in build_model(spec).state_dict().items():
        name = prefix + ours.replace(".gate.", ".gate.network.")
        if layers.gate == "fixed-conv-gap" and ".gate." in ours:
            continue
        if layers.gate == "fixed-gap-fc" and ".gate." in ours:
            name = name.replace("2.weight", "support_vectors")
        state[name] = torch.from_numpy(fill(name, tuple(tensor.shape), seed)).to(tensor.dtype)
    return state


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(),
        spec_of(num_experts=2, num_classes=3, kind="block", layers=("layer3.0", "layer4")),
        spec_of(num_experts=16, layers=("layer4.0.conv2", "layer4.0.downsample.0")),
        spec_of(num_experts=3, layers=("layer2",), gate="conv3-gap", width=6),
        spec_of(kind="block", gate="double-conv", in_channels=1, mean=(0.0,), std=(1.0,)),
        spec_of(gate="fixed-gap-fc"),
        spec_of(gate="fixed-conv-gap"),
        spec_of(kind="block", gate="fixed-conv-gap"),
        spec_of(gate="conv-gap", stem="imagenet", image_size=224),
        spec_of(backbone="resnet50", layers=("layer4",)),
        spec_of(backbone="resnet50", kind="block", layers=("layer3.5",), num_experts=8),
    ],
    ids=lambda spec: f"{spec.backbone}-{spec.expert_layers.kind}-{spec.expert_layers.gate}",
)
@pytest.mark.parametrize("prefix", ["", "model.", "model.model."])
def test_other_seeds_and_sizes(spec: ModelSpec, prefix: str) -> None:
    state = released(spec, seed=7, prefix=prefix)
    found, weights = convert(state, {})
    assert found == spec
    model = build_model(found).eval()
    model.load_state_dict(weights)
    for name, tensor in state.items():
        stripped = name.removeprefix(prefix).replace(".network.", ".")
        ours = weights[stripped.replace("support_vectors", "2.weight")]
        assert torch.equal(ours, tensor)
    assert torch.isfinite(model(torch.rand(2, spec.in_channels, 16, 16))).all()


def test_what_the_file_cannot_tell() -> None:
    state = released(spec_of(), seed=1)
    told = {"top_k": "2", "image_size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    spec, _ = convert(state, told)
    assert (spec.top_k, spec.weighting, spec.image_size) == (2, "renormalised", 8)
    assert spec.mean == (0.5, 0.5, 0.5)
    assert convert(state, {"weighting": "renormalised"})[0].weighting == "renormalised"


def test_what_lies_beside_the_network_is_left_out() -> None:
    state = released(spec_of(), seed=1)
    beside = {f"attack_module.{name}": tensor for name, tensor in state.items()}
    spec, weights = convert(state | beside, {})
    assert weights.keys() == build_model(spec).state_dict().keys()


def without_experts() -> dict[str, Tensor]:
    state = released(spec_of(), seed=1)
    return {name: t for name, t in state.items() if ".experts." not in name}


def with_a_block_more() -> dict[str, Tensor]:
    return released(spec_of(), seed=1) | {"model.layer3.2.conv1.weight": torch.zeros(1)}


def with_an_expert_more() -> dict[str, Tensor]:
    return released(spec_of(), seed=1) | {"model.layer4.1.conv1.experts.4.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "no conv1.weight"),
        ({"conv1.weight": torch.zeros(8, 3, 3, 3)}, "no fc.weight"),
        (without_experts(), "none"),
        (with_a_block_more(), "2-2-3-2 basic blocks"),
        (with_an_expert_more(), "layer4.1.conv1 (5), layer4.1.conv2 (4)"),
        ({**released(spec_of(), seed=1), "model.conv1.weight": torch.zeros(8)}, "conv1.weight is"),
    ],
)
def test_another_file_is_refused(state: dict[str, Tensor], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(state, {})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"topk": 2}, "did you mean top_k"),
        ({"top_k": 5}, "exceeds num_experts=4"),
        ({"top_k": 2, "weighting": "one"}, "weighting 'one' is for top_k=1"),
        ({"gate": "gap"}, "gate"),
    ],
)
def test_nonsense_overrides_are_refused(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(AdvMoEError) as caught:
        convert(released(spec_of(), seed=1), overrides)
    assert isinstance(caught.value, UsageError)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
