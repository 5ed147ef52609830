"""Test images that a bundle is verified on."""

from collections.abc import Mapping

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.parity.answers import Images, Labels


def source_of(bundle: Bundle, data: str | None) -> str:
    """Return the data source ``data``, or without one that which the model was trained on."""
    return absolute(data or bundle.manifest.data, bundle.manifest.model.image_size)


def images_of(
    bundle: Bundle,
    source: str,
    count: int | None,
    class_map: Mapping[str, str] | None = None,
) -> tuple[Images, Labels]:
    """Return the first ``count`` test images [N, C, H, W] of ``source``, and their labels.

    Raises:
        UsageError: the data do not fit the model.
        DataError: the data cannot be read.
    """
    trained = Trained.of(bundle.manifest)
    return matching_test_images(source, trained, count, class_map=class_map)
