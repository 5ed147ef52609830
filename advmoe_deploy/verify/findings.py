"""Findings of the comparison of an engine with its torch reference before any attack."""

from typing import Literal

from advmoe_deploy.reports import Pair, ParityReport
from advmoe_deploy.specs import Frozen

Kind = Literal[
    "batch-size",
    "neighbours",
    "not-finite",
    "logit-scale",
    "preprocessing",
    "class-logits",
    "experts",
    "router",
    "weights",
]


class Finding(Frozen):
    """One thing that is wrong: its kind, and a line with the numbers and the way out.

    ``batch-size``: answers depend on how many images are asked about at once; ``neighbours``: on
    which other images. ``not-finite``: NaN or infinity. ``logit-scale``: logits are a multiple of
    the reference's. ``preprocessing``: the engine sees other pixels than it is given.
    ``class-logits``: classes are in another order, or one is off. ``experts``: some experts answer
    otherwise, or as another. ``router``: images go to other experts. ``weights``: another function.
    """

    kind: Kind
    message: str


class ConsistencyReport(Frozen):
    """Consistency of an engine on clean images with its torch reference and with itself.

    ``exact`` says that it was held to what float32 rounds, not to the limits of a lower precision.
    ``size_images`` images were asked in batches of several sizes. ``probability_difference`` is the
    mean total variation distance of the softmax of logits, ``logit_difference`` the median distance
    of an image's logits relative to their norm; ``None`` where no image has finite logits.
    ``file_images`` images went through PNG files.
    """

    images: int
    exact: bool
    size_images: int
    file_images: int
    accuracy: Pair
    prediction_agreement: float
    probability_difference: float | None
    logit_difference: float | None
    parity: ParityReport
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    @property
    def same_function(self) -> bool:
        """True if the engine was shown to answer as the reference does, to float32's rounding."""
        return self.exact and self.passed and self.parity.passed

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the findings, in their order."""
        return tuple(finding.kind for finding in self.findings)
