"""Runs the passes over a partition, each checked on what a few images give every segment."""

from advmoe_deploy.export.partition import Partition
from advmoe_deploy.export.passes.fold_batchnorm import fold_batchnorm
from advmoe_deploy.export.passes.report import PassReport, apply_checked, require_same
from advmoe_deploy.export.passes.scale_experts import scale_experts
from advmoe_deploy.export.passes.strided_shortcut import strided_shortcut
from advmoe_deploy.export.reference import Images

PASSES = (fold_batchnorm, strided_shortcut)
# Images that segments, passes and experts are checked on one by one; each sees all of them.
SAMPLES = 16

# By graph, or by "plan" for what goes across all of them.
Reports = dict[str, tuple[PassReport, ...]]


def apply_passes(parts: Partition, images: Images) -> tuple[Partition, Reports]:
    """Run all passes in place, each checked on what ``images`` give every segment.

    The partition that comes back knows what its segments answer now.

    Raises:
        CheckFailedError: after a pass a segment answers differently.
    """
    parts, across = scale_experts(parts)
    samples = parts.samples(images[:SAMPLES])
    reports = {}
    for name, graph in parts.graphs.items():
        require_same(graph, samples[name], samples[name].outputs, across.name)
        reports[name] = apply_checked(PASSES, graph, samples[name])
    return parts, {"plan": (across,), **reports}
