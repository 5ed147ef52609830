"""Report that sets the engines and precisions of one bundle beside each other."""

from typing import Literal

from advmoe_deploy.reports import LatencyReport
from advmoe_deploy.specs import Frozen, Precision

Aim = Literal["latency", "throughput", "size"]


class MeasuredShare(Frozen):
    """A share of ``images`` with its 95 % Wilson interval, and where it was measured."""

    share: float
    interval: tuple[float, float]
    images: int
    source: str


class Timing(Frozen):
    """Median of one batch size; ``dense_ratio`` is the dense network's time over this one."""

    batch: int
    p50_ms: float
    images_per_s: float
    dense_ratio: float | None = None


class Contender(Frozen):
    """One engine in one precision, or, as ``dense``, the dense network of the same backbone.

    ``bytes`` are those of the files that it loads. An accuracy is ``None`` where it was not
    measured: the dense network is untrained, and here for its size and its time.
    """

    model: Literal["own", "dense"]
    engine: str
    precision: Precision
    bytes: int
    clean: MeasuredShare | None
    robust: MeasuredShare | None
    timings: tuple[Timing, ...]
    best: bool = False

    @property
    def name(self) -> str:
        """Name as ``--engine`` takes it, or that of the dense network."""
        return "dense network" if self.model == "dense" else f"{self.engine}:{self.precision}"


class BenchmarkReport(Frozen):
    """The engines of ``bundle``, of which one is ``best`` for the ``aim``.

    The aim ``latency`` takes the quickest at the smallest batch, ``throughput`` the most images per
    second at any, ``size`` the fewest bytes; accuracies are for the reader to weigh. ``left_out``
    says of an engine why it is not here, ``notes`` why a figure is not. ``latency`` is the whole
    measurement that the ``contenders``' times come from.
    """

    bundle: str
    aim: Aim
    data: str | None
    contenders: tuple[Contender, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    latency: LatencyReport
    seconds: float

    @property
    def best(self) -> Contender:
        """The one that is best for the aim."""
        return next(each for each in self.contenders if each.best)
