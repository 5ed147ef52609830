"""Report of ``verify``: a frozen value that serialises to JSON."""

from typing import Literal

from advmoe_deploy.reports import Pair, ParityReport
from advmoe_deploy.reports.attacks import attack_title
from advmoe_deploy.reports.drops import Accuracy, DropReport, Verdict
from advmoe_deploy.specs import AttackSpec, Frozen, Precision, ThreatModel
from advmoe_deploy.verify.findings import ConsistencyReport, Finding

FoundOn = Literal["reference", "engine"]


class AttackOutcome(Frozen):
    """One attack on the images that stood before it, on the reference or the engine.

    ``found_on`` is whose answers the attack looked for mistakes in, ``images`` how many it got.
    ``robust_accuracy`` is the share of all images that stand after it and all attacks before.
    ``route_flip_rate`` is the share of the attacked images whose route on the engine it changed,
    ``route_agreement`` the share that both sides send to the same experts; ``None`` where nothing
    routes, or nothing was left to attack.
    """

    attack: AttackSpec
    found_on: FoundOn
    images: int
    robust_accuracy: Pair
    route_flip_rate: float | None
    route_agreement: float | None
    seconds: float

    @property
    def title(self) -> str:
        """A few words: name, steps, target, and what else sets the attack apart."""
        return attack_title(self.attack)


class Sign(Frozen):
    """One test for masked gradients: what was seen, and whether it speaks of them."""

    name: str
    seen: str
    suspicious: bool


class ReferenceReport(Frozen):
    """Robustness of the reference beside chance: if it has none, nothing can be preserved.

    ``robust_accuracy`` of ``images`` has a 95 % interval. ``chance`` is what an answer that looks
    at no image gets right: one by the number of classes or, where those are shown to be unequal,
    the share of the commonest. At most that fails; an interval that reaches down to it decides
    nothing.
    """

    images: int
    robust_accuracy: float
    interval: tuple[float, float]
    chance: float
    verdict: Verdict

    def __str__(self) -> str:
        low, high = self.interval
        figures = (
            f"{100 * self.robust_accuracy:.1f} % of {self.images:,} images withstand the attacks "
            f"({100 * low:.1f} to {100 * high:.1f} %, 95 % interval), chance gets "
            f"{100 * self.chance:.1f} %"
        )
        if self.verdict == "passed":
            return f"the reference is robust: {figures}"
        if self.verdict == "failed":
            return f"the reference is not robust, so there is nothing to preserve: {figures}"
        return f"these images cannot tell whether the reference is robust at all: {figures}"


class RobustReport(Frozen):
    """Verdict on the robustness of an export. Accuracies are shares in [0, 1].

    ``robust_accuracy`` counts an image as robust only if no attack changed its answer. With
    ``tf32``, fp32 was rounded to TF32 where that is faster. A finding of ``consistency`` fails the
    engine: it does not answer as the reference does. ``clean_drop`` and ``robust_drop``
    are what it lost, with what chance explains; each has the verdict that counted. A ``reference``
    that is not shown to be robust itself counts in the verdict unless ``allow_fragile``; ``None``
    in reports written before there was such a check. ``transferred_accuracy`` is the engine's on
    what was found on the reference alone: shown beside, and never the figure. ``seconds`` has
    those of the attacks of an earlier run that this one went on from.
    """

    passed: bool
    verdict: Verdict
    engine: str
    precision: Precision = "fp32"
    tf32: bool = False
    data: str
    images: int
    threat: ThreatModel
    max_drop: float
    clean_accuracy: Pair
    robust_accuracy: Pair
    robust_interval: tuple[float, float]
    clean_drop: DropReport
    robust_drop: DropReport
    reference: ReferenceReport | None = None
    allow_fragile: bool = False
    transferred_accuracy: float
    route_agreement: float
    consistency: ConsistencyReport
    warnings: tuple[str, ...]
    masking: tuple[Sign, ...]
    attacks: tuple[AttackOutcome, ...]
    seconds: float

    @property
    def lost(self) -> Accuracy | None:
        """Accuracy that failed this report; ``None`` where none did."""
        if self.robust_drop.verdict == "failed":
            return "robust"
        return "clean" if self.clean_drop.verdict == "failed" else None

    @property
    def fragile(self) -> bool:
        """True if the reference is not shown to be robust itself."""
        return self.reference is not None and self.reference.verdict != "passed"

    @property
    def fragility(self) -> tuple[str, ...]:
        """Why the reference keeps this report from passing; empty where it does not."""
        return (str(self.reference),) if self.fragile and not self.allow_fragile else ()

    @property
    def decided_by(self) -> str:
        """Ground of the verdict on robust accuracy where its drop's interval is none; else empty.

        It is empty, too, where the verdict is on something else.
        """
        elsewhere = self.lost == "clean" or (self.fragility and not self.lost)
        if elsewhere or not self.consistency.same_function:
            return ""
        return (
            f"{self.robust_drop.counted()}: whether robustness was lost is decided by this, not by "
            "the interval, for engine and reference answer alike to the rounding of float32"
        )

    @property
    def parity(self) -> ParityReport:
        """Comparison of clean answers."""
        return self.consistency.parity

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of the engine not answering as the reference does."""
        return self.consistency.findings
