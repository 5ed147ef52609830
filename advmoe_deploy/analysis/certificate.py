"""Certified radii within which an answer cannot change, and the standing of each constant.

An arg-max router jumps, and an answer is safe only as far as its route is: the certified radius is
the smaller of the radius of the route and of the answer behind it, each a margin over the formal
bound of that margin. For a linear router the radius of the route is exact: min over j of
(s_i - s_j) / ||W_i - W_j||_1. Theorem 5.4 (theorem.py) comes to the same with one bound for all
margins of an expert, so its radius is the smaller one.

All radii are l-inf, in [0, 1] pixels, before the clipping to [0, 1], which only helps.
Radii that are all below one level of 8 bits are called vacuous: true, and about no other image.

Shapes: N images, E experts, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from advmoe_deploy.analysis.lipschitz import ForcedScores, Lipschitz, Tag
from advmoe_deploy.analysis.shares import Share, answers, fold_rows, share_of
from advmoe_deploy.analysis.slopes import UnboundedError, in_float64, pair_slopes, sloped_image
from advmoe_deploy.analysis.theorem import held_radius
from advmoe_deploy.analysis.vacuous import VACUOUS, is_vacuous
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.specs import Frozen, ThreatModel

_MOST_ROUTES = 64  # different routes to bound; beyond them nothing is claimed
_LINEAR_ROUTERS = ("expert-networks", "dual-model")
_QUANTILES = 101


class Constant(Frozen):
    """One constant of the certificate; ``value`` is ``None`` where there is none."""

    symbol: str
    of: str
    value: float | None
    tag: Tag
    note: str


class Radii(Frozen):
    """Radii of all images, 0 where the answer is wrong already.

    ``certified`` is the share of images with a radius of at least ``epsilon``; ``quantiles`` are
    the radii at 0 %, 1 %, ... 100 %. ``vacuous``, and in words in ``note``: formal, and all below
    one level of 8 bits. Where the tag is not applicable, ``note`` says why and the rest is
    ``None``.
    """

    name: str
    tag: Tag
    note: str
    epsilon: float
    median: float | None = None
    certified: Share | None = None
    quantiles: tuple[float, ...] = ()
    vacuous: bool = False


class Certificate(Frozen):
    """Every constant with its tag, and the radii they give."""

    constants: tuple[Constant, ...]
    radii: tuple[Radii, ...]


def certificate(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    lipschitz: Sequence[Lipschitz],
) -> Certificate:
    """Return what can be certified of ``model`` around ``images``, and the constants it takes.

    ``lipschitz`` are its constants as :func:`~advmoe_deploy.analysis.lipschitz.lipschitz_constants`
    gives them.
    """
    route = local_radii(model, images)
    logits_NK, _ = answers(model, images)
    right_N = logits_NK.argmax(dim=1) == labels
    radii = []
    if isinstance(route, str):
        names = ("route", "answer") if model.rules else ("answer",)
        radii += [_refused(name, route, threat) for name in names]
    else:
        route_N, answer_N = route
        if route_N is not None:
            everyone = torch.ones_like(right_N)
            exact = model.spec.family in _LINEAR_ROUTERS
            note = "exact: the router is linear" if exact else "by the bound of the gates' margins"
            radii.append(_radii("route", "formal", note, route_N, everyone, threat))
        note = "margin over its bound" + (", inside the radius of the route" if model.rules else "")
        radii.append(_radii("answer", "formal", note, answer_N, right_N, threat))
    note = "as if the sampled constants were bounds: an estimate, nothing is guaranteed"
    sampled_N = sampled_radius(model, images, lipschitz)
    radii.append(_radii("answer", "diagnostic", note, sampled_N, right_N, threat))
    if not isinstance(route, str) and route[0] is not None:
        name, found = "Theorem 5.4, routes held", held_radius(model, images, route[0], lipschitz)
        if isinstance(found, str):
            radii.append(_refused(name, found, threat))
        else:
            note = "r = 0 inside the radius of the route"
            radii.append(_radii(name, "formal", note, found, right_N, threat))
    radii.append(_theorem(model, threat))
    return Certificate(constants=_constants(model, lipschitz), radii=tuple(radii))


def local_radii(model: Classifier, images: Tensor) -> tuple[Tensor | None, Tensor] | str:
    """Return formal radii of routes and answers [N], or why there are none.

    The radius of the route is ``None`` for a dense model.
    """
    if any(rule.top_k != 1 or rule.weighting != "one" for rule in model.rules):
        return "weights that depend on the image multiply what depends on it: no global bound"
    logits_NK, taken = answers(model, images)
    if any(len(routing.expert_ids_NK) != len(images) for routing in taken.values()):
        return "tokens meet in attention, which has no global bound"
    routes, route_of_N = _distinct(taken, len(images))
    if len(routes) > _MOST_ROUTES:
        return f"{len(routes)} different routes are more than the {_MOST_ROUTES} that are bounded"
    network = in_float64(model)
    route_N = torch.full((len(images),), torch.inf, dtype=torch.float64)
    answer_N = route_N.clone()
    for index, forced in enumerate(routes):
        rows_N = route_of_N == index
        try:
            outputs = network(sloped_image(model.spec.image_shape), forced.routes())
        except UnboundedError as error:
            return f"{error} has no global bound"
        answer_N[rows_N] = _least_ratio(logits_NK.cpu()[rows_N], pair_slopes(outputs))
        for layer, scores in forced.scores.items():
            radius_R = _least_ratio(taken[layer].scores_NE.cpu()[rows_N], pair_slopes(scores))
            route_N[rows_N] = torch.minimum(route_N[rows_N], radius_R)
    return (route_N if model.rules else None), torch.minimum(route_N, answer_N)


def _distinct(taken: dict[str, Routing], images: int) -> tuple[list[ForcedScores], Tensor]:
    """Return each route that images took, to be forced again, and which one each took [N]."""
    if not taken:
        return [ForcedScores({})], torch.zeros(images, dtype=torch.int64)
    ids_NL = torch.stack([routing.expert_ids_NK[:, 0] for routing in taken.values()], dim=1).cpu()
    routes, route_of_N = torch.unique(ids_NL, dim=0, return_inverse=True)
    forced = [ForcedScores(dict(zip(taken, ids, strict=True))) for ids in routes.tolist()]
    return forced, route_of_N


def sampled_radius(model: Classifier, images: Tensor, lipschitz: Sequence[Lipschitz]) -> Tensor:
    """Return what :func:`local_radii` would say if the sampled constants were bounds, [N].

    An estimate: sampled constants are too small, so these radii may be too large.
    """
    sampled = {part.part: part.sampled for part in lipschitz}
    routers = [value for part, value in sampled.items() if part.startswith("router")]
    networks = [value for part, value in sampled.items() if not part.startswith("router")]
    logits_NK, taken = answers(model, images)
    best_N2 = logits_NK.topk(2, dim=1).values
    radius_N = (best_N2[:, 0] - best_N2[:, 1]) / max(networks)
    for routing, slope in zip(taken.values(), routers, strict=True):
        margin_N = fold_rows(routing.margin_N, len(images)).amin(dim=1)
        radius_N = torch.minimum(radius_N, margin_N / max(slope, 1e-300))
    return radius_N.double().cpu()


def _least_ratio(values_NK: Tensor, slopes_KK: Tensor) -> Tensor:
    """Return min over j of (v_best - v_j) / slope of that difference, [N]."""
    values_NK = values_NK.double()
    best_N = values_NK.argmax(dim=1)
    margins_NK = values_NK.gather(1, best_N[:, None]) - values_NK
    ratios_NK = margins_NK / slopes_KK[best_N].clamp(min=1e-300)
    return ratios_NK.scatter(1, best_N[:, None], torch.inf).amin(dim=1)


def _constants(model: Classifier, lipschitz: Sequence[Lipschitz]) -> tuple[Constant, ...]:
    constants = []
    for part in lipschitz:
        symbol = "s" if part.part.startswith("router") else "L"
        constants.append(_diagnostic(symbol, part))
        constants.append(_formal(symbol, part))
    for rule in model.rules:
        note = "the chosen set jumps at ties"
        if rule.weighting == "one":
            note = "an arg-max jumps at ties; inside the radius of the route it is 0"
        elif rule.top_k == rule.num_experts:
            note = "no choice and no jump, but of no use without bounds M"
        tag: Tag = "not applicable"
        constants.append(
            Constant(symbol="r", of=f"weights of {rule.layer}", value=None, tag=tag, note=note)
        )
    return tuple(constants)


def _diagnostic(symbol: str, part: Lipschitz) -> Constant:
    note = "largest sampled gradient: a lower bound"
    return Constant(symbol=symbol, of=part.part, value=part.sampled, tag="diagnostic", note=note)


def _formal(symbol: str, part: Lipschitz) -> Constant:
    tag: Tag = "not applicable" if part.bound is None else "formal"
    note = part.reason or "product of operator norms, element by element"
    return Constant(symbol=symbol, of=part.part, value=part.bound, tag=tag, note=note)


def _theorem(model: Classifier, threat: ThreatModel) -> Radii:
    reason = "the choice of experts jumps at ties: no r_i exists, so it certifies nothing"
    if all(rule.top_k == rule.num_experts for rule in model.rules):
        reason = "all experts are weighed, without a jump, but no bound M of their margins is known"
    if not model.rules:
        reason = "nothing is routed: the theorem is the bound of the answer"
    return _refused("Theorem 5.4 as stated", reason, threat)


def _refused(name: str, reason: str, threat: ThreatModel) -> Radii:
    return Radii(name=name, tag="not applicable", note=reason, epsilon=threat.epsilon)


def _radii(
    name: str, tag: Tag, note: str, radius_N: Tensor, right_N: Tensor, threat: ThreatModel
) -> Radii:
    right_N = right_N.cpu()
    radius_N = torch.where(right_N, radius_N, 0.0).clamp(max=1.0)  # more than 1 is all images
    vacuous = tag == "formal" and is_vacuous(radius_N)
    return Radii(
        name=name,
        tag=tag,
        note=f"{note}; {VACUOUS}" if vacuous else note,
        vacuous=vacuous,
        epsilon=threat.epsilon,
        median=float(radius_N.median()),
        certified=share_of(right_N & (radius_N >= threat.epsilon)),
        quantiles=tuple(
            radius_N.quantile(torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)).tolist()
        ),
    )
