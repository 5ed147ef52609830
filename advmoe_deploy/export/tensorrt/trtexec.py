"""Build script for NVIDIA's ``trtexec``, where Python is not wanted."""

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, TensorProto, helper

from advmoe_deploy.runtime.tensorrt.build import TACTIC_SOURCES, BuildOptions
from advmoe_deploy.runtime.tensorrt.shapes import Shapes
from advmoe_deploy.specs import Precision

SCRIPT = "build.sh"

_HEAD = """\
#!/usr/bin/env bash
# Builds one engine per graph of this folder with trtexec, for the GPU of this machine and for the
# TensorRT that trtexec belongs to; an engine runs on no other GPU and with no other release.
#
#   TRTEXEC=/usr/src/tensorrt/bin/trtexec OUT=/where/engines/go ./build.sh
#
# Precision is in the graphs (float16 or bfloat16 tensors, Q/DQ pairs), and TensorRT 10 and newer
# take it from there. For TensorRT 8.6 set WEAK=1: flags allow it then, and there is no bf16. A flag
# concerns a whole engine: a graph with layers to be held to float32, as those that lead to scores,
# gets none and is float32 throughout.
# Shapes are least, best and largest: batch {batch}; an expert gets any number of the rows.
# A second profile is for exactly the least; WEAK=1 leaves it out.
set -euo pipefail
cd "$(dirname "$0")"
trtexec=${{TRTEXEC:-trtexec}}
out=${{OUT:?say where the engines go, outside of the bundle, which takes no other files}}
mkdir -p "$out"
typed() {{ if [[ ${{WEAK:-}} ]]; then echo "$@"; else echo --stronglyTyped; fi; }}
strong() {{ if [[ ! ${{WEAK:-}} ]]; then echo "$@"; fi; }}
"""
_WEAK: dict[Precision, str] = {"fp32": "", "fp16": "--fp16", "bf16": "--bf16", "int8": "--int8"}


def build_script(
    shapes: Mapping[str, Mapping[str, Shapes]],
    graphs: Mapping[str, ModelProto],
    precisions: Mapping[str, Precision],
    options: BuildOptions,
) -> str:
    """Return the script for the graphs in ``shapes``, by name and input.

    Those that ``precisions`` does not name are fp32.
    """

    def line(name: str) -> str:
        precision = precisions.get(name, "fp32")
        exact = precision == "fp16" and computes_in_float32(graphs[name].graph)
        flag = "" if exact else _WEAK[precision]
        return f"# {name}: {precision}\n{_call(name, shapes[name], flag, options)}"

    batch = f"{options.batch.min}, {options.batch.opt}, {options.batch.max}"
    return "\n".join([_HEAD.format(batch=batch), *map(line, shapes)]) + "\n"


def computes_in_float32(graph: GraphProto) -> bool:
    """Return whether anything but casts, and what asks for shapes, reads float32 of ``graph``.

    That is inputs and what is cast to it; one reader of these suffices.
    """
    exact = {e.name for e in graph.input if e.type.tensor_type.elem_type == TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "Cast":
            (to,) = (helper.get_attribute_value(a) for a in node.attribute if a.name == "to")
            exact.update(node.output if to == TensorProto.FLOAT else ())
        elif node.op_type != "Shape" and not exact.isdisjoint(node.input):
            return True
    return False


def _call(name: str, shapes: Mapping[str, Shapes], weak: str, options: BuildOptions) -> str:
    """Return the call of trtexec for one graph, in one line; ``weak`` is its flag of precision."""
    first, *more = options.profiles(shapes)
    words = [
        '"$trtexec"',
        f"--onnx='{name}.onnx'",
        f"--saveEngine=\"$out\"/'{name}.engine'",
        *(["$(strong --profile=0)"] if more else []),
        _sizes(first),
        *(f"$(strong --profile={n} {_sizes(each)})" for n, each in enumerate(more, start=1)),
        f"$(typed {weak})".replace(" )", ")"),
        *_flags(options),
        '--timingCacheFile="$out"/timings',
        "--skipInference",
    ]
    return " ".join(words)


def _sizes(shapes: Mapping[str, Shapes]) -> str:
    """Return the words for the shapes of a profile."""

    def of(kind: str) -> str:
        each = ((tensor, getattr(shape, kind)) for tensor, shape in shapes.items())
        return ",".join(f"{tensor}:{'x'.join(map(str, size))}" for tensor, size in each)

    return " ".join(f"--{kind}Shapes='{of(kind)}'" for kind in ("min", "opt", "max"))


def _flags(options: BuildOptions) -> list[str]:
    flags = [] if options.tf32 else ["--noTF32"]
    if options.workspace_mib is not None:
        flags.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    if options.optimization_level is not None:
        flags.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.version_compatible:
        flags.append("--versionCompatible")
    if options.refittable:
        flags.append("--refit")
    if (wanted := options.tactic_sources) is not None:
        # trtexec adds to and takes from its own choice, so that what is not wanted is named, too.
        signs = [f"{'+' if name in wanted else '-'}{name}" for name in TACTIC_SOURCES]
        flags.append(f"--tacticSources={','.join(signs)}")
    return flags
