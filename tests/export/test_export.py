"""A bundle holds what it says, and says what was checked."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import (
    DataError,
    UsageError,
)
from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.answers import Answers, RouteAnswers
from advmoe_deploy.parity.golden import golden_rows
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.select import open_runner
from tests.conftest import TINY, write_run

IMAGES = to_float(load_dataset("digits").test.images)


def test_the_manifest_says_what_was_checked(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    parity = manifest.parity
    assert parity.passed
    assert parity.images == 1000
    assert parity.data == "digits"
    (layer,) = parity.layers
    assert (layer.layer, layer.rows, sum(layer.expert_load)) == ("router", 1000, 1000)
    assert min(layer.expert_load) > 0
    assert manifest.macs.executed == manifest.macs.selected + manifest.macs.router
    assert manifest.training["data"] == "digits"
    assert manifest.plan.outputs == ("logits", "router.expert_ids", "router.weights")
    assert {"torch", "onnx", "onnxruntime"} <= manifest.versions.keys()


@pytest.mark.parametrize("name", ["model.onnx", "segments/router.onnx", "baselines/unfused.onnx"])
def test_graphs_are_valid_and_old_enough_for_everyone(tiny_bundle: Bundle, name: str) -> None:
    model = onnx.load_model(tiny_bundle.file(name))
    onnx.checker.check_model(model, full_check=True)
    ours = {("ai.advmoe", 1)} if name == "model.onnx" else set()
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 17)} | ours
    assert model.ir_version <= 10
    assert not [n for n in model.graph.node if n.op_type == "BatchNormalization"]


def test_golden_images_visit_every_expert(tiny_bundle: Bundle) -> None:
    with np.load(tiny_bundle.file("golden.npz")) as golden:
        ids = golden["router.expert_ids"]
        assert set(ids.flat) == {0, 1}
        with open_runner(tiny_bundle) as runner:
            answer = runner.infer(golden["images"])
        np.testing.assert_allclose(answer.logits, golden["logits"], rtol=0, atol=3e-5)
        np.testing.assert_array_equal(golden["router.scores"].argmax(axis=1), ids[:, 0])
        assert golden["router.weights"].shape == ids.shape


def test_golden_rows_fetch_an_expert_from_far_behind() -> None:
    ids = np.zeros((200, 1), np.int64)
    ids[150] = 1
    route = RouteAnswers(np.zeros((200, 3)), ids, np.ones((200, 1)))
    answers = Answers(np.zeros((200, 2)), {"router": route})
    assert golden_rows(answers) == [*range(64), 150]


def test_the_model_card_tells_the_essentials(tiny_bundle: Bundle) -> None:
    card = tiny_bundle.file("MODEL_CARD.md").read_text()
    for phrase in ("epsilon 0.1", "router", "1000 images of digits", "No capacity limit"):
        assert phrase in card


def test_the_unfused_baseline_is_the_same_model(tiny_bundle: Bundle) -> None:
    from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner

    routes = tiny_bundle.manifest.plan.routes
    unfused = GraphRunner(tiny_bundle.file("baselines/unfused.onnx"), (1, 8, 8), routes=routes)
    with unfused, open_runner(tiny_bundle) as runner:
        a, b = unfused.infer(IMAGES), runner.infer(IMAGES)
    np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(a.expert_ids["router"], b.expert_ids["router"])


class Steps(Silent):
    """A listener that counts what is left of each task."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}

    def start(self, task: str, total: int, done: int = 0) -> None:
        self.left[task] = total - done

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self.left[task] -= steps


def test_a_dense_model_exports_too(tmp_path: Path) -> None:
    run, steps = write_run(tmp_path / "run", TINY.dense()), Steps()
    bundle = export_run(
        run, tmp_path / "bundle", data="random:32", with_reference=False, progress=steps
    )
    _, model = load_checkpoint(run / "model")
    with torch.inference_mode():
        logits = model(torch.from_numpy(IMAGES)).numpy()
    for engine in ("onnxruntime", "onnxruntime-plan"):
        with open_runner(open_bundle(bundle.path), engine) as runner:
            answer = runner.infer(IMAGES)
        np.testing.assert_allclose(answer.logits, logits, rtol=0, atol=3e-5)
        assert answer.expert_ids == {}
    assert sorted(bundle.manifest.files) == [
        "MODEL_CARD.md",
        "golden.npz",
        "model.onnx",
        "segments/network.onnx",
    ]
    assert list(steps.left) == [
        "export",
        "answers of torch",
        "trace layers",
        "graph passes",
        "write graphs",
        "compare with torch",
        "the plan",
        "model.onnx",
    ]
    assert {*steps.left.values()} == {0}, "a step that was announced was not told of"


def test_every_step_of_a_routed_export_is_told_of_once(tiny_run: Path, tmp_path: Path) -> None:
    steps = Steps()
    export_run(
        tiny_run, tmp_path / "bundle", data="random:32", with_reference=False, progress=steps
    )
    assert "trace layers" in steps.left
    assert not {task: left for task, left in steps.left.items() if left}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("random:0", UsageError, "random:1000"),
        ("random:many", UsageError, "random:1000"),
        ("digit", UsageError, "did you mean digits"),
        ("", UsageError, "pass --data"),
        ("cifar10:/nowhere", DataError, "random:1000"),
    ],
)
def test_images_to_check_on(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parity_images(source, TINY)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match="the model takes"):
        parity_images("digits", TINY.model_copy(update={"image_size": 16}))
