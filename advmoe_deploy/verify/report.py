"""Report of ``verify``: a frozen value that serialises to JSON."""

from typing import Literal

from advmoe_deploy.reports import Pair, ParityReport
from advmoe_deploy.reports.attacks import attack_title
from advmoe_deploy.reports.drops import DropReport, Verdict
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


class RobustReport(Frozen):
    """Whether robustness survived the export. Accuracies are shares in [0, 1].

    ``robust_accuracy`` counts an image as robust only if no attack changed its answer. With
    ``tf32``, fp32 was rounded to TF32 where that is faster. A finding of ``consistency`` fails the
    engine: it does not answer as the reference does. ``clean_drop`` and ``robust_drop``
    are what it lost, with what chance explains. ``transferred_accuracy`` is the engine's on what
    was found on the reference alone: shown beside, and never the figure.
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
    transferred_accuracy: float
    route_agreement: float
    consistency: ConsistencyReport
    warnings: tuple[str, ...]
    masking: tuple[Sign, ...]
    attacks: tuple[AttackOutcome, ...]
    seconds: float

    @property
    def parity(self) -> ParityReport:
        """How clean answers compare."""
        return self.consistency.parity

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Where the engine does not answer as the reference does."""
        return self.consistency.findings
