"""What an AdvMoE is timed against; apart, so that the command line need not load the rest."""

from typing import Literal

BASELINES: tuple[Literal["dense", "s-dense", "unfused"], ...] = ("dense", "s-dense", "unfused")
