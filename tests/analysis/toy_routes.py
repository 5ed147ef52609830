"""Toy models whose routes are known by hand, and random networks of every family on digits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.specs import ThreatModel
from tests.conftest import TINY
from tests.families import spec_of
from tests.toys import Linear

THREAT = ThreatModel(epsilon=0.1)
ROUTED = (
    "AdvMoE",
    "conv experts",
    "block experts",
    "expert networks",
    "dual model",
    "token experts",
)
BOUNDED = (*ROUTED[:-1], "ResNet-50", "wide ResNet", "VGG", "DenseNet")


def digits_model(name: str, images: int) -> tuple[Classifier, Tensor, Tensor]:
    """Return a random network that uses every expert, float test digits and their labels."""
    test = load_dataset("digits").test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    spec = TINY if name == "AdvMoE" else spec_of(name)
    return untrained_model(spec, x), x[:images], y[:images]


def first_pixel_router() -> Linear:
    """Expert 0 where the first of 16 pixels is above 0.5, else expert 1; scores (p, 0.5)."""
    weight = torch.zeros(2, 16)
    weight[0, 0] = 1
    return Linear(weight, torch.tensor([0.0, 0.5]))


def says(class_: int) -> Linear:
    """An expert that always answers ``class_`` of two."""
    return Linear(torch.zeros(2, 16), F.one_hot(torch.tensor(class_), 2).float())


def corners(*first_pixels: float) -> Tensor:
    """Images of 4 x 4 pixels: these first pixels, the others 0.5."""
    images = torch.full((len(first_pixels), 1, 4, 4), 0.5)
    images[:, 0, 0, 0] = torch.tensor(first_pixels)
    return images


def random_linear(classes: int, seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 16, generator=generator)
    return Linear(weight, torch.randn(classes, generator=generator))
