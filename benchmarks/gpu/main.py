"""TensorRT on a GPU, from export to verification, next to what one would use instead.

    python -m benchmarks.gpu.main --data cifar10:PATH --work DIR [--stages build,parity,latency]
    python -m benchmarks.gpu.main --data cifar10:PATH --work DIR --dry-run

Stages leave what they make in DIR and what they measure in DIR/stages, part by part, so that a
later call, or another interpreter, goes on where one was cut off: ``export``, ``reference``,
``torch``, ``compiled`` and ``verify`` need PyTorch, ``build``, ``parity``, ``latency``, ``parts``
and ``one_engine`` TensorRT and no PyTorch, ``router_tail`` TensorRT 10.9 and Triton,
``onnxruntime`` its GPU build. ``verify`` lets TensorRT answer in another interpreter where
``--tensorrt-python`` names one. What fails or lacks something says why in its record, and the
others go on. Whatever was measured so far is joined in ``benchmarks/results/gpu_trt.json`` after
each stage.

``--dry-run`` needs no GPU: it exports, runs the graphs that TensorRT would build in ONNX Runtime on
the CPU, through the same dispatch, and lists the engines to be built.

Untrained weights, fitted to images that use the experts alike, answer for speed and for numerics;
``--trained RUN`` is what robustness is verified on.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe_deploy.files import write_atomically
from benchmarks.gpu.bounds import bounds
from benchmarks.gpu.common import MODELS, Record, Stage, Work, facts

RESULT = Path(__file__).parents[1] / "results" / "gpu_trt.json"
PRECISIONS = ("fp32", "fp16")  # those that there are bounds for


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


def stages() -> dict[str, Stage]:
    """Return the stages by name, in the order in which they build on each other."""
    from benchmarks.gpu import device, engines, timing
    from benchmarks.gpu import eager as of_torch
    from benchmarks.gpu import one_engine as whole
    from benchmarks.gpu import router_plugin as router

    return {
        "device": device.device,
        "export": of_torch.export,
        "reference": of_torch.reference,
        "build": engines.build,
        "parity": engines.parity,
        "latency": timing.latency,
        "parts": timing.parts,
        "one_engine": whole.one_engine,
        "router_tail": router.router_tail,
        "onnxruntime": engines.onnxruntime,
        "torch": of_torch.eager,
        "compiled": of_torch.compiled,
        "router_kernel": of_torch.router_kernel,
        "verify": of_torch.verify,
    }


# Those that a dry run leaves out.
NEED_GPU = ("router_tail", "torch", "compiled", "router_kernel", "verify")
_MOST_BEGUN = 2


def write_result(work: Work, out: Path) -> None:
    """Join what all stages have measured so far."""
    files = sorted(work.records.glob("*.json"))
    measured = {file.stem: json.loads(file.read_text()) for file in files}
    asked = {"data": work.data.partition(":")[0], "dry_run": work.dry}
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
    for name in chosen or [n for n in known if not work.dry or n not in NEED_GPU]:
        run_stage(name, known[name], work, out)


if __name__ == "__main__":
    main()
