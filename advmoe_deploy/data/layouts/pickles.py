"""Reader of the pickles that CIFAR comes in; runs no code.

Not one callable that a pickle can name is a real one: NumPy's constructors are replaced by the
small classes below, which only keep raw bytes and a shape, and any other name is refused.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advmoe_deploy.errors import DataError, reason_of

_LARGEST_BYTES = 1 << 30
# What reading a damaged pickle ends with.
_DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _DType:
    """Stands for ``numpy.dtype``; of its state, nothing matters to bytes."""

    def __init__(self, code: str | bytes = "", *_: object) -> None:
        self.code = _text(code)

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like."""


class _Array:
    """Stands for ``numpy.ndarray``: a shape and raw bytes, unless they are anything else."""

    def __init__(self, *_: object) -> None:
        self.pixels: npt.NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes]) -> None:
        """Take over what ``numpy.ndarray.__reduce__`` wrote."""
        _, shape, dtype, is_fortran, raw = state
        self._fill(raw, dtype, shape, "F" if is_fortran else "C")

    def _fill(self, raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> "_Array":
        if dtype.code not in ("u1", "uint8", "|u1"):
            raise pickle.UnpicklingError(f"its array is of {dtype.code}, not uint8")
        flat = np.frombuffer(raw, np.uint8)
        self.pixels = flat.reshape(shape, order="F" if order == "F" else "C")
        return self


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    return _Array()._fill(raw, dtype, shape, order)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand for ``_codecs.encode``, by which Python 3 writes bytes into old protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes by {encoding}")
    return text.encode("latin1")


_STAND_INS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Callable[..., object]:
        """Return a stand-in for an allowed name; nothing is ever imported."""
        try:
            stand_in = _STAND_INS[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None
        # A pickle can set attributes of what it is given: of this one, which goes with it.
        return lambda *given: stand_in(*given)


def read_pickle(file: Path) -> dict[str, Any]:
    """Return the dictionary in ``file``: its keys as text, its one kind of array as uint8.

    Raises:
        DataError: it is no such pickle, or it asks for anything but bytes, numbers and uint8.
    """
    if file.stat().st_size > _LARGEST_BYTES:
        raise DataError(f"{file} is above 1 GiB, which no batch of CIFAR is; check the folder")
    try:
        with file.open("rb") as stream:
            found = _Reader(stream, encoding="bytes").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error, 'read')}") from None
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file} is no pickle of plain data ({reason}); nothing in it was run: download it "
            "again"
        ) from None
    return {_text(key): _plain(value) for key, value in found.items()}


def _plain(value: object) -> object:
    if isinstance(value, _Array):
        return value.pixels
    return [_text(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
