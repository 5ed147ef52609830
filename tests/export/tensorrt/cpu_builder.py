"""Builds for ONNX Runtime on the CPU what is built for a GPU; imports no torch."""

from collections.abc import Mapping

from onnx import ModelProto

from advmoe_deploy.export.targets import Target
from advmoe_deploy.export.tensorrt.builders import OnCpu
from advmoe_deploy.reports.devices import EngineDevice
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes
from advmoe_deploy.specs import Precision

BATCH = BatchProfile(min=1, opt=8, max=32)
BUILD = BuildOptions(batch=BATCH)


def graphs_in(precision: Precision) -> Target:
    """Return the target that writes graphs alone, for engines to be built of."""
    return Target("tensorrt", precision, onnx_only=True, build=BUILD)


class CpuBuilder(OnCpu):
    """An engine is its graph, tied to no GPU at all."""

    def __init__(self, *, tf32: bool = False) -> None:
        super().__init__(BATCH)
        self.device = EngineDevice(
            gpu="none", compute_capability=(0, 0), tensorrt="1.2.3.4", tf32=tf32
        )

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        inputs = ModelProto.FromString(graph).graph.input
        assert shapes.keys() == {tensor.name for tensor in inputs}
        return graph
