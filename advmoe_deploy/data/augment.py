"""Batched augmentation of uint8 images, on the device that holds them (torch).

Random numbers are drawn first, for a whole batch, and applied to any share of it: processes
that share a batch draw the same and each moves its own images.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Moves:
    """Shifts of images, by up to ``crop_padding`` pixels, and which are mirrored."""

    crop_padding: int
    shifts_2N: Tensor | None
    mirrored_N: Tensor | None

    def take(self, rows: slice) -> "Moves":
        """Return the moves of these images."""
        shifts_2N, mirrored_N = self.shifts_2N, self.mirrored_N
        return Moves(
            self.crop_padding,
            None if shifts_2N is None else shifts_2N[:, rows],
            None if mirrored_N is None else mirrored_N[rows],
        )


def random_moves(n: int, *, crop_padding: int, flip: bool, generator: torch.Generator) -> Moves:
    """Return moves for ``n`` images; ``generator`` is on the CPU, the same for every device."""
    shifts_2N = mirrored_N = None
    if crop_padding:
        shifts_2N = torch.randint(2 * crop_padding + 1, (2, n), generator=generator)
    if flip:
        mirrored_N = torch.rand(n, generator=generator) < 0.5
    return Moves(crop_padding, shifts_2N, mirrored_N)


def augment(images_NCHW: Tensor, moves: Moves) -> Tensor:
    """Return shifted and mirrored copies of uint8 ``images_NCHW``, same shape.

    Each image is padded by black pixels on every side and cropped back at its shift.
    """
    device = images_NCHW.device
    if moves.shifts_2N is not None:
        images_NCHW = _crop(images_NCHW, moves.crop_padding, moves.shifts_2N.to(device))
    if moves.mirrored_N is not None:
        mirrored_N111 = moves.mirrored_N.to(device)[:, None, None, None]
        images_NCHW = torch.where(mirrored_N111, images_NCHW.flip(-1), images_NCHW)
    return images_NCHW


def to_unit(images_NCHW: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images_NCHW.float().div_(255)


def _crop(images_NCHW: Tensor, padding: int, shifts_2N: Tensor) -> Tensor:
    n, channels, height, width = images_NCHW.shape
    top_N, left_N = shifts_2N
    device = images_NCHW.device
    rows_NH = top_N[:, None] + torch.arange(height, device=device)
    columns_NW = left_N[:, None] + torch.arange(width, device=device)
    padded = F.pad(images_NCHW, (padding, padding, padding, padding))
    return padded[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows_NH[:, None, :, None],
        columns_NW[:, None, None, :],
    ]
