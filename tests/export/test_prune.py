"""Experts that no image visits are left out where that is asked for, and the bundle says so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run as run_cli
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.precision.gate import ATTACK
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.select import ENGINES, ON_GPU, open_runner
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.verify.verify import verify_bundle
from tests.conftest import OPENVINO, Notes, write_run
from tests.export.pruned import ADVMOE, IMAGES, RENORMALISED
from tests.families import DIGITS, spec_of

HERE = [name for name in ENGINES if name not in ON_GPU]
NEVER = -50.0  # a score that loses against every other
NETWORKS = ModelSpec.model_validate({**DIGITS, "family": "expert-networks", "num_experts": 3})
DROPPED: dict[str, dict[str, tuple[int, ...]]] = {
    "advmoe": {"router": (1,)},
    "renormalised": {"layer4.0.conv1": (0, 3), "layer4.0.conv2": (2,)},
    "networks": {"router": (2,)},
}


def close_gates(model: Classifier, dropped: dict[str, tuple[int, ...]]) -> None:
    """Make the gates with a bias choose none of ``dropped``, whatever they see."""
    for layer, experts in dropped.items():
        gate = model.router.fc if layer == "router" else model.get_submodule(layer).gate[-1]
        gate.bias[list(experts)] = NEVER


def watch_a_corner(model: Classifier, _: object) -> None:
    """Make the router send to expert 2 what is bright in the first pixel, which no digit is."""
    weight_EC = model.router.weight
    weight_EC[:] = 0.0
    weight_EC[0, 8:32], weight_EC[1, 32:56] = 0.02, 0.02  # the brighter half, above or below
    weight_EC[2, 0] = 8.0
    model.router.bias[:] = torch.tensor([0.0, 0.0, -8.0])


CASES = {
    "advmoe": (ADVMOE, close_gates),
    "renormalised": (RENORMALISED, close_gates),
    "networks": (NETWORKS, watch_a_corner),
}
Exports = dict[str, tuple[Classifier, Bundle]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The whole model of each case, and the bundle without what it does not use."""
    folder = tmp_path_factory.mktemp("pruned")

    class Made(Exports):
        def __missing__(self, case: str) -> tuple[Classifier, Bundle]:
            spec, change = CASES[case]
            run = write_run(folder / case / "run", spec)
            checkpoint, model = load_checkpoint(run / "model")
            with torch.no_grad():
                change(model, DROPPED[case])
            save_checkpoint(run / "model", checkpoint, model)
            bundle = folder / case / "bundle"
            export_run(run, bundle, targets=[OPENVINO], prune_unused=True)
            self[case] = model, open_bundle(bundle)
            return self[case]

    return Made()


def digits() -> np.ndarray:
    return to_float(load_dataset("digits").test.images[:40])


def names_in(model: ModelProto) -> set[str]:
    """Return every name of nodes, constants and graphs, those in branches included."""
    found = set()
    graphs = [model.graph]
    for graph in graphs:
        found |= {graph.name, *(t.name for t in graph.initializer), *(n.name for n in graph.node)}
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_no_image_visits_is_gone(exports: Exports, case: str) -> None:
    model, bundle = exports[case]
    assert bundle.manifest.model.dropped_experts == DROPPED[case]
    gone = {f"{layer}.expert-{e}" for layer, ids in DROPPED[case].items() for e in ids}
    assert not gone & {segment.name for segment in bundle.manifest.plan.segments}
    files = ["model.onnx", "baselines/unfused.onnx", "engines/openvino-fp32/model.onnx"]
    for file in [*filter(bundle.has, files)]:
        names = names_in(onnx.load_model(bundle.file(file)))
        assert not [name for name in names if any(name.startswith(f"{g}/") for g in gone)]
    for name in gone:
        assert not bundle.has(f"segments/{name}.onnx")
    parts, _ = apply_passes(partition(model), IMAGES)
    whole = graph_from_plan(parts.plan, parts.graphs)
    assert bundle.file("model.onnx").stat().st_size < whole.ByteSize()


@pytest.mark.parametrize("case", CASES)
def test_digits_are_answered_as_the_whole_model_answers(exports: Exports, case: str) -> None:
    model, bundle = exports[case]
    expected = reference_answers(model, digits())
    with open_runner(bundle, threads=1) as runner:
        answer = runner.infer(digits())
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=2e-5)
    for layer, route in expected.routes.items():
        np.testing.assert_array_equal(answer.expert_ids[layer], route.expert_ids)
        assert not np.isin(answer.expert_ids[layer], DROPPED[case].get(layer, ())).any()


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("case", CASES)
def test_every_engine_answers_what_the_pruned_model_answers(
    exports: Exports, case: str, engine: str
) -> None:
    bundle = exports[case][1]
    model, rounding = reference_model(bundle), bundle.manifest.parity.rounding
    with open_runner(bundle, engine, threads=1) as runner:
        for images in (IMAGES, digits()):
            expected = reference_answers(model, images)
            assert compare_answers(expected, runner.infer(images), rounding=rounding).passed


@pytest.mark.parametrize("case", CASES)
def test_bodies_answer_as_kernels_do(exports: Exports, case: str) -> None:
    _, bundle = exports[case]
    shape, routes = bundle.manifest.model.image_shape, bundle.manifest.plan.routes
    file = bundle.file("model.onnx")
    with (
        GraphRunner(file, shape, routes=routes, custom_ops="bodies") as bodies,
        GraphRunner(file, shape, routes=routes) as kernels,
    ):
        ours, theirs = bodies.infer(IMAGES), kernels.infer(IMAGES)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    for layer, ids in theirs.expert_ids.items():
        np.testing.assert_array_equal(ours.expert_ids[layer], ids)


@pytest.mark.parametrize("engine", HERE)
def test_what_would_visit_a_dropped_expert_goes_to_the_next_best(
    exports: Exports, engine: str
) -> None:
    whole, bundle = exports["networks"]
    images = digits()
    images[:, 0, 0, 0] = 1.0  # the corner that expert 2 is chosen for
    before = reference_answers(whole, images).routes["router"]
    assert (before.expert_ids == 2).all()
    expected = reference_answers(reference_model(bundle), images)
    next_best = before.scores[:, :2].argmax(axis=1)
    with open_runner(bundle, engine, threads=1) as runner:
        answer = runner.infer(images)
    np.testing.assert_array_equal(answer.expert_ids["router"][:, 0], next_best)
    np.testing.assert_array_equal(expected.routes["router"].expert_ids[:, 0], next_best)
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-5)


def test_the_bundle_says_it(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = exports["renormalised"]
    pruning = bundle.manifest.pruning
    assert pruning is not None
    assert pruning.dropped == DROPPED["renormalised"]
    assert (pruning.data, pruning.images) == ("digits", 1000)
    assert (pruning.attacked_data, pruning.attack, pruning.epsilon) == ("digits", ATTACK, 0.1)
    holdout = len(load_dataset("digits").holdout.images)
    assert pruning.attacked_images == min(1000, holdout)
    assert 0 <= pruning.max_abs_logit_diff < 1e-4
    card = bundle.file("MODEL_CARD.md").read_text()
    assert "layer4.0.conv1 without experts 0, 3" in card
    assert "adversarial ones above all" in card
    assert "- plan: drop_experts 2" in card
    assert run_cli(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "layer4.0.conv2 without expert 2" in shown
    assert "to 2 of 2 experts (1, 2, left of 4)" in shown


def test_it_survives_verification(exports: Exports) -> None:
    report = verify_bundle(exports["networks"][1], images=40, threads=1, allow_fragile=True)
    assert report.passed
    assert report.parity.passed


def test_nothing_unused_is_said(tiny_run: Path, tmp_path: Path) -> None:
    listener = Notes()
    bundle = export_run(tiny_run, tmp_path / "b", prune_unused=True, progress=listener)
    assert "prune_unused: no expert is unused, so nothing was left out" in listener.notes
    assert bundle.manifest.pruning is None
    assert bundle.manifest.model.dropped_experts == {}
    assert "left out" not in bundle.file("MODEL_CARD.md").read_text()


def test_shares_of_all_experts_are_declined(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", spec_of("token experts"))
    listener = Notes()
    bundle = export_run(run, tmp_path / "b", prune_unused=True, progress=listener)
    assert any(note.startswith("prune_unused declined: weights are") for note in listener.notes)
    assert bundle.manifest.pruning is None


def test_noise_visits_nothing_that_counts(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    command = ["export", str(tiny_run), "--format", "onnx", "--prune-unused"]
    assert run_cli([*command, "--data", "random:8", "--out", str(out)]) == 2
    assert "random:8 is noise; pass --data" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_reports_it(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exports["advmoe"][1].path.parent / "run"
    command = ["export", str(run), "--format", "onnx", "--prune-unused", "--json"]
    assert run_cli([*command, "--out", str(tmp_path / "bundle")]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["pruning"]["dropped"] == {"router": [1]}
