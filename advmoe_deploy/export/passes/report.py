"""Report of a graph pass, and the check of its contract.

The contract of every pass is that no output moves away from its exact value, by more than rounding.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from advmoe_deploy.errors import BundleError
from advmoe_deploy.export.partition.sample import Arrays, Sample
from advmoe_deploy.parity.tolerance import error_of, pass_limit
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine


@dataclass(frozen=True)
class PassReport:
    """Count of a pass's rewrites, and for each place it declined, the reason."""

    name: str
    applied: int
    declined: tuple[str, ...] = ()


Pass = Callable[[ModelProto], PassReport]


def apply_checked(
    passes: tuple[Pass, ...], model: ModelProto, sample: Sample
) -> tuple[PassReport, ...]:
    """Run ``passes`` on ``model`` in place and return their reports.

    A pass after which ``model`` is too far from the exact answers of ``sample`` is undone, and its
    report says so.
    """
    reports = []
    for run in passes:
        changed = copy.deepcopy(model)
        report = run(changed)
        if changed != model:
            if reason := why_undone(changed, answers_of(model, sample), sample):
                report = refused(report, {model.graph.name: reason})
            else:
                model.CopyFrom(changed)
        reports.append(report)
    return tuple(reports)


def answers_of(model: ModelProto, sample: Sample) -> Arrays:
    """Return what ``model`` answers to the inputs of ``sample``."""
    with OrtEngine(model.SerializeToString()) as engine:
        return engine.run(sample.inputs)


def why_undone(changed: ModelProto, before: Arrays, sample: Sample) -> str:
    """Return what is wrong with ``changed``, which answered ``before``; nothing if all is well.

    Both are compared with what is exact, not with each other: another order of summation moves
    either a little, and a network that sums large terms to small scores magnifies that.
    """
    try:
        after = answers_of(changed, sample)
    except BundleError as error:
        return str(error)
    for output, values in before.items():
        if reason := too_far(output, values, after[output], sample.exact[output]):
            return reason
    return ""


def too_far(output: str, before: NDArray[Any], after: NDArray[Any], exact: NDArray[Any]) -> str:
    """Return how far ``output`` moved away from ``exact``; nothing if only by rounding."""
    error, limit = error_of(after, exact), pass_limit(before, exact)
    if error <= limit:
        return ""
    return (
        f"{output} would be {error:.2g} from its value in float64, more than {limit:.2g}; it was "
        f"{error_of(before, exact):.2g}"
    )


def refused(report: PassReport, reasons: Mapping[str, str]) -> PassReport:
    """Return the report of a pass that was undone for ``reasons``, by place."""
    places = (f"{place}: {reason}" for place, reason in reasons.items())
    return PassReport(report.name, 0, (*report.declined, *places))


def declined(reports: Mapping[str, Sequence[PassReport]]) -> Counter[str]:
    """Return why passes declined, over all graphs, and how often each reason was given."""
    return Counter(
        f"{report.name} declined: {place.partition(': ')[2]}"
        for done in reports.values()
        for report in done
        for place in report.declined
    )
