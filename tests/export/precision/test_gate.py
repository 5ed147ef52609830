"""Whatever is wrong with a graph, no bundle is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from advmoe_deploy.errors import (
    CheckFailedError,
    CheckpointError,
)
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from advmoe_deploy.progress import Silent
from tests.conftest import TINY, assert_nothing_left, write_run


class Meddler(Silent):
    """A listener that changes the staged bundle when the export has advanced so often."""

    def __init__(self, out: Path, after: int, change: Callable[[Path], None]) -> None:
        self.out, self.left, self.change = out, after, change

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self.left -= steps * (task == "export")
        if self.left == 0 and task == "export":
            (staged,) = self.out.parent.glob(f".{self.out.name}.partial-*")
            self.change(staged)


def add_to_weight(file: Path, branch: str | None = None, end: str = "linear.bias") -> None:
    """Change the weight whose name ends so of a graph, or of one of its branches."""
    model = onnx.load_model(file)
    graphs = [a.g for n in model.graph.node if n.op_type == "If" for a in n.attribute]
    graph = next(g for g in graphs if g.name == branch) if branch else model.graph
    tensor = next(t for t in graph.initializer if t.name.endswith(end))
    changed = numpy_helper.to_array(tensor) + np.float32(0.01)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save_model(model, file)


@pytest.mark.parametrize(
    ("name", "branch", "message"),
    [
        ("segments/router.expert-1.onnx", None, "router.expert-1"),
        ("model.onnx", "router.expert-0/then_branch", "lacks"),
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
            (staged / name).write_bytes((staged / "segments/router.expert-0.onnx").read_bytes())
        else:
            add_to_weight(staged / name, branch)

    with pytest.raises(CheckFailedError, match=message):
        export_run(tiny_run, out, data="random:8", progress=Meddler(out, 3, change))
    assert_nothing_left(out)


def test_a_wrong_expert_that_no_image_visits_stops_the_export(
    tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"

    def change(staged: Path) -> None:
        add_to_weight(staged / "segments/router.expert-1.onnx")
        add_to_weight(staged / "model.onnx", "router.expert-1/then_branch")

    with pytest.raises(CheckFailedError, match=r"router\.expert-1 differs"):
        export_run(tiny_run, out, data="random:1", progress=Meddler(out, 3, change))
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
    bundle = export_run(tiny_run, out, data="random:1", progress=listener)
    unvisited = bundle.manifest.parity.layers[0].expert_load.index(0)
    (note,) = listener.notes
    assert note.startswith(
        f"router: expert {unvisited} is visited by none of the 1 images of random:1"
    )

    def change(staged: Path) -> None:
        skip_an_activation(staged / "model.onnx", f"router.expert-{unvisited}/then_branch")

    broken = tmp_path / "broken"
    with pytest.raises(CheckFailedError, match=rf"expert {unvisited} in model\.onnx differs"):
        export_run(tiny_run, broken, data="random:1", progress=Meddler(broken, 3, change))
    assert_nothing_left(broken)


def test_the_routers_scores_are_compared(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def change(staged: Path) -> None:
        for name in ("segments/router.onnx", "model.onnx"):
            add_to_weight(staged / name, end="fc.bias")  # every score alike: no route changes

    with pytest.raises(CheckFailedError, match=r"router\.scores of router differs"):
        export_run(tiny_run, out, data="random:8", progress=Meddler(out, 3, change))
    assert_nothing_left(out)


def test_reference_weights_that_changed_meanwhile_are_noticed(
    tiny_run: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(tiny_run, run)
    other = write_run(tmp_path / "other", TINY, seed=5) / "model" / "weights.safetensors"

    def change(staged: Path) -> None:
        shutil.copyfile(other, run / "model" / "weights.safetensors")

    with pytest.raises(CheckpointError, match="changed during the export"):
        export_run(run, out, data="random:8", progress=Meddler(out, 1, change))
    assert_nothing_left(out)


def test_a_router_that_decides_nothing_is_not_exported(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint, model = load_checkpoint(tiny_run / "model")
    with torch.no_grad():
        model.router.fc.weight.zero_()
        model.router.fc.bias.zero_()
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "model", checkpoint, model)
    with pytest.raises(CheckFailedError, match="all of 8 rows the best scores of layer router"):
        export_run(tmp_path / "run", tmp_path / "bundle", data="random:8")
    assert_nothing_left(tmp_path / "bundle")


def test_nan_in_the_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    checkpoint, model = load_checkpoint(tiny_run / "model")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "model", checkpoint, model)
    with pytest.raises(CheckpointError, match="not finite"):
        export_run(tmp_path / "run", tmp_path / "bundle")
    assert_nothing_left(tmp_path / "bundle")
