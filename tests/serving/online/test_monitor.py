"""The route monitor: what is as recorded raises no alarm, what is not does, in one window."""

import logging
import math

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.parity.compare import deciles_of
from advmoe_deploy.reports import LayerParity, ParityReport
from advmoe_deploy.runtime.routing import share_margins
from advmoe_deploy.runtime.runner import Prediction
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.operations.monitor import (
    CLASSES,
    FALSE_ALARMS,
    Monitor,
    bound_of,
    entropy_range,
    total_variation,
)
from tests.serving.online.live import INFER, request_for, running, wait_until_ready
from tests.serving.online.test_metrics import figures

RANDOM = np.random.default_rng(0)
DECILES = tuple(i / 10 for i in range(1, 10))


def report(loads: tuple[int, ...] = (300, 700), images: int = 1000) -> ParityReport:
    """Return what an export would record of two experts, and of margins that are even."""
    layer = LayerParity(
        layer="r",
        rows=images,
        flips=0,
        close_calls=0,
        close_flips=0,
        smallest_margin=0.0,
        expert_load=loads,
        margin_deciles=DECILES,
    )
    return ParityReport(
        images=images,
        compared=images,
        non_finite=0,
        max_abs_logit_diff=0.0,
        max_relative_logit_diff=0.0,
        max_abs_weight_diff=0.0,
        rounding=0.0,
        logit_tolerance=1e-5,
        route_agreement=1.0,
        margin=1e-4,
        layers=(layer,),
        class_margin_deciles=DECILES,
    )


def traffic(images: int, share: float = 0.7, most: float = 1.0) -> Prediction:
    """Return answers: expert 1 for ``share`` of them, margins even in [0, ``most``]."""
    ids = (RANDOM.random(images) < share).astype(np.int64)[:, None]
    margins = (RANDOM.random(images) * most).astype(np.float32)
    logits = np.stack([np.log((1 + margins) / 2), np.log((1 - margins) / 2)], axis=1)
    ones = np.ones(ids.shape, np.float32)
    return Prediction(logits.astype(np.float32), {"r": ids}, {"r": ones}, {"r": margins})


def add(monitor: Monitor, answer: Prediction) -> None:
    margins = {**answer.margins, CLASSES: share_margins(answer.logits)}
    monitor.add(len(answer.logits), answer.expert_ids, margins)


def test_drift_by_hand() -> None:
    monitor = Monitor(report(), 4)
    ids = np.array([[1], [1], [1], [0]])
    margins = np.array([0.05, 0.15, 0.15, 0.95], np.float32)
    logits = np.log(np.array([[0.975, 0.025]] * 4, np.float32))  # a margin of 0.95
    add(monitor, Prediction(logits, {"r": ids}, {"r": ids}, {"r": margins}))
    found = {(each.layer, each.of): each.value for each in monitor.drifts}
    assert monitor.windows == 1
    assert found["r", "load"] == pytest.approx(0.05)  # 0.75 of 0.7
    # Bins have a tenth each; here they have 1/4, 1/2, 1/4: 0.15 + 0.4 + 0.15 too much.
    assert found["r", "margin"] == pytest.approx(0.7)
    assert found["", "class_margin"] == pytest.approx(0.9)
    assert found["r", "entropy"] == pytest.approx(bits(0.7, 0.3) - bits(0.75, 0.25))
    assert total_variation(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1


def bits(*shares: float) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


@pytest.mark.parametrize(
    ("recorded", "most", "least", "greatest"),
    [
        ((0.7, 0.3), 0.1, (0.8, 0.2), (0.6, 0.4)),
        ((0.7, 0.3), 0.3, (1.0, 0.0), (0.5, 0.5)),
        ((0.5, 0.5), 0.2, (0.7, 0.3), (0.5, 0.5)),
        ((0.1, 0.1, 0.2, 0.6), 0.1, (0.0, 0.1, 0.2, 0.7), (0.15, 0.15, 0.2, 0.5)),
        ((0.1, 0.1, 0.4, 0.4), 0.15, (0.0, 0.05, 0.4, 0.55), (0.175, 0.175, 0.325, 0.325)),
        ((0.2, 0.8), 2.0, (0.0, 1.0), (0.5, 0.5)),
    ],
)
def test_range_of_entropies_by_hand(
    recorded: tuple[float, ...],
    most: float,
    least: tuple[float, ...],
    greatest: tuple[float, ...],
) -> None:
    down, up = entropy_range(np.array(recorded), most)
    assert down == pytest.approx(bits(*recorded) - bits(*least), abs=1e-8)
    assert up == pytest.approx(bits(*greatest) - bits(*recorded), abs=1e-8)


def test_loads_that_stay_even_raise_no_alarm() -> None:
    monitor = Monitor(report((300, 300, 300)), 6)
    monitor.add(6, {"r": np.array([[0], [1], [2]] * 2)}, {})
    assert {each.of for each in monitor.drifts} == {"load", "entropy"}
    assert not any(each.is_alarming for each in monitor.drifts)


def test_traffic_as_recorded_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(report(), 512)
    for _ in range(200):
        add(monitor, traffic(512))
        assert not any(each.is_alarming for each in monitor.drifts)
    assert monitor.windows == 200
    assert caplog.text == ""
    assert bound_of(10**9, 10**9) < 1e-3 < bound_of(512, 1000)
    assert math.exp(-2 * bound_of(512, 10**12) ** 2 * 512) == pytest.approx(FALSE_ALARMS)


@pytest.mark.parametrize(
    ("other", "alarming"),
    [
        (traffic(512, share=0.35), {("r", "load")}),
        (traffic(512, most=0.5), {("r", "margin"), ("", "class_margin")}),
        (traffic(512, share=0.0), {("r", "load"), ("r", "entropy")}),
    ],
)
def test_other_traffic_is_noticed_and_forgiven(
    other: Prediction, alarming: set[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(report(), 512)
    for answers in (other, other, traffic(512), traffic(512)):
        add(monitor, answers)
        found = {(each.layer, each.of) for each in monitor.drifts if each.is_alarming}
        assert found == (alarming if answers is other else set())
    lines = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 2 * len(alarming)  # when it begins, and when it ends
    assert "is not what the export recorded" in caplog.text
    assert "is as recorded again" in caplog.text


def test_nothing_is_watched_that_was_not_recorded() -> None:
    bare = report().model_copy(update={"layers": (), "class_margin_deciles": ()})
    for monitor in (Monitor(bare, 4), Monitor(report(), 0)):
        add(monitor, traffic(512))
        assert (monitor.drifts, monitor.windows) == ([], 0)
    inside = Monitor(report(), 4)
    answers = traffic(8)
    inside.add(8, answers.expert_ids, {CLASSES: share_margins(answers.logits)})  # as most engines
    assert {each.of for each in inside.drifts} == {"load", "entropy", "class_margin"}


def test_the_export_records_what_is_watched(tiny_bundle: Bundle) -> None:
    parity = tiny_bundle.manifest.parity
    (layer,) = parity.layers
    assert sum(layer.expert_load) == parity.images
    for deciles in (layer.margin_deciles, parity.class_margin_deciles):
        assert len(deciles) == 9
        assert list(deciles) == sorted(deciles)
        assert 0 <= deciles[0] <= deciles[-1] <= 1
    scores = np.log(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    assert deciles_of(scores)[4] == pytest.approx(0.25)
    assert deciles_of(np.zeros((3, 1), np.float32)) == ()
    assert deciles_of(np.full((3, 2), np.nan, np.float32)) == ()


def test_a_server_tells_of_drift(tiny_bundle: Bundle) -> None:
    limits = Limits(window=300)
    clean = to_float(load_dataset("digits").test.images[:300])
    with (
        open_runner(tiny_bundle, "onnxruntime-plan") as runner,
        running(tiny_bundle, runner, limits) as live,
    ):
        wait_until_ready(live.address)

        def told(images: np.ndarray) -> dict[str, float]:
            body = request_for(images)
            assert httpx.post(live.url + INFER, json=body, timeout=60).status_code == 200
            found = figures(httpx.get(live.url + "/metrics").text)
            return {name: value for name, value in found.items() if "route_alert" in name}

        assert set(told(clean).values()) == {0.0}
        assert max(told(np.repeat(clean[:1], 400, axis=0)).values()) == 1.0
        assert set(told(np.resize(clean, (600, 1, 8, 8))).values()) == {0.0}


@pytest.mark.parametrize(
    "deciles",
    [(*DECILES[:5], *[1.0] * 4), (*DECILES[:8], 1.0), (0.0, *DECILES[1:])],
    ids=["half are one", "one in ten is", "one in ten is zero"],
)
def test_margins_that_many_share_have_no_figure(deciles: tuple[float, ...]) -> None:
    """A tenth of the rows or more has one margin, so that bins beside it have other shares."""
    sure = report().model_copy(update={"class_margin_deciles": deciles})
    monitor = Monitor(sure, 8)
    monitor.add(8, {}, {CLASSES: np.ones(8, np.float32)})
    assert not [drift for drift in monitor.drifts if drift.layer == CLASSES]
