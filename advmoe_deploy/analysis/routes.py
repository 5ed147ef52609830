"""Expert load: how much each expert is used, and by which classes.

Shapes: N images, T routed rows per image (1, or its tokens), E experts, K experts per row.
"""

import torch
from torch import Tensor

from advmoe_deploy.analysis.shares import answers, fold_rows
from advmoe_deploy.models.base import Classifier, require_routes
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.plan import effective_routes
from advmoe_deploy.specs import Frozen


class LayerUse(Frozen):
    """Use of the experts of one routed layer on clean images.

    ``load`` counts choices per expert, ``by_class`` the same per class of image [classes][experts];
    a row counts once for each of its ``top_k`` experts. ``effective_routes`` is exp of the entropy
    of the load: E when all are used alike, 1 at a collapse. ``class_information`` is the mutual
    information of class and expert in bits: 0 if routes know nothing of classes.
    """

    layer: str
    experts: int
    top_k: int
    rows_per_image: int
    load: tuple[int, ...]
    effective_routes: float
    by_class: tuple[tuple[int, ...], ...]
    class_information: float


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
    table_CE = torch.zeros(classes, routing.num_experts, dtype=torch.int64, device=labels_N.device)
    where = labels_N[:, None, None].expand_as(ids_NTK), ids_NTK
    table_CE.index_put_(where, torch.ones_like(ids_NTK), accumulate=True)
    load_E = tuple(table_CE.sum(dim=0).tolist())
    return LayerUse(
        layer=layer,
        experts=routing.num_experts,
        top_k=ids_NTK.shape[2],
        rows_per_image=ids_NTK.shape[1],
        load=load_E,
        effective_routes=effective_routes(load_E),
        by_class=tuple(tuple(row) for row in table_CE.tolist()),
        class_information=_mutual_information(table_CE),
    )


def _mutual_information(table_CE: Tensor) -> float:
    joint_CE = table_CE.double() / table_CE.sum()
    apart_CE = joint_CE.sum(dim=1, keepdim=True) * joint_CE.sum(dim=0, keepdim=True)
    seen = joint_CE > 0
    return max(0.0, float((joint_CE[seen] * (joint_CE[seen] / apart_CE[seen]).log2()).sum()))
