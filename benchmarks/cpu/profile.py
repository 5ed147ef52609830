"""Measure the exported AdvMoE ResNet-18 on this CPU against everything it has to beat.

    python -m benchmarks.cpu.profile [--data cifar10:PATH | --data random:1000] [--seconds 30]

Builds the model (ratio 0.5, two experts, 32x32, random weights fitted to the images), exports it,
checks logits and routes on 1,000 images, profiles it interleaved with the dense, S-Dense and
unfused graphs in ONNX Runtime, and times it interleaved with two masked layers in PyTorch eager:

* ``masked eager``: ours, every expert computed and the chosen one copied;
* ``released eager``: as the papers' released layer works, every expert computed, multiplied by a
  mask of zeros and ones, and only then the chosen one copied.

No pool of threads spins, neither ONNX Runtime's nor PyTorch's (OMP_WAIT_POLICY=PASSIVE unless the
environment says otherwise): one that does disturbs whatever is timed after it.

Writes ``benchmarks/results/profile_cpu.json`` with every raw sample.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import ModelSpec
from benchmarks.cpu.export import untrained_bundle
from benchmarks.program import run_program, write
from benchmarks.released import ReleasedDispatch

SPEC = ModelSpec(family="advmoe", num_experts=2, ratio=0.5)
THREADS = 2
BATCHES = (1, 8, 64)
RESULTS = Path(__file__).parents[1] / "results" / "profile_cpu.json"

# What the numbers should reach: (a, b, batch) -> ratio.
TARGETS = {
    ("dense", "moe", 64): 2.5,
    ("dense", "moe", 1): 1.9,
    ("unfused", "moe", 64): 1.6,
    ("released eager", "moe", 64): 2.5,
}


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="random:1000", help="images to fit and check on")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring per batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        bundle, model = build(Path(folder), arguments.data)
        result = measure(bundle, model, arguments.seconds)
    write(RESULTS, result)
    show(result)


def build(folder: Path, data: str) -> tuple[Bundle, AdvMoE]:
    """Return a bundle made from scratch and its torch model."""
    bundle = untrained_bundle(folder, SPEC, data)
    _, model = load_checkpoint(folder / "run" / "model")
    assert isinstance(model, AdvMoE)
    return bundle, model


def measure(bundle: Bundle, model: AdvMoE, seconds: float) -> dict[str, object]:
    """Return parity, latencies, ratios and raw samples."""
    load_before = os.getloadavg()
    samples: dict[str, list[float]] = {}
    report = profile_bundle(
        bundle,
        engines=("onnxruntime", "onnxruntime-plan"),
        batches=BATCHES,
        threads=THREADS,
        budget_s=seconds,
        samples=samples,
    )
    ratios = [r.model_dump() for r in report.ratios]
    for batch in (1, 64):
        ratios += against_eager(bundle, model, batch, seconds, samples)
    return {
        "model": SPEC.model_dump(),
        "macs": bundle.manifest.macs.model_dump(),
        "parity": bundle.manifest.parity.model_dump()
        | {"data": str(bundle.manifest.parity.data).partition(":")[0]},
        "rows": [row.model_dump() for row in report.rows],
        "ratios": ratios,
        "settings": {**report.settings, "omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "versions": {**bundle.manifest.versions, **report.versions},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "raw_ms": samples,
    }


def against_eager(
    bundle: Bundle, model: AdvMoE, batch: int, seconds: float, samples: dict[str, list[float]]
) -> list[dict[str, object]]:
    """Return the ratios of the masked layers in PyTorch eager to the exported model."""
    with np.load(bundle.file("golden.npz")) as golden:
        images = np.resize(golden["images"], (batch, *SPEC.image_shape))
    x_NCHW = torch.from_numpy(images)

    def masked() -> None:
        with torch.inference_mode():
            model(x_NCHW, Routes(execution="masked"))

    def released() -> None:
        with torch.inference_mode():
            dispatch = ReleasedDispatch(model.route(x_NCHW)["router"], "masked")
            model.backbone(model.normalise(x_NCHW), dispatch)

    with open_runner(bundle, threads=THREADS) as runner:
        calls = {
            "masked eager": masked,
            "released eager": released,
            "moe": lambda: runner.infer(images),
        }
        times = time_interleaved(calls, budget_s=seconds)
    for name, values in times.items():
        samples[f"{name}, batch {batch}, beside eager"] = (1e3 * values).round(4).tolist()
    return [_eager_ratio(name, batch, times) for name in times if name != "moe"]


def _eager_ratio(name: str, batch: int, times: dict[str, np.ndarray]) -> dict[str, object]:
    ratio = ratio_of_medians(times[name], times["moe"])
    return {
        "a": name,
        "a_engine": f"torch {torch.__version__}",
        "b": "moe",
        "batch": batch,
        "engine": "onnxruntime",
        "ratio": ratio.value,
        "ci_low": ratio.low,
        "ci_high": ratio.high,
        "p50_ms": {key: 1e3 * float(np.median(values)) for key, values in times.items()},
        "n": len(times["moe"]),
    }


def show(result: dict[str, Any]) -> None:
    """Print parity and every ratio next to its target."""
    print(json.dumps(result["parity"]))
    for row in result["rows"]:
        print(f"{row['model']:>10} {row['engine']:<17} batch {row['batch']:>3} "
              f"p50 {row['p50_ms']:8.2f} ms  n={row['n']}")  # fmt: skip
    for ratio in result["ratios"]:
        target = TARGETS.get((ratio["a"], ratio["b"], ratio["batch"]))
        wanted = f"  (target {target})" if target and "plan" not in ratio["engine"] else ""
        print(f"{ratio['a']:>12} / {ratio['b']} batch {ratio['batch']:>3} "
              f"{ratio['a_engine']} / {ratio['engine']}: "
              f"{ratio['ratio']:.2f} [{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}]"
              f"{wanted}")  # fmt: skip


if __name__ == "__main__":
    run_program(main)
