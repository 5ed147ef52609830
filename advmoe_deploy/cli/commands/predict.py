"""The command ``predict``."""

from pathlib import Path
from typing import Annotated

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
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.process import use_threads


def predict(
    bundle: BundlePath,
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="DIR|GLOB|FILE|-",
            help="Images, .tar shards (WebDataset), .parquet tables, or a .txt list of such files; "
            "- reads the list from standard input.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", readable=False, help="A .jsonl or .parquet file, one row per input."
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
    """Classify files: one row per input, unreadable ones included."""
    if source is None or output is None:
        raise UsageError("files need both --input and --output; see 'advmoe predict --help'")
    use_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables import predict as tables
        from advmoe_deploy.serving.batch import classify_files

        report = classify_files(
            open_bundle(bundle, signed_by=require_signature),
            source,
            output,
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
    if report.errors == report.images:
        raise DataError(
            f"none of {report.images} inputs could be read; the column error of {output} says why"
        )
    if report.errors and on_error is OnError.fail:
        raise DataError(
            f"{report.errors} of {report.images} inputs could not be read; "
            f"the column error of {output} says why"
        )
