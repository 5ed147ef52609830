"""The training images where they are used: uint8 on the device, a share of each batch at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.data.augment import augment, to_unit
from advmoe_deploy.data.dataset import Split
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.schedule import epoch_batches, step_generator


@dataclass(frozen=True)
class Batch:
    """This process's share of one batch: augmented float images in [0, 1] and their labels.

    ``share`` is how much its rows count in the mean over the processes, ``done`` the share of
    the run that is over, ``rng`` the step's own random numbers, on the CPU.
    """

    images: Tensor
    labels: Tensor
    share: float
    done: float
    rng: torch.Generator


class Feed:
    """Batches of one split in an order known from seed and epoch."""

    def __init__(self, fabric: Fabric, config: TrainConfig, split: Split) -> None:
        self._config = config
        self._rank, self._processes = fabric.global_rank, fabric.world_size
        self._images, self._labels = on_device(fabric, split)
        self.batches_per_epoch = len(self._order(0))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this process's share of each batch of ``epoch``, counted from 0."""
        config, order = self._config, self._order(epoch)
        for step, batch in enumerate(order):
            rng = step_generator(seed=config.seed, epoch=epoch, step=step, rank=self._rank)
            mine = batch[self._rank :: self._processes]
            rows = torch.from_numpy(mine).to(self._images.device)
            images = augment(
                self._images[rows],
                crop_padding=config.crop_padding,
                flip=config.flip,
                generator=rng,
            )
            yield Batch(
                images=to_unit(images),
                labels=self._labels[rows],
                share=len(mine) * self._processes / len(batch),
                done=(epoch + step / len(order)) / config.epochs,
                rng=rng,
            )

    def _order(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        config = self._config
        return epoch_batches(len(self._labels), config.batch_size, seed=config.seed, epoch=epoch)


def on_device(fabric: Fabric, split: Split) -> tuple[Tensor, Tensor]:
    """Return images (uint8) and labels of ``split`` on the device of ``fabric``."""
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return images.to(fabric.device), labels.to(fabric.device)
