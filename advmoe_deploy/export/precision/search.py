"""Search for the segments that run at the lower precision: all that the accuracy gate allows.

The routers go first: where routes do not agree, what makes the scores is raised, step by step. What
is still too much is taken back the most sensitive first: the segment that alone at the lower
precision loses most. int8 is raised to bf16 where the engine has it, and then to fp32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.precision.gate import Findings
from advmoe_deploy.plan import Plan
from advmoe_deploy.specs import Precision

Precisions = dict[str, Precision]


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of each segment and what it gave.

    ``raised`` says of segments that were raised why; ``lowered`` is what the lower precision gave
    throughout, where a router was raised for its routes.
    """

    precisions: Precisions
    findings: Findings
    raised: Mapping[str, str]
    lowered: Findings | None = None


# What is raised together: a segment of the trunk, or all experts of a layer.
_Unit = tuple[str, ...]


def choose_precisions(
    plan: Plan,
    lowered: Precisions,
    fallback_order: Sequence[Precision],
    trial: Callable[[Precisions], Findings],
    quick_check: Callable[[Precisions], Findings],
) -> PrecisionChoice:
    """Return the choice for ``plan``; ``trial`` measures one.

    Args:
        plan: the plan.
        lowered: the precision of every segment where all are lowered that can be.
        fallback_order: the precisions to go through, lowest first, fp32 last.
        trial: what a choice gives.
        quick_check: the same without what takes long; enough for one segment's regression.

    Raises:
        CheckFailedError: with a single segment at the lowest precision it is not good enough.
    """
    search = _Search(plan, lowered, fallback_order, trial, quick_check)
    whole = search.findings
    for _ in fallback_order[1:]:
        if not search.findings.routes_agree:
            search.raise_precision(*((name,) for name in plan.scorers))
    if search.findings.complaint:
        for unit in search.most_sensitive_first():
            while search.findings.complaint and search.can_raise(unit):
                search.raise_precision(unit)
    kept = None if whole.routes_agree else whole
    return PrecisionChoice(search.precisions, search.findings, search.raised, kept)


class _Search:
    """State of the search: the precisions, and what the accuracy gate found with them."""

    def __init__(
        self,
        plan: Plan,
        lowered: Precisions,
        fallback_order: Sequence[Precision],
        trial: Callable[[Precisions], Findings],
        quick_check: Callable[[Precisions], Findings],
    ) -> None:
        self.plan, self.lowered = plan, lowered
        self.trial, self.quick_check = trial, quick_check
        self.lowest = fallback_order[0]
        self.next = dict(pairwise(fallback_order))
        self.precisions = dict(lowered)
        self.raised: dict[str, str] = {}
        if self.lowest not in lowered.values():
            raise self._refusal("nothing in it is worth it")
        self.findings = trial(lowered)

    def raise_precision(self, *units: _Unit) -> None:
        """Raise ``units`` by a step, for what the accuracy gate complains of, and examine again."""
        complaint = self.findings.complaint
        names = [name for unit in units if self.can_raise(unit) for name in unit]
        if not names:
            return
        for name in names:
            self.precisions[name] = self.next[self.precisions[name]]
            self.raised.setdefault(name, complaint)
        if self.lowest not in self.precisions.values():
            raise self._refusal(complaint)
        self.findings = self.trial(self.precisions)

    def can_raise(self, unit: _Unit) -> bool:
        """Return whether ``unit`` is below fp32."""
        return all(self.precisions[name] in self.next for name in unit)

    def most_sensitive_first(self) -> list[_Unit]:
        """Return what is still lowered, by what each loses alone."""
        units = [unit for unit in self.plan.units if self.can_raise(unit)]
        return sorted(units, key=self._regression, reverse=True) if len(units) > 1 else units

    def _regression(self, unit: _Unit) -> tuple[float, float, float]:
        return self.quick_check(
            {n: p if n in unit else "fp32" for n, p in self.lowered.items()}
        ).regression

    def _refusal(self, why: str) -> CheckFailedError:
        return CheckFailedError(
            f"nothing of this model can run in {self.lowest}: {why}; no bundle was written; use "
            "a higher precision"
        )
