"""Attack suites of ``verify``: none alone is enough where a hard route hides gradients."""

from typing import Any, Literal

from advmoe_deploy.errors import unknown_name
from advmoe_deploy.specs import AttackSpec, AttackTarget, ModelSpec

Suite = Literal["quick", "standard", "full"]

# A loss that does not saturate, and steps that settle: what the strongest searches share.
_SETTLING: dict[str, Any] = {"loss": "margin", "momentum": 0.75, "decay": True}
_CLASSES = 9
_TEMPERATURES = (0.1, 0.5, 2.0)


def attack_suite(suite: Suite, spec: ModelSpec) -> tuple[AttackSpec, ...]:
    """Return the attacks of ``suite`` that make sense for ``spec``, in order.

    Each goes on with the images that withstood those before it. PGD on the model as it runs comes
    first and Square, which needs no gradient, behind all that do. Between them a model that routes
    is attacked by its pathways and in its soft form; ``standard`` adds the targeted searches and
    APGD and, behind Square, RayS, which does without logits too; ``full`` more steps and restarts
    and, last, AutoAttack's standard four.

    Raises:
        UsageError: no suite has that name.
    """
    makers = {"quick": _quick, "standard": _standard, "full": _full}
    if suite not in makers:
        raise unknown_name("suite of attacks", suite, makers)
    return tuple(makers[suite](routing_targets(spec)))


def routing_targets(spec: ModelSpec) -> tuple[AttackTarget, ...]:
    """Return the targets, beside the model itself, that an honest number for ``spec`` needs."""
    if spec.family in ("dense", "pathway"):
        return ()
    if spec.weighting == "one":
        return ("straight-through", "pathway", "soft")
    # Weights that depend on scores lead the gradient into the gates already.
    return ("pathway", "soft")


def restarts(spec: ModelSpec, seed: int) -> tuple[AttackSpec, ...]:
    """Return the strongest searches of a suite, once more from other starts."""
    routed = [_settling(50, target=t, seed=seed) for t in routing_targets(spec)]
    return (_settling(50, seed=seed), *routed)


def _quick(targets: tuple[AttackTarget, ...]) -> list[AttackSpec]:
    routed = [_settling(20, target=t) for t in targets if t != "straight-through"]
    return [
        AttackSpec(name="pgd", steps=20),
        *(routed or [_settling(20)]),
        AttackSpec(name="square", steps=200),
    ]


def _standard(targets: tuple[AttackTarget, ...]) -> list[AttackSpec]:
    return [
        *_white_box(targets, steps=50),
        *(_settling(20, target=t, classes=_CLASSES) for t in _faces(targets, "pathway")),
        AttackSpec(name="apgd", steps=50, target=_exact(targets)),
        AttackSpec(name="apgd-t", steps=20, target=_exact(targets)),
        AttackSpec(name="square", steps=1000),
        AttackSpec(name="rays", steps=500),
    ]


def _full(targets: tuple[AttackTarget, ...]) -> list[AttackSpec]:
    return [
        *_white_box(targets, steps=100),
        *(_settling(50, target=t, classes=_CLASSES) for t in _faces(targets, "pathway", "soft")),
        *(_settling(100, target=t, restarts=3, seed=1) for t in _faces(targets, "pathway")),
        AttackSpec(name="square", steps=5000),
        AttackSpec(name="rays", steps=2000),
        *(
            AttackSpec(name="autoattack", target=form)
            for form in _faces(targets, "straight-through", "soft")
        ),
    ]


def _white_box(targets: tuple[AttackTarget, ...], steps: int) -> list[AttackSpec]:
    """Return untargeted searches along every way into the model, the plain one first."""
    attacks = [AttackSpec(name="pgd", steps=steps), _settling(steps)]
    for target in targets:
        if target == "soft":
            attacks += [_settling(steps, target="soft", temperature=t) for t in _TEMPERATURES]
        else:
            attacks.append(_settling(steps, target=target))
    return [*attacks, _settling(steps, target="weakest")] if targets else attacks


def _faces(targets: tuple[AttackTarget, ...], *routed: AttackTarget) -> list[AttackTarget]:
    return ["model", *(target for target in routed if target in targets)]


def _exact(targets: tuple[AttackTarget, ...]) -> AttackTarget:
    return "straight-through" if "straight-through" in targets else "model"


def _settling(steps: int, **how: Any) -> AttackSpec:
    return AttackSpec(name="pgd", steps=steps, **(_SETTLING | how))
