"""Lower precisions against the dense network and S-Dense in the same, on this CPU.

    advmoe export zoo:cifar10-advmoe --format openvino --precision int8 --data ... --out BUNDLE
    python -m benchmarks.cpu.precision BUNDLE... [--threads 1,2] [--seconds 20] [--settle 0,1]

Times every engine that the bundles hold, all exported from one model: what the export lowered, what
it kept back and why is in the result. Beside them the dense network and S-Dense of the first
bundle, untrained, in both engines at every precision, in int8 by the export's quantizer, calibrated
on the bundle's own images; in OpenVINO with float32 and with bf16 between what is quantised.
Everything is interleaved in one process, and then every engine of the MoE with the dense network of
its precision alone: among so many models each finds the caches cold, which one that is served does
not. Nor does it with ``--settle 1``, where an untimed call goes before each that is timed. No
thread pool spins, and OpenVINO pins no thread.

Writes ``benchmarks/results/precision_cpu.json``.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import onnx

from advmoe_deploy.bundle import MODEL, Bundle, EngineSet, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.precision.quantize import quantised
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine, has_precision, openvino_version
from advmoe_deploy.runtime.select import open_runner
from benchmarks.cpu.export import numbers
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results" / "precision_cpu.json"
BASELINES = ("dense", "s-dense")
BATCHES = (1, 64)
CALIBRATION = 256
FP32 = "onnxruntime:fp32"
Calls = dict[str, Callable[[], object]]


def label(bundle: Bundle, engines: EngineSet) -> str:
    """Return the engine's name and the precision of its routers."""
    routers = {engines.segments[name] for name in bundle.manifest.plan.scorers}
    return f"{engines.name}, router {'/'.join(sorted(routers))}"


def engine_sets(bundles: Sequence[Bundle]) -> Iterator[tuple[Bundle, EngineSet]]:
    """Yield every engine that the bundles hold.

    Raises:
        UsageError: the bundles are of several models, or two of their engines are alike.
    """
    if len({bundle.manifest.files[MODEL].sha256 for bundle in bundles}) > 1:
        raise UsageError("the bundles are of several models; name bundles of one")
    found = [(bundle, engines) for bundle in bundles for engines in bundle.manifest.engines]
    labels = [label(*each) for each in found]
    if twice := {each for each in labels if labels.count(each) > 1}:
        raise UsageError(f"{', '.join(sorted(twice))} is in two bundles; leave one out")
    yield from found


def calls_of(
    stack: ExitStack, bundles: Sequence[Bundle], pixels: np.ndarray, threads: int
) -> Calls:
    """Return what is timed by name, on images ``pixels``."""
    first = bundles[0]
    runner = stack.enter_context(open_runner(first, FP32, threads=threads))
    calls: Calls = {f"moe {FP32}": partial(runner.infer, pixels)}
    for bundle, engines in engine_sets(bundles):
        runner = stack.enter_context(open_runner(bundle, engines.name, threads=threads))
        calls[f"moe {label(bundle, engines)}"] = partial(runner.infer, pixels)
    for name in BASELINES:
        for engine, opened in baselines(first, name, threads):
            stack.enter_context(opened)
            calls[f"{name} {engine}"] = partial(opened.run, {"images": pixels})
    return calls


def baselines(
    bundle: Bundle, name: str, threads: int
) -> Iterator[tuple[str, OrtEngine | OpenVinoEngine]]:
    """Yield by engine a network without experts, opened, at each precision of this CPU."""
    graph = bundle.file(f"baselines/{name}.onnx")
    images = golden_images(bundle)
    rows = [{"images": np.resize(images, (CALIBRATION, *images.shape[1:]))}]
    in_int8 = quantised(onnx.load_model(graph), rows, heads={"logits"}).SerializeToString()
    yield FP32, OrtEngine(graph, threads=threads)
    yield "onnxruntime:int8", OrtEngine(in_int8, threads=threads)
    yield "openvino:fp32", OpenVinoEngine(graph, compute_dtype="fp32", threads=threads)
    yield "openvino:int8", OpenVinoEngine(in_int8, compute_dtype="fp32", threads=threads)
    if has_precision("bf16"):
        yield "openvino:bf16", OpenVinoEngine(graph, compute_dtype="bf16", threads=threads)
        between = OpenVinoEngine(in_int8, compute_dtype="bf16", threads=threads)
        yield "openvino:int8, bf16 between", between


def golden_images(bundle: Bundle) -> np.ndarray:
    """Return the images that travel with the bundle, float32 [N, C, H, W]."""
    with np.load(bundle.file("golden.npz")) as golden:
        images: np.ndarray = golden["images"]
    return images


def pairs_of(calls: Calls) -> Iterator[Calls]:
    """Yield each engine of the MoE with the dense network in the same."""
    for name in [name for name in calls if name.startswith("moe ")]:
        dense = "dense " + name.removeprefix("moe ").partition(",")[0]
        yield {name: calls[name], dense: calls[dense]}


def row_of(times: dict[str, np.ndarray], **of: object) -> dict[str, Any]:
    """Return medians and how many times faster each MoE is than networks without experts."""
    ratios = {}
    for name in [name for name in times if name.startswith("moe ")]:
        engine = name.removeprefix("moe ").partition(",")[0]
        for other in [each for each in times if not each.startswith("moe ")]:
            alike = other.partition(" ")[2].partition(",")[0] == engine
            if alike or other == f"dense {FP32}":
                ratio = ratio_of_medians(times[other], times[name])
                ratios[f"{other} / {name}"] = {
                    "ratio": round(ratio.value, 3),
                    "ci": [round(ratio.low, 3), round(ratio.high, 3)],
                }
    medians = {name: round(1e3 * float(np.median(values)), 4) for name, values in times.items()}
    n = len(next(iter(times.values())))
    return {**of, "n": n, "p50_ms": medians, "ratios": ratios}


def rows_of(
    bundles: Sequence[Bundle], threads: int, batch: int, settle: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield the row of everything in turn, then that of each pair."""
    images = golden_images(bundles[0])
    pixels = np.resize(images, (batch, *images.shape[1:]))
    of = {"batch": batch, "threads": threads, "settle": settle}
    with ExitStack() as stack:
        calls = calls_of(stack, bundles, pixels, threads)
        times = time_interleaved(calls, warmup=3, settle=settle, budget_s=seconds)
        yield row_of(times, **of, pair=False)
        for pair in pairs_of(calls):
            times = time_interleaved(pair, warmup=20, settle=settle, budget_s=seconds / 4)
            yield row_of(times, **of, pair=True)


def record_of(bundle: Bundle, engines: EngineSet) -> dict[str, Any]:
    """Return what the export chose for an engine, and what it measured."""
    record = engines.model_dump(mode="json")
    if record["check"]:  # the data set's name says enough: its place is this machine's
        record["check"]["data"] = record["check"]["data"].partition(":")[0]
    kept = ("backend", "precision", "compute_dtypes", "segments", "check")
    measured = ("images", "route_agreement", "max_relative_logit_diff")
    return {
        "name": label(bundle, engines),
        **{key: record[key] for key in kept},
        "parity": {key: record["parity"][key] for key in measured},
    }


def main() -> None:
    """Time everything, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, help="of one model, by 'advmoe export'")
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring per row")
    parser.add_argument("--settle", type=numbers, default=(0,), help="calls before each timed one")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    bundles, rows = [*map(open_bundle, arguments.bundles)], list[dict[str, Any]]()
    chosen = [record_of(*each) for each in engine_sets(bundles)]
    manifest, load_before = bundles[0].manifest, os.getloadavg()
    asked = (arguments.threads, BATCHES, arguments.settle)
    for threads, batch, settle in product(*asked):
        for row in rows_of(bundles, threads, batch, settle, arguments.seconds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {
        "model": manifest.model.model_dump(mode="json"),
        "weights_sha256": manifest.training["weights_sha256"],
        "macs": manifest.macs.model_dump(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {**manifest.versions, "openvino": openvino_version()},
        "settings": {"spinning": False, "pinning": False, "warmup": 3},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "rows": rows,
        "exported": chosen,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    run_program(main)
