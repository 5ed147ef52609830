"""int8 with residual sums in float32 or in int8: how far from fp32, and how fast.

    python -m benchmarks.cpu.residual_sums BUNDLE --data cifar10:PATH [--images 500] [--batch 1,32]

Calibrates the experts of a bundle on 256 training images and as many with noise of the model's
epsilon, both ways; the router stays in fp32. Logits are compared on noisy test images, and the
first expert's graph is timed in ONNX Runtime and OpenVINO, all in turns in one process, on one
thread.

Writes ``benchmarks/results/residual_sums.json``.
"""

import argparse
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

from advmoe_deploy.bundle import REFERENCE, Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.precision import quantize
from advmoe_deploy.models.stored import threat_or
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import time_interleaved
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine, openvino_version
from advmoe_deploy.runtime.plan_runner import PlanRunner
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "residual_sums.json"
CALIBRATION = 256

Images = NDArray[np.float32]
Graphs = dict[str, ModelProto]


def noisy(images: Images, epsilon: float) -> Images:
    """Return ``images`` each of whose pixels went ``epsilon`` up or down."""
    signs = np.sign(np.random.default_rng(0).standard_normal(images.shape))
    return np.clip(images + epsilon * signs, 0, 1).astype(np.float32)


def lowered(bundle: Bundle, graphs: Graphs, images: Images, *, sums: bool) -> Graphs:
    """Return ``graphs`` with their experts in int8, residual ``sums`` among them or not."""
    kinds = quantize._QUANTISED + ["Add"] * sums
    shape, plan = bundle.manifest.model.image_shape, bundle.manifest.plan
    with patch.object(quantize, "_QUANTISED", kinds):
        found, _ = quantize.quantised_segments(plan, graphs, images, shape)
    experts = {name for unit in plan.units if len(unit) > 1 for name in unit}
    return {**graphs, **{name: found[name] for name in experts & found.keys()}}


def logits_of(bundle: Bundle, graphs: Graphs, images: Images) -> Images:
    """Return what the plan answers over ``graphs`` in ONNX Runtime, [N, K]."""
    sources = {name: graph.SerializeToString() for name, graph in graphs.items()}
    manifest = bundle.manifest
    with PlanRunner(manifest.plan, sources, manifest.model.image_shape, threads=1) as runner:
        parts = [runner.infer(images[i : i + 100]).logits for i in range(0, len(images), 100)]
    return np.concatenate(parts)


def difference(logits: Images, exact: Images) -> dict[str, float]:
    """Return how far ``logits`` are from those of fp32, and how many answers are the same."""
    away = np.abs(logits - exact)
    same = logits.argmax(axis=1) == exact.argmax(axis=1)
    return {
        "mean_logit_difference": float(away.mean()),
        "largest": float(away.max()),
        "same_answers": float(same.mean()),
    }


def times(forms: dict[str, Graphs], name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Return the median ms of the graph ``name`` in each form and engine, taken in turns."""
    calls: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for form, graphs in forms.items():
            model, (source,) = graphs[name].SerializeToString(), graphs[name].graph.input
            shape = [each.dim_value for each in source.type.tensor_type.shape.dim]
            rows = np.random.default_rng(0).random((batch, *shape[1:]), np.float32)
            for engine, opened in (
                ("ONNX Runtime", OrtEngine(model, threads=1)),
                ("OpenVINO", OpenVinoEngine(model, threads=1)),
            ):
                stack.enter_context(opened)
                calls[f"{form}, {engine}"] = partial(opened.run, {source.name: rows})
        found = time_interleaved(calls, budget_s=seconds)
    return {
        call: {"median_ms": round(1e3 * float(np.median(each)), 3), "n": len(each)}
        for call, each in found.items()
    }


def main() -> None:
    """Quantise both ways, compare, time, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True, help="such as cifar10:PATH")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    manifest = bundle.manifest
    data = load_dataset(arguments.data, manifest.decoding)
    epsilon = threat_or(None, manifest.threat, bundle.path).epsilon
    clean = to_float(data.train.first(CALIBRATION).images)
    both = np.concatenate([clean, noisy(clean, epsilon)])
    images = noisy(to_float(data.test.first(arguments.images).images), epsilon / 2)
    exact = {s.name: onnx.load_model(bundle.file(s.file)) for s in manifest.plan.segments}
    forms = {
        "fp32": exact,
        "sums in fp32": lowered(bundle, exact, both, sums=False),
        "sums in int8": lowered(bundle, exact, both, sums=True),
    }
    logits = {form: logits_of(bundle, graphs, images) for form, graphs in forms.items()}
    expert = next(unit[0] for unit in manifest.plan.units if len(unit) > 1)
    result = {
        "model": manifest.training["recipe"]["name"],
        "weights_sha256": manifest.files[REFERENCE].sha256,
        "images": len(images),
        "differences": {form: difference(each, logits["fp32"]) for form, each in logits.items()},
        "timed": expert,
        "threads": 1,
        "times": {
            batch: times(forms, expert, int(batch), arguments.seconds)
            for batch in arguments.batch.split(",")
        },
        "processor": processor_name(),
        "versions": {**manifest.versions, "openvino": openvino_version()},
    }
    write(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_program(main)
