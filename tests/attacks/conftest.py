"""The model that attacks are tried on."""

import pytest
import torch
from torch import nn

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.registry import build_model
from tests.conftest import TINY


@pytest.fixture(scope="module")
def model() -> AdvMoE:
    """A tiny AdvMoE after sixty plain steps: right about most digits, not robust."""
    torch.manual_seed(0)
    built = build_model(TINY)
    assert isinstance(built, AdvMoE)
    train = load_dataset("digits").train
    x, y = torch.from_numpy(to_float(train.images)), torch.from_numpy(train.labels)
    built.router.fc.bias.data -= built.score(x).mean(dim=0).detach()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.05, momentum=0.9)
    for rows in [part for _ in range(6) for part in torch.randperm(1000).split(100)]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(built(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return built.eval()
