"""Which segments run at the lower precision: all that the exam allows.

The routers go first: where routes do not agree, what makes the scores stays in fp32. What is still
too much is taken back step by step, the most sensitive first: the one that alone at the lower
precision does most harm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.exam import Findings
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep
from advmoe_deploy.specs import Precision

Precisions = dict[str, Precision]


@dataclass(frozen=True)
class Choice:
    """The precision of each segment and what it gave.

    ``raised`` says of segments that stayed in fp32 why; ``lowered`` is what the lower precision
    gave throughout, where a router stayed in fp32 for its routes.
    """

    precisions: Precisions
    findings: Findings
    raised: Mapping[str, str]
    lowered: Findings | None = None


# What is raised together: a segment of the trunk, or all experts of a layer.
_Unit = tuple[str, ...]


def choose_precisions(
    plan: Plan, lowered: Precisions, trial: Callable[[Precisions], Findings]
) -> Choice:
    """Return the choice for ``plan``; ``trial`` measures one.

    ``lowered`` has the precision of every segment where all are lowered that can be.

    Raises:
        CheckFailedError: with a single segment lowered it is not good enough.
    """
    search = _Search(plan, lowered, trial)
    whole = search.findings
    if not whole.routes_agree:
        search.raise_(*_scorers(plan))
    if search.findings.complaint:
        for unit in search.most_sensitive_first():
            search.raise_(unit)
            if not search.findings.complaint:
                break
    kept = None if whole.routes_agree else whole
    return Choice(search.precisions, search.findings, search.raised, kept)


class _Search:
    """Where the search stands: what is back in fp32, and what the exam found then."""

    def __init__(
        self, plan: Plan, lowered: Precisions, trial: Callable[[Precisions], Findings]
    ) -> None:
        self.plan, self.lowered, self.trial = plan, lowered, trial
        self.raised: dict[str, str] = {}
        self.findings = trial(lowered)

    @property
    def precisions(self) -> Precisions:
        return {n: "fp32" if n in self.raised else p for n, p in self.lowered.items()}

    def raise_(self, *units: _Unit) -> None:
        """Take ``units`` back to fp32, for what the exam complains of, and examine again."""
        complaint = self.findings.complaint
        for unit in units:
            self.raised |= {n: complaint for n in unit if self.lowered[n] != "fp32"}
        if set(self.precisions.values()) == {"fp32"}:
            (precision,) = set(self.lowered.values()) - {"fp32"}
            raise CheckFailedError(
                f"nothing of this model can run in {precision}: {complaint}; no bundle was "
                "written; use a higher precision"
            )
        self.findings = self.trial(self.precisions)

    def most_sensitive_first(self) -> list[_Unit]:
        """Return what is still lowered, by the harm that each does alone."""
        units = [unit for unit in _units(self.plan) if self._is_lowered(unit)]
        return sorted(units, key=self._harm, reverse=True) if len(units) > 1 else units

    def _is_lowered(self, unit: _Unit) -> bool:
        return any(self.precisions[name] != "fp32" for name in unit)

    def _harm(self, unit: _Unit) -> tuple[float, float, float]:
        return self.trial({n: p if n in unit else "fp32" for n, p in self.lowered.items()}).harm


def _units(plan: Plan) -> list[_Unit]:
    experts = [step.segments for step in plan.steps if isinstance(step, ExpertsStep)]
    of_layers = {name for unit in experts for name in unit}
    return [*((s.name,) for s in plan.segments if s.name not in of_layers), *experts]


def _scorers(plan: Plan) -> list[_Unit]:
    """Return the segments that make scores."""
    scores = {step.scores for step in plan.steps if isinstance(step, RouteStep)}
    return [(s.name,) for s in plan.segments if scores & {t.name for t in s.outputs}]
