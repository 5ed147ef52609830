"""Time a training step on a GPU: AdvMoE and dense, bf16, channels last, eager and compiled.

    python -m benchmarks.gpu.visit.training_step --out training_step.json [--dry-run]

Forward and backward of ResNet-18 at 32x32 on random images, forms in turn. What compiles not is
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
        model = model.to(device, memory_format=torch.channels_last)
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
        return float(loss)  # the host waits for it

    return step


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    asked = parser.parse_args()
    torch.manual_seed(0)
    device, batch = ("cpu", DRY_BATCH) if asked.dry_run else ("cuda", BATCH)
    calls, left_out = {}, {}
    for name, step in steps(batch, device, compiled=not asked.dry_run).items():
        try:
            step()
            calls[name] = step
        except Exception as error:
            left_out[name] = " ".join(str(error).split())[:300]
    seconds = 0.1 if asked.dry_run else asked.seconds
    times = time_interleaved(calls, warmup=1 if asked.dry_run else 5, budget_s=seconds)
    ratios = ratios_to(times, "dense eager") if "dense eager" in times else {}
    record = {**facts(), "batch": batch, "left_out": left_out, "times": summary(times)}
    write_atomically(asked.out, json.dumps({**record, "ratios": ratios}, indent=1).encode())
    print({name: row["p50_ms"] for name, row in record["times"].items()}, left_out)


if __name__ == "__main__":
    main()
