"""Sparse training: a dense network pruned to a small one's cost, under the robust loss.

After HYDRA (Sehwag et al., NeurIPS 2020). Three stages, each with a schedule of its own: the dense
network is trained; its weights are frozen and an importance score for each is learned instead,
through the mask of the highest scores of each layer (straight-through); the weights that are kept
are trained on, at a tenth of the learning rate. Every convolution and linear layer keeps the same
share of its weights, so that the multiply-accumulates that are left can be told beforehand.

The result is an ordinary dense checkpoint whose pruned weights are exactly zero.
"""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.combinations import SPARSE_STAGES
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.step.methods import SCORES, Named, Phase

DENSE, LEARN_SCORES, FINE_TUNE = SPARSE_STAGES
_FINE_TUNE_LR = 0.1
_SCORE, _MASK = "score.", "mask."


class WeightPruning:
    """Pruning of ``model``, and the stage that it is at."""

    def __init__(self, config: TrainConfig, model: Classifier) -> None:
        self.stage = DENSE
        self.density = density_of(config)
        self.scores: Named = {}
        self.masks: dict[str, Tensor] = {}
        self._model = model
        self._epochs = config.epochs
        self._prunable = layer_macs(config.model)[0]

    def begin_epoch(self, epoch: int) -> bool:
        """Go on to the stage of ``epoch``, counted from 0; true if that is another one."""
        stage = stage_of(epoch, self._epochs)
        if stage == self.stage:
            return False
        if self.stage == DENSE:
            self._score_weights()
        if stage == FINE_TUNE:
            self._drop_weights()
        self.stage = stage
        return True

    def taking_part(
        self, groups: dict[str, Named], phases: tuple[Phase, ...]
    ) -> tuple[dict[str, Named], tuple[Phase, ...]]:
        """Return the groups and phases of the stage, given those of the weights."""
        if self.stage != LEARN_SCORES:
            return groups, phases
        return {SCORES: self.scores}, tuple(
            replace(phase, name=SCORES, groups=(SCORES,)) for phase in phases
        )

    def pace(self, done: float) -> tuple[float, float]:
        """Return the share of the stage that is over and the stage's factor on the rate."""
        bounds = stage_bounds(self._epochs)
        index = tuple(SPARSE_STAGES).index(self.stage)
        first, last = bounds[index], bounds[index + 1]
        over = (done * self._epochs - first) / (last - first)
        return over, _FINE_TUNE_LR if self.stage == FINE_TUNE else 1.0

    def call(self, images: Tensor, routes: Routes) -> Tensor:
        """Return the logits of the network of this stage."""
        if self.stage != LEARN_SCORES:
            logits: Tensor = self._model(images, routes)
            return logits
        masked = {}
        for name, score in self.scores.items():
            size = score.abs()
            mask = self._top(size) + (size - size.detach())
            masked[name] = self._weight(name).detach() * mask
        return functional_call(self._model, masked, (images, routes))  # type: ignore[no-any-return]

    def kept(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of the weights that are left."""
        mask = self.masks.get(name) if self.stage == FINE_TUNE else None
        return gradient if mask is None else gradient * mask

    def evaluated(self) -> Classifier | None:
        """Return the pruned network while the model itself still has all weights, else ``None``."""
        if self.stage != LEARN_SCORES:
            return None
        pruned = copy.deepcopy(self._model)
        with torch.no_grad():
            for name, score in self.scores.items():
                pruned.get_parameter(name).mul_(self._top(score.abs()))
        return pruned

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs to go on."""
        scores = {f"{_SCORE}{name}": score.detach() for name, score in self.scores.items()}
        return scores | {f"{_MASK}{name}": mask for name, mask in self.masks.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what a checkpoint of this very stage holds."""
        for name, score in self.scores.items():
            score.data.copy_(tensors[f"{_SCORE}{name}"])
        for name, mask in self.masks.items():
            mask.copy_(tensors[f"{_MASK}{name}"])

    def _weight(self, name: str) -> nn.Parameter:
        return self._model.get_parameter(name)

    def _score_weights(self) -> None:
        for name in self._prunable:
            weight = self._weight(name).detach()
            fan_in = weight[0].numel()
            scale = math.sqrt(6 / fan_in) / weight.abs().max()
            self.scores[name] = nn.Parameter(weight * scale)

    @torch.no_grad()
    def _drop_weights(self) -> None:
        for name, score in self.scores.items():
            self.masks[name] = self._top(score.abs())
            self._weight(name).mul_(self.masks[name])
        self.scores = {}

    def _top(self, size: Tensor) -> Tensor:
        """Return 1 where ``size`` is among the highest of its layer, else 0."""
        count = max(1, round(self.density * size.numel()))
        mask = torch.zeros_like(size).flatten()
        return mask.index_fill_(0, size.flatten().topk(count).indices, 1).view_as(size)


def stage_bounds(epochs: int) -> tuple[int, int, int, int]:
    """Return the epochs, counted from 0, at which the stages begin, and the end of the last."""
    dense, scores, _ = SPARSE_STAGES.values()
    first = min(max(1, round(epochs * dense)), epochs - 2)
    second = first + min(max(1, round(epochs * scores)), epochs - first - 1)
    return (0, first, second, epochs)


def stage_of(epoch: int, epochs: int) -> str:
    """Return the stage of ``epoch``, counted from 0."""
    _, first, second, _ = stage_bounds(epochs)
    return DENSE if epoch < first else LEARN_SCORES if epoch < second else FINE_TUNE


def is_selectable(config: TrainConfig, epoch: int) -> bool:
    """Return whether the model after ``epoch``, counted from 0, may be the run's result."""
    return config.method != "sparse" or stage_of(epoch, config.epochs) == FINE_TUNE


def density_of(config: TrainConfig) -> float:
    """Return the share of each layer's weights to keep.

    Unless it is set, the one that leaves the multiply-accumulates of the S-Dense network.
    """
    if config.sparse_density is not None:
        return config.sparse_density
    layers, others = layer_macs(config.model)
    small, small_others = layer_macs(config.model.model_copy(update={"ratio": config.sparse_ratio}))
    target = sum(small.values()) + small_others
    return (target - others) / sum(layers.values())


def nonzero_macs(model: Classifier) -> tuple[int, float]:
    """Return the multiply-accumulates with weights that are not zero, and those weights' share."""
    layers, others = layer_macs(model.spec)
    weights = {name: model.get_parameter(name) for name in layers}
    nonzero = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    macs = sum(round(layers[n] * nonzero[n] / weights[n].numel()) for n in layers)
    density = sum(nonzero.values()) / sum(weight.numel() for weight in weights.values())
    return macs + others, density


def layer_macs(spec: ModelSpec) -> tuple[dict[str, int], int]:
    """Return the multiply-accumulates of each weight of a dense network, and all others'."""
    with torch.device("meta"):
        model = build_model(spec).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *spec.image_shape))
    root = type(model).__name__
    by_module = counter.get_flop_counts()
    layers = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        # One multiply-accumulate is two floating-point operations.
        flops = sum(by_module.get(f"{root}.{module}", {}).values())
        if last == "weight" and parameter.dim() > 1 and flops:
            layers[name] = flops // 2
    return layers, counter.get_total_flops() // 2 - sum(layers.values())
