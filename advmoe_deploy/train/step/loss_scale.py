"""Loss scaling, which keeps small gradients from vanishing in float16."""

import torch
from torch import Tensor

_START, _GROW_AFTER = 2.0**14, 1000


class LossScale:
    """A factor on the loss: halved whenever a gradient overflows, doubled after many that do not.

    Off, it is 1 and any overflow is an error.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = _START if enabled else 1.0
        self._good = 0

    def overflowed(self) -> bool:
        """Halve the factor; false if that can not help any more."""
        if not self.enabled or self.factor <= 1:
            return False
        self.factor, self._good = self.factor / 2, 0
        return True

    def fitted(self) -> None:
        """Count a step without overflow."""
        if not self.enabled:
            return
        self._good += 1
        if self._good == _GROW_AFTER:
            self.factor, self._good = self.factor * 2, 0

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs to go on."""
        if not self.enabled:
            return {}
        return {"loss_scale": torch.tensor([self.factor, self._good], dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what a checkpoint holds."""
        if self.enabled:
            factor, good = tensors["loss_scale"].tolist()
            self.factor, self._good = factor, int(good)
