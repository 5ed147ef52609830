"""Which layers of a float16 graph stay in float32, in a network that a real parser makes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# The library for RTX parses without a GPU. A router: what its last lines make is exact.
PARSED = """
import json, sys
import numpy as np
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper, numpy_helper
from advmoe_deploy.runtime.tensorrt.build import float32_layers

def weights(name, shape, dtype):
    return numpy_helper.from_array(np.ones(shape, dtype), name)

def cast(given, made, to):
    return helper.make_node("Cast", [given], [made], made, to=to)

nodes = [
    cast("images", "low", TensorProto.FLOAT16),
    helper.make_node("Conv", ["low", "w"], ["features"], "first convolution"),
    helper.make_node("Relu", ["features"], ["active"], "first activation"),
    cast("active", "high", TensorProto.FLOAT),
    helper.make_node("Conv", ["high", "v"], ["map"], "last convolution"),
    helper.make_node("GlobalAveragePool", ["map"], ["pooled"], "pool"),
    helper.make_node("Flatten", ["pooled"], ["scores"], "flat"),
    helper.make_node("TopK", ["scores", "k"], ["best", "places"], "choice", axis=1),
    helper.make_node("Softmax", ["scores"], ["shares"], "shares", axis=1),
    helper.make_node("GatherElements", ["shares", "places"], ["weights"], "weights", axis=1),
    helper.make_node("Reshape", ["places", "shape"], ["ids"], "ids"),
]
kinds = {"images": TensorProto.FLOAT, "ids": TensorProto.INT64, "weights": TensorProto.FLOAT}
shapes = {"images": ["N", 3, 8, 8], "ids": ["N", 1], "weights": ["N", 1]}
ends = [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in kinds]
constants = [
    weights("w", (4, 3, 3, 3), np.float16),
    weights("v", (2, 4, 3, 3), np.float32),
    numpy_helper.from_array(np.array([1]), "k"),
    numpy_helper.from_array(np.array([-1, 1]), "shape"),
]
graph = helper.make_graph(nodes, "router", ends[:1], ends[1:], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
assert parser.parse(model.SerializeToString())
every = [network.get_layer(index) for index in range(network.num_layers)]
print(json.dumps({
    "exact": [layer.name for layer in float32_layers(network)],
    "all": [layer.name for layer in every],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="no TensorRT for RTX"
)
def test_what_leads_to_scores_is_held_to_float32() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSED],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    exact, every = set(said["exact"]), set(said["all"])
    tail = {"last convolution", "pool", "choice", "shares", "weights"}
    assert tail <= exact
    assert {"first convolution", "first activation"} <= every - exact
    assert not exact & {"low", "high", "ids"}
