"""TensorRT on a GPU, from export to verification, next to what one would use instead.

    python benchmarks/gpu_trt.py --data cifar10:PATH --work DIR [--stages build,parity,latency]
    python benchmarks/gpu_trt.py --data cifar10:PATH --work DIR --dry-run

Stages leave what they make in DIR and what they measure in DIR/stages, part by part, so that a
later call, or another interpreter, goes on where one was cut off: ``export``, ``reference``,
``torch`` and ``verify`` need PyTorch, ``build``, ``parity``, ``latency``, ``parts`` and
``one_engine`` TensorRT and no PyTorch, ``router_tail`` TensorRT 10.9 and Triton, ``onnxruntime``
its GPU build. ``verify`` lets TensorRT answer in another interpreter where ``--tensorrt-python``
names one. What fails or lacks something says why in its record, and the others go on. Whatever was
measured so far is joined in ``benchmarks/results/gpu_trt.json`` after each stage.

``--dry-run`` needs no GPU: it exports, runs the graphs that TensorRT would build in ONNX Runtime on
the CPU, through the same dispatch, and lists the engines to be built.

Untrained weights, fitted to images that use the experts alike, answer for speed and for numerics;
``--trained RUN`` is what robustness is verified on.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gpu_trt_bounds import bounds

from advmoe_deploy.files import write_atomically
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.specs import BatchProfile, ExpertLayers, ModelSpec, Precision, VisionTransformer

RESULT = Path(__file__).parent / "results" / "gpu_trt.json"
BATCH = BatchProfile(min=1, opt=128, max=256)
PRECISIONS = ("fp32", "fp16")  # those that there are bounds for
PACKAGES = (
    "tensorrt",
    "cuda-bindings",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "triton",
    "numpy",
)
MODELS = {
    "advmoe-resnet18": ModelSpec(family="advmoe", num_experts=2, ratio=0.5),
    "advmoe-wrn-28-10": ModelSpec(
        family="advmoe", backbone="wrn-28-10", width=160, num_experts=2, ratio=0.5
    ),
    "block-moe": ModelSpec(
        family="robust-experts",
        num_experts=4,
        weighting="renormalised",
        expert_layers=ExpertLayers(kind="block", layers=("layer4",)),
    ),
    "dual-model": ModelSpec(family="dual-model", num_experts=4, alpha=0.7),
    "vit-moe": ModelSpec(
        family="vit-moe",
        backbone="vit",
        num_experts=8,
        weighting="probability",
        width=192,
        transformer=VisionTransformer(patch_size=4, depth=6, heads=3, moe_blocks=(1, 3, 5)),
    ),
}


@dataclass(frozen=True)
class Work:
    """What was asked for, and the folder in which stages meet."""

    folder: Path
    data: str
    models: tuple[str, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    images: int
    seconds: float
    level: int | None
    trained: Path | None
    tensorrt_python: str | None
    dry: bool
    again: bool

    @property
    def records(self) -> Path:
        """Where what was measured is kept; a dry run's apart."""
        return self.folder / ("dry-stages" if self.dry else "stages")

    def bundle(self, model: str) -> Path:
        """Return where a model's bundle is."""
        return self.folder / model / "bundle"

    def reference(self, model: str) -> Path:
        """Return where images and torch's answers to them are."""
        return self.folder / model / "reference.npz"

    def baseline(self, model: str, name: str, precision: str) -> Path:
        """Return where the graph of a baseline is."""
        return self.folder / model / "baselines" / f"{name}-{precision}.onnx"

    def engines(self, model: str, precision: str) -> Path:
        """Return where engines are."""
        return self.folder / model / f"engines-{precision}"


Record = dict[str, Any]
# Yields a name, and what measures it.
Stage = Callable[[Work], Iterator[tuple[str, Callable[[], Any]]]]


def run_stage(name: str, stage: Stage, work: Work, out: Path) -> None:
    """Measure ``stage`` part by part, and write each; one that fails does not stop the others.

    What was measured on this machine before is not measured again, unless that was asked for. Nor
    is what twice took the process with it.
    """
    file, started = work.records / f"{name}.json", time.perf_counter()
    known = _known(file)
    parts, before = known["parts"], known["seconds"]

    def keep() -> None:
        seconds = round(before + time.perf_counter() - started, 2)
        record = {**facts(), "seconds": seconds, "parts": parts}
        write_atomically(file, json.dumps(record, indent=1).encode())

    def measured(part: str) -> bool:
        old = parts.get(part, {"failed": "", "begun": 0})
        return not work.again and ("failed" not in old or old.get("begun", 0) >= _MOST_BEGUN)

    parts.pop("stage", None)
    try:
        for part, measure in stage(work):
            if measured(part):
                continue
            print(f"{name}: {part}", flush=True)
            begun = 1 + parts.get(part, {}).get("begun", 0)
            parts[part] = {"failed": "the process was ended meanwhile", "begun": begun}
            keep()
            parts[part] = _guarded(measure)
            keep()
    except Exception as error:  # what a stage needs is missing
        parts["stage"] = _failure(error)
    keep()
    write_result(work, out)


def _known(file: Path) -> Record:
    """Return what was measured before, if that was here."""
    if file.is_file():
        known: Record = json.loads(file.read_text())
        if all(known[name] == value for name, value in facts().items()):
            return known
        print(f"{file} is of another machine, or of other packages: begun anew", flush=True)
    return {"seconds": 0.0, "parts": {}}


def _guarded(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Record:
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = " ".join(str(error).split())
    print(f"  failed: {type(error).__name__}: {line}", flush=True)
    return {"failed": f"{type(error).__name__}: {line}", "at": f"{where.name}:{where.lineno}"}


@cache
def facts() -> Record:
    """Return the machine and the versions of everything that takes part."""
    return {
        "processor": processor_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "gpu": nvidia_smi("name,driver_version,memory.total,power.limit,compute_mode"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(query: str) -> str | None:
    """Return what it says of the GPU, without a GPU nothing."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def summary(times: dict[str, np.ndarray]) -> Record:
    """Return the median and every raw time in ms, by name."""
    return {
        name: {
            "p50_ms": round(1e3 * float(np.median(values)), 5),
            "n": len(values),
            "ms": [round(1e3 * float(value), 5) for value in values],
        }
        for name, values in times.items()
    }


def ratios_to(times: dict[str, np.ndarray], base: str) -> Record:
    """Return how many times faster everything is than ``base``, with 95 % intervals."""
    from advmoe_deploy.profiling.timing import ratio_of_medians

    result = {}
    for name in times.keys() - {base}:
        ratio = ratio_of_medians(times[base], times[name])
        result[f"{base} / {name}"] = [round(v, 4) for v in (ratio.value, ratio.low, ratio.high)]
    return result


def stages() -> dict[str, Stage]:
    """Return the stages by name, in the order in which they build on each other."""
    import gpu_trt_device as device
    import gpu_trt_engines as engines
    import gpu_trt_router as router
    import gpu_trt_torch as of_torch
    import gpu_trt_whole as whole

    return {
        "device": device.device,
        "export": of_torch.export,
        "reference": of_torch.reference,
        "build": engines.build,
        "parity": engines.parity,
        "latency": engines.latency,
        "parts": engines.parts,
        "one_engine": whole.one_engine,
        "router_tail": router.router_tail,
        "onnxruntime": engines.onnxruntime,
        "torch": of_torch.eager_and_compiled,
        "router_kernel": of_torch.router_kernel,
        "verify": of_torch.verify,
    }


WITHOUT_GPU = ("export", "reference", "build", "parity", "one_engine")
_MOST_BEGUN = 2


def write_result(work: Work, out: Path) -> None:
    """Join what all stages have measured so far."""
    files = sorted(work.records.glob("*.json"))
    measured = {file.stem: json.loads(file.read_text()) for file in files}
    asked = {
        "data": work.data.partition(":")[0],
        "batches": work.batches,
        "optimization_level": work.level,
        "dry_run": work.dry,
    }
    result = {**asked, "bounds": bounds(measured), "stages": measured}
    write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    """Run the stages that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--work", type=Path, required=True, help="the folder where stages meet")
    parser.add_argument("--stages", default="", help="by default all; names with commas")
    parser.add_argument("--models", default=",".join(MODELS), help="names with commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--level", type=int, help="how long to build, 0 to 5; else TensorRT's own")
    parser.add_argument("--images", type=int, default=10_000, help="test images to compare on")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring per row")
    parser.add_argument("--trained", type=Path, help="a run on --data, to be verified")
    parser.add_argument(
        "--tensorrt-python", help="for verify: what a shell runs for a Python that has TensorRT"
    )
    parser.add_argument("--dry-run", action="store_true", help="what needs no GPU, on the CPU")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/gpu_trt.json")
    asked = parser.parse_args()
    known = stages()
    chosen = [name for name in asked.stages.split(",") if name]
    unknown = [*({*chosen} - {*known}), *({*asked.models.split(",")} - {*MODELS})]
    unknown += {*asked.precisions.split(",")} - {*PRECISIONS}
    if unknown:
        parser.error(f"no stage, model or precision here is called {', '.join(unknown)}")
    work = Work(
        asked.work,
        asked.data,
        tuple(asked.models.split(",")),
        tuple(asked.precisions.split(",")),
        tuple(int(batch) for batch in asked.batches.split(",")),
        asked.images,
        asked.seconds,
        asked.level,
        asked.trained,
        asked.tensorrt_python,
        asked.dry_run,
        asked.again,
    )
    # A dry run proves nothing about a GPU: its record stays in the folder.
    out = asked.out or (work.folder / "dry.json" if work.dry else RESULT)
    for name in chosen or (WITHOUT_GPU if work.dry else known):
        run_stage(name, known[name], work, out)


if __name__ == "__main__":
    main()
