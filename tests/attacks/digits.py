"""The digits that attacks are tried on, and what is right of them."""

from typing import get_args

import torch
from torch import Tensor

from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.specs import AttackTarget, ThreatModel

THREAT = ThreatModel(epsilon=0.1)
TARGETS = get_args(AttackTarget)


def some_digits(n: int) -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    return torch.from_numpy(to_float(test.images[:n])), torch.from_numpy(test.labels[:n])


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((predict(model, images) == labels).float().mean())
