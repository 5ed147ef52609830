"""AutoAttack and its parts (Croce & Hein, 2020) through pyautoattack, their authors' code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from advmoe_deploy.attacks.batches import batch_size, in_pieces, labelled_batches
from advmoe_deploy.attacks.objectives import require_target
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.scene import Scene
from advmoe_deploy.attacks.soft import SoftForm
from advmoe_deploy.errors import UsageError, missing_extra
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.models.routing.routing import Routes, Surrogate
from advmoe_deploy.specs import AttackSpec, ThreatModel

Predict = Callable[[Tensor], Tensor]

_MOST_TARGETS = 9
_LEAST_TARGETS_OF_DLR = 3
_AUTHORS_BATCH = 250  # images that AutoAttack attacks together


def square(
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    queries: int,
    restarts: int,
    seed: int,
) -> Tensor:
    """Return adversarial images [N, C, H, W] by Square, which only asks for logits.

    ``predict`` gets float images [n, C, H, W] for any n and returns fresh logits [n, K].
    """
    attack = _import().square.SquareAttack(
        predict,
        norm="Linf",
        n_queries=queries,
        eps=epsilon,
        n_restarts=restarts,
        seed=seed,
        # As in AutoAttack: the sizes of the squares are those of 10,000 queries.
        resc_schedule=False,
        device=images.device,
    )
    with _own_random_state(images.device):
        found: Tensor = attack.perturb(images, labels)
    return found


def library_attack(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, attack: AttackSpec
) -> Tensor:
    """Return adversarial images by APGD, on cross-entropy or targeted on DLR, or by targeted FAB.

    All set their own step size. The targeted two aim at the nine likeliest other classes, or at as
    many as there are; ``attack.classes`` says fewer. An image that no step turned comes back at its
    clean self.

    Raises:
        UsageError: the target is not a form of the whole model, or the model has no router.
    """
    search = _searches(attack, threat.epsilon, model.spec.num_classes, images.device)
    with eval_mode(model), frozen_parameters(model), _own_random_state(images.device):
        face = _face(model, images, labels, attack)
        found = [search(face).perturb(x, y) for x, y in labelled_batches(images, labels) if len(x)]
    return torch.cat(found).detach() if found else images.clone()


def standard_autoattack(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, attack: AttackSpec
) -> Tensor:
    """Return adversarial images by AutoAttack's standard four: APGD-CE, APGD-T, FAB-T, Square.

    The model is attacked as it runs or, by the target, in its straight-through or soft form. The
    targeted two aim as :func:`library_attack` does.

    Raises:
        UsageError: the target is not a form of the whole model, or the model has no router.
    """
    with eval_mode(model), frozen_parameters(model), _own_random_state(images.device):
        package = _import()
        suite = package.AutoAttack(
            _face(model, images, labels, attack),
            eps=threat.epsilon,
            norm="Linf",
            seed=attack.seed,
            device=images.device,
        )
        suite.fab.n_target_classes = _targets(attack, model.spec.num_classes)
        _aim(suite.apgd_targeted, suite.fab.n_target_classes)
        size = min(_AUTHORS_BATCH, batch_size(images))
        found, _ = suite.run_standard_evaluation(images, labels, batch_size=size)
    result: Tensor = found.detach()
    return result


def _searches(
    attack: AttackSpec, epsilon: float, classes: int, device: torch.device
) -> Callable[[Predict], Any]:
    """Return what makes the library's search on a model's face."""
    package, targets = _import(), _targets(attack, classes)
    settings = {
        "norm": "Linf",
        "n_iter": attack.steps,
        "n_restarts": attack.restarts,
        "eps": epsilon,
        "seed": attack.seed,
        "device": device,
    }
    if attack.name == "apgd":
        return partial(package.autopgd_base.APGDAttack, **settings, loss="ce")
    if attack.name == "fab-t":
        fab = package.fab_pt.FABAttack_PT
        return partial(fab, **settings, targeted=True, n_target_classes=targets)

    def apgd_targeted(face: Predict) -> Any:
        return _aim(package.autopgd_base.APGDAttack_targeted(face, **settings), targets)

    return apgd_targeted


def _face(model: Classifier, images: Tensor, labels: Tensor, attack: AttackSpec) -> Predict:
    """Return the form of ``model`` that is attacked."""
    if attack.target not in ("model", "straight-through", "soft"):
        raise UsageError(
            f"{attack.name} cannot aim at target {attack.target}; use pgd, or target model"
        )
    require_target(model, attack.target)
    if attack.target == "soft":
        first = slice(batch_size(images))
        scene = Scene.of(model, images[first], labels[first])
        return in_pieces(model, SoftForm(model, scene.routings, attack.temperature))
    surrogate: Surrogate | None = "probability" if attack.target == "straight-through" else None
    return in_pieces(model, lambda x: model(x, Routes(surrogate=surrogate)))


def _targets(attack: AttackSpec, classes: int) -> int:
    return min(attack.classes or _MOST_TARGETS, classes - 1)


def _aim(search: Any, targets: int) -> Any:
    """Aim a targeted APGD at so many classes; DLR is made of four logits, and may lack them."""
    search.n_target_classes = targets
    if targets < _LEAST_TARGETS_OF_DLR:
        search.dlr_loss_targeted = partial(_lead_of_target, search)
    return search


def _lead_of_target(attack: Any, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Return how far each target leads its label: the targeted DLR without its denominator.

    That one is made of the fourth logit, and only scales a loss of which APGD takes the sign.
    """
    rows_N = torch.arange(len(labels_N), device=labels_N.device)
    return logits_NK[rows_N, attack.y_target] - logits_NK[rows_N, labels_N]


def _import() -> Any:
    try:
        import pyautoattack
        import pyautoattack.autopgd_base
        import pyautoattack.fab_pt
        import pyautoattack.square
    except ImportError:
        raise missing_extra("pyautoattack", "train") from None
    return pyautoattack


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Give back torch's global random state, which the library seeds."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
