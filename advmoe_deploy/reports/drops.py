"""Report of what an engine lost of its reference's accuracy."""

from collections.abc import Collection
from typing import Literal

from advmoe_deploy.specs import Frozen

Verdict = Literal["passed", "failed", "undecided"]

# What an engine may lose of; under an attack of its own, each model is attacked by its own answers.
Accuracy = Literal["clean", "robust", "own_attack"]
ACCURACIES: dict[Accuracy, str] = {
    "clean": "clean accuracy",
    "robust": "robust accuracy",
    "own_attack": "robust accuracy under an attack of its own",
}


def worst_of(verdicts: Collection[Verdict]) -> Verdict:
    """Return ``failed`` if any is, else ``undecided`` if any is, else ``passed``."""
    order: tuple[Verdict, ...] = ("failed", "undecided", "passed")
    return next((each for each in order if each in verdicts), "passed")


class DropReport(Frozen):
    """A drop in accuracy, in points, on the same ``images``, and whether ``max_drop`` allows it.

    ``only_reference`` images are right on the reference alone, ``only_engine`` on the engine alone.
    The drop is between ``least_drop`` and ``most_drop`` with 95 % confidence; ``p`` is how likely
    one this large is, in either direction, where there is none. Where the verdict is undecided,
    ``images_needed`` would decide; ``None`` where no number would. Of an engine that was shown to
    answer as its reference does, the verdict counts ``only_reference`` and asks for no interval.
    """

    images: int
    only_reference: int
    only_engine: int
    drop: float
    least_drop: float
    most_drop: float
    p: float
    max_drop: float
    verdict: Verdict
    images_needed: int | None

    def __str__(self) -> str:
        gained = "; more than chance explains are right here alone" if self.most_drop < 0 else ""
        return f"{self.sentence()}; {self.judgement()}{gained}"

    def sentence(self) -> str:
        """Return the drop, its interval, of how many images, and p."""
        return f"a drop of {self.figures()}"

    def figures(self) -> str:
        """Return the same without a word for what it is."""
        return (
            f"{self.drop:.2f} points ({self.least_drop:.2f} to {self.most_drop:.2f}, "
            f"95 % interval) on {self.images:,} images, p = {self.p:.2g}"
        )

    def counted(self) -> str:
        """Return how many images were lost, whatever was gained."""
        return f"{self.only_reference} of {self.images:,} images only the reference gets right"

    def judgement(self) -> str:
        """Return the verdict, and what would decide where it is none."""
        if self.verdict != "undecided":
            return f"{self.verdict} (limit {self.max_drop:g} points)"
        if self.images_needed is None:
            way_out = "no number of images shows that nothing is lost"
        elif self.images_needed > self.images:
            way_out = f"{self.images_needed:,} images would decide"
        else:
            way_out = "the drop is too near the limit for these images"
        return f"undecided (limit {self.max_drop:g} points): {way_out}"
