"""Router loss of AdvMoE's released code, for comparison with the paper's.

Shapes: N images, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.train.objectives.adversarial import InnerAttack, TrainingObjective, TrainingScene
from advmoe_deploy.train.objectives.losses import trades


@dataclass(frozen=True)
class LabelParity(TrainingObjective):
    """beta * (CE(scores, label mod E) + KL of the router's scores, clean against attacked).

    The examples attack the model, as its expert step's do. KL is in log space, where the released
    one underflows to NaN.
    """

    ascent: InnerAttack
    beta: float

    def find(self, scene: TrainingScene) -> Tensor:
        """Return images that change the model's answer most."""
        return self.ascent.on_divergence(scene.attacked, scene.part)

    def loss(self, scene: TrainingScene, examples: Tensor) -> Tensor:
        """Return the loss of the router alone."""
        model = scene.model
        assert isinstance(model, AdvMoE)
        with torch.autocast(examples.device.type, enabled=False):
            scores_2NE = model.score(torch.cat([scene.part.images, examples]))
        clean_NE, attacked_NE = scores_2NE.chunk(2)
        parity_N = scene.part.labels % model.spec.num_experts
        parity = trades(clean_NE, attacked_NE, parity_N, beta=1)
        return self.beta * parity
