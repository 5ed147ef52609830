"""Compiler of engines for GPUs that need not be here, by TensorRT for RTX; needs no PyTorch.

Nothing loads such an engine without its GPU, the library's own inspector included. So what is
examined is what can be: what the library read in the graph, whether the engine has all of it, and
the answers of the graph, run as the engine will be.
"""

import hashlib
from collections.abc import Mapping

from onnx import ModelProto, TensorProto, ValueInfoProto

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.precision.casts import precision_of
from advmoe_deploy.export.tensorrt.builders import EngineBuilder, GpuBuilder, OnCpu
from advmoe_deploy.reports.devices import GpuLibrary
from advmoe_deploy.runtime.engine import Engine, Source, content_of
from advmoe_deploy.runtime.tensorrt.api import INetworkDefinition
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, build_engine
from advmoe_deploy.runtime.tensorrt.device import rtx_device
from advmoe_deploy.runtime.tensorrt.rtx.network import Network, NetworkTensor, describe
from advmoe_deploy.runtime.tensorrt.shapes import Shapes

_TYPES: dict[int, str] = {TensorProto.FLOAT: "FLOAT", TensorProto.INT64: "INT64"}
# The operators that choose, and the library's layer for both.
_CHOOSING, _CHOICE = ("ArgMax", "TopK"), "TOPK"


class RtxCompiler(OnCpu):
    """Compiles engines; the graph that a file was compiled from answers in its place.

    ``networks`` has by engine what the library read in its graph.
    """

    def __init__(self, options: BuildOptions) -> None:
        """Find the library.

        Raises:
            BackendUnavailableError: TensorRT for RTX is missing.
        """
        super().__init__(options.batch, name="tensorrt-rtx")
        self.device = rtx_device(options)
        # Kernels are chosen at run time, for every size: a profile for the least would be in vain.
        self._options = options.model_copy(update={"batch_min_profile": False})
        self._graphs: dict[str, bytes] = {}
        self.networks: dict[str, Network] = {}

    def build(self, name: str, graph: bytes, shapes: Mapping[str, Shapes]) -> bytes:
        """Return the serialised engine of a graph with inputs of these shapes.

        Raises:
            CheckFailedError: the library read something else than the graph says.
        """
        model = ModelProto.FromString(graph)

        def inspect(network: INetworkDefinition) -> None:
            self.networks[name] = describe(network)
            require_as_written(name, model, self.networks[name])

        engine = build_engine(
            graph,
            shapes,
            self._options,
            precision=precision_of(model),
            name=name,
            library="tensorrt-rtx",
            inspect=inspect,
        )
        self._graphs[_hash(engine)] = graph
        return engine

    def open(self, engine: Source) -> Engine:
        """Return an engine that answers as what it was compiled from."""
        return super().open(self._graph_of(engine))

    def _graph_of(self, engine: Source) -> bytes:
        content = content_of(engine)
        if _hash(content) not in self._graphs:
            raise CheckFailedError(f"{engine!s:.200} is not what was compiled; export again")
        return self._graphs[_hash(content)]


def engine_builder(library: GpuLibrary, options: BuildOptions) -> EngineBuilder:
    """Return what builds engines of a library.

    Raises:
        BackendUnavailableError: it is missing, or the GPU that it needs.
    """
    return RtxCompiler(options) if library == "tensorrt-rtx" else GpuBuilder(options)


def require_as_written(name: str, graph: ModelProto, network: Network) -> None:
    """Check what the library read in a graph: its ends, its choices, and that scores are exact.

    Raises:
        CheckFailedError: it is not what the graph says.
    """
    for what, read, written in (
        ("inputs", network.inputs, graph.graph.input),
        ("outputs", network.outputs, graph.graph.output),
    ):
        expected = {value.name: _declared(value) for value in written}
        if read != expected:
            raise _misread(name, f"{what} {read}", str(expected))
    choosing = [node for node in graph.graph.node if node.op_type in _CHOOSING]
    if network.kinds[_CHOICE] != len(choosing):
        raise _misread(name, f"{network.kinds[_CHOICE]} choices", str(len(choosing)))
    for node in choosing:
        scores = (network.made | network.inputs).get(node.input[0])
        if scores is None or scores.dtype != "FLOAT":
            raise _misread(name, f"{node.input[0]} as {scores}", "float32")


def _declared(value: ValueInfoProto) -> NetworkTensor:
    kind = value.type.tensor_type
    shape = tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim)
    return NetworkTensor(_TYPES[kind.elem_type], shape)


def _misread(name: str, read: str, written: str) -> CheckFailedError:
    return CheckFailedError(
        f"TensorRT for RTX reads {read} in {name} instead of {written}; use another --precision, "
        "or a newer release"
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
