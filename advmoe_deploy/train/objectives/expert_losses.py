"""Losses of RT-ER and JTDMoE: every expert robust by itself, not only behind its router.

Zhang et al., arXiv 2502.06832. A mixture whose experts are robust each on its own images breaks as
soon as an attack moves an image to another expert; these losses hold the others still as well. They
do not teach them: labels reach only the expert that is ranked first, and one that never is can be
as still as one likes by giving the same answer to everything. Watch the load.

A ``forward`` is a model, or anything that is called like one: ``forward(images, routes)`` returns
logits. The attacks are the caller's. All in log space, so that no probability underflows.

Shapes: N images, K classes, E experts, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.models.families.dual import DualModel, second_expert_routes
from advmoe_deploy.models.routing.routing import Routes, Routing
from advmoe_deploy.train.objectives.forward import RoutedForward
from advmoe_deploy.train.objectives.losses import divergence


def rt_er_loss(
    forward: RoutedForward,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    attacked_NCHW: Tensor,
    attacked_second_NCHW: Tensor,
    taken: Mapping[str, Routing],
    beta: float,
) -> Tensor:
    """Return CE(F(x'), y) + beta * KL(f_2nd(x'') || f_2nd(x)), the mean over the batch.

    Args:
        forward: the mixture F.
        images_NCHW: x, in [0, 1].
        labels_N: y.
        attacked_NCHW: x', found by attacking the mixture.
        attacked_second_NCHW: x'', found by attacking, for each image, its second expert alone;
            its logits are ``forward(x, second_expert_routes(taken))``.
        taken: where ``images_NCHW`` were routed, from ``model.route``. The second expert of each
            image is read off it, and only that one runs.
        beta: the weight of the second term; 6 in the paper.
    """
    routes = second_expert_routes(taken, copies=2)
    change = _change(forward, images_NCHW, attacked_second_NCHW, routes)
    return _mixture_loss(forward, attacked_NCHW, labels_N) + beta * change


def robust_phase_loss(
    forward: RoutedForward,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    attacked_NCHW: Tensor,
    attacked_experts_ENCHW: Sequence[Tensor],
    layer: str,
    beta: float,
) -> Tensor:
    """Return JTDMoE's loss of the robust mixture: RT-ER's, but every expert is held still.

    CE(F(x'), y) + beta * mean over experts of KL(f_e(x_e'') || f_e(x)). The mean, so that ``beta``
    weighs as much as in RT-ER, whatever the number of experts.

    Args:
        forward: the robust mixture F.
        images_NCHW: x, in [0, 1].
        labels_N: y.
        attacked_NCHW: x', found by attacking the mixture.
        attacked_experts_ENCHW: x_e'', found by attacking expert e alone, for each expert.
        layer: the name of the routed layer.
        beta: the weight of the second term.
    """
    changes = [
        _change(forward, images_NCHW, alone_NCHW, Routes({layer: expert}))
        for expert, alone_NCHW in enumerate(attacked_experts_ENCHW)
    ]
    change = torch.stack(changes).mean()
    return _mixture_loss(forward, attacked_NCHW, labels_N) + beta * change


def standard_phase_logits(
    model: DualModel, images_NCHW: Tensor, routes: Routes | None = None
) -> Tensor:
    """Return the dual model's logits [N, K] with the robust mixture frozen.

    JTDMoE's standard phase minimises their cross-entropy on clean images. Nothing of the robust
    mixture changes: no gradient reaches it, and its BatchNorm learns nothing from these images.
    """
    routes = routes or Routes(surrogate="probability")
    with eval_mode(model.robust), torch.no_grad():
        robust_NK = model.robust(images_NCHW, routes)
    return model.blend(model.standard(images_NCHW, routes), robust_NK)


def _mixture_loss(forward: RoutedForward, attacked_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    # The released code gives its router no gradient at all: the weight of a top-1 choice is 1.
    logits_NK = forward(attacked_NCHW, Routes(surrogate="probability"))
    return F.cross_entropy(logits_NK, labels_N)


def _change(
    forward: RoutedForward, images_NCHW: Tensor, attacked_NCHW: Tensor, routes: Routes
) -> Tensor:
    """Return KL(f(attacked) || f(clean)); ``routes`` are for both batches, attacked first."""
    # One pass over both: BatchNorm trains on the mixture that it will meet.
    both_NK = forward(torch.cat([attacked_NCHW, images_NCHW]), routes)
    attacked_NK, clean_NK = both_NK.chunk(2)
    return divergence(attacked_NK, clean_NK)
