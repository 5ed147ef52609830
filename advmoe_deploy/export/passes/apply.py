"""Order of the passes over a partition, each checked on what a few images give every segment."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.passes.drop_experts import drop_experts
from advmoe_deploy.export.passes.fold_batchnorm import fold_batchnorm
from advmoe_deploy.export.passes.report import (
    PassReport,
    answers_of,
    apply_checked,
    refused,
    why_undone,
)
from advmoe_deploy.export.passes.scale_experts import scale_experts
from advmoe_deploy.export.passes.strided_shortcut import strided_shortcut
from advmoe_deploy.models.routing.routing import RoutingRule
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.progress import Progress, Silent, task

PASSES = (fold_batchnorm, strided_shortcut)
# Images that segments, passes and experts are checked on one by one; each sees all of them.
SAMPLES = 16

_PASSES = "graph passes"

PlanPass = Callable[[Partition], tuple[Partition, PassReport]]
# By graph, or by "plan" for what goes across all of them.
Reports = dict[str, tuple[PassReport, ...]]


def apply_passes(
    parts: Partition,
    images: Images,
    rules: Sequence[RoutingRule] = (),
    progress: Progress | None = None,
) -> tuple[Partition, Reports]:
    """Run all passes in place, each checked on what ``images`` give every segment.

    A pass that moves an answer away from the exact one is undone and reported as declined. The
    partition that comes back knows what its segments answer now. Experts that ``rules`` drop are
    not in it.

    Raises:
        CheckFailedError: with experts dropped, a segment answers differently.
    """
    progress, few = progress or Silent(), images[:SAMPLES]
    with task(progress, _PASSES, 2 + len(parts.graphs)):
        parts, across = _passes_across(parts, few, rules)
        progress.advance(_PASSES)
        samples = parts.samples(few)
        progress.advance(_PASSES)
        reports = {}
        for name, graph in parts.graphs.items():
            reports[name] = apply_checked(PASSES, graph, samples[name])
            progress.advance(_PASSES)
    return parts, {"plan": across, **reports}


def _passes_across(
    parts: Partition, few: Images, rules: Sequence[RoutingRule]
) -> tuple[Partition, tuple[PassReport, ...]]:
    """Run the passes that change several graphs at once."""
    done = []
    if any(rule.dropped for rule in rules):
        parts, report = _across(partial(drop_experts, rules=rules), parts, few)
        if not report.applied:  # asked for, so that there is nothing to go on without
            raise CheckFailedError(
                f"{report.name} failed: {report.declined[0]}; export without --prune-unused"
            )
        done.append(report)
    parts, report = _across(scale_experts, parts, few)
    return parts, (*done, report)


def _across(run: PlanPass, parts: Partition, images: Images) -> tuple[Partition, PassReport]:
    """Return what ``run`` makes of ``parts``, or ``parts`` as they were and why it was declined.

    It is tried first on copies whose samples hold what the graphs answer before it, so that it
    carries over to the new samples what it does to an answer.
    """
    answered = {
        name: replace(sample, outputs=answers_of(parts.graphs[name], sample))
        for name, sample in parts.samples(images).items()
    }
    copies = {name: copy.deepcopy(graph) for name, graph in parts.graphs.items()}
    tried, report = run(replace(parts, graphs=copies, samples=lambda _: answered))
    if not report.applied:
        return parts, report
    samples = tried.samples(images)
    found = {name: why_undone(tried.graphs[name], s.outputs, s) for name, s in samples.items()}
    reasons = {name: reason for name, reason in found.items() if reason}
    return (parts, refused(report, reasons)) if reasons else run(parts)
