"""Probes of a router: images so near the border of two experts that another router parts them.

Test images lie far from the border: a router that is slightly off sends them all the right way, and
an attacked image the wrong one. A probe is mixed of two images that go to different experts, in the
proportion, found by bisection on the reference, at which the better score leads by little.

Shapes: N images, P probes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images, RouteAnswers
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.verify.batches import answers_in_batches, images_to_batch
from advmoe_deploy.verify.evidence import Evidence
from advmoe_deploy.verify.findings import Finding

_LEAD = 20  # margins of a close call, by which the better score leads at least
_STEPS = 12
_MOST_LAYERS = 4
_MOST_PROBES = 32


@dataclass(frozen=True)
class Probes:
    """Probes of ``layer``, and by how much the better score leads in the median."""

    layer: str
    x_PCHW: Images
    lead: float


def router_finding(evidence: Evidence, runner: Runner, rounding: float) -> Finding | None:
    """Return what the router of an exact engine does to probes that the reference's does not."""
    for layer in _image_layers(evidence)[:_MOST_LAYERS]:
        probes = probes_of(evidence, layer)
        if probes is None:
            continue
        reference = reference_answers(evidence.model, probes.x_PCHW)
        answer = answers_in_batches(runner, probes.x_PCHW)
        parity = compare_answers(reference, answer, rounding=rounding, margin=_lead(evidence))
        flips = next(each.flips for each in parity.layers if each.layer == layer)
        if flips:
            message = (
                f"{layer}: {flips} of {len(probes.x_PCHW)} images mixed of two, whose best scores "
                f"are about {probes.lead:.2g} apart, go to another expert, though the test images "
                "go the right way: the router is slightly off, and attacks will find where; keep "
                "it in fp32, with the weights of the reference, and export again"
            )
            return Finding(kind="router", message=message)
    return None


def probes_of(evidence: Evidence, layer: str) -> Probes | None:
    """Return probes of a layer that routes images; none if all images go to one expert."""
    one_P, other_P = _pairs(evidence, layer)
    if not len(one_P):
        return None
    ours, theirs = evidence.x_NCHW[one_P], evidence.x_NCHW[other_P]
    wanted_PK = evidence.reference.routes[layer].expert_ids[one_P]
    near, far = np.zeros(len(one_P)), np.ones(len(one_P))  # the share of the other image
    best, lead = near.copy(), np.full(len(one_P), np.inf)
    for _ in range(_STEPS):
        middle = (near + far) / 2
        route = _route(evidence.model, _mixed(ours, theirs, middle), layer)
        same = np.sort(route.expert_ids, axis=1) == np.sort(wanted_PK, axis=1)
        same_P, margins_P = same.all(axis=1), route.margins
        better_P = same_P & (margins_P >= _lead(evidence)) & (margins_P < lead)
        best, lead = np.where(better_P, middle, best), np.where(better_P, margins_P, lead)
        near, far = np.where(same_P, middle, near), np.where(same_P, far, middle)
    found_P = np.isfinite(lead)
    if not found_P.any():
        return None
    x_PCHW = _mixed(ours, theirs, best)[found_P]
    return Probes(layer, np.ascontiguousarray(x_PCHW), float(np.median(lead[found_P])))


def _lead(evidence: Evidence) -> float:
    return _LEAD * evidence.margin


def _image_layers(evidence: Evidence) -> list[str]:
    routes = evidence.reference.routes
    return [name for name, route in routes.items() if len(route.scores) == evidence.images]


def _pairs(evidence: Evidence, layer: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return as many images as other images, which go to other experts."""
    ids_N = evidence.reference.routes[layer].expert_ids[:, 0]
    most = min(_MOST_PROBES, max(1, images_to_batch(evidence.x_NCHW) // 2))
    pairs = [
        (row, other)
        for row in range(min(len(ids_N), most))
        if len(others := np.flatnonzero(ids_N != ids_N[row]))
        for other in [int(others[row % len(others)])]
    ]
    one_P, other_P = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return one_P, other_P


def _mixed(ours: Images, theirs: Images, share: NDArray[np.float64]) -> Images:
    share_P111 = share.astype(np.float32)[:, None, None, None]
    return np.clip(ours + share_P111 * (theirs - ours), 0, 1)


def _route(model: Classifier, x_PCHW: Images, layer: str) -> RouteAnswers:
    return reference_answers(model, x_PCHW).routes[layer]
