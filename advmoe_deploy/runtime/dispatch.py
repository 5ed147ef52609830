"""Dispatch of rows to experts, and the combination of their answers, on the host.

Shapes: N images, T tokens per image, R rows of one expert, E experts, K experts per row,
S = N * T * K choices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.plan import RouteStep


@dataclass(frozen=True)
class Dispatch:
    """By expert that was chosen at all: its choices, ascending, as places in ids [S]."""

    choices: dict[int, NDArray[np.int64]]
    top_k: int

    @property
    def only(self) -> int | None:
        """The expert that takes every row, if there is one."""
        return next(iter(self.choices)) if len(self.choices) == 1 else None

    def rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Return each chosen expert and the numbers of its rows."""
        for expert, choices in self.choices.items():
            yield expert, choices // self.top_k

    def positions(self, starts: Mapping[int, int]) -> NDArray[np.int64]:
        """Return where each choice's answer lies, [S]; ``starts`` has each expert's first row."""
        result = np.empty(sum(map(len, self.choices.values())), np.int64)
        for expert, choices in self.choices.items():
            result[choices] = starts[expert] + np.arange(len(choices))
        return result


def dispatch(ids_RK: NDArray[np.int64]) -> Dispatch:
    """Return who gets which rows; ``ids_RK`` may have more axes before the last."""
    ids_S = ids_RK.reshape(-1)
    if len(ids_S) == 1:  # the usual case of one image should cost next to nothing
        return Dispatch({int(ids_S[0]): np.zeros(1, np.int64)}, 1)
    experts = np.flatnonzero(np.bincount(ids_S))
    return Dispatch({int(e): np.flatnonzero(ids_S == e) for e in experts}, ids_RK.shape[-1])


def combined(
    route: RouteStep,
    given: Dispatch,
    parts: Mapping[int, NDArray[np.float32]],
    weights_RK: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the answers in the rows' order, weighted and summed where ``route`` says so.

    ``parts`` has each chosen expert's answers, a row per choice, in their order.
    """
    first = next(iter(parts.values()))
    if given.only is not None and route.weighting == "one":
        return first
    total = sum(map(len, given.choices.values()))
    each = np.empty((total, *first.shape[1:]), first.dtype)
    for expert, choices in given.choices.items():
        each[choices] = parts[expert]
    if route.weighting == "one":
        return each
    rest = first.shape[1:]
    beside = weights_RK.reshape(-1, route.top_k, *([1] * len(rest)))
    answer: NDArray[np.float32] = (each.reshape(-1, route.top_k, *rest) * beside).sum(axis=1)
    return answer
