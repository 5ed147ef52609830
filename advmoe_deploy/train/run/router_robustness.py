"""Robustness of routes before and after an update of the experts.

AdvMoE alternates because a router that is robust before the experts are updated need not be so
afterwards. Three rates of an evaluated epoch show it, each the share of hold-out images whose best
expert changes under PGD on the model, straight through the router; the mean over routed layers:

before          router and experts as the epoch found them
experts moved   the epoch's experts behind the router as the epoch found it
after           both as the epoch left them
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.routing.routing import Routing
from advmoe_deploy.specs import AttackSpec, ThreatModel

PROBED_IMAGES = 256


@dataclass(frozen=True)
class FlipProbe:
    """Images on which flips are counted, and the attack that causes them."""

    fabric: Fabric
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attack: AttackSpec

    def flips(self, model: Classifier) -> float:
        """Return the share of images whose best expert changes under the attack."""
        mine = slice(self.fabric.global_rank, None, self.fabric.world_size)
        x, y = self.images[mine], self.labels[mine]
        total = self._changed(model, x, y) if len(x) else x.new_zeros(())
        summed = self.fabric.all_reduce(total, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return float(summed) / len(self.images)

    def _changed(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        """Return the share times the images, for the processes have not all as many."""
        found = attack_model(model, x, y, self.threat, self.attack)
        with eval_mode(model), torch.no_grad():
            clean, attacked = model.route(x), model.route(found)
        shares = [_share_changed(clean[layer], attacked[layer]) for layer in clean]
        return torch.stack(shares).mean() * len(x)


def router_state(model: Classifier) -> dict[str, Tensor]:
    """Return a copy of the weights and statistics of all routers."""
    state = model.state_dict()
    return {name: t.clone() for name, t in state.items() if is_router_parameter(name)}


@contextmanager
def with_router(model: Classifier, router: dict[str, Tensor]) -> Iterator[None]:
    """Give ``model`` another router for the block."""
    own = router_state(model)
    model.load_state_dict(router, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)


def _share_changed(clean: Routing, attacked: Routing) -> Tensor:
    changed_N = clean.expert_ids_NK[:, 0] != attacked.expert_ids_NK[:, 0]
    return changed_N.float().sum() / max(1, len(changed_N))  # a process may have no image
