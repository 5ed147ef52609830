"""Confidence intervals of measured shares."""

import math

Z_95 = 1.959964


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of ``successes / trials``, as shares in [0, 1].

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    if trials == 0:
        return (0.0, 1.0)
    share, z = successes / trials, Z_95
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def paired_difference_interval(
    only_first: int, only_second: int, trials: int
) -> tuple[float, float]:
    """Return the 95 % interval of how much larger the first of two shares of the same trials is.

    ``only_first`` trials count for the first share alone, ``only_second`` for the second alone.

    Source: A. Agresti and Y. Min, Statistics in Medicine 24 (2005): Wald's interval after half a
    trial was added to each of the four outcomes.
    """
    first, second, n = only_first + 0.5, only_second + 0.5, trials + 2
    difference = (first - second) / n
    spread = Z_95 * math.sqrt(first + second - (first - second) ** 2 / n) / n
    return (difference - spread, difference + spread)


def chance_of_more(successes: int, trials: int, share: float) -> float:
    """Return how likely at least ``successes`` of ``trials`` are, each of probability ``share``."""
    if not 0 < share < 1:
        return float(successes <= (trials if share >= 1 else 0))
    log = math.lgamma

    def exactly(count: int) -> float:
        ways = log(trials + 1) - log(count + 1) - log(trials - count + 1)
        return math.exp(ways + count * math.log(share) + (trials - count) * math.log1p(-share))

    return max(0.0, 1.0 - math.fsum(exactly(count) for count in range(successes)))
