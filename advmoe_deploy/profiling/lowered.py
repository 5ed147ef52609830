"""Gain in time of a lower precision on this CPU; where there is none, a line says so."""

from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle, EngineSet
from advmoe_deploy.profiling.timing import time_interleaved
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.sealing.golden import golden_arrays
from advmoe_deploy.specs import Backend

_ON_CPU: tuple[Backend, ...] = ("onnxruntime", "openvino")
# Rounds, and the seconds that they may take together.
_LEAST, _MOST, _BUDGET_S = 20, 100, 0.5


def slower_than_fp32(bundle: Bundle, *, threads: int = 0) -> list[str]:
    """Return a line for each lower precision of ``bundle`` that is not faster than fp32 here.

    One image is computed by each engine in turn, at least 20 times. fp32 is that of the same
    backend, or of ONNX Runtime where the bundle has no other.
    """
    lowered = [e for e in bundle.manifest.engines if e.backend in _ON_CPU and e.precision != "fp32"]
    if not lowered:
        return []
    names = {each.name: _base(bundle, each) for each in lowered}
    image = golden_arrays(bundle)["images"][:1]
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(bundle, name, threads=threads))
            for name in dict.fromkeys([*names, *names.values()])
        }
        seconds = time_interleaved(
            {name: partial(runner.infer, image) for name, runner in runners.items()},
            budget_s=_BUDGET_S,
            least=_LEAST,
            most=_MOST,
        )
    lines = (not_faster(a, seconds[a], b, seconds[b]) for a, b in names.items())
    return [line for line in lines if line]


def not_faster(
    lower: str, lower_s: NDArray[np.float64], base: str, base_s: NDArray[np.float64]
) -> str:
    """Return the line that says that ``lower`` took as long as ``base`` or longer, if it did.

    Both are ``ENGINE:PRECISION`` with their seconds of the same rounds; medians are compared.
    """
    ratio = float(np.median(lower_s) / np.median(base_s))
    if ratio < 1:
        return ""
    (engine, precision), (other, fp32) = lower.split(":"), base.split(":")
    what = (precision, fp32) if engine == other else (f"{engine} {precision}", f"{other} {fp32}")
    return (
        f"{what[0]} took {ratio:.1f}x the time of {what[1]} at batch 1 on this CPU ({engine}, "
        f"medians of {len(lower_s)} rounds)"
    )


def _base(bundle: Bundle, each: EngineSet) -> str:
    own = each.backend if bundle.engine_set(each.backend, "fp32") else "onnxruntime"
    return f"{own}:fp32"
