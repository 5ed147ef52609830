"""Entry of a robustness report: RobustBench's fields, and under ``advmoe`` all that we know.

Source of the fields: F. Croce et al., RobustBench, NeurIPS 2021 (arXiv 2010.09670), its model_info.
Accuracies are in percent there, and shares in [0, 1] under ``advmoe``.
"""

from collections.abc import Sequence
from typing import Literal

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.specs import Frozen
from advmoe_deploy.verify.examples.convergence import ConvergenceRow
from advmoe_deploy.verify.examples.rerouted import Rerouted
from advmoe_deploy.verify.report import AttackOutcome, RobustReport
from advmoe_deploy.verify.suites import Suite


class CertifiedRoutes(Frozen):
    """Images whose route provably cannot change within epsilon; ``None``, and why, if unknown.

    ``vacuous``: no radius reaches another image of 8 bits.
    """

    images: int
    epsilon: float
    certified: int | None = None
    median_radius: float | None = None
    vacuous: bool = False
    note: str


class Robustness(Frozen):
    """Robustness of one bundle; the first of ``engines`` is the one of the entry.

    ``model`` is the SHA-256 of the reference weights, ``examples`` the file of each engine.
    """

    format: Literal[1] = 1
    bundle: str
    model: str
    suite: Suite
    engines: tuple[RobustReport, ...]
    examples: tuple[str, ...]
    convergence: tuple[ConvergenceRow, ...]
    rerouted: tuple[Rerouted, ...]
    certified: CertifiedRoutes
    versions: dict[str, str]
    seconds: float


class Entry(Frozen):
    """One model as RobustBench lists it. What is not known is ``None``.

    ``autoattack_acc`` is there if AutoAttack was among the attacks; ``robust_acc`` counts an image
    only if no attack at all changed its answer.
    """

    model_name: str
    dataset: str
    norm: str
    eps: float
    clean_acc: float
    autoattack_acc: float | None
    robust_acc: float
    additional_data: bool | None
    number_forward_passes: int
    advmoe: Robustness


def entry_of(bundle: Bundle, robustness: Robustness) -> Entry:
    """Return the entry of ``bundle``, with the figures of its first engine."""
    report = robustness.engines[0]
    training = bundle.manifest.training
    return Entry(
        model_name=robustness.bundle,
        dataset=report.data,
        norm="Linf",
        eps=report.threat.epsilon,
        clean_acc=_percent(report.clean_accuracy.engine),
        autoattack_acc=_autoattack(report.attacks),
        robust_acc=_percent(report.robust_accuracy.engine),
        # Our own training takes one data set; of an imported checkpoint nobody knows.
        additional_data=False if training.get("fingerprint") else None,
        number_forward_passes=1,
        advmoe=robustness,
    )


def _autoattack(outcomes: Sequence[AttackOutcome]) -> float | None:
    """Return what stands after AutoAttack and those before it, in percent."""
    after = [o.robust_accuracy.engine for o in outcomes if o.attack.name == "autoattack"]
    return _percent(after[0]) if after else None


def _percent(share: float) -> float:
    return round(100 * share, 4)
