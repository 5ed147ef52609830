"""Bundles that requests have loaded: over gRPC too, and to the end, whoever leaves meanwhile."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import BundleError
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online import server
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.offers import Offer
from advmoe_deploy.serving.online.operations.reload import Reloader
from advmoe_deploy.serving.online.protocol import served_model
from tests.serving.online.live import LIMITS, ONE, SlowRunner, running, wait_for, wait_until_ready

LOAD = "/v2/repository/models/advmoe/load"


class Closing(SlowRunner):
    """A runner that says whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go.set()
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Opening:
    """Opens a runner once it is let go."""

    def __init__(self, open_: Callable[[Bundle], Runner]) -> None:
        self.open_, self.begun, self.let_go = open_, threading.Event(), threading.Event()

    def __call__(self, bundle: Bundle) -> Runner:
        self.begun.set()
        assert self.let_go.wait(timeout=60)
        return self.open_(bundle)


def logits_of(bundle: Bundle) -> np.ndarray:
    with open_runner(bundle) as runner:
        return runner.infer(ONE).logits


def test_stock_clients_have_it_loaded_over_grpc(
    tiny_bundle: Bundle, other_bundle: Bundle, slow: SlowRunner
) -> None:
    found = iter([BundleError("the disk is gone"), other_bundle, other_bundle])

    def again() -> Bundle:
        bundle = next(found)
        if isinstance(bundle, Exception):
            raise bundle
        return bundle

    tensor = triton.InferInput("images", list(ONE.shape), "FP32")
    tensor.set_data_from_numpy(ONE)
    with (
        running(tiny_bundle, slow, again=again) as live,
        triton.InferenceServerClient(live.grpc) as client,
    ):
        wait_until_ready(live.address)
        with pytest.raises(InferenceServerException, match=r"serves as before.*disk is gone") as no:
            client.load_model("advmoe")
        assert no.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert client.infer("advmoe", [tensor]).as_numpy("logits").max() == 0
        client.load_model("advmoe")
        answer = client.infer("advmoe", [tensor]).as_numpy("logits")
        np.testing.assert_allclose(answer, logits_of(other_bundle), atol=1e-4)
        client.load_model("advmoe")  # as it was
        (own,) = client.get_model_repository_index().models
        assert (own.name, own.version, own.state, own.reason) == ("advmoe", "1", "READY", "")
        with pytest.raises(InferenceServerException, match="parameters are not supported"):
            client.load_model("advmoe", config="{}")
        with pytest.raises(InferenceServerException, match="unknown model 'cats'"):
            client.load_model("cats")
        with pytest.raises(InferenceServerException, match="no model is unloaded") as refused:
            client.unload_model("advmoe")
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
        assert httpx.post(live.url + LOAD.replace("/load", "/unload")).status_code == 501


def test_nothing_is_loaded_over_grpc_unless_it_may(tiny_bundle: Bundle, slow: SlowRunner) -> None:
    with running(tiny_bundle, slow) as live, triton.InferenceServerClient(live.grpc) as client:
        with pytest.raises(InferenceServerException, match="see --allow-reload") as refused:
            client.load_model("advmoe")
        assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def test_the_end_waits_for_what_is_being_loaded_and_leaves_no_runner(
    tiny_bundle: Bundle,
    other_bundle: Bundle,
    slow: SlowRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_READING_S", 0.1)
    fresh = Closing()
    opening = Opening(lambda _: fresh)
    with (
        ThreadPoolExecutor(1) as client,
        running(tiny_bundle, slow, again=lambda: other_bundle, opened=opening) as live,
    ):
        wait_until_ready(live.address)
        asking = client.submit(httpx.post, live.url + LOAD, timeout=60)
        assert opening.begun.wait(timeout=60)
        live.server.stop(announced=False)
        with contextlib.suppress(TimeoutError):  # longer than clients may take to read
            asking.result(timeout=0.5)
        opening.let_go.set()
        answer = asking.result()
    assert answer.status_code == 503
    assert "stopping" in answer.json()["error"]
    assert fresh.closed.is_set()


def test_who_asked_may_leave_and_it_is_loaded_all_the_same(
    tiny_bundle: Bundle, other_bundle: Bundle
) -> None:
    opening, old = Opening(open_runner), Closing()

    async def run() -> None:
        models = Models(LIMITS)
        models.add(served_model(tiny_bundle, "cats", LIMITS), old, release=old.close)
        offers = {("cats", "1"): Offer(tiny_bundle, "cats", "1", lambda: other_bundle)}
        reloader = Reloader(models, offers, opening)
        models.start()
        await models.warm_up()
        reloader.start()
        asking = asyncio.create_task(reloader.reload("cats"))
        await asyncio.to_thread(opening.begun.wait, 60)
        assert models.busy
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        opening.let_go.set()
        await reloader.end()
        assert models.find("cats").model.identity == other_bundle.identity
        assert models.reloads["loaded"] == 1
        assert old.closed.is_set()
        assert not models.busy
        models.close()

    asyncio.run(run())


def test_what_was_loaded_counts_though_nobody_could_be_told(
    tiny_bundle: Bundle, other_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        raise BrokenPipeError

    async def run() -> None:
        models, offers = Models(LIMITS), {}
        for name in ("cats", "dogs"):
            models.add(served_model(tiny_bundle, name, LIMITS), Closing())
            offers[name, "1"] = Offer(tiny_bundle, name, "1", lambda: other_bundle)
        reloader = Reloader(models, offers, open_runner, tell)
        models.start()
        await models.warm_up()
        reloader.start()
        (fresh,) = await reloader.reload("cats")
        assert models.find("cats") is fresh
        reloader.ask()
        while models.reloads.total() < 3:
            await asyncio.sleep(0.01)
        await reloader.end()
        assert models.reloads == {"loaded": 2, "unchanged": 1, "failed": 0}
        models.close()

    asyncio.run(run())
    assert [line.split("'")[1] for line in told] == ["cats", "cats", "dogs"]
    assert caplog.text.count("nobody could be told") == 3


def test_larger_images_than_the_open_port_of_grpc_takes_are_not_loaded(
    tiny_bundle: Bundle, slow: SlowRunner
) -> None:
    """It was opened for messages of the models there were, which is a limit on memory, too."""
    manifest = tiny_bundle.manifest
    larger = manifest.model.model_copy(update={"image_size": 32})
    other = Bundle(tiny_bundle.path, manifest.model_copy(update={"model": larger}))
    opening = Opening(open_runner)
    with running(tiny_bundle, slow, again=lambda: other, opened=opening) as live:
        wait_until_ready(live.address)
        refused = httpx.post(live.url + LOAD, timeout=60)
        assert refused.status_code == 409
        assert "start the server again" in refused.json()["error"]
        assert not opening.begun.is_set()
        wait_for(lambda: live.service.idle)
