"""Sample of a segment: its inputs and the torch model's outputs, for a few images."""

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from advmoe_deploy.parity.tolerance import rounding_of

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Sample:
    """Inputs and outputs of one segment, by tensor name, in the torch model.

    ``exact`` is the answer to the same inputs in float64, ``disturbed`` the furthest
    that it would be from that for the first few of them with sums rounded as on any processor
    (:mod:`advmoe_deploy.parity.rounding`).
    """

    inputs: Arrays
    outputs: Arrays
    exact: Arrays
    disturbed: Arrays = field(default_factory=dict)

    def rounding(self, output: str) -> float:
        """Return by how much ``output`` is uncertain in float32."""
        exact, answers = self.exact[output], [self.outputs[output]]
        answers += [self.disturbed[output]] if output in self.disturbed else []
        return max(rounding_of(answer, exact[: len(answer)]) for answer in answers)
