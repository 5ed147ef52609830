"""What engines of a lower precision lose of robust accuracy: attacked themselves, not replayed.

    python -m benchmarks.training.lowered MODEL [--data cifar10:PATH] [--images 1000]
        [--attacks quick] [--engines openvino:bf16,...] [--least-route-agreement 0.999]
        [--work FOLDER] [--threads 2]

MODEL is a run, or what ``advmoe export`` takes in its place. It goes through ``advmoe export`` at
every precision of a CPU, whose own gate keeps a segment in fp32 where lowering it would cost too
much; which ones and why is in the result. Then ``verify`` attacks the reference and each engine on
the test split, every attack of the suite judged by the engine's own answers, and compares the two
image by image.

Writes ``benchmarks/results/robustness/lowered.json`` after each engine; rows of others stay.
``--work`` keeps the bundle and the state of each attack, so that the program goes on where it was
stopped.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch

import advmoe_deploy as advmoe
from advmoe_deploy.bundle import REFERENCE, Bundle, EngineSet, open_bundle
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.precision.gate import LEAST_ROUTE_AGREEMENT
from advmoe_deploy.export.targets import Target
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.reports.checkpoint import checkpoint_folder, read_checkpoint
from advmoe_deploy.verify.report import RobustReport
from advmoe_deploy.zoo.resolve import resolve
from benchmarks.program import run_program, write

RESULT = Path(__file__).parents[1] / "results/robustness" / "lowered.json"
# What tells one measurement from another; a second of the same takes the place of the first.
KEY = ("model", "weights_sha256", "suite", "images", "engine", "least_route_agreement")
TARGETS = {
    "openvino:fp32": Target("openvino", "fp32"),
    "openvino:bf16": Target("openvino", "bf16"),
    "openvino:int8": Target("openvino", "int8"),
    "onnxruntime:int8": Target("onnxruntime", "int8"),
}
LOWERED = "openvino:bf16,openvino:int8,onnxruntime:int8"
LIBRARIES = ("advmoe-deploy", "numpy", "onnx", "onnxruntime", "openvino", "pillow", "torch")


def exported(model: str, target: Target, data: str | None, out: Path) -> Bundle:
    """Return the bundle of ``model`` for ``target`` at ``out``, exported if it is not there yet.

    Raises:
        CheckFailedError: nothing of the model passes the gate at that precision.
        UsageError: the bundle there is of another model.
    """
    run = resolve(model)
    if not out.exists():
        export_run(run, out, data=data, targets=[target])
    bundle = open_bundle(out)
    weights = read_checkpoint(checkpoint_folder(run)).weights_sha256
    if bundle.manifest.files[REFERENCE].sha256 != weights:
        raise UsageError(f"{out} is of other weights than {model}; choose another --work")
    return bundle


def row_of(engine: EngineSet, report: RobustReport) -> dict[str, Any]:
    """Return what of an engine's export and attacks tells what it lost."""
    check = engine.check
    return {
        "engine": engine.name,
        "segments": engine.segments,
        "kept_back": check.raised if check else {},
        "images": report.images,
        "verdict": report.verdict,
        "reference": report.reference and report.reference.model_dump(mode="json"),
        "clean_accuracy": report.clean_accuracy.model_dump(),
        "clean_drop": report.clean_drop.model_dump(mode="json"),
        "robust_accuracy": report.robust_accuracy.model_dump(),
        "robust_drop": report.robust_drop.model_dump(mode="json"),
        "transferred_accuracy": report.transferred_accuracy,
        "route_agreement": report.route_agreement,
        "findings": [finding.model_dump(mode="json") for finding in report.findings],
        "warnings": report.warnings,
        "attacks": [outcome.model_dump(mode="json") for outcome in report.attacks],
        "seconds": report.seconds,
    }


def rows_of(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each target that was asked for; of one that the gate refuses, why."""
    checkpoint = read_checkpoint(checkpoint_folder(resolve(arguments.model)))
    about = {
        "model": checkpoint.recipe["name"],
        "weights_sha256": checkpoint.weights_sha256,
        "epsilon": checkpoint.threat.epsilon if checkpoint.threat else None,
        "suite": arguments.attacks,
        "images": arguments.images or 0,  # of a refusal; else as many as there were
        "least_route_agreement": arguments.least_route_agreement,
        "threads": arguments.threads,
        "processor": processor_name(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in LIBRARIES}},
    }
    for name in arguments.engines.split(","):
        least = arguments.least_route_agreement
        told = "" if least == LEAST_ROUTE_AGREEMENT else f"-{least:g}"
        place = work / f"{name.replace(':', '-')}{told}"
        target = replace(TARGETS[name], least_route_agreement=least)
        try:
            bundle = exported(arguments.model, target, arguments.data, place)
        except CheckFailedError as error:
            yield about | {"engine": name, "refused": str(error)}
            continue
        report = advmoe.verify(
            bundle,
            engine=name,
            data=arguments.data,
            attacks=arguments.attacks,
            images=arguments.images,
            threads=arguments.threads,
            resume=work / f"{place.name}-{arguments.attacks}.npz",
        )
        (engine,) = bundle.manifest.engines
        yield about | row_of(engine, report)


def merge(path: Path, row: dict[str, Any]) -> None:
    """Write ``row`` into the JSON at ``path``, in the place of the last of the same ``KEY``."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [each for each in rows if _key(each) != _key(row) and not _is_outdone(each, row)]
    rows = sorted([*kept, row], key=_key)
    write(path, {"rows": rows})


def _is_outdone(refused: dict[str, Any], row: dict[str, Any]) -> bool:
    """Return whether ``refused`` is a refusal of what ``row`` is about."""
    of = [name for name in KEY if name != "images"]
    return "refused" in refused and all(refused[name] == row[name] for name in of)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def main() -> None:
    """Export, attack each engine, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run, zoo:NAME or a checkpoint's folder")
    parser.add_argument("--data", help="by default what the model was trained on")
    parser.add_argument("--images", type=int, help="of the test split; by default all")
    parser.add_argument("--attacks", default="quick", choices=["quick", "standard", "full"])
    parser.add_argument("--engines", default=LOWERED)
    parser.add_argument("--least-route-agreement", type=float, default=LEAST_ROUTE_AGREEMENT)
    parser.add_argument("--work", type=Path, help="keeps bundle and attacks; by default none do")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if unknown := {*arguments.engines.split(",")} - {*TARGETS}:
        parser.error(f"unknown engines {', '.join(sorted(unknown))}; choose from {[*TARGETS]}")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for row in rows_of(arguments, work):
            merge(arguments.out, row)
            shown = ("engine", "verdict", "robust_drop", "refused")
            print(json.dumps({key: row[key] for key in shown if key in row}), flush=True)


if __name__ == "__main__":
    run_program(main)
