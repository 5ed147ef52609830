"""The command ``analyze``."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.completion import named_models
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
from advmoe_deploy.cli.several.asked import Asked
from advmoe_deploy.cli.several.dissect import dissect_runs
from advmoe_deploy.errors import UsageError, one_line, unknown_name
from advmoe_deploy.process import use_threads
from advmoe_deploy.settings import epsilon_of

if TYPE_CHECKING:
    from advmoe_deploy.analysis.analyze import AnalysisReport
    from advmoe_deploy.analysis.protocol.radii import Protocol
    from advmoe_deploy.analysis.routing_change import MovedImage
    from advmoe_deploy.analysis.sections import Section
    from advmoe_deploy.analysis.smoothing import Smoothing
    from advmoe_deploy.models.stored import StoredModel

REPORT = "analysis.json"


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
            "by default the first five.",
        ),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            "--radii",
            metavar="R1,R2,...",
            help="Attack at each of these radii as V-MoE's study does, such as 1/255,4/255,20/255.",
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
        float, typer.Option("--sigma", help="Noise of the smoothing, in [0, 1] pixels.")
    ] = 0.25,
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
            help="Steps of each PGD: 20, or the 40 of V-MoE's study, unless given.",
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
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of attacks and noise.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            readable=False,
            help="By default RUN/analysis, BUNDLE-analysis, or ./NAME-analysis of a name.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Look into a model: routes, experts, what attacks do to both, and what can be certified."""
    seconds = None if budget is None else seconds_of(budget)
    alone = {
        "--only": only,
        "--radii": radii,
        "--capacity": capacity,
        "--twin": twin,
        "--smoothing": smoothing,
        "--budget": budget,
    }
    _require_sense(paths, alone, dissect=dissect, alpha=alpha)
    chosen = _sections_named(only)
    also = _asked_for(radii=radii, capacity=capacity, smoothing=smoothing)
    if twin is not None and not {"radii", "capacity"} & {*chosen, *also}:
        raise UsageError("--twin stands beside --radii or --capacity; give one of them")
    grid = _parts(radii, "--radii", epsilon_of), _parts(capacity, "--capacity", _ratio_of)
    use_threads(threads)
    with session(as_json, loads=True) as ui:
        if dissect or alpha is not None:
            several = Asked(
                tuple(paths),
                data,
                class_map,
                images,
                epsilon,
                steps or 20,
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
        from advmoe_deploy.analysis.analyze import Settings
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
        sections = sections_for(stored.model, wanted, also)
        journal = target.with_name(f".{target.name}.smoothing.jsonl")
        settings = Settings(
            sections=sections,
            images=images,
            data=data,
            class_map=read_class_map(class_map),
            epsilon=epsilon,
            steps=steps or 20,
            seed=seed,
            protocol=_protocol(steps, *grid, open_stored(resolve(twin)) if twin else None, seed),
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
                f"analyze looks into one model, not {len(paths)}; --dissect takes several runs"
            )
        return
    if given := [option for option, value in alone.items() if value is not None]:
        which = "--dissect" if dissect else "--alpha"
        raise UsageError(f"{given[0]} is for the analysis of one model; leave it out of {which}")


def _sections_named(only: str | None) -> tuple[str, ...]:
    chosen = () if only is None else names(only)
    if only is not None and not chosen:
        raise UsageError(f"--only '{only}' names no section; write --only routes,experts")
    return chosen


def _wanted(chosen: tuple[str, ...]) -> "tuple[Section, ...] | None":
    from advmoe_deploy.analysis.sections import SECTIONS

    for section in chosen:
        if section not in SECTIONS:
            raise unknown_name("section", section, SECTIONS)
    return tuple(section for section in SECTIONS if section in chosen) or None


def _asked_for(**values: object) -> "tuple[Section, ...]":
    """Return the sections whose own option was given."""
    return tuple(name for name, value in values.items() if value is not None)  # type: ignore[misc]


def _parts(
    text: str | None, option: str, number: Callable[[str], float]
) -> tuple[float, ...] | None:
    """Return the numbers of a list, each once; ``None`` where the option was not given."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(map(number, names(text))))
    if not found:
        raise UsageError(f"{option} '{text}' names no number; write {option} 0.5,1")
    return found


def _ratio_of(text: str) -> float:
    with suppress(ValueError):
        if 0 < (ratio := float(text)) < inf:
            return ratio
    raise UsageError(f"capacity '{text}' is no positive number; write --capacity 0.5,1,2")


def _protocol(
    steps: int | None,
    radii: tuple[float, ...] | None,
    capacities: tuple[float, ...] | None,
    twin: "StoredModel | None",
    seed: int,
) -> "Protocol":
    from advmoe_deploy.analysis.protocol.radii import Protocol

    given = {"steps": steps, "radii": radii, "capacities": capacities}
    said = {name: value for name, value in given.items() if value is not None}
    return Protocol(**said, twin=twin, seed=seed)  # type: ignore[arg-type]


def _smoothing(sigma: float, draws: int | None, seed: int) -> "Smoothing":
    from pydantic import ValidationError

    from advmoe_deploy.analysis.smoothing import Smoothing

    fields = {"sigma": sigma, "seed": seed, **({"n": draws} if draws else {})}
    try:
        return Smoothing.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"smoothing: {one_line(error)}") from None


def _beside(stored: "StoredModel") -> Path:
    """Return where the report of a run or, beside it, of a bundle goes."""
    path = stored.path.resolve()
    if stored.sealed:  # a bundle holds what its manifest lists and nothing else
        return path.with_name(f"{path.name}-analysis")
    return stored.path / "analysis"
