"""Several bundles and versions behind one server, and what it tells of them."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.golden import golden_of
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.offers import Offer, split_offer
from advmoe_deploy.serving.online.protocol import served_model
from advmoe_deploy.serving.online.serve import serve
from tests.serving.online.live import ONE, SlowRunner, request_for

COMMAND = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0"]


@pytest.fixture(scope="module")
def url(tiny_bundle: Bundle) -> Iterator[str]:
    """The address of a process that serves one bundle under three names and versions."""
    offers = [f"{name}={tiny_bundle.path}" for name in ("cats:2", "cats:10", "dogs")]
    with subprocess.Popen([*COMMAND, *offers], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        yield first.split()[1].split("/v2")[0]
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_the_latest_version_answers_where_none_is_asked_for(url: str, tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle) as runner:
        logits = runner.infer(ONE).logits
    for path, name, version in (
        ("cats", "cats", "10"),
        ("cats/versions/2", "cats", "2"),
        ("dogs", "dogs", "1"),
    ):
        answer = httpx.post(f"{url}/v2/models/{path}/infer", json=request_for(ONE)).json()
        assert (answer["model_name"], answer["model_version"]) == (name, version)
        data = next(each["data"] for each in answer["outputs"] if each["name"] == "logits")
        np.testing.assert_array_equal(np.array(data, np.float32), logits[0])
    for path in ("birds", "cats/versions/3", "advmoe", "dogs/versions/01"):
        answer = httpx.post(f"{url}/v2/models/{path}/infer", json=request_for(ONE))
        assert answer.status_code == 404
    assert "it has '1'" in answer.json()["error"]
    for path in ("/v2/models/birds", "/v2/models/cats/versions/3/ready"):
        assert httpx.get(url + path).status_code == 404  # which is no inference
    figures = httpx.get(f"{url}/metrics").text
    for name, version in (("cats", "10"), ("cats", "2"), ("dogs", "1")):
        assert f'{{model="{name}",status="200",version="{version}"}} 1.0' in figures
    assert "advmoe_unknown_model_requests_total 4.0" in figures


def test_stock_clients_learn_what_there_is(url: str) -> None:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        index = client.get_model_repository_index()
        assert [(each["name"], each["version"], each["state"]) for each in index] == [
            ("cats", "2", "READY"),
            ("cats", "10", "READY"),
            ("dogs", "1", "READY"),
        ]
        assert client.is_model_ready("cats", "2")
        assert client.get_model_metadata("cats")["versions"] == ["2", "10"]
        config = client.get_model_config("dogs")
        assert config["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}]
        assert config["output"][0] == {"name": "logits", "data_type": "TYPE_FP32", "dims": [10]}
        assert config["max_batch_size"] == 1024
        before = client.get_inference_statistics("dogs")["model_stats"][0]
        httpx.post(f"{url}/v2/models/dogs/infer", json=request_for(np.repeat(ONE, 3, axis=0)))
        httpx.post(f"{url}/v2/models/dogs/infer", content=b"{")
        (after,) = client.get_inference_statistics("dogs")["model_stats"]
        assert len(client.get_inference_statistics("cats")["model_stats"]) == 2
        assert len(client.get_inference_statistics()["model_stats"]) == 3
    assert after["inference_count"] - before["inference_count"] == 3
    for part, more in (("success", 1), ("fail", 1), ("queue", 1), ("compute_infer", 1)):
        was, is_now = (each["inference_stats"][part] for each in (before, after))
        assert is_now["count"] - was["count"] == more
        assert is_now["ns"] > was["ns"]
    parts = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    counts = {after["inference_stats"][part]["count"] for part in parts}
    assert len(counts) == 1  # else perf_analyzer gives up


def warmed_up(
    bundle: Bundle, runners: list[SlowRunner], batch: int, *, golden: bool, stops: bool
) -> Models:
    """Return models that were warmed up, or stopped during the first batch of all."""
    limits, stopping = Limits(batch=batch), threading.Event()

    async def run() -> Models:
        models = Models(limits)
        models.is_stopping = stopping.is_set
        for version, runner in enumerate(runners, 1):
            model = served_model(bundle, limits=limits, version=str(version))
            models.add(model, runner, golden_of(bundle) if golden else None)
        models.start()
        warming = asyncio.create_task(models.warm_up())
        while not runners[0].batches:
            await asyncio.sleep(0.001)
        if stops:
            stopping.set()
        for runner in runners:
            runner.let_go.set()
        await warming
        models.close()
        return models

    return asyncio.run(asyncio.wait_for(run(), timeout=60))


@pytest.mark.parametrize("golden", [False, True])
def test_a_server_that_stops_warms_nothing_more_up(tiny_bundle: Bundle, golden: bool) -> None:
    runners = [SlowRunner(), SlowRunner()]
    models = warmed_up(tiny_bundle, runners, 4, golden=golden, stops=True)
    assert [each.batches for each in runners] == [[4 if golden else 1], []]
    assert models.failure is None
    assert not models.ready


def test_wrong_answers_while_it_stops_are_no_failure(tiny_bundle: Bundle) -> None:
    models = warmed_up(tiny_bundle, [SlowRunner()], 64, golden=True, stops=False)
    assert isinstance(models.failure, CheckFailedError)
    models = warmed_up(tiny_bundle, [SlowRunner()], 64, golden=True, stops=True)
    assert models.failure is None


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 200), (b'{"ready": true}', 200), (b"[" * 4000, 400), (b"[]", 400), (b" " * 9999, 413)],
)
def test_the_index_takes_little(url: str, body: bytes, status: int) -> None:
    assert httpx.post(f"{url}/v2/repository/index", content=body).status_code == status


def test_names_and_versions_are_read() -> None:
    assert split_offer("a/b=c") == (None, "1", "a/b=c")
    assert split_offer("zoo:cats") == (None, "1", "zoo:cats")
    assert split_offer("cats=zoo:cats") == ("cats", "1", "zoo:cats")
    assert split_offer("cats:3=a=b") == ("cats", "3", "a=b")
    assert split_offer("=a") == (None, "1", "=a")
    for text in ("", "stats=a", "a b=c", "a:0=c", "a:=c", "a:x=c", "a:01=c", "a="):
        with pytest.raises(UsageError):
            split_offer(text)


def test_what_is_called_alike_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"two bundles are 'advmoe' version 1; .*NAME:VERSION"):
        serve([Offer(tiny_bundle), Offer(tiny_bundle, "advmoe", "1")], port=0)
