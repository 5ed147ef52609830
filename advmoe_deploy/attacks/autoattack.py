"""AutoAttack, APGD and Square (Croce & Hein, 2020) through pyautoattack, their authors' code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from advmoe_deploy.attacks.objectives import require_target
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.errors import UsageError, missing_extra
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.models.routing.routing import Routes, Surrogate
from advmoe_deploy.specs import AttackSpec, ThreatModel

Predict = Callable[[Tensor], Tensor]

_BATCH = 256
_MOST_TARGETS = 9
_LEAST_TARGETS_OF_DLR = 3


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


def apgd(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, attack: AttackSpec
) -> Tensor:
    """Return adversarial images by APGD on the cross-entropy, which sets its own step size.

    Robust Experts (arXiv 2509.05086) reports it at 20 steps. An image no step turned comes back at
    its clean self.

    Raises:
        UsageError: the target is not model or straight-through, or the model has no router.
    """
    if attack.target not in ("model", "straight-through"):
        raise UsageError(f"apgd cannot aim at target {attack.target}; use pgd, or target model")
    require_target(model, attack.target)
    surrogate: Surrogate | None = "probability" if attack.target == "straight-through" else None
    package = _import()
    with eval_mode(model), frozen_parameters(model), _own_random_state(images.device):
        search = package.autopgd_base.APGDAttack(
            lambda x: model(x, Routes(surrogate=surrogate)),
            n_iter=attack.steps,
            norm="Linf",
            n_restarts=attack.restarts,
            eps=threat.epsilon,
            seed=attack.seed,
            loss="ce",
            device=images.device,
        )
        found = [
            search.perturb(x, y)
            for x, y in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
            if len(x)
        ]
    return torch.cat(found).detach() if found else images.clone()


def standard_autoattack(
    model: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int = 0
) -> Tensor:
    """Return adversarial images by AutoAttack's standard four: APGD-CE, APGD-T, FAB-T, Square.

    A routed model is attacked in its straight-through form, so that its router has a gradient.
    The targeted two aim at the nine likeliest other classes, or at as many as there are.
    """
    targets = min(_MOST_TARGETS, model.spec.num_classes - 1)
    package = _import()
    with eval_mode(model), frozen_parameters(model), _own_random_state(images.device):
        attack = package.AutoAttack(
            lambda x: model(x, Routes(surrogate="probability")),
            eps=threat.epsilon,
            norm="Linf",
            seed=seed,
            device=images.device,
        )
        attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = targets
        if targets < _LEAST_TARGETS_OF_DLR:
            attack.apgd_targeted.dlr_loss_targeted = partial(_lead_of_target, attack.apgd_targeted)
        found, _ = attack.run_standard_evaluation(images, labels)
    result: Tensor = found.detach()
    return result


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
