"""Whole networks behind a linear router, and the dual model that blends two such mixtures.

Zhang et al., "Optimizing robustness and accuracy in mixture of experts: a dual-model approach",
arXiv 2502.06832. Each expert has BatchNorm layers of its own, which in training see the rows that
the expert is given and no others.

Shapes: N images, C channels, H height, W width, E experts.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from advmoe_deploy.models.backbones.build import build_backbone
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import ROUTER, DenseClassifier
from advmoe_deploy.models.families.expert_batch_norm import replace_batch_norms
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.routing import Routes, Routing, RoutingRule, forced_route
from advmoe_deploy.specs import ModelSpec

STANDARD = "standard"
ROBUST = "robust"


class LinearRouter(nn.Linear):
    """One linear layer on the flattened image."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.in_channels * spec.image_size**2, spec.num_experts)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return scores [N, E]."""
        return super().forward(x_NCHW.flatten(1))


class ExpertNetworks(Classifier):
    """``num_experts`` whole dense networks; each image goes to the one that scores best.

    Args:
        spec: of family expert-networks; each expert is the network ``spec.s_dense()``.
        layer: the name of the one routed layer.
    """

    def __init__(self, spec: ModelSpec, layer: str = ROUTER) -> None:
        super().__init__(spec)
        dropped = spec.dropped_experts.get(layer, ())
        self.rules = (RoutingRule(layer, spec.num_experts, dropped=dropped),)
        self.router = LinearRouter(spec)
        self.experts = nn.ModuleList(
            replace_batch_norms(build_backbone(spec.s_dense(), num_experts=1))
            for _ in range(spec.num_experts)
        )

    @property
    def layer(self) -> str:
        """The name of the routed layer."""
        return self.rules[0].layer

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]."""
        routes = routes or Routes()
        x_NCHW = self.normalise(images)
        routing = routes.decide(self.rules[0], self.router, x_NCHW)
        return run_experts(routing, x_NCHW, list(self.experts), routes.execution)

    def score(self, images: Tensor) -> Tensor:
        """Return the router's scores [N, E]."""
        scores: Tensor = self.router(self.normalise(images))
        return scores

    def route(self, images: Tensor) -> dict[str, Routing]:
        """Return the routing of the one router, for its cost alone."""
        routes = Routes()
        routes.decide(self.rules[0], self.router, self.normalise(images))
        return routes.taken

    def pathway(self, expert: int) -> DenseClassifier:
        """Return the dense network that images of ``expert`` meet, with copied weights."""
        dense = DenseClassifier(self.spec.s_dense())
        dense.backbone.load_state_dict(self.experts[expert].state_dict())
        return dense.to(next(self.parameters())).train(self.training)


class DualModel(Classifier):
    """(1 - alpha) * standard + alpha * robust, a blend of the logits of two mixtures.

    ``standard`` and ``robust`` are classifiers in their own right, with the dual model's own
    parameters: attack one, train one, hand it the same :class:`Routes`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        assert spec.alpha is not None, "validated by ModelSpec"
        self.alpha = spec.alpha
        mixture = spec.model_copy(update={"family": "expert-networks", "alpha": None})
        self.standard = ExpertNetworks(mixture, STANDARD)
        self.robust = ExpertNetworks(mixture, ROBUST)
        self.rules = self.standard.rules + self.robust.rules

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]."""
        routes = routes or Routes()
        standard = self.standard(images, routes)
        return self.blend(standard, self.robust(images, routes))

    def blend(self, standard: Tensor, robust: Tensor) -> Tensor:
        """Return the blend of two mixtures' logits."""
        return (1 - self.alpha) * standard + self.alpha * robust

    def route(self, images: Tensor) -> dict[str, Routing]:
        """Return the routings of both routers, for their cost alone."""
        return self.standard.route(images) | self.robust.route(images)


def second_expert(routing: Routing) -> Tensor:
    """Return the expert that each row's scores rank second, int64 [N]."""
    return routing.scores_NE.argsort(dim=1, descending=True, stable=True)[:, 1]


def second_expert_routes(taken: Mapping[str, Routing], copies: int = 1) -> Routes:
    """Return routes that send each row, with weight 1, to the expert it ranked second in ``taken``.

    They are for ``copies`` batches, one behind the other, of the images that were routed so.
    """
    forced = {}
    for layer, routing in taken.items():
        ids_N = second_expert(routing).repeat(copies)
        forced[layer] = forced_route(ids_N, routing.num_experts, like=routing.scores_NE)
    return Routes(forced)
