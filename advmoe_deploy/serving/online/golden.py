"""Golden images of a bundle: a server is ready once its engine has answered them as they should be.

Shapes: N images, C classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.parity.answers import Answers
from advmoe_deploy.parity.compare import compare_answers
from advmoe_deploy.parity.golden import read_golden
from advmoe_deploy.runtime.runner import Prediction, Runner, is_exact

# So many more predictions of a lower precision may differ than did at the export: images are few.
_FEW = 0.1


@dataclass(frozen=True)
class Golden:
    """Images [N, C, H, W] that travel with a bundle, and what its torch model answers to them."""

    bundle: Bundle
    images: NDArray[np.float32]
    answers: Answers

    def require(self, prediction: Prediction, runner: Runner) -> None:
        """Raise :class:`CheckFailedError` if ``prediction`` of ``runner`` is another answer.

        In fp32, routes and logits are those of the export's own comparison, to its tolerance. A
        lower precision has to predict as many classes alike as it did there, less a tenth.
        """
        exact = is_exact(runner)
        if reason := self._difference(prediction) if exact else self._change(prediction, runner):
            raise CheckFailedError(
                f"{runner.name} in {runner.precision} answers the golden images of "
                f"{self.bundle.path} otherwise than the model that was exported: {reason}; "
                "take another --engine, or export it again for this machine"
            )

    def _difference(self, prediction: Prediction) -> str:
        expected = self.bundle.manifest.parity
        report = compare_answers(
            self.answers, prediction, rounding=expected.rounding, margin=expected.margin
        )
        logits, limit = report.max_relative_logit_diff, report.logit_tolerance
        wrong = report.non_finite or report.route_flips or not report.compared
        if not wrong and max(logits, report.max_abs_weight_diff) <= limit:
            return ""
        return (
            f"of {report.images}, {report.compared} are comparable, {report.non_finite} not "
            f"finite, {report.route_flips} clear routes flipped, logits differ by {logits:.3g} "
            f"and weights by {report.max_abs_weight_diff:.3g} (limit {limit:.3g})"
        )

    def _change(self, prediction: Prediction, runner: Runner) -> str:
        own = [e for e in self.bundle.manifest.engines if e.precision == runner.precision]
        measured = [e.check.prediction_agreement for e in own if e.check is not None]
        needed = min(measured, default=1.0) - _FEW
        same_N = prediction.logits.argmax(axis=1) == self.answers.logits.argmax(axis=1)
        agreeing = float((same_N & np.isfinite(prediction.logits).all(axis=1)).mean())
        if agreeing >= needed:
            return ""
        return f"{agreeing:.1%} of {len(same_N)} predictions agree (limit {needed:.1%})"


def golden_of(bundle: Bundle) -> Golden:
    """Return the golden images of ``bundle``."""
    layers = [route.layer for route in bundle.manifest.plan.routes]
    return Golden(bundle, *read_golden(bundle, layers))
