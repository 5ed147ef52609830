"""Time a training step of AdvMoE, grouped against the papers' masked layer, on this CPU.

    OMP_NUM_THREADS=2 python -m benchmarks.training.step [--experts 2,4,8] [--loss ce|trades]

ResNet-18 at 32x32, ratio 0.5, random weights fitted to random images that use every expert alike;
forward and backward of the loss in training mode, the straight-through gradient into the router
included. Three forms of the same layer, one copy of the weights:

* ``grouped``: ours, each expert computed on its own rows;
* ``masked``: every expert computed on every row, the chosen one copied;
* ``released``: as the papers' released layer works, every expert computed, multiplied by a mask,
  and only then the chosen one copied.

Before anything is timed, losses and all gradients of the three are compared. The forms are timed
interleaved in one process; peak memory is that of a fresh process for each.

Writes ``benchmarks/results/train_step.json`` with every raw sample.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.dispatch import Dispatch
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.objectives.losses import trades
from benchmarks.program import run_program, write
from benchmarks.released import ReleasedDispatch

RESULTS = Path(__file__).parents[1] / "results" / "train_step.json"
FORMS = ("grouped", "masked", "released")
BETA = 6.0
EPSILON = 8 / 255
# What the released layer should cost, in grouped steps.
TARGETS = {2: 1.5, 4: 2.2, 8: 2.8}
GRADIENT_TOLERANCE = 1e-5
MEMORY_STEPS = 3


class Step:
    """A network, a batch, and one training step on it in any of the forms."""

    def __init__(self, experts: int, batch: int, loss: str) -> None:
        torch.manual_seed(0)
        spec = ModelSpec(family="advmoe", num_experts=experts, ratio=0.5)
        self.images = torch.rand(batch, *spec.image_shape)
        self.labels = torch.arange(batch) % spec.num_classes
        # Any point of the ball will do: finding one costs forms alike.
        self.nearby = (self.images + EPSILON * torch.randn_like(self.images).sign()).clamp(0, 1)
        self.loss = loss
        model = untrained_model(spec, self.images)
        assert isinstance(model, AdvMoE)
        self.model = model.train()

    def load(self) -> list[int]:
        """Return the images per expert."""
        return self.model.route(self.images)["router"].expert_load_E.tolist()

    def logits(self, form: str, images: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        routes = Routes(surrogate="score", execution="grouped" if form == "grouped" else "masked")
        if form != "released":
            return self.model(images, routes)
        x_NCHW = self.model.normalise(images)
        routing = routes.decide(self.model.rules[0], self.model.router, x_NCHW)
        dispatch: Dispatch = ReleasedDispatch(routing, "masked")
        return self.model.backbone(x_NCHW, dispatch)

    def run(self, form: str) -> Tensor:
        """Return the loss; gradients lie in the parameters."""
        self.model.zero_grad(set_to_none=True)
        clean = self.logits(form, self.images)
        if self.loss == "trades":
            loss = trades(clean, self.logits(form, self.nearby), self.labels, BETA)
        else:
            loss = F.cross_entropy(clean, self.labels)
        loss.backward()
        return loss.detach()

    def gradients(self, form: str) -> dict[str, Tensor]:
        """Return the gradient of every parameter, and the loss."""
        loss = self.run(form)
        named = self.model.named_parameters()
        return {"loss": loss, **{n: p.grad.clone() for n, p in named if p.grad is not None}}


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="2,4,8", help="numbers of experts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--loss", choices=("ce", "trades"), default="ce")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each form")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.experts.split(",")]
    if arguments.memory_of:
        print(peak_memory(Step(counts[0], arguments.batch, arguments.loss), arguments.memory_of))
        return
    result = measure(counts, arguments)
    write(arguments.out, result)
    show(result)


def measure(counts: list[int], arguments: argparse.Namespace) -> dict[str, object]:
    """Return differences, times, ratios, memory and raw samples for each number of experts."""
    load_before = os.getloadavg()
    # First of all, for a process begins with the peak of the one that starts it.
    peaks = {n: {form: memory_of(form, n, arguments) for form in FORMS} for n in counts}
    rows, samples = [], {}
    for experts in counts:
        step = Step(experts, arguments.batch, arguments.loss)
        calls = {form: partial(step.run, form) for form in FORMS}
        differences = compare(experts, arguments.loss)
        times = time_interleaved(calls, rounds=arguments.rounds, warmup=2)
        rows.append(
            {
                "experts": experts,
                "images_per_expert": step.load(),
                "gradient_differences": differences,
                **summary(times),
                "peak_mib": peaks[experts],
            }
        )
        for form in FORMS:
            samples[f"{form}, {experts} experts"] = (1e3 * times[form]).round(3).tolist()
    return {
        "model": "advmoe resnet18, ratio 0.5, 32x32",
        "rows": rows,
        "settings": {
            "loss": arguments.loss,
            "batch": arguments.batch,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "warmup": 2,
            "seed": 0,
            "precision": "float32",
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "device": processor_name(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "raw_ms": samples,
    }


def compare(experts: int, loss: str) -> dict[str, float]:
    """Return the largest relative difference of loss and gradients to the released form's.

    In float64, for in float32 each form rounds in its own order. Relative to a tensor's largest
    entry.

    Raises:
        SystemExit: it exceeds the tolerance, so that timing would compare different things.
    """
    step = Step(experts, 32, loss)
    step.model.double()
    step.images, step.nearby = step.images.double(), step.nearby.double()
    reference = step.gradients("released")
    differences = {}
    for form in ("grouped", "masked"):
        gradients = step.gradients(form)
        assert gradients.keys() == reference.keys()
        differences[form] = max(
            float((gradients[n] - t).abs().max() / t.abs().max().clamp(min=1e-30))
            for n, t in reference.items()
        )
        if not differences[form] <= GRADIENT_TOLERANCE:
            sys.exit(f"{form} differs from the released form by {differences[form]:.2g}")
    return differences


def summary(times: dict[str, np.ndarray]) -> dict[str, object]:
    """Return medians, and how many grouped steps each other form takes."""
    ratios = {form: ratio_of_medians(times[form], times["grouped"]) for form in FORMS[1:]}
    return {
        "n": len(times["grouped"]),
        "p50_ms": {form: 1e3 * float(np.median(values)) for form, values in times.items()},
        "ratio_to_grouped": {
            form: {"ratio": r.value, "ci_low": r.low, "ci_high": r.high}
            for form, r in ratios.items()
        },
    }


def memory_of(form: str, experts: int, arguments: argparse.Namespace) -> float:
    """Return the peak memory of a fresh process that runs a few steps in ``form``, in MiB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.training.step",
        "--memory-of",
        form,
        "--experts",
        str(experts),
    ]
    command += ["--batch", str(arguments.batch), "--loss", arguments.loss]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def peak_memory(step: Step, form: str) -> float:
    """Return the peak resident size of this process after a few steps, in MiB."""
    for _ in range(MEMORY_STEPS):
        step.run(form)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on macOS bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def show(result: dict[str, Any]) -> None:
    """Print the ratios next to their targets."""
    for row in result["rows"]:
        experts, times, peak = row["experts"], row["p50_ms"], row["peak_mib"]
        for form, ratio in row["ratio_to_grouped"].items():
            wanted = form == "released" and experts in TARGETS
            target = f"  (target {TARGETS[experts]})" if wanted else ""
            print(
                f"{experts} experts: {form:>8} {times[form]:.1f} ms, {peak[form]:.0f} MiB; grouped "
                f"{times['grouped']:.1f} ms, {peak['grouped']:.0f} MiB: {ratio['ratio']:.2f} "
                f"[{ratio['ci_low']:.2f}, {ratio['ci_high']:.2f}]{target}  n={row['n']}"
            )


if __name__ == "__main__":
    run_program(main)
