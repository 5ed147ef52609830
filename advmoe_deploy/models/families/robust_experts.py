"""Robust Experts (arXiv 2509.05086): a ResNet some of whose layers are banks of experts.

*BlockMoE*: each expert is a whole residual block with BatchNorms of its own. *ConvMoE*: each expert
is one convolution, and the BatchNorm behind the bank is shared. Either way a gate looks at the
layer's own input. Modules are named and laid out as torchvision does it: the stride of a bottleneck
is in its 3x3 convolution.

In training a block expert's BatchNorm sees the rows that were sent to that expert, as in the
released code; so ``grouped`` and ``masked`` execution of a BlockMoE agree in eval mode only.

Shapes: N images, C channels, H height, W width, E experts, K experts per image.
"""

import copy
import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.families import BLOCKS_PER_STAGE, expert_modules
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.expert_batch_norm import BatchNorm2d
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.gates import build_gate
from advmoe_deploy.models.routing.routing import Routes, RoutingRule
from advmoe_deploy.specs import ModelSpec


class ExpertBank(nn.Module):
    """A gate and its experts, in the place of the module they are copies of."""

    def __init__(self, rule: RoutingRule, gate: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.rule = rule
        self.gate = gate
        self.experts = nn.ModuleList(experts)

    def forward(self, x_NCHW: Tensor, routes: Routes) -> Tensor:
        """Return the weighted sum of what each image's experts make of it."""
        routing = routes.decide(self.rule, self.gate, x_NCHW)
        return run_experts(routing, x_NCHW, list(self.experts), routes.execution)


class Block(nn.Module):
    """A residual block, any convolution of which may be a bank; as an expert it routes nothing."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.convs_and_norms(in_channels, channels, stride)
        self.downsample: nn.ModuleList | None = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.ModuleList([conv, BatchNorm2d(out_channels)])

    def convs_and_norms(self, in_channels: int, channels: int, stride: int) -> None:
        """Make the convolutions of the residual branch and the BatchNorms behind them."""
        self.conv1: nn.Module = nn.Conv2d(
            in_channels, channels, 3, stride=stride, padding=1, bias=False
        )
        self.bn1 = BatchNorm2d(channels)
        self.conv2: nn.Module = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)

    def residual(self, x_NCHW: Tensor, routes: Routes | None) -> Tensor:
        """Return the residual branch, before the shortcut is added."""
        h = F.relu(self.bn1(_meet(self.conv1, x_NCHW, routes)))
        residual: Tensor = self.bn2(_meet(self.conv2, h, routes))
        return residual

    def forward(self, x_NCHW: Tensor, routes: Routes | None = None) -> Tensor:
        """Return [N, channels * expansion, H / stride, W / stride]."""
        h = self.residual(x_NCHW, routes)
        skip = x_NCHW
        if self.downsample is not None:
            conv, norm = self.downsample
            skip = norm(_meet(conv, x_NCHW, routes))
        return F.relu(h + skip)


class Bottleneck(Block):
    """A residual block of a 1x1, a 3x3 and a 1x1 convolution."""

    expansion = 4

    def convs_and_norms(self, in_channels: int, channels: int, stride: int) -> None:
        """Make the convolutions of the residual branch and the BatchNorms behind them."""
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.conv3: nn.Module = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = BatchNorm2d(channels * self.expansion)

    def residual(self, x_NCHW: Tensor, routes: Routes | None) -> Tensor:
        """Return the residual branch, before the shortcut is added."""
        h = F.relu(super().residual(x_NCHW, routes))
        residual: Tensor = self.bn3(_meet(self.conv3, h, routes))
        return residual


def _meet(layer: nn.Module, x_NCHW: Tensor, routes: Routes | None) -> Tensor:
    y: Tensor = layer(x_NCHW, routes) if isinstance(layer, ExpertBank) else layer(x_NCHW)
    return y


class RobustExperts(Classifier):
    """ResNet-18 or ResNet-50 whose ``spec.expert_layers`` are banks of experts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        kernel, stride = (3, 1) if spec.stem == "small" else (7, 2)
        self.conv1 = nn.Conv2d(
            spec.in_channels, spec.width, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn1 = BatchNorm2d(spec.width)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(spec)
        block = Bottleneck if spec.backbone == "resnet50" else Block
        self.fc = nn.Linear(8 * spec.width * block.expansion, spec.num_classes)
        for module in self.modules():
            _initialise(module)
        self.rules = self._insert_banks()

    def _insert_banks(self) -> tuple[RoutingRule, ...]:
        """Put a bank in the place of each expert layer and return their rules, in order."""
        spec = self.spec
        layers = spec.expert_layers
        assert layers is not None
        rules = []
        for name in expert_modules(spec.backbone, layers.kind, layers.layers):
            dense = self.get_submodule(name)
            conv = dense if layers.kind == "conv" else dense.get_submodule("conv1")
            assert isinstance(conv, nn.Conv2d)
            dropped = spec.dropped_experts.get(name, ())
            rule = RoutingRule(name, spec.num_experts, spec.top_k, spec.weighting, dropped)
            gate = build_gate(layers.gate, conv.in_channels, spec.num_experts)
            experts = [_fresh_copy(dense) for _ in range(spec.num_experts)]
            self.set_submodule(name, ExpertBank(rule, gate, experts))
            rules.append(rule)
        return tuple(rules)

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]."""
        routes = routes or Routes()
        h = F.relu(self.bn1(self.conv1(self.normalise(images))))
        if self.spec.stem == "imagenet":
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for block in itertools.chain(self.layer1, self.layer2, self.layer3, self.layer4):
            h = block(h, routes)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


def _stages(spec: ModelSpec) -> list[nn.ModuleList]:
    kind = Bottleneck if spec.backbone == "resnet50" else Block
    channels = spec.width
    stages = []
    for index, count in enumerate(BLOCKS_PER_STAGE[spec.backbone]):
        width = spec.width * 2**index
        blocks = nn.ModuleList()
        for stride in [1 if index == 0 else 2] + [1] * (count - 1):
            blocks.append(kind(channels, width, stride))
            channels = width * kind.expansion
        stages.append(blocks)
    return stages


def _fresh_copy(dense: nn.Module) -> nn.Module:
    expert = copy.deepcopy(dense)
    for module in expert.modules():
        _initialise(module)
    return expert


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
