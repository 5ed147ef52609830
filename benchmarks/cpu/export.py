"""What routing costs an exported model on this CPU, family by family, next to what it replaces.

    python -m benchmarks.cpu.export [--only advmoe-2,block] [--threads 1,2] [--seconds 10]

Every model is built (random weights fitted to random images that use the experts alike), exported
and timed as users run it, interleaved in one process with

* ``parts``: its own segments alone, each in a session of its own: the trunk on all images, and per
  routed layer one expert on as many rows as are chosen. Whatever the model takes beyond their sum
  is the price of routing;
* ``computed``: the same, but every expert that has rows, on just those, as the model computes them.
  Few rows each read many weights: what this takes beyond ``parts`` no implementation of routing can
  save, only another model;
* ``dense`` and, where it has a bound, ``unfused``: the network without experts, and every expert
  computed, then selected.

``balanced`` images visit every expert alike; ``skewed`` ones all take the routes of one image. No
thread pool spins. Rows of an earlier result that were not measured again are kept, with what was
other then.

Writes ``benchmarks/results/export_cpu.json``.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch

from advmoe_deploy.bundle import GOLDEN, MODEL, Bundle, open_bundle
from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.plan import ExpertsStep, RunStep, Segment, TensorInfo
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.specs import ExpertLayers, ModelSpec, VisionTransformer
from benchmarks.program import run_program, with_kept_rows, with_part, write

RESULT = Path(__file__).parents[1] / "results" / "export_cpu.json"
IMAGES = "random:256"
Calls = dict[str, Callable[[], object]]
Loads = Mapping[str, np.ndarray]


def advmoe(num_experts: int) -> ModelSpec:
    """Return AdvMoE's ResNet-18 with experts of half width."""
    return ModelSpec(family="advmoe", num_experts=num_experts, ratio=0.5)


def robust_experts(kind: str, top_k: int) -> ModelSpec:
    """Return a ResNet-18 whose ``layer4`` has four experts."""
    return ModelSpec(
        family="robust-experts",
        num_experts=4,
        top_k=top_k,
        weighting="renormalised",
        expert_layers=ExpertLayers(kind=kind, layers=("layer4",)),
    )


def vit_moe() -> ModelSpec:
    """Return a small ViT, tokens routed to one of eight experts in every other block."""
    return ModelSpec(
        family="vit-moe",
        backbone="vit",
        num_experts=8,
        weighting="probability",
        width=192,
        transformer=VisionTransformer(patch_size=4, depth=6, heads=3, moe_blocks=(1, 3, 5)),
    )


# What is timed, and at most how long: {ratio: {batch: bound}}; "at least" where it starts with >=.
CASES: dict[str, tuple[ModelSpec, Mapping[str, Mapping[int, str]]]] = {
    "advmoe-2": (
        advmoe(2),
        {
            "moe / parts": {1: "<=1.10", 64: "<=1.05"},
            "dense / moe": {1: ">=1.9", 64: ">=2.5"},
            "unfused / moe": {64: ">=1.6"},
        },
    ),
    "advmoe-5": (advmoe(5), {"moe / parts": {1: "<=1.15", 64: "<=1.15"}}),
    "advmoe-8": (advmoe(8), {"unfused / moe": {64: ">=5"}}),
    "advmoe-10": (advmoe(10), {"moe / parts": {1: "<=1.20", 64: "<=1.20"}}),
    "block-moe": (
        robust_experts("block", 1),
        {"moe / dense": {1: "<=1.10", 8: "<=1.20", 64: "<=1.10"}},
    ),
    "conv-moe": (
        robust_experts("conv", 1),
        {"moe / dense": {1: "<=1.10", 8: "<=1.20", 64: "<=1.10"}},
    ),
    "block-moe-k2": (robust_experts("block", 2), {"moe / computed": {1: "<=1.10", 64: "<=1.10"}}),
    "conv-moe-k2": (robust_experts("conv", 2), {"moe / computed": {1: "<=1.10", 64: "<=1.10"}}),
    "vit-moe": (vit_moe(), {"moe / dense": {1: "<=1.15", 8: "<=1.15", 64: "<=1.15"}}),
}


def untrained_bundle(folder: Path, spec: ModelSpec, data: str) -> Bundle:
    """Return the bundle of an untrained model of ``spec``, fitted to images of ``data``."""
    images = torch.from_numpy(parity_images(data, spec)[:256])
    (folder / "run" / "model").mkdir(parents=True)
    checkpoint = Checkpoint(
        model=spec,
        threat=None,
        class_names=tuple(str(label) for label in range(spec.num_classes)),
        recipe={},
        metrics={},
        provenance={"data": data},
    )
    save_checkpoint(folder / "run" / "model", checkpoint, untrained_model(spec, images))
    export_run(folder / "run", folder / "bundle")
    return open_bundle(folder / "bundle")


def batch_of(bundle: Bundle, size: int, load: str) -> np.ndarray:
    """Return ``size`` images that use the experts alike, or all as the first image does."""
    with np.load(bundle.file(GOLDEN)) as golden:
        images = golden["images"]
    if load == "skewed":
        images = images[:1]
    repeated: np.ndarray = np.resize(images, (size, *images.shape[1:]))
    return repeated


def parts_of(
    stack: ExitStack, bundle: Bundle, images: np.ndarray, threads: int, loads: Loads
) -> Calls:
    """Return a call per segment that a batch cannot do without, and per layer all that it uses."""
    plan, batch, calls = bundle.manifest.plan, len(images), {}

    def call(name: str, rows: int) -> Callable[[], object]:
        segment = plan.segment(name)
        engine = stack.enter_context(OrtEngine(bundle.file(segment.file), threads=threads))
        return partial(engine.run, inputs_of(segment, batch, rows))

    for step in plan.steps:
        if isinstance(step, RunStep):
            calls[f"part {step.segment}"] = call(step.segment, batch)
        elif isinstance(step, ExpertsStep):
            load_E = loads[step.layer]
            calls[f"part {step.segments[0]}"] = call(step.segments[0], int(load_E.sum()))
            rows = zip(step.segments, load_E[list(plan.route(step.layer).kept)], strict=True)
            used = [call(name, int(load)) for name, load in rows if load]
            calls[f"used {step.layer}"] = partial(run_all, used)
    return calls


def run_all(calls: Sequence[Callable[[], object]]) -> None:
    """Run one call after the other."""
    for call in calls:
        call()


def loads_of(bundle: Bundle, images: np.ndarray) -> Loads:
    """Return how many rows each expert of each layer gets, [E] per layer."""
    plan, shape = bundle.manifest.plan, bundle.manifest.model.image_shape
    with GraphRunner(bundle.file(MODEL), shape, routes=plan.routes) as runner:
        ids = runner.infer(images).expert_ids
    return {
        r.layer: np.bincount(ids[r.layer].ravel(), minlength=r.num_experts) for r in plan.routes
    }


def inputs_of(segment: Segment, batch: int, rows: int) -> dict[str, np.ndarray]:
    """Return random inputs of ``segment``."""
    random = np.random.default_rng(0)

    def size(of: int | str) -> int:
        if of == "R":
            return rows
        return of if isinstance(of, int) else batch * int(of.partition("*")[0].replace("N", "1"))

    def values(tensor: TensorInfo) -> np.ndarray:
        return random.random([size(of) for of in tensor.shape], np.float32)

    return {tensor.name: values(tensor) for tensor in segment.inputs}


def rows_of(
    name: str, bundle: Bundle, threads: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per batch size and load; by default of the batch sizes that have a bound."""
    rows = []
    bounds = CASES[name][1]
    bounded = sorted({batch for bound in bounds.values() for batch in bound})
    for batch in arguments.batches or bounded:
        for load in ("balanced", "skewed"):
            with ExitStack() as stack:
                images = batch_of(bundle, batch, load)
                calls = models_of(stack, bundle, images, threads, "unfused / moe" in bounds)
                calls |= parts_of(stack, bundle, images, threads, loads_of(bundle, images))
                times = time_interleaved(calls, warmup=3, budget_s=arguments.seconds)
            rows.append(row_of(name, {"batch": batch, "load": load, "threads": threads}, times))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "p50_ms"}), flush=True)
    return rows


def models_of(
    stack: ExitStack, bundle: Bundle, images: np.ndarray, threads: int, with_unfused: bool
) -> Calls:
    """Return a call for the model and for each baseline."""
    manifest = bundle.manifest
    calls: Calls = {}
    for name, file, routes in (
        ("moe", MODEL, manifest.plan.routes),
        ("dense", "baselines/dense.onnx", ()),
        ("unfused", "baselines/unfused.onnx", manifest.plan.routes),
    ):
        if name == "unfused" and not with_unfused:
            continue
        runner = GraphRunner(
            bundle.file(file), manifest.model.image_shape, routes=routes, threads=threads
        )
        calls[name] = partial(stack.enter_context(runner).infer, images)
    return calls


def row_of(name: str, at: dict[str, Any], times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return medians, ratios with their intervals, and how they stand to their bounds."""
    shared = sum(v for key, v in times.items() if key.startswith("part ") and ".expert-" not in key)
    expert = sum(v for key, v in times.items() if ".expert-" in key)
    used = sum(v for key, v in times.items() if key.startswith("used "))
    pairs = {
        "moe / parts": (times["moe"], shared + expert),
        "moe / computed": (times["moe"], shared + used),
        "moe / dense": (times["moe"], times["dense"]),
        "dense / moe": (times["dense"], times["moe"]),
    }
    if "unfused" in times:
        pairs["unfused / moe"] = times["unfused"], times["moe"]
    ratios = {}
    for key, (one, other) in pairs.items():
        ratio = ratio_of_medians(np.asarray(one), np.asarray(other))
        bound = CASES[name][1].get(key, {}).get(at["batch"])
        ratios[key] = {
            "ratio": round(ratio.value, 4),
            "ci": [round(ratio.low, 4), round(ratio.high, 4)],
            **({"bound": bound, "holds": holds(ratio.value, bound)} if bound else {}),
        }
    medians = {key: round(1e3 * float(np.median(values)), 4) for key, values in times.items()}
    return {"case": name, **at, "n": len(times["moe"]), "ratios": ratios, "p50_ms": medians}


def holds(value: float, bound: str) -> bool:
    """Return whether ``value`` keeps a bound such as ``<=1.05``."""
    limit = float(bound[2:])
    return value <= limit if bound.startswith("<=") else value >= limit


def main() -> None:
    """Build, export and time every case; write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of the names of the cases")
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--batches", type=numbers, default=(), help="by default those with a bound")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring per row")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    for name in with_part(arguments.only, CASES):
        with tempfile.TemporaryDirectory() as folder:
            bundle = untrained_bundle(Path(folder), CASES[name][0], IMAGES)
            for threads in arguments.threads:
                rows += rows_of(name, bundle, threads, arguments)
            keep(rows, bundle, load_before, arguments.out)


def numbers(text: str) -> tuple[int, ...]:
    """Return numbers given like ``1,2``."""
    return tuple(int(part) for part in text.split(","))


def keep(
    rows: list[dict[str, Any]], bundle: Bundle, load_before: tuple[float, ...], out: Path
) -> None:
    """Write the rows, and those of an earlier result that were not measured again."""
    facts = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": dict(bundle.manifest.versions),
        "settings": {"spinning": False, "warmup": 3, "order": "interleaved, shuffled"},
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    write(out, with_kept_rows(out, facts, rows, ("case", "threads", "batch", "load")))


if __name__ == "__main__":
    run_program(main)
