"""What a graph pass did, and the check that it kept its contract."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.parity import LOGIT_TOLERANCE, row_differences
from advmoe_deploy.runtime.ort_engine import OrtEngine


@dataclass(frozen=True)
class PassReport:
    """How often a pass rewrote the graph, and for each place it declined, why."""

    name: str
    applied: int
    declined: tuple[str, ...] = ()


Pass = Callable[[ModelProto], PassReport]


def apply_checked(
    passes: tuple[Pass, ...], model: ModelProto, images: NDArray[np.float32]
) -> tuple[PassReport, ...]:
    """Run ``passes`` on ``model`` in place and return their reports.

    Raises:
        CheckFailedError: after a pass the model answers differently on ``images``.
    """
    reports = []
    before = _answers(model, images)
    for run in passes:
        report = run(model)
        after = _answers(model, images)
        for name, expected in before.items():
            difference = float(row_differences(after[name], expected)[1].max())
            if not difference <= LOGIT_TOLERANCE:
                raise CheckFailedError(
                    f"pass {report.name} changed {name} of {model.graph.name} by "
                    f"{difference:.2g}, more than {LOGIT_TOLERANCE:g}; please report it"
                )
        reports.append(report)
    return tuple(reports)


def _answers(model: ModelProto, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    (image,) = model.graph.input
    with OrtEngine(model.SerializeToString()) as engine:
        return engine.run({image.name: images})
