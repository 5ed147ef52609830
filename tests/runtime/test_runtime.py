"""Both runners answer what torch answers, for any batch and any route, without torch installed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import AdvMoEError, BundleError, InputError, MachineError, UsageError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.writer import GraphWriter, write_model
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.targets import PORTABLE
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.plan import RouteStep, TensorInfo
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.routing import route
from advmoe_deploy.runtime.select import ENGINES, ON_GPU, open_runner
from tests.conftest import OPENVINO, TINY, write_run

ATOL = 3e-5  # of logits around 4, in float32
IMAGES = to_float(load_dataset("digits").test.images)
HERE = [name for name in ENGINES if name not in ON_GPU]


def load_model(run: Path) -> AdvMoE:
    _, model = load_checkpoint(run / "model")
    assert isinstance(model, AdvMoE)
    return model


@pytest.fixture(scope="module")
def three_experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdvMoE, Bundle]:
    folder = tmp_path_factory.mktemp("three")
    run = write_run(folder / "run", TINY.model_copy(update={"num_experts": 3}), seed=1)
    export_run(run, folder / "bundle", data="random:64", targets=[OPENVINO], made_for=PORTABLE)
    return load_model(run), open_bundle(folder / "bundle")


def rerouted(tiny_run: Path, folder: Path, *, weight: float, bias: tuple[float, float]) -> Path:
    """Write the tiny model with its router's last layer changed; return the run."""
    checkpoint, model = load_checkpoint(tiny_run / "model")
    assert isinstance(model, AdvMoE)
    with torch.no_grad():
        model.router.fc.weight.mul_(weight)
        model.router.fc.bias.copy_(torch.tensor(bias))
    (folder / "run" / "model").mkdir(parents=True)
    save_checkpoint(folder / "run" / "model", checkpoint, model)
    return folder / "run"


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_answers_are_those_of_torch(
    tiny_run: Path, tiny_bundle: Bundle, engine: str, batch: int
) -> None:
    model, images = load_model(tiny_run), IMAGES[:batch]
    with torch.inference_mode():
        routing = model.route(torch.from_numpy(images))["router"]
        logits = model(torch.from_numpy(images)).numpy()
    with open_runner(tiny_bundle, engine, threads=1) as runner:
        answer = runner.infer(images)
        assert runner.name == engine
    np.testing.assert_allclose(answer.logits, logits, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(answer.expert_ids["router"], routing.expert_ids_NK.numpy())
    np.testing.assert_array_equal(answer.weights["router"], np.ones((batch, 1), np.float32))
    assert answer.expert_ids["router"].dtype == np.int64


@pytest.mark.parametrize("engine", HERE)
def test_three_experts(three_experts: tuple[AdvMoE, Bundle], engine: str) -> None:
    model, bundle = three_experts
    with torch.inference_mode():
        logits = model(torch.from_numpy(IMAGES)).numpy()
    with open_runner(bundle, engine) as runner:
        answer = runner.infer(IMAGES)
    assert len(np.unique(answer.expert_ids["router"])) == 3
    np.testing.assert_allclose(answer.logits, logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("winner", [0, 1])
def test_one_expert_takes_all(tiny_run: Path, tmp_path: Path, winner: int) -> None:
    bias = (100.0, 0.0) if winner == 0 else (0.0, 100.0)
    run = rerouted(tiny_run, tmp_path, weight=1.0, bias=bias)
    export_run(run, tmp_path / "bundle", targets=[OPENVINO], made_for=PORTABLE)
    with torch.inference_mode():
        model = load_model(run)
        expected = model(torch.from_numpy(IMAGES), model.forced(winner)).numpy()
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.parity.layers[0].expert_load[1 - winner] == 0
    for engine in HERE:
        with open_runner(bundle, engine) as runner:
            answer = runner.infer(IMAGES)
        assert set(answer.expert_ids["router"].flat) == {winner}
        np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=ATOL)


def test_ties_go_to_the_lowest_index(tiny_run: Path, tmp_path: Path) -> None:
    model = load_model(rerouted(tiny_run, tmp_path, weight=0.0, bias=(0.5, 0.5)))
    images = IMAGES[:4]
    with torch.inference_mode():
        assert not model.route(torch.from_numpy(images))["router"].expert_ids_NK.any()
    # export itself refuses a router without an opinion
    parts, _ = apply_passes(partition(model), images)
    segments = parts.graphs
    graph = graph_from_plan(parts.plan, segments)
    files = {name: tmp_path / f"{name}.onnx" for name in segments}
    for name, file in files.items():
        write_model(segments[name], file)
    for runner in (
        GraphRunner(graph.SerializeToString(), TINY.image_shape, routes=parts.plan.routes),
        PlanRunner(parts.plan, files, TINY.image_shape),
    ):
        with runner:
            assert not runner.infer(images).expert_ids["router"].any()
    evaluator = ReferenceEvaluator(graph)
    assert not evaluator.run(["router.expert_ids"], {"images": images})[0].any()


def test_ties_behind_the_first_expert() -> None:
    scores = np.array([[0, 1, 1], [2, 1, 2], [0, 0, 3]], np.float32)
    step = RouteStep(layer="router", scores="scores", num_experts=3)
    ids = route(step, scores)["router.expert_ids"]
    np.testing.assert_array_equal(ids, [[1], [0], [2]])
    np.testing.assert_array_equal(
        choose(
            torch.from_numpy(scores), RoutingRule("router", scores.shape[1])
        ).expert_ids_NK.numpy(),
        ids,
    )


def test_the_reference_evaluator_agrees(tiny_bundle: Bundle) -> None:
    images = IMAGES[:3]
    evaluator = ReferenceEvaluator(str(tiny_bundle.file("model.onnx")))
    logits, ids, weights = evaluator.run(None, {"images": images})
    with open_runner(tiny_bundle) as runner:
        answer = runner.infer(images)
    np.testing.assert_allclose(logits, answer.logits, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(ids, answer.expert_ids["router"])
    np.testing.assert_array_equal(weights, answer.weights["router"])


@pytest.mark.parametrize("engine", HERE)
def test_several_threads_at_once(tiny_bundle: Bundle, engine: str) -> None:
    starts = range(0, 96, 3)
    with open_runner(tiny_bundle, engine, threads=1) as runner:
        alone = [runner.infer(IMAGES[i : i + 3]).logits for i in starts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i: runner.infer(IMAGES[i : i + 3]).logits, starts))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_answer_does_not_depend_on_the_batch(tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle) as runner:
        whole = runner.infer(IMAGES[:32]).logits
        single = np.concatenate([runner.infer(IMAGES[i : i + 1]).logits for i in range(32)])
    np.testing.assert_allclose(whole, single, rtol=0, atol=ATOL)


def spoilt(value: float) -> np.ndarray:
    images = IMAGES[:2].copy()
    images[1, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES[:2].astype(np.float64), UsageError, "float64"),
        (IMAGES[:2].tolist(), UsageError, "list"),
        (IMAGES[0], UsageError, r"shape \(1, 8, 8\)"),
        (IMAGES[:0], UsageError, r"N >= 1"),
        (np.zeros((1, 3, 8, 8), np.float32), UsageError, r"takes \[N, 1, 8, 8\]"),
        (spoilt(np.nan), InputError, "1 of 2 images"),
        (spoilt(np.inf), InputError, "not finite"),
        (spoilt(1.5), InputError, "to 1.5"),
        (spoilt(-0.1), InputError, "from -0.1"),
    ],
)
@pytest.mark.parametrize("engine", HERE)
def test_bad_images_are_refused(
    tiny_bundle: Bundle, engine: str, images: np.ndarray, error: type[AdvMoEError], message: str
) -> None:
    with open_runner(tiny_bundle, engine) as runner, pytest.raises(error, match=message) as caught:
        runner.infer(images)
    assert "\n" not in str(caught.value)


def test_images_need_not_be_contiguous(tiny_bundle: Bundle) -> None:
    turned = IMAGES[:4].transpose(0, 1, 3, 2)
    with open_runner(tiny_bundle) as runner:
        np.testing.assert_array_equal(
            runner.infer(turned).logits, runner.infer(np.ascontiguousarray(turned)).logits
        )


def test_unknown_engine_and_bad_threads(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="did you mean onnxruntime"):
        open_runner(tiny_bundle, "onxruntime")
    with pytest.raises(UsageError, match="threads=-1"):
        open_runner(tiny_bundle, threads=-1)


def test_a_graph_that_cannot_be_read() -> None:
    with pytest.raises(BundleError, match="ONNX Runtime cannot load the graph"):
        OrtEngine(b"no graph")


def test_memory_that_is_used_up_is_the_machines_fault() -> None:
    writer = GraphWriter()
    writer.emit("ConstantOfShape", ["shape"], "out")
    shape = TensorInfo(name="shape", dtype="int64", shape=(1,))
    model = writer.model("greedy", [shape], [TensorInfo(name="out", dtype="float32", shape=("N",))])
    with OrtEngine(model.SerializeToString()) as engine:
        assert engine.run({"shape": np.array([3])})["out"].shape == (3,)
        with pytest.raises(MachineError, match="out of memory; lower the batch size") as caught:
            engine.run({"shape": np.array([2**45])})  # 128 TiB
    assert caught.value.exit_code == 5


def test_a_closed_engine_says_so(tiny_bundle: Bundle) -> None:
    runner = open_runner(tiny_bundle)
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.infer(IMAGES[:1])


def run_without(modules: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
    blocked = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + program], capture_output=True, text=True, timeout=60
    )


def test_inference_without_torch(tiny_bundle: Bundle) -> None:
    program = f"""
from pathlib import Path
import numpy as np
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.runtime.select import open_runner
bundle = open_bundle(Path({str(tiny_bundle.path)!r}))
with np.load(bundle.file("golden.npz")) as golden:
    for engine in {HERE!r}:
        with open_runner(bundle, engine) as runner:
            answer = runner.infer(golden["images"])
        scale = np.maximum(1, np.abs(golden["logits"]).max(axis=1, keepdims=True))
        assert (np.abs(answer.logits - golden["logits"]) / scale).max() <= 1e-5
        assert (answer.expert_ids["router"] == golden["router.expert_ids"]).all()
print("same answers")
"""
    done = run_without(("torch", "onnx", "sklearn"), program)
    assert done.stdout == "same answers\n", done.stderr


@pytest.mark.parametrize(
    ("package", "engine", "extra"),
    [("onnxruntime", "onnxruntime", "cpu"), ("openvino", "openvino", "openvino")],
)
def test_without_a_runtime_its_extra_is_named(
    tiny_bundle: Bundle, package: str, engine: str, extra: str
) -> None:
    program = f"""
from pathlib import Path
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.select import open_runner
try:
    open_runner(open_bundle(Path({str(tiny_bundle.path)!r})), {engine!r})
except BackendUnavailableError as error:
    print(error)
"""
    done = run_without((package,), program)
    assert f"pip install 'advmoe-deploy[{extra}]'" in done.stdout, done.stderr
