"""Whatever is wrong with a routed layer, the gate of the export finds it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, numpy_helper

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.checks.every_expert import require_every_expert
from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph_files import check_graphs, write_graphs
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.progress import Silent
from tests.families import spec_of

IMAGES = np.random.default_rng(2).random((24, 1, 8, 8), dtype=np.float32)
Staged = tuple[Path, Classifier, Partition]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    """The graphs of a V-MoE: two layers, two of three experts for each token."""
    torch.manual_seed(0)
    model = build_model(spec_of("token experts")).eval()
    folder = tmp_path_factory.mktemp("staged")
    parts, _ = write_graphs(folder, model, IMAGES, Silent())
    return folder, model, parts


def check(folder: Path, staged: Staged) -> None:
    _, model, parts = staged
    answers = reference_answers(model, IMAGES)
    check_graphs(folder, model, parts, IMAGES, answers, data="random")


def edit(file: Path, change: Callable[[ModelProto], None]) -> None:
    model = onnx.load_model(file)
    change(model)
    onnx.save_model(model, file)


def node_called(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def change_weights(
    model: ModelProto, layer: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Change weights and biases of a layer of experts, [E, ...]."""
    linear = [n for n in model.graph.node if n.op_type == "ExpertLinear" and layer in n.name]
    names = {name for node in linear for name in node.input[2:]}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = change(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def swap_files(folder: Path) -> None:
    first, second = (folder / f"segments/block-1.expert-{e}.onnx" for e in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def swap_everywhere(folder: Path) -> None:
    """Exchange two experts of one layer in the segments and in the whole graph alike."""

    def swap(model: ModelProto) -> None:
        change_weights(model, "block-1", lambda values: values[[1, 0, 2]])

    swap_files(folder)
    edit(folder / "model.onnx", swap)


def drop_expert(folder: Path) -> None:
    """Let the second expert of a layer have the first one's weights."""

    def drop(model: ModelProto) -> None:
        change_weights(model, "block-0", lambda values: values[[0, 0, 2]])

    edit(folder / "model.onnx", drop)


def in_body(model: ModelProto, function: str, operator: str) -> NodeProto:
    """Return the node of this operator in the body of a custom operator."""
    body = next(f for f in model.functions if f.name == function)
    return next(node for node in body.node if node.op_type == operator)


def take_the_worst(folder: Path) -> None:
    """Let the body, not the kernel, choose the lowest scores."""

    def change(model: ModelProto) -> None:
        node = in_body(model, "LinearRouterTopKProbability", "TopK")
        node.attribute.append(onnx.helper.make_attribute("largest", 0))

    edit(folder / "model.onnx", change)


def weigh_by_row(folder: Path) -> None:
    """Give every expert the weight of another row's expert: softmax over rows, not experts."""

    def change(model: ModelProto) -> None:
        in_body(model, "LinearRouterTopKProbability", "Softmax").attribute[0].i = 0

    edit(folder / "model.onnx", change)


def count_twice(folder: Path) -> None:
    """Double the second layer's answers, whoever runs the graph."""

    def change(model: ModelProto) -> None:
        node = node_called(model, "block-1.output")
        twice = onnx.helper.make_node("Add", [node.input[0]] * 2, ["twice"], "twice")
        model.graph.node.insert([*model.graph.node].index(node), twice)
        node.input[0] = "twice"

    edit(folder / "model.onnx", change)


def forget_weights(folder: Path) -> None:
    """Weigh the answers of the second layer by the routes of the first."""

    def change(model: ModelProto) -> None:
        node = node_called(model, "block-1.output")
        node.input[2] = node_called(model, "block-0.output").input[2]

    edit(folder / "model.onnx", change)


def spoil_gate(folder: Path) -> None:
    """Change the gate of a later layer in its segment and in the whole graph alike."""

    def change(model: ModelProto) -> None:
        tensor = next(
            t for t in model.graph.initializer if t.name.endswith("blocks.1.mlp.gate.weight")
        )
        values = numpy_helper.to_array(tensor)[::-1].copy()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for name in ("segments/trunk-1.onnx", "model.onnx"):
        edit(folder / name, change)


def spoil_unfused(folder: Path) -> None:
    def change(model: ModelProto) -> None:
        node_called(model, "block-0.output").input.pop()

    edit(folder / "baselines/unfused.onnx", change)


def test_what_is_right_passes(staged: Staged) -> None:
    check(staged[0], staged)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_files, r"model\.onnx lacks .* of block-1\.expert-0"),
        (swap_everywhere, r"block-1\.output of block-1\.expert-0 differs"),
        (drop_expert, r"model\.onnx lacks .* of block-0\.expert-1"),
        (take_the_worst, r"model\.onnx without our kernels cannot be compared"),
        (weigh_by_row, r"model\.onnx without our kernels differs"),
        (count_twice, r"expert 0 in model\.onnx differs"),
        (forget_weights, r"model\.onnx.* differs"),
        (spoil_gate, r"block-1\.scores of trunk-1 differs"),
        (spoil_unfused, r"unfused\.onnx differs"),
    ],
)
def test_what_is_wrong_is_found(
    staged: Staged, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "staged"
    shutil.copytree(staged[0], folder)
    damage(folder)
    with pytest.raises(CheckFailedError, match=message):
        check(folder, staged)


def test_a_lost_branch_is_found(staged: Staged) -> None:
    """The second expert of a layer runs the first one's branch."""
    _, _, parts = staged
    model = graph_from_plan(parts.plan, parts.graphs, "if")
    require_every_expert(parts.plan, model, parts.graphs)
    first, second = (node_called(model, f"block-0.expert-{e}/block-0.output") for e in (0, 1))
    for branch in second.attribute:
        branch.CopyFrom(next(a for a in first.attribute if a.name == branch.name))
    with pytest.raises(CheckFailedError, match=r"branches for block-0\.expert-[01], not 1"):
        require_every_expert(parts.plan, model, parts.graphs)
