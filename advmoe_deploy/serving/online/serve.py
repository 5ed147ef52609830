"""Online serving by the Open Inference Protocol, version 2: loopback unless told otherwise."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import MachineError, UsageError, missing_extra
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import engine_for, open_runner
from advmoe_deploy.serving.online.access.tls import Tls
from advmoe_deploy.serving.online.access.token import Token
from advmoe_deploy.serving.online.golden import golden_of
from advmoe_deploy.serving.online.limits import BACKLOG, Limits
from advmoe_deploy.serving.online.offers import Offer, require_apart
from advmoe_deploy.serving.online.operations.requests import Watcher
from advmoe_deploy.serving.online.operations.signals import hangups
from advmoe_deploy.serving.online.protocol import served_model
from advmoe_deploy.specs import Precision

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Modules of the extra, and the packages that bring them.
_NEEDED = {
    "fastapi": "fastapi",
    "google": "protobuf",
    "grpc": "grpcio",
    "httptools": "httptools",
    "prometheus_client": "prometheus-client",
    "starlette": "starlette",
    "tritonclient": "tritonclient[grpc]",
    "uvicorn": "uvicorn",
}


def create_app(
    bundle: Bundle, runner: Runner, *, name: str | None = None, limits: Limits | None = None
) -> "FastAPI":
    """Return a FastAPI application that answers for ``bundle`` through an open ``runner``.

    It answers requests that call it by a name of the loopback. Under another server than this
    package's, the work of clients that have left is done all the same.

    Raises:
        BackendUnavailableError: FastAPI, uvicorn or httptools is not installed.
    """
    rest = _rest()
    model = served_model(bundle, name, limits)
    models = rest.Models(model.limits)
    models.add(model, runner, golden_of(bundle))
    app: FastAPI = rest.build_app(models, LOOPBACK)
    return app


@dataclass(frozen=True)
class Started:
    """A model on offer, and the engine and precision that compute its answers."""

    name: str
    version: str
    engine: str
    precision: Precision


def serve(
    offers: Sequence[Offer],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    insecure: bool = False,
    engine: str | None = None,
    threads: int = 0,
    limits: Limits | None = None,
    hosts: Sequence[str] = (),
    grpc_port: int | None = None,
    token: Token | None = None,
    tls: Tls | None = None,
    allow_reload: bool = False,
    page: bool = True,
    announce: Callable[[str, str | None, list[Started]], None] = lambda url, grpc, models: None,
    tell: Callable[[str], None] = lambda line: None,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Serve bundles until SIGTERM; then finish what is under way and return.

    Args:
        offers: opened bundles; where a request asks for no version, the latest answers.
        host: address to listen on.
        port: 0 takes any free one.
        insecure: allow a ``host`` that other machines can reach without a ``token``.
        engine: of each bundle, a name from ``runtime.select.ENGINES``, or ``NAME:PRECISION``; by
            default what that bundle was made for.
        threads: of each engine; 0 is :func:`~advmoe_deploy.process.default_threads`.
        limits: on requests and on all of them together; the queue is each model's own.
        hosts: by which other names requests may call a server on the loopback, such as a proxy's.
        grpc_port: of the same protocol over gRPC, which is off by default; 0 takes any free one.
        token: what requests have to show, but for those that ask for the server's health.
        tls: of both ports.
        allow_reload: let requests have bundles loaded again, as SIGHUP does in any case.
        page: whether there is a web page at ``/``.
        announce: called with the URL, and the address of gRPC, once all models are ready.
        tell: called with a line for each name that was loaded again.
        watchers: called with each request that has ended.

    Raises:
        UsageError: two offers have a name and version in common; ``host`` is not loopback and
            there is no ``token``, or it is no address at all; or ``hosts`` or ``allow_reload`` are
            not for it.
        MachineError: a port is in use or forbidden.
        BackendUnavailableError: FastAPI, uvicorn, httptools, grpcio or the engine is missing.
        CheckFailedError: an engine does not answer the golden images as the bundle says.
        KeyboardInterrupt: it was Ctrl-C that stopped it.
    """
    private = _is_loopback(host)
    if not private and token is None and not insecure:
        raise UsageError(
            f"host '{host}' is open to other machines; let in who shows a token (--token-file), "
            "use 127.0.0.1 behind a proxy, or let everybody in (--insecure)"
        )
    if hosts and not private:
        raise UsageError(
            f"host '{host}' is no loopback, and there requests may use any name; leave out the "
            "names that are allowed (--allow-host)"
        )
    if allow_reload and not private and token is None:
        raise UsageError(
            f"host '{host}' is open to other machines, and whoever reaches it could have bundles "
            "loaded; ask for a token (--token-file), or leave out --allow-reload and send SIGHUP"
        )
    rest = _rest()
    limits = limits or Limits()
    served = [served_model(each.bundle, each.name, limits, each.version) for each in offers]
    require_apart(served)
    names = LOOPBACK | {host.lower(), *(name.lower() for name in hosts)} if private else None
    with _listen(host, port) as listener, ExitStack() as stack:
        url = _url(host, listener.getsockname()[1], tls is not None)
        models = rest.Models(limits)
        stack.callback(models.close)

        def opened(bundle: Bundle) -> Runner:
            return open_runner(bundle, engine, threads=threads)

        own = {(m.name, m.version): offer for m, offer in zip(served, offers, strict=True)}
        reloader = rest.Reloader(models, own, opened, tell)
        stack.enter_context(hangups(reloader.ask))
        beside = None
        if grpc_port is not None:  # taken now, as well
            reserved = stack.enter_context(_listen(host, grpc_port, "--grpc-port"))
            on_request = reloader if allow_reload else None
            beside = _grpc().GrpcServer(models, reserved, token, tls, on_request, watchers)
        started = []
        for model, offer in zip(served, offers, strict=True):
            engine_for(offer.bundle, engine, tell)
            runner = opened(offer.bundle)
            started.append(Started(model.name, model.version, runner.name, runner.precision))
            models.add(model, runner, golden_of(offer.bundle), runner.close)
        rest.run_app(
            models,
            listener,
            lambda: announce(url, beside and beside.address, started),
            hosts=names,
            beside=beside,
            token=token,
            tls=tls,
            reloader=reloader,
            allow_reload=allow_reload,
            page=page,
            watchers=watchers,
        )


def _rest() -> ModuleType:
    with _extra():
        import advmoe_deploy.serving.online.http.rest as rest
    return rest


def _grpc() -> ModuleType:
    with _extra():
        import advmoe_deploy.serving.online.grpc.server as server
    return server


@contextmanager
def _extra() -> Iterator[None]:
    """Say which extra brings a module that the block could not import."""
    try:
        yield
    except ImportError as error:
        package = _NEEDED.get((error.name or "").split(".")[0])
        if package is None:
            raise
        raise missing_extra(package, "serve") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int, option: str = "--port") -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"{option} {port} is outside 0..65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"host '{host}' is no address of this machine ({error})") from None
    # asyncio sets TCP_NODELAY only where the protocol is named; without it answers take 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # now: a second server is refused before it loads anything
    except OSError as error:
        listener.close()
        raise _cannot_bind(error, host, port, option) from None
    return listener


def _cannot_bind(error: OSError, host: str, port: int, option: str) -> UsageError | MachineError:
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"host '{host}' is no address of this machine; use 127.0.0.1")
    if error.errno == errno.EADDRINUSE:
        return MachineError(f"port {port} of {host} is in use; choose another {option}")
    reason = f"cannot listen on {host}:{port} ({error.strerror})"
    return MachineError(f"{reason}; choose another {option}")


def _url(host: str, port: int, secure: bool) -> str:
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
