"""Every family exports, and both engines answer what torch answers: logits, routes, weights."""

import numpy as np
import onnx
import pytest
import torch

from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.runtime.select import ENGINES, ON_GPU, open_runner
from tests.families import FAMILIES, Families, spec_of

IMAGES = np.random.default_rng(1).random((24, 1, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ON_GPU])
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_answer_what_torch_answers(families: Families, family: str, engine: str) -> None:
    run, bundle = families[family]
    _, model = load_checkpoint(run / "model")
    with open_runner(bundle, engine, threads=1) as runner:
        single = runner.infer(IMAGES[:1])
        whole = runner.infer(IMAGES)
    expected, rounding = reference_answers(model, IMAGES), bundle.manifest.parity.rounding
    report = compare_answers(expected, whole, rounding=rounding)
    assert report.passed
    assert report.compared == len(IMAGES)
    assert [layer.layer for layer in report.layers] == [rule.layer for rule in model.rules]
    np.testing.assert_allclose(single.logits, whole.logits[:1], rtol=0, atol=1e-5)
    with torch.inference_mode():
        routings = model.route(torch.from_numpy(IMAGES))
    for layer, routing in routings.items():
        ids_RK, weights_RK = routing.expert_ids_NK.numpy(), routing.weights_NK.numpy()
        top_k = ids_RK.shape[1]
        np.testing.assert_array_equal(whole.expert_ids[layer].reshape(-1, top_k), ids_RK)
        np.testing.assert_allclose(whole.weights[layer].reshape(-1, top_k), weights_RK, atol=1e-5)


def test_outputs_are_named_and_shaped_by_layer(
    families: Families,
) -> None:
    _, bundle = families["token experts"]
    graph = onnx.load_model(bundle.file("model.onnx")).graph
    shapes = {
        out.name: [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim]
        for out in graph.output
    }
    assert shapes == {
        "logits": ["N", 10],
        "block-0.expert_ids": ["N", 4, 2],
        "block-0.weights": ["N", 4, 2],
        "block-1.expert_ids": ["N", 4, 2],
        "block-1.weights": ["N", 4, 2],
    }
    with open_runner(bundle) as runner:
        answer = runner.infer(IMAGES)
    assert answer.expert_ids["block-1"].shape == (24, 4, 2)
    with np.load(bundle.file("golden.npz")) as golden:
        assert golden["block-0.scores"].shape[1:] == (4, 3)
        assert golden["block-0.weights"].shape == golden["block-0.expert_ids"].shape


def test_layers_that_read_one_tensor_are_routed_side_by_side(
    families: Families,
) -> None:
    _, bundle = families["conv experts"]
    steps = bundle.manifest.plan.steps
    kinds = [step.kind for step in steps]
    assert kinds[:5] == ["run", "route", "route", "experts", "experts"]
    assert kinds[5:] == ["run", "route", "experts", "run"]
    first, downsample = steps[3], steps[4]
    assert (first.layer, downsample.layer) == ("layer4.0.conv1", "layer4.0.downsample.0")
    assert first.input == downsample.input
    segment = bundle.manifest.plan.segment("trunk-1")
    assert {t.name for t in segment.inputs} == {first.output, downsample.output}


def test_experts_of_full_width_have_no_smaller_baseline(
    families: Families,
) -> None:
    for family in ("token experts", "dual model"):
        _, bundle = families[family]
        assert bundle.has("baselines/dense.onnx")
        assert bundle.has("baselines/unfused.onnx")
        assert not bundle.has("baselines/s-dense.onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_says_what_it_is(families: Families, family: str) -> None:
    _, bundle = families[family]
    card = bundle.file("MODEL_CARD.md").read_text()
    for route in bundle.manifest.plan.routes:
        assert f"| {route.layer} |" in card
    words = {"token experts": "each token goes to 2", "dual ViT": "logits is 0.25"}
    assert words.get(family, spec_of(family).backbone) in card
