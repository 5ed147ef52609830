"""Changes of routes and answers under attack: metrics of V-MoE's robustness study, for any MoE.

Puigcerver et al., "On the adversarial robustness of mixture of experts", NeurIPS 2022
(arXiv 2210.10253): the change of routes is 1 - mean intersection over union of the chosen sets.

Shapes: N images, T routed rows per image (1, or its tokens), R = N * T rows, E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.analysis.shares import Share, answers, fold_rows, share_of
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.models.base import Classifier, require_routes
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.specs import AttackSpec, Frozen, ThreatModel

_BINS = 30


class Histogram(Frozen):
    """Counts of rows between ``edges``, clean and attacked; the last bin holds all above."""

    edges: tuple[float, ...]
    clean: tuple[int, ...]
    attacked: tuple[int, ...]


class LayerChange(Frozen):
    """Change of the routes of one layer, means over all rows.

    ``set_change`` is 1 - mean intersection over union of the chosen experts, ``flip_rate`` the
    share of rows whose best expert changed, ``js_distance`` the Jensen-Shannon distance (root of
    the divergence in bits) of the gate's probabilities. ``margin`` is the median distance in scores
    between the last expert that was chosen and the first that was not, and ``margins`` its
    histogram; both are ``None`` where every expert is chosen.
    """

    layer: str
    set_change: float
    flip_rate: float
    js_distance: float
    margin_clean: float | None
    margin_attacked: float | None
    margins: Histogram | None


class AttackEffect(Frozen):
    """One attack: answers and routes before and after.

    ``prediction_change`` is the share of images with another answer, right or wrong;
    ``route_change`` that of images of which any row, in any layer, got another set of experts.
    """

    attack: AttackSpec
    epsilon: float
    images: int
    accuracy_clean: Share
    accuracy_attacked: Share
    loss_clean: float
    loss_attacked: float
    prediction_change: Share
    route_change: Share
    layers: tuple[LayerChange, ...]


@dataclass(frozen=True)
class MovedImage:
    """One image that an attack sent to other experts: what it was before, and after.

    ``pictures`` are [C, H, W]; ``before`` and ``after`` the experts of its first row that changed,
    in ``layer``, the first that did.
    """

    index: int
    label: int
    pictures: tuple[Tensor, Tensor]
    answers: tuple[int, int]
    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]


def effect_of(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    moved: list[MovedImage] | None = None,
    progress: Progress | None = None,
) -> AttackEffect:
    """Return what ``attack`` does to the answers and the routes of ``model``.

    A list ``moved`` gets every image whose route changed.

    Raises:
        UsageError: the model routes nothing, or the attack is no PGD.
    """
    with attack_task(progress or Silent(), require_routes(model), attack, len(labels)):
        found = attack_model(model, images, labels, threat, attack)
    return effect_between(model, images, found, labels, threat, attack, moved=moved)


def effect_between(
    model: Classifier,
    images: Tensor,
    found: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    moved: list[MovedImage] | None = None,
) -> AttackEffect:
    """Return what has become of answers and routes where ``attack`` made ``found`` of ``images``.

    A list ``moved`` gets every image whose route changed.
    """
    clean_logits, clean = answers(model, images)
    logits, attacked = answers(model, found)
    if moved is not None:
        for index in changed_images(clean, attacked, len(labels)).nonzero().flatten().tolist():
            layer, before, after = _first_change(clean, attacked, index, len(labels))
            pictures = images[index].cpu(), found[index].cpu()
            given = int(clean_logits[index].argmax()), int(logits[index].argmax())
            moved.append(
                MovedImage(index, int(labels[index]), pictures, given, layer, before, after)
            )
    return AttackEffect(
        attack=attack,
        epsilon=threat.epsilon,
        images=len(labels),
        accuracy_clean=share_of(clean_logits.argmax(dim=1) == labels),
        accuracy_attacked=share_of(logits.argmax(dim=1) == labels),
        loss_clean=float(F.cross_entropy(clean_logits, labels)),
        loss_attacked=float(F.cross_entropy(logits, labels)),
        prediction_change=share_of(clean_logits.argmax(dim=1) != logits.argmax(dim=1)),
        route_change=share_of(changed_images(clean, attacked, len(labels))),
        layers=tuple(layer_change(layer, clean[layer], attacked[layer]) for layer in clean),
    )


def _first_change(
    clean: dict[str, Routing], attacked: dict[str, Routing], index: int, images: int
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return the first layer that sends image ``index`` elsewhere, and to whom, before and after.

    Of tokens it is the first that goes elsewhere.
    """
    for layer, routing in clean.items():
        before_TK, after_TK = (
            fold_rows(each.expert_ids_NK, images)[index].sort(dim=1).values
            for each in (routing, attacked[layer])
        )
        changed_T = (before_TK != after_TK).any(dim=1)
        if changed_T.any():
            row = int(changed_T.int().argmax())
            return layer, tuple(before_TK[row].tolist()), tuple(after_TK[row].tolist())
    raise AssertionError("no layer sends the image elsewhere")


def changed_images(clean: dict[str, Routing], other: dict[str, Routing], images: int) -> Tensor:
    """Return for each image whether any of its rows got another set of experts, bool [N]."""
    changed = [
        fold_rows(_overlap(clean[layer], other[layer]) < 1, images).any(dim=1) for layer in clean
    ]
    return torch.stack(changed).any(dim=0)


def layer_change(layer: str, clean: Routing, attacked: Routing) -> LayerChange:
    """Return how the routes of one layer differ."""
    flipped_R = clean.expert_ids_NK[:, 0] != attacked.expert_ids_NK[:, 0]
    every = not bool(torch.isfinite(clean.margin_N).any())  # no other expert could be chosen
    return LayerChange(
        layer=layer,
        set_change=float(1 - _overlap(clean, attacked).mean()),
        flip_rate=float(flipped_R.double().mean()),
        js_distance=float(_js_distance(clean, attacked).mean()),
        margin_clean=None if every else float(clean.margin_N.median()),
        margin_attacked=None if every else float(attacked.margin_N.median()),
        margins=None if every else _histogram(clean.margin_N, attacked.margin_N),
    )


def _overlap(clean: Routing, other: Routing) -> Tensor:
    """Return intersection over union of the chosen sets of each row."""
    ours_RE, theirs_RE = _chosen(clean), _chosen(other)
    shared_R = (ours_RE & theirs_RE).sum(dim=1)
    return shared_R.double() / (ours_RE | theirs_RE).sum(dim=1)


def _chosen(routing: Routing) -> Tensor:
    return F.one_hot(routing.expert_ids_NK, routing.num_experts).amax(dim=1).bool()


def _js_distance(clean: Routing, other: Routing) -> Tensor:
    p, q = clean.scores_NE.double().softmax(dim=1), other.scores_NE.double().softmax(dim=1)
    middle = (p + q) / 2
    nats = _entropy(middle) - (_entropy(p) + _entropy(q)) / 2
    return (nats / math.log(2)).clamp(min=0).sqrt()


def _entropy(p_RE: Tensor) -> Tensor:
    return -torch.xlogy(p_RE, p_RE).sum(dim=1)


def _histogram(clean_R: Tensor, attacked_R: Tensor) -> Histogram:
    top = float(torch.cat([clean_R, attacked_R]).double().quantile(0.99)) or 1.0
    edges = torch.linspace(0, top, _BINS + 1, dtype=torch.float64)

    def counts(values_R: Tensor) -> tuple[int, ...]:
        return tuple(int(n) for n in torch.histc(values_R.double().clamp(max=top), _BINS, 0, top))

    return Histogram(
        edges=tuple(edges.tolist()), clean=counts(clean_R), attacked=counts(attacked_R)
    )
