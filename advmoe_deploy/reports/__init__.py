"""Reports of export, verify and profile: frozen values that serialise to JSON."""

from typing import Literal

from pydantic import Field

from advmoe_deploy.reports.drops import ACCURACIES, Accuracy, DropReport
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import AttackSpec, Frozen, Precision


class Macs(Frozen):
    """Multiply-accumulates per image: convolutions and linear layers.

    ``executed`` is what this form really computes: the router and one pathway.
    ``unfused`` is what computing every expert and selecting would cost.
    """

    selected: int
    router: int
    executed: int
    unfused: int
    dense: int
    s_dense: int


class LayerParity(Frozen):
    """Parity of the routes of one layer; rows are images or, where those are routed, tokens.

    ``rows`` are those compared: not those of images in which an earlier layer flipped, for after
    that everything differs. They are ``close_calls`` where the last score chosen and the first not
    chosen are within the margin, and are expected to agree elsewhere: ``flips`` are those that do
    not, ``close_flips`` the close calls that went the other way. ``expert_load`` counts the rows of
    the reference by expert, each once for every expert it goes to; ``margin_deciles`` are the nine
    of its rows' margins, the best expert's share (softmax of the scores) less the second's. Bundles
    written before there were such have none, nor have layers of one expert.
    """

    layer: str
    rows: int
    flips: int
    close_calls: int
    close_flips: int
    smallest_margin: float | None
    expert_load: tuple[int, ...]
    margin_deciles: tuple[float, ...] = ()


class ParityReport(Frozen):
    """Parity of an exported model and its torch reference on the same images.

    ``route_agreement`` is the share of rows, over all layers, that go to the same experts, close
    calls (scores within ``margin``) aside; 0 if there is none to compare, 1 if nothing routes.

    Logits are compared over the ``compared`` images whose routes are the same in every layer.
    ``max_abs_logit_diff`` is the largest difference, ``max_relative_logit_diff`` the largest after
    dividing each image's by its largest reference logit where that exceeds 1; routing weights may
    differ by ``max_abs_weight_diff``. All are held to ``logit_tolerance``: 1e-5, or more where
    ``rounding``, the distance of the torch model from itself in float64, is of that size.
    ``non_finite`` counts images with NaN or infinity in the
    logits of either side or in the reference's scores. ``data`` says where the images come from.
    ``class_margin_deciles`` are of the reference's best class less its second, in probability.
    """

    images: int
    data: str | None = None
    compared: int
    non_finite: int
    max_abs_logit_diff: float
    max_relative_logit_diff: float
    max_abs_weight_diff: float
    rounding: float
    logit_tolerance: float
    route_agreement: float
    margin: float
    layers: tuple[LayerParity, ...]
    class_margin_deciles: tuple[float, ...] = ()

    @property
    def route_flips(self) -> int:
        """Rows that were no close call and go elsewhere, over all layers."""
        return sum(layer.flips for layer in self.layers)

    @property
    def close_calls(self) -> int:
        """Rows that were a close call, over all layers."""
        return sum(layer.close_calls for layer in self.layers)

    @property
    def close_flips(self) -> int:
        """Close calls that went the other way, over all layers."""
        return sum(layer.close_flips for layer in self.layers)

    @property
    def clear_rows(self) -> int:
        """Rows that were compared and no close call, over all layers."""
        return sum(layer.rows - layer.close_calls for layer in self.layers)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Layers without a single row that was no close call."""
        return tuple(layer.layer for layer in self.layers if layer.close_calls == layer.rows)

    @property
    def mostly_compared(self) -> bool:
        """True if more than half of the images have the same routes, so that logits compare."""
        return 2 * self.compared > self.images

    @property
    def passed(self) -> bool:
        """True if most images were compared, all finite, near enough, no clear route flipped."""
        return (
            self.mostly_compared
            and not self.undecided
            and self.non_finite == 0
            and self.route_flips == 0
            and self.max_relative_logit_diff <= self.logit_tolerance
            and self.max_abs_weight_diff <= self.logit_tolerance
        )


class Pair(Frozen):
    """One quantity on the torch reference and on the engine."""

    reference: float
    engine: float


class Calibration(Frozen):
    """Images that int8 scales were taken from: of training, clean and attacked on the torch model.

    ``attack`` and ``epsilon`` are ``None`` where no threat model is declared, and then there are no
    attacked images. ``all_rows`` names experts that none of the images visits: they were calibrated
    on the rows of their layer's other experts.
    """

    data: str
    clean_images: int
    attacked_images: int
    attack: AttackSpec | None
    epsilon: float | None
    all_rows: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Return what the scales were taken from."""
        attacked = "none attacked"
        if self.attack and self.epsilon:
            attacked = (
                f"{self.attacked_images} attacked by {self.attack.name}-{self.attack.steps} at "
                f"epsilon {epsilon_text(self.epsilon)}, seed {self.attack.seed}"
            )
        return (
            f"calibrated on {self.clean_images} training images of {self.data}, and {attacked}"
            + (f"; no image visits {', '.join(self.all_rows)}" if self.all_rows else "")
        )


class RouterPrecision(Frozen):
    """Routes that routers of the lower precision would take, and the cost that they are not.

    Agreement is that of :class:`ParityReport`; times are medians in ms of one batch, taken in turn.
    """

    route_agreement_lowered: float
    route_agreement: float
    batch: int
    n: int
    lowered_ms: float
    shipped_ms: float


class OwnAttack(Frozen):
    """Robust accuracy where each of two models is attacked by its own answers.

    The gradients are the reference's for both. The drop, in points, has a 95 % interval.
    """

    robust_accuracy: Pair
    least_drop: float
    most_drop: float

    def __str__(self) -> str:
        pair = self.robust_accuracy
        return (
            f"{100 * pair.reference:.1f} % in torch, {100 * pair.engine:.1f} % here, a drop of "
            f"{self.least_drop:.1f} to {self.most_drop:.1f} points"
        )


class PrecisionReport(Frozen):
    """Comparison of a lower precision with the torch model, and what had to stay in a higher one.

    ``raised`` says of each segment that did why. ``prediction_agreement`` is the share
    of the parity's images that get the same class. Accuracies, shares in [0, 1], are those of
    ``holdout_images`` images of the hold-out split of ``data``, clean and under ``attack``, whose
    examples were found on the torch model; ``attacked_route_agreement`` is that of the attacked
    ones, and ``own_attack`` what withstood when each was attacked by its own answers. They are
    ``None`` where no labelled images or no threat model are known; the limit on the drop, in
    points, then holds for predictions that differ. ``attacks`` are all that examples were found by,
    ``attack`` first, those along pathways on the first ``pathway_images`` alone; ``drops`` what was
    lost of each accuracy. Bundles written before there were such have none. ``router`` is ``None``
    unless a router stayed in a higher precision because its routes did not agree.
    """

    raised: dict[str, str]
    prediction_agreement: float
    holdout_images: int
    data: str | None
    attack: AttackSpec | None
    clean_accuracy: Pair | None
    robust_accuracy: Pair | None
    own_attack: OwnAttack | None
    attacked_route_agreement: float | None
    router: RouterPrecision | None
    least_route_agreement: float
    max_drop: float
    attacks: tuple[AttackSpec, ...] = ()
    pathway_images: int = 0
    drops: dict[Accuracy, DropReport] = Field(default_factory=dict)

    def findings(self) -> list[str]:
        """Return what was measured beside the parity, a sentence each."""
        lines = []
        for name, pair in (("clean", self.clean_accuracy), ("robust", self.robust_accuracy)):
            if pair is not None:
                lines.append(
                    f"{name} accuracy {100 * pair.reference:.1f} % in torch, "
                    f"{100 * pair.engine:.1f} % here, on {self.holdout_images} hold-out images of "
                    f"{self.data} (limit: {self.max_drop:g} points lost)"
                )
        if self.pathway_images:
            lines.append(f"the first {self.pathway_images} were attacked along pathways, too")
        if self.own_attack is not None:
            lines.append(f"each attacked by its own answers: {self.own_attack}")
        lines += [f"{ACCURACIES[name]}: {drop}" for name, drop in self.drops.items()]
        if self.clean_accuracy is None:
            lines.append("accuracy was not measured: there were no labelled images")
        if self.router is not None:
            router = self.router
            lines.append(
                "with everything lowered, routers included, "
                f"{100 * router.route_agreement_lowered:.4g} % of the clear routes would agree "
                f"and a batch of {router.batch} take {router.lowered_ms:.3g} ms instead of "
                f"{router.shipped_ms:.3g}; export --least-route-agreement allows it "
                "where accuracy holds"
            )
        return lines


ProfiledModel = Literal["moe", "dense", "s-dense", "unfused"]


class LatencyRow(Frozen):
    """Times of one model at one batch size. ``macs`` is per image, as executed."""

    model: ProfiledModel
    engine: str
    precision: Precision
    batch: int
    threads: int
    device: str
    n: int
    warmup: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    macs: int


class LatencyRatio(Frozen):
    """Ratio of the median latency of ``a`` to that of ``b``, with a 95 % bootstrap interval.

    ``a`` ran on ``a_engine`` in ``a_precision``, ``b`` on ``engine`` in ``precision``.
    """

    a: ProfiledModel
    a_engine: str
    a_precision: Precision = "fp32"
    b: ProfiledModel
    batch: int
    engine: str
    precision: Precision = "fp32"
    ratio: float
    ci_low: float
    ci_high: float

    @property
    def same_engine(self) -> bool:
        """True if both ran on one engine in one precision; else the ratio is of engines, too."""
        return (self.a_engine, self.a_precision) == (self.engine, self.precision)

    @property
    def words(self) -> str:
        """Speed of ``b`` beside ``a`` in words, with their engines where those differ."""
        a, b = (MODEL_NAMES.get(name, name) for name in (self.a, self.b))
        if not self.same_engine:
            a = f"{a} on {self.a_engine} {self.a_precision}"
            b = f"{b} on {self.engine} {self.precision}"
        return f"{b} {self.ratio:.2f}x as fast as {a}"


MODEL_NAMES = {"moe": "MoE", "s-dense": "S-Dense"}


class LatencyReport(Frozen):
    """Latency of the MoE and its baselines, interleaved in one process.

    ``warnings`` say where routing costs more than it saves.
    """

    rows: tuple[LatencyRow, ...]
    ratios: tuple[LatencyRatio, ...]
    versions: dict[str, str]
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
