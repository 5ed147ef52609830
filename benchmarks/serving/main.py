"""Measure ``advmoe serve`` on the loopback: speed, overload, malformed requests, stops and more.

    python -m benchmarks.serving.main BUNDLE --other BUNDLE [--apart] [--seconds 60]
    python -m benchmarks.serving.main BUNDLE --parts speed overload [--apart] [--seconds 60]

Clients and server share the machine's cores, or have their own with ``--apart``, as where clients
are other machines: the server, and the bare runner that it is compared with, on the first half.
Leave the machine alone meanwhile. What must hold of each part stands beside the figures. Writes
``benchmarks/results/serving/digits.json``, or what ``--out`` names.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.profiling.processor import processor_name
from benchmarks.serving.client import many_descriptors
from benchmarks.serving.malformed import malformed
from benchmarks.serving.overload import overload
from benchmarks.serving.reload import reloads
from benchmarks.serving.rpc import rpc
from benchmarks.serving.server import on_cores, serving
from benchmarks.serving.speed import bare, same_logits, speed
from benchmarks.serving.stops import stops

RESULT = Path(__file__).parents[1] / "results" / "serving" / "digits.json"
PARTS = ("speed", "overload", "malformed", "stops", "grpc", "reload")
LIBRARIES = (
    "fastapi",
    "grpcio",
    "httptools",
    "numpy",
    "onnxruntime",
    "starlette",
    "uvicorn",
    "uvloop",
)


def main() -> None:
    """Measure the parts that are wanted and write the JSON."""
    wanted = wanted_of(None)
    many_descriptors()
    result = measure(wanted)
    wanted.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def wanted_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what is to be measured; ``None`` are the arguments of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument(
        "--requests", type=int, default=10_000, help="malformed, or meanwhile reloaded"
    )
    parser.add_argument("--rounds", type=int, default=50, help="servers that are stopped")
    parser.add_argument("--other", type=Path, help="the bundle that 'reload' takes turns with")
    parser.add_argument("--apart", action="store_true", help="clients on cores of their own")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args(arguments)
    if "reload" in wanted.parts and wanted.other is None:
        parser.error("'reload' needs --other: a bundle of the same image shape; or choose --parts")
    return wanted


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every part that is wanted."""
    bundle, load = open_bundle(wanted.bundle), os.getloadavg()
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    if wanted.apart:
        os.sched_setaffinity(0, theirs)
    else:
        ours = set(cores)
    result: dict[str, Any] = {
        "model": bundle.manifest.model.model_dump(mode="json"),
        "engine": wanted.engine,
        "threads": wanted.threads,
        "processor": processor_name(),
        "cores": len(cores),
        "cores_of_the_server": len(ours),
        "clients_on_other_cores": wanted.apart,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "load_before": load,
        "seconds": wanted.seconds,
    }
    options = [f"--engine={wanted.engine}", f"--threads={wanted.threads}"]
    if "speed" in wanted.parts:
        with on_cores(ours):
            alone = bare(bundle, wanted.engine, wanted.threads, min(10.0, wanted.seconds))
        with serving(wanted.bundle, *options, cores=ours) as running:
            far = same_logits(running, bundle, wanted.engine)
            found = speed(running, bundle, alone, wanted.seconds)
        result["speed"] = {"logits_differ_by": far, "bare": alone, **found}
    if "overload" in wanted.parts:
        with serving(wanted.bundle, *options, cores=ours) as running:
            result["overload"] = overload(running, bundle, wanted.seconds)
    if "malformed" in wanted.parts:
        with serving(wanted.bundle, *options, cores=ours) as running:
            result["malformed"] = malformed(running, bundle, wanted.requests)
    if "stops" in wanted.parts:
        result["stops"] = stops(wanted.bundle, bundle, wanted.rounds, ours)
    if "grpc" in wanted.parts:
        with serving(wanted.bundle, *options, "--grpc-port=0", cores=ours) as running:
            result["grpc"] = rpc(running, bundle, wanted.engine, wanted.seconds, wanted.requests)
    if "reload" in wanted.parts:
        pair = (bundle, open_bundle(wanted.other))
        result["reload"] = reloads(pair, wanted.engine, wanted.requests, ours, *options)
    return result


if __name__ == "__main__":
    main()
