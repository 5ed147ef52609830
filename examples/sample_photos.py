"""Cut small photographs of three classes out of scikit-learn's two sample images.

    python examples/sample_photos.py photos [IMAGES]

They lie as your own would: photos/flower/*.jpg, photos/leaves/*.jpg, photos/palace/*.jpg.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 96
# Which of the two images, and the first and last row and column of what shows the class.
AREAS = {
    "flower": (1, (90, 330), (180, 460)),
    "leaves": (1, (0, 200), (470, 640)),
    "palace": (0, (120, 380), (60, 560)),
}


def main(folder: Path, images: int) -> None:
    """Write so many crops of each class, always the same ones."""
    photographs, random = load_sample_images().images, np.random.default_rng(0)
    for name, (photograph, rows, columns) in AREAS.items():
        (folder / name).mkdir(parents=True)
        for index in range(images):
            top, left = (random.integers(low, high - SIDE) for low, high in (rows, columns))
            crop = photographs[photograph][top : top + SIDE, left : left + SIDE]
            Image.fromarray(crop).save(folder / name / f"{index:02}.jpg", quality=92)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
