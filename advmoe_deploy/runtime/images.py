"""Check of a runner's input, the only one; shape first, then pixels, as they are written or before.

Shapes: N images, C channels, H height, W width.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.errors import InputError, UsageError

# In [0, 1], and nowhere else, the bits of a float32 are a number up to those of 1.
_ONE = int(np.float32(1).view(np.uint32))


def checked_images(images: NDArray[Any], image_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return ``images``, contiguous, if they are what the model takes.

    Raises:
        UsageError: they are not float32 [N, C, H, W] with N >= 1 and the model's C, H, W.
        InputError: a pixel is not finite or outside [0, 1].
    """
    shaped = shaped_images(images, image_shape)
    require_pixels(shaped)
    return shaped


def shaped_images(images: NDArray[Any], image_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return ``images``, contiguous, if the model takes their type and shape.

    Raises:
        UsageError: they are not float32 [N, C, H, W] with N >= 1 and the model's C, H, W.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.float32:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise UsageError(f"images are {kind}; give a float32 array in [0, 1]")
    if images.ndim != 4 or images.shape[1:] != image_shape or len(images) == 0:
        wanted = ", ".join(str(size) for size in image_shape)
        raise UsageError(
            f"images have shape {images.shape}; this model takes [N, {wanted}] with N >= 1"
        )
    return np.ascontiguousarray(images)


def require_pixels(images: NDArray[np.float32]) -> None:
    """Raise :class:`InputError` if a pixel is not finite or outside [0, 1]."""
    if int(images.view(np.uint32).max()) <= _ONE:  # half the time of two bounds
        return
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        raise InputError(
            f"{bad} of {len(images)} images hold pixels that are not finite; drop them"
        )
    if low < 0 or high > 1:
        raise InputError(
            f"pixels reach from {low:.4g} to {high:.4g}; scale them into [0, 1] (divide by 255)"
        )
