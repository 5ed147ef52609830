"""The command ``analyze``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.completion import named_models
from advmoe_deploy.cli.grid import Grid
from advmoe_deploy.cli.options import (
    NAMED,
    ClassMap,
    Data,
    Epsilon,
    Json,
    Overwrite,
    Threads,
    names,
    seconds_of,
    use_torch_threads,
)
from advmoe_deploy.cli.session import session
from advmoe_deploy.cli.several.alpha import blend_run
from advmoe_deploy.cli.several.dissect import dissect_runs
from advmoe_deploy.cli.several.options import TrialOptions
from advmoe_deploy.errors import UsageError, one_line, unknown_name
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from advmoe_deploy.analysis.analyze import AnalysisReport
    from advmoe_deploy.analysis.routing_change import MovedImage
    from advmoe_deploy.analysis.sections import Section
    from advmoe_deploy.analysis.smoothing import Smoothing
    from advmoe_deploy.models.stored import StoredModel

REPORT = "analysis.json"
_STEPS = 20


def analyze(
    paths: Annotated[
        list[Path],
        typer.Argument(
            readable=False,
            metavar="RUN|BUNDLE",
            autocompletion=named_models,
            help=f"What 'train' or 'export' wrote{NAMED} Of --dissect and --alpha several.",
        ),
    ],
    data: Data = None,
    class_map: ClassMap = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Test images to look at.")] = 200,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="SECTIONS",
            help="Of routes, changes, experts, lipschitz, certificate, radii, capacity, smoothing; "
            "by default the first five, with those of --radii, --capacity and --smoothing.",
        ),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            "--radii",
            metavar="R1,R2,...",
            help="Attack at each of these radii as V-MoE's study does, such as 1/255,4/255 or "
            "1/255..20/255.",
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity",
            metavar="C1,C2,...",
            help="Batch-prioritised evaluation: an expert has room for each of these parts of its "
            "even share of a batch, such as 0.5,1,2.",
        ),
    ] = None,
    twin: Annotated[
        Path | None,
        typer.Option(
            "--twin",
            readable=False,
            metavar="RUN|BUNDLE",
            help="A dense model that --radii and --capacity show beside this one.",
        ),
    ] = None,
    smoothing: Annotated[
        int | None,
        typer.Option(
            "--smoothing",
            min=1,
            metavar="N",
            help="Certify by randomized smoothing with N noises per image.",
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option("--sigma", help="Noise of --smoothing, in [0, 1] pixels; by default 0.25."),
    ] = None,
    dissect: Annotated[
        bool,
        typer.Option(
            "--dissect",
            help="Tell what a robust router and robust experts are each worth: of a run trained on "
            "clean images, and of its parts trained on from there.",
        ),
    ] = False,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            metavar="VALUES",
            help="Blend a dual model anew at each alpha, such as 0.5..1, without training; runs "
            "named after it are attacked beside it.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="Steps of each PGD; by default 20, and 40 for --radii and --capacity, as V-MoE's "
            "study has it.",
        ),
    ] = None,
    epsilon: Epsilon = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Time for all of it, such as 2m: fewer images, or sections, and it says so.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=(1 << 64) - 1, help="Of attacks and noise.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            readable=False,
            help="By default RUN/analysis, BUNDLE-analysis, or ./NAME-analysis of a name; of "
            "--dissect ./dissection, of --alpha ./NAME-alpha.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Look into a model: routes, experts, attacks on both.

    It also says what can be certified of them.
    """
    seconds = None if budget is None else seconds_of(budget)
    on_request = {"radii": radii, "capacity": capacity, "smoothing": smoothing}
    alone: dict[str, object] = {f"--{name}": value for name, value in on_request.items()}
    alone |= {"--sigma": sigma, "--only": only, "--twin": twin, "--budget": budget}
    _require_sense(paths, alone, dissect=dissect, alpha=alpha)
    chosen = _named(only)
    also = tuple(name for name, value in on_request.items() if value is not None)
    if sigma is not None and "smoothing" not in (*chosen, *also):
        raise UsageError("--sigma is the noise of --smoothing; give --smoothing 1000 too")
    epsilon_of_all = epsilon if chosen else None  # else sections that it is for are run, too
    grid = Grid.of(radii, capacity, twin, {*chosen, *also}, epsilon_of_all)
    use_threads(threads)
    with session(as_json, loads=True) as ui:
        if dissect or alpha is not None:
            several = TrialOptions(
                tuple(paths),
                data,
                class_map,
                images,
                epsilon,
                steps or _STEPS,
                seed,
                out,
                overwrite,
                threads,
            )
            if alpha is not None:
                blend_run(several, alpha, ui)
            else:
                dissect_runs(several, ui)
            return
        (path,) = paths
        use_torch_threads(threads)
        from advmoe_deploy.analysis.analyze import AnalysisSettings
        from advmoe_deploy.analysis.analyze import analyze as analyze_model
        from advmoe_deploy.analysis.sections import sections_for
        from advmoe_deploy.cli.pages import analysis_report
        from advmoe_deploy.cli.pages import page as pages
        from advmoe_deploy.cli.tables import analysis as analysis_tables
        from advmoe_deploy.data.matching import read_class_map
        from advmoe_deploy.files import refuse_existing, staged_directory
        from advmoe_deploy.models.stored import open_stored
        from advmoe_deploy.zoo.resolve import place_for, resolve

        wanted, certified = _wanted(chosen), _smoothing(sigma, smoothing, seed)
        pages.require_libraries()
        stored = open_stored(resolve(path))
        target = out or place_for(path, stored.path, "analysis", _beside(stored))
        refuse_existing(target, overwrite=overwrite, marker=REPORT)
        sections = sections_for(stored.model, wanted, _wanted(also) or ())
        journal = target.with_name(f".{target.name}.smoothing.jsonl")
        settings = AnalysisSettings(
            sections=sections,
            images=images,
            data=data,
            class_map=read_class_map(class_map),
            epsilon=epsilon,
            steps=steps or _STEPS,
            seed=seed,
            protocol=grid.protocol(steps, seed),
            smoothing=certified,
            journal=journal,
            budget=seconds,
        )
        measured: list[AnalysisReport] = []
        if "smoothing" in sections:
            ui.resumable(has_state=journal.is_file)
        moved: list[MovedImage] = []
        with ui.keeping(measured, lambda: analysis_tables.sections(measured[0])):
            report = analyze_model(
                stored, settings, measured=measured, moved=moved, progress=ui.progress
            )
            measured.append(report)
            with staged_directory(target, overwrite=overwrite) as staged:
                analysis_report.write_report(report, moved, staged, REPORT, threads=threads)
        if "smoothing" in sections:
            journal.unlink(missing_ok=True)
        value = {"out": str(target), **report.model_dump(mode="json")}
        ui.show(value, lambda: analysis_tables.screen(report, target))


def _require_sense(
    paths: list[Path], alone: Mapping[str, object], *, dissect: bool, alpha: str | None
) -> None:
    """Refuse options, ``alone`` those for one model, that contradict each other."""
    if dissect and alpha is not None:
        raise UsageError("--dissect and --alpha are two analyses; ask for one")
    if not dissect and alpha is None:
        if len(paths) > 1:
            raise UsageError(
                f"analyze looks into one model, not {len(paths)}; --dissect and --alpha take "
                "several runs"
            )
        return
    if given := [option for option, value in alone.items() if value is not None]:
        which = "--dissect" if dissect else "--alpha"
        raise UsageError(f"{given[0]} is for the analysis of one model; leave it out of {which}")


def _named(only: str | None) -> tuple[str, ...]:
    chosen = () if only is None else names(only)
    if only is not None and not chosen:
        raise UsageError(f"--only '{only}' names no section; write --only routes,experts")
    return chosen


def _wanted(chosen: tuple[str, ...]) -> "tuple[Section, ...] | None":
    """Return the sections of these names, or ``None`` where there is none."""
    from advmoe_deploy.analysis.sections import SECTIONS

    for section in chosen:
        if section not in SECTIONS:
            raise unknown_name("section", section, SECTIONS)
    return tuple(section for section in SECTIONS if section in chosen) or None


def _smoothing(sigma: float | None, samples: int | None, seed: int) -> "Smoothing":
    from pydantic import ValidationError

    from advmoe_deploy.analysis.smoothing import Smoothing

    given = {"sigma": sigma, "n": samples, "seed": seed}
    try:
        return Smoothing.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        raise UsageError(f"smoothing: {one_line(error)}") from None


def _beside(stored: "StoredModel") -> Path:
    """Return where the report of a run or, beside it, of a bundle goes."""
    path = stored.path.resolve()
    if stored.sealed:  # a bundle holds what its manifest lists and nothing else
        return path.with_name(f"{path.name}-analysis")
    return stored.path / "analysis"
