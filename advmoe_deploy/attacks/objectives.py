"""Attack objectives: the quantity that each AttackSpec.target ascends.

A hard router gives no gradient, so one attack is never enough; each target is another way around
it, or a question of its own:

    model               the model as it runs, with its exact gradient
    straight-through    the gradient also enters hard routers, as in training
    pathway             for each expert: push every route there and attack that fixed network
    experts             RA-E: the routes of the clean images stay, also for judging
    router              RA-R: only away from the clean routes; the experts answer by the new ones

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K classes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.clean_routes import CleanRoutes, take_images
from advmoe_deploy.attacks.pgd import Ascent, Objective
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import (
    Routes,
    Routing,
    RoutingRule,
    Surrogate,
    forced_route,
)
from advmoe_deploy.specs import AttackTarget

# Logits [n, K] of float images [n, C, H, W].
Answer = Callable[[Tensor], Tensor]

PATHWAY_LEAD = 0.1  # how clearly, in scores, the pathway attack wants its route


def require_target(model: Classifier, target: AttackTarget) -> None:
    """Raise :class:`UsageError` if ``target`` is about routes and ``model`` has none."""
    if target != "model" and not model.rules:
        raise UsageError(f"target {target} needs a router; a dense model has target model")


def objectives_for(
    model: Classifier, target: AttackTarget, clean_NCHW: Tensor, clean: CleanRoutes | None
) -> list[Objective]:
    """Return what to ascend in turn on the batch ``clean_NCHW``; ``clean`` are its fixed routes."""
    if target == "pathway":
        return [_PathwayObjective(model, expert) for expert in model.experts_in_use]
    if target == "router":
        return [_RouteObjective(model, clean_NCHW)]
    return [_ModelObjective(model, "probability" if target == "straight-through" else None, clean)]


def require_finite_loss(loss_N: Tensor) -> Tensor:
    """Return ``loss_N``; NaN or infinity raises :class:`CheckFailedError`."""
    # The sign of NaN is 0: an attack on such a model would be mere noise and call it robust.
    if not bool(torch.isfinite(loss_N).all()):
        raise CheckFailedError(
            "the model's loss is not finite under attack, so no attack can tell anything; "
            "use an earlier checkpoint or train again"
        )
    return loss_N


def is_wrong(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Return which rows [N] do not answer their label; logits that are not finite answer none."""
    return (logits_NK.argmax(dim=1) != labels_N) | ~torch.isfinite(logits_NK).all(dim=1)


class AnsweredBy:
    """An objective whose answers are somebody else's: only they say who is fooled."""

    def __init__(self, answer: Answer, objective: Objective) -> None:
        self.answer = answer
        self.objective = objective

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        """Return the objective's ascent, fooled where the other's answer is wrong."""
        ascent = self.objective(images_NCHW, labels_N, rows_N)
        logits_NK = self.answer(images_NCHW.detach())
        return replace(ascent, fooled_N=is_wrong(logits_NK, labels_N))


class _ModelObjective:
    """Cross-entropy of the model, with or without a gradient into hard routers."""

    def __init__(
        self, model: Classifier, surrogate: Surrogate | None, clean: CleanRoutes | None
    ) -> None:
        self.model = model
        self.surrogate = surrogate
        self.clean = clean

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        routes = self.clean.of(rows_N) if self.clean else Routes(surrogate=self.surrogate)
        with torch.enable_grad():
            logits_NK = self.model(x, routes)
            loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
            (gradient,) = torch.autograd.grad(loss_N.sum(), x)
        return _ascent(gradient, loss_N, logits_NK.argmax(dim=1) != labels_N)


class _RouteObjective:
    """Cross-entropy of the gates' scores against the clean routes, mean over layers and rows."""

    def __init__(self, model: Classifier, clean_NCHW: Tensor) -> None:
        self.model = model
        self.images = len(clean_NCHW)
        with torch.no_grad():
            self.clean = model.route(clean_NCHW)

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
    """Cross-entropy of one fixed network, plus a pull of the routes towards it.

    The gates are asked on that network's own features, so where each of them leads towards its
    expert, the model itself takes this pathway. The two gradients are brought to the same size, for
    scores and logits know no common scale.
    """

    def __init__(self, model: Classifier, expert: int) -> None:
        self.model = model
        self.expert = expert
        # Anything but one expert of weight 1 gives an answer that no fixed network gives.
        self.exact = all(rule.top_k == 1 and rule.weighting == "one" for rule in model.rules)

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, rows_N: Tensor, /) -> Ascent:
        x = images_NCHW.detach().requires_grad_(True)
        leads: list[Tensor] = []
        with torch.enable_grad():
            logits_NK = self.model(x, self._routes(leads))
            loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
            pulls = [_per_image(lead.clamp(max=PATHWAY_LEAD), len(x)) for lead in leads]
            pull_N = torch.stack(pulls).mean(dim=0)
            (attack,) = torch.autograd.grad(loss_N.sum(), x, retain_graph=True)
            (pull,) = torch.autograd.grad(pull_N.sum(), x)
        answers_N = self._answers(x, logits_NK, leads)
        return _ascent(_unit(attack) + _unit(pull), loss_N, answers_N != labels_N)

    def _routes(self, leads: list[Tensor]) -> Routes:
        def force(rule: RoutingRule, scores_NE: Tensor, _: Surrogate | None) -> Routing:
            expert = rule.or_last(self.expert)
            leads.append(_lead(scores_NE, expert))
            ids_N = torch.full_like(scores_NE[:, 0], expert, dtype=torch.int64)
            return forced_route(ids_N, rule.num_experts, like=scores_NE)

        return Routes(surrogate="probability", adjust=force)

    @torch.no_grad()
    def _answers(self, x: Tensor, logits_NK: Tensor, leads: list[Tensor]) -> Tensor:
        """Return the model's own answers; it is asked only where the pathway's may differ."""
        answers_N = logits_NK.argmax(dim=1)
        least_N = torch.stack([lead.view(len(x), -1).amin(dim=1) for lead in leads]).amin(dim=0)
        elsewhere_N = least_N <= 0 if self.exact else torch.ones_like(least_N, dtype=torch.bool)
        if bool(elsewhere_N.any()):
            answers_N[elsewhere_N] = self.model(x[elsewhere_N]).argmax(dim=1)
        return answers_N


def _lead(scores_NE: Tensor, expert: int) -> Tensor:
    others_NE = scores_NE.clone()
    others_NE[:, expert] = -torch.inf
    return scores_NE[:, expert] - others_NE.amax(dim=1)


def _per_image(values: Tensor, images: int) -> Tensor:
    return values.view(images, -1).mean(dim=1)


def _ascent(gradient_NCHW: Tensor, loss_N: Tensor, fooled_N: Tensor) -> Ascent:
    return Ascent(gradient_NCHW, require_finite_loss(loss_N.detach()), fooled_N)


def _unit(gradient_NCHW: Tensor) -> Tensor:
    size = gradient_NCHW.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient_NCHW / size.clamp(min=1e-20)
