"""``analyze --alpha``: a dual model's blend over alpha, without training."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe_deploy.cli.ranges import numbers_of
from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.several.options import TrialOptions
from advmoe_deploy.cli.verdicts.said import Said, listed, percent
from advmoe_deploy.errors import UsageError
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from advmoe_deploy.analysis.redundancy import Withstood
    from advmoe_deploy.analysis.several.blend import BlendPoint, BlendReport, ComparedRun
    from advmoe_deploy.analysis.shares import Marked
    from advmoe_deploy.cli.several.presentation import Presentation, Table
    from advmoe_deploy.specs import Frozen

REPORT = "alpha.json"


def alphas_of(text: str) -> tuple[float, ...]:
    """Return the values of ``0.5..1`` or ``0.5,0.7``, each a share in [0, 1].

    Raises:
        UsageError: they are none, or one is given twice.
    """
    try:
        values = numbers_of(text, "0.5..1 or 0.5,0.7,1")
    except ValueError as error:
        raise UsageError(f"--alpha '{text}': {error}") from None
    if not values or len(set(values)) < len(values):
        raise UsageError(f"--alpha '{text}' has no value, or one twice; write 0.5..1 or 0.5,0.7,1")
    if odd := [value for value in values if not 0 <= value <= 1]:
        raise UsageError(f"--alpha {odd[0]:g} is no share in [0, 1]; write 0.5..1")
    return values


def blend_run(options: TrialOptions, text: str, ui: Session) -> None:
    """Attack the dual model named first at each alpha, and the runs named after it as they are."""
    alphas = alphas_of(text)
    first, *_ = options.paths
    _require_dual(first)
    measured: list[BlendPoint | ComparedRun] = []

    def make() -> tuple[Frozen, dict[str, str], Presentation]:
        from advmoe_deploy.analysis.several.blend import blend
        from advmoe_deploy.models.stored import open_stored
        from advmoe_deploy.zoo.resolve import resolve

        stored, *beside = [open_stored(resolve(path)) for path in options.paths]
        report = blend(
            stored,
            alphas,
            options.settings(),
            beside=beside,
            measured=measured,
            progress=ui.progress,
        )
        return report, report.versions, shown_blend(report)

    def found() -> dict[str, Withstood]:
        return {_name(one): one.withstood for one in measured}

    out = options.out or Path(f"{first.resolve().name}-alpha")
    options.write(ui, out, REPORT, make, measured, found)


def _name(one: BlendPoint | ComparedRun) -> str:
    from advmoe_deploy.analysis.several.blend import BlendPoint

    return f"alpha {one.alpha:g}" if isinstance(one, BlendPoint) else one.recipe or one.run


def _require_dual(path: Path) -> None:
    """Refuse a model that blends nothing, before PyTorch is loaded."""
    from advmoe_deploy.train.origin import origin_of
    from advmoe_deploy.zoo.resolve import resolve

    family = origin_of(str(path), resolve(path)).spec.family
    if family != "dual-model":
        raise UsageError(
            f"{path} is of family {family} and blends nothing; first name one of family dual-model"
        )


def shown_blend(report: BlendReport) -> Presentation:
    """Return what screen and page show of ``report``."""
    from advmoe_deploy.cli.several.presentation import Presentation

    return Presentation(
        "advmoe analyze --alpha",
        report.recipe or report.model,
        _verdict(report),
        f"Blend of two mixtures, (1 - alpha) * standard + alpha * robust, trained at alpha "
        f"{report.trained_alpha:g} and blended anew, untrained: {report.images} test images of "
        f"{report.data}, l-inf epsilon {epsilon_text(report.threat.epsilon)}, PGD-{report.steps}, "
        f"seed {report.seed}.",
        (_table(report),),
        {"front": partial(_draw_front, report=report), "over": partial(_draw_over, report=report)},
    )


def _verdict(report: BlendReport) -> list[Said]:
    return [
        _best(report, "Most images withstand PGD with every target", lambda one: one.together),
        _best(report, "Most are right unattacked", lambda one: one.accuracy),
        *(
            Said(
                f"Beside it {_name(other)}: {percent(other.withstood.accuracy.value)} right "
                f"unattacked, {percent(other.withstood.together.value)} withstand PGD with every "
                "target"
            )
            for other in report.beside
        ),
    ]


def _best(report: BlendReport, what: str, share: Callable[[Withstood], Marked]) -> Said:
    """Return the best alpha, and those that these images, by which it was picked, leave as good."""
    from advmoe_deploy.analysis.shares import difference_of

    best = max(report.points, key=lambda p: (share(p.withstood).value, _place(p.withstood)))
    alike = [
        f"{p.alpha:g}"
        for p in report.points
        if p is not best and difference_of(share(best.withstood), share(p.withstood)).low <= 0
    ]
    found = best.withstood
    text = (
        f"{what} at alpha {best.alpha:g}: {percent(found.accuracy.value)} are right unattacked, "
        f"{percent(found.together.value)} withstand"
    )
    if not alike:
        return Said(text)
    return Said(
        f"{text}; {report.images} images do not tell it from alpha {listed(alike)}", "unsure"
    )


def _table(report: BlendReport) -> Table:
    from advmoe_deploy.cli.several.presentation import NOTE, WITHSTOOD, Table, cells

    rows = [
        (_name(p), *cells(p.withstood), "yes" if p.alpha in report.front else "")
        for p in report.points
    ]
    rows += [(_name(other), *cells(other.withstood), "") for other in report.beside]
    return Table(
        "Accuracy and robustness over alpha",
        ("model", *WITHSTOOD, "front"),
        tuple(rows),
        f"Front: on these images no other alpha is as good both unattacked and under PGD with all "
        f"targets, and better in one. {NOTE}",
    )


def _draw_front(axes: Axes, report: BlendReport) -> str:
    """Draw robust over clean accuracy, a point for each alpha, the front joined."""
    from advmoe_deploy.cli.pages.plots import EXPERT_COLOURS, MOE, legend_below

    points: dict[tuple[float, float], list[str]] = {}
    for point in report.points:  # several at one place are named together
        points.setdefault(_place(point.withstood), []).append(f"{point.alpha:g}")
    front = sorted({_place(p.withstood) for p in report.points if p.alpha in report.front})
    for (x, y), names in points.items():
        axes.plot(x, y, "o", color=MOE, mfc=MOE if (x, y) in front else "none")
        axes.annotate(", ".join(names), (x, y), xytext=(4, 4), textcoords="offset points")
    axes.plot(*zip(*front, strict=True), "-", color=MOE, lw=1.2, label="front")
    for other, colour in zip(report.beside, cycle(EXPERT_COLOURS[1:]), strict=False):
        axes.plot(*_place(other.withstood), "s", color=colour, label=other.recipe or other.run)
    axes.margins(0.12)
    axes.set(xlabel="clean accuracy, %", ylabel="PGD, all targets, %")
    axes.set_title("Accuracy and robustness")
    legend_below(axes)
    seen = (
        f"alpha {p.alpha:g} {percent(p.withstood.accuracy.value)} and "
        f"{percent(p.withstood.together.value)}"
        for p in report.points
    )
    return f"clean and robust, {', '.join(seen)}"


def _place(found: Withstood) -> tuple[float, float]:
    return 100 * found.accuracy.value, 100 * found.together.value


def _draw_over(axes: Axes, report: BlendReport) -> str:
    """Draw each accuracy over alpha."""
    from advmoe_deploy.cli.pages.plots import EXPERT_COLOURS, INK, legend_below
    from advmoe_deploy.cli.several.presentation import WITHSTOOD, shares

    points = sorted(report.points, key=lambda point: point.alpha)
    x = [point.alpha for point in points]
    for index, (name, colour) in enumerate(zip(WITHSTOOD, EXPERT_COLOURS, strict=False)):
        y = [100 * shares(point.withstood)[index].value for point in points]
        axes.plot(x, y, "o-", color=colour, label=name)
    axes.axvline(report.trained_alpha, color=INK, lw=0.8, ls=":", label="trained")
    axes.set(ylim=(0, 102), xlabel="alpha", ylabel="accuracy, %")
    axes.set_title("Over alpha")
    legend_below(axes, 3)
    return f"accuracies at alpha {', '.join(f'{value:g}' for value in x)}"
