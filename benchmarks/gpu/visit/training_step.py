"""Time a training step on a GPU: AdvMoE and dense, bf16, channels last, eager and compiled.

    python -m benchmarks.gpu.visit.training_step --out training_step.json [--dry-run]

Forward and backward of ResNet-18 at 32x32 on random images, forms in turn. What does not work is
left out, with the reason. ``--dry-run`` takes a few steps of a few images on the CPU, uncompiled.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.profiling.timing import time_interleaved
from advmoe_deploy.specs import ModelSpec
from benchmarks.gpu.common import facts, ratios_to, summary

BATCH, DRY_BATCH = 512, 8


def steps(batch: int, device: str, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return by name what makes one step; each leaves the loss."""
    images = torch.rand(batch, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    moe = ModelSpec(family="advmoe", num_experts=2, ratio=0.5)
    forms: dict[str, Callable[[], object]] = {}
    for name, spec in {"moe": moe, "dense": moe.dense()}.items():
        model = untrained_model(spec, images.cpu()).train()
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        kinds = {"eager": model, **({"compiled": torch.compile(model)} if compiled else {})}
        for kind, form in kinds.items():
            forms[f"{name} {kind}"] = _step(model, form, images, labels, device)
    return forms


def _step(
    model: torch.nn.Module, form: Any, images: torch.Tensor, labels: torch.Tensor, device: str
) -> Callable[[], object]:
    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(form(images), labels)
        loss.backward()
        return float(loss.detach())  # the host waits for it

    return step


def measured(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Return what those of ``calls`` that work take in turn, and why others do not."""
    working, left_out = {}, {}
    for name, step in calls.items():
        try:
            step()
            working[name] = step
        except Exception as error:
            left_out[name] = " ".join(str(error).split())[:300]
    times = time_interleaved(working, warmup=1, budget_s=seconds)
    ratios = ratios_to(times, "dense eager") if "dense eager" in times else {}
    return {"times": summary(times), "ratios": ratios, "left_out": left_out}


def main() -> None:
    """Measure eager forms, write them, and then the same beside compiled ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, twice")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    asked = parser.parse_args()
    torch.manual_seed(0)
    device, batch = ("cpu", DRY_BATCH) if asked.dry_run else ("cuda", BATCH)
    record = {**facts(), "batch": batch}
    for compiled in (False,) if asked.dry_run else (False, True):
        calls = steps(batch, device, compiled=compiled)
        found = measured(calls, 0.1 if asked.dry_run else asked.seconds)
        record["with compiled" if compiled else "eager"] = found
        write_atomically(asked.out, json.dumps(record, indent=1).encode())
        print(
            {n: row["p50_ms"] for n, row in found["times"].items()}, found["left_out"], flush=True
        )


if __name__ == "__main__":
    main()
