"""Upright images in the colours of a model, from loaded ones of any mode, a part at a time.

Pixels between the two (16 bits as 32, colours of a palette, turned) exist for a part of the image
only. It is not scaled in parts: which of its directions Pillow scales first depends on
the whole, and so does the last bit of a pixel.
"""

from collections.abc import Callable, Iterator

from PIL import Image

PIXELS_AT_ONCE = 1 << 22
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations in which the first row, or the first column, of the file comes last.
_LAST_ROW_FIRST = (3, 4, 6, 7)
_LAST_COLUMN_FIRST = (2, 3, 7, 8)


def upright(
    image: Image.Image, orientation: int, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Return ``image`` as it is to be seen, in ``mode``, which ``convert`` gives to each part.

    Args:
        image: a loaded image.
        orientation: as EXIF counts; what is none of 2 to 8 turns nothing.
        mode: of the result; an image of that mode is taken as it is.
        convert: from a part of the image to the same part in ``mode``, pixel by pixel.
    """
    turn = _TURNS.get(orientation)
    if image.mode == mode and turn is None:
        return image
    width, height = image.size
    lies = turn is not None and orientation >= 5
    canvas = Image.new(mode, (height, width) if lies else (width, height))
    for left, top, right, bottom in _parts(width, height):
        part = convert(image.crop((left, top, right, bottom)))
        part = part if turn is None else part.transpose(turn)
        x = width - right if orientation in _LAST_COLUMN_FIRST else left
        y = height - bottom if orientation in _LAST_ROW_FIRST else top
        canvas.paste(part, (y, x) if lies else (x, y))
    return canvas


def _parts(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the boxes that cover an image: bands of rows, or pieces of very long rows."""
    across = min(width, PIXELS_AT_ONCE)
    down = PIXELS_AT_ONCE // across
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)
