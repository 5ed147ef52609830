"""Each pass keeps its contract, says why it declined, and is caught when it does not."""

import copy
import re

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.graph.writer import GraphWriter, write_model
from advmoe_deploy.export.partition.lowering import TracedModule, lower
from advmoe_deploy.export.partition.sample import Sample
from advmoe_deploy.export.passes.fold_batchnorm import fold_batchnorm
from advmoe_deploy.export.passes.report import (
    Pass,
    PassReport,
    apply_checked,
    declined,
    too_far,
)
from advmoe_deploy.export.passes.strided_shortcut import strided_shortcut
from advmoe_deploy.plan import TensorInfo
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine

IMAGE = TensorInfo(name="images", dtype="float32", shape=("N", 2, 6, 6))
OUTPUT = TensorInfo(name="out", dtype="float32", shape=("N", "C", "H", "W"))
IMAGES = np.random.default_rng(0).random((3, 2, 6, 6), dtype=np.float32)


class ConvNorm(nn.Module):
    """conv -> norm; ``twice`` also reads the convolution, ``bare`` leaves it out."""

    def __init__(self, *, bias: bool = False, twice: bool = False, bare: bool = False) -> None:
        super().__init__()
        self.conv = nn.Identity() if bare else nn.Conv2d(2, 2, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(2)
        self.twice = twice
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.3, -1.0]))
            self.norm.running_var.copy_(torch.tensor([0.5, 4.0]))
            self.norm.weight.copy_(torch.tensor([2.0, -0.5]))
            self.norm.bias.copy_(torch.tensor([1.0, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if isinstance(self.conv, nn.Identity) else self.conv(x)
        return self.norm(h) + h if self.twice else self.norm(h)


class Shortcut(nn.Module):
    """A convolution whose result is strided and padded as ``pad`` says."""

    def __init__(self, pad: tuple[int, ...], stride: int = 2, start: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.pad, self.stride, self.start = pad, stride, start

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        return F.pad(h[:, :, self.start :: self.stride, :: self.stride], self.pad)


def lowered(module: nn.Module) -> ModelProto:
    program = TracedModule(module, (2, 6, 6))
    nodes = program.needed([program.result])
    return lower(program, nodes, {program.image: "images"}, {program.result: "out"}).model(
        "test", [IMAGE], [OUTPUT]
    )


def sample_of(module: nn.Module) -> Sample:
    x = torch.from_numpy(IMAGES)
    with torch.inference_mode():
        out, exact = module.eval()(x), copy.deepcopy(module).double()(x.double())
    return Sample({"images": IMAGES}, {"out": out.numpy()}, {"out": exact.numpy()})


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("bias", [False, True])
def test_batchnorm_folds_into_the_convolution(bias: bool) -> None:
    module = ConvNorm(bias=bias)
    model = lowered(module)
    (report,) = apply_checked((fold_batchnorm,), model, sample_of(module))
    assert report == PassReport("fold_batchnorm", 1)
    assert operators(model) == ["Conv"]
    assert sorted(t.name for t in model.graph.initializer) == ["conv.bias", "conv.weight"]
    with OrtEngine(model.SerializeToString()) as engine, torch.inference_mode():
        answer = engine.run({"images": IMAGES})["out"]
        np.testing.assert_allclose(answer, module(torch.from_numpy(IMAGES)).numpy(), atol=1e-6)


def test_a_batchnorm_by_hand() -> None:
    module = ConvNorm(bias=True)
    weight, bias = module.conv.weight.detach().numpy(), module.conv.bias.detach().numpy()
    model = lowered(module)
    fold_batchnorm(model)
    folded = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    factor = 2.0 / np.sqrt(0.5 + 1e-5)
    np.testing.assert_allclose(folded["conv.weight"][0], weight[0] * factor, rtol=1e-6)
    np.testing.assert_allclose(folded["conv.bias"][0], 1.0 + (bias[0] - 0.3) * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ConvNorm(twice=True), "something else reads the convolution too"),
        (ConvNorm(bare=True), "its input is no convolution"),
    ],
)
def test_folding_declines_with_a_reason(module: nn.Module, reason: str) -> None:
    model = lowered(module)
    (report,) = apply_checked((fold_batchnorm,), model, sample_of(module))
    assert report.applied == 0
    assert reason in report.declined[0]
    assert "BatchNormalization" in operators(model)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_becomes_a_convolution_bit_for_bit(stride: int) -> None:
    module = Shortcut((0, 0, 0, 0, 1, 2), stride)
    model = lowered(module)
    before = lowered(module)
    (report,) = apply_checked((strided_shortcut,), model, sample_of(module))
    assert report == PassReport("strided_shortcut", 1)
    assert operators(model) == ["Conv", "Relu", "Conv"]
    with OrtEngine(before.SerializeToString()) as a, OrtEngine(model.SerializeToString()) as b:
        np.testing.assert_array_equal(*(e.run({"images": IMAGES})["out"] for e in (a, b)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Shortcut((1, 1, 0, 0, 1, 1)), "other axes than channels"),
        (Shortcut((0, 0, 0, 0, 1, 1), start=1), "more than stride"),
    ],
)
def test_rewriting_a_shortcut_declines_with_a_reason(module: nn.Module, reason: str) -> None:
    model = lowered(module)
    (report,) = apply_checked((strided_shortcut,), model, sample_of(module))
    assert report.applied == 0
    assert reason in report.declined[0]


def broken_by(factor: float) -> Pass:
    def break_it(model: ModelProto) -> PassReport:
        tensor = model.graph.initializer[0]
        values = numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return PassReport("break_it", 1)

    return break_it


def no_graph(model: ModelProto) -> PassReport:
    model.graph.node[0].input[0] = "nowhere"
    return PassReport("no_graph", 1)


@pytest.mark.parametrize("factor", [1.01, 1 + 1e-5, np.nan])
def test_a_pass_that_breaks_the_model_is_undone(factor: float) -> None:
    torch.manual_seed(0)
    module = ConvNorm()
    model, before = lowered(module), lowered(module)
    (report,) = apply_checked((broken_by(factor),), model, sample_of(module))
    assert (report.name, report.applied) == ("break_it", 0)
    assert re.search("^test: out would be .* from its value in float64", report.declined[0])
    assert model == before
    (reason,) = declined({"test": [report]})
    assert reason.startswith("break_it declined: out would be")


def test_the_passes_after_one_that_was_undone_are_run() -> None:
    torch.manual_seed(0)
    module = ConvNorm()
    model = lowered(module)
    reports = apply_checked((no_graph, fold_batchnorm), model, sample_of(module))
    assert "ONNX Runtime cannot load the graph" in reports[0].declined[0]
    assert reports[1] == PassReport("fold_batchnorm", 1)
    assert operators(model) == ["Conv"]


def test_a_pass_is_judged_by_the_truth_and_not_by_what_it_found() -> None:
    """Off by 1e-4 before: what is 7e-4 off is no worse than rounding, and what is 9e-4 off is."""
    exact = np.array([1.0, 0.5])
    before = (exact + 1e-4).astype(np.float32)
    for error, reason in ((-7e-4, ""), (9e-4, "out would be 0.0009 from its value in float64")):
        assert too_far("out", before, (exact + error).astype(np.float32), exact).startswith(reason)
        assert bool(reason) == bool(too_far("out", before, exact + error, exact))


def test_what_was_exact_may_lose_its_last_bits() -> None:
    exact = np.array([100.0, 0.0])
    before = exact.astype(np.float32)
    assert not too_far("out", before, exact + 8 * 2.0**-17, exact)
    assert too_far("out", before, exact + 9 * 2.0**-17, exact)


def test_an_operator_outside_the_table_is_named() -> None:
    with pytest.raises(CheckFailedError, match=r"cannot export aten\.sigmoid"):
        lowered(nn.Sigmoid())


@pytest.mark.parametrize(
    ("module", "limit"),
    [(nn.ReflectionPad2d(1), "zero padding"), (nn.AdaptiveAvgPool2d(2), "global average pooling")],
)
def test_what_an_operator_cannot_do_is_named(module: nn.Module, limit: str) -> None:
    with pytest.raises(CheckFailedError, match=limit):
        lowered(module)


def test_an_invalid_graph_is_not_written(tmp_path) -> None:
    writer = GraphWriter()
    writer.emit("Relu", ["nowhere"], "out")
    with pytest.raises(CheckFailedError, match="no valid ONNX"):
        write_model(writer.model("test", [IMAGE], [OUTPUT]), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
