"""The graphs that move rows, and the runner over them, here on ONNX Runtime."""

import itertools
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import InputError, UsageError
from advmoe_deploy.export.tensorrt.row_graphs import row_graphs
from advmoe_deploy.plan import Plan, RunStep, Segment, TensorInfo
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.runtime.tensorrt.layout import Layout
from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, narrowest, with_least
from advmoe_deploy.runtime.tensorrt.slot_pool import SlotPool
from advmoe_deploy.runtime.tensorrt.slots import HostSlot
from tests.families import Families

IMAGES = np.random.default_rng(1).random((24, 1, 8, 8), dtype=np.float32)
BATCH = BatchProfile(min=2, opt=8, max=18)

# One of each kind: images or tokens, one expert or two, weighted or not, trunks behind or none.
KINDS = (
    "conv experts",
    "block experts",
    "wide ResNet",
    "expert networks",
    "dual model",
    "token experts",
    "dense ViT",
)


class Watched(OrtEngine):
    """Notes the shapes that each graph is given."""

    def __init__(self, seen: dict[str, list[dict[str, Any]]], name: str, graph: Source) -> None:
        super().__init__(graph, threads=1)
        self.seen = seen.setdefault(name, [])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen.append({name: values.shape for name, values in inputs.items()})
        return super().run(inputs)


def device_runner(bundle: Bundle, *, seen: Any = None) -> DeviceRunner:
    """Return the runner over the bundle's own segments and the graphs that move rows."""
    plan = bundle.manifest.plan
    graphs: dict[str, bytes | Path] = {s.name: bundle.file(s.file) for s in plan.segments}
    graphs |= {
        row_graph.name: row_graph.graph.SerializeToString() for row_graph in row_graphs(plan)
    }
    return DeviceRunner.over_engines(
        plan,
        graphs,
        bundle.manifest.model.image_shape,
        open_engine=partial(Watched, {} if seen is None else seen),
        batch=BATCH,
        name="gathered",
    )


def assert_same(answer: Any, expected: Any) -> None:
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-5)
    assert answer.expert_ids.keys() == expected.expert_ids.keys()
    for layer, ids in expected.expert_ids.items():
        np.testing.assert_array_equal(answer.expert_ids[layer], ids)
        np.testing.assert_allclose(answer.weights[layer], expected.weights[layer], atol=1e-6)


@pytest.mark.parametrize("family", KINDS)
def test_every_family_answers_as_its_plan(families: Families, family: str) -> None:
    _, bundle = families[family]
    plan = open_runner(bundle, "onnxruntime-plan", threads=1)
    with plan as plain, device_runner(bundle) as runner:
        # 24 are more than the slot holds; 1 is less than the least and comes after larger ones.
        for images in (IMAGES, IMAGES[3:14], IMAGES[:1], IMAGES[7:8], IMAGES[2:19]):
            answer = runner.infer(images)
            assert_same(answer, plain.infer(images))
            assert answer.logits.dtype == np.float32
            assert all(ids.dtype == np.int64 for ids in answer.expert_ids.values())


@pytest.mark.parametrize("family", ["conv experts", "token experts", "wide ResNet"])
def test_graphs_that_move_rows_are_given_what_they_are_built_for(
    families: Families, family: str
) -> None:
    _, bundle = families[family]
    seen: dict[str, list[dict[str, Any]]] = {}
    with device_runner(bundle, seen=seen) as runner:
        for count in (1, 2, 11, 18, 24):
            runner.infer(IMAGES[:count])
    for row_graph in row_graphs(bundle.manifest.plan):
        shapes = row_graph.shapes(BATCH)
        assert seen[row_graph.name]
        for given in seen[row_graph.name]:
            assert given.keys() == shapes.keys()
            for name, shape in given.items():
                sizes = zip(shapes[name].min, shape, shapes[name].max, strict=True)
                assert all(least <= size <= most for least, size, most in sizes)
        ends = [{n: (s.min, s.max) for n, s in of.items()} for of in with_least(shapes)]
        if row_graph.name.endswith(".combine"):  # of a single image, kernels for the least are used
            assert {narrowest(ends, given) for given in seen[row_graph.name]} == {0, 1}
    for row_graph in row_graphs(bundle.manifest.plan):
        for shape in row_graph.shapes(BATCH).values():
            assert all(a <= b <= c for a, b, c in zip(shape.min, shape.opt, shape.max, strict=True))


def test_experts_run_on_their_own_rows_only(families: Families) -> None:
    _, bundle = families["wide ResNet"]
    seen: dict[str, list[dict[str, Any]]] = {}
    with device_runner(bundle, seen=seen) as runner:
        ids = runner.infer(IMAGES[:16]).expert_ids["router"][:, 0]
        load = np.bincount(ids, minlength=2)
        rows = [seen[f"router.expert-{e}"][-1]["images"][0] for e in np.flatnonzero(load)]
        assert rows == [n for n in load if n]  # up to 16, sizes are exact
        calls = len(seen["logits.dispatch"])
        runner.infer(IMAGES[:1])
        assert len(seen["logits.dispatch"]) == calls  # one image: nothing to gather


class Twice:
    """An engine whose logits are twice the pixels; notes how many rows it is given."""

    output_names = ("logits",)

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = inputs["images"]
        self.rows.append(len(pixels))
        return {"logits": 2 * pixels.reshape(len(pixels), -1)}

    def close(self) -> None:
        pass


def small_runner(*engines: Twice) -> DeviceRunner:
    """Return a runner of one segment, with an execution slot for each of ``engines``."""
    images = TensorInfo(name="images", dtype="float32", shape=("N", 1, 2, 2))
    logits = TensorInfo(name="logits", dtype="float32", shape=("N", 4))
    segment = Segment(name="s", file="s.onnx", inputs=(images,), outputs=(logits,))
    plan = Plan(
        segments=(segment,), steps=(RunStep(segment="s"),), inputs=("images",), outputs=("logits",)
    )
    layout = Layout(plan, BATCH)
    slots = [HostSlot({"s": engine}, layout.capacity) for engine in engines]
    return DeviceRunner(layout, slots, (1, 2, 2), name="small", resources=ExitStack())


def test_pixels_are_checked_as_they_are_written_and_said_of_all() -> None:
    pixels = np.random.default_rng(0).random((24, 1, 2, 2), dtype=np.float32)
    with small_runner(Twice()) as runner:
        np.testing.assert_array_equal(runner.infer(pixels).logits, 2 * pixels.reshape(24, 4))
        pixels[20, 0, 1, 1], pixels[2, 0, 1, 1] = np.nan, np.inf  # one in the second batch
        with pytest.raises(InputError, match=r"^2 of 24 images hold pixels that are not finite"):
            runner.infer(pixels)
        for value, says in ((-0.5, r"^pixels reach from -0.5 to "), (np.float32(1.01), "to 1.01;")):
            pixels[20], pixels[2] = value, 0
            with pytest.raises(InputError, match=says):
                runner.infer(pixels)
        for value in (-0.0, 1, 1e-45):
            pixels[20] = value
            assert len(runner.infer(pixels).logits) == 24


def test_the_time_of_a_device_is_that_of_a_batch_at_once() -> None:
    engine, pixels = Twice(), np.zeros((24, 1, 2, 2), np.float32)
    with small_runner(engine) as runner:
        assert runner.device_ms(pixels[:18]) > 0
        assert engine.rows == [18]
        with pytest.raises(UsageError, match="at most 18 at once"):
            runner.device_ms(pixels)


def test_every_execution_slot_is_prepared() -> None:
    engines = [Twice(), Twice()]
    with small_runner(*engines) as runner:
        for batch in (4, 4, 24):
            runner.prepare(np.zeros((batch, 1, 2, 2), np.float32))
        assert [engine.rows for engine in engines] == [[4, 4, 18]] * 2
        runner.infer(np.zeros((4, 1, 2, 2), np.float32))  # they were given back
    with pytest.raises(UsageError, match="closed"):
        runner.prepare(np.zeros((4, 1, 2, 2), np.float32))


def test_a_closed_runner_says_so(families: Families) -> None:
    runner = device_runner(families["dense ViT"][1])
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.infer(IMAGES[:1])


def test_a_pool_closes_when_its_lanes_are_idle_and_tells_who_waits() -> None:
    settled: list[str] = []
    events: list[str] = []

    class ExecutionSlot:
        def settle(self) -> None:
            settled.append("lane")

    pool = SlotPool([ExecutionSlot()])
    taken, done = Event(), Event()

    def use() -> None:
        with pool.slot():
            taken.set()
            done.wait(10)
            events.append("used")

    def close() -> None:
        pool.close()
        events.append("closed")

    with ThreadPoolExecutor(3) as threads:
        user = threads.submit(use)
        assert taken.wait(10)
        waiting, closing = threads.submit(use), threads.submit(close)
        done.set()
        user.result(10)
        closing.result(10)
        if waiting.exception(10) is not None:  # it may also have been in time
            with pytest.raises(UsageError, match="is closed"):
                waiting.result()
    assert events[-1] == "closed"
    assert len(settled) == events.count("used")
    with pytest.raises(UsageError, match="is closed"), pool.slot():
        pass
    pool.close()


def test_who_closes_a_pool_second_waits_for_its_lanes_as_well() -> None:
    class ExecutionSlot:
        def settle(self) -> None:
            events.append("settled")

    events: list[str] = []
    pool, started = SlotPool([ExecutionSlot()]), Barrier(3)

    def close() -> None:
        started.wait(10)
        pool.close()
        events.append("closed")

    with ThreadPoolExecutor(2) as threads:
        with pool.slot():
            closing = [threads.submit(close) for _ in range(2)]
            started.wait(10)
            wait(closing, timeout=0.1, return_when=FIRST_COMPLETED)
        assert [each.result(10) for each in closing] == [None, None]
    assert events == ["settled", "closed", "closed"]


def test_who_waits_for_all_lanes_and_who_closes_the_pool_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ExecutionSlot:
        def settle(self) -> None:
            pass

    def borrow() -> None:
        with pool.every_slot() as slots:
            lent.extend(slots)

    def get() -> ExecutionSlot | None:
        if next(calls) == 1:  # one lane is lent, the other asked for
            closing.start()
            closing.join(0.1)
        return free()

    pool, lent, calls = SlotPool([ExecutionSlot(), ExecutionSlot()]), [], itertools.count()
    free = pool._free.get
    monkeypatch.setattr(pool._free, "get", get)
    closing, borrowing = (Thread(target=each, daemon=True) for each in (pool.close, borrow))
    borrowing.start()
    borrowing.join(5)
    closing.join(5)
    assert len(lent) == 2
    assert not closing.is_alive()
