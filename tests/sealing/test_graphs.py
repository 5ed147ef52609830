"""What a bundle's graphs are made of is what the manifest's hashes cover."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from advmoe_deploy.bundle import MODEL, open_bundle
from advmoe_deploy.errors import BundleError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.sealing.golden import golden_arrays
from tests.sealing.bundles import put

DATA = "weights.bin"
OPENVINO_GRAPH = "engines/openvino-fp32/model.onnx"


def with_data_outside(bundle: Path, name: str, location: str) -> bytes:
    """Move the tensors of a graph into a file, say that they are at ``location``; return them."""
    model = onnx.load_model(bundle / name)
    convert_model_to_external_data(model, location=DATA, size_threshold=0)
    beside = bundle.parent / "beside"
    beside.mkdir()
    onnx.save_model(model, beside / "model.onnx")
    moved = onnx.load_model(beside / "model.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    put(bundle, name, moved.SerializeToString())
    return (beside / DATA).read_bytes()


def refusal(bundle: Path, engine: str = "onnxruntime") -> str:
    with pytest.raises(BundleError) as caught, open_runner(open_bundle(bundle), engine):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file_is_not_given_to_many_tensors(copied: Path) -> None:
    data = bytes(4 << 20)
    tensors = [TensorProto(name=f"t{n}", dims=[1 << 20], data_type=1) for n in range(50)]
    for tensor in tensors:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=DATA)
    graph = onnx.load_model(copied / MODEL)
    graph.graph.initializer.extend(tensors)
    put(copied, MODEL, graph.SerializeToString())
    put(copied, DATA, data)
    assert "more than the files they lie in" in refusal(copied)


@pytest.mark.parametrize(
    ("engine", "graph"), [("onnxruntime", MODEL), ("openvino", OPENVINO_GRAPH)]
)
def test_data_that_no_hash_covers_are_refused(copied: Path, engine: str, graph: str) -> None:
    data = with_data_outside(copied, graph, DATA)
    outside = Path(graph).parent / DATA
    text = refusal(copied, engine)
    assert f"'{DATA}'" in text
    assert "does not list" in text
    put(copied, outside.as_posix(), data)
    (copied / outside).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        open_bundle(copied)


@pytest.mark.parametrize(
    ("engine", "graph"), [("onnxruntime", MODEL), ("openvino", OPENVINO_GRAPH)]
)
def test_data_that_are_listed_are_part_of_the_graph(copied: Path, engine: str, graph: str) -> None:
    data = with_data_outside(copied, graph, DATA)
    put(copied, (Path(graph).parent / DATA).as_posix(), data)
    bundle = open_bundle(copied)
    golden = golden_arrays(bundle)
    with open_runner(bundle, engine) as runner:
        logits = runner.infer(golden["images"]).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "location",
    ["../weights.bin", "/etc/hostname", "a/../weights.bin", "a\\weights.bin", "", "a\0b"],
)
def test_data_elsewhere_are_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    data = with_data_outside(copied, MODEL, location)
    (copied.parent / DATA).write_bytes(data)
    monkeypatch.chdir(copied)  # where a runtime looks that knows no path
    assert "does not list" in refusal(copied)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "99999999999999999999", "x"])
def test_a_place_outside_the_data_is_refused(copied: Path, key: str, value: str) -> None:
    data = with_data_outside(copied, MODEL, DATA)
    put(copied, DATA, data)
    model = onnx.load_model(copied / MODEL, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = [entry for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    tensor.external_data.extend([*kept, onnx.StringStringEntryProto(key=key, value=value)])
    put(copied, MODEL, model.SerializeToString())
    assert "outside the file" in refusal(copied)


def _in_a_branch(location: str) -> onnx.ModelProto:
    """Return a graph whose tensor with data outside is a constant in a branch of an ``If``."""
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "hidden")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.append(onnx.StringStringEntryProto(key="location", value=location))
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branch = helper.make_graph([constant], "branch", [], [out])
    condition = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    given = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    return helper.make_model(helper.make_graph([condition], "main", [given], [out]))


def _of_an_engine(file: str) -> onnx.ModelProto:
    """Return a graph that is but the name of a file with an engine."""
    node = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context=file
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    return helper.make_model(helper.make_graph([node], "main", ends[:1], ends[1:]))


@pytest.mark.parametrize("made", [_in_a_branch, _of_an_engine])
def test_files_are_named_nowhere_in_a_graph(
    copied: Path, made: Callable[[str], onnx.ModelProto]
) -> None:
    put(copied, MODEL, made("elsewhere.bin").SerializeToString())
    assert "elsewhere.bin" in refusal(copied)


def test_a_graph_that_only_seems_to_name_files_runs(copied: Path) -> None:
    model = onnx.load_model(copied / MODEL)
    model.doc_string = "location of an EPContext"
    put(copied, MODEL, model.SerializeToString())
    bundle = open_bundle(copied)
    with open_runner(bundle) as runner:
        assert len(runner.infer(golden_arrays(bundle)["images"]).logits)


def test_a_graph_of_openvino_with_a_file_beside_it_is_refused(copied: Path) -> None:
    import openvino

    read = openvino.Core().read_model(str(copied / OPENVINO_GRAPH))
    openvino.save_model(read, copied.parent / "ir.xml")
    put(copied, OPENVINO_GRAPH, (copied.parent / "ir.xml").read_bytes())
    put(copied, OPENVINO_GRAPH.replace(".onnx", ".bin"), (copied.parent / "ir.bin").read_bytes())
    assert "OpenVINO cannot load" in refusal(copied, "openvino")
