"""A routing segment's graph with plugins in the place of softmax and top-k, for TensorRT to read.

Only to find out whether they are faster: such a graph is no standard ONNX.
"""

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, helper

from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.export.tensorrt.graphs import with_routes
from advmoe_deploy.plan import RouteStep, Segment
from benchmarks.gpu.experiments.router_plugin import NAMESPACE


def plugin_of(route: RouteStep) -> str:
    """Return the name of the plugin that decides as ``route`` does."""
    return f"Router_{route.weighting}_{route.top_k}_of_{len(route.kept)}"


def with_plugins(graph: ModelProto, routes: Sequence[RouteStep], segment: Segment) -> ModelProto:
    """Return ``graph`` with ``routes`` decided by plugins.

    ``segment`` declares its ends: they are those of the graph with TensorRT's own layers.
    """
    return with_routes(graph, routes, segment, _write_plugin)


def _write_plugin(writer: GraphWriter, route: RouteStep, choices: str, weights: str) -> None:
    ids = f"{choices}/int32"
    # What TensorRT's parser looks a plugin up by, beside the operator's name.
    words = {"plugin_namespace": NAMESPACE, "plugin_version": "1"}
    node = helper.make_node(plugin_of(route), [route.scores], [ids, weights], weights, **words)
    writer.nodes.append(node)
    writer.emit("Cast", [ids], choices, to=TensorProto.INT64)
