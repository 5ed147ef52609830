"""Schemas of the custom operators: inputs, outputs, types and shapes, as a table.

From the table come ``onnx.defs.OpSchema`` objects with documentation and shape inference, which
:func:`register_schemas` makes known to ``onnx`` for models that carry no bodies, and the reference
in ``docs/reference/custom-ops.md``.

Shapes: N images, C channels, H height, W width, R rows (images or tokens), E experts, K experts per
row, S = R * K choices, D values into a linear layer and H out of it; ``...`` is any number of
dimensions.
"""

from dataclasses import dataclass

import onnx
from onnx import TensorProto, TypeProto, defs, helper
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext

from advmoe_deploy.export.graph.op_bodies import OPSET_VERSION
from advmoe_deploy.runtime.onnxruntime.custom_ops import DOMAIN

_KINDS = {OpSchema.AttrType.INT: "int", OpSchema.AttrType.FLOAT: "float"}
_TYPES = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


@dataclass(frozen=True)
class Argument:
    """An input or an output; the sizes in ``shape`` are called by letters."""

    name: str
    type: str
    shape: tuple[str, ...]
    doc: str


@dataclass(frozen=True)
class Attribute:
    """A required attribute; ``size`` is the letter of the size that it gives."""

    name: str
    type: OpSchema.AttrType
    doc: str
    size: str | None = None


@dataclass(frozen=True)
class Operator:
    """One custom operator."""

    name: str
    doc: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    attributes: tuple[Attribute, ...] = ()

    def schema(self) -> OpSchema:
        """Return the schema; it infers types and shapes."""
        schema = OpSchema(
            self.name,
            DOMAIN,
            OPSET_VERSION,
            self.doc,
            inputs=[_parameter(argument) for argument in self.inputs],
            outputs=[_parameter(argument) for argument in self.outputs],
            attributes=[
                OpSchema.Attribute(a.name, a.type, a.doc, required=True) for a in self.attributes
            ],
        )
        schema.set_type_and_shape_inference_function(self._infer)
        return schema

    def _infer(self, context: InferenceContext) -> None:
        """Give every output its type, and the sizes that inputs and attributes tell."""
        sizes = {"1": _size(1)}
        rest: list[onnx.TensorShapeProto.Dimension] | None = None
        for index, argument in enumerate(self.inputs):
            type_ = context.get_input_type(index)
            if type_ is None or not type_.tensor_type.HasField("shape"):
                continue
            dims = list(type_.tensor_type.shape.dim)
            sizes |= zip(argument.shape, dims, strict=False)
            if argument.shape[-1] == "...":
                rest = dims[len(argument.shape) - 1 :]
        for attribute in self.attributes:
            given = context.get_attribute(attribute.name)
            if attribute.size and given is not None:
                sizes |= {attribute.size: _size(given.i), f"{attribute.size}+1": _size(given.i + 1)}
        for index, argument in enumerate(self.outputs):
            context.set_output_type(index, _type_of(argument, sizes, rest))


Dimension = onnx.TensorShapeProto.Dimension


def _type_of(
    argument: Argument, sizes: dict[str, Dimension], rest: list[Dimension] | None
) -> TypeProto:
    known = argument.shape[-1:] != ("...",) or rest is not None
    result = helper.make_tensor_type_proto(_TYPES[argument.type], [] if known else None)
    if known:
        letters = [letter for letter in argument.shape if letter != "..."]
        dims = [sizes.get(letter, Dimension()) for letter in letters] + (
            list(rest or []) if len(letters) < len(argument.shape) else []
        )
        result.tensor_type.shape.dim.extend(dims)
    return result


def _size(value: int) -> Dimension:
    return Dimension(dim_value=value)


def _parameter(argument: Argument) -> OpSchema.FormalParameter:
    shape = ", ".join(argument.shape)
    return OpSchema.FormalParameter(
        argument.name, f"tensor({argument.type})", f"[{shape}] {argument.doc}"
    )


_SOURCES = {
    "": (
        "Chooses experts by their scores.",
        (Argument("scores", "float", ("R", "E"), "Scores of the experts."),),
    ),
    "Linear": (
        "Scores experts by a linear layer and chooses by the scores.",
        (
            Argument("x", "float", ("R", "C"), "Rows: images or tokens."),
            Argument("weight", "float", ("E", "C"), "Weight of the linear layer."),
            Argument("bias", "float", ("E",), "Its bias."),
        ),
    ),
    "PoolLinear": (
        "Averages a feature map over its area, scores experts by a linear layer, and chooses.",
        (
            Argument("x", "float", ("R", "C", "H", "W"), "Feature maps, one per image."),
            Argument("weight", "float", ("E", "C"), "Weight of the linear layer."),
            Argument("bias", "float", ("E",), "Its bias."),
        ),
    ),
}
_K = Attribute("k", OpSchema.AttrType.INT, "Experts per row, at most E.", "K")
_EPSILON = Attribute("epsilon", OpSchema.AttrType.FLOAT, "What the sum of the chosen is raised by.")
_WEIGHTINGS: dict[str, tuple[str, tuple[Attribute, ...]]] = {
    "Top1": ("The best one, weight 1.", ()),
    "TopKProbability": ("The k best, weighted by the softmax over all experts.", (_K,)),
    "TopKRenormalised": (
        "The k best, weighted by the softmax over all experts, divided by its sum over the chosen "
        "plus epsilon.",
        (_K, _EPSILON),
    ),
}
_TIES = (
    "Equal scores go to the lowest index. The kernel takes NaN for the greatest score, as PyTorch "
    "and NumPy do; a body does as its runtime's ArgMax or TopK does."
)


def _router(source: str, weighting: str) -> Operator:
    scoring, inputs = _SOURCES[source]
    rule, attributes = _WEIGHTINGS[weighting]
    k = "K" if attributes else "1"
    outputs = (
        Argument("ids", "int64", ("R", k), "The chosen experts, best first."),
        Argument("weights", "float", ("R", k), "Their weights."),
        Argument("scores", "float", ("R", "E"), "The scores."),
    )
    return Operator(
        f"{source}Router{weighting}",
        f"{scoring} {rule} {_TIES}",
        inputs,
        outputs if source else outputs[:2],
        attributes,
    )


CUSTOM_OPERATORS = (
    *(_router(source, weighting) for source in _SOURCES for weighting in _WEIGHTINGS),
    Operator(
        "ExpertDispatch",
        "Sorts the choices by expert, keeping their order within one. The kernel refuses an id "
        "outside 0 ... E - 1.",
        (Argument("ids", "int64", ("R", "K"), "The chosen experts."),),
        (
            Argument("rows", "int64", ("S",), "The row of each choice, sorted by expert."),
            Argument("positions", "int64", ("R", "K"), "Where in that order each choice stands."),
            Argument("offsets", "int64", ("E+1",), "Where each expert's begin; the last is S."),
            Argument("busy", "bool", ("E",), "Whether an expert has any row."),
        ),
        (Attribute("num_experts", OpSchema.AttrType.INT, "E.", "E"),),
    ),
    Operator(
        "ExpertLinear",
        "A linear layer of every expert, each on its own rows: y = x weight[e] + bias[e] where x "
        "are the rows offsets[e] ... offsets[e + 1] - 1. In the kernel an answer depends neither "
        "on the other rows nor on the number of threads.",
        (
            Argument("x", "float", ("S", "D"), "Rows, sorted by expert."),
            Argument("offsets", "int64", ("E+1",), "Where each expert's begin; the last is S."),
            Argument("weight", "float", ("E", "D", "H"), "The experts' weights."),
            Argument("bias", "float", ("E", "H"), "Their biases."),
        ),
        (Argument("y", "float", ("S", "H"), "The answers, sorted by expert."),),
    ),
    Operator(
        "ExpertCombine",
        "Brings the experts' answers back into the rows' order, one answer per row.",
        (
            Argument("grouped", "float", ("S", "..."), "The answers, sorted by expert."),
            Argument("positions", "int64", ("R", "1"), "Where each row's answer stands."),
        ),
        (Argument("combined", "float", ("R", "..."), "The answers in the rows' order."),),
    ),
    Operator(
        "ExpertWeightedCombine",
        "Adds up the answers to each row, each times its weight.",
        (
            Argument("grouped", "float", ("S", "..."), "The answers, sorted by expert."),
            Argument("positions", "int64", ("R", "K"), "Where each row's answers stand."),
            Argument("weights", "float", ("R", "K"), "Their weights."),
        ),
        (Argument("combined", "float", ("R", "..."), "The weighted sums."),),
    ),
)


def register_schemas() -> None:
    """Make the operators known to ``onnx`` in this process; again is no mistake."""
    for operator in CUSTOM_OPERATORS:
        if not defs.has(operator.name, OPSET_VERSION, DOMAIN):
            defs.register_schema(operator.schema())


def reference() -> str:
    """Return the operators as Markdown."""
    return "\n".join(_section(operator) for operator in CUSTOM_OPERATORS)


def _section(operator: Operator) -> str:
    rows = [
        *(("input", a.name, f"{a.type} [{', '.join(a.shape)}]", a.doc) for a in operator.inputs),
        *(("output", a.name, f"{a.type} [{', '.join(a.shape)}]", a.doc) for a in operator.outputs),
        *(("attribute", a.name, _KINDS[a.type], a.doc) for a in operator.attributes),
    ]
    lines = [f"| {kind} | `{name}` | {type_} | {doc} |" for kind, name, type_, doc in rows]
    return "\n".join(
        [
            f"### {operator.name}\n",
            f"{operator.doc}\n",
            "| | | | |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )
