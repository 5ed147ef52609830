"""The command ``serve``."""

from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import BundlePath, Engine, Json, Threads
from advmoe_deploy.cli.session import Session, session
from advmoe_deploy.errors import UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from advmoe_deploy.serving.online.protocol import ServedModel


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in, without authentication.")
    ] = False,
    keep_alive: Annotated[
        int,
        typer.Option("--keep-alive", min=0, help="Seconds until an idle connection is closed."),
    ] = 75,
    engine: Engine = "onnxruntime",
    threads: Threads = 0,
    files: Annotated[str | None, typer.Option("--input", "--output", hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Serve over the Open Inference Protocol."""
    if files is not None:
        raise UsageError("serve answers requests; 'advmoe predict' classifies files, same options")
    use_threads(threads)
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.serving.online.serve import serve as serve_bundle

        serve_bundle(
            open_bundle(bundle),
            host,
            port,
            insecure=insecure,
            engine=engine,
            threads=threads,
            keep_alive=keep_alive,
            announce=lambda url, model: _announce(ui, url, model),
        )


def _announce(ui: Session, url: str, model: "ServedModel") -> None:
    value = {"url": url, "model": model.name, "infer": f"{url}/v2/models/{model.name}/infer"}
    ui.progress.note(f"serving '{model.name}' at {url}; Ctrl-C or SIGTERM stops it")
    ui.show(value, lambda: f"POST {value['infer']}")
