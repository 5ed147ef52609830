"""Runs the passes over a partition, each checked on what a few images give every segment."""

from collections.abc import Callable, Sequence
from functools import partial

from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.passes.drop_experts import drop_experts
from advmoe_deploy.export.passes.fold_batchnorm import fold_batchnorm
from advmoe_deploy.export.passes.report import PassReport, apply_checked, require_same
from advmoe_deploy.export.passes.scale_experts import scale_experts
from advmoe_deploy.export.passes.strided_shortcut import strided_shortcut
from advmoe_deploy.models.routing.routing import RoutingRule
from advmoe_deploy.parity.answers import Images

PASSES = (fold_batchnorm, strided_shortcut)
# Images that segments, passes and experts are checked on one by one; each sees all of them.
SAMPLES = 16

# By graph, or by "plan" for what goes across all of them.
Reports = dict[str, tuple[PassReport, ...]]


def apply_passes(
    parts: Partition, images: Images, rules: Sequence[RoutingRule] = ()
) -> tuple[Partition, Reports]:
    """Run all passes in place, each checked on what ``images`` give every segment.

    The partition that comes back knows what its segments answer now. Experts that ``rules`` drop
    are not in it.

    Raises:
        CheckFailedError: after a pass a segment answers differently.
    """
    across: list[Callable[[Partition], tuple[Partition, PassReport]]] = [scale_experts]
    if any(rule.dropped for rule in rules):
        across.insert(0, partial(drop_experts, rules=rules))
    done = []
    for run in across:
        parts, report = run(parts)
        samples = parts.samples(images[:SAMPLES])
        for name, graph in parts.graphs.items():
            require_same(graph, samples[name], samples[name].outputs, report.name)
        done.append(report)
    reports = {
        name: apply_checked(PASSES, graph, samples[name]) for name, graph in parts.graphs.items()
    }
    return parts, {"plan": tuple(done), **reports}
