"""Writer of one segment, with the shape of every value."""

import numpy as np
from onnx import numpy_helper as onnx_numpy

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.graph.writer import GraphWriter

Shape = tuple[int | str, ...]


class SegmentWriter(GraphWriter):
    """A graph writer that knows shapes: sizes that depend on the batch are strings."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, Shape] = {}

    def transposed(self, weight: str) -> str:
        """Return the constant ``weight`` [out, in] as [in, out]."""
        values = onnx_numpy.to_array(self.initializers[weight])
        return self.constant(f"{weight}.transposed", values.T)

    def number(self, output: str, value: str | float) -> str:
        """Return ``value`` as the name of a tensor, a number as a float32 constant."""
        if isinstance(value, str):
            return value
        return self.constant(f"{output}.number", np.array(value, np.float32))


def require(holds: bool, limit: str) -> None:
    """Raise :class:`CheckFailedError` that names the ``limit``, unless it ``holds``."""
    if not holds:
        raise CheckFailedError(f"cannot export this model: {limit}")
