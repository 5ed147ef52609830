"""HTML report of the demo: one file that needs no other (extra ``[report]``)."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.cli.demo.result import MOE, DemoResult
from advmoe_deploy.cli.pages.page import render
from advmoe_deploy.cli.pages.plots import (
    expert_load_svg,
    latency_svg,
    robustness_svg,
    summary_svg,
)
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec

_TEMPLATE = "demo/report.html.jinja"


def write_demo_report(result: DemoResult, out: Path) -> None:
    """Write ``report.html``, ``summary.svg`` and ``result.json`` into ``out``."""
    epsilon = result.verify.threat.epsilon
    plots = {
        "robustness": robustness_svg(result.curves, epsilon),
        "latency": latency_svg(result.profile),
        "load": expert_load_svg(result.load_by_class, result.class_names),
    }
    html = render(_TEMPLATE, result=result, plots=plots, gallery=_gallery(out, result))
    write_atomically(out / "report.html", html.encode())
    summary = summary_svg(result.curves, epsilon, result.profile)
    write_atomically(out / "summary.svg", summary.encode())
    write_atomically(out / "result.json", result.model_dump_json(indent=2).encode())


def _gallery(out: Path, result: DemoResult) -> list[dict[str, Any]]:
    """Return one test image per class, clean and attacked, with the exported model's answers."""
    data = load_dataset("digits")
    first_C = [int(np.flatnonzero(data.test.labels == c)[0]) for c in range(len(data.class_names))]
    clean, labels = to_float(data.test.images[first_C]), data.test.labels[first_C]
    _, model = load_checkpoint(out / "runs" / MOE / "model")
    attack = AttackSpec(name="pgd", steps=50)
    x, y = torch.from_numpy(clean), torch.from_numpy(labels)
    attacked = attack_model(model, x, y, result.verify.threat, attack).numpy()
    with open_runner(open_bundle(out / "bundle")) as runner:
        answers = [runner.infer(images) for images in (clean, attacked)]
    cells = []
    for index, label in enumerate(labels):
        cell: dict[str, Any] = {"label": data.class_names[label]}
        for kind, images, answer in zip(
            ("clean", "attacked"), (clean, attacked), answers, strict=True
        ):
            guess = int(answer.logits[index].argmax())
            (ids_NK,) = answer.expert_ids.values()
            cell[kind] = {
                "png": _png(images[index, 0]),
                "answer": data.class_names[guess],
                "right": guess == label,
                "expert": int(ids_NK[index, 0]),
            }
        cells.append(cell)
    return cells


def _png(pixels_HW: NDArray[np.float32]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels_HW * 255).astype(np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
