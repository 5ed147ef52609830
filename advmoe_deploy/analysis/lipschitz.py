"""Lipschitz bounds of experts and routers, and jumps of the logits where a route changes.

Everything is about *margins*, differences of two outputs, for they decide answers and routes; with
the l-inf norm on images, so that a constant times epsilon is the most a margin can move.

Shapes: N images, T routed rows per image, E experts, K classes.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor

from advmoe_deploy.analysis.redundancy import FixedExpert
from advmoe_deploy.analysis.shares import Share, answers, fold_rows, share_of
from advmoe_deploy.analysis.slopes import (
    Sloped,
    UnboundedError,
    in_float64,
    pair_slopes,
    sloped_image,
)
from advmoe_deploy.attacks.batches import batch_size
from advmoe_deploy.attacks.pgd import eval_mode, random_start
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.models.routing.routing import (
    Routes,
    Routing,
    RoutingRule,
    Surrogate,
    forced_route,
)
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.specs import Frozen, ThreatModel

Tag = Literal["formal", "diagnostic", "not applicable"]

_TASK, _JUMPS = "lipschitz", "jumps at boundaries"
_HALVINGS = 20
_SAMPLES = 2
_LOOSEST = 100.0  # times what was sampled; a bound of a deep network is millions of times that
_ASCENTS, _ASCENT_STEPS = 32, 20  # from as many images to steeper places

Margin = Callable[[Tensor], Tensor]  # images [N, C, H, W] to one margin each, [N]


class Lipschitz(Frozen):
    """Constants of one part's margins, per l-inf unit of image change.

    ``sampled`` is the largest gradient (l1 norm) that was met: a lower bound, *diagnostic*.
    ``bound`` is *formal*, an upper bound over all images (see slopes.py), ``None`` with the reason
    where there is none; that of a router behind other routers holds while those all choose experts
    of one number. ``part`` is ``expert 0``, ``the network``, or ``router`` with its layer.
    """

    part: str
    sampled: float
    bound: float | None
    reason: str | None

    @property
    def useful(self) -> bool:
        """True if the bound is of use: at most a hundredfold of what was met."""
        return self.bound is not None and self.bound <= _LOOSEST * self.sampled


class BoundaryJumps(Frozen):
    """The model on both sides of route boundaries, found by bisection between two images.

    ``jump_*`` is the largest change of a logit; ``distance`` the largest l-inf distance between the
    two sides, in pixels; ``answer_changes`` the share of boundaries at which the class changes.
    """

    boundaries: int
    distance: float
    jump_median: float
    jump_max: float
    answer_changes: Share


def lipschitz_constants(
    model: Classifier,
    images: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Lipschitz, ...]:
    """Return the constants of every fixed expert and every router; of a dense model, its own.

    Gradients are sampled at ``images``, at two random points of each one's ball, and on the
    way from the steepest of these to steeper ones, in steps of the ball's radius.
    """
    generator = torch.Generator().manual_seed(seed)
    points = [images, *(random_start(images, threat.epsilon, generator) for _ in range(_SAMPLES))]
    x = torch.cat(points)
    if not model.rules:
        bound, reason = margin_bound(model, None)
        sampled = _steepest(model, x, threat.epsilon)
        return (Lipschitz(part="the network", sampled=sampled, bound=bound, reason=reason),)
    experts, rows = model.experts_in_use, []
    progress = progress or Silent()
    with task(progress, _TASK, 2 * len(experts) + len(model.rules)):
        for expert in experts:
            bound, reason = margin_bound(model, model.forced(expert))
            sampled = _steepest(FixedExpert(model, expert), x, threat.epsilon)
            part = f"expert {expert}"
            rows.append(Lipschitz(part=part, sampled=sampled, bound=bound, reason=reason))
            progress.advance(_TASK)
        return (*rows, *_routers(model, x, threat.epsilon, progress))


def margin_bound(model: Classifier, routes: Routes | None) -> tuple[float | None, str | None]:
    """Return the formal bound of the worst margin of the network under ``routes``, or why not."""
    try:
        outputs = in_float64(model)(sloped_image(model.spec.image_shape), routes)
        return float(pair_slopes(outputs).max()), None
    except UnboundedError as error:
        return None, f"{error} has no global bound"


class ForcedScores:
    """Sends all rows of all layers where it is told and keeps the scores of the overruled gates.

    ``expert_of`` maps layers to experts. Its :attr:`scores` have their gradients or their bounds.
    """

    def __init__(self, expert_of: dict[str, int]) -> None:
        self.expert_of = expert_of
        self.scores: dict[str, Tensor] = {}

    def routes(self) -> Routes:
        """Return routes for one forward pass."""
        return Routes(surrogate="probability", adjust=self)

    def __call__(self, rule: RoutingRule, scores_NE: Tensor, _: Surrogate | None) -> Routing:
        """Keep the scores, return the route."""
        self.scores[rule.layer] = scores_NE
        expert = self.expert_of[rule.layer]
        ids_N = torch.full((len(scores_NE),), expert, dtype=torch.int64, device=scores_NE.device)
        return forced_route(ids_N, rule.num_experts, like=scores_NE)


def boundary_jumps(
    model: Classifier,
    images: Tensor,
    *,
    pairs: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> BoundaryJumps | None:
    """Return how far the logits jump at up to ``pairs`` boundaries, ``None`` if there are none.

    Between two images with different routes lies a point where a route changes; whatever changes
    there within a distance of a millionth is a jump.
    """
    order_N = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    order_N = order_N.to(images.device)
    routes_NR = _route_ids(model, images)
    different_N = (routes_NR[order_N] != routes_NR[order_N.roll(1)]).any(dim=1)
    ends = [images[order_N][different_N][:pairs], images[order_N.roll(1)][different_N][:pairs]]
    if not len(ends[0]):
        return None
    near, far = _bisected(model, ends[0], ends[1], progress or Silent())
    before, after = answers(model, near)[0], answers(model, far)[0]
    jump_N = (before - after).abs().amax(dim=1)
    return BoundaryJumps(
        boundaries=len(near),
        distance=float((near - far).abs().max()),
        jump_median=float(jump_N.median()),
        jump_max=float(jump_N.max()),
        answer_changes=share_of(before.argmax(dim=1) != after.argmax(dim=1)),
    )


def _bisected(
    model: Classifier, start: Tensor, end: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Return two nearby points per pair: one routed as ``start`` is, one routed otherwise."""
    low_N = torch.zeros(len(start), dtype=start.dtype, device=start.device)
    high_N = torch.ones_like(low_N)
    home_NR = _route_ids(model, start)
    with task(progress, _JUMPS, _HALVINGS):
        for _ in range(_HALVINGS):
            middle_N = (low_N + high_N) / 2
            at_home_N = (_route_ids(model, _between(start, end, middle_N)) == home_NR).all(dim=1)
            low_N = torch.where(at_home_N, middle_N, low_N)
            high_N = torch.where(at_home_N, high_N, middle_N)
            progress.advance(_JUMPS)
    return _between(start, end, low_N), _between(start, end, high_N)


def _between(start: Tensor, end: Tensor, share_N: Tensor) -> Tensor:
    return torch.lerp(start, end, share_N[:, None, None, None])


def _route_ids(model: Classifier, images: Tensor) -> Tensor:
    """Return every choice of every layer, sets in order of expert, [N, all rows * experts]."""
    _, taken = answers(model, images)
    sets = [r.expert_ids_NK.sort(dim=1).values for r in taken.values()]
    return torch.cat([fold_rows(ids, len(images)).flatten(1) for ids in sets], dim=1)


def _routers(model: Classifier, x: Tensor, step: float, progress: Progress) -> list[Lipschitz]:
    bounds = []
    for expert in model.experts_in_use:
        bounds.append(_router_bounds(model, expert))
        progress.advance(_TASK)
    rows = []
    for rule in model.rules:
        worst = [b.get(rule.layer) for b in bounds]
        known = [value for value in worst if value is not None]
        complete = len(known) == len(worst)
        rows.append(
            Lipschitz(
                part=f"router {rule.layer}" if rule.layer != "router" else "router",
                sampled=_steepest_scores(model, rule.layer, x, step),
                bound=max(known) if complete else None,
                reason=None if complete else "what the gate looks at has no global bound",
            )
        )
        progress.advance(_TASK)
    return rows


def _router_bounds(model: Classifier, expert: int) -> dict[str, float]:
    """Return the bound of each gate's worst margin behind layers that all use ``expert``."""
    forced = ForcedScores({r.layer: r.or_last(expert) for r in model.rules})
    with suppress(UnboundedError):  # gates met before are bounded all the same
        in_float64(model)(sloped_image(model.spec.image_shape), forced.routes())
    scores = {layer: s for layer, s in forced.scores.items() if isinstance(s, Sloped)}
    return {layer: float(pair_slopes(s).max()) for layer, s in scores.items() if len(s) == 1}


def _steepest(model: Classifier, images: Tensor, step: float) -> float:
    """Return the largest l1 norm of the gradient of the margin of the best class over the next."""

    def margin_at(start: Tensor) -> Margin:
        best_N2 = model(start).topk(2, dim=1).indices

        def margin(x: Tensor) -> Tensor:
            logits: Tensor = model(x)
            pair_N2 = logits.gather(1, best_N2)
            return pair_N2[:, 0] - pair_N2[:, 1]

        return margin

    return _largest_gradient(model, margin_at, images, step)


def _steepest_scores(model: Classifier, layer: str, images: Tensor, step: float) -> float:
    """Return the same of the last score chosen over the next; of tokens, where that is least.

    Where every expert is chosen, the next is none, and the margin that of the last two.
    """

    def margin(x: Tensor) -> Tensor:
        routes = Routes(surrogate="probability")
        model(x, routes)
        routing = routes.taken[layer]
        k = min(routing.expert_ids_NK.shape[1], routing.num_experts - 1)
        best_RK = routing.scores_NE.topk(k + 1, dim=1).values
        return fold_rows(best_RK[:, k - 1] - best_RK[:, k], len(x)).amin(dim=1)

    return _largest_gradient(model, lambda _: margin, images, step)


def _largest_gradient(
    model: Classifier, margin_at: Callable[[Tensor], Margin], images: Tensor, step: float
) -> float:
    """Return the largest gradient (l1 norm) at ``images`` and on the way from the steepest ones.

    On the way margins shrink and grow on as another class's: gradients are largest near borders.
    Measured on the digits and CIFAR-10, this finds 1.8 times what chance does.
    """
    norms = []
    with eval_mode(model), frozen_parameters(model), torch.enable_grad():
        for batch in torch.split(images, batch_size(images)):
            norms.append(_gradient(margin_at(batch), batch)[1])
        norm_N = torch.cat(norms)
        x = images[norm_N.topk(min(_ASCENTS, len(images))).indices]
        largest, margin = float(norm_N.max()), margin_at(x)
        for _ in range(_ASCENT_STEPS):
            gradient, norm_N = _gradient(margin, x)
            largest = max(largest, float(norm_N.max()))
            x = (x - step * gradient.sign()).clamp(0, 1)
    return largest


def _gradient(margin: Margin, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins' gradient [N, C, H, W] at images, and its l1 norm [N]."""
    x = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(margin(x).sum(), x)
    return gradient, gradient.abs().sum(dim=(1, 2, 3))
