"""Attack suites of ``verify``: none alone is enough where a hard route hides gradients."""

from typing import Literal

from advmoe_deploy.errors import unknown_name
from advmoe_deploy.specs import AttackSpec, AttackTarget, ModelSpec

Suite = Literal["quick", "standard", "full"]

_PGD_STEPS: dict[Suite, int] = {"quick": 20, "standard": 50, "full": 50}
_SQUARE_QUERIES: dict[Suite, int] = {"quick": 200, "standard": 1000, "full": 5000}


def attack_suite(suite: Suite, spec: ModelSpec) -> tuple[AttackSpec, ...]:
    """Return the attacks of ``suite`` that make sense for ``spec``.

    White-box PGD on the model as it runs, with a straight-through gradient into the router, and on
    every pathway while the route is pushed to it; then Square, which needs no gradient. The full
    suite adds AutoAttack's standard four.

    Raises:
        UsageError: no suite has that name.
    """
    if suite not in _PGD_STEPS:
        raise unknown_name("suite of attacks", suite, _PGD_STEPS)
    pgd = AttackSpec(name="pgd", steps=_PGD_STEPS[suite])
    attacks = [pgd]
    attacks += [_aimed_at(pgd, target) for target in routing_targets(spec)]
    if suite == "full":
        attacks.append(AttackSpec(name="autoattack"))
    return (*attacks, AttackSpec(name="square", steps=_SQUARE_QUERIES[suite]))


def routing_targets(spec: ModelSpec) -> tuple[AttackTarget, ...]:
    """Return the targets, beside the model itself, that an honest number for ``spec`` needs."""
    if spec.family in ("dense", "pathway"):
        return ()
    if spec.weighting == "one":
        return ("straight-through", "pathway")
    return ("pathway",)  # weights that depend on scores lead the gradient into the gates already


def _aimed_at(attack: AttackSpec, target: AttackTarget) -> AttackSpec:
    return attack.model_copy(update={"target": target})
