"""Expert load: how much each expert is used, and by which classes.

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K experts per row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.analysis.shares import answers, fold_rows
from advmoe_deploy.models.base import Classifier, require_routes
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.specs import Frozen

_SHUFFLES = 200


class LayerUse(Frozen):
    """Use of the experts of one routed layer on clean images.

    ``load`` counts choices per expert, ``by_class`` the same per class of image [classes][experts];
    a row counts once for each of its ``top_k`` experts. ``effective_routes`` is exp of the entropy
    of the load: E when all are used alike, 1 at a collapse. ``class_information`` is the mutual
    information of class and expert in bits: 0 if routes know nothing of classes. Of few images or
    many classes it is never 0: of classes drawn anew ``chance_information`` is exceeded in one of
    twenty cases.
    """

    layer: str
    experts: int
    top_k: int
    rows_per_image: int
    load: tuple[int, ...]
    effective_routes: float
    by_class: tuple[tuple[int, ...], ...]
    class_information: float
    chance_information: float


def route_use(model: Classifier, images: Tensor, labels: Tensor) -> tuple[LayerUse, ...]:
    """Return how each routed layer of ``model`` uses its experts on float ``images``.

    Raises:
        UsageError: the model routes nothing.
    """
    _, taken = answers(require_routes(model), images)
    return tuple(
        _layer_use(layer, routing, labels, model.spec.num_classes)
        for layer, routing in taken.items()
    )


def _layer_use(layer: str, routing: Routing, labels_N: Tensor, classes: int) -> LayerUse:
    ids_NTK = fold_rows(routing.expert_ids_NK, len(labels_N))
    chosen_NE = F.one_hot(ids_NTK.flatten(1), routing.num_experts).sum(dim=1).double()
    is_class_NC = F.one_hot(labels_N, classes).double()
    table_CE = is_class_NC.T @ chosen_NE
    load_E = tuple(table_CE.sum(dim=0).long().tolist())
    return LayerUse(
        layer=layer,
        experts=routing.num_experts,
        top_k=ids_NTK.shape[2],
        rows_per_image=ids_NTK.shape[1],
        load=load_E,
        effective_routes=effective_routes(load_E),
        by_class=tuple(tuple(row) for row in table_CE.long().tolist()),
        class_information=_mutual_information(table_CE),
        chance_information=_by_chance(is_class_NC, chosen_NE),
    )


def _by_chance(is_class_NC: Tensor, chosen_NE: Tensor) -> float:
    """Return the information that images whose classes are shuffled exceed in 5 % of the cases."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(is_class_NC), generator=generator) for _ in range(_SHUFFLES)]
    found = [_mutual_information(is_class_NC[order].T @ chosen_NE) for order in orders]
    return float(torch.tensor(found, dtype=torch.float64).quantile(0.95))


def _mutual_information(table_CE: Tensor) -> float:
    joint_CE = table_CE / table_CE.sum()
    apart_CE = joint_CE.sum(dim=1, keepdim=True) * joint_CE.sum(dim=0, keepdim=True)
    seen = joint_CE > 0
    return max(0.0, float((joint_CE[seen] * (joint_CE[seen] / apart_CE[seen]).log2()).sum()))
