"""Robustness report: JSON and one HTML file that needs no other (extra ``[report]``)."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.pages.page import render
from advmoe_deploy.cli.pages.robust_plots import attacks_svg, convergence_svg
from advmoe_deploy.cli.robustness import Seen
from advmoe_deploy.cli.tables.robustness import certified_text
from advmoe_deploy.verify.examples.convergence import lines_of
from advmoe_deploy.verify.examples.rerouted import Rerouted, moves

HTML = "report.html"
MOST_PICTURES = 12
_TEMPLATE = "pages/robust_report.html.jinja"
_LARGEST = 128  # pixels; pages stay small where images are large


def write_report(seen: Seen, bundle: Bundle, folder: Path, name: str) -> None:
    """Write the entry of ``seen`` as the JSON file ``name``, and its page, into ``folder``."""
    entry = seen.entry
    (folder / name).write_text(entry.model_dump_json(indent=2) + "\n", encoding="utf-8")
    measured = entry.advmoe
    page = render(
        _TEMPLATE,
        entry=entry,
        measured=measured,
        model=bundle.manifest.model,
        plots=[attacks_svg(r, f"attacks-{i}") for i, r in enumerate(measured.engines)],
        convergence=convergence_svg(measured.convergence),
        lines=lines_of(measured.convergence),
        certified=certified_text(measured.certified),
        rerouted=[_shown(image, seen, bundle) for image in measured.rerouted[:MOST_PICTURES]],
        fallen=int((seen.examples.attack_N >= 0).sum()),
        moves=moves(measured.rerouted),
    )
    (folder / HTML).write_text(page, encoding="utf-8")


def _shown(image: Rerouted, seen: Seen, bundle: Bundle) -> dict[str, Any]:
    names, index = bundle.manifest.class_names, image.index
    return {
        "index": index,
        "clean": picture(seen.clean_NCHW[index]),
        "attacked": picture(seen.examples.images_NCHW[index]),
        "label": names[image.label],
        "clean_answer": names[image.clean_answer],
        "attacked_answer": names[image.attacked_answer],
        "attack": seen.entry.advmoe.engines[0].attacks[image.attack].title,
        "layers": image.layers,
    }


def picture(image_CHW: NDArray[np.float32]) -> str:
    """Return an image [C, H, W] in [0, 1] as the address of a PNG that holds it itself."""
    pixels_HWC = np.rint(255 * image_CHW).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    flat = pixels_HWC[..., 0] if pixels_HWC.shape[2] in (1, 2) else pixels_HWC[..., :3]
    drawn = Image.fromarray(np.ascontiguousarray(flat))
    drawn.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
