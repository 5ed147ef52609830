"""Bundles that are loaded again while a server runs: all of a name's versions, or nothing.

What lies at a bundle's path is opened (every hash, and the signature where one is required), loaded
and held against its golden images beside what serves meanwhile. Then the new services take the
places of the old in one step of the event loop. A request holds the service it began with, so each
answer is wholly of the one or of the other; the old one ends when its last request has left it.

Whoever asked for it may leave: what was begun comes to its end, and the server's end waits for it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.serving.online.golden import Golden, golden_of
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.offers import Offer
from advmoe_deploy.serving.online.protocol import (
    NotReadyError,
    RefusedError,
    ServedModel,
    served_model,
    short_line,
)
from advmoe_deploy.serving.online.service import Service

_log = logging.getLogger(__name__)
# How often is looked whether the last request has left what was replaced.
_LOOK_S = 0.02
# The state of the server, or what lies at the path, does not allow it.
_CONFLICT = 409

T = TypeVar("T")


class Reloader:
    """Loads bundles again for ``models``, one name after the other."""

    def __init__(
        self,
        models: Models,
        offers: Mapping[tuple[str, str], Offer],
        open_runner: Callable[[Bundle], Runner],
        tell: Callable[[str], None] = _log.info,
    ) -> None:
        """Begin with nothing asked.

        Args:
            models: what serves.
            offers: by name and version, how each bundle is opened again.
            open_runner: returns the runner of a bundle.
            tell: is told what was loaded; what was not goes to the log, too, as a warning.
        """
        self._models, self._offers = models, offers
        self._open_runner, self._tell = open_runner, tell
        self._one = asyncio.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="reload")
        self._tasks = set[asyncio.Task[Any]]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = False

    def ask(self) -> None:
        """Load every name again, from any thread or signal handler; before the start, after it."""
        self._asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def start(self) -> None:
        """Begin to listen on the running event loop, once the models are warm."""
        self._loop = asyncio.get_running_loop()
        self._begin()

    async def end(self) -> None:
        """Wait for what is being loaded or retired."""
        self._loop = None
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._threads.shutdown()

    async def reload(self, name: str) -> list[Service]:
        """Load all versions of ``name`` again; return the services that are new, by their change.

        Raises:
            RefusedError: one of them cannot be loaded or answers otherwise than it should (409), or
                the server stops (503); all of them serve as before.
        """
        if self._loop is None:
            raise NotReadyError("the server is starting or stopping; ask /v2/health/ready")
        loading = self._keep(self._reload(name))
        loading.add_done_callback(_seen)
        return await asyncio.shield(loading)

    async def _reload(self, name: str) -> list[Service]:
        with self._models.loading():
            async with self._one:
                before = [service.model for service in self._models.of(name)]
                fresh = await self._swapped(name)
        self._say(name, before, fresh)
        return fresh

    async def _swapped(self, name: str) -> list[Service]:
        fresh: list[Service] = []
        try:
            await self._load(name, fresh)
        except BaseException as error:
            for service in fresh:
                self._keep(self._close(service))
            self._models.reloads["failed"] += not self._models.is_stopping()
            raise self._refusal(name, error) from None
        for old in self._models.replace(fresh):
            self._keep(self._retire(old))
        self._models.reloads["loaded" if fresh else "unchanged"] += 1
        return fresh

    def _say(self, name: str, before: list[ServedModel], fresh: list[Service]) -> None:
        versions = ", ".join(service.model.version for service in fresh)
        line = f"loaded '{name}' again: version {versions}"
        if not fresh:
            line = f"'{name}' is as it was; nothing was loaded"
        try:
            self._tell(line)
        except Exception:  # noqa: BLE001, RUF100 - it is loaded, whoever could not hear of it
            _log.exception("%s; nobody could be told", line)
        old = {model.version: model for model in before}
        for service in fresh:
            if others := differences(old[service.model.version], service.model):
                of = f"'{name}' version {service.model.version}"
                _log.warning("%s", short_line(f"{of} answers otherwise than before: {others}"))

    async def _load(self, name: str, fresh: list[Service]) -> None:
        """Append to ``fresh`` a warm service for each version of ``name`` whose bundle changed."""
        for serving in self._models.of(name):
            self._require_going_on()
            model = serving.model
            bundle = await self._thread(self._offers[name, model.version].reopen)
            if bundle.identity == model.identity:
                continue
            offered = served_model(bundle, name, model.limits, model.version)
            self._models.require_room(offered)
            self._require_going_on()
            runner, golden = await self._thread(partial(self._open, bundle))
            fresh.append(self._models.service(offered, runner, golden, runner.close))
            fresh[-1].start()
            await fresh[-1].warm_up(self._models.is_stopping)
        self._require_going_on()

    def _require_going_on(self) -> None:
        if self._models.is_stopping():
            raise RefusedError("the server is stopping", 503)

    def _open(self, bundle: Bundle) -> tuple[Runner, Golden]:
        golden = golden_of(bundle)
        return self._open_runner(bundle), golden

    def _refusal(self, name: str, error: BaseException) -> BaseException:
        if not isinstance(error, Exception):  # the task was cancelled
            return error
        known = isinstance(error, AdvMoEError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        status = error.status if isinstance(error, RefusedError) else _CONFLICT
        refusal = RefusedError(f"'{name}' serves as before, it was not loaded: {reason}", status)
        _log.warning("%s", refusal, exc_info=None if known else error)
        return refusal

    def _begin(self) -> None:
        if self._asked and not self._models.is_stopping():
            self._asked = False
            self._keep(self._reload_all())

    async def _reload_all(self) -> None:
        for name in self._models.names:
            try:
                await self.reload(name)
            except RefusedError:
                continue  # it was logged, and the others may well be loaded

    async def _retire(self, old: Service) -> None:
        while not old.idle:
            await asyncio.sleep(_LOOK_S)
        await self._close(old)

    async def _close(self, service: Service) -> None:
        await self._thread(service.close)
        self._models.forget(service)

    def _keep(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def differences(old: ServedModel, new: ServedModel) -> str:
    """Return what clients may trip over where ``new`` takes the place of ``old``; mostly nothing.

    Other weights are what a bundle is loaded again for.
    """
    found = []
    if new.family != old.family:
        found.append(f"its family is {new.family}, was {old.family}")
    if new.image_shape != old.image_shape:
        found.append(f"it takes images of {new.image_shape}, took {old.image_shape}")
    if len(new.labels) != len(old.labels):
        found.append(f"it has {len(new.labels)} classes, had {len(old.labels)}")
    elif others := [(n, o) for n, o in zip(new.labels, old.labels, strict=True) if n != o]:
        of = f"{len(others)} of {len(new.labels)} classes are called otherwise"
        found.append(f"{of}, such as '{others[0][0]}', was '{others[0][1]}'")
    return "; ".join(found)


async def load_on_request(
    models: Models, reloader: Reloader | None, name: str, parameters: object
) -> list[Service]:
    """Load ``name`` again because a request of the repository extension says so.

    Raises:
        RefusedError: there is no ``reloader``, as requests may not load (403), there is no such
            model (404), there are ``parameters``, or it was not loaded (see
            :meth:`Reloader.reload`).
    """
    if reloader is None:
        raise RefusedError("models are not loaded by request here; see --allow-reload", 403)
    if parameters:
        raise RefusedError("parameters are not supported: what lies at the bundle's path loads")
    models.find(name)
    return await reloader.reload(name)


def refuse_unload() -> NoReturn:
    """Raise :class:`RefusedError` (501): a server answers for the models it was started with."""
    raise RefusedError(
        "no model is unloaded while the server runs; start it again without the bundle", 501
    )


def _seen(loading: "asyncio.Task[Any]") -> None:
    """Take note of a failure that was logged, though whoever asked has left."""
    if not loading.cancelled():
        loading.exception()
