"""One training step of each method: which examples, which loss, which parameters.

Gradients come from torch.autograd.grad for one group of parameters at a time, are averaged over
the processes, checked, clipped and applied. BatchNorm statistics are those of each process's own
share of the batch.

Shapes: N images, K classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe_deploy.attacks.pgd import eval_mode, pgd_kl
from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.dispatch import frozen_parameters
from advmoe_deploy.models.routing import Routes
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.feed import Batch
from advmoe_deploy.train.losses import class_routing_loss, trades
from advmoe_deploy.train.schedule import lr_factor

Named = dict[str, nn.Parameter]


class Learner:
    """A model, its optimizers and the step that improves it."""

    def __init__(self, fabric: Fabric, config: TrainConfig, model: Classifier) -> None:
        self.fabric = fabric
        self.config = config
        self.model = model
        self.groups = _groups(model)
        self.optimizers = {
            name: torch.optim.SGD(
                group.values(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
            for name, group in self.groups.items()
        }

    def balance_start(self, images_NCHW: Tensor) -> None:
        """Set the router's last bias so that the experts' mean scores on these images are equal."""
        if isinstance(self.model, AdvMoE):
            with torch.no_grad(), eval_mode(self.model), _batch_statistics(self.model):
                mean_E = self.model.score(images_NCHW).mean(dim=0)
            mean_E = self._mean_over_processes(mean_E)
            self.model.router.fc.bias.data.sub_(mean_E - mean_E.mean())

    def step(self, batch: Batch) -> float:
        """Train on one batch and return its loss.

        Raises:
            DivergedError: the loss or a gradient is not finite; those weights are as before.
        """
        self._set_lr(batch.done)
        adversarial = self._attack_model(batch)
        if self.config.method != "advmoe":
            return self._update(tuple(self.groups), batch, adversarial)
        self._update(("router",), batch, adversarial)
        if self.config.attack_per_step:
            adversarial = self._attack_model(batch)
        return self._update(("backbone",), batch, adversarial)

    def _set_lr(self, done: float) -> None:
        factor = lr_factor(self.config.schedule, done)
        for name, optimizer in self.optimizers.items():
            peak = self.config.router_lr if name == "router" else self.config.lr
            optimizer.param_groups[0]["lr"] = peak * factor

    def _attack_model(self, batch: Batch) -> Tensor:
        through_router = self.config.attack_target == "straight-through"
        return self._attack(batch, lambda x: self._forward(x, through_router=through_router))

    def _attack(self, batch: Batch, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the images that change most what ``forward`` gives, as TRADES wants them."""
        mode = eval_mode if self.config.attack_in_eval_mode else _batch_statistics
        with mode(self.model), frozen_parameters(self.model):
            return pgd_kl(
                forward,
                batch.images,
                threat=self.config.threat,
                steps=self.config.attack_steps,
                step_size=self.config.attack_step_size,
                noise=self.config.attack_noise,
                generator=batch.rng,
            )

    def _update(self, names: tuple[str, ...], batch: Batch, adversarial: Tensor) -> float:
        named: Named = {}
        for name in names:
            named |= self.groups[name]
        loss = self._loss(names, batch, adversarial) * batch.share
        gradients = torch.autograd.grad(loss, list(named.values()))
        total, gradients = self._averaged(loss.detach(), gradients)
        self._require_finite(total, named, gradients, " and ".join(names))
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter.grad = gradient
        if "router" in names:
            nn.utils.clip_grad_norm_(self.groups["router"].values(), self.config.router_grad_clip)
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return float(total)

    def _loss(self, names: tuple[str, ...], batch: Batch, adversarial: Tensor) -> Tensor:
        # One pass over both halves: BatchNorm trains on the mixture that it will meet.
        through_router = "router" in names
        both = torch.cat([batch.images, adversarial])
        logits = self._forward(both, through_router=through_router)
        clean_NK, adversarial_NK = logits.chunk(2)
        loss = trades(clean_NK, adversarial_NK, batch.labels, self.config.beta)
        if through_router and self.config.class_routing_weight:
            loss = loss + self.config.class_routing_weight * self._class_routing(batch)
        return loss

    def _class_routing(self, batch: Batch) -> Tensor:
        """Return the class routing loss over the clean images and over those that attack it."""
        model = self.model
        assert isinstance(model, AdvMoE)
        attacked = self._attack(batch, model.score)
        scores_2NE = model.score(torch.cat([batch.images, attacked]))
        return class_routing_loss(scores_2NE, batch.labels.repeat(2), model.spec.num_classes)

    def _forward(self, x: Tensor, *, through_router: bool) -> Tensor:
        """Return float32 logits; the router never runs in reduced precision."""
        routes = Routes(surrogate="probability" if through_router else None)
        with self.fabric.autocast():
            return self.model(x, routes).float()  # type: ignore[no-any-return]

    def _averaged(
        self, loss: Tensor, gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.fabric.world_size == 1:
            return loss, gradients
        flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in gradients)])
        flat = self._mean_over_processes(flat)
        parts = torch.split(flat, [1, *(g.numel() for g in gradients)])
        shaped = (p.view_as(g) for p, g in zip(parts[1:], gradients, strict=True))
        return parts[0][0], tuple(shaped)

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        mean = self.fabric.all_reduce(tensor, reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def _require_finite(
        self, loss: Tensor, named: Named, gradients: tuple[Tensor, ...], what: str
    ) -> None:
        norm = nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(loss + norm)):
            return
        bad = "the loss"
        if bool(torch.isfinite(loss)):
            pairs = zip(named, gradients, strict=True)
            odd = [name for name, gradient in pairs if not torch.isfinite(gradient).all()]
            bad = f"the gradient of {odd[0]}" if odd else "the norm of the gradients"
        raise DivergedError(f"{bad} is not finite in the {what} step")


def _groups(model: Classifier) -> dict[str, Named]:
    """Return the parameters by name: those of the router, and everything else."""
    groups: dict[str, Named] = {}
    for name, parameter in model.named_parameters():
        group = "router" if name.startswith("router.") else "backbone"
        groups.setdefault(group, {})[name] = parameter
    return groups


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use the batch's statistics for the block, and learn nothing from it."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m, m.training, m.track_running_stats) for m in norms]
    for m in norms:
        m.training, m.track_running_stats = True, False
    try:
        yield
    finally:
        for m, training, tracked in before:
            m.training, m.track_running_stats = training, tracked
