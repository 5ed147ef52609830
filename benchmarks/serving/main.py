"""Measure ``advmoe serve`` on the loopback: speed, overload, malformed requests, stops and more.

    python -m benchmarks.serving.main BUNDLE --other BUNDLE [--apart] [--seconds 60]
    python -m benchmarks.serving.main BUNDLE --parts speed overload [--apart] [--seconds 60]

Clients and server share the machine's cores, or have their own with ``--apart``, as where clients
are other machines: the server, and the bare runner that it is compared with, on the first half.
Leave the machine alone meanwhile. What must hold stands beside the figures. Writes
``benchmarks/results/serving/digits.json``, or what ``--out`` names, after each part. Parts of an
earlier result that are not measured again stay if they are of the same model, machine and settings;
else nothing is measured before another file is named.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.profiling.processor import processor_name
from benchmarks.program import run_program, write
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
    print(json.dumps(measure(wanted), indent=1))


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
    """Write the figures of every part that is wanted, one after the other, and return them."""
    bundle = open_bundle(wanted.bundle)
    other = open_bundle(wanted.other) if "reload" in wanted.parts else bundle
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    if not wanted.apart:
        ours = set(cores)
    facts: dict[str, Any] = {
        "model": bundle.manifest.model.model_dump(mode="json"),
        "bundle": bundle.identity,
        "engine": wanted.engine,
        "threads": wanted.threads,
        "processor": processor_name(),
        "cores": len(cores),
        "cores_of_the_server": len(ours),
        "clients_on_other_cores": wanted.apart,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": wanted.seconds,
    }
    staying = staying_parts(wanted.out, wanted.parts, facts)
    result = {**facts, "load_before": os.getloadavg(), **staying}
    if wanted.apart:
        os.sched_setaffinity(0, theirs)
    for name in PARTS:
        if name in wanted.parts:
            result[name] = part(name, wanted, (bundle, other), ours)
            write(wanted.out, result)
    return result


def staying_parts(out: Path, measured: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of an earlier result that are not measured again.

    Raises:
        UsageError: they were measured of something else, or otherwise.
    """
    earlier = json.loads(out.read_text()) if out.exists() else {}
    staying = {name: earlier[name] for name in PARTS if name in earlier and name not in measured}
    other = [name for name, value in facts.items() if earlier.get(name) != value]
    if staying and other:
        raise UsageError(
            f"{out} holds {', '.join(staying)} with other values of {', '.join(other)}; "
            "name another --out, or measure all parts"
        )
    return staying


def part(
    name: str, wanted: argparse.Namespace, bundles: tuple[Bundle, Bundle], cores: set[int]
) -> dict[str, Any]:
    """Return the figures of one part, of a server on ``cores``; ``reload`` alone takes both."""
    bundle, engine = bundles[0], wanted.engine
    options = [f"--engine={engine}", f"--threads={wanted.threads}"]
    if name == "stops":
        return stops(wanted.bundle, bundle, wanted.rounds, cores)
    if name == "reload":
        return reloads(bundles, engine, wanted.requests, cores, *options)
    if name == "speed":
        with on_cores(cores):
            alone = bare(bundle, engine, wanted.threads, min(10.0, wanted.seconds))
    more = ["--grpc-port=0"] if name == "grpc" else []
    with serving(wanted.bundle, *options, *more, cores=cores) as running:
        if name == "overload":
            return overload(running, bundle, wanted.seconds)
        if name == "malformed":
            return malformed(running, bundle, wanted.requests)
        if name == "grpc":
            return rpc(running, bundle, engine, wanted.seconds, wanted.requests)
        far = same_logits(running, bundle, engine)
        found = speed(running, bundle, alone, wanted.seconds)
    return {"logits_differ_by": far, "bare": alone, **found}


if __name__ == "__main__":
    run_program(main)
