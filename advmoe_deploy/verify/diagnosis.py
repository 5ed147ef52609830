"""Diagnosis of an engine that does not answer as its reference does: what kind of mistake it is.

Each hypothesis is tested on the reference: made to err the same way, does it answer what the engine
answers? The first that holds is the finding.

Shapes: N images, C classes, R rows of a layer, E experts, K experts per row.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.parity.intervals import chance_of_more
from advmoe_deploy.parity.tolerance import relative_distances
from advmoe_deploy.verify.evidence import UNLIKELY, Evidence
from advmoe_deploy.verify.expert_faults import expert_finding
from advmoe_deploy.verify.findings import Finding
from advmoe_deploy.verify.preprocessing import preprocessing_finding

# Share of the squared distance that a fit may leave.
_LEFT, _LEFT_LOSSY = 0.01, 0.1
# Share of the images that may be answered otherwise where all but the routes is right.
_FEW = 0.02


def diagnose(evidence: Evidence) -> list[Finding]:
    """Return what is wrong with answers that do not agree; one finding at least."""
    hypotheses: tuple[Callable[[Evidence], Finding | None], ...] = (
        _not_finite,
        _only_routes,
        _scaled,
        preprocessing_finding,
        _classes,
        expert_finding,
    )
    for hypothesis in hypotheses:
        if found := hypothesis(evidence):
            return [found]
    return [_another_function(evidence)]


def tie_break(evidence: Evidence) -> Finding | None:
    """Return whether close calls go the other way more often than rounding explains.

    Such routes are right by themselves, so that the parity may have passed.
    """
    for layer in evidence.reference.routes:
        close_R = ~evidence.clear(layer)
        flips = int((evidence.flipped(layer) & close_R).sum())
        ties = int(close_R.sum())
        if flips and chance_of_more(flips, ties, 0.5) < UNLIKELY:
            message = (
                f"{layer}: {flips} of {ties} rows whose best scores are equal, or within "
                f"{evidence.margin:.3g}, go to the other expert: the tie-break is wrong; ties go "
                "to the lowest index (ArgMax with select_last_index=0), so export again"
            )
            return Finding(kind="router", message=message)
    return None


def _not_finite(evidence: Evidence) -> Finding | None:
    broken_N = ~np.isfinite(evidence.answer.logits).all(axis=1)
    if not broken_N.any():
        return None
    fine_N = np.isfinite(evidence.reference.logits).all(axis=1)
    whose = "the engine's logits" if (broken_N & fine_N).any() else "the logits of both"
    message = (
        f"{whose} are NaN or infinite on {int(broken_N.sum())} of {evidence.images} images, as "
        "where fp16 overflows (above 65504); export with --precision bf16 or fp32"
    )
    return Finding(kind="not-finite", message=message)


def _only_routes(evidence: Evidence) -> Finding | None:
    """The reference, sent the way the engine went, answers the same."""
    if evidence.wrong.mean() > _FEW:
        return None
    for layer, route in evidence.reference.routes.items():
        clear_R, flipped_R = evidence.clear(layer), evidence.flipped(layer)
        flips = int((flipped_R & clear_R).sum())
        if flips:
            margins_R = route.margins[flipped_R & clear_R]
            message = (
                f"{layer}: {flips} of {int(clear_R.sum())} rows go to another expert, with margins "
                f"of scores up to {margins_R.max():.3g}, while every expert answers as it should: "
                "the router differs (rounded weights, stale statistics, other scores); keep it in "
                "fp32 and export again"
            )
            return Finding(kind="router", message=message)
        theirs_RK = evidence.answer.weights[layer].reshape(route.weights.shape)
        off = float(np.abs(np.sort(theirs_RK) - np.sort(route.weights)).max(initial=0.0))
        if off > evidence.closeness.tolerance:
            message = (
                f"{layer}: routing weights are off by up to {off:.3g}, though the rows go to the "
                "right experts; check how scores become weights (softmax, renormalisation)"
            )
            return Finding(kind="router", message=message)
    return None


def _scaled(evidence: Evidence) -> Finding | None:
    """A multiple of the reference's logits."""
    wanted, right = evidence.answer.logits.astype(np.float64), evidence.along.astype(np.float64)
    scale = float((wanted * right).sum() / max(1e-30, float((right * right).sum())))
    left = _square(wanted - scale * right)
    apart = _square(wanted - right)
    explained = left <= _limit(evidence) * min(apart, _square(wanted))
    if not explained or abs(scale - 1) < 1e-3:
        return None
    message = (
        f"logits are {scale:.4g} times the reference's (least squares over {evidence.images} "
        f"images leaves {100 * left / apart:.2g} % of the difference): probabilities and any "
        "threshold on them are wrong; look for a temperature or a scale at the head, and export "
        "again"
    )
    return Finding(kind="logit-scale", message=message)


def _classes(evidence: Evidence) -> Finding | None:
    """Classes in another order, or some of them off for every image."""
    wanted, right = evidence.answer.logits.astype(np.float64), evidence.along.astype(np.float64)
    apart_C = np.square(wanted - right).sum(axis=0)
    # The reference's column that each of the engine's is nearest to.
    apart_CC = np.stack([np.square(w_N[:, None] - right).sum(axis=0) for w_N in wanted.T])
    order_C = apart_CC.argmin(axis=1)
    moved = int((order_C != np.arange(len(order_C))).sum())
    left = float(apart_CC.min(axis=1).sum())
    if moved and len(set(order_C)) == len(order_C) and left <= _limit(evidence) * apart_C.sum():
        message = (
            f"{moved} of {len(order_C)} classes are in another order: the engine's logits are the "
            f"reference's of classes {', '.join(map(str, order_C))}; export with the class names "
            "of the data that it was trained on"
        )
        return Finding(kind="class-logits", message=message)
    worst = int(apart_C.argmax())
    if apart_C[worst] >= (1 - _limit(evidence)) * apart_C.sum():
        off = float((wanted - right)[:, worst].mean())
        message = (
            f"only the logits of class {worst} differ, by {off:+.3g} on average over "
            f"{evidence.images} images: its row of the head, weights or bias, is another; export "
            "again from the checkpoint"
        )
        return Finding(kind="class-logits", message=message)
    return None


def _another_function(evidence: Evidence) -> Finding:
    far = relative_distances(evidence.answer.logits, evidence.along)
    flips = [
        f", {int((evidence.flipped(layer) & evidence.clear(layer)).sum())} routes of {layer} differ"
        for layer in evidence.reference.routes
    ]
    message = (
        f"the engine is another function: {int(evidence.wrong.sum())} of {evidence.images} images "
        f"get other logits, by {100 * np.median(far):.3g} % of their norm (median)"
        f"{''.join(flips)}; no change of images, scale or experts explains it: weights of another "
        "epoch, stale BatchNorm statistics or a bad quantisation; export again from the checkpoint "
        "whose reference this is"
    )
    return Finding(kind="weights", message=message)


def _limit(evidence: Evidence) -> float:
    return _LEFT if evidence.closeness.exact else _LEFT_LOSSY


def _square(values: NDArray[np.float64]) -> float:
    return float(np.square(values).sum())
