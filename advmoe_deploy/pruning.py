"""Record of the experts that an export left out."""

from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import AttackSpec, Frozen

# What is added to the score of a dropped expert: it is then less than any other and yet finite, for
# infinity less infinity is no number.
DROPPED = -1e30


class Pruning(Frozen):
    """Experts that were left out of an export because none of the images at hand visits them.

    ``dropped`` are their ids by layer. The images are ``images`` of ``data`` and
    ``attacked_images`` of the hold-out of ``attacked_data``, found by ``attack`` at ``epsilon`` on
    the whole model; these three are ``None`` where labels or a threat model were not known.
    ``max_abs_logit_diff`` is how far the logits on all these images are from the whole model's.
    """

    dropped: dict[str, tuple[int, ...]]
    data: str
    images: int
    attacked_data: str | None
    attacked_images: int
    attack: AttackSpec | None
    epsilon: float | None
    max_abs_logit_diff: float

    def findings(self) -> list[str]:
        """Return what was left out and why that may be, a sentence each."""
        return [
            *(f"{layer} without {_named(experts)}" for layer, experts in self.dropped.items()),
            f"visited by none of {self._images()}; logits on these differ from the whole model's "
            f"by {self.max_abs_logit_diff:.2g} at most",
            "what the whole model would send there, goes to the next best expert",
        ]

    def _images(self) -> str:
        clean = f"{self.images} images of {self.data}"
        if self.attack is None or self.epsilon is None:
            return f"{clean} (no attacked ones: labels or a threat model were missing)"
        return (
            f"{clean} and {self.attacked_images} hold-out images of {self.attacked_data} attacked "
            f"by {self.attack.name}-{self.attack.steps}, target {self.attack.target}, at epsilon "
            f"{epsilon_text(self.epsilon)}"
        )


def _named(experts: tuple[int, ...]) -> str:
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"
