"""Bounds of whole tensors: never below what a linear map does, and close to it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.analysis.lipschitz import lipschitz_constants
from advmoe_deploy.analysis.norms import conv_norm
from advmoe_deploy.analysis.slopes import in_float64, sloped_image, with_slope
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.specs import ThreatModel
from tests.analysis.toy_routes import BOUNDED, digits_model
from tests.toys import LinearClassifier, toy_spec


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "groups"),
    [
        ((6, 4, 3, 3), 1, 1, 1),
        ((6, 4, 3, 3), 2, 1, 1),
        ((4, 6, 1, 1), 2, 0, 1),
        ((4, 3, 7, 7), 2, 3, 1),
        ((6, 2, 3, 2), (1, 2), (1, 0), 3),
        ((5, 3, 3, 3), 1, 4, 1),
        ((2, 1, 2, 1), 1, 0, 1),
    ],
)
def test_a_convolution_is_bounded_closely(
    weight: tuple[int, ...], stride: int, padding: int, groups: int
) -> None:
    kernel, size = random(*weight), (9, 8)
    channels = weight[1] * groups
    basis = torch.eye(channels * math.prod(size), dtype=torch.float64)
    images = basis.view(-1, channels, *size)
    columns = F.conv2d(images, kernel, None, stride, padding, 1, groups).flatten(1)
    exact = float(torch.linalg.matrix_norm(columns, ord=2))
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    bound = conv_norm(kernel, size, strides, groups)
    assert exact * (1 - 1e-9) <= bound <= 1.25 * exact


def test_batch_norm_is_bounded_together_with_its_convolution() -> None:
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([5.0, 0.1, 0.1, -0.1])
    conv.weight.data[0] *= 0.01  # the channel that BatchNorm makes large is a small one
    network = in_float64(nn.Sequential(conv, norm))
    image = sloped_image((3, 6, 6))
    apart = image.moved * 5 * conv_norm(network[0].weight, (6, 6), (1, 1))
    assert network(image).moved < 0.1 * apart


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.AvgPool2d(2)])
def test_pooling_moves_no_more_than_is_said(pool: nn.Module) -> None:
    bumps = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    bumps[0, 0, 2, 2] = 1  # where two by two windows of three meet
    x = with_slope(torch.zeros_like(bumps), torch.ones_like(bumps), moved=1.0)
    assert float(pool(bumps).norm()) <= pool(x).moved


@pytest.mark.parametrize("family", BOUNDED)
def test_no_two_images_end_further_apart_than_the_bound(family: str) -> None:
    model, x, _ = digits_model(family, 16)
    double, routes = in_float64(model), model.forced(1)
    moved = double(sloped_image(model.spec.image_shape), routes).moved
    near = x.double() + 0.01 * random(*x.shape)
    with torch.no_grad():
        apart_N = (double(near, model.forced(1)) - double(x.double(), model.forced(1))).norm(dim=1)
    distance_N = (near - x.double()).abs().amax(dim=(1, 2, 3))
    assert (apart_N <= moved * distance_N).all()


def test_rows_that_are_repeated_move_further() -> None:
    x = with_slope(torch.ones(1, 4), torch.ones(1, 4))
    assert x.moved == 2
    assert x.expand(9, 4).moved == pytest.approx(6)
    assert x[torch.tensor([0, 0, 0, 0])].moved == pytest.approx(4)
    assert (x + torch.zeros(4, 4)).moved == pytest.approx(4)
    assert torch.cat([x, x]).moved == pytest.approx(math.sqrt(8))
    assert x.mean(dim=1).moved == 1
    assert x.sum().moved == 4
    assert (x * torch.tensor([1.0, -3.0, 0.0, 0.0])).moved == pytest.approx(math.sqrt(10))
    assert (x / 4).moved == 0.5
    assert x.softmax(dim=1).moved == 1
    y = with_slope(torch.ones(2, 4), torch.ones(2, 4))
    for repeated in (
        y[[0, 0, 0]],
        y[np.asarray([0, 1, 1])],
        y.index_select(0, torch.tensor([0] * 9)),
    ):
        assert repeated.moved == pytest.approx(float(repeated.slope.norm()))
    assert y.index_select(dim=0, index=torch.tensor([0] * 9)).moved == pytest.approx(6)
    assert torch.cat(tensors=[x, x]).moved == pytest.approx(math.sqrt(8))
    zero = torch.zeros(1, 4)
    added = zero.index_add(0, torch.tensor([0]), x, alpha=3)
    assert added.moved == pytest.approx(6)
    wide = with_slope(torch.zeros(1, 1, 9, 9), torch.ones(1, 1, 9, 9), moved=1.0)
    pooled = F.max_pool2d(wide, 3, 2, dilation=2)
    assert pooled.moved == pytest.approx(float(pooled.slope.norm()))


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 2, 3), (2, 2, 5, 5), (2, 3, 1, 1)])
def test_of_large_images_few_frequencies_are_enough(shape: tuple[int, ...]) -> None:
    kernel = random(*shape)
    every = torch.fft.rfft2(kernel, s=(200, 200)).flatten(2).permute(2, 0, 1)
    exact = float(torch.linalg.matrix_norm(every, ord=2).max())
    bound = conv_norm(kernel, (199, 199), (1, 1))
    assert exact * (1 - 1e-9) <= bound <= 1.02 * exact


def test_steeper_places_are_climbed_to() -> None:
    """A ReLU that wakes up beyond every image: no image and no point near one meets its slope."""
    model, kink = LinearClassifier(toy_spec(), torch.zeros(2, 16), torch.zeros(2)), 0.9

    def forward(images: Tensor, routes: Routes | None = None) -> Tensor:
        mean_N = images.mean(dim=(1, 2, 3))
        rising_N = 0.1 * mean_N + 50 * (mean_N - kink).relu()
        return torch.stack([torch.ones_like(mean_N), rising_N], dim=1)

    model.forward = forward
    images = torch.full((3, 1, 4, 4), 0.5)
    (constant,) = lipschitz_constants(model, images, ThreatModel(epsilon=0.1))
    assert constant.sampled == pytest.approx(50.1, rel=1e-4)
