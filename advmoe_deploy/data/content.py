"""Fingerprint of the images of a data set, whatever its files are called and wherever they lie.

Shapes: N images, C channels, H height, W width.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from advmoe_deploy.data.dataset import Split
from advmoe_deploy.files import write_atomically
from advmoe_deploy.specs import Fingerprint

_DIGEST_BYTES = 32


def digests_of(images_NCHW: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return the SHA-256 of each image's pixels.

    Those of images that live in a file are kept beside it, so that they are read once.
    """
    if not isinstance(images_NCHW, np.memmap) or images_NCHW.filename is None:
        return [hashlib.sha256(image.tobytes()).digest() for image in images_NCHW]
    kept = Path(images_NCHW.filename).with_suffix(".sha256")
    if not kept.is_file() or kept.stat().st_size != _DIGEST_BYTES * len(images_NCHW):
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images_NCHW]
        write_atomically(kept, b"".join(digests))
    raw = kept.read_bytes()
    return [raw[at : at + _DIGEST_BYTES] for at in range(0, len(raw), _DIGEST_BYTES)]


def fingerprint_of(
    splits: tuple[Split, Split, Split], digests: tuple[Sequence[bytes], ...]
) -> Fingerprint:
    """Return the fingerprint of training, hold-out and test images with these digests."""
    labels = [split.labels.tolist() for split in splits]
    shape = repr(splits[2].images.shape[1:]).encode()
    learned = _grouped([*digests[0], *digests[1]], [*labels[0], *labels[1]])
    tested = _grouped(digests[2], labels[2])
    dealt = hashlib.sha256(shape)
    for each, own_labels in zip(digests, labels, strict=True):
        dealt.update(b"".join(each) + np.asarray(own_labels, "<i8").tobytes())
    return Fingerprint(
        images=hashlib.sha256(shape + learned + tested).hexdigest(), dealt=dealt.hexdigest()
    )


def _grouped(digests: Sequence[bytes], labels: Sequence[int]) -> bytes:
    """Return a hash of which images are of one class, in any order, whatever its name or number."""
    classes: dict[int, set[bytes]] = {}
    for digest, label in zip(digests, labels, strict=True):
        classes.setdefault(label, set()).add(digest)
    groups = (hashlib.sha256(b"".join(sorted(each))).digest() for each in classes.values())
    return hashlib.sha256(b"".join(sorted(groups))).digest()
