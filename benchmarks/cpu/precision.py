"""OpenVINO and lower precision against the dense float32 model in ONNX Runtime, on this CPU.

    python -m benchmarks.cpu.precision --data cifar10:PATH [--threads 1,2] [--seconds 20]

AdvMoE's ResNet-18 (two experts, ratio 0.5, 32x32, random weights fitted to images of ``--data``)
goes through ``advmoe export`` at every precision, which measures routes on held-out images and
keeps a segment in a higher precision where they would not agree; what it chose is in the result.
Nothing is attacked, for random weights have no accuracy to lose.
The dense network is compiled for OpenVINO at the same precisions, in int8 by the same quantizer,
with float32 and with bf16 between what is quantised.
Everything is timed interleaved in one process; no thread pool spins, and OpenVINO pins no thread.

Accuracy needs trained weights: ``--trained RUN`` adds what the export of that run measured.

Writes ``benchmarks/results/precision_cpu.json``.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import onnx
import torch

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.precision.quantize import quantised
from advmoe_deploy.export.targets import Target
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine, openvino_version
from advmoe_deploy.runtime.select import open_runner
from benchmarks.cpu.export import advmoe, numbers
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "precision_cpu.json"
PRECISIONS = ("fp32", "bf16", "int8")
TARGETS = [
    Target("openvino", "fp32"),
    Target("openvino", "bf16"),
    Target("openvino", "int8"),
    Target("onnxruntime", "int8"),
]
BATCHES = (1, 64)
CALIBRATION, FITTING = 256, 256
Calls = dict[str, Callable[[], object]]


def build(folder: Path, source: str) -> Bundle:
    """Return the bundle of an untrained model, exported at every precision."""
    spec, data = advmoe(2), load_dataset(source)
    (folder / "run" / "model").mkdir(parents=True)
    checkpoint = Checkpoint(
        model=spec,
        threat=None,
        class_names=data.class_names,
        recipe={},
        metrics={},
        provenance={"data": source},
    )
    images = torch.from_numpy(to_float(data.train.images[:FITTING]))
    save_checkpoint(folder / "run" / "model", checkpoint, untrained_model(spec, images))
    export_run(folder / "run", folder / "bundle", targets=TARGETS)
    return open_bundle(folder / "bundle")


def calls_of(stack: ExitStack, bundle: Bundle, pixels: np.ndarray, threads: int) -> Calls:
    """Return what is timed by name, on images ``pixels``."""
    calls: Calls = {}
    for engine in ("onnxruntime:fp32", "onnxruntime:int8", *(f"openvino:{p}" for p in PRECISIONS)):
        runner = stack.enter_context(open_runner(bundle, engine, threads=threads))
        calls[f"moe {engine}"] = partial(runner.infer, pixels)
    dense = bundle.file("baselines/dense.onnx")
    ort = stack.enter_context(OrtEngine(dense, threads=threads))
    calls["dense onnxruntime:fp32"] = partial(ort.run, {"images": pixels})
    with np.load(bundle.file("golden.npz")) as golden:
        rows = [{"images": np.resize(golden["images"], (CALIBRATION, *pixels.shape[1:]))}]
    in_int8 = quantised(onnx.load_model(dense), rows, heads={"logits"}).SerializeToString()
    for name, source, compute_dtypes in (
        ("fp32", dense, "fp32"),
        ("bf16", dense, "bf16"),
        ("int8", in_int8, "fp32"),
        ("int8, bf16 between", in_int8, "bf16"),
    ):
        engine = OpenVinoEngine(source, compute_dtypes=compute_dtypes, threads=threads)
        calls[f"dense openvino:{name}"] = partial(
            stack.enter_context(engine).run, {"images": pixels}
        )
    return calls


def row_of(batch: int, threads: int, times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return medians and how many times faster each MoE is than the dense networks."""
    ratios = {}
    for name in [name for name in times if name.startswith("moe ")]:
        engine = name.removeprefix("moe ")
        for dense in [n for n in times if n.startswith("dense ")]:
            if dense == "dense onnxruntime:fp32" or dense.startswith(f"dense {engine}"):
                ratio = ratio_of_medians(times[dense], times[name])
                ratios[f"{dense} / {name}"] = {
                    "ratio": round(ratio.value, 3),
                    "ci": [round(ratio.low, 3), round(ratio.high, 3)],
                }
    medians = {name: round(1e3 * float(np.median(values)), 4) for name, values in times.items()}
    n = len(next(iter(times.values())))
    return {"batch": batch, "threads": threads, "n": n, "p50_ms": medians, "ratios": ratios}


def chosen(bundle: Bundle) -> list[dict[str, Any]]:
    """Return what the export measured and chose per engine and precision."""
    paths = {name: {"data"} for name in ("parity", "calibration", "check")}
    unused = {"plan": True, "files": True, **paths}
    return [engine.model_dump(mode="json", exclude=unused) for engine in bundle.manifest.engines]


def main() -> None:
    """Build, export, time, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring per row")
    parser.add_argument("--trained", type=Path, help="a run, for what its export measures")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_before, rows = os.getloadavg(), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(Path(folder), arguments.data)
        with np.load(bundle.file("golden.npz")) as golden:
            images = golden["images"]
        for threads in arguments.threads:
            for batch in BATCHES:
                pixels = np.resize(images, (batch, *images.shape[1:]))
                with ExitStack() as stack:
                    calls = calls_of(stack, bundle, pixels, threads)
                    times = time_interleaved(calls, warmup=3, budget_s=arguments.seconds)
                rows.append(row_of(batch, threads, times))
                print(json.dumps(rows[-1]), flush=True)
        trained = None
        if arguments.trained:
            trained = chosen(
                export_run(arguments.trained, Path(folder, "trained"), targets=TARGETS)
            )
        result = {
            "model": bundle.manifest.model.model_dump(mode="json"),
            "macs": bundle.manifest.macs.model_dump(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "versions": {**bundle.manifest.versions, "openvino": openvino_version()},
            "settings": {"spinning": False, "pinning": False, "warmup": 3},
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "rows": rows,
            "exported": chosen(bundle),
            "trained": trained,
        }
    write(arguments.out, result)


if __name__ == "__main__":
    run_program(main)
