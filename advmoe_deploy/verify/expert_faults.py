"""Faults of experts: one that answers as another, answers nothing, or alone answers otherwise.

Shapes: N images, R rows of a layer (images, or tokens), E experts, K experts per row.
"""

import itertools

import numpy as np

from advmoe_deploy.parity.answers import Flags
from advmoe_deploy.verify.evidence import UNLIKELY, Evidence, Logits
from advmoe_deploy.verify.findings import Finding

_MOST_PAIRS = 64  # that are swapped in the reference
_MOSTLY = 0.9
_FEWEST = 3  # images that say something about an expert


def expert_finding(evidence: Evidence) -> Finding | None:
    """Return which experts are at fault, if the images that others answer are right."""
    for layer in evidence.reference.routes:
        visitors = _visitors(evidence, layer)
        found = _as_others(evidence, layer, visitors) or _silent(evidence, layer, visitors)
        if found:
            return found
    for layer in evidence.reference.routes:
        if found := _confined(evidence, layer, _visitors(evidence, layer)):
            return found
    return None


def _visitors(evidence: Evidence, layer: str) -> dict[int, Flags]:
    """Return for each expert the images [N] that the engine says it answered in part."""
    experts = evidence.reference.routes[layer].scores.shape[1]
    ids_RK = evidence.ids(layer)
    by_expert = {e: evidence.by_image((ids_RK == e).any(axis=1)) for e in range(experts)}
    return {e: images_N for e, images_N in by_expert.items() if images_N.sum() >= _FEWEST}


def _as_others(evidence: Evidence, layer: str, visitors: dict[int, Flags]) -> Finding | None:
    """Experts that answer what others should."""
    experts = evidence.reference.routes[layer].scores.shape[1]
    pairs = list(itertools.combinations(range(experts), 2))[:_MOST_PAIRS]
    answers: dict[int, tuple[int, int, int]] = {}
    for one, other in pairs:
        exchanged_NC = _swapped(evidence, layer, one, other)
        near_N = evidence.closeness.near(evidence.answer.logits, exchanged_NC)
        for expert, instead in ((one, other), (other, one)):
            if expert not in visitors:
                continue
            wrong_N = evidence.wrong & visitors[expert]
            explained = int((near_N & wrong_N).sum())
            if explained >= max(_FEWEST, _MOSTLY * wrong_N.sum()):
                answers[expert] = (instead, explained, int(visitors[expert].sum()))
    if not answers:
        return None
    named = ", ".join(
        f"expert {e} answers as expert {instead} on {right} of its {of} images"
        for e, (instead, right, of) in answers.items()
    )
    swapped = any(answers.get(instead, (-1,))[0] == e for e, (instead, *_) in answers.items())
    what = "experts are swapped" if swapped else "experts are lost or mixed up"
    message = f"{layer}: {named}: {what}; check the order of the experts' graphs and export again"
    return Finding(kind="experts", message=message)


def _swapped(evidence: Evidence, layer: str, one: int, other: int) -> Logits:
    """Return the reference's logits with the rows of two experts exchanged."""
    ids = {name: evidence.ids(name) for name in evidence.reference.routes}
    places = np.arange(evidence.reference.routes[layer].scores.shape[1])
    places[[one, other]] = other, one
    return evidence.routed(ids | {layer: places[ids[layer]]})


def _silent(evidence: Evidence, layer: str, visitors: dict[int, Flags]) -> Finding | None:
    """Experts that answer the same whatever they are asked, or zeros."""
    logits_NC = evidence.answer.logits
    for expert, images_N in visitors.items():
        spread, right = (
            float(each[images_N].std(axis=0).max()) for each in (logits_NC, evidence.along)
        )
        if spread <= 1e-3 * right:
            size = float(np.abs(logits_NC[images_N]).max())
            message = (
                f"{layer}: expert {expert} answers the same to all of its {int(images_N.sum())} "
                f"images (logits up to {size:.3g}, spread {spread:.2g} for {right:.2g} in the "
                "reference): its weights or its rows are lost; export again"
            )
            return Finding(kind="experts", message=message)
    return None


def _confined(evidence: Evidence, layer: str, visitors: dict[int, Flags]) -> Finding | None:
    """Experts that alone answer otherwise: what is wrong is in them."""
    wrong_N = evidence.wrong
    bad = [e for e, images_N in visitors.items() if (wrong_N & images_N).any()]
    good = [e for e in visitors if e not in bad]
    theirs_N = np.any([visitors[e] for e in bad], axis=0) if bad else np.zeros_like(wrong_N)
    wrong = int(wrong_N.sum())
    by_chance = float(theirs_N.mean()) ** wrong  # that all are theirs
    if not good or not bad or by_chance > UNLIKELY or (wrong_N & ~theirs_N).any():
        return None
    named = ", ".join(map(str, bad))
    message = (
        f"{layer}: only images of expert {named} get other logits, {wrong} of {theirs_N.sum()}; "
        f"those of expert {', '.join(map(str, good))} are right: the weights or the activations of "
        f"expert {named} differ (clipped, rounded, of another epoch); export again"
    )
    return Finding(kind="experts", message=message)
