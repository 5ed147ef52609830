"""Golden images: the few that travel with a bundle, with the torch model's answers.

Shapes: N images, T tokens of each, R rows of a layer (N, or N * T), E experts, K experts per row.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.parity.answers import Answers, Images, RouteAnswers
from advmoe_deploy.sealing.golden import golden_arrays

GOLDEN_IMAGES = 64
_OF_A_ROUTE = ("scores", "expert_ids", "weights")


def golden_rows(answers: Answers) -> list[int]:
    """Return the first 64 images, and one more for each expert that none of these visits."""
    images = len(answers.logits)
    rows = list(range(min(GOLDEN_IMAGES, images)))
    for route in answers.routes.values():
        ids_NX = route.expert_ids.reshape(images, -1)
        for expert in range(route.scores.shape[1]):
            visitors = np.flatnonzero((ids_NX == expert).any(axis=1))
            if len(visitors) and not np.isin(visitors, rows).any():
                rows.append(int(visitors[0]))
    return rows


def write_golden(file: Path, images: Images, answers: Answers) -> None:
    """Write a few images and what the torch model answers, routes by layer, for later checks."""
    rows = golden_rows(answers)
    arrays: dict[str, NDArray[Any]] = {"images": images[rows], "logits": answers.logits[rows]}
    for layer, route in answers.routes.items():
        for name in _OF_A_ROUTE:
            values = getattr(route, name)
            # of tokens, [N, T, ...]; of images, [N, ...]
            by_image = values.reshape(len(images), -1, values.shape[1])[rows]
            of_images = len(values) == len(images)
            arrays[f"{layer}.{name}"] = by_image[:, 0] if of_images else by_image
    np.savez(file, **arrays)  # type: ignore[arg-type]


def read_golden(bundle: Bundle, layers: Iterable[str]) -> tuple[Images, Answers]:
    """Return what :func:`write_golden` wrote, with the routes of ``layers``.

    Raises:
        BundleError: the file is not what was exported, or holds something else.
    """
    arrays = golden_arrays(bundle)
    routes = {
        layer: RouteAnswers(*(_by_row(arrays[f"{layer}.{name}"]) for name in _OF_A_ROUTE))
        for layer in layers
    }
    return arrays["images"], Answers(arrays["logits"], routes)


def _by_row(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(-1, values.shape[-1])
