"""What the torch model does at one segment, for a few images."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Sample:
    """What one segment is given and what it answers, by tensor name, in the torch model.

    ``exact`` is the answer to the same inputs in float64.
    """

    inputs: Arrays
    outputs: Arrays
    exact: Arrays
