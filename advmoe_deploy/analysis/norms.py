"""Formal bounds on how far a whole tensor moves, in l2, per unit of l-inf change of the image.

The companion of the element-wise bounds in slopes.py. Those forget that the elements of a layer
cannot all move as far as each of them can, and grow with the width at every convolution; these
multiply each linear map's largest singular value instead. Both hold for all images, so of two
bounds for one thing the smaller one holds.

A convolution padded with zeros is a part of the circular one on ``size + kernel - 1`` pixels, whose
singular values are those of one small matrix per frequency (Sedghi et al., ICLR 2019), so the
largest of these is an upper bound and nothing is left to the convergence of a power iteration. Of
large images not every frequency is looked at, and the bound is raised by what lies between them. A
strided one is the convolution without stride of the image's phases.

Shapes: O outputs, I inputs, H and W pixels, F frequencies.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The largest slope of GELU, at x = sqrt(2), rounded up.
GELU_SLOPE = 1.1290
UNKNOWN = math.inf

# Frequencies a pixel of the kernel, in each direction; and matrices that are decomposed at once.
_FREQUENCIES, _AT_ONCE = 12, 64
_NORMS: dict[object, float] = {}

PerAxis = tuple[int, int]


class Convolved(NamedTuple):
    """A convolution whose output may yet be scaled channel by channel, and what moves its input."""

    weight: Tensor
    size: PerAxis
    stride: PerAxis
    groups: int
    moved: float

    def scaled(self, scale_O: Tensor | None = None) -> float:
        """Return how far the output moves, channel o multiplied by ``scale_O[o]``."""
        weight = self.weight if scale_O is None else self.weight * scale_O[:, None, None, None]
        return self.moved * conv_norm(weight, self.size, self.stride, self.groups)


def pair_of(value: Any) -> PerAxis:
    """Return (rows, columns) of what may be one number for both."""
    first, *rest = value if isinstance(value, tuple | list) else (value,)
    return int(first), int(rest[0] if rest else first)


def conv_norm(weight: Tensor, size: PerAxis, stride: PerAxis, groups: int = 1) -> float:
    """Return an upper bound of the largest singular value of a zero-padded convolution.

    ``weight`` is [O, I / groups, kernel rows, kernel columns], ``size`` the input's rows, columns.
    """
    return max(_known_norm(part, size, stride) for part in weight.chunk(groups))


def _known_norm(weight: Tensor, size: PerAxis, stride: PerAxis) -> float:
    data = weight.detach().cpu().contiguous().numpy().tobytes()
    key = (weight.shape, size, stride, hashlib.sha256(data).digest())
    if key not in _NORMS:  # the experts' common layers are met once an expert
        _NORMS[key] = _conv_norm(weight.detach().double(), size, stride)
    return _NORMS[key]


def _conv_norm(weight: Tensor, size: PerAxis, stride: PerAxis) -> float:
    weight = _phases(weight, stride)
    # A phase of so many pixels at most, and one more where padding shifts it.
    phase = [-(-n // s) + (s > 1) for n, s in zip(size, stride, strict=True)]
    circle, missed = [], 1.0
    for n, k in zip(phase, weight.shape[2:], strict=True):
        whole, enough = n + k - 1, _FREQUENCIES * k
        circle.append(min(whole, enough))
        if whole > enough:
            # A trigonometric polynomial of degree k // 2 rises so little between its samples
            # (Ehlich & Zeller, 1964).
            missed /= math.cos(math.pi * (k // 2) / enough)
    matrices_FOI = torch.fft.rfft2(weight, s=circle).flatten(2).permute(2, 0, 1)
    if matrices_FOI.shape[1] < matrices_FOI.shape[2]:
        matrices_FOI = matrices_FOI.mT
    largest = max(
        float(torch.linalg.eigvalsh(part.mH @ part)[:, -1].max())
        for part in matrices_FOI.split(_AT_ONCE)
    )
    return missed * math.sqrt(max(0.0, largest))


def _phases(weight: Tensor, stride: PerAxis) -> Tensor:
    """Return the kernel [O, I * phases, ...] that a strided one applies to the image's phases."""
    rows, columns = stride
    padded = F.pad(weight, (0, -weight.shape[3] % columns, 0, -weight.shape[2] % rows))
    o, i, h, w = padded.shape
    split = padded.reshape(o, i, h // rows, rows, w // columns, columns)
    return split.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def matrix_norm(weight: Tensor) -> float:
    """Return the largest singular value of a matrix."""
    return float(torch.linalg.matrix_norm(weight.double(), ord=2))


def batch_norm_scale(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Return what BatchNorm in eval mode multiplies each channel by, up to its sign."""
    weight = kwargs.get("weight", args[3] if len(args) > 3 else None)
    eps = kwargs.get("eps", args[7] if len(args) > 7 else 1e-5)
    scale: Tensor = (args[2] + eps).rsqrt() * (1 if weight is None else weight.abs())
    return scale


def convolved(args: Any, kwargs: Mapping[str, Any]) -> Convolved | None:
    """Return the convolution of a call of conv2d; ``None`` of one that is dilated."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if pair_of(given.get("dilation", 1)) != (1, 1):
        return None
    x, stride = given["input"], pair_of(given.get("stride", 1))
    return Convolved(given["weight"], x.shape[-2:], stride, given.get("groups", 1), x.moved)


def moved_by(name: str, value: Any, args: Any, kwargs: Mapping[str, Any]) -> float:
    """Return how far ``value``, what the function ``name`` made of ``args``, moves at most.

    Arguments that move say how far in ``moved``. What is not known is :data:`UNKNOWN`; then the
    bounds of the elements tell.
    """
    flat = [part for a in args for part in (a if isinstance(a, tuple | list) else [a])]
    tracked = [part for part in flat if hasattr(part, "moved")]
    if not tracked or any(isinstance(a, Tensor | tuple | list) for a in _by_name(kwargs)):
        return UNKNOWN  # rules look at positions
    if name in ("cat", "stack"):
        return math.hypot(*(part.moved for part in tracked))
    if name in _SUMS:
        return math.fsum(part.moved * _growth(part, value) for part in tracked)
    rule = _RULES.get(name)
    if rule is None or len(tracked) != 1:
        return UNKNOWN
    stretch: float = rule(tracked[0], value, args, kwargs)
    return float(tracked[0].moved) * stretch


def _by_name(kwargs: Mapping[str, Any]) -> list[Any]:
    sizes = ("dim", "kernel_size", "stride", "padding", "dilation", "output_size")
    return [value for name, value in kwargs.items() if name not in sizes]


def _growth(part: Tensor, value: Tensor) -> float:
    """Return what repeating ``part`` to the shape of ``value`` does to its norm."""
    return math.sqrt(max(1.0, value.numel() / part.numel()))


def _factor(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    factor: Tensor = torch.as_tensor(args[1] if args[0] is x else args[0])
    largest = float(factor.abs().max())
    return largest * _growth(x, value)


def _division(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    return _growth(x, value) / float(torch.as_tensor(args[1]).abs().min())


def _max_pool(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    kernel = pair_of(kwargs.get("kernel_size", args[1] if len(args) > 1 else None))
    given = kwargs.get("stride", args[2] if len(args) > 2 else None)
    stride = pair_of(given) if given else kernel
    if pair_of(kwargs.get("dilation", args[4] if len(args) > 4 else 1)) != (1, 1):
        return UNKNOWN
    # In so many windows does a pixel lie at most.
    return math.sqrt(math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True)))


def _average(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    return math.sqrt(value.numel() / x.numel())


def _global_average(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    return _average(x, value, args, kwargs) if value.shape[-2:] == (1, 1) else UNKNOWN


def _sum(x: Tensor, value: Tensor, args: Any, kwargs: Mapping[str, Any]) -> float:
    return math.sqrt(x.numel() / value.numel())


def _picked(x: Tensor, value: Any, args: Any, kwargs: Mapping[str, Any]) -> float:
    """Rows taken or put back by an index: one of them, for of several some may be the same."""
    several = [part for a in args[1:] for part in (a if isinstance(a, tuple) else [a])]
    return UNKNOWN if kwargs or not all(map(_picks_once, several)) else 1.0


def _picks_once(index: Any) -> bool:
    """Return whether nothing is taken twice: by slices, by one index, or what is no index."""
    if isinstance(index, Tensor):
        return index.is_floating_point() or index.numel() == 1
    return isinstance(index, int | slice | None) or index is ...


_NormRule = Callable[..., float]
_SUMS = frozenset({"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub"})
_RULES: dict[str, _NormRule] = {
    **dict.fromkeys(
        (
            *("relu", "relu_", "dropout", "pad", "clone", "contiguous", "detach", "to"),
            *("flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze"),
            *("view", "select", "chunk", "split", "tensor_split", "unbind"),
        ),
        lambda *_: 1.0,
    ),
    **dict.fromkeys(("__getitem__", "index_select", "index_add", "index_copy"), _picked),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _factor),
    **dict.fromkeys(("max_pool2d", "_max_pool2d", "boolean_dispatch"), _max_pool),
    **dict.fromkeys(("div", "__truediv__"), _division),
    "expand": lambda x, value, *_: _growth(x, value),
    "adaptive_avg_pool2d": _global_average,
    "mean": _average,
    "sum": _sum,
    "linear": lambda x, value, args, kwargs: matrix_norm(args[1]),
    "gelu": lambda *_: GELU_SLOPE,
    "softmax": lambda *_: 0.5,  # diag(p) - p p^T has no singular value above 1 / 2
}
