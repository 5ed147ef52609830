"""Training step: for each phase of the method, examples, gradients, weights.

Gradients come from torch.autograd.grad for the parameters of one phase, are averaged over the
processes, checked, clipped and applied.

Shapes: N images, E experts.
"""

from contextlib import AbstractContextManager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import Batch, BatchPart
from advmoe_deploy.train.data.schedule import lr_factor
from advmoe_deploy.train.distributed.collectives import synchronise
from advmoe_deploy.train.objectives.adversarial import TrainingScene, ascent_of
from advmoe_deploy.train.objectives.forward import ForwardPass, batch_statistics
from advmoe_deploy.train.objectives.router_terms import (
    adjustment,
    balance,
    random_routes,
    score_terms,
)
from advmoe_deploy.train.step.loss_scale import LossScale
from advmoe_deploy.train.step.methods import (
    Named,
    Phase,
    groups_of,
    is_router_group,
    phases_of,
    still,
)
from advmoe_deploy.train.step.sparse import WeightPruning

FoundExamples = list[Tensor | None]


class Learner:
    """A model, its optimizers and the step that improves it."""

    def __init__(self, fabric: Fabric, config: TrainConfig, model: Classifier) -> None:
        self.fabric = fabric
        self.config = config
        self.model = model
        self.scale = LossScale(enabled=config.precision == "16-mixed")
        if fabric.world_size > 1:
            synchronise(model)
        self.pruning = WeightPruning(config, model) if config.method == "sparse" else None
        self._set_up()

    def begin_epoch(self, epoch: int) -> bool:
        """Prepare for ``epoch``, counted from 0; true if what learns is no longer the same."""
        if self.pruning is None or not self.pruning.begin_epoch(epoch):
            return False
        self._set_up()
        return True

    def balance_start(self, part: BatchPart) -> None:
        """Set the router's last bias so that the experts' mean scores on these images are equal."""
        if isinstance(self.model, AdvMoE):
            with torch.no_grad(), eval_mode(self.model), batch_statistics(self.model):
                mean_E = self.model.score(part.images).mean(dim=0)
            mean_E = self._mean_over_processes(mean_E * (part.share / part.weight))
            self.model.router.fc.bias.data.sub_(mean_E - mean_E.mean())

    def step(self, batch: Batch) -> float:
        """Train on one batch and return its loss.

        Raises:
            DivergedError: the loss or a gradient is not finite; those weights are as before.
        """
        self._set_lr(batch.done)
        found: FoundExamples = [None] * len(batch.parts)
        loss = 0.0
        for _ in range(self.config.free_repeats if self.config.loss == "free" else 1):
            for phase in self.phases:
                if batch.step % phase.every == 0:
                    loss = self._update(phase, batch, found)
        return loss

    def _set_up(self) -> None:
        model, config = self.model, self.config
        self.groups: dict[str, Named] = groups_of(model)
        self.phases: tuple[Phase, ...] = phases_of(config, model)
        if self.pruning is not None:
            self.groups, self.phases = self.pruning.taking_part(self.groups, self.phases)
        elif config.start is not None:  # pruning moves every weight, in one stage or another
            still(model, {n for phase in self.phases for g in phase.groups for n in self.groups[g]})
        self.optimizers = {
            name: torch.optim.SGD(
                self.groups[name].values(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
            for phase in self.phases
            for name in phase.groups
        }

    def _set_lr(self, done: float) -> None:
        peak = 1.0
        if self.pruning is not None:
            done, peak = self.pruning.pace(done)
        factor = lr_factor(self.config.schedule, done) * peak
        for name, optimizer in self.optimizers.items():
            lr = self.config.router_lr if is_router_group(name) else self.config.lr
            optimizer.param_groups[0]["lr"] = lr * factor

    def _update(self, phase: Phase, batch: Batch, found: FoundExamples) -> float:
        """Take the step of one phase and return its loss; ``found`` examples are kept for others.

        In float16 a gradient that overflows is no error: the step is left out.
        """
        named: Named = {}
        for name in phase.groups:
            named |= self.groups[name]
        total, gradients = self._gradients(phase, named, batch, found)
        total, gradients = self._averaged(total, gradients)
        if not self._finite(total, named, gradients, phase.name):
            return float(total)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            parameter.grad = gradient if self.pruning is None else self.pruning.kept(name, gradient)
        for name in phase.groups:
            if is_router_group(name):
                clip = self.config.router_grad_clip
                nn.utils.clip_grad_norm_(self.groups[name].values(), clip)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return float(total)

    def _gradients(
        self, phase: Phase, named: Named, batch: Batch, found: FoundExamples
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return loss and gradients on this process's rows of all parts."""
        total: Tensor | None = None
        sums: tuple[Tensor, ...] = ()
        for index, part in enumerate(batch.parts):
            scene = self._scene(phase, part)
            examples = found[index]
            if examples is None or (phase.finds and not phase.objective.moves_examples):
                examples = self._find(phase, scene)
            loss, gradients, found[index] = self._differentiate(phase, scene, examples, named)
            total = loss if total is None else total + loss
            sums = tuple(a + b for a, b in zip(sums, gradients, strict=True)) if sums else gradients
        assert total is not None
        return total, sums

    def _differentiate(
        self, phase: Phase, scene: TrainingScene, examples: Tensor, named: Named
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return loss, gradients, and the examples: free training moves them by its gradient."""
        objective, scale = phase.objective, self.scale.factor
        inputs: list[Tensor] = list(named.values())
        if objective.moves_examples:
            examples = examples.detach().requires_grad_(True)
            inputs.append(examples)
        loss = self._loss(phase, scene, examples)
        # An expert without rows has no part in the loss, and a gradient of zero.
        gradients = torch.autograd.grad(
            loss * scale if scale != 1 else loss, inputs, allow_unused=True, materialize_grads=True
        )
        if scale != 1:
            gradients = tuple(gradient / scale for gradient in gradients)
        if objective.moves_examples:
            *gradients_of_weights, of_examples = gradients
            examples = objective.moved(examples, of_examples, scene.part.images)
            gradients = tuple(gradients_of_weights)
        return loss.detach(), gradients, examples

    def _loss(self, phase: Phase, scene: TrainingScene, examples: Tensor) -> Tensor:
        config, part = self.config, scene.part
        loss = phase.objective.loss(scene, examples) * part.share
        if not phase.routes_learn:
            return loss
        if config.balance_loss is not None:
            taken = scene.trained.taken  # of a frozen mixture's router, too, which learns nothing
            own = [taken[rule.layer] for rule in scene.model.rules]
            term = balance(config.balance_loss, own)
            loss = loss + config.balance_weight * part.weight * term
        if config.class_routing_weight or config.route_stability:
            model = scene.model
            assert isinstance(model, AdvMoE)
            with self._attack_mode(), frozen_parameters(self.model):
                attacked = ascent_of(config).on_divergence(model.score, part)
            loss = loss + part.weight * score_terms(config, model, part, attacked)
        return loss

    def _scene(self, phase: Phase, part: BatchPart) -> TrainingScene:
        autocast = self.fabric.autocast
        call = phase.call if self.pruning is None else self.pruning.call
        share = phase.random_routes
        forced = random_routes(phase.model, part, share) if share else None
        return TrainingScene(
            model=phase.model,
            part=part,
            attacked=ForwardPass(
                phase.model if self.pruning is None else self.pruning.call,
                surrogate=phase.attack_surrogate,
                forced=forced,
                autocast=autocast,
            ),
            trained=ForwardPass(
                call,
                surrogate=phase.surrogate,
                forced=forced,
                adjust=adjustment(self.config, part),
                autocast=autocast,
            ),
        )

    def _find(self, phase: Phase, scene: TrainingScene) -> Tensor:
        with self._attack_mode(), frozen_parameters(self.model):
            return phase.objective.find(scene)

    def _attack_mode(self) -> AbstractContextManager[None]:
        mode = eval_mode if self.config.attack_in_eval_mode else batch_statistics
        return mode(self.model)

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

    def _finite(self, loss: Tensor, named: Named, gradients: tuple[Tensor, ...], what: str) -> bool:
        """Return whether the step can be taken; if it never can, raise DivergedError."""
        norm = nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(loss + norm)):
            self.scale.fitted()
            return True
        bad = "the loss"
        if bool(torch.isfinite(loss)):
            if self.scale.overflowed():
                return False
            pairs = zip(named, gradients, strict=True)
            odd = [name for name, gradient in pairs if not torch.isfinite(gradient).all()]
            bad = f"the gradient of {odd[0]}" if odd else "the norm of the gradients"
        raise DivergedError(f"{bad} is not finite in the {what} step")
