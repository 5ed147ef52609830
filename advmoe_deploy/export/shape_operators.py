"""Operators that only move or reshape values; see :mod:`~advmoe_deploy.export.operators`."""

from collections.abc import Callable, Sequence

import numpy as np

from advmoe_deploy.export.segment_writer import SegmentWriter, require

_END = np.iinfo(np.int64).max


def slice(
    g: SegmentWriter,
    output: str,
    x: str,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    start, end = start or 0, _END if end is None else end
    if (start, end, step) == (0, _END, 1):
        return x
    bounds = {"starts": start, "ends": end, "axes": axis, "steps": step}
    return g.emit(
        "Slice", [x, *(g.integers(f"{output}.{k}", v) for k, v in bounds.items())], output
    )


def select(g: SegmentWriter, output: str, x: str, axis: int, index: int) -> str:
    at = g.constant(f"{output}.index", np.array(index, np.int64))
    return g.emit("Gather", [x, at], output, axis=axis)


def unbind(g: SegmentWriter, output: str, x: str, axis: int = 0) -> list[str]:
    count = g.shapes[x][axis]
    require(isinstance(count, int), "only axes of known size can be unbound")
    return [select(g, f"{output}.{i}", x, axis, i) for i in range(int(count))]


def chunk(g: SegmentWriter, output: str, x: str, chunks: int, axis: int = 0) -> list[str]:
    size = g.shapes[x][axis]
    require(isinstance(size, int), "only axes of known size can be split")
    return split(g, output, x, -(-int(size) // chunks), axis)


def split(
    g: SegmentWriter, output: str, x: str, sizes: int | Sequence[int], axis: int = 0
) -> list[str]:
    whole = g.shapes[x][axis]
    require(isinstance(whole, int), "only axes of known size can be split")
    if isinstance(sizes, int):
        sizes = [min(sizes, int(whole) - start) for start in range(0, int(whole), sizes)]
    ends = np.cumsum(sizes).tolist()
    return [
        slice(g, f"{output}.{i}", x, axis, end - size, end)
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def getitem(_g: SegmentWriter, _output: str, parts: list[str], index: int) -> str:
    return parts[index]


def pad(
    g: SegmentWriter,
    output: str,
    x: str,
    pad: list[int],
    mode: str = "constant",
    value: float | None = None,
) -> str:
    require(mode == "constant" and not value, "only zero padding is known")
    # torch: (before, after) from the last axis backwards; ONNX: all befores, then all afters.
    pairs = [*zip(pad[::2], pad[1::2], strict=True)][::-1]
    pairs = [(0, 0)] * (len(g.shapes[x]) - len(pairs)) + pairs
    amounts = [before for before, _ in pairs] + [after for _, after in pairs]
    return g.emit("Pad", [x, g.integers(f"{output}.pads", *amounts)], output)


def flatten(g: SegmentWriter, output: str, x: str, start: int = 0, end: int = -1) -> str:
    if (start, end) == (1, -1):
        return g.emit("Flatten", [x], output, axis=1)  # unlike Reshape, it takes no rows too
    return reshape(g, output, x)


def reshape(g: SegmentWriter, output: str, x: str, *_sizes: object) -> str:
    before, after = g.shapes[x], g.shapes[output]
    require(sum(isinstance(d, str) for d in after) <= 1, "only one size may follow the batch")
    kept = bool(before) and bool(after) and before[0] == after[0]
    sizes = [-1 if isinstance(d, str) else d for d in after]
    if kept:
        sizes[0] = 0  # as it was, which is right for no rows too
    return g.emit("Reshape", [x, g.integers(f"{output}.shape", *sizes)], output)


def expand(g: SegmentWriter, output: str, x: str, *_sizes: object) -> str:
    shape = g.shapes[output]
    if shape == g.shapes[x]:
        return x
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(g.integers(f"{output}.size_{axis}", size))
        else:
            sizes.append(_size_like(g, f"{output}.size_{axis}", size))
    return g.emit("Expand", [x, g.emit("Concat", sizes, f"{output}.shape", axis=0)], output)


def _size_like(g: SegmentWriter, output: str, size: str) -> str:
    """Add the first axis of some value that has ``size`` there, as a vector of one."""
    known = [*g.inputs, *(node.output[0] for node in g.nodes)]
    sources = [value for value in known if g.shapes.get(value, ())[:1] == (size,)]
    require(bool(sources), f"no value has {size} rows to take the size from")
    return g.emit("Shape", [sources[0]], output, start=0, end=1)


def permute(g: SegmentWriter, output: str, x: str, axes: Sequence[int]) -> str:
    rank = len(g.shapes[x])
    return g.emit("Transpose", [x], output, perm=[axis % rank for axis in axes])


def transpose(g: SegmentWriter, output: str, x: str, a: int, b: int) -> str:
    axes = [*range(len(g.shapes[x]))]
    axes[a], axes[b] = axes[b], axes[a]
    return permute(g, output, x, axes)


def cat(g: SegmentWriter, output: str, parts: list[str], axis: int = 0) -> str:
    return g.emit("Concat", parts, output, axis=axis)


def by_axis(operator: str) -> Callable[..., str]:
    def lower(g: SegmentWriter, output: str, x: str, axis: int) -> str:
        return g.emit(operator, [x, g.integers(f"{output}.axes", axis)], output)

    return lower
