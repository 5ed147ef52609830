"""Graphs of a bundle: what is edited in them, and the bundle sealed again as if nothing was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, MODEL, Bundle, open_bundle
from advmoe_deploy.sealing.seal import seal_again

Edit = Callable[[ModelProto], None]
IMAGES, LOGITS, IDS = "images", "logits", "router.expert_ids"


def with_fault(bundle: Bundle, path: Path, edit: Edit, *, file: str = MODEL) -> Bundle:
    """Return a copy of ``bundle`` at ``path`` whose graph is edited and whose hashes hold."""
    shutil.copytree(bundle.path, path)
    model = onnx.load(path / file)
    edit(model)
    onnx.save(model, path / file)
    return sealed_again(bundle, path)


def sealed_again(bundle: Bundle, path: Path, **changed: object) -> Bundle:
    """Return the changed copy at ``path``, with a manifest that fits it."""
    for name in (MANIFEST, MANIFEST_HASH):
        (path / name).unlink()
    seal_again(path, bundle.manifest, **changed)
    return open_bundle(path)


def graphs_of(graph: GraphProto) -> list[GraphProto]:
    """Return ``graph`` and, behind it, the branches inside it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(each for one in inner for each in graphs_of(one))]


def weights_of(model: ModelProto, prefix: str = "") -> dict[str, TensorProto]:
    """Return the initializers whose names begin with ``prefix``, those of branches included."""
    tensors = [t for graph in graphs_of(model.graph) for t in graph.initializer]
    return {t.name: t for t in tensors if t.name.startswith(prefix)}


def values_of(tensor: TensorProto) -> np.ndarray:
    """Return what ``tensor`` holds."""
    return numpy_helper.to_array(tensor).copy()


def fill(tensor: TensorProto, values: ArrayLike) -> None:
    """Put ``values`` into ``tensor``, whose type stays."""
    array = np.asarray(values, dtype=values_of(tensor).dtype).copy()
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def constant(model: ModelProto, name: str, values: ArrayLike, dtype: type = np.float32) -> str:
    """Return the name of a new constant of the graph."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
    return name


def before(model: ModelProto, name: str, nodes: list[NodeProto], new: str) -> None:
    """Let everything that reads the input ``name`` read ``new``, which ``nodes`` make of it."""
    for graph in graphs_of(model.graph):
        for node in graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = new
    _insert(model, 0, nodes)


def after(model: ModelProto, name: str, nodes: list[NodeProto]) -> None:
    """Let ``nodes`` make ``name``, which ``raw`` was until now, of ``raw``."""
    graph, place = next(
        (graph, place)
        for graph in graphs_of(model.graph)
        for place, node in enumerate(graph.node)
        if name in node.output
    )
    made = graph.node[place].output
    made[list(made).index(name)] = "raw"
    _insert_in(graph, place + 1, nodes)


def batch_size(model: ModelProto) -> list[NodeProto]:
    """Return nodes that make ``batch`` int64 [1], the number of images."""
    constant(model, "first", [0], np.int64)
    constant(model, "second", [1], np.int64)
    return [
        helper.make_node("Shape", [IMAGES], ["shape"]),
        helper.make_node("Slice", ["shape", "first", "second"], ["batch"]),
    ]


def _insert(model: ModelProto, place: int, nodes: list[NodeProto]) -> None:
    _insert_in(model.graph, place, nodes)


def _insert_in(graph: GraphProto, place: int, nodes: list[NodeProto]) -> None:
    kept = [*graph.node[:place], *nodes, *graph.node[place:]]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
