"""Verdict of a profile: how fast the model is beside its baselines."""

from collections.abc import Sequence
from itertools import groupby

from advmoe_deploy.cli.verdicts.said import Said, Tone, listed
from advmoe_deploy.reports import MODEL_NAMES, LatencyRatio, LatencyReport, Macs

# The baselines as a sentence has them, the first the most telling.
_BASELINES = {
    "dense": "the dense network",
    "s-dense": MODEL_NAMES["s-dense"],
    "unfused": "computing every expert",
}


def latency_verdict(report: LatencyReport) -> list[Said]:
    """Return a sentence for each baseline, dense first; without one, the times themselves."""
    first = report.rows[0]
    own = [
        ratio
        for ratio in report.ratios
        if (ratio.engine, ratio.precision) == (first.engine, first.precision)
    ]
    said = [_against(name, [r for r in own if r.a == name]) for name in _BASELINES]
    return [each for each in said if each] or [_alone(report)]


def macs_verdict(macs: Macs) -> Said:
    """Return how many multiply-accumulates are executed beside the dense network's."""
    fewer = macs.dense / macs.executed
    executed, dense = f"{macs.executed / 1e6:.2f} M", f"{macs.dense / 1e6:.2f} M"
    counts = f"{executed} an image, router included, instead of {dense}"
    if fewer > 1:
        return Said(f"It executes {fewer:.2f}x fewer multiply-accumulates: {counts}", "gain")
    return Said(f"It executes no fewer multiply-accumulates than dense: {counts}")


def tone_of(ratio: LatencyRatio) -> Tone:
    """Return whether the model gained time over a baseline, beyond the interval.

    Of a baseline on another engine nobody can tell: the time may be the engine's.
    """
    return _faster(ratio) if ratio.same_engine else ""


def _faster(ratio: LatencyRatio) -> Tone:
    if ratio.ci_low > 1:
        return "gain"
    return "worse" if ratio.ci_high < 1 else ""


def _against(name: str, ratios: Sequence[LatencyRatio]) -> Said | None:
    if not ratios:
        return None
    ratios = sorted(ratios, key=lambda ratio: ratio.batch)
    first, own, baseline = ratios[0], "The MoE", _BASELINES[name]
    if not first.same_engine:
        own += f" on {first.engine} {first.precision}"
        baseline += f" on {first.a_engine} {first.a_precision}"
    parts = [
        _part(tone, "it" if index else baseline, list(group))
        for index, (tone, group) in enumerate(groupby(ratios, _faster))
    ]
    tones = {tone_of(ratio) for ratio in ratios}
    return Said(f"{own} {listed(parts)}", tones.pop() if len(tones) == 1 else "")


def _part(tone: Tone, name: str, ratios: Sequence[LatencyRatio]) -> str:
    if not tone:
        at = listed([f"batch {r.batch} ({r.ci_low:.2f}x to {r.ci_high:.2f}x)" for r in ratios])
        return f"is neither faster nor slower than {name} at {at}"
    times = [r.ratio if tone == "gain" else 1 / r.ratio for r in ratios]
    first, *more = zip(times, ratios, strict=True)
    what = "is {:.3g}x as fast as {}" if tone == "gain" else "takes {:.3g}x the time of {}"
    begin = f"{what.format(first[0], name)} at batch {first[1].batch}"
    return listed([begin, *(f"{value:.3g}x at batch {r.batch}" for value, r in more)])


def _alone(report: LatencyReport) -> Said:
    first = report.rows[0]
    subject = (first.model, first.engine, first.precision)
    own = [row for row in report.rows if (row.model, row.engine, row.precision) == subject]
    times = [f"{row.p50_ms:.3g} ms at batch {row.batch}" for row in own]
    return Said(f"An answer takes {listed(times)}, in the median")
