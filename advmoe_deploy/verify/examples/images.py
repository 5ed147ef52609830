"""Test images that a bundle is verified on."""

from collections.abc import Mapping

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.models.stored import fingerprint_in
from advmoe_deploy.verify.trial import Images, Labels


def source_of(bundle: Bundle, data: str | None) -> str:
    """Return the data source ``data``, or without one that which the model was trained on."""
    manifest = bundle.manifest
    return absolute(data or str(manifest.training.get("data", "")), manifest.model.image_size)


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
    manifest = bundle.manifest
    known = fingerprint_in(manifest.training)
    trained = Trained(manifest.model, manifest.class_names, manifest.decoding, known)
    return matching_test_images(source, trained, count, class_map=class_map)
