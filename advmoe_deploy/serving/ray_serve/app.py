"""Ray Serve application of one bundle: deployments of the server, the router, and each expert.

    serve run advmoe_deploy.serving.ray_serve.app:build bundle=/srv/cats

Requests go to replicas of the server, which bring images together; batches of them to replicas of
the router, which run the segments that all images share; and rows to those of the experts, where
the rows of many batches meet. Each deployment has its own replicas, on whatever machines.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import MachineError, UsageError, missing_extra, one_line, unknown_name
from advmoe_deploy.plan import Segment
from advmoe_deploy.runtime.images import checked_images
from advmoe_deploy.runtime.pathways import plan_margins
from advmoe_deploy.runtime.plan_walk import walk
from advmoe_deploy.runtime.routing import Tensors
from advmoe_deploy.runtime.runner import Prediction, joined, prediction_of
from advmoe_deploy.serving.online.access.token import read_token
from advmoe_deploy.serving.online.golden import golden_of
from advmoe_deploy.serving.online.http.rest import build_app
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import served_model
from advmoe_deploy.serving.online.serve import LOOPBACK
from advmoe_deploy.serving.ray_serve.grpc import METHODS, GrpcCalls, method
from advmoe_deploy.serving.ray_serve.replicas import BundleOrigin, checked_engines, open_signed
from advmoe_deploy.serving.ray_serve.settings import (
    ANY_HOST,
    MOST_QUEUED,
    ROUTER,
    SERVER,
    Settings,
    expert_names,
    most_rows,
)
from advmoe_deploy.specs import Precision

# While one batch waits for experts, the next is routed.
_BATCHES_OF_ROUTER = 2
# So little of a CPU is asked for that a small machine has room for all of them; who has machines
# for them says as many as threads.
_ANY: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.25}}
_OPTIONS: dict[str, dict[str, Any]] = {
    SERVER: {
        "max_ongoing_requests": 1024,
        "max_queued_requests": 1024,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
    },
}
_WITHIN = {"max_ongoing_requests": 64, "max_queued_requests": MOST_QUEUED}


def build(settings: Settings) -> Any:
    """Return the application; what ``serve run`` and ``serve deploy`` are to import.

    Raises:
        UsageError: ``settings`` name a deployment that there is not, or an option of none.
        InputError: the bundle is missing, damaged, or not signed as required.
        BackendUnavailableError: Ray Serve is not installed.
    """
    serve = _serve()
    bundle = open_signed(settings.bundle, settings.signed_by)
    origin = BundleOrigin.of(bundle, settings.signed_by)
    plan, limits = bundle.manifest.plan, settings.limits
    experts = expert_names(plan)
    known = {SERVER: serve.ingress()(Server), ROUTER: Router} | dict.fromkeys(experts, Expert)
    for name in settings.deployments:
        if name not in known:
            raise unknown_name("deployment", name, known)
    made = {name: _deployment(serve, kind, name, settings) for name, kind in known.items()}
    rows = most_rows(plan, settings.batch)
    apart = {name: made[name].bind(origin, name, rows, settings) for name in experts}
    router = made[ROUTER].bind(origin, apart, settings)
    return made[SERVER].bind(origin, router, settings, limits)


def application(bundle: Path | str, **settings: Any) -> Any:
    """Return the application of ``bundle``, for ``serve.run``; ``settings`` as :class:`Settings`.

    Raises:
        UsageError: a setting is unknown, or has no such value.
        InputError: the bundle is missing, damaged, or not signed as required.
        BackendUnavailableError: Ray Serve is not installed.
    """
    try:
        return build(Settings(bundle=Path(bundle), **settings))
    except ValidationError as error:
        raise UsageError(f"{one_line(error)}; change the settings") from None


def _deployment(serve: Any, kind: type, name: str, settings: Settings) -> Any:
    options = _ANY | _OPTIONS.get(name, _WITHIN) | settings.deployments.get(name, {})
    try:
        return serve.deployment(name=name, **options)(kind)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"options of deployment '{name}': {reason:.300}; change them") from None


class Server:
    """Replica that answers requests: the services of ``advmoe serve``, whose engine is Ray."""

    def __init__(
        self, origin: BundleOrigin, router: Any, settings: Settings, limits: Limits
    ) -> None:
        self._bundle, self._router, self._settings = origin.open(), router, settings
        self._models = Models(limits)

    async def __serve_build_asgi_app__(self) -> Any:
        """Return what Ray Serve hands requests to, once router and experts answer golden images."""
        bundle, settings = self._bundle, self._settings
        patient = Remote(bundle, self._router, settings.batch, None)  # they may still begin
        golden = golden_of(bundle)
        golden.require(await asyncio.to_thread(patient.infer, golden.images), patient)
        runner = Remote(bundle, self._router, settings.batch, settings.timeout)
        self._models.add(served_model(bundle, settings.name, self._models.limits), runner)
        hosts = LOOPBACK | {name.lower() for name in settings.hosts}
        token = read_token(settings.token_file) if settings.token_file else None
        self.grpc = GrpcCalls(self._models, token, open_to_all=settings.insecure)
        return build_app(
            self._models, None if ANY_HOST in hosts else hosts, token=token, page=False
        )

    def check_health(self) -> None:
        """Raise what ended the warm-up, if anything did: Ray Serve begins another replica then."""
        if self._models.failure is not None:
            raise self._models.failure


for _name in METHODS:
    setattr(Server, _name, method(_name))


class Router:
    """Replica that runs what all images share, routes, and asks the experts."""

    def __init__(
        self, origin: BundleOrigin, experts: Mapping[str, Any], settings: Settings
    ) -> None:
        bundle = origin.open()
        self._plan, self._experts = bundle.manifest.plan, experts
        own = {segment.name for segment in self._plan.segments} - experts.keys()
        self._engines = checked_engines(bundle, own, settings.threads)
        self._answer = _batches(self._infer, settings.batch, settings, _BATCHES_OF_ROUTER)

    async def __call__(self, images: NDArray[np.float32]) -> Tensors:
        """Return logits, routes and margins by name for images [N, C, H, W], at most a batch."""
        answer: Tensors = await self._answer(images)
        return answer

    async def _infer(self, parts: Sequence[NDArray[np.float32]]) -> list[Tensors]:
        tensors = await walk(self._plan, _joined(parts), self._ask)
        routes = self._plan.routes
        kept = [name for route in routes for name in (route.expert_ids, route.weights)]
        answer = {name: tensors[name] for name in (*self._plan.outputs, *kept)}
        answer |= plan_margins(self._plan, tensors)
        split = {name: _split(values, parts) for name, values in answer.items()}
        return [{name: each[i] for name, each in split.items()} for i in range(len(parts))]

    async def _ask(self, segment: Segment, ends: Tensors) -> Tensors:
        if segment.name not in self._experts:
            return await asyncio.to_thread(self._engines[segment.name].run, ends)
        (rows,) = ends.values()
        return {segment.outputs[0].name: await self._experts[segment.name].remote(rows)}


class Expert:
    """Replica of one expert, to which rows of many batches come."""

    def __init__(self, origin: BundleOrigin, name: str, rows: int, settings: Settings) -> None:
        bundle = origin.open()
        self._engine = checked_engines(bundle, {name}, settings.threads)[name]
        segment = bundle.manifest.plan.segment(name)
        (self._input,), (self._output,) = segment.inputs, segment.outputs
        self._answer = _batches(self._run, rows, settings, 1)

    async def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the expert's answers to ``rows``, without weights."""
        answer: NDArray[np.float32] = await self._answer(rows)
        return answer

    async def _run(self, parts: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        given = {self._input.name: _joined(parts)}
        answer = await asyncio.to_thread(self._engine.run, given)
        return _split(answer[self._output.name], parts)


class Remote(Closing):
    """Runner whose images the router and the experts compute; for threads without an event loop."""

    name, tf32 = "ray-serve", False
    precision: Precision = "fp32"

    def __init__(self, bundle: Bundle, router: Any, batch: int, timeout_s: float | None) -> None:
        self._router, self._batch, self._timeout_s = router, batch, timeout_s
        self._image_shape = bundle.manifest.model.image_shape
        self._routes = bundle.manifest.plan.routes

    def infer(self, images: NDArray[np.float32]) -> Prediction:
        """Return the prediction for float32 images [N, C, H, W] in [0, 1], in their order.

        Raises:
            MachineError: router or experts are overloaded, too slow, or gone.
        """
        checked = checked_images(images, self._image_shape)
        parts = np.split(checked, range(self._batch, len(checked), self._batch))
        asked, began = [self._router.remote(part) for part in parts], time.monotonic()
        try:
            with _faults(self._timeout_s):
                answers = [each.result(timeout_s=self._left_s(began)) for each in asked]
        except Exception:
            for each in asked:
                each.cancel()
            raise
        return joined(
            [prediction_of(self._routes, a, len(p)) for a, p in zip(answers, parts, strict=True)]
        )

    def _left_s(self, began: float) -> float | None:
        """Return what is left of the time for all parts; Ray would wait forever below 0."""
        over = time.monotonic() - began
        return None if self._timeout_s is None else max(0.0, self._timeout_s - over)

    def close(self) -> None:
        """Do nothing: the deployments are Ray Serve's."""


@contextmanager
def _faults(timeout_s: float | None) -> Iterator[None]:
    """Say of Ray's own errors what they mean; those that our code raised in a replica pass."""
    import ray
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except TimeoutError:
        raise MachineError(
            f"router and experts had no answer within {timeout_s} s; give them more replicas"
        ) from None
    except RayServeException:  # of the router, or of an expert that it asked
        raise MachineError("router or experts take no more requests; try again") from None
    except ray.exceptions.RayError as error:
        # An expert that ended is an error that the router's code raised, too.
        ended = isinstance(error, ray.exceptions.RayActorError)
        if isinstance(error, ray.exceptions.RayTaskError) and not ended:
            raise
        raise MachineError("a replica ended meanwhile; try again") from None


def _batches(
    run: Callable[[Sequence[Any]], Any], most: int, settings: Settings, at_once: int
) -> Callable[[Any], Any]:
    """Return ``run`` for one array; arrays are brought together, at most ``most`` rows of them."""
    batched: Callable[[Any], Any] = _serve().batch(
        max_batch_size=most,
        batch_wait_timeout_s=settings.delay_ms / 1000,
        max_concurrent_batches=at_once,
        batch_size_fn=lambda arrays: sum(map(len, arrays)),
    )(run)
    return batched


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(values: NDArray[Any], parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the rows of ``values`` that belong to each of ``parts``."""
    return np.split(values, np.cumsum([len(part) for part in parts])[:-1])


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise missing_extra("ray[serve]", "ray") from None
    return serve
