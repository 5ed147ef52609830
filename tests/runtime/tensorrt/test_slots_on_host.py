"""Execution slots over a stand-in for CUDA that works in the host's memory."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.errors import BundleError, InputError, MachineError
from advmoe_deploy.runtime.tensorrt.api import Messages
from advmoe_deploy.runtime.tensorrt.cuda import DeviceBuffer, PinnedBuffer, Stream
from advmoe_deploy.runtime.tensorrt.program import switch_profile
from advmoe_deploy.runtime.tensorrt.slot import Stored, TensorRtSlot
from advmoe_deploy.runtime.tensorrt.slots import View
from benchmarks.gpu.visit import host_cuda
from tests.runtime.tensorrt.bindings import Bindings

ROOT = Path(__file__).parents[3]
FACTS = json.loads((ROOT / "tests" / "data" / "tensorrt_names.json").read_text())["cuda"]
FLOAT = np.dtype(np.float32)


@pytest.fixture
def host() -> Iterator[host_cuda.Host]:
    with host_cuda.installed() as host:
        yield host
    assert not host.held  # everything was freed


def test_the_stand_in_has_what_we_use_by_the_names_of_every_release() -> None:
    own = {name for name in dir(host_cuda) if name.startswith("cuda")}
    for release in FACTS.values():
        assert own <= set(release["runtime"])
    classes = {owner: set(names) for owner, names in FACTS["13.5"].items()}
    code = (ROOT / "advmoe_deploy/runtime/tensorrt/cuda.py").read_text()
    used = {name for owner, name in Bindings(code, classes).relied if owner == "runtime"}
    assert used <= own


def test_rows_are_checked_written_and_sent_piece_by_piece(host: host_cuda.Host) -> None:
    images = np.random.default_rng(0).random((200, 3, 32, 32), dtype=np.float32)
    lengths: list[int] = []

    def check(piece: np.ndarray) -> None:
        lengths.append(len(piece))
        assert host.calls.count("cudaMemcpyAsync") == len(lengths) - 1  # what was checked is sent
        if not piece.max() <= 1:
            raise InputError("too bright")

    with TensorRtSlot({}, {"images": Stored(FLOAT, 256, images.shape[1:])}, streams=1) as slot:
        slot.put("images", images, check=check)
        assert lengths == [85, 85, 30]  # of 12 KiB, so that 85 are within a MiB
        (answer,) = slot.get(View("images", 200))
        np.testing.assert_array_equal(answer, images)
        images[100] = 2
        lengths.clear()
        host.calls.clear()
        with pytest.raises(InputError, match="too bright"):
            slot.put("images", images, check=check)
        assert lengths == [85, 85]
        slot.settle()


def test_a_failed_capture_leaves_nothing_behind(host: host_cuda.Host) -> None:
    failed = host_cuda.cudaError_t.cudaErrorStreamCaptureInvalidated

    def refuse() -> None:
        raise BundleError("TensorRT cannot run an engine")

    with Stream() as stream, DeviceBuffer(8) as there, PinnedBuffer(8) as pinned:
        held = set(host.held)

        def copy() -> None:
            stream.download(pinned.address, there.address, 8)

        with pytest.raises(BundleError):  # the capture itself was fine, so there is a graph
            stream.captured(refuse)
        assert set(host.held) == held
        host.failing["cudaStreamEndCapture"] = failed
        with pytest.raises(BundleError):  # that comes first, not what follows from it
            stream.captured(refuse)
        assert host.last_error == 0
        for call in ("cudaStreamEndCapture", "cudaGraphInstantiate", "cudaMemcpyAsync"):
            host.failing[call] = failed
            with pytest.raises(MachineError, match="cudaErrorStreamCaptureInvalidated"):
                stream.captured(copy)
            assert (set(host.held), host.last_error) == (held, 0)
        pinned.array((2,), FLOAT)[...] = 1
        with stream.captured(copy) as graph:  # the stream is as good as new
            assert pinned.array((2,), FLOAT).all()
            stream.launch(graph)
        assert not pinned.array((2,), FLOAT).any()


def test_a_refused_profile_is_one_line(host: host_cuda.Host) -> None:
    class Context:
        """As the bindings do: of a refusal they raise, and TensorRT's reason is in its log."""

        def set_optimization_profile_async(self, number: int, stream: int) -> bool:
            if number:
                messages.keep("ERROR", f"profile {number} is used by another context")
                raise RuntimeError("Error in set optimization profile async.")
            return True

    messages = Messages()
    switch_profile(Context(), 0, "router.engine", messages.listen())
    with pytest.raises(BundleError) as refused:
        switch_profile(Context(), 1, "router.engine", messages.listen())
    assert str(refused.value) == (
        "TensorRT cannot run router.engine by its profile 1: profile 1 is used by another context"
    )


def test_the_time_of_a_slot_ends_with_the_last_rows_of_any_stream(
    host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(host_cuda.time, "perf_counter", lambda: next(ticks))
    rows = Stored(FLOAT, 4, (2,))
    with TensorRtSlot({}, {"a": rows, "b": rows}, streams=2) as slot:
        for stream, tensor in enumerate("ab"):
            slot.put(tensor, np.ones((4, 2), np.float32), stream=stream)
        slot.begin()
        slot.get(View("a", 4))
        slot.get(View("a", 4), View("b", 4))
        assert slot.elapsed_ms() == 3000  # a second from event to event
        slot.get(View("a", 4))
        assert slot.elapsed_ms() == 0  # nothing is timed that was not begun
        assert next(ticks) == 4
