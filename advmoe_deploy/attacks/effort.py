"""Effort of an attack, in passes of an image through the model, and who hears of them.

A pass gives an answer, with or without a gradient; whatever an attack does, it makes some.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from advmoe_deploy.attacks.objectives import PULLS
from advmoe_deploy.attacks.pathways import count_pathways, count_whole_pathways
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.reports.attacks import attack_title
from advmoe_deploy.specs import AttackSpec

_MOST_TARGETS = 9  # of what aims at classes and does not say at how many
# AutoAttack's standard four, as their authors set them.
_STANDARD = (
    AttackSpec(name="apgd", steps=100),
    AttackSpec(name="apgd-t", steps=100),
    AttackSpec(name="fab-t", steps=100),
    AttackSpec(name="square", steps=5000),
)


def passes_of(model: Classifier, attack: AttackSpec, images: int) -> int:
    """Return about how many passes ``attack`` on so many images makes: fewer where it soon wins."""
    return images * _per_image(model, attack)


@contextmanager
def attack_task(
    progress: Progress, model: Classifier, attack: AttackSpec, images: int
) -> Iterator[Callable[[int], None]]:
    """Tell ``progress`` of the passes through ``model`` during the block, which runs ``attack``.

    The function that is yielded tells of so many passes that somebody else than ``model`` made.
    """
    name = attack_title(attack)

    def passed(count: int) -> None:
        progress.advance(name, count)

    with task(progress, name, passes_of(model, attack, images)):
        hook = model.register_forward_hook(lambda _, given, __: passed(len(given[0])))
        try:
            yield passed
        finally:
            hook.remove()


def _per_image(model: Classifier, attack: AttackSpec) -> int:
    aims = max(1, min(_aims(attack), model.spec.num_classes - 1))
    if attack.name == "pgd":
        compared = count_whole_pathways(model) if attack.target == "weakest" else 0
        tries = attack.restarts * aims * _tries(model, attack)
        return 1 + compared + tries * _per_try(model, attack)
    if attack.name == "autoattack":
        return sum(_per_image(model, each) for each in _STANDARD)
    # FAB asks for a gradient and then for an answer.
    steps = 2 * attack.steps if attack.name == "fab-t" else attack.steps
    return 1 + attack.restarts * aims * (steps + 1)


def _aims(attack: AttackSpec) -> int:
    return attack.classes or (_MOST_TARGETS if attack.name.endswith("-t") else 1)


def _tries(model: Classifier, attack: AttackSpec) -> int:
    """Return how many searches one aim takes."""
    if attack.target == "pathway":
        return len(PULLS) * count_pathways(model)
    return len(PULLS) if attack.target == "weakest" else 1


def _per_try(model: Classifier, attack: AttackSpec) -> int:
    """Return the passes of one search: its steps, and who is fooled at its end."""
    exact = all(rule.top_k == 1 and rule.weighting == "one" for rule in model.rules)
    asks_twice = attack.target in ("pathway", "weakest") and not exact
    looks = 4 if attack.target in ("router", "auxiliary") else 2
    return (2 if asks_twice else 1) * (attack.steps + 1) + looks
