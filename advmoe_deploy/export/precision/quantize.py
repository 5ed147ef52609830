"""Quantisation to int8 by Q/DQ pairs; the only module that knows ONNX Runtime's quantizer.

Weights are signed and symmetric, a scale per output channel; activations unsigned with a zero
point, a scale per tensor: what both ONNX Runtime and OpenVINO have fast kernels for. Scales are
taken from what each segment really gets: the images run through the plan, so that an expert sees
the rows that are sent to it.
"""

import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from advmoe_deploy.export.precision.recording import RecordedRows, Recording
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.plan import Plan
from advmoe_deploy.process import without_telemetry

with without_telemetry():
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

# A segment without any of these is not worth it: what it does is light.
_HEAVY = frozenset({"Conv", "Gemm", "MatMul"})
_QUANTISED = ["Conv", "Gemm", "MatMul", "MaxPool", "AveragePool"]
# Scores and logits come out of these: 256 steps would tie what differs.
_FLOAT_OUTPUTS = ["Gemm", "MatMul"]
# A residual sum in int8 rounds its terms once more: on CPUs logits then differ by a fifth more, and
# no time is won. TensorRT fuses it into the convolution before it only if its other term is int8.
_SUMS = ["Add"]
_SYMMETRIC = {"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}


def quantised_segments(
    plan: Plan,
    graphs: Mapping[str, ModelProto],
    images: Images,
    image_shape: tuple[int, int, int],
    *,
    symmetric: bool = False,
) -> tuple[dict[str, ModelProto], tuple[str, ...]]:
    """Return the heavy segments with Q/DQ pairs, calibrated on float32 ``images`` [N, C, H, W].

    ``symmetric`` is that of :func:`quantised`.

    Also returned are the experts that no image visits: they were calibrated on the rows of all
    experts of their layer.
    """
    result, unvisited = {}, []
    heads = {*plan.outputs, *(route.scores for route in plan.routes)}
    sources = {name: graph.SerializeToString() for name, graph in graphs.items()}
    with Recording(plan, sources, image_shape) as recording:
        # Layer by layer, and the images run anew for each: what all of them are given together
        # may be more than fits into memory.
        for names in plan.units:
            if not any(is_heavy(graphs[name], heads) for name in names):
                continue
            rows = recording.rows_of(names, images)
            of_all = [batch for name in names for batch in rows[name]]
            for name in names:
                if not rows[name]:
                    unvisited.append(name)
                    rows[name] = _renamed(of_all, plan.segment(name).inputs[0].name)
                if is_heavy(graphs[name], heads):
                    result[name] = quantised(
                        graphs[name], rows[name], symmetric=symmetric, heads=heads
                    )
    return result, tuple(unvisited)


def is_heavy(graph: ModelProto, heads: Container[str]) -> bool:
    """Return whether ``graph`` does anything that is worth quantising beside making ``heads``."""
    return any(n.op_type in _HEAVY and n.output[0] not in heads for n in graph.graph.node)


def quantised(
    graph: ModelProto,
    rows: RecordedRows,
    *,
    symmetric: bool = False,
    heads: Container[str] = frozenset(),
) -> ModelProto:
    """Return ``graph`` with Q/DQ pairs whose scales cover ``rows``, a list of its inputs.

    With ``symmetric``, as TensorRT wants it: zero points of 0, weights in float32 between a pair of
    their own, biases in float32. Matrix products that make ``heads``, scores or logits, stay in
    float32: it costs next to nothing, and the rounding of pooled features shifts all scores one
    way.
    """
    marked = ModelProto()
    marked.CopyFrom(graph)
    # Shapes are known and normalisations folded: what the quantizer's own preparation is for.
    marked.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save_model(marked, source)
        quantize_static(
            str(source),
            str(target),
            _Reader(rows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED + (_SUMS if symmetric else []),
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=[
                node.name
                for node in marked.graph.node
                if node.op_type in _FLOAT_OUTPUTS and node.output[0] in heads
            ],
            extra_options={
                "OpTypesToExcludeOutputQuantization": _FLOAT_OUTPUTS,
                **(_SYMMETRIC if symmetric else {}),
            },
        )
        result = onnx.load_model(target)
    result.graph.name = graph.graph.name
    for field in ("producer_name", "producer_version"):
        setattr(result, field, getattr(graph, field))
    del result.metadata_props[:]
    return result


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands rows to the quantizer, a batch at a time."""

    def __init__(self, rows: RecordedRows) -> None:
        self._batches = iter(rows)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch by input, or nothing."""
        return next(self._batches, None)


def _renamed(rows: RecordedRows, name: str) -> RecordedRows:
    """Return ``rows`` of a single input each, called ``name``."""
    return [{name: values} for inputs in rows for values in inputs.values()]
