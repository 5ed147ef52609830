"""Engines of every family, compiled by TensorRT for RTX without a GPU: bytes, seconds and layers.

    python -m benchmarks.gpu.rtx_builds [--models digits,vit-moe] [--minutes 60]

Every model and precision is compiled in a process of its own, the small ones first, and every
engine is written to ``benchmarks/results/rtx_builds.json`` when it is there: the same command again
goes on behind it. What the library refuses is there with the reason, and so is what ran out of
time or memory. Weights are random, but for the digits; engines hold them all the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.files import write_atomically
from advmoe_deploy.specs import ExpertLayers, ModelSpec, Precision
from benchmarks.gpu.common import BATCH, MODELS, Record, facts
from benchmarks.program import named, run_program

ROOT = Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "rtx_builds.json"
TRAINED = ROOT / "tests" / "data" / "trained-run" / "model"
CONV = ExpertLayers(kind="conv", layers=("layer4",))
# The small ones first; ``None`` is the model of digits that the tests keep.
FAMILIES: dict[str, ModelSpec | None] = {
    "digits": None,
    "vit-moe": MODELS["vit-moe"],
    "advmoe-densenet": ModelSpec(family="advmoe", backbone="densenet-bc", num_experts=2, ratio=0.5),
    "advmoe-resnet18": MODELS["advmoe-resnet18"],
    "block-moe": MODELS["block-moe"],
    "conv-moe": ModelSpec(
        family="robust-experts", num_experts=4, weighting="renormalised", expert_layers=CONV
    ),
    "expert-networks": ModelSpec(family="expert-networks", num_experts=4),
    "advmoe-vgg16": ModelSpec(family="advmoe", backbone="vgg16-bn", num_experts=2, ratio=0.5),
    "dual-model": MODELS["dual-model"],
    "advmoe-wrn-28-10": MODELS["advmoe-wrn-28-10"],
}
# int8/fp16 is int8, and fp16 where nothing is quantised.
PRECISIONS = ("fp32", "fp16")
OF_DIGITS = ("fp32", "fp16", "bf16", "int8", "int8/fp16")


def main() -> None:
    """Compile what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(FAMILIES), help="some of them")
    parser.add_argument("--minutes", type=float, default=60.0, help="for a model and precision")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        compile_one(options.out, *options.one)
        return
    for model in named("model", options.models, FAMILIES):
        for precision in OF_DIGITS if FAMILIES[model] is None else PRECISIONS:
            run_one(options.out, model, precision, 60 * options.minutes)


def run_one(out: Path, model: str, precision: str, seconds: float) -> None:
    """Compile a model in a process of its own, and write down how it ended."""
    if read(out)["builds"].get(model, {}).get(precision, {}).get("complete"):
        return
    command = [sys.executable, "-m", "benchmarks.gpu.rtx_builds", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, "--one", model, precision],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=False,
        )
        ended = "" if done.returncode == 0 else f"{done.returncode}: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        ended = f"not in {seconds:g} s"
    record(out, model, precision, {"ended": ended, "complete": not ended})
    print(model, precision, ended or "complete", flush=True)


def compile_one(out: Path, model: str, precision: str) -> None:
    """Compile every engine of a model that is not in the file, and write down what it is."""
    for name, graph, shapes in graphs_of(model, precision):
        there = read(out)["builds"].get(model, {}).get(precision, {}).get("engines", {})
        if "bytes" not in there.get(name, {}):
            started = time.perf_counter()
            try:
                found = compiled(name, graph, shapes)
            except AdvMoEError as error:
                found = {"error": str(error)}
            found = {"seconds": round(time.perf_counter() - started, 1), **found}
            record(out, model, precision, {"engines": {**there, name: found}})


def graphs_of(model: str, precision: str) -> Iterator[tuple[str, bytes, Any]]:
    """Yield name, graph and shapes of every engine; precision is as high as it says everywhere."""
    from advmoe_deploy.export.precision.calibrate import calibrated
    from advmoe_deploy.export.targets import Target
    from advmoe_deploy.export.tensorrt.backend import TensorRtBackend
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions

    kind, _, around = cast("tuple[Precision, str, str]", precision.partition("/"))
    build = BuildOptions(batch=BATCH, unquantised_dtype=around or "fp32")
    subject = _subject(FAMILIES[model])
    backend = TensorRtBackend(Target("tensorrt-rtx", kind, build=build), subject)
    graphs = dict(subject.parts.graphs)
    kinds: dict[str, Precision] = dict.fromkeys(graphs, kind)
    if kind == "int8":
        quantised, _ = calibrated(
            subject.reference.model,
            subject.parts,
            subject.labelled,
            subject.threat,
            symmetric=True,
        )
        graphs |= quantised
        kinds = {name: "int8" if name in quantised else "fp32" for name in graphs}
    lowered = backend.lower(graphs, kinds).graphs
    lowered |= {name: row_graph.graph for name, row_graph in backend.row_graphs.items()}
    for name, graph in lowered.items():
        yield name, graph.SerializeToString(), backend.shapes[name]


def _subject(spec: ModelSpec | None) -> Any:
    """Return what is exported: an untrained model, or that of digits."""
    import torch

    from advmoe_deploy.data.registry import load_dataset
    from advmoe_deploy.export.partition.cut import partition
    from advmoe_deploy.export.passes.apply import apply_passes
    from advmoe_deploy.export.precision.gate import AccuracyGate, AnsweredImages
    from advmoe_deploy.export.subject import Subject
    from advmoe_deploy.models.checkpoint import load_checkpoint
    from advmoe_deploy.models.untrained import untrained_model
    from advmoe_deploy.parity.reference import Reference, reference_answers

    labelled = threat = None
    if spec is None:
        checkpoint, model = load_checkpoint(TRAINED)
        labelled, threat = load_dataset("digits"), checkpoint.threat
    generator = np.random.default_rng(0)
    shape = (model.spec if spec is None else spec).image_shape
    images = generator.random((8, *shape), dtype=np.float32)
    if spec is not None:
        model = untrained_model(spec, torch.from_numpy(images))
    parts, _ = apply_passes(partition(model), images, model.rules)
    gate = AccuracyGate(AnsweredImages(images, reference_answers(model, images)), "noise")
    return Subject(Reference(model), parts, gate, images, labelled, threat)


def compiled(name: str, graph: bytes, shapes: Any) -> Record:
    """Return what an engine is, examined as the export examines it.

    Raises:
        AdvMoEError: it is refused.
    """
    from advmoe_deploy.export.tensorrt.rtx import RtxCompiler
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions

    compiler = RtxCompiler(BuildOptions(batch=BATCH))
    engine = compiler.build(name, graph, shapes)
    network = compiler.networks[name]
    return {
        "bytes": len(engine),
        "graph_bytes": len(graph),
        "layers": sum(network.kinds.values()),
        "kinds": dict(sorted(network.kinds.items())),
    }


def read(out: Path) -> Record:
    """Return what is in the file."""
    if not out.is_file():
        return {"builds": {}}
    found: Record = json.loads(out.read_text())
    return found


def record(out: Path, model: str, precision: str, found: Record) -> None:
    """Add to what is in the file of a model and precision, with the sums of its engines."""
    everything = read(out)
    builds = everything["builds"].setdefault(model, {})
    one = builds[precision] = {**builds.get(precision, {}), **found}
    engines = one.get("engines", {}).values()
    one["sums"] = {
        key: round(sum(engine.get(key, 0) for engine in engines), 1)
        for key in ("bytes", "seconds", "layers")
    }
    one["refused"] = sum("error" in engine for engine in engines)
    everything |= {"machine": facts(), "batch": BATCH.model_dump()}
    write_atomically(out, (json.dumps(everything, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_program(main)
