"""The commands that answer: serve, predict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import BundlePath, Engine, Json, OnError, Overwrite, Threads
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.errors import DataError, UsageError

if TYPE_CHECKING:
    from advmoe_deploy.serving.oip_protocol import ServedModel

Input = Annotated[
    str | None,
    typer.Option("--input", metavar="DIR|GLOB|FILE", help="Images, or a .txt list of paths."),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="A .jsonl or .parquet file, one row per input.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images per inference.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Also list the best K classes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
ErrorPolicy = Annotated[
    OnError, typer.Option("--on-error", help="Exit 0 or 3 if some inputs are unreadable.")
]


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in, without authentication.")
    ] = False,
    engine: Engine = "onnxruntime",
    threads: Threads = 0,
    source: Input = None,
    output: Output = None,
    batch: Batch = 64,
    top_k: TopK = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    on_error: ErrorPolicy = OnError.keep,
    as_json: Json = False,
) -> None:
    """Serve over the Open Inference Protocol, or classify files with --input and --output."""
    if source is not None or output is not None:
        return predict(
            bundle,
            source,
            output,
            engine,
            threads,
            batch,
            top_k,
            resume,
            overwrite,
            on_error,
            as_json,
        )
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.serving.oip import serve as serve_bundle

        serve_bundle(
            open_bundle(bundle),
            host,
            port,
            insecure=insecure,
            engine=engine,
            threads=threads,
            announce=lambda url, model: _announce(ui, url, model),
        )
    return None


def predict(
    bundle: BundlePath,
    source: Input = None,
    output: Output = None,
    engine: Engine = "onnxruntime",
    threads: Threads = 0,
    batch: Batch = 64,
    top_k: TopK = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    on_error: ErrorPolicy = OnError.keep,
    as_json: Json = False,
) -> None:
    """Classify files: one row per input, unreadable ones included."""
    if source is None or output is None:
        raise UsageError("files need both --input and --output; see 'advmoe predict --help'")
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli import tables
        from advmoe_deploy.serving.batch import classify_files

        report = classify_files(
            open_bundle(bundle),
            source,
            output,
            engine=engine,
            threads=threads,
            batch=batch,
            top_k=top_k,
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


def _announce(ui: Session, url: str, model: "ServedModel") -> None:
    value = {"url": url, "model": model.name, "infer": f"{url}/v2/models/{model.name}/infer"}
    ui.progress.note(f"serving '{model.name}' at {url}; Ctrl-C or SIGTERM stops it")
    ui.show(value, lambda: f"POST {value['infer']}")
