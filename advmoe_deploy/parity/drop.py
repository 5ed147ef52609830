"""Drop in accuracy from a reference to its engine, on the same images: passed, failed or undecided.

Shapes: N images.
"""

import math
from bisect import bisect_left

from advmoe_deploy.parity.answers import Flags
from advmoe_deploy.parity.intervals import Z_95, paired_difference_interval
from advmoe_deploy.reports.drops import DropReport, Verdict
from advmoe_deploy.specs import Frozen

# How likely a number of images that is said to decide does decide, whichever way it goes.
POWER = 0.95
_Z_POWER = 1.644854
# How far beyond the limit a drop is, in points, that such a number has to find.
PLANTED = 1.5
# More images than anyone has.
_MOST_IMAGES = 10**9


class Drop(Frozen):
    """Numbers of ``images`` images that only the reference, and that only the engine gets right.

    Images that both get right, or both wrong, say nothing of a difference. Where the true drop is
    nil, the images of either kind are a matter of chance, and of 100 images a whole point is one
    image. So the drop has a 95 % interval, and a limit on it three outcomes.
    """

    images: int
    only_reference: int
    only_engine: int

    @classmethod
    def between(cls, reference_N: Flags, engine_N: Flags) -> "Drop":
        """Return the drop between who is right on the reference [N] and on the engine [N]."""
        assert reference_N.shape == engine_N.shape
        return cls(
            images=len(reference_N),
            only_reference=int((reference_N & ~engine_N).sum()),
            only_engine=int((engine_N & ~reference_N).sum()),
        )

    @property
    def points(self) -> float:
        """The drop in percentage points."""
        return self._points(self.only_reference - self.only_engine)

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the most that the drop may be, in points: a 95 % interval for pairs.

        Without a single image that differs, it reaches from -0.49 to 0.49 points of 400 images, and
        from -0.97 to 0.97 of 200. See
        :func:`~advmoe_deploy.parity.intervals.paired_difference_interval`.
        """
        least, most = paired_difference_interval(self.only_reference, self.only_engine, self.images)
        return (100 * least, 100 * most)

    @property
    def p(self) -> float:
        """Probability of a difference this large, in either direction, where there is none.

        Source: Q. McNemar, Psychometrika 12 (1947), exact: each image that differs is a fair coin.
        """
        fewer, either = min(self.only_reference, self.only_engine), self._discordant
        return min(1.0, 2 * _heads_at_most(fewer, either))

    @property
    def p_lost(self) -> float:
        """Probability that the engine gets as few right or fewer where there is no difference."""
        return _heads_at_most(self.only_engine, self._discordant)

    @property
    def gained_beyond_chance(self) -> bool:
        """True if the engine gets more right than its reference, beyond chance.

        Under attack that is no good news: the attack that was found on the reference, or made of
        its gradients, no longer fits the engine.
        """
        return self.interval[1] < 0

    @property
    def _discordant(self) -> int:
        return self.only_reference + self.only_engine

    def _points(self, lost: int) -> float:
        """Return images in points; rounded, so that 57 of 10,000 are 0.57 as a limit is."""
        return round(100 * lost / max(1, self.images), 9)

    def verdict(self, max_drop: float) -> Verdict:
        """Return whether at most ``max_drop`` points are lost, or whether these images cannot tell.

        It is ``passed`` where even the most that the drop may be is allowed, and ``failed`` where
        the least that it may be is too much.
        """
        least, most = self.interval
        if most <= max_drop:
            return "passed"
        return "failed" if least > max_drop else "undecided"

    def counted_verdict(self, max_drop: float) -> Verdict:
        """Return whether the images that only the reference gets right are at most ``max_drop``.

        It is for engines that were shown to answer as their reference does: there is no population
        to conclude on, and what was gained makes up for nothing.
        """
        return "passed" if self._points(self.only_reference) <= max_drop else "failed"

    def images_needed(self, max_drop: float) -> int | None:
        """Return how many images would decide on ``max_drop`` points; ``None`` if no number would.

        So many that, each with a power of 0.95, a drop of nil passes and one of 1.5 points beyond
        the limit fails. Engine and reference are taken to differ on as large a share of the images
        as here and one image more, which is the floor where they differ on none; the planted drop
        comes on top. That nothing at all is lost, a limit of 0, no number of images can show.
        """
        if max_drop <= 0:
            return None
        share, limit = (self._discordant + 1) / (self.images + 2), max_drop / 100
        planted = limit + PLANTED / 100

        def decide(images: int) -> bool:
            passes = _reach(share, 0.0, images) <= limit
            # A drop of more than everything need not be found.
            fails = planted >= 1 or planted - _reach(share + planted, planted, images) > limit
            return passes and fails

        return bisect_left(range(1, _MOST_IMAGES), True, key=decide) + 1

    def report(self, max_drop: float, *, counted: bool = False) -> DropReport:
        """Return the record of this drop, judged by ``max_drop`` points, ``counted`` or not."""
        least, most = self.interval
        return DropReport(
            images=self.images,
            only_reference=self.only_reference,
            only_engine=self.only_engine,
            drop=self.points,
            least_drop=least,
            most_drop=most,
            p=self.p,
            max_drop=max_drop,
            verdict=self.counted_verdict(max_drop) if counted else self.verdict(max_drop),
            images_needed=self.images_needed(max_drop),
        )

    def sentence(self) -> str:
        """Return one line: the drop, its interval, of how many images, and p."""
        return self.report(0.0).sentence()


def _heads_at_most(heads: int, coins: int) -> float:
    """Return how likely at most so many of ``coins`` fair coins fall heads."""

    def exactly(count: int) -> float:
        ways = math.lgamma(coins + 1) - math.lgamma(count + 1) - math.lgamma(coins - count + 1)
        return math.exp(ways - coins * math.log(2))

    return min(1.0, math.fsum(exactly(count) for count in range(heads + 1)))


def _reach(discordance: float, drop: float, images: int) -> float:
    """Return how far the further end of an interval is from the true drop, with power, as a share.

    ``discordance`` is the share of images that differ. The interval is as wide as that of
    :attr:`Drop.interval` usually is, and its centre off as far as chance takes it.
    """
    variance = max(0.0, min(1.0, discordance) - drop * drop)
    half_width = Z_95 * math.sqrt(images * variance + 1)
    return (half_width + _Z_POWER * math.sqrt(images * variance)) / (images + 2)
