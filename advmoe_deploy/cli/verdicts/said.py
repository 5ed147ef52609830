"""A sentence of a verdict, and whether it is good news."""

from dataclasses import dataclass
from typing import Literal

# Green on a page is a gain, and nothing else: neither what is as it was nor what had to be.
Tone = Literal["gain", "", "unsure", "worse"]


@dataclass(frozen=True)
class Said:
    """One sentence. Its tone is empty where nothing was gained and nothing lost."""

    text: str
    tone: Tone = ""


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f} %"


def listed(parts: list[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
