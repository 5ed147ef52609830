"""Batches that attacks work on, and the pieces of one that go through a model together.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from advmoe_deploy.models.base import Classifier

# Images of one batch; fixed, for random starts and squares, hence the examples, depend on it.
ATTACK_BATCH = 256
# Of larger images than 64 x 64 a batch has fewer: what a gradient keeps of it must fit into memory.
_BATCH_PIXELS = ATTACK_BATCH * 64**2
# On a CPU. 256 images at once do not fit into its caches: PGD on ResNet-18 at 32 x 32 took 1.3
# times as long as in pieces of 64, and half as much memory again.
_PIECE_PIXELS = 64 * 32**2
_FEWEST = 8


def batch_size(images_NCHW: Tensor) -> int:
    """Return how many of ``images_NCHW`` make a batch; their size alone decides."""
    return _within(images_NCHW, _BATCH_PIXELS)


def piece_size(model: Classifier, images_NCHW: Tensor) -> int:
    """Return how many of ``images_NCHW`` best go through ``model`` together, at most a batch."""
    if model.shares_batch or images_NCHW.device.type != "cpu":
        return batch_size(images_NCHW)
    return _within(images_NCHW, _PIECE_PIXELS)


def pieces(model: Classifier, images: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return ``images``, and what stands ``beside`` them, in pieces; of none, one empty piece."""
    return _split(piece_size(model, images), images, *beside)


def in_pieces(model: Classifier, form: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``form``, which answers as ``model`` in some way, asked piece by piece."""

    def answer(images: Tensor) -> Tensor:
        if not len(images):  # Square asks this when its very first squares end in ties
            return images.new_zeros(0, model.spec.num_classes)
        return torch.cat([form(piece) for (piece,) in pieces(model, images)])

    return answer


def labelled_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return images and labels in batches; of none, one empty batch."""
    return _split(batch_size(images), images, labels)


def _split(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def _within(images_NCHW: Tensor, pixels: int) -> int:
    height, width = images_NCHW.shape[-2:]
    return min(ATTACK_BATCH, max(_FEWEST, pixels // (height * width)))
