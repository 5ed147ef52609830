"""Models, paths, machine facts and summaries that the stages of the GPU benchmark share."""

import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.reports.versions import version_of
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.specs import ComputeDtype, ExpertLayers, ModelSpec, VisionTransformer

BATCH = BatchProfile(min=1, opt=128, max=256)
PACKAGES = (
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
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
    precisions: tuple[ComputeDtype, ...]
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


Part = tuple[str, Callable[[], Any]]
Record = dict[str, Any]
# Yields a name, and what measures it.
Stage = Callable[[Work], Iterator[tuple[str, Callable[[], Any]]]]


@cache
def facts() -> Record:
    """Return the machine and the versions of everything that takes part."""
    return {
        "processor": processor_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "gpu": nvidia_smi("name,driver_version,memory.total,power.limit,compute_mode"),
    }


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
