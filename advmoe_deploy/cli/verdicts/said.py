"""A sentence of a verdict, and whether it is good news."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from advmoe_deploy.analysis.shares import Difference

# Green on a page is a gain, and nothing else: neither what is as it was nor what had to be.
Tone = Literal["gain", "", "unsure", "worse"]
# One image of a million is told from none.
_MOST_DIGITS = 4


@dataclass(frozen=True)
class Said:
    """One sentence. Its tone is empty where nothing was gained and nothing lost."""

    text: str
    tone: Tone = ""


def percent(share: float) -> str:
    """Return a share in percent, of one digit; of more where that looked like all or like none."""
    texts = [f"{100 * share:.{digits}f}" for digits in range(1, _MOST_DIGITS + 1)]
    return f"{next((text for text in texts if float(text) not in (0, 100)), texts[0])} %"


def points(difference: "Difference") -> str:
    """Return the 95 % interval of a difference, in points."""
    return f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f} points"


def listed(parts: list[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
