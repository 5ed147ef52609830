"""Recipes on CIFAR-10, with the papers' hyper-parameters."""

from advmoe_deploy.specs import ModelSpec, ThreatModel
from advmoe_deploy.train.config import TrainConfig

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar10_advmoe() -> TrainConfig:
    """Return AdvMoE, ResNet-18 with two experts of half width, with the paper's hyper-parameters.

    Zhang et al. (ICCV 2023, arXiv 2308.10110) report 51.83 % against PGD-50 and 80.15 % clean,
    means of three runs of their code; this recipe itself has not been trained to its end here, so
    neither its accuracy nor its cost is known. 100 epochs need a GPU.
    """
    return TrainConfig(
        name="cifar10-advmoe",
        data="cifar10",
        model=ModelSpec(
            family="advmoe", num_experts=2, ratio=0.5, mean=CIFAR10_MEAN, std=CIFAR10_STD
        ),
        threat=ThreatModel(epsilon=8 / 255),
        method="advmoe",
        attack_step_size=5 / 255,
        crop_padding=4,
        flip=True,
    )


RECIPES = (cifar10_advmoe,)
