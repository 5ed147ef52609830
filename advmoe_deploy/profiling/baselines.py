"""Names of the baselines; apart, so that the command line loads no more."""

from typing import Literal

BASELINES: tuple[Literal["dense", "s-dense", "unfused"], ...] = ("dense", "s-dense", "unfused")
