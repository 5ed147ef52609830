"""Pictures of images that were attacked, for pages that need no other file."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_PICTURES = 12
_LARGEST = 128  # pixels; pages stay small where images are large


def side(
    image_CHW: NDArray[np.float32], answer: int, label: int, names: Sequence[str]
) -> dict[str, Any]:
    """Return an image and its answer, one side of the macro ``pair``."""
    return {"picture": picture(image_CHW), "answer": names[answer], "right": answer == label}


def picture(image_CHW: NDArray[np.float32]) -> str:
    """Return an image [C, H, W] in [0, 1] as the address of a PNG that holds it itself."""
    pixels_HWC = np.rint(255 * image_CHW).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    flat = pixels_HWC[..., 0] if pixels_HWC.shape[2] in (1, 2) else pixels_HWC[..., :3]
    drawn = Image.fromarray(np.ascontiguousarray(flat))
    drawn.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
