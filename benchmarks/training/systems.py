"""Train every system and every backbone small, export each, and write one table.

    python -m benchmarks.training.systems [--only advmoe,rt-er] [--epochs 4] [--processes 2]

Each row trains on 600 of the embedded digits (8 x 8) at toy width. It says whether the loss fell,
what the test set gave under PGD, how many routes were used, what an image costs, and how close the
exported model is. The figures show that every system works from training to export; runs this
short say nothing about which one is better.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.program import run_program, with_kept_rows, with_part, write

if TYPE_CHECKING:
    from advmoe_deploy.reports import ParityReport

RESULT = Path(__file__).parents[1] / "results" / "systems.json"
DIGITS = ("train_images=600", "test_attack_steps=20", "evaluate_every=2", "model.width=8")


@dataclass(frozen=True)
class System:
    """One row: a recipe and what is changed to make it small."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()


METHODS = (
    System("AdvMoE", "digits-advmoe"),
    System("AdvMoE, released losses", "digits-advmoe-released"),
    System("router only", "digits-router-only"),
    System("experts only", "digits-experts-only"),
    System("AT MoE", "digits-at-moe"),
    System("AT dense", "digits-dense"),
    System("AT S-Dense", "digits-s-dense"),
    System("AT sparse", "digits-sparse"),
    *(
        System(f"dense, {loss}", "digits-dense", (f"loss={loss}",))
        for loss in ("pgd-at", "n-fgsm", "fast", "free", "standard")
    ),
    System("BlockMoE", "digits-block-moe"),
    System("BlockMoE, k=2, conv-gap", "digits-block-moe", (
        "model.top_k=2", "model.expert_layers.gate=conv-gap", "balance_loss=entropy",
    )),
    System("ConvMoE", "digits-conv-moe"),
    System("ConvMoE, ResNet-50, one conv", "digits-conv-moe", (
        "model.backbone=resnet50", 'model.expert_layers.layers=["layer4.1.conv2"]',
    )),
    System("RT-ER", "digits-rt-er"),
    System("JTDMoE", "digits-jtdmoe"),
    System("V-MoE", "digits-vit-moe", ("model.width=24",)),
    System("ViT, its dense twin", "digits-vit", ("model.width=24",)),
)  # fmt: skip
_WIDTHS = {"wrn-28-10": ("model.width=20",)}  # 10 : 4, as it is to wrn-28-4 in full size
BACKBONES = tuple(
    System(
        f"{column}, {backbone}", recipe, (f"model.backbone={backbone}", *_WIDTHS.get(backbone, ()))
    )
    for backbone in ("resnet34", "resnet50", "wrn-28-10", "wrn-28-4", "vgg16-bn", "densenet-bc")
    for column, recipe in (("AdvMoE", "digits-advmoe"), ("AT dense", "digits-dense"))
)


def row_of(system: System, settings: Iterable[str], seed: int) -> dict[str, Any]:
    """Return what one system gives from training to export."""
    import torch

    from advmoe_deploy.data.registry import load_dataset
    from advmoe_deploy.export.from_run import export_run
    from advmoe_deploy.export.targets import Target
    from advmoe_deploy.models.macs import macs_of
    from advmoe_deploy.train.recipes import apply_overrides, recipe
    from advmoe_deploy.train.run.loop import train

    torch.set_num_threads(1)
    config = apply_overrides(recipe(system.recipe), [*settings, *system.settings, f"seed={seed}"])
    scratch = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        report = train(config, load_dataset(config.data), scratch / "run")
        trained = time.perf_counter()
        openvino = Target("openvino", "fp32")
        bundle = export_run(scratch / "run", scratch / "bundle", targets=[openvino])
        exported = time.perf_counter()
        metrics = (scratch / "run" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in metrics]
    finally:
        shutil.rmtree(scratch)
    macs = macs_of(config.model)
    return {
        "system": system.name,
        "recipe": config.name,
        "settings": [*settings, *system.settings],
        "data": config.data,
        "method": config.method,
        "loss": config.loss,
        "family": config.model.family,
        "backbone": config.model.backbone,
        "epochs": report.epochs,
        "seed": config.seed,
        "test_images": report.images,
        "losses": [round(loss, 4) for loss in losses],
        "loss_fell": losses[-1] < losses[0],
        "clean_accuracy": report.clean_accuracy,
        "pgd_accuracy": report.pgd_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "attack": report.attack.model_dump(mode="json"),
        "epsilon": report.epsilon,
        "effective_routes": report.effective_routes,
        "macs": macs.model_dump(mode="json"),
        "export": {
            "onnx": checked(bundle.manifest.parity),
            **{e.backend: checked(e.parity) for e in bundle.manifest.engines},
        },
        "train_seconds": round(trained - began, 1),
        "export_seconds": round(exported - trained, 1),
    }


def checked(parity: "ParityReport") -> dict[str, Any]:
    """Return how near an exported form is to the torch model."""
    return {
        "images": parity.images,
        "max_abs_logit_diff": parity.max_abs_logit_diff,
        "max_relative_logit_diff": parity.max_relative_logit_diff,
        "route_agreement": parity.route_agreement,
        "passed": parity.passed,
    }


def main() -> None:
    """Train and export each system, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of the names of the rows to run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    known = {system.name: system for system in (*METHODS, *BACKBONES)}
    systems = [known[name] for name in with_part(arguments.only, known)]
    rows = []
    settings = (*DIGITS, f"epochs={arguments.epochs}")
    with ProcessPoolExecutor(arguments.processes) as pool:
        jobs = [pool.submit(row_of, system, settings, arguments.seed) for system in systems]
        for job in jobs:
            rows.append(job.result())
            keep(rows, arguments.out)
            print(json.dumps(rows[-1]), flush=True)


def keep(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the table; rows of an earlier one that were not made again are kept."""
    from advmoe_deploy.profiling.processor import processor_name
    from advmoe_deploy.train.run.report import versions

    facts = {"processor": processor_name(), "versions": versions()}
    write(out, with_kept_rows(out, facts, rows, ("system",)))


if __name__ == "__main__":
    run_program(main)
