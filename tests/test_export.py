"""A bundle is written when every check has passed, and otherwise not at all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, write_run
from onnx import numpy_helper

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import (
    CheckFailedError,
    CheckpointError,
    DataError,
    UsageError,
    machine_error,
)
from advmoe_deploy.export.images import golden_rows, parity_images
from advmoe_deploy.export.onnx_export import export_onnx
from advmoe_deploy.export.parity import compare_answers, require_parity
from advmoe_deploy.export.reference import Answers
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.prediction import Prediction
from advmoe_deploy.runtime.select import open_runner

IMAGES = to_float(load_dataset("digits").test.images)


class Meddler(Silent):
    """A listener that changes the staged bundle when the export has advanced so often."""

    def __init__(self, out: Path, after: int, change: Callable[[Path], None]) -> None:
        self.out, self.left, self.change = out, after, change

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self.left -= steps
        if self.left == 0:
            (staged,) = self.out.parent.glob(f".{self.out.name}.partial-*")
            self.change(staged)


def add_to_weight(file: Path, branch: str | None = None) -> None:
    """Change one weight of a graph, or of one of its branches."""
    model = onnx.load_model(file)
    graphs = [a.g for n in model.graph.node if n.op_type == "If" for a in n.attribute]
    graph = next(g for g in graphs if g.name == branch) if branch else model.graph
    tensor = next(t for t in graph.initializer if t.name.endswith("linear.bias"))
    changed = numpy_helper.to_array(tensor) + np.float32(0.01)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save_model(model, file)


def assert_nothing_left(out: Path) -> None:
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


def test_the_manifest_says_what_was_checked(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    parity = manifest.parity
    assert parity.passed
    assert parity.images == 1000
    assert parity.data == "digits"
    assert sum(parity.images_per_expert) == 1000
    assert min(parity.images_per_expert) > 0
    assert manifest.macs.executed == manifest.macs.selected + manifest.macs.router
    assert manifest.training["data"] == "digits"
    assert manifest.plan.outputs == ("logits", "router.expert_ids", "router.weights")
    assert {"torch", "onnx", "onnxruntime"} <= manifest.versions.keys()


@pytest.mark.parametrize("name", ["model.onnx", "segments/router.onnx", "baselines/unfused.onnx"])
def test_graphs_are_valid_and_old_enough_for_everyone(tiny_bundle: Bundle, name: str) -> None:
    model = onnx.load_model(tiny_bundle.file(name))
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version <= 10
    assert not [n for n in model.graph.node if n.op_type == "BatchNormalization"]


def test_golden_images_visit_every_expert(tiny_bundle: Bundle) -> None:
    with np.load(tiny_bundle.file("golden.npz")) as golden:
        assert set(golden["expert_ids"].flat) == {0, 1}
        with open_runner(tiny_bundle) as runner:
            answer = runner.infer(golden["images"])
        np.testing.assert_allclose(answer.logits, golden["logits"], rtol=0, atol=3e-5)
        np.testing.assert_array_equal(golden["scores"].argmax(axis=1), golden["expert_ids"][:, 0])


def test_golden_rows_fetch_an_expert_from_far_behind() -> None:
    ids = np.zeros((200, 1), np.int64)
    ids[150] = 1
    answers = Answers(np.zeros((200, 2)), np.zeros((200, 3)), ids)
    assert golden_rows(answers) == [*range(64), 150]


def test_the_model_card_tells_the_essentials(tiny_bundle: Bundle) -> None:
    card = tiny_bundle.file("MODEL_CARD.md").read_text()
    for phrase in ("epsilon 0.1", "router", "1000 images of digits", "No capacity limit"):
        assert phrase in card


def test_the_unfused_baseline_is_the_same_model(tiny_bundle: Bundle) -> None:
    from advmoe_deploy.runtime.runner import GraphRunner

    routes = tiny_bundle.manifest.plan.routes
    unfused = GraphRunner(tiny_bundle.file("baselines/unfused.onnx"), (1, 8, 8), routes=routes)
    with unfused, open_runner(tiny_bundle) as runner:
        a, b = unfused.infer(IMAGES), runner.infer(IMAGES)
    np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(a.expert_ids["router"], b.expert_ids["router"])


def test_a_dense_model_exports_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TINY.dense())
    bundle = export_onnx(run, tmp_path / "bundle", data="random:32", with_reference=False)
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


@pytest.mark.parametrize(
    ("name", "branch", "message"),
    [
        ("segments/pathway-1.onnx", None, "pathway-1"),
        ("model.onnx", "pathway-0/then_branch", "lacks"),
        ("segments/router.onnx", None, "lacks|routes flipped|router"),
        ("baselines/unfused.onnx", None, r"unfused\.onnx differs"),
    ],
)
def test_a_wrong_weight_stops_the_export(
    tiny_run: Path, tmp_path: Path, name: str, branch: str | None, message: str
) -> None:
    out = tmp_path / "bundle"

    def change(staged: Path) -> None:
        if name.endswith("router.onnx"):
            (staged / name).write_bytes((staged / "segments/pathway-0.onnx").read_bytes())
        else:
            add_to_weight(staged / name, branch)

    with pytest.raises(CheckFailedError, match=message):
        export_onnx(tiny_run, out, data="random:8", progress=Meddler(out, 3, change))
    assert_nothing_left(out)


def test_a_wrong_expert_that_no_image_visits_stops_the_export(
    tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"

    def change(staged: Path) -> None:
        add_to_weight(staged / "segments/pathway-1.onnx")
        add_to_weight(staged / "model.onnx", "pathway-1/then_branch")

    with pytest.raises(CheckFailedError, match="pathway-1 differs"):
        export_onnx(tiny_run, out, data="random:1", progress=Meddler(out, 3, change))
    assert_nothing_left(out)


class Listener(Meddler):
    """A meddler that keeps the notes."""

    def __init__(self, out: Path, after: int, change: Callable[[Path], None]) -> None:
        super().__init__(out, after, change)
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def skip_an_activation(file: Path, branch: str) -> None:
    """Break what a branch computes, every weight left as it is."""
    model = onnx.load_model(file)
    graphs = [a.g for n in model.graph.node if n.op_type == "If" for a in n.attribute]
    graph = next(g for g in graphs if g.name == branch)
    next(n for n in graph.node if n.op_type == "Relu").op_type = "Neg"
    onnx.save_model(model, file)


def test_the_branch_of_an_expert_that_no_image_visits_is_run(
    tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    listener = Listener(out, 0, lambda staged: None)
    bundle = export_onnx(tiny_run, out, data="random:1", progress=listener)
    unvisited = bundle.manifest.parity.images_per_expert.index(0)
    (note,) = listener.notes
    assert note.startswith(f"expert {unvisited} is visited by none of the 1 images of random:1")

    def change(staged: Path) -> None:
        skip_an_activation(staged / "model.onnx", f"pathway-{unvisited}/then_branch")

    broken = tmp_path / "broken"
    with pytest.raises(CheckFailedError, match=rf"expert {unvisited} in model\.onnx differs"):
        export_onnx(tiny_run, broken, data="random:1", progress=Meddler(broken, 3, change))
    assert_nothing_left(broken)


def test_the_routers_scores_are_compared(tiny_run: Path, tmp_path: Path) -> None:
    from advmoe_deploy.export.parity import require_segments

    bundle = export_onnx(tiny_run, tmp_path / "bundle", data="random:8")
    _, model = load_checkpoint(tiny_run / "model")
    with torch.no_grad():
        model.router.fc.bias.add_(0.01)  # every score alike: no route changes
    plan = bundle.manifest.plan
    files = {segment.name: bundle.file(segment.file) for segment in plan.segments}
    with pytest.raises(CheckFailedError, match="router differs"):
        require_segments(model, plan, files, IMAGES[:4])


def test_reference_weights_that_changed_meanwhile_are_noticed(
    tiny_run: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(tiny_run, run)
    other = write_run(tmp_path / "other", TINY, seed=5) / "model" / "weights.safetensors"

    def change(staged: Path) -> None:
        shutil.copyfile(other, run / "model" / "weights.safetensors")

    with pytest.raises(CheckpointError, match="changed during the export"):
        export_onnx(run, out, data="random:8", progress=Meddler(out, 1, change))
    assert_nothing_left(out)


def test_parity_counts_flips_by_margin() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.50005], [0.0, 1.0]], np.float32)
    ids = np.array([[0], [1], [1], [1]])
    logits = np.zeros((4, 2), np.float32)
    answered = np.array([[0, 0], [0, 2e-6], [9, 9], [9, 9]], np.float32)
    routed = np.array([[0], [1], [0], [0]])  # a close flip, then a clear one
    report = compare_answers(
        Answers(logits, scores, ids), [Prediction(answered, {"router": routed}, {})]
    )
    assert (report.route_flips, report.close_flips, report.close_calls) == (1, 1, 1)
    assert report.route_agreement == pytest.approx(2 / 3)
    assert report.max_abs_logit_diff == pytest.approx(2e-6)
    assert report.images_per_expert == (1, 3)
    assert not report.passed


def test_each_image_is_compared_relative_to_its_own_logits() -> None:
    expected = np.array([[0.5, -0.2], [3.0, -20.0]], np.float32)
    answers = Answers(expected, None, None)
    small_off, large_off = expected.copy(), expected.copy()
    small_off[0, 0] += 1e-4  # within 1e-5 of the largest logit of the set, not of its own
    large_off[1, 0] += 1e-4
    report = compare_answers(answers, [Prediction(small_off)])
    assert report.max_relative_logit_diff == pytest.approx(1e-4, rel=1e-2)
    assert not report.passed
    report = compare_answers(answers, [Prediction(large_off)])
    assert report.max_abs_logit_diff == pytest.approx(1e-4, rel=1e-2)
    assert report.max_relative_logit_diff == pytest.approx(5e-6, rel=1e-2)
    assert report.logit_tolerance == 1e-5
    assert report.passed


def routed_answers(scores: np.ndarray) -> tuple[Answers, Prediction]:
    ids = scores.argmax(axis=1)[:, None]
    logits = np.zeros((len(scores), 2), np.float32)
    return Answers(logits, scores, ids), Prediction(logits.copy(), {"router": ids})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference logits", "engine logits", "both", "scores"])
def test_what_is_not_finite_fails(bad: float, where: str) -> None:
    answers, prediction = routed_answers(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
    if where in ("reference logits", "both"):
        answers.logits[1, 0] = bad
    if where in ("engine logits", "both"):
        prediction.logits[1, 0] = bad
    if where == "scores":
        answers.scores[1, 2] = bad
    report = compare_answers(answers, [prediction])
    assert report.non_finite == 1
    assert not report.passed
    with pytest.raises(CheckFailedError, match="not finite on 1 of 2 images") as caught:
        require_parity(report, "model.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_to_compare_fails(images: int) -> None:
    answers, prediction = routed_answers(np.full((images, 2), 0.5, np.float32))
    report = compare_answers(answers, [prediction])
    assert report.close_calls == report.images == images
    assert report.route_agreement == 0.0
    assert not report.passed
    with pytest.raises(CheckFailedError, match="cannot be compared"):
        require_parity(report, "model.onnx")


def test_a_router_that_decides_nothing_is_not_exported(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint, model = load_checkpoint(tiny_run / "model")
    with torch.no_grad():
        model.router.fc.weight.zero_()
        model.router.fc.bias.zero_()
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "model", checkpoint, model)
    with pytest.raises(CheckFailedError, match="all of 8 images the two best scores"):
        export_onnx(tmp_path / "run", tmp_path / "bundle", data="random:8")
    assert_nothing_left(tmp_path / "bundle")


def test_an_existing_target_is_left_alone(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds no manifest\.json, so it is not replaced"):
            export_onnx(tiny_run, tmp_path / "bundle", overwrite=overwrite)
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "mine"


def test_only_a_bundle_is_replaced(tiny_run: Path, tmp_path: Path) -> None:
    export_onnx(tiny_run, tmp_path / "bundle", data="random:8")
    with pytest.raises(UsageError, match="exists; pass --overwrite"):
        export_onnx(tiny_run, tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    export_onnx(tiny_run, tmp_path / "link", data="random:9", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "bundle").manifest.parity.data == "random:9"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_current_directory_is_no_target(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="holds the current directory"):
        export_onnx(tiny_run, Path(out), overwrite=True)
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_nan_in_the_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint, model = load_checkpoint(tiny_run / "model")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "model", checkpoint, model)
    with pytest.raises(CheckpointError, match="not finite"):
        export_onnx(tmp_path / "run", tmp_path / "bundle")
    assert_nothing_left(tmp_path / "bundle")


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


EXPORT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from advmoe_deploy.export.onnx_export import export_onnx
from advmoe_deploy.progress import Silent

class Talker(Silent):
    def advance(self, task, steps=1, **figures):
        print("advanced", file=sys.stderr, flush=True)

{before}
export_onnx(Path({run!r}), Path({out!r}), data="random:8", progress={progress})
"""


def export_program(run: Path, out: Path, *, before: str = "", progress: str = "None") -> list[str]:
    program = EXPORT.format(run=str(run), out=str(out), before=before, progress=progress)
    return [sys.executable, "-c", program]


def test_export_is_quiet(tiny_run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        export_program(tiny_run, tmp_path / "bundle"), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_leaves_nothing(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = export_program(tiny_run, out, progress="Talker()")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "advanced\n"
        assert list(tmp_path.glob(".bundle.partial-*"))
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
    assert process.returncode != 0
    assert_nothing_left(out)


def test_a_file_size_limit_leaves_nothing(tiny_run: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = subprocess.run(
        export_program(tiny_run, tmp_path / "bundle", before=limit),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "OSError: [Errno 27]" in done.stderr
    assert_nothing_left(tmp_path / "bundle")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 256 KiB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(tiny_run: Path, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        export_onnx(tiny_run, small_disk / "bundle", data="random:8")
    error = machine_error(caught.value)
    assert error is not None
    assert error.exit_code == 5
    assert_nothing_left(small_disk / "bundle")
    assert not os.listdir(small_disk)
