"""Time whole training steps of the CPU recipes: attacks, both steps, optimizers; images a second.

    OMP_NUM_THREADS=2 python -m benchmarks.training.whole_step [--rounds 10] [--batch 128]

ResNet-18 at 32x32, random images. AdvMoE alternates as ``cifar10-advmoe-cpu`` does once its experts
have parted, the router's step on one of so many batches: a call is as many batches as that takes.
Beside it AdvMoE ``masked`` (every expert computed), AT MoE, S-Dense and the dense network, each in
float32 and in bfloat16, interleaved in one process. ``convolutions`` are those of one pathway on
AdvMoE's batches alone, the router's left out, twice forward and twice backward, each on its own
contiguous inputs: what a step cannot beat.

Writes ``benchmarks/results/whole_step.json`` with every raw sample.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe_deploy.data.dataset import Split
from advmoe_deploy.models.backbones.layers import RoutedConv2d, convolve
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.data.loader import DataLoader
from advmoe_deploy.train.recipes import recipe
from advmoe_deploy.train.run.report import versions
from advmoe_deploy.train.step.weights import TrainedWeights
from benchmarks.program import run_program, write

RESULTS = Path(__file__).parents[1] / "results" / "whole_step.json"
OURS = "advmoe"
RECIPES = {
    OURS: "cifar10-advmoe-cpu",
    "advmoe masked": "cifar10-advmoe-cpu",
    "at-moe": "cifar10-at-moe-cpu",
    "s-dense": "cifar10-s-dense-cpu",
    "dense": "cifar10-dense-cpu",
}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    before = os.getloadavg()
    calls: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        for form in RECIPES:
            calls[f"{form}, {precision}"] = steps_of(form, precision, arguments.batch)
        calls[f"convolutions, {precision}"] = convolutions(precision, arguments.batch)
    times = time_interleaved(calls, rounds=arguments.rounds, warmup=1)
    result = {
        "rows": [row_of(name, times, arguments.batch) for name in calls],
        "settings": {
            "batch": arguments.batch,
            "batches_per_call": batches_per_call(),
            "rounds": arguments.rounds,
            "warmup": 1,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "device": processor_name(),
        "platform": platform.platform(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "raw_ms": {name: (1e3 * values).round(3).tolist() for name, values in times.items()},
    }
    write(arguments.out, result)
    for row in result["rows"]:
        print(json.dumps(row))


def batches_per_call() -> int:
    """Return how many batches AdvMoE's alternation takes."""
    return recipe(RECIPES[OURS]).router_every


def settings_of(form: str, precision: str, batch: int) -> TrainConfig:
    """Return the recipe of ``form`` with its experts apart from the start."""
    changes = [f"precision={PRECISIONS[precision]}", f"batch_size={batch}", "shared_start=0"]
    return apply_overrides(recipe(RECIPES[form]), changes)


def steps_of(form: str, precision: str, batch: int) -> Callable[[], object]:
    """Return a call that trains on as many batches as an alternation takes."""
    config, count = settings_of(form, precision, batch), batches_per_call()
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.precision)
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (count * batch, *config.model.image_shape), dtype=np.uint8)
    labels = np.arange(count * batch) % config.model.num_classes
    weights = TrainedWeights(fabric, config)
    batches = list(DataLoader(fabric, config, Split(images, labels)).epoch(0))
    weights.begin_epoch(0)
    if config.balanced_start:
        weights.balance_start(batches[0])
    if form == "advmoe masked":
        compute_all(weights.learner.model)
    return lambda: [weights.step(each) for each in batches]


def compute_all(model: Classifier) -> None:
    """Let ``model`` compute every expert for every image and then select, as the papers' code."""
    forward = model.forward

    def masked(images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        routes.execution = "masked"
        return forward(images, routes)

    model.forward = masked


def convolutions(precision: str, batch: int) -> Callable[[], object]:
    """Return a call of the convolutions of one pathway alone, for as many batches."""
    config = settings_of("s-dense", precision, batch)
    spec = recipe(RECIPES[OURS]).model.pathway()
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.precision)
    model = TrainedWeights(fabric, config.model_copy(update={"model": spec})).learner.model
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    alone = [
        (
            partial(convolve, conv.to(dtype), dispatch=None),
            x.to(dtype).detach().requires_grad_(at > 0),
        )
        for at, (conv, x) in enumerate(convolved(model, batch))  # the first's input is the images
    ]

    def run() -> None:
        for _ in range(2 * batches_per_call()):  # to find the examples, and to train on them
            for conv, x in alone:
                x.grad = conv.args[0].weight.grad = None  # a step adds none of them up
                y = conv(x_NCHW=x)
                y.backward(torch.ones_like(y))

    return run


def convolved(model: Classifier, batch: int) -> list[tuple[nn.Module, Tensor]]:
    """Return every convolution of a pathway with its input in a forward pass, in their order."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda conv, given: seen.append((conv, given[0])))
        for module in model.modules()
        if isinstance(module, nn.Conv2d | RoutedConv2d)
    ]
    with torch.no_grad():
        images = torch.rand(batch, *model.spec.image_shape)
        model(images.to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    return seen


def row_of(name: str, times: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return speed and cost of one form, beside AdvMoE at the same precision."""
    form, precision = name.split(", ")
    ratio = ratio_of_medians(times[name], times[f"{OURS}, {precision}"])
    median = float(np.median(times[name]))
    return {
        "form": form,
        "precision": precision,
        "images_per_second": round(batches_per_call() * batch / median, 1),
        "median_ms_per_batch": round(1e3 * median / batches_per_call(), 2),
        "time_relative_to_advmoe": {"ratio": ratio.value, "low": ratio.low, "high": ratio.high},
        "n": len(times[name]),
    }


if __name__ == "__main__":
    run_program(main)
