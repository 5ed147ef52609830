"""Formal upper bounds on the slopes of a network's outputs, element by element.

Run a network on a :class:`Sloped` image and every tensor on the way carries, beside its value, a
bound for each element: the most it changes per unit of l-inf change of the image, over *all*
images. A linear map W turns bounds s into |W| s; a residual sum adds them; ReLU, max-pooling and
reshaping keep them; BatchNorm in eval mode scales them by |gamma| / sqrt(var + eps). For one linear
map this is its exact operator norm from l-inf to l-inf (the largest absolute row sum), for a
network the product of these norms taken element by element, which is never larger than the product
of the layers' norms, and grows with the width all the same. So each tensor also carries a bound of
how far it moves as a whole, in l2 (norms.py), which grows with singular values alone; after every
operation each of the two is cut down to what the other one allows. Computed in float64.

Operations without such a bound (attention, LayerNorm, a product of two things that depend on the
image) raise :class:`UnboundedError` with their name.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.analysis import norms


class Term(NamedTuple):
    """A term of a sum, weight_KF @ part: the bounds of its elements, and of it as a whole."""

    slope_F: Tensor
    moved: float
    weight_KF: Tensor


Linear = tuple[Term, ...]  # what a linear head leaves


class UnboundedError(Exception):
    """An operation without a global Lipschitz bound; the message names it."""


class Sloped(Tensor):
    """A tensor of one image that carries the bounds of its elements, see the module.

    ``linear`` remembers a final linear layer, so that differences of its outputs get the bound of
    the difference of their weights, and not the sum of theirs; ``convolved`` a convolution, whose
    norm is smaller together with that of a BatchNorm behind it.
    """

    slope: Tensor
    linear: Linear | None
    convolved: norms.Convolved | None
    least: float

    @property
    def moved(self) -> float:
        """Largest move of all elements together; found out when first asked for."""
        if self.convolved is not None:
            self.least = min(self.least, self.convolved.scaled())
            self.convolved = None
        return self.least

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the values and its rule on the bounds."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*_plain(args), **_plain(kwargs))
            name = getattr(func, "__name__", str(func))
            if name in _CONSTANT or not _depends(name, value):
                return value
            rule = _RULES.get(name)
            if rule is None:
                raise UnboundedError(name.strip("_"))
            slope, linear = rule(func, args, kwargs), _kept_linear(name, value, args)
            moved, convolved = _moved(name, value, args, kwargs)
            return _joined(value, slope, linear, moved, convolved)


def sloped_image(shape: tuple[int, int, int]) -> Sloped:
    """Return one grey image in float64, each pixel of which changes by 1."""
    return with_slope(torch.full((1, *shape), 0.5, dtype=torch.float64), torch.ones(1, *shape))


def with_slope(
    value: Tensor,
    slope: Tensor,
    linear: Linear | None = None,
    moved: float = norms.UNKNOWN,
    convolved: norms.Convolved | None = None,
) -> Sloped:
    """Return ``value`` with the bounds ``slope`` and ``moved``, each no larger than the other."""
    result = value.detach().as_subclass(Sloped)
    result.least = min(moved, float(slope.double().norm()))
    result.slope = slope.to(value.dtype).clamp(max=result.least)
    result.linear = linear
    result.convolved = convolved
    return result


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in float64 on the CPU, in eval mode, without gradients."""
    return copy.deepcopy(model).cpu().double().eval().requires_grad_(False)


def pair_slopes(outputs: Tensor) -> Tensor:
    """Return for one row of outputs [1, K] the bounds [K, K] of all differences f_i - f_j."""
    assert isinstance(outputs, Sloped), "a network that looks at a sloped image answers so"
    with torch._C.DisableTorchFunctionSubclass():
        if outputs.linear is None:
            slope_K = outputs.slope[0]
            # Two elements of one vector: no more than sqrt(2) times as far as it moves.
            pairs_KK = (slope_K[:, None] + slope_K[None]).clamp(max=math.sqrt(2) * outputs.moved)
            return pairs_KK.fill_diagonal_(0)
        rows = [_pairs_with(index, outputs.linear) for index in range(outputs.shape[1])]
        return torch.stack(rows)


def _pairs_with(index: int, linear: Linear) -> Tensor:
    """Return the bounds [K] of the differences of output ``index`` and each output."""
    bounds = []
    for part in linear:
        apart_KF = part.weight_KF[index] - part.weight_KF
        one_by_one_K = part.slope_F @ apart_KF.abs().T
        bounds.append(torch.minimum(one_by_one_K, apart_KF.norm(dim=1) * part.moved))
    return torch.stack(bounds).sum(dim=0)


def _plain(item: Any) -> Any:
    if isinstance(item, Sloped):
        return item.as_subclass(Tensor)
    if isinstance(item, tuple | list):
        return type(item)(_plain(part) for part in item)
    if isinstance(item, dict):
        return {key: _plain(part) for key, part in item.items()}
    return item


def _slopes(item: Any) -> Any:
    """Return ``item`` with bounds in the place of values: 0 for what the image cannot change."""
    if isinstance(item, Sloped):
        return item.slope
    if isinstance(item, Tensor) and item.is_floating_point():
        return torch.zeros_like(item)
    if isinstance(item, tuple | list):
        return type(item)(_slopes(part) for part in item)
    return item


def _depends(name: str, value: Any) -> bool:
    """Return whether ``value`` changes smoothly with the image; a shape does not change at all."""
    first = value[0] if isinstance(value, tuple | list) and value else value
    chosen = isinstance(first, Tensor) and not first.is_floating_point()
    if chosen or name in _LEAKS:
        raise UnboundedError("a choice that depends on the image")
    return isinstance(first, Tensor)


def _joined(
    value: Any,
    slope: Any,
    linear: Linear | None,
    moved: float,
    convolved: norms.Convolved | None,
) -> Any:
    if isinstance(value, tuple | list):
        parts = zip(value, slope, strict=True)
        return type(value)(_joined(one, bound, None, moved, None) for one, bound in parts)
    return with_slope(value, torch.broadcast_to(slope, value.shape), linear, moved, convolved)


def _moved(name: str, value: Any, args: Any, kwargs: Any) -> tuple[float, norms.Convolved | None]:
    """Return how far ``value`` moves as a whole, and the convolution that made it."""
    if name == "conv2d":
        return norms.UNKNOWN, norms.convolved(args, kwargs)
    if name == "batch_norm":
        x, scale_O = args[0], norms.batch_norm_scale(args, kwargs)
        apart = x.least * float(scale_O.max())
        return apart if x.convolved is None else min(apart, x.convolved.scaled(scale_O)), None
    return norms.moved_by(name, value, args, kwargs), None


def _same(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Selections, sums and means: what is done to values is done to bounds."""
    return func(*_slopes(args), **{key: _slopes(item) for key, item in kwargs.items()})


def _kept(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """Functions that never stretch a distance."""
    slope: Tensor = args[0].slope
    return slope


def _add(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    if kwargs:
        raise UnboundedError("sum with a factor")
    return torch.as_tensor(sum(a.slope for a in args[:2] if isinstance(a, Sloped)))


def _mul(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    one, other = args[:2]
    if isinstance(one, Sloped) and isinstance(other, Sloped):
        raise UnboundedError("a product of two things that depend on the image")
    tracked, factor = (one, other) if isinstance(one, Sloped) else (other, one)
    slope: Tensor = tracked.slope * abs(factor)
    return slope


def _div(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    if isinstance(args[1], Sloped):
        raise UnboundedError("division by what depends on the image")
    slope: Tensor = args[0].slope / abs(args[1])
    return slope


def _conv2d(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    x, weight, *rest = args
    options = {key: item for key, item in kwargs.items() if key not in ("weight", "bias")}
    rest = [None, *rest[1:]]
    weight = kwargs.get("weight", weight)
    return F.conv2d(x.slope, weight.abs(), *rest, **options)


def _linear(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    return F.linear(args[0].slope, args[1].abs())


def _batch_norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training or args[1] is None:
        raise UnboundedError("BatchNorm in training")
    slope: Tensor = args[0].slope * norms.batch_norm_scale(args, kwargs)[:, None, None]
    return slope


def _softmax(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    # |dp_i| <= p_i (1 - p_i) (|dx_i| + the largest other |dx_j|), and p (1 - p) <= 1 / 4.
    slope = args[0].slope
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    bound: Tensor = 0.25 * (slope + slope.amax(dim=dim, keepdim=True))
    return bound


def _gelu(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    return norms.GELU_SLOPE * _kept(func, args, kwargs)


def _pad(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if kwargs.get("mode", "constant") != "constant" or kwargs.get("value"):
        raise UnboundedError("padding with anything but 0")
    return _same(func, args, kwargs)


_SELECTIONS = (
    "__getitem__", "adaptive_avg_pool2d", "avg_pool2d", "cat", "chunk", "clone", "contiguous",
    "detach", "expand", "flatten", "index_add", "index_copy", "index_select", "max_pool2d",
    "boolean_dispatch", "_max_pool2d", "mean", "permute", "reshape", "select", "split", "squeeze",
    "stack", "sum", "tensor_split", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip
# The values of these do not depend on the values of what they are given.
_CONSTANT = frozenset(
    {"new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like", "empty_like", "full_like"}
)
# What turns values into something that carries no bounds, or writes them into it.
_LEAKS = frozenset(
    {
        *("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"),
        *("__contains__", "allclose", "equal", "is_nonzero", "__setitem__"),
    }
)
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SELECTIONS, _same),
    "relu": _kept,
    "relu_": _kept,
    "dropout": _kept,
    "pad": _pad,
    "add": _add,
    "__add__": _add,
    "__radd__": _add,
    "sub": _add,
    "__sub__": _add,
    "__rsub__": _add,
    "rsub": _add,
    "mul": _mul,
    "__mul__": _mul,
    "__rmul__": _mul,
    "div": _div,
    "__truediv__": _div,
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "gelu": _gelu,
}


def _kept_linear(name: str, value: Any, args: Any) -> Linear | None:
    """Return what is still known of a final linear layer after the operation ``name``."""
    if name == "linear":
        x, one_row = args[0], args[0].dim() == 2 and len(args[0]) == 1
        return (Term(x.slope[0], x.moved, args[1]),) if one_row else None
    if name in ("mul", "__mul__", "__rmul__"):
        return _scaled_linear(args)
    if name in ("add", "__add__", "__radd__"):
        known = [a.linear for a in args[:2] if isinstance(a, Sloped)]
        parts = [part for part in known if part is not None]
        return sum(parts, ()) if len(parts) == len(known) else None
    # Along the first axis only: along another one outputs may change places.
    if name == "__getitem__" and not isinstance(args[1], tuple):
        return _same_row(value, args)
    if name == "cat" or (name in ("index_add", "index_copy") and args[1] == 0):
        return _same_row(value, args)
    return None


def _scaled_linear(args: Any) -> Linear | None:
    tracked = next(a for a in args[:2] if isinstance(a, Sloped))
    factor = args[1] if tracked is args[0] else args[0]
    if tracked.linear is None or (isinstance(factor, Tensor) and factor.numel() != 1):
        return None
    return tuple(part._replace(weight_KF=part.weight_KF * float(factor)) for part in tracked.linear)


def _same_row(value: Any, args: Any) -> Linear | None:
    """Return the linear layer of the one row that was sent to an expert or brought back."""
    flat = [part for a in args for part in (a if isinstance(a, tuple | list) else [a])]
    tracked = [part for part in flat if isinstance(part, Sloped)]
    same = len(tracked) == 1 and isinstance(value, Tensor) and value.shape == tracked[0].shape
    return tracked[0].linear if same and value.dim() == 2 and len(value) == 1 else None
