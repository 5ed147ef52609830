"""The command ``predict``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import (
    BundlePath,
    Engine,
    Json,
    OnError,
    Overwrite,
    Place,
    SignedBy,
    Threads,
)
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from advmoe_deploy.serving.job import BatchReport

_STDOUT = "-"


def predict(
    context: typer.Context,
    bundle: BundlePath,
    source: Annotated[
        str | None,
        typer.Argument(metavar="INPUT", help="What --input takes.", show_default=False),
    ] = None,
    named: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="DIR|GLOB|FILE|-",
            help="Images, .tar shards (WebDataset), .parquet tables, or a .txt list of such files; "
            "- reads the list from standard input.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE|-",
            help="A .jsonl, .parquet or .csv file, one row per input; - writes lines of JSON to "
            "stdout. One picture needs none: its answer is shown.",
        ),
    ] = None,
    engine: Engine = None,
    require_signature: SignedBy = None,
    threads: Threads = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per inference.")] = 64,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Also list the best K classes.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="Exit 0 or 3 if some inputs are unreadable.")
    ] = OnError.keep,
    max_errors: Annotated[
        int | None,
        typer.Option(
            "--max-errors",
            min=0,
            metavar="N",
            help="Stop with exit code 3 at more than N unreadable inputs; the rows are kept for "
            "--resume. Without it there is no limit.",
        ),
    ] = None,
    on: Annotated[
        Place,
        typer.Option(
            "--on",
            help="Run in this process, or by Ray on many (extra 'ray'): on the cluster of "
            "RAY_ADDRESS, else on this machine, with --threads each (1). The rows are the same.",
        ),
    ] = Place.local,
    as_json: Json = False,
) -> None:
    """Classify images: one on the screen, many into a file.

    Each input has a row, readable or not. A folder whose sub-folders are called as classes of the
    model also gives accuracy.
    """
    found = _input(source, context.args, named)
    to_stdout = output == _STDOUT
    if (resume or overwrite) and (output is None or to_stdout):
        raise UsageError("--resume and --overwrite go with an --output file; name one")
    if to_stdout and as_json:
        raise UsageError("--json prints one object, and --output - lines; leave out one of them")
    if output is None and (found == "-" or on is Place.ray):
        raise UsageError("many inputs need --output: FILE.jsonl, .parquet or .csv, or - for stdout")
    if engine == Place.ray.value:
        raise UsageError("'ray' is no engine but a place to compute on; say --on ray")
    use_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables import predict as tables
        from advmoe_deploy.serving.batch import classify_files
        from advmoe_deploy.serving.one import classify_one
        from advmoe_deploy.serving.resume import journal_of
        from advmoe_deploy.serving.stream import stream_files

        opened = open_bundle(bundle, signed_by=require_signature)
        if output is None:
            answer = classify_one(
                opened, found, engine=engine, threads=threads, top_k=top_k, progress=ui.progress
            )
            ui.show(answer.model_dump(mode="json"), lambda: tables.one_answer(answer))
            return
        if to_stdout:
            report = stream_files(
                opened,
                found,
                ui.write,
                engine=engine,
                threads=threads,
                batch=batch,
                top_k=top_k,
                max_errors=max_errors,
                on=on.value,
                progress=ui.progress,
            )
            _say(ui, tables.batch_lines(report))
        else:
            ui.resumable(
                "--resume",
                without=("--overwrite",),
                has_state=journal_of(Path(output)).is_file,
            )
            report = classify_files(
                opened,
                found,
                Path(output),
                engine=engine,
                threads=threads,
                batch=batch,
                top_k=top_k,
                max_errors=max_errors,
                on=on.value,
                resume=resume,
                overwrite=overwrite,
                progress=ui.progress,
            )
            ui.show(report.model_dump(mode="json"), lambda: tables.batch_report(report))
    _require_read(report, on_error)


def _input(source: str | None, others: Sequence[str], named: str | None) -> str:
    """Return the input, which is given once: behind the bundle, or by its option."""
    if others:
        raise UsageError(
            f"predict takes one input, and these are {1 + len(others)}; give their folder, a "
            "pattern in quotes or a .txt list: advmoe predict BUNDLE 'photos/*.jpg' --output "
            "FILE.jsonl"
        )
    if source is not None and named is not None:
        raise UsageError(f"two inputs, '{source}' and --input '{named}'; give one")
    found = source if named is None else named
    if found is None:
        raise UsageError(
            "no input; name a picture, a folder or a pattern behind the bundle, such as "
            "'advmoe predict BUNDLE photo.jpg'"
        )
    return found


def _say(ui: Session, lines: list[str]) -> None:
    """Put ``lines`` on stderr, for the rows are on stdout."""
    for line in lines:
        ui.progress.note(line)


def _require_read(report: "BatchReport", on_error: OnError) -> None:
    why = f"the column error of {report.output} says why"
    if report.output == _STDOUT:
        why = "the field error of their lines says why"
    if report.errors == report.images:
        raise DataError(f"none of {report.images} inputs could be read; {why}")
    if report.errors and on_error is OnError.fail:
        raise DataError(f"{report.errors} of {report.images} inputs could not be read; {why}")
