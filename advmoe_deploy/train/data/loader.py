"""Data loader: this process's share of each training batch, on its device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.data import pixels
from advmoe_deploy.data.augment import augment, random_moves, to_unit
from advmoe_deploy.data.dataset import Split
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.rng import RandomNumbers
from advmoe_deploy.train.data.schedule import epoch_batches, step_generator


@dataclass(frozen=True)
class BatchPart:
    """This process's rows of one part of a batch: augmented float images in [0, 1] and labels.

    ``weight`` is the part's share of the batch, ``share`` how much the mean over these rows counts
    in the mean over the processes of the batch.
    """

    images: Tensor
    labels: Tensor
    weight: float
    share: float
    rng: RandomNumbers


@dataclass(frozen=True)
class Batch:
    """Images of one step, in parts; ``done`` is the share of the run that is over.

    ``step`` counts from 0 in each epoch.
    """

    parts: tuple[BatchPart, ...]
    done: float
    step: int


class DataLoader:
    """Batches of one split in an order known from seed and epoch.

    The images are on the device as uint8. Those of a split so large that it is paged in from a file
    stay where they are, and only a batch goes to the device.
    """

    def __init__(self, fabric: Fabric, config: TrainConfig, split: Split) -> None:
        self._config = config
        self._rank, self._processes = fabric.global_rank, fabric.world_size
        self._device = fabric.device
        large = split.images.nbytes > pixels.IN_MEMORY_BYTES
        images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
        self._images = images if large else images.to(self._device)
        self._labels = labels.to(self._device)
        self.batches_per_epoch = len(self._order(0))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this process's share of each batch of ``epoch``, counted from 0."""
        config, order = self._config, self._order(epoch)
        for step, rows in enumerate(order):
            rng = step_generator(seed=config.seed, epoch=epoch, step=step)
            parts = np.array_split(rows, config.accumulate)
            yield Batch(
                parts=tuple(self._part(part, len(part) / len(rows), rng) for part in parts),
                done=(epoch + step / len(order)) / config.epochs,
                step=step,
            )

    def _part(self, rows: npt.NDArray[np.int64], weight: float, rng: torch.Generator) -> BatchPart:
        config, total = self._config, len(rows)
        mine = slice(self._rank, None, self._processes)
        own = torch.from_numpy(rows[mine])
        images = self._images[own.to(self._images.device)].to(self._device)
        # Drawn for all images of the part, so that no number depends on who has which.
        moves = random_moves(
            total, crop_padding=config.crop_padding, flip=config.flip, generator=rng
        )
        return BatchPart(
            images=to_unit(augment(images, moves.take(mine))),
            labels=self._labels[own.to(self._device)],
            weight=weight,
            share=len(own) * self._processes / total * weight,
            rng=RandomNumbers(rng, total, mine),
        )

    def _order(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        config = self._config
        return epoch_batches(len(self._labels), config.batch_size, seed=config.seed, epoch=epoch)


def on_device(fabric: Fabric, split: Split) -> tuple[Tensor, Tensor]:
    """Return images (uint8) and labels of ``split`` on the device of ``fabric``."""
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return images.to(fabric.device), labels.to(fabric.device)
