"""Weights of a run: those that learn, those that are evaluated, and what resume needs."""

import copy

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe_deploy.attacks.batches import batch_size
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.errors import CheckpointError, DivergedError
from advmoe_deploy.models.backbones.layers import RoutedConv2d
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import first_not_finite, state_of
from advmoe_deploy.models.families.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.balance import even_shift
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.data.loader import Batch
from advmoe_deploy.train.fields import Start
from advmoe_deploy.train.step.learner import Learner
from advmoe_deploy.train.step.transfer import transfer

_RAW = "raw."
_MOMENTUM = "momentum."


class TrainedWeights:
    """A learner and, if the recipe averages weights, their exponential moving average."""

    def __init__(self, fabric: Fabric, config: TrainConfig) -> None:
        self.fabric = fabric
        self.config = config
        self._shared = config.shared_epochs > 0
        self.average: Classifier | None = None
        self._begin(_of_one_pathway(config) if self._shared else config)

    @property
    def evaluated(self) -> Classifier:
        """The model that is measured and kept."""
        pruned = self.learner.pruning.evaluated() if self.learner.pruning else None
        return pruned or self.average or self.learner.model

    def balance_start(self, batch: Batch) -> None:
        """Balance the router on the first images of the run."""
        self.learner.balance_start(batch.parts[0])
        model, average = self.learner.model, self.average
        if isinstance(model, AdvMoE) and isinstance(average, AdvMoE):
            average.router.load_state_dict(model.router.state_dict())  # what is averaged stays

    def even_loads(self, images: Tensor) -> None:
        """Shift the scores until the experts get equally many of these float ``images``."""
        for model in (self.learner.model, self.average):
            if isinstance(model, AdvMoE):
                model.router.fc.bias.data.add_(even_shift(_scores(model, images)))

    def start_from(self, start: Start) -> None:
        """Begin with the weights of a trained model."""
        transfer(self.learner.model, start)
        self._restart_average()

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for ``epoch``, counted from 0."""
        if self._shared and epoch >= self.config.shared_epochs:
            self._part_experts()
        if self.learner.begin_epoch(epoch):
            self._restart_average()

    def step(self, batch: Batch) -> float:
        """Train on one batch and return its loss.

        Raises:
            DivergedError: the loss, a gradient, a weight or a BatchNorm statistic is not finite.
        """
        loss = self.learner.step(batch)
        _require_finite(self.learner.model)
        if self.average is not None:
            self._blend(self.average, 1 - (self.config.ema_decay or 0))
        return loss

    def resume_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs besides the evaluated weights, on the CPU."""
        tensors = {}
        for name, parameter, optimizer in _optimized(self.learner):
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"{_MOMENTUM}{name}"] = buffer.cpu().contiguous()
        if self._keeps_raw:
            state = state_of(self.learner.model)
            tensors |= {f"{_RAW}{name}": tensor for name, tensor in state.items()}
        if self.learner.pruning is not None:
            pruning = self.learner.pruning.tensors()
            tensors |= {name: t.cpu().contiguous() for name, t in pruning.items()}
        return tensors | self.learner.scale.tensors()

    def restore(self, epoch: int, evaluated: Classifier, tensors: dict[str, Tensor]) -> None:
        """Take up the weights and the optimizers of the checkpoint after ``epoch``, from 0.

        Raises:
            CheckpointError: the optimizers' state is not that of this model.
        """
        self.begin_epoch(epoch)
        state = evaluated.state_dict()
        if self.average is not None:
            self.average.load_state_dict(state)
        if self._keeps_raw:
            state = {k.removeprefix(_RAW): t for k, t in tensors.items() if k.startswith(_RAW)}
        self.learner.model.load_state_dict(state)
        self.learner.scale.restore(tensors)
        if self.learner.pruning is not None:
            self.learner.pruning.restore(tensors)
        for name, parameter, optimizer in _optimized(self.learner):
            buffer = tensors.get(f"{_MOMENTUM}{name}")
            if buffer is not None:
                _require_shape(name, parameter, buffer)
                _put_momentum(optimizer, parameter, buffer)

    def _begin(self, config: TrainConfig) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            built = build_model(config.model)
        model = place(self.fabric, built, channels_last=config.channels_last)
        self.learner = Learner(self.fabric, config, model.train())
        self._restart_average()

    def _part_experts(self) -> None:
        """Go on with a mixture each of whose experts has the weights and the momentum so far."""
        one, average = self.learner, self.average
        self._shared = False
        self._begin(self.config)
        _adopt(self.learner.model, one.model)
        if self.average is not None and average is not None:
            _adopt(self.average, average)
        buffers = {name: optimizer.state[p] for name, p, optimizer in _optimized(one)}
        for name, parameter, optimizer in _optimized(self.learner):
            buffer = buffers.get(name, {}).get("momentum_buffer")
            if buffer is not None:
                _put_momentum(optimizer, parameter, _banked(buffer, len(parameter)))

    @property
    def _keeps_raw(self) -> bool:
        """True if the model that learns is not the one that is evaluated."""
        return self.average is not None or self.learner.pruning is not None

    def _restart_average(self) -> None:
        if self.config.ema_decay:
            self.average = copy.deepcopy(self.learner.model)

    @torch.no_grad()
    def _blend(self, average: Classifier, weight: float) -> None:
        ours, theirs = average.state_dict(), self.learner.model.state_dict()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], weight)
            else:
                tensor.copy_(theirs[name])


def _of_one_pathway(config: TrainConfig) -> TrainConfig:
    return without_router(config, name=config.name, model=config.model.pathway())


def _adopt(mixture: Classifier, pathway: Classifier) -> None:
    assert isinstance(mixture, AdvMoE)
    assert isinstance(pathway, DenseClassifier)
    mixture.adopt(pathway)


@torch.no_grad()
def _scores(model: AdvMoE, images: Tensor) -> Tensor:
    with eval_mode(model):
        return torch.cat([model.score(part) for part in torch.split(images, batch_size(images))])


def _banked(tensor: Tensor, rows: int) -> Tensor:
    """Return ``tensor`` once for each expert, which of what all share is one."""
    return tensor.repeat(rows // len(tensor), *[1] * (tensor.dim() - 1))


def _optimized(learner: Learner) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    return [
        (name, parameter, optimizer)
        for group, optimizer in learner.optimizers.items()
        for name, parameter in learner.groups[group].items()
    ]


def _require_shape(name: str, parameter: nn.Parameter, buffer: Tensor) -> None:
    """Refuse what would be spread over the parameter in silence."""
    if buffer.shape != parameter.shape:
        raise CheckpointError(
            f"cannot resume: the momentum of {name} has shape {[*buffer.shape]}, the weight "
            f"{[*parameter.shape]}; delete the newest checkpoint, or train again"
        )


def _put_momentum(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, buffer: Tensor
) -> None:
    # Laid out in memory as the parameter is, for the same fast path as before.
    optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)


def place(fabric: Fabric, model: Classifier, *, channels_last: bool) -> Classifier:
    """Return ``model`` on the device of ``fabric``, in the memory layout asked for.

    Models with strided 1x1 convolutions of fewer than 16 channels keep channels first: the backward
    pass of oneDNN writes past its memory there (uxlfoundation/oneDNN, issue 6035).
    """
    last = channels_last and not any(map(_is_narrow_shortcut, model.modules()))
    layout = torch.channels_last if last else torch.contiguous_format
    return model.to(device=fabric.device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def _is_narrow_shortcut(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv2d, RoutedConv2d)):
        return False
    stride = module.stride if isinstance(module.stride, int) else max(module.stride)
    return stride > 1 and module.weight.shape[2:] == (1, 1) and module.weight.shape[1] < 16


def _require_finite(model: nn.Module) -> None:
    state = model.state_dict()
    # One norm over everything is cheap enough for every step; only a bad one is searched.
    norm = nn.utils.get_total_norm([t for t in state.values() if t.is_floating_point()])
    if not bool(torch.isfinite(norm)) and (bad := first_not_finite(state)):
        raise DivergedError(f"{bad} after the step")
