"""Does the exported file say the same everywhere? Every family, both forms, every ONNX Runtime.

    python -m benchmarks.cpu.portability [--data cifar10:PATH] [--with PYTHON]... [--only dual]

Every family is built (random weights fitted to the images) and exported, and ``model.onnx`` is run
on 1,000 images by plain ONNX Runtime in a process of its own, with the library of our operators and
without it, under this Python and under each one ``--with`` names: those of environments that hold
numpy and another version of onnxruntime. Logits and routes are compared with torch's; where the
margin of a route is below 1e-4, a different choice is counted apart. ``onnx.checker`` checks the
file in full, and ``onnx.reference`` runs it on a few images. Rows of an earlier result that were
not made again are kept, with what was other then.

Writes ``benchmarks/results/portability.json``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.reference import Reference, reference_answers
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.specs import ModelSpec, VisionTransformer
from advmoe_deploy.train.run.report import versions
from benchmarks.cpu.export import robust_experts, untrained_bundle
from benchmarks.program import run_program, with_kept_rows, with_part, write

RESULT = Path(__file__).parents[1] / "results" / "portability.json"
CHILD = Path(__file__).parent / "plain_onnxruntime.py"
FEW = 8


def _advmoe(num_experts: int, backbone: str) -> ModelSpec:
    return ModelSpec(family="advmoe", num_experts=num_experts, ratio=0.5, backbone=backbone)


def _tokens(top_k: int) -> ModelSpec:
    return ModelSpec(
        family="vit-moe",
        backbone="vit",
        num_experts=8,
        top_k=top_k,
        weighting="probability",
        width=48,
        transformer=VisionTransformer(patch_size=4, depth=4, heads=3, moe_blocks=(1, 3)),
    )


MODELS = {
    **{f"advmoe, {b}": _advmoe(2, b) for b in ("resnet18", "vgg16-bn", "densenet-bc")},
    "advmoe, five experts": _advmoe(5, "resnet18"),
    "block experts": robust_experts("block", 1),
    "conv experts, k=2": robust_experts("conv", 2),
    "expert networks": ModelSpec(family="expert-networks", num_experts=4, width=32),
    "dual model": ModelSpec(family="dual-model", num_experts=2, alpha=0.7, width=32),
    "token experts": _tokens(1),
    "token experts, k=2": _tokens(2),
}


def rows_of(name: str, folder: Path, data: str, pythons: list[str]) -> Iterator[dict[str, Any]]:
    """Return a row per version of ONNX Runtime and form, and one of ONNX's own evaluator."""
    bundle = untrained_bundle(folder, MODELS[name], data)
    images = parity_images(data, MODELS[name])
    np.save(folder / "images.npy", images)
    _, model = load_checkpoint(folder / "run" / "model")
    answers = reference_answers(model, images)
    uncertainty = Reference(model).uncertainty(images[:64])
    limits = {"rounding": uncertainty.rounding, "margin": uncertainty.margin}
    file = bundle.file(MODEL)
    onnx.checker.check_model(onnx.load_model(file), full_check=True)
    library = find_custom_ops("kernels").library
    source = data.partition(":")[0]
    for python in pythons:
        for form, more in (("kernels", [str(library)]), ("bodies", [])):
            out = folder / "answers.npz"
            command = [python, str(CHILD), str(file), str(folder / "images.npy"), str(out), *more]
            version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            with np.load(out) as outputs:
                answer = prediction_of(bundle, dict(outputs))
            report = compare_answers(answers, answer, **limits, data=source)
            yield {
                "model": name,
                "runtime": f"onnxruntime {version.strip()}",
                "form": form,
                "passed": report.passed,
                **report.model_dump(mode="json"),
            }
    few = reference_answers(model, images[:FEW])
    values: Any = ReferenceEvaluator(str(file)).run(None, {"images": images[:FEW]})
    names = [output.name for output in onnx.load_model(file).graph.output]
    answer = prediction_of(bundle, dict(zip(names, values, strict=True)))
    report = compare_answers(few, answer, **limits, data=source)
    runtime = f"onnx.reference {onnx.__version__}"
    yield {
        "model": name,
        "runtime": runtime,
        "form": "bodies",
        "passed": report.passed,
        **report.model_dump(mode="json"),
    }


def prediction_of(bundle: Bundle, outputs: dict[str, np.ndarray]) -> Prediction:
    """Return the outputs of ``model.onnx`` as a prediction."""
    routes = bundle.manifest.plan.routes
    return Prediction(
        outputs["logits"],
        {route.layer: outputs[route.expert_ids] for route in routes},
        {route.layer: outputs[route.weights] for route in routes},
    )


def main() -> None:
    """Compare everything, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="random:1000")
    parser.add_argument("--with", dest="pythons", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--only", default="", help="parts of the names of the models")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in with_part(arguments.only, MODELS):
        with tempfile.TemporaryDirectory() as folder:
            pythons = [sys.executable, *arguments.pythons]
            for row in rows_of(name, Path(folder), arguments.data, pythons):
                rows.append(row)
                print(json.dumps({k: v for k, v in row.items() if k != "layers"}), flush=True)
    facts = {
        "data": arguments.data.partition(":")[0],
        "processor": processor_name(),
        "versions": versions(),
    }
    key = ("model", "runtime", "form")
    result = with_kept_rows(arguments.out, facts, rows, key)
    result["all_passed"] = all(row["passed"] for row in result["rows"])
    write(arguments.out, result)


if __name__ == "__main__":
    run_program(main)
