"""What a server says about itself: true figures under few labels."""

import math
import re
import threading
import time

import httpx
import numpy as np
from prometheus_client import CollectorRegistry, Histogram

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.job import Done, Times
from advmoe_deploy.serving.online.metrics import Metrics, figures_text
from tests.serving.online.live import INFER, request_for, running, wait_until_ready


def figures(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    own = re.compile(r'(?:model="advmoe"|version="1"),?')
    names = (own.sub("", name).replace(",}", "}").replace("{}", "") for name, _ in lines)
    return dict(zip(names, (float(value) for _, value in lines), strict=True))


def test_requests_routes_and_batches_are_counted(tiny_bundle: Bundle) -> None:
    images = to_float(load_dataset("digits").test.images[:6])
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner) as live:
        wait_until_ready(live.address)
        before = figures(httpx.get(live.url + "/metrics").text)
        for _ in range(3):
            assert httpx.post(live.url + INFER, json=request_for(images)).status_code == 200
        assert httpx.post(live.url + INFER, content=b"{").status_code == 400
        answer = httpx.get(live.url + "/metrics")
        ids = runner.infer(images).expert_ids["router"][:, 0]
    assert answer.headers["content-type"].startswith("text/plain")
    after = figures(answer.text)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert before.get("advmoe_batch_images_sum", 0) == 0  # what warms it up is no request
    assert more('advmoe_requests_total{status="200"}') == 3
    assert more('advmoe_requests_total{status="400"}') == 1
    assert more("advmoe_batch_images_sum") == 18
    assert more("advmoe_class_margin_count") == 18
    for stage, count in {"read": 3, "wait": 3, "write": 3, "all": 4}.items():
        assert more(f'advmoe_request_seconds_count{{stage="{stage}"}}') == count
    for expert, rows in enumerate(np.bincount(ids)):
        name = f'advmoe_expert_rows_total{{expert="{expert}",layer="router"}}'
        assert more(name) == 3 * rows
    assert after["advmoe_ready"] == 1
    assert after["advmoe_waiting_images"] == after["advmoe_held_bytes"] == 0


def test_an_engine_of_the_plan_tells_how_clear_its_routes_are(tiny_bundle: Bundle) -> None:
    images = to_float(load_dataset("digits").test.images[:6])
    with (
        open_runner(tiny_bundle, "onnxruntime-plan") as runner,
        running(tiny_bundle, runner) as live,
    ):
        wait_until_ready(live.address)
        assert httpx.post(live.url + INFER, json=request_for(images)).status_code == 200
        found = figures(httpx.get(live.url + "/metrics").text)
        assert isinstance(runner, PlanRunner)
        scores_N2 = runner.before_last(images)["router.scores"]
    assert found['advmoe_route_margin_count{layer="router"}'] == 6
    difference_N = np.abs(scores_N2[:, 0] - scores_N2[:, 1])
    sum_of_six = np.tanh(difference_N / 2).sum()  # p - (1 - p) of two
    assert abs(found['advmoe_route_margin_sum{layer="router"}'] - sum_of_six) <= 1e-4


def test_what_clients_send_makes_no_labels(tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle) as runner, running(tiny_bundle, runner) as live:
        wait_until_ready(live.address)
        for name in ("a", "b%0A", "c" * 900):
            httpx.post(f"{live.url}/v2/models/{name}/infer", content=b"")
        httpx.post(live.url + INFER, content=b"")
        text = httpx.get(live.url + "/metrics").text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels == {"model", "version", "status", "stage", "expert", "layer", "le", "outcome"}
    assert set(re.findall(r'status="(\w+)"', text)) == {"400"}
    assert figures(text)["advmoe_unknown_model_requests_total"] == 3


def test_margins_are_counted_at_once_as_they_would_be_one_by_one() -> None:
    """Of tokens too, on the very bounds of the bins, and where some are no numbers."""
    random = np.random.default_rng(0)
    bounds = [i / 10 for i in range(11)]
    odd = [*bounds, *np.nextafter(bounds, 2), *np.nextafter(bounds, -1), np.nan, np.inf, -np.inf]
    values_N = np.concatenate([random.random(5000), odd, np.float32(odd)]).astype(np.float32)
    registry = CollectorRegistry()
    expected = Histogram("expected", "", buckets=bounds[1:], registry=registry)
    for value in values_N[np.isfinite(values_N)]:
        expected.observe(float(value))
    metrics = Metrics(dict)
    parts_NT = np.array_split(values_N.reshape(-1, 4), 3)
    for part_NT in parts_NT:
        ids = np.zeros((len(part_NT), 1), np.int64)
        logits = np.zeros((len(part_NT), 2), np.float32)
        margins = {"r": part_NT}
        metrics.batch(Done(Prediction(logits, {"r": ids}, {"r": ids}, margins), 0.1))
    found = figures(figures_text([({}, metrics)], {}, 0).decode())
    for sample in next(iter(expected.collect())).samples:
        if sample.name.endswith("_bucket"):
            bound = sample.labels["le"]
            assert found[f'advmoe_route_margin_bucket{{layer="r",le="{bound}"}}'] == sample.value
        elif sample.name.endswith("_count"):
            assert found['advmoe_route_margin_count{layer="r"}'] == sample.value
        elif sample.name.endswith("_sum"):
            total = found['advmoe_route_margin_sum{layer="r"}']
            assert math.isclose(total, sample.value, rel_tol=1e-9)
    assert found['advmoe_class_margin_bucket{le="0.1"}'] == sum(map(len, parts_NT))


def test_entropy_and_margins_by_hand() -> None:
    metrics = Metrics(dict)
    even = np.array([[0], [1], [2], [3]])
    logits = np.log(np.array([[0.7, 0.2, 0.1]] * 4, np.float32))
    metrics.batch(Done(Prediction(logits, {"r": even}, {"r": even}), 0.1))
    metrics.request(200, 1.0, Times(read=0.1, wait=0.5, compute=0.2, write=0.1))
    metrics.request(503, 0.7, Times(read=0.1))
    found = figures(figures_text([({}, metrics)], {}, 0).decode())
    assert math.isclose(found['advmoe_route_entropy_bits{layer="r"}'], 2.0)
    assert math.isclose(found["advmoe_class_margin_sum"], 4 * 0.5, rel_tol=1e-5)
    assert found['advmoe_request_seconds_sum{stage="wait"}'] == 0.5
    assert found['advmoe_request_seconds_count{stage="read"}'] == 1  # of those that were answered
    assert found['advmoe_request_seconds_count{stage="all"}'] == 2
    twos = np.full((8000, 1), 2)
    one = Prediction(np.repeat(logits, 2000, axis=0), {"r": twos}, {"r": twos})
    metrics.batch(Done(one, 0.1))
    assert metrics.entropies()["r"] < 0.1
    nothing = Prediction(np.full((1, 3), np.nan, np.float32), {}, {})
    metrics.batch(Done(nothing, 0.1))
    assert (
        figures(figures_text([({}, metrics)], {}, 0).decode())["advmoe_class_margin_count"] == 8004
    )


def test_nothing_counted_is_missed_while_another_thread_counts() -> None:
    metrics, ended = Metrics(dict), [0]
    ids, logits = np.zeros((1, 1), np.int64), np.zeros((1, 2), np.float32)
    done = Done(Prediction(logits, {"r": ids}, {"r": ids}), 0.1)

    def compute() -> None:
        for _ in range(20_000):
            metrics.batch(done)
            ended[0] += 1

    thread = threading.Thread(target=compute)
    thread.start()
    while thread.is_alive():
        before = ended[0]
        assert metrics.totals()["batches"] >= before
        time.sleep(0.0005)
    thread.join()
    assert metrics.totals()["images"] == 20_000
