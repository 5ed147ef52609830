"""The command ``serve``."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import Engine, Json, LogFormat, SignedBy, Threads
from advmoe_deploy.cli.session import Session, session, spell_errors
from advmoe_deploy.errors import UsageError
from advmoe_deploy.process import use_threads

if TYPE_CHECKING:
    from advmoe_deploy.serving.online.operations.requests import Watcher
    from advmoe_deploy.serving.online.serve import Started


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...",
            help="What 'advmoe export' wrote, by path or name; several with a name each, as "
            "NAME=BUNDLE or NAME:VERSION=BUNDLE, such as cats:2=cats-bundle. Where a request "
            "names no version, the latest answers.",
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            "--grpc-port",
            help="Port of the same protocol over gRPC, usually 8001; 0 takes any free one. Without "
            "it there is no gRPC.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in, without a token.")
    ] = False,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="A file, closed to others, with the token that requests have to show as "
            "'Authorization: Bearer TOKEN', over gRPC as well; health is told without.",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            "--tls-cert",
            metavar="PEM",
            help="Certificate chain; both ports then speak TLS alone. With --tls-key.",
        ),
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option("--tls-key", metavar="PEM", help="Key of the certificate, unencrypted."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Another name that requests may call a server on the loopback; repeatable.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images that are computed together, at most.")
    ] = 64,
    delay_ms: Annotated[
        float,
        typer.Option("--delay-ms", min=0, help="How long a batch waits for requests on their way."),
    ] = 2.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Images that may wait; more are answered 503.")
    ] = 4096,
    memory: Annotated[
        int,
        typer.Option("--memory", min=1, metavar="MIB", help="For bodies and images that wait."),
    ] = 512,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0, help="Seconds until a request's computation begins."),
    ] = 30.0,
    connections: Annotated[
        int, typer.Option("--connections", min=1, help="Open at once; more are answered 503.")
    ] = 8192,
    keep_alive: Annotated[
        float,
        typer.Option("--keep-alive", min=0, help="Seconds until an idle connection is closed."),
    ] = 75.0,
    body_timeout: Annotated[
        float,
        typer.Option(
            "--body-timeout",
            min=0,
            help="Seconds for a request's body to come, and for its answer to be read.",
        ),
    ] = 30.0,
    drain: Annotated[
        float,
        typer.Option("--drain", min=0, help="Seconds from SIGTERM to closing the port, not ready."),
    ] = 1.0,
    allow_reload: Annotated[
        bool,
        typer.Option(
            "--allow-reload",
            help="Let a request (POST /v2/repository/models/NAME/load) have NAME's bundles loaded "
            "again, as SIGHUP does for all of them.",
        ),
    ] = False,
    page: Annotated[
        bool,
        typer.Option("--page/--no-page", help="A web page at / that takes an image, or none."),
    ] = True,
    monitor_window: Annotated[
        int,
        typer.Option(
            "--monitor-window",
            min=0,
            help="Images whose routes and margins are held together against what the export "
            "recorded; 0 for none.",
        ),
    ] = 512,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            "--log-format",
            help="Of what goes to stderr: lines of text, or JSON, an object a line.",
        ),
    ] = LogFormat.text,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log/--no-access-log",
            help="Log a line for each request: its id, path, status, time, model and images.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Send traces of inference requests to an OpenTelemetry collector; its environment "
            "variables, such as OTEL_EXPORTER_OTLP_ENDPOINT, say where. Needs the extra otel.",
        ),
    ] = False,
    engine: Engine = None,
    require_signature: SignedBy = None,
    threads: Threads = 0,
    files: Annotated[str | None, typer.Option("--input", "--output", hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Serve over HTTP (Open Inference Protocol), with a web page."""
    if files is not None:
        raise UsageError("serve answers requests; 'advmoe predict' classifies files, same options")
    use_threads(threads)
    if log_format is LogFormat.json:
        from advmoe_deploy.serving.online.operations.logs import error_line

        spell_errors(error_line)
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.serving.online.access.tls import read_tls
        from advmoe_deploy.serving.online.access.token import read_token
        from advmoe_deploy.serving.online.limits import COPIES_OF_JSON, Limits
        from advmoe_deploy.serving.online.offers import Offer, split_offer
        from advmoe_deploy.serving.online.operations.logs import log_access, logging_to_stderr
        from advmoe_deploy.serving.online.serve import serve as serve_bundles

        limits = Limits(
            max_images=min(queue, Limits.max_images),
            max_body=min((memory << 20) // COPIES_OF_JSON, Limits.max_body),
            batch=batch,
            delay_s=delay_ms / 1000,
            queue=queue,
            memory=memory << 20,
            timeout_s=timeout,
            connections=connections,
            keep_alive_s=keep_alive,
            body_s=body_timeout,
            drain_s=drain,
            window=monitor_window,
        )
        if (tls_cert is None) != (tls_key is None):
            raise UsageError("a certificate and its key go together; give --tls-cert and --tls-key")

        def offered(name: str | None, version: str, place: str) -> Offer:
            again = partial(open_bundle, place, signed_by=require_signature)
            return Offer(again(), name, version, again)

        places = [split_offer(text) for text in bundles]
        as_objects = log_format is LogFormat.json
        with ExitStack() as stack:
            tell = stack.enter_context(logging_to_stderr(ui.progress.note, as_json=as_objects))
            watchers: list[Watcher] = [log_access] * access_log
            if trace:
                from advmoe_deploy.serving.online.operations.traces import tracing

                watchers.append(stack.enter_context(tracing()))
            stack.enter_context(ui.until_stopped(tell))
            serve_bundles(
                [offered(*each) for each in places],
                host,
                port,
                insecure=insecure,
                engine=engine,
                threads=threads,
                limits=limits,
                hosts=allow_host or (),
                grpc_port=grpc_port,
                token=None if token_file is None else read_token(Path(token_file)),
                tls=read_tls(Path(tls_cert), Path(tls_key)) if tls_cert and tls_key else None,
                allow_reload=allow_reload,
                page=page,
                tell=tell,
                announce=partial(_announce, ui, tell, page=page),
                watchers=watchers,
            )


def _announce(
    ui: Session,
    tell: Callable[[str], None],
    url: str,
    grpc: str | None,
    models: "list[Started]",
    *,
    page: bool,
) -> None:
    several = len({model.name for model in models}) < len(models)
    offered = [_offered(url, model, by_version=several) for model in models]
    names = ", ".join(f"'{name}'" for name in dict.fromkeys(model.name for model in models))
    where = url if grpc is None else f"{url} and by gRPC at {grpc}"
    engines = ", ".join(dict.fromkeys(f"{model.engine} {model.precision}" for model in models))
    tell(f"serving {names} at {where}; computed by {engines}; Ctrl-C or SIGTERM stops it")
    place = f"{url}/" if page else None
    value = {"url": url, "page": place, "grpc": grpc, **offered[0], "models": offered}
    lines = [f"POST {each['infer']}  # tensors" for each in offered]
    lines += [f"gRPC {grpc}"] * (grpc is not None)
    lines += [f"POST {each['image']}  # an image file" for each in offered]
    lines += [f"GET {place}  # a page to drop an image on"] * page
    ui.show(value, lambda: "\n".join(lines))


def _offered(url: str, model: "Started", *, by_version: bool) -> dict[str, str]:
    """Return what answers, and the addresses that take tensors and image files."""
    address = f"{url}/v2/models/{model.name}"
    address += f"/versions/{model.version}" if by_version else ""
    return {
        "model": model.name,
        "version": model.version,
        "engine": model.engine,
        "precision": model.precision,
        "infer": f"{address}/infer",
        "image": f"{address}/image",
    }
