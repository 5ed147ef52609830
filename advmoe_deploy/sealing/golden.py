"""Golden images of a bundle, read without trust in the file's own figures.

Shapes: N images of C channels, H rows and W columns.
"""

import math
import tokenize
import zipfile
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.bundle import GOLDEN, Bundle
from advmoe_deploy.errors import BundleError

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_SUFFIX = ".npy"
# What NumPy and zipfile raise of headers that were made up.
_HOSTILE = (
    *(ValueError, KeyError, OSError, RuntimeError, MemoryError, OverflowError, EOFError),
    *(SyntaxError, TypeError, zipfile.BadZipFile, tokenize.TokenError),
)


def golden_arrays(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """Return the arrays of the bundle's golden file by name, checked to be what its model has.

    They are ``images`` [N, C, H, W], ``logits`` [N, classes] and of each routed layer ``scores``,
    ``expert_ids`` and ``weights``.

    Raises:
        BundleError: there is none, it is not what was exported, or it holds something else.
    """
    content = bundle.read(GOLDEN)
    try:
        arrays = read_arrays(content)
        shape = arrays["images"].shape if "images" in arrays else ()
        _require_answers(bundle, arrays, shape[:1])
    except _HOSTILE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BundleError(
            f"{bundle.path / GOLDEN} cannot be read: {reason}; export the bundle again"
        ) from None
    expected = bundle.manifest.model.image_shape
    if shape[1:] != expected or not len(arrays["images"]):
        raise BundleError(
            f"{bundle.path / GOLDEN} holds images of shape {[*shape]}, and the model takes "
            f"[N, {', '.join(map(str, expected))}]; export the bundle again"
        )
    return arrays


def _require_answers(
    bundle: Bundle, arrays: dict[str, NDArray[Any]], images: tuple[int, ...]
) -> None:
    """Raise :class:`ValueError` where what the model answered is not there."""
    model, float32 = bundle.manifest.model, np.dtype(np.float32)
    expected: dict[str, tuple[np.dtype[Any], int, tuple[int, ...]]]
    expected = {"images": (float32, 4, ()), "logits": (float32, 2, (*images, model.num_classes))}
    for route in bundle.manifest.plan.routes:
        rows = images if route.tokens is None else (*images, route.tokens)
        chosen = (*rows, route.top_k)
        expected[f"{route.layer}.scores"] = float32, len(chosen), rows
        expected[f"{route.layer}.weights"] = float32, len(chosen), chosen
        expected[f"{route.layer}.expert_ids"] = np.dtype(np.int64), len(chosen), chosen
    for name, (dtype, axes, sizes) in expected.items():
        if name not in arrays:
            raise ValueError(f"it has no '{name}'")
        found = arrays[name]
        if found.dtype != dtype or found.ndim != axes or found.shape[: len(sizes)] != sizes:
            raise ValueError(f"'{name}' is {found.dtype} of shape {[*found.shape]}")


def read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """Return the numeric arrays of an uncompressed .npz; they take no more memory than the file.

    Raises:
        ValueError: it is compressed, holds objects, or an array is larger or smaller than it says.
        BadZipFile: it is no zip file.
    """
    with zipfile.ZipFile(BytesIO(content)) as archive:
        members = archive.infolist()
        stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
        if any(m.flag_bits & 1 for m in members):
            raise ValueError("it is encrypted")
        if not stored or sum(m.file_size for m in members) > len(content):
            raise ValueError("it is compressed, and might need any amount of memory")
        return {m.filename.removesuffix(_SUFFIX): _array(archive.read(m)) for m in members}


def _array(content: bytes) -> NDArray[Any]:
    stream = BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of its arrays is unknown")
    shape, fortran, dtype = _HEADERS[version](stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype} where numbers are expected")
    begin, count = stream.tell(), math.prod(shape)
    if min(shape, default=0) < 0 or begin + count * dtype.itemsize != len(content):
        raise ValueError(f"an array of shape {[*shape]} has {len(content) - begin} bytes")
    flat = np.frombuffer(content, dtype, count, begin)
    return flat.reshape(shape, order="F" if fortran else "C").copy()
