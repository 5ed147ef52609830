"""The convolutions that a training step is held against are all of a pathway's."""

from advmoe_deploy.models.backbones.layers import convolve
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.train.recipes import recipe
from benchmarks.training.whole_step import convolved


def test_all_convolutions_of_a_pathway_are_timed() -> None:
    spec = recipe("cifar10-advmoe-cpu").model
    found = convolved(build_model(spec.pathway()).eval(), 1)
    macs = sum(convolve(conv, x, None).numel() * conv.weight[0].numel() for conv, x in found)
    classifier = 10 * 256  # the one linear layer, of half of ResNet-18's 512 channels
    assert macs + classifier == macs_of(spec).selected
