"""Models of one server, by name and version: a queue each, and memory that they share."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.serving.online.golden import Golden
from advmoe_deploy.serving.online.limits import Hold, Limits
from advmoe_deploy.serving.online.metrics import figures_text
from advmoe_deploy.serving.online.protocol import NO_MEMORY, RefusedError, ServedModel
from advmoe_deploy.serving.online.service import Service, Shared

# What becomes of a model's name that is to be loaded again.
OUTCOMES = ("loaded", "unchanged", "failed")


class Models:
    """Models that a server has on offer, for one event loop.

    Attributes:
        is_stopping: whether the server is; none is ready then.
        failure: what ended the warm-up of one of them.
        reloads: how many attempts to load a name again had which of the ``OUTCOMES``.
        longest: bytes of images that every port takes in one request; set with the ports.
    """

    def __init__(self, limits: Limits) -> None:
        """Begin with none; ``limits.memory`` is for all of them, the queue for each."""
        self.limits = limits
        self.failure: BaseException | None = None
        self.is_stopping: Callable[[], bool] = lambda: False
        self.shared = Shared(limits)
        self._services: dict[str, dict[str, Service]] = {}
        self._others: list[Service] = []  # that are being loaded, or still have requests
        self.reloads = Counter(dict.fromkeys(OUTCOMES, 0))
        self.longest = limits.max_body
        self._loading = 0  # names that are being loaded again
        self._unknown = 0  # inference requests for models that there are not

    def add(
        self,
        model: ServedModel,
        runner: Runner,
        golden: Golden | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> Service:
        """Offer ``model``, which ``runner`` computes, and return its service.

        It is ready once it has answered ``golden`` images as it should, or else any image.
        """
        service = self.service(model, runner, golden, release)
        self.replace([service])
        return service

    def service(
        self,
        model: ServedModel,
        runner: Runner,
        golden: Golden | None,
        release: Callable[[], None],
    ) -> Service:
        """Return a service that nobody is sent to before :meth:`replace`."""
        self._others.append(Service(model, runner, self.shared, golden, release))
        return self._others[-1]

    def replace(self, services: Sequence[Service]) -> list[Service]:
        """Let ``services`` answer from now on, and return those whose places they took.

        They answer what they have begun, until somebody closes and :meth:`forget` s them.
        """
        replaced = []
        for service in services:
            self._others.remove(service)
            versions = self._services.setdefault(service.model.name, {})
            if before := versions.get(service.model.version):
                replaced.append(before)
            versions[service.model.version] = service
        self._others += replaced
        return replaced

    def require_room(self, model: ServedModel) -> None:
        """Raise :class:`RefusedError` (409) if an open port is too small for ``model``'s requests.

        That of gRPC was opened for the models there were, and its limit stays.
        """
        if model.longest > self.longest:
            raise RefusedError(
                f"its requests have up to {model.longest} bytes, and the port of gRPC was opened "
                f"for {self.longest}; start the server again with this bundle",
                409,
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Be busy within the block: a name is being loaded again."""
        self._loading += 1
        try:
            yield
        finally:
            self._loading -= 1

    def forget(self, service: Service) -> None:
        """Let go of a service that answers no more."""
        self._others.remove(service)

    def find(self, name: str, version: str = "", *, to_infer: bool = False) -> Service:
        """Return the service of a model, of its latest version unless one is asked for.

        Those who ask ``to_infer`` are counted if there is none.

        Raises:
            RefusedError: there is none (404).
        """
        versions = self._services.get(name, {})
        found = versions.get(version or max(versions, key=int, default=""))
        if found is None:
            self._unknown += to_infer
            raise RefusedError(self._unknown_model(name, version), 404)
        return found

    def _unknown_model(self, name: str, version: str) -> str:
        if name not in self._services:
            known = ", ".join(f"'{name}'" for name in self._services)
            return f"unknown model '{name}'; this server has {known}"
        known = ", ".join(f"'{version}'" for version in self.versions(name))
        return f"unknown version '{version}' of '{name}'; it has {known}"

    def all(self) -> list[Service]:
        """Return every service, versions of a name together."""
        return [service for versions in self._services.values() for service in versions.values()]

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return [*self._services]

    def of(self, name: str) -> list[Service]:
        """Return the services of all versions of ``name``, the latest last."""
        return [self._services[name][version] for version in self.versions(name)]

    def chosen(self, name: str = "", version: str = "") -> list[Service]:
        """Return one version of a model, or all of them, or every model where no name is given.

        Raises:
            RefusedError: there is none (404).
        """
        if not name:
            return self.all()
        found = self.find(name, version)
        return [found] if version else self.of(name)

    def versions(self, name: str) -> list[str]:
        """Return the versions of ``name``, the latest last."""
        return sorted(self._services[name], key=int)

    def is_ready(self, service: Service) -> bool:
        """Return whether requests to ``service`` should come here."""
        return service.warm and not self.is_stopping()

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Return name, version and state of each model, or of those alone that are ready."""
        states = {True: "READY", False: "UNAVAILABLE"}
        return [
            {
                "name": each.model.name,
                "version": each.model.version,
                "state": states[self.is_ready(each)],
                "reason": "" if self.is_ready(each) else "it is starting or stopping",
            }
            for each in self.all()
            if self.is_ready(each) or not ready_only
        ]

    def _living(self) -> list[Service]:
        return [*self.all(), *self._others]

    @property
    def ready(self) -> bool:
        """Whether requests should come here, to whatever model."""
        return all(map(self.is_ready, self.all()))

    @property
    def busy(self) -> bool:
        """Whether a request is being read, computed or written, or a name is being loaded."""
        idle = all(each.idle for each in self._living())
        return self.shared.budget.used > 0 or self._loading > 0 or not idle

    def charge(self, hold: Hold, count: int) -> None:
        """Let ``hold`` grow to ``count`` bytes.

        Raises:
            RefusedError: other requests hold the memory (503).
        """
        if not self.reserve(hold, count):
            raise RefusedError(NO_MEMORY, 503, retry_s=1)

    def reserve(self, hold: Hold, count: int) -> bool:
        """Return whether ``hold`` may grow to ``count`` bytes, and let it."""
        if hold.grow(count):
            return True
        for service in self._living():
            service.drop_dead()  # their memory is given back a moment later
        return False

    def start(self) -> None:
        """Begin to compute for the running event loop."""
        for service in self.all():
            service.start()

    async def warm_up(self) -> None:
        """Warm up one model after the other; ``ready`` or ``failure`` says how it went."""
        try:
            for service in self.all():
                await service.warm_up(self.is_stopping)
        except Exception as error:  # noqa: BLE001, RUF100 - kept for whoever started the server
            if not self.is_stopping():  # else nobody will ask this model anything
                self.failure = error

    def close(self) -> None:
        """Wait for the running batches and end the threads."""
        for service in self._living():
            service.close()
        self.shared.close()

    def figures(self) -> bytes:
        """Return the figures of all models in Prometheus' text format."""
        parts = [
            ({"model": each.model.name, "version": each.model.version}, each.metrics)
            for each in self.all()
        ]
        now = {
            "ready": float(self.ready),
            "held_bytes": float(self.shared.budget.used),
            "image_files_waiting": float(self.shared.decoders.waiting),
        }
        return figures_text(parts, now, self._unknown, self.reloads)
