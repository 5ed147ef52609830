"""Conclusions of an analysis, in words."""

import math
from collections.abc import Callable, Sequence

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.protocol.radii import Standing
from advmoe_deploy.analysis.shares import difference_of
from advmoe_deploy.cli.verdicts.said import Said, listed, percent, points
from advmoe_deploy.reports.cautions import COLLAPSED, FEWEST_ROWS
from advmoe_deploy.reports.text import count_of
from advmoe_deploy.settings import epsilon_text

_EVEN = 0.8  # share of the experts from which they count as used alike
_REDUNDANT = 0.05  # of all images, that redundant experts cost less than, shown by an interval


def conclusions(report: AnalysisReport) -> list[Said]:
    """Return what the sections that were run come to, the most important first."""
    makers: tuple[Callable[[AnalysisReport], Said | None], ...] = (
        _withstands,
        _use,
        _classes,
        _routes,
        _weakest,
        _redundant,
        _worth,
        _jumps,
        _guaranteed,
        _beside_twin,
        _room,
        _smoothed,
    )
    return [said for make in makers if (said := make(report))]


def _withstands(report: AnalysisReport) -> Said:
    clean, of = percent(report.accuracy.value), f"{report.images} test images"
    if report.experts is None:
        return Said(f"{clean} of {of} are right, unattacked")
    together = report.experts.together.value
    said = (
        f"{percent(together)} of {of} withstand PGD with every target but experts; "
        f"{clean} are right unattacked"
    )
    return Said(said, "" if together else "worse")


def _use(report: AnalysisReport) -> Said | None:
    if not report.routes:
        return None
    least = min(report.routes, key=lambda use: use.effective_routes / use.experts)
    figures = f"{least.effective_routes:.2f} effective routes of {least.experts}"
    where = f" in {least.layer}, where it is least even" if len(report.routes) > 1 else ""
    if (choices := sum(least.load)) < FEWEST_ROWS:
        few = f"{count_of(choices, 'choice')} of experts cannot tell how evenly they are used"
        return Said(f"{few}: {figures}{where}", "unsure")
    if least.effective_routes < COLLAPSED:
        return Said(f"Routing has collapsed onto one expert: {figures}{where}", "worse")
    if least.effective_routes >= _EVEN * least.experts:
        return Said(f"All experts are used: {figures}{where}")
    return Said(f"Experts are used unevenly: {figures}{where}", "unsure")


def _classes(report: AnalysisReport) -> Said | None:
    if not report.routes:
        return None
    use = max(report.routes, key=lambda use: use.class_information)
    most = math.log2(min(use.experts, len(use.by_class)) or 1)
    chance = use.chance_information
    bits = (
        f"{use.class_information:.2f} of at most {most:.2f} bits in {use.layer}, "
        f"by chance up to {chance:.2f}"
    )
    if use.class_information <= chance:
        return Said(f"Routes follow the class no more than chance explains: they share {bits}")
    part = (use.class_information - chance) / max(most - chance, 1e-12)
    how_far = "" if part >= 0.5 else "hardly " if part < 0.1 else "partly "
    return Said(f"Routes {how_far}follow the class: they share {bits}")


def _routes(report: AnalysisReport) -> Said | None:
    at_epsilon = [
        effect
        for effect in report.changes or ()
        if effect.attack.target == "router" and effect.epsilon == report.threat.epsilon
    ]
    if not at_epsilon:
        return None
    effect = at_epsilon[0]
    lost = effect.accuracy_clean.value - effect.accuracy_attacked.value
    return Said(
        f"An attack on nothing but the routes sends {percent(effect.route_change.value)} of the "
        f"images to other experts and costs {100 * lost:.1f} points of accuracy"
    )


def _weakest(report: AnalysisReport) -> Said | None:
    rows = {row.target: row.accuracy for row in report.experts.targets} if report.experts else {}
    if not {"router", "experts"} <= set(rows):
        return None
    router, experts = rows["router"], rows["experts"]
    if router.value == experts.value == 0:
        return None
    left = f"{percent(router.value)} stand against router attacks, {percent(experts.value)} where"
    left += " only the experts are attacked"
    if router.high < experts.low:
        return Said(f"The router is the weak part: {left}", "worse")
    if experts.high < router.low:
        return Said(f"The experts, not the router, are the weak part: {left}")
    return Said(f"Neither router nor experts are clearly the weak part: {left}")


def _redundant(report: AnalysisReport) -> Said | None:
    if report.experts is None:
        return None
    last = report.experts.second[-1]
    figures = (
        f"{percent(report.experts.accuracy.value)} are right with their best expert, "
        f"{percent(last.accuracy.value)} without it, {points(last.lost)} apart"
    )
    if last.lost.low > 0:
        return Said(f"Experts do not stand in for each other: {figures}")
    if last.lost.high < _REDUNDANT:
        return Said(f"Experts are redundant: {figures}")
    return Said(
        f"Whether experts stand in for each other, {report.images} images do not decide: {figures}",
        "unsure",
    )


def _worth(report: AnalysisReport) -> Said | None:
    if report.experts is None:
        return None
    best = max(report.experts.fixed, key=lambda row: row.withstood.value)
    one, routed = best.withstood, report.experts.gated.withstood
    alone = (
        f"the stronger of PGD and APGD leaves expert {best.expert} alone {percent(one.value)}, the "
        f"routed model {percent(routed.value)}"
    )
    if one.high < routed.low:
        return Said(f"Routing gains robustness: {alone}", "gain")
    if one.low > routed.high:
        return Said(f"Routing costs robustness: {alone}", "worse")
    return Said(f"Routing gains no robustness beyond chance: {alone}", "unsure")


def _jumps(report: AnalysisReport) -> Said | None:
    jumps = report.jumps
    if jumps is None:
        return None
    return Said(
        f"Where a route changes, the answer changes at {percent(jumps.answer_changes.value)} of "
        f"{jumps.boundaries} boundaries; logits jump by {jumps.jump_median:.3g} in the median"
    )


def _guaranteed(report: AnalysisReport) -> Said | None:
    if report.certificate is None:
        return None
    answers = [r for r in report.certificate.radii if (r.name, r.tag) == ("answer", "formal")]
    if not answers or answers[0].certified is None:
        return Said("No answer is guaranteed: there is no formal bound for this model")
    certified = answers[0].certified.value
    if answers[0].vacuous:
        return Said("No answer is guaranteed: formal radii are vacuous, below one level of 8 bits")
    if certified == 0:
        return Said("No answer is guaranteed at epsilon: formal bounds are too loose to be of use")
    return Said(f"{percent(certified)} of the answers are guaranteed at epsilon, by formal bounds")


def _beside_twin(report: AnalysisReport) -> Said | None:
    found = report.radii
    if found is None or found.twin is None:
        return None
    pairs = list(zip(found.standing, found.twin.points, strict=True))
    own, other = judged(pairs, report.threat.epsilon, 1 / len(report.class_names))
    more = difference_of(own.accuracy, other.accuracy)
    figures = (
        f"at radius {epsilon_text(own.epsilon)} {percent(own.accuracy.value)} withstand all of "
        f"{listed(list(found.targets))}, of its dense twin {percent(other.accuracy.value)}, "
        f"{points(more)} apart, for {found.macs / 1e6:.3g} and {found.twin.macs / 1e6:.3g} "
        "million MACs"
    )
    if more.low > 0:
        return Said(f"It withstands more than its dense twin: {figures}", "gain")
    if more.high < 0:
        return Said(f"It withstands less than its dense twin: {figures}", "worse")
    return Said(
        f"Whether it withstands more than its dense twin, {report.images} images do not decide: "
        f"{figures}",
        "unsure",
    )


def judged(
    pairs: Sequence[tuple[Standing, Standing]], epsilon: float, chance: float
) -> tuple[Standing, Standing]:
    """Return a model and its twin at the radius to judge them by.

    That is ``epsilon``, or the largest where the better one is above ``chance``: further on both
    stand at 0 and differ in nothing. ``pairs`` are of growing radii.
    """
    for pair in pairs:
        if math.isclose(pair[0].epsilon, epsilon, rel_tol=1e-6):
            return pair
    above = [pair for pair in pairs if max(one.accuracy.value for one in pair) > chance]
    return above[-1] if above else pairs[0]


def _room(report: AnalysisReport) -> Said | None:
    found = report.capacity
    if found is None:
        return None
    least = found.points[0]
    clean, robust = percent(least.accuracy.value), percent(least.robust_accuracy.value)
    return Said(
        f"With room for {least.ratio:g} of an even share {percent(least.served)} of the choices "
        f"are served: {clean} are right, {robust} attacked, for {least.macs / 1e6:.3g} of "
        f"{found.macs / 1e6:.3g} million MACs"
    )


def _smoothed(report: AnalysisReport) -> Said | None:
    found = report.smoothing
    if found is None:
        return None
    if found.vacuous:
        return Said(
            f"Smoothed by noise of sigma {found.settings.sigma:g} nothing is guaranteed: l2 radii "
            "are vacuous, below one level of 8 bits"
        )
    return Said(
        f"Smoothed by noise of sigma {found.settings.sigma:g} it is right on "
        f"{percent(found.accuracy.value)}, guaranteed within an l2 radius of "
        f"{found.mean_radius:.3f} in the mean"
    )
