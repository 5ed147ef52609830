"""The weights of a run: those that learn, those that are evaluated, and what resume needs."""

import copy

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.checkpoint import first_not_finite, state_of
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.feed import Batch
from advmoe_deploy.train.learner import Learner

_RAW = "raw."
_MOMENTUM = "momentum."


class TrainedWeights:
    """A learner and, if the recipe averages weights, their exponential moving average."""

    def __init__(self, fabric: Fabric, config: TrainConfig) -> None:
        self.fabric = fabric
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = place(fabric, build_model(config.model))
        self.learner = Learner(fabric, config, model.train())
        self.average = copy.deepcopy(model) if config.ema_decay else None

    @property
    def evaluated(self) -> Classifier:
        """The model that is measured and kept."""
        return self.average or self.learner.model

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

    def end_epoch(self) -> None:
        """Give all processes the same buffers."""
        for model in (self.learner.model, self.average):
            if model is not None:
                self._average_buffers(model)

    def resume_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs besides the evaluated weights, on the CPU."""
        tensors = {}
        for name, parameter, optimizer in self._optimized():
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"{_MOMENTUM}{name}"] = buffer.cpu().contiguous()
        if self.average is not None:
            state = state_of(self.learner.model)
            tensors |= {f"{_RAW}{name}": tensor for name, tensor in state.items()}
        return tensors

    def restore(self, evaluated: Classifier, tensors: dict[str, Tensor]) -> None:
        """Take up the weights and the optimizers of a checkpoint."""
        state = evaluated.state_dict()
        if self.average is not None:
            self.average.load_state_dict(state)
            raw = {k.removeprefix(_RAW): t for k, t in tensors.items() if k.startswith(_RAW)}
            state = raw
        self.learner.model.load_state_dict(state)
        for name, parameter, optimizer in self._optimized():
            buffer = tensors.get(f"{_MOMENTUM}{name}")
            if buffer is not None:
                # Laid out in memory as the parameter is, for the same fast path as before.
                like = torch.empty_like(parameter).copy_(buffer)
                optimizer.state[parameter]["momentum_buffer"] = like

    def _optimized(self) -> list[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        learner = self.learner
        return [
            (name, parameter, learner.optimizers[group])
            for group, named in learner.groups.items()
            for name, parameter in named.items()
        ]

    @torch.no_grad()
    def _blend(self, average: Classifier, weight: float) -> None:
        ours, theirs = average.state_dict(), self.learner.model.state_dict()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name], weight)
            else:
                tensor.copy_(theirs[name])

    def _average_buffers(self, model: Classifier) -> None:
        if self.fabric.world_size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                mean = self.fabric.all_reduce(buffer, reduce_op="mean")
                assert isinstance(mean, Tensor)
                buffer.copy_(mean)


def place(fabric: Fabric, model: Classifier) -> Classifier:
    """Return ``model`` on the device of ``fabric``, in the memory layout its kernels like best."""
    return model.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _require_finite(model: nn.Module) -> None:
    state = model.state_dict()
    # One norm over everything is cheap enough for every step; only a bad one is searched.
    norm = nn.utils.get_total_norm([t for t in state.values() if t.is_floating_point()])
    if not bool(torch.isfinite(norm)) and (bad := first_not_finite(state)):
        raise DivergedError(f"{bad} after the step")
