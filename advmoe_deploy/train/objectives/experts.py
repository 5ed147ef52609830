"""Objectives of RT-ER and of JTDMoE's robust phase, with the search for their examples.

Zhang et al., arXiv 2502.06832. x' attacks the mixture by its cross-entropy; x'' attacks an expert
alone by the divergence that its term of the loss bounds. The losses themselves are in
:mod:`~advmoe_deploy.train.objectives.expert_losses`.

Shapes: N images, E experts.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advmoe_deploy.models.families.dual import second_expert_routes
from advmoe_deploy.train.objectives.adversarial import InnerAttack, TrainingObjective, TrainingScene
from advmoe_deploy.train.objectives.expert_losses import robust_phase_loss, rt_er_loss


@dataclass(frozen=True)
class RtEr(TrainingObjective):
    """RT-ER: beside the mixture, each image's second expert is held still."""

    ascent: InnerAttack
    beta: float

    def find(self, scene: TrainingScene) -> Tensor:
        """Return x' and x'', one behind the other."""
        mixture = self.ascent.on_cross_entropy(scene.attacked, scene.part)
        with torch.no_grad():
            taken = scene.model.route(scene.part.images)

        def second(x: Tensor) -> Tensor:
            return scene.attacked(x, second_expert_routes(taken))

        return torch.cat([mixture, self.ascent.on_divergence(second, scene.part)])

    def loss(self, scene: TrainingScene, examples: Tensor) -> Tensor:
        """Return RT-ER's loss."""
        mixture, second = examples.chunk(2)
        with torch.no_grad():
            taken = scene.model.route(scene.part.images)
        return rt_er_loss(
            scene.trained,
            scene.part.images,
            scene.part.labels,
            attacked_NCHW=mixture,
            attacked_second_NCHW=second,
            taken=taken,
            beta=self.beta,
        )


@dataclass(frozen=True)
class JtdMoe(TrainingObjective):
    """JTDMoE's robust phase: beside the mixture, every expert is held still."""

    ascent: InnerAttack
    beta: float

    def find(self, scene: TrainingScene) -> Tensor:
        """Return x' and then x'' of each expert."""
        found = [self.ascent.on_cross_entropy(scene.attacked, scene.part)]
        for expert in range(scene.model.spec.num_experts):
            alone = partial(scene.attacked, routes=scene.model.forced(expert))
            found.append(self.ascent.on_divergence(alone, scene.part))
        return torch.cat(found)

    def loss(self, scene: TrainingScene, examples: Tensor) -> Tensor:
        """Return the loss of the robust mixture."""
        mixture, *alone = examples.chunk(1 + scene.model.spec.num_experts)
        return robust_phase_loss(
            scene.trained,
            scene.part.images,
            scene.part.labels,
            attacked_NCHW=mixture,
            attacked_experts_ENCHW=alone,
            layer=scene.model.rules[0].layer,
            beta=self.beta,
        )
