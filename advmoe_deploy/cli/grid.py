"""Options of V-MoE's protocol: radii, capacities, and the dense twin beside."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe_deploy.cli.options import names
from advmoe_deploy.cli.ranges import numbers_of
from advmoe_deploy.errors import UsageError
from advmoe_deploy.settings import epsilon_of

if TYPE_CHECKING:
    from advmoe_deploy.analysis.protocol.radii import Protocol

_FRACTIONS = re.compile(r"([\d.]+)(/\d+)\.\.([\d.]+)\2")  # of one denominator


@dataclass(frozen=True)
class Grid:
    """Radii and capacities of an analysis, ``None`` for the protocol's own, and the twin."""

    radii: tuple[float, ...] | None
    capacities: tuple[float, ...] | None
    twin: Path | None

    @classmethod
    def of(
        cls,
        radii: str | None,
        capacity: str | None,
        twin: Path | None,
        sections: Collection[str],
        epsilon: float | None,
    ) -> "Grid":
        """Return what the options say; ``sections`` are those that were asked for.

        Raises:
            UsageError: they make no sense.
        """
        if epsilon is not None and set(sections) == {"radii"}:
            raise UsageError(
                "--epsilon attacks nothing where radii is the only section; name it in --radii"
            )
        if twin is not None and not {"radii", "capacity"} & set(sections):
            raise UsageError("--twin stands beside --radii or --capacity; give one of them")
        return cls(
            None if radii is None else _radii(radii),
            None if capacity is None else _ratios(capacity),
            twin,
        )

    def protocol(self, steps: int | None, seed: int) -> "Protocol":
        """Return the protocol; the twin is read."""
        from advmoe_deploy.analysis.protocol.radii import Protocol
        from advmoe_deploy.models.stored import open_stored
        from advmoe_deploy.zoo.resolve import resolve

        own = Protocol()
        return Protocol(
            steps=steps or own.steps,
            radii=self.radii or own.radii,
            capacities=self.capacities or own.capacities,
            twin=open_stored(resolve(self.twin)) if self.twin else None,
            seed=seed,
        )


def _radii(text: str) -> tuple[float, ...]:
    try:
        written = [radius for part in names(text) for radius in _written(part)]
    except ValueError as error:
        raise UsageError(f"--radii '{text}': {error}") from None
    found = tuple(dict.fromkeys(map(epsilon_of, written)))
    if not found:
        raise UsageError(f"--radii '{text}' names no radius; write --radii 1/255,4/255")
    return found


def _written(part: str) -> list[str]:
    """Return the one radius that ``part`` is, or all of a range such as ``1/255..4/255``."""
    if ".." not in part:
        return [part]
    fractions = _FRACTIONS.fullmatch(part)
    counted, below = (f"{fractions[1]}..{fractions[3]}", fractions[2]) if fractions else (part, "")
    return [f"{value:.12g}{below}" for value in numbers_of(counted, "1/255..4/255")]


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(numbers_of(text, "0.5,1,2")))
    except ValueError as error:
        raise UsageError(f"--capacity: {error}") from None
    if not found or min(found) <= 0:
        raise UsageError(
            f"--capacity '{text}' is no list of positive numbers; write --capacity 0.5,1,2"
        )
    return found
