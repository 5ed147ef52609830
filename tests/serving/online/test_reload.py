"""Bundles that change while they are served: wholly the old answer, or wholly the new."""

import asyncio
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from advmoe_deploy.bundle import GOLDEN, MANIFEST, MANIFEST_HASH, MODEL, Bundle, open_bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.runtime.runner import Runner
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.sealing.seal import seal_again
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.offers import Offer
from advmoe_deploy.serving.online.operations.reload import Reloader, differences
from advmoe_deploy.serving.online.protocol import InferRequest, RefusedError, served_model
from advmoe_deploy.serving.online.serve import serve
from advmoe_deploy.serving.online.service import Arrival
from tests.serving.online.live import LIMITS, SlowRunner, request_for, wait_for

SERVE = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0"]
IMAGES = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
SWAPS = 20


@dataclass
class Served:
    """A server whose bundle is a link that leads to one of ``versions``, or elsewhere."""

    process: "subprocess.Popen[str]"
    url: str
    link: Path
    versions: tuple[Bundle, Bundle]
    log: Path

    def point(self, target: Path) -> None:
        """Let the path of the bundle lead to ``target``, in one step."""
        fresh = self.link.with_suffix(".new")
        fresh.symlink_to(target)
        fresh.replace(self.link)

    def outcomes(self) -> dict[str, float]:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        own = [line.split() for line in lines if line.startswith("advmoe_reloads_total{")]
        return {name.split('"')[1]: float(value) for name, value in own}

    def hang_up(self) -> None:
        """Send SIGHUP and wait until it was heard."""
        before = sum(self.outcomes().values())
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: sum(self.outcomes().values()) > before)

    def logits(self) -> np.ndarray:
        answer = httpx.post(self.url + "/v2/models/advmoe/infer", json=request_for(IMAGES))
        assert answer.status_code == 200, answer.text
        (data,) = (each["data"] for each in answer.json()["outputs"] if each["name"] == "logits")
        return np.array(data, np.float32).reshape(len(IMAGES), -1)


@pytest.fixture(scope="module")
def server(
    tiny_bundle: Bundle, other_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    link, log = folder / "bundle", folder / "log"
    link.symlink_to(tiny_bundle.path)
    command = [*SERVE, "--allow-reload", str(link)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].split("/v2")[0]
        yield Served(process, url, link, (tiny_bundle, other_bundle), log)
        process.terminate()
        assert process.wait(timeout=60) == 0


def logits_of(bundle: Bundle) -> np.ndarray:
    with open_runner(bundle) as runner:
        return runner.infer(IMAGES).logits


def test_no_request_fails_and_no_answer_is_mixed(server: Served) -> None:
    expected = [logits_of(bundle) for bundle in server.versions]
    assert np.abs(expected[0] - expected[1]).max(axis=1).min() > 1e-2  # told apart, row by row
    seen, stop = Counter[object](), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            logits = server.logits()
            near = [np.allclose(logits, each, atol=1e-4) for each in expected]
            seen[near.index(True) if any(near) else "mixed"] += 1

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for swap in range(1, SWAPS + 1):
            server.point(server.versions[swap % 2].path)
            server.hang_up()
            # From the swap on, every new request is answered by the new one.
            np.testing.assert_allclose(server.logits(), expected[swap % 2], atol=1e-4)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert server.outcomes() == {"loaded": SWAPS, "unchanged": 0, "failed": 0}
    assert set(seen) == {0, 1}
    # Those that were replaced have ended: no thread of theirs is left.
    threads = Path(f"/proc/{server.process.pid}/task")
    if threads.exists():
        wait_for(lambda: len(list(threads.iterdir())) < SWAPS)
    assert server.log.read_text().count("loaded 'advmoe' again: version 1") == SWAPS


def with_other_answers(bundle: Bundle, place: Path) -> Path:
    """Return a copy of ``bundle``, every hash of which is right, whose golden logits are others."""
    shutil.copytree(bundle.path, place, ignore=shutil.ignore_patterns(MANIFEST, MANIFEST_HASH))
    with np.load(place / GOLDEN) as arrays:
        changed = dict(arrays)
    changed["logits"] += 1
    np.savez(place / GOLDEN, **changed)
    seal_again(place, bundle.manifest)
    return open_bundle(place).path


def test_a_broken_bundle_leaves_the_old_one_serving(server: Served, tmp_path: Path) -> None:
    before = server.logits()
    broken = tmp_path / "broken"
    shutil.copytree(server.versions[1].path, broken)
    content = bytearray((broken / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / MODEL).write_bytes(content)
    load = server.url + "/v2/repository/models/advmoe/load"
    for target, reason in (
        (broken, "SHA-256 differs"),
        (tmp_path / "nothing", "there is no bundle"),
        (with_other_answers(server.versions[1], tmp_path / "other"), "answers the golden images"),
    ):
        server.point(target)
        failed = server.outcomes()["failed"]
        answer = httpx.post(load)
        assert answer.status_code == 409
        assert reason in answer.json()["error"]
        server.hang_up()
        assert server.outcomes()["failed"] == failed + 2
        np.testing.assert_array_equal(server.logits(), before)
        assert httpx.get(server.url + "/v2/health/ready").status_code == 200
    log = server.log.read_text()
    assert log.count("'advmoe' serves as before, it was not loaded: ") == 6
    assert "Traceback" not in log
    server.point(server.versions[0].path)
    server.hang_up()


def test_stock_clients_have_it_loaded(server: Served) -> None:
    server.point(server.versions[1].path)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        client.load_model("advmoe")
        np.testing.assert_allclose(server.logits(), logits_of(server.versions[1]), atol=1e-4)
        with pytest.raises(triton.InferenceServerException, match="parameters are not supported"):
            client.load_model("advmoe", config="{}")
        with pytest.raises(triton.InferenceServerException, match="unknown model 'cats'"):
            client.load_model("cats")
    load = server.url + "/v2/repository/models/advmoe/load"
    answer = httpx.post(load).json()
    assert server.log.read_text().endswith("'advmoe' is as it was; nothing was loaded\n")
    own = {"version": "1", "bundle": server.versions[1].identity, "changed": False}
    assert answer == {"name": "advmoe", "versions": [own]}
    for body in (b"[", b"[]", b" " * 9999):
        assert httpx.post(load, content=body).status_code in {400, 413}
    assert httpx.post(load, headers={"Origin": "http://evil.example"}).status_code == 403


def test_requests_load_nothing_unless_they_may(tiny_bundle: Bundle) -> None:
    with subprocess.Popen(
        [*SERVE, str(tiny_bundle.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].split("/v2")[0]
        answer = httpx.post(url + "/v2/repository/models/advmoe/load")
        assert answer.status_code == 403
        assert "--allow-reload" in answer.json()["error"]
        process.terminate()
        assert process.wait(timeout=60) == 0
    with pytest.raises(UsageError, match="or leave out --allow-reload"):
        serve([Offer(tiny_bundle)], "0.0.0.0", insecure=True, allow_reload=True)


def test_what_lies_at_the_path_is_opened_again(tiny_bundle: Bundle) -> None:
    assert Offer(tiny_bundle).reopen().identity == tiny_bundle.identity
    assert Offer(tiny_bundle, again=lambda: open_bundle(tiny_bundle.path)).reopen()


def reloader_of(
    bundle: Bundle, *versions: str, runner: Runner, then: Callable[[], Bundle]
) -> tuple[Reloader, Models, threading.Event]:
    """Return models that ``runner`` answers; what lies at their paths comes from ``then``."""
    models, released = Models(LIMITS), threading.Event()
    offers = {}
    for version in versions:
        model = served_model(bundle, "cats", LIMITS, version)
        models.add(model, runner, release=released.set)
        offers["cats", version] = Offer(bundle, "cats", version, then)
    return Reloader(models, offers, open_runner), models, released


def test_what_is_under_way_ends_with_what_it_began_with(
    tiny_bundle: Bundle, other_bundle: Bundle
) -> None:
    slow = SlowRunner()

    async def run() -> None:
        reloader, models, released = reloader_of(
            tiny_bundle, "1", runner=slow, then=lambda: other_bundle
        )
        models.start()
        slow.let_go.set()
        await models.warm_up()
        reloader.start()
        slow.let_go.clear()
        old = models.find("cats")
        with Arrival(old) as arrival:
            request = InferRequest(IMAGES, {})
            asked = asyncio.create_task(old.predict(request, lambda: False, arrival))
            await asyncio.sleep(0)
            (fresh,) = await reloader.reload("cats")
        assert models.find("cats") is fresh
        with Arrival(fresh) as arrival:
            answer = await fresh.predict(request, lambda: False, arrival)
        np.testing.assert_allclose(answer.logits, logits_of(other_bundle), atol=1e-4)
        assert models.busy
        assert not released.is_set()
        slow.let_go.set()
        assert (await asked).logits.max() == 0  # the slow one's answer
        await reloader.end()
        assert released.is_set()
        assert not models.busy
        models.close()

    asyncio.run(run())


def test_of_a_name_all_versions_change_or_none(tiny_bundle: Bundle, other_bundle: Bundle) -> None:
    slow = SlowRunner()
    slow.let_go.set()
    found = iter([other_bundle, None])

    def then() -> Bundle:
        bundle = next(found)
        if bundle is None:
            raise RuntimeError("no\nsuch disk")
        return bundle

    async def run() -> None:
        reloader, models, _ = reloader_of(tiny_bundle, "1", "2", runner=slow, then=then)
        models.start()
        await models.warm_up()
        reloader.start()
        before = models.all()
        with pytest.raises(RefusedError, match=r"RuntimeError: no.*such disk") as refused:
            await reloader.reload("cats")
        assert refused.value.status == 409
        assert "\n" not in str(refused.value)
        assert models.all() == before
        assert models.reloads == {"loaded": 0, "unchanged": 0, "failed": 1}
        models.is_stopping = lambda: True
        nonlocal found
        found = iter([other_bundle, other_bundle])
        with pytest.raises(RefusedError, match="the server is stopping") as refused:
            await reloader.reload("cats")
        assert refused.value.status == 503
        await reloader.end()
        assert models.all() == before
        models.close()

    asyncio.run(run())


def test_nothing_is_loaded_before_the_models_are_warm(tiny_bundle: Bundle) -> None:
    async def run() -> None:
        reloader, models, _ = reloader_of(
            tiny_bundle, "1", runner=SlowRunner(), then=lambda: tiny_bundle
        )
        with pytest.raises(RefusedError, match="starting or stopping") as refused:
            await reloader.reload("cats")
        assert refused.value.status == 503
        await reloader.end()
        models.close()

    asyncio.run(run())


def test_what_clients_may_trip_over_is_said(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    spec = manifest.model.model_copy(update={"family": "expert-networks", "image_size": 9})
    names = ("nought", *manifest.class_names[1:])

    def became(**changes: object) -> str:
        other = Bundle(tiny_bundle.path, manifest.model_copy(update=changes))
        return differences(served_model(tiny_bundle, "cats"), served_model(other, "cats"))

    assert became(created="now") == ""
    assert became(class_names=names) == (
        f"1 of 10 classes are called otherwise, such as 'nought', was '{manifest.class_names[0]}'"
    )
    assert became(class_names=names[:9]) == "it has 9 classes, had 10"
    assert became(model=spec) == (
        "its family is expert-networks, was advmoe; it takes images of (1, 9, 9), took (1, 8, 8)"
    )


def test_another_model_under_the_same_name_is_a_warning(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a\nb", *tiny_bundle.manifest.class_names[1:])
    other = Bundle(tiny_bundle.path, tiny_bundle.manifest.model_copy(update={"class_names": names}))

    async def run() -> None:
        slow = SlowRunner()
        slow.let_go.set()
        reloader, models, _ = reloader_of(tiny_bundle, "1", runner=slow, then=lambda: other)
        models.start()
        await models.warm_up()
        reloader.start()
        await reloader.reload("cats")
        await reloader.end()
        models.close()

    asyncio.run(run())
    (warned,) = (each for each in caplog.records if each.levelname == "WARNING")
    line = warned.getMessage()
    assert line.startswith("'cats' version 1 answers otherwise than before: 1 of 10 classes")
    assert "\n" not in line
