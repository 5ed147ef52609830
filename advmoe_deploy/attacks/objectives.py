"""Attack objectives: the quantity that each AttackSpec.target ascends.

A hard router gives no gradient, so one attack is never enough; each target is another way around
it, or a question of its own:

    model               the model as it runs, with its exact gradient
    straight-through    the gradient also enters hard routers, as in training
    auxiliary           the same, and V-MoE's auxiliary loss beside the error
    soft                each row meets all experts, weighted by a softmax of their scores
    pathway             for each pathway: err on that fixed network, and be routed along it
    weakest             the same for one pathway an image, the one that errs most on it
    experts             RA-E: the routes of the clean images stay, also for judging
    router              RA-R: only away from the clean routes; the experts answer by the new ones

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K classes.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.batches import pieces
from advmoe_deploy.attacks.clean_routes import CleanRoutes, take_images
from advmoe_deploy.attacks.losses import (
    attack_loss,
    is_wrong,
    lead_over_label,
    likeliest_targets,
    require_finite_loss,
)
from advmoe_deploy.attacks.pathways import (
    Pathway,
    forced,
    second_choices,
    weakest_pathway,
    whole_pathways,
)
from advmoe_deploy.attacks.pgd import Ascent, Objective, unit
from advmoe_deploy.attacks.scene import Scene
from advmoe_deploy.attacks.soft import SoftForm
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.balance import importance_and_load_loss
from advmoe_deploy.models.routing.routing import (
    Routes,
    Routing,
    Surrogate,
)
from advmoe_deploy.specs import AttackLoss, AttackSpec, AttackTarget

# Logits [n, K] of float images [n, C, H, W].
Answer = Callable[[Tensor], Tensor]

# Of V-MoE's auxiliary loss (arXiv 2106.05974) in what it is trained on.
AUXILIARY_WEIGHT = 0.01

# How much more the pull on the routes weighs than the error, in turn.
PULLS = (1.0, 3.0)


def require_target(model: Classifier, target: AttackTarget) -> None:
    """Raise :class:`UsageError` if ``target`` is about routes and ``model`` has none."""
    if target != "model" and not model.rules:
        raise UsageError(f"target {target} needs a router; a dense model has target model")


def objectives_for(scene: Scene, attack: AttackSpec, clean: CleanRoutes | None) -> list[Objective]:
    """Return what to ascend in turn on the batch of ``scene``; ``clean`` are its fixed routes."""
    if attack.target == "auxiliary":
        return [_AuxiliaryObjective(scene.model, attack.loss)]
    return [InPieces(scene.model, objective) for objective in _apart(scene, attack, clean)]


def _apart(scene: Scene, attack: AttackSpec, clean: CleanRoutes | None) -> list[Objective]:
    """Return what looks at every image on its own."""
    if attack.target == "router":
        return [_RouteObjective(scene)]
    aims: list[Tensor | None] = [None]
    if attack.classes:
        aims = [*likeliest_targets(scene.logits_NK, scene.labels_N, attack.classes)]
    if attack.target == "soft":
        return [_SoftObjective(scene, attack, aim) for aim in aims]
    if attack.target in ("pathway", "weakest"):
        tries = itertools.product(aims, PULLS, _pathways(scene, attack.target))
        return [_PathwayObjective(scene, pathway, aim, pull) for aim, pull, pathway in tries]
    surrogate: Surrogate | None = "probability" if attack.target == "straight-through" else None
    return [_ModelObjective(scene.model, surrogate, clean, attack.loss, aim) for aim in aims]


def _pathways(scene: Scene, target: AttackTarget) -> list[Pathway]:
    model, images = scene.model, len(scene.labels_N)
    whole = whole_pathways(model, scene.routings, images)
    if target == "weakest":
        return [weakest_pathway(model, whole, scene.images_NCHW, scene.labels_N)]
    return whole + second_choices(model, scene.routings, images)


class InPieces:
    """An objective that looks at every image on its own, asked piece by piece."""

    def __init__(self, model: Classifier, objective: Objective) -> None:
        self.model = model
        self.objective = objective

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        """Return the ascents of all pieces."""
        parts = pieces(self.model, images_NCHW, labels_N, rows_N)
        return Ascent(*map(torch.cat, zip(*(self.objective(*part) for part in parts), strict=True)))


class AnsweredBy:
    """An objective whose answers are somebody else's: only they say who is fooled."""

    def __init__(self, answer: Answer, objective: Objective) -> None:
        self.answer = answer
        self.objective = objective

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        """Return the objective's ascent, fooled where the other's answer is wrong."""
        ascent = self.objective(images_NCHW, labels_N, rows_N)
        logits_NK = self.answer(images_NCHW.detach())
        return ascent._replace(fooled_N=is_wrong(logits_NK, labels_N))


class _ModelObjective:
    """The loss of the model, with or without a gradient into hard routers."""

    def __init__(
        self,
        model: Classifier,
        surrogate: Surrogate | None,
        clean: CleanRoutes | None,
        loss: AttackLoss,
        targets_N: Tensor | None,
    ) -> None:
        self.model = model
        self.surrogate = surrogate
        self.clean = clean
        self.loss: AttackLoss = loss
        self.targets_N = targets_N

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        routes = self.clean.of(rows_N) if self.clean else Routes(surrogate=self.surrogate)
        with torch.enable_grad():
            logits_NK = self.model(x, routes)
            loss_N = attack_loss(self.loss, logits_NK, labels_N, _rows(self.targets_N, rows_N))
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        return _ascent(gradient, loss_N, logits_NK.argmax(dim=1) != labels_N)


class _AuxiliaryObjective:
    """The loss that V-MoE is trained on: the error, and with its weight the auxiliary loss.

    The auxiliary loss is one number for all images that are attacked at once, the mean over the
    routed layers, and counts once for each of them.
    """

    def __init__(self, model: Classifier, loss: AttackLoss) -> None:
        self.model = model
        self.loss: AttackLoss = loss

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        routes = Routes(surrogate="probability")  # else a hard gate would run without a gradient
        with torch.enable_grad():
            logits_NK = self.model(x, routes)
            error_N = attack_loss(self.loss, logits_NK, labels_N, None)
            parts = [importance_and_load_loss(taken) for taken in routes.taken.values()]
            loss_N = error_N + AUXILIARY_WEIGHT * torch.stack(parts).mean()
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        return _ascent(gradient, loss_N, is_wrong(logits_NK, labels_N))


class _SoftObjective:
    """The loss of the model's soft form; who is fooled is for the model itself to say."""

    def __init__(self, scene: Scene, attack: AttackSpec, targets_N: Tensor | None) -> None:
        self.model = scene.model
        self.soft = SoftForm(scene.model, scene.routings, attack.temperature)
        self.loss: AttackLoss = attack.loss
        self.targets_N = targets_N

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            logits_NK = self.soft(x)
            loss_N = attack_loss(self.loss, logits_NK, labels_N, _rows(self.targets_N, rows_N))
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        with torch.no_grad():
            fooled_N = is_wrong(self.model(x), labels_N)
        return _ascent(gradient, loss_N, fooled_N)


class _RouteObjective:
    """Cross-entropy of the gates' scores against the clean routes, mean over layers and rows."""

    def __init__(self, scene: Scene) -> None:
        self.model = scene.model
        self.images = len(scene.labels_N)
        self.clean = scene.routings

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        routes = Routes(surrogate="probability")  # else a hard gate would run without a gradient
        with torch.enable_grad():
            logits_NK = self.model(x, routes)
            losses = [
                _route_loss(taken, take_images(self.clean[layer], rows_N, self.images), len(x))
                for layer, taken in routes.taken.items()
            ]
            loss_N = torch.stack(losses).mean(dim=0)
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        return _ascent(gradient, loss_N, logits_NK.argmax(dim=1) != labels_N)


def _route_loss(taken: Routing, clean: Routing, images: int) -> Tensor:
    share_NK = clean.weights_NK / clean.weights_NK.sum(dim=1, keepdim=True)
    log_p_NK = F.log_softmax(taken.scores_NE, dim=1).gather(1, clean.expert_ids_NK)
    return _per_image(-(share_NK * log_p_NK).sum(dim=1), images)


class _PathwayObjective:
    """Two goals: a wrong class leads in the fixed network of a pathway, and the routes go there.

    The gates are asked on that network's own features, so where each of them leads towards its
    expert, the model itself takes this pathway. The two gradients are brought to the same size, for
    scores and logits know no common scale, and a goal that is reached no longer pulls: an error
    that grows on would fight the route.
    """

    def __init__(
        self, scene: Scene, pathway: Pathway, targets_N: Tensor | None, pull: float
    ) -> None:
        self.model, self.pathway, self.targets_N, self.pull = scene.model, pathway, targets_N, pull
        self.error_goal, self.route_goal = scene.error_goal, scene.route_goal
        # Anything but one expert of weight 1 gives an answer that no fixed network gives.
        rules = scene.model.rules
        self.exact = all(rule.top_k == 1 and rule.weighting == "one" for rule in rules)

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        leads: list[Tensor] = []
        with torch.enable_grad():
            logits_NK = self.model(x, forced(self.pathway, rows_N, leads.append))
            error_N = lead_over_label(logits_NK, labels_N, _rows(self.targets_N, rows_N))
            pulls = [_per_image(lead.clamp(max=self.route_goal), len(x)) for lead in leads]
            pull_N = torch.stack(pulls).mean(dim=0)
            (attack,) = torch.autograd.grad(error_N.sum(), x, retain_graph=True)
            (pull,) = torch.autograd.grad(pull_N.sum(), x)
        erring_N = (error_N > self.error_goal)[:, None, None, None]
        direction = unit(attack).masked_fill(erring_N, 0.0) + self.pull * unit(pull)
        return _ascent(direction, error_N, self._fooled(x, logits_NK, labels_N, leads))

    @torch.no_grad()
    def _fooled(
        self, x: Tensor, logits_NK: Tensor, labels_N: Tensor, leads: list[Tensor]
    ) -> Tensor:
        """Return whom the model itself gets wrong, as far as the pathway can tell."""
        if not self.exact:
            return is_wrong(self.model(x), labels_N)
        least_N = torch.stack([lead.view(len(x), -1).amin(dim=1) for lead in leads]).amin(dim=0)
        return is_wrong(logits_NK, labels_N) & (least_N > 0)


def _rows(targets_N: Tensor | None, rows_N: Tensor) -> Tensor | None:
    return None if targets_N is None else targets_N[rows_N]


def _per_image(values: Tensor, images: int) -> Tensor:
    return values.view(images, -1).mean(dim=1)


def _ascent(gradient_NCHW: Tensor, loss_N: Tensor, fooled_N: Tensor) -> Ascent:
    return Ascent(gradient_NCHW, require_finite_loss(loss_N.detach()), fooled_N)
