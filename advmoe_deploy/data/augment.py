"""Batched augmentation of uint8 images where they live, on the device (torch).

Shapes: N images, C channels, H height, W width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(
    images_NCHW: Tensor, *, crop_padding: int, flip: bool, generator: torch.Generator
) -> Tensor:
    """Return randomly shifted and flipped copies of uint8 ``images_NCHW``, same shape.

    Each image is padded by ``crop_padding`` black pixels on every side and cropped back at a
    random place, then mirrored with probability one half if ``flip``. ``generator`` is on the
    CPU, so that the same seed gives the same images on every device.
    """
    if crop_padding:
        images_NCHW = _random_crop(images_NCHW, crop_padding, generator)
    if flip:
        mirrored_N = torch.rand(len(images_NCHW), generator=generator) < 0.5
        mirrored_N111 = mirrored_N.to(images_NCHW.device)[:, None, None, None]
        images_NCHW = torch.where(mirrored_N111, images_NCHW.flip(-1), images_NCHW)
    return images_NCHW


def to_unit(images_NCHW: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images_NCHW.float().div_(255)


def _random_crop(images_NCHW: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    n, channels, height, width = images_NCHW.shape
    shifts_2N = torch.randint(2 * padding + 1, (2, n), generator=generator)
    top_N, left_N = shifts_2N.to(images_NCHW.device)
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
