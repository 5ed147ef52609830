"""Attacks that know the weights and the routing.

A hard router gives no gradient, so one attack is never enough; each AttackSpec.target is another
way around it:

    model               the model as it runs: the route of each iterate is taken as given
    straight-through    the gradient also enters the router, as in training
    pathway             for each expert: push the route there and attack that pathway

Shapes: N images, E experts, C channels, H height, W width, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.pgd import (
    Ascent,
    Objective,
    eval_mode,
    pgd_search,
    random_start,
    step_size_of,
)
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.dispatch import frozen_parameters
from advmoe_deploy.models.routing import Routes
from advmoe_deploy.specs import AttackSpec, ThreatModel

BATCH = 256  # fixed: the random starts, hence the examples, depend on it
ROUTE_MARGIN = 0.1  # how clearly, in scores, the pathway attack wants its route


def attack_model(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    first_only: bool = False,
) -> Tensor:
    """Return adversarial images [N, C, H, W] by PGD, on the device of ``images``.

    ``images`` are float in [0, 1]. An image the attack could not turn is returned at its highest
    loss, one it turned at its highest loss among those that fool; ``first_only`` settles for the
    first that fools. The same seed gives the same examples. The model is attacked in eval mode;
    its own mode comes back.

    Raises:
        UsageError: the attack is no PGD, or its target needs a router and the model has none.
    """
    objectives = _objectives(model, attack)
    if not len(images):
        return images.clone()
    generator = torch.Generator().manual_seed(attack.seed)
    found = []
    with eval_mode(model), frozen_parameters(model):
        for x, y in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
            found.append(
                _attack_batch(model, objectives, x, y, threat, attack, generator, first_only)
            )
    return torch.cat(found)


def predict(model: Classifier, images: Tensor) -> Tensor:
    """Return the class [N] the model gives each float image, in eval mode and in batches."""
    if not len(images):
        return torch.empty(0, dtype=torch.int64, device=images.device)
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(batch).argmax(dim=1) for batch in torch.split(images, BATCH)])


def _attack_batch(
    model: Classifier,
    objectives: list[Objective],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    generator: torch.Generator,
    first_only: bool,
) -> Tensor:
    """Return the worst of all restarts of all objectives; a clean mistake stays as it is."""
    result = images.clone()
    left_N = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    if first_only:
        left_N &= ~_judge(model, images, labels).fooled_N
    for objective, start in _tries(objectives, images, threat, attack, generator):
        rows_N = left_N.nonzero()[:, 0]
        if not len(rows_N):
            continue  # still draws the starts, so that later batches do not depend on it
        candidates = pgd_search(
            objective,
            images[rows_N],
            labels[rows_N],
            start[rows_N],
            threat=threat,
            steps=attack.steps,
            step_size=step_size_of(attack, threat),
            first_only=first_only,
        )
        judged = _judge(model, candidates, labels[rows_N])
        worse_N = judged.loss_N > _judge(model, result[rows_N], labels[rows_N]).loss_N
        taken_N = judged.fooled_N | worse_N
        result[rows_N[taken_N]] = candidates[taken_N]
        left_N[rows_N[judged.fooled_N]] = False
    if not first_only:
        _restore_clean_mistakes(model, result, images, labels)
    return result


def _restore_clean_mistakes(model: Classifier, found: Tensor, clean: Tensor, y: Tensor) -> None:
    """Never let an attack correct a mistake: an image wrong from the start stays wrong."""
    rows = ~_judge(model, found, y).fooled_N & _judge(model, clean, y).fooled_N
    found[rows] = clean[rows]


def _tries(
    objectives: list[Objective],
    images: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    generator: torch.Generator,
) -> Iterator[tuple[Objective, Tensor]]:
    for _ in range(attack.restarts):
        start = random_start(images, threat.epsilon, generator)
        for objective in objectives:
            yield objective, start


class _Judged(NamedTuple):
    loss_N: Tensor
    fooled_N: Tensor


@torch.no_grad()
def _judge(model: Classifier, images: Tensor, labels: Tensor) -> _Judged:
    """Return what the model itself, its own route included, makes of ``images``."""
    logits_NK: Tensor = model(images)
    loss_N = F.cross_entropy(logits_NK, labels, reduction="none")
    return _Judged(_finite(loss_N), logits_NK.argmax(dim=1) != labels)


def _finite(loss_N: Tensor) -> Tensor:
    # The sign of NaN is 0: an attack on such a model would be mere noise and call it robust.
    if not bool(torch.isfinite(loss_N).all()):
        raise CheckFailedError(
            "the model's loss is not finite under attack, so no attack can tell anything; "
            "use an earlier checkpoint or train again"
        )
    return loss_N


def _objectives(model: Classifier, attack: AttackSpec) -> list[Objective]:
    if attack.name != "pgd":
        raise UsageError(f"{attack.name} is no white-box attack; use attack_predictions")
    if isinstance(model, AdvMoE):
        if attack.target == "pathway":
            return [_PathwayObjective(model, e) for e in range(model.spec.num_experts)]
        return [_ModelObjective(model, through_router=attack.target == "straight-through")]
    if attack.target != "model":
        raise UsageError(f"target {attack.target} needs a router; a dense model has target model")
    return [_ModelObjective(model, through_router=False)]


class _ModelObjective:
    """Cross-entropy of the model, with or without a gradient into the router."""

    def __init__(self, model: Classifier, *, through_router: bool) -> None:
        self.model = model
        self.through_router = through_router

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            logits_NK = self._logits(x)
            loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        return Ascent(gradient, _finite(loss_N.detach()), logits_NK.argmax(dim=1) != labels_N)

    def _logits(self, x: Tensor) -> Tensor:
        routes = Routes(surrogate="probability" if self.through_router else None)
        logits: Tensor = self.model(x, routes)
        return logits


class _PathwayObjective:
    """Cross-entropy of one pathway, plus a pull of the route towards it where it is elsewhere.

    The two gradients are brought to the same size, for scores and logits know no common scale.
    """

    def __init__(self, model: AdvMoE, expert: int) -> None:
        self.model = model
        self.expert = expert

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            logits_NK = self.model(x, self.model.forced(self.expert))
            loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
            lead_N = self._lead(x)
            (attack,) = torch.autograd.grad(loss_N.sum(), x)
            (pull,) = torch.autograd.grad(lead_N.clamp(max=ROUTE_MARGIN).sum(), x)
        answers_N = logits_NK.argmax(dim=1)
        elsewhere_N = lead_N <= 0  # where the model itself gives another pathway's answer
        if bool(elsewhere_N.any()):
            with torch.no_grad():
                answers_N[elsewhere_N] = self.model.forward(x[elsewhere_N]).argmax(dim=1)
        gradient = _unit(attack) + _unit(pull)
        return Ascent(gradient, _finite(loss_N.detach()), answers_N != labels_N)

    def _lead(self, x: Tensor) -> Tensor:
        scores_NE = self.model.score(x)
        others_NE = scores_NE.clone()
        others_NE[:, self.expert] = -torch.inf
        return scores_NE[:, self.expert] - others_NE.amax(dim=1)


def _unit(gradient_NCHW: Tensor) -> Tensor:
    size = gradient_NCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient_NCHW / size.clamp(min=1e-20)
