"""What a graph pass did, and the check that it kept its contract."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.partition.sample import Arrays, Sample
from advmoe_deploy.parity.tolerance import rounding_of, row_differences, tolerance_for
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine


@dataclass(frozen=True)
class PassReport:
    """How often a pass rewrote the graph, and for each place it declined, why."""

    name: str
    applied: int
    declined: tuple[str, ...] = ()


Pass = Callable[[ModelProto], PassReport]


def apply_checked(
    passes: tuple[Pass, ...], model: ModelProto, sample: Sample
) -> tuple[PassReport, ...]:
    """Run ``passes`` on ``model`` in place and return their reports.

    Raises:
        CheckFailedError: after a pass the model answers differently to the inputs of ``sample``.
    """
    reports = []
    before = _answers(model, sample.inputs)
    for run in passes:
        reports.append(run(model))
        require_same(model, sample, before, reports[-1].name)
    return tuple(reports)


def require_same(model: ModelProto, sample: Sample, before: Arrays, name: str) -> None:
    """Check that ``model`` answers ``before`` to the inputs of ``sample``, after pass ``name``.

    Raises:
        CheckFailedError: it does not.
    """
    after = _answers(model, sample.inputs)
    for output, expected in before.items():
        difference = float(row_differences(after[output], expected)[1].max())
        limit = tolerance_for(rounding_of(sample.outputs[output], sample.exact[output]))
        if not difference <= limit:
            raise CheckFailedError(
                f"pass {name} changed {output} of {model.graph.name} by {difference:.2g}, more "
                f"than {limit:.2g}; please report it"
            )


def _answers(model: ModelProto, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    with OrtEngine(model.SerializeToString()) as engine:
        return engine.run(inputs)


def declined(reports: Mapping[str, Sequence[PassReport]]) -> Counter[str]:
    """Return why passes declined, over all graphs, and how often each reason was given."""
    return Counter(
        f"{report.name} declined: {place.partition(': ')[2]}"
        for done in reports.values()
        for report in done
        for place in report.declined
    )
