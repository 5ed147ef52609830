"""Statistics of data sets, for models and augmentation."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageSet:
    """A data set's classes, size and pixel statistics; crops are padded by an eighth."""

    name: str
    num_classes: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stem: str = "small"

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the ModelSpec of any network for these images."""
        return {
            "num_classes": self.num_classes,
            "image_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "stem": self.stem,
        }

    @property
    def crop_padding(self) -> int:
        """Pixels of padding before a random crop."""
        return self.size // 8


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGE_SETS = {
    images.name: images
    for images in (
        ImageSet("cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ImageSet("cifar100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ImageSet("tiny-imagenet", 200, 64, _IMAGENET_MEAN, _IMAGENET_STD),
        ImageSet("imagenet", 1000, 224, _IMAGENET_MEAN, _IMAGENET_STD, stem="imagenet"),
    )
}
