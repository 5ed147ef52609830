"""More calls than can be answered, calls that nobody waits for, and the end of the server."""

import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.grpc.messages import Asked
from advmoe_deploy.serving.online.grpc.wire import Cut
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.live import (
    ONE,
    Live,
    SlowRunner,
    all_of,
    running,
    wait_for,
    wait_until_ready,
)

LIMITS = Limits(max_images=8, max_body=1 << 16, queue=10, batch=4, memory=1 << 18, body_s=1.0)
SERVICE = "/inference.GRPCInferenceService"
LIVE, READY = f"{SERVICE}/ServerLive", f"{SERVICE}/ServerReady"
INFER = f"{SERVICE}/ModelInfer"


@pytest.fixture
def live(tiny_bundle: Bundle, slow: SlowRunner) -> Iterator[Live]:
    with running(tiny_bundle, slow, LIMITS, drain_s=600) as live:
        wait_until_ready(live.address)
        slow.batches.clear()
        yield live


@pytest.fixture
def channel(live: Live) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(live.grpc) as channel:
        yield channel


def message(images: int = 1) -> bytes:
    request = service_pb2.ModelInferRequest(
        model_name="advmoe", raw_input_contents=[np.repeat(ONE, images, axis=0).tobytes()]
    )
    request.inputs.add(name="images", datatype="FP32", shape=[images, *ONE.shape[1:]])
    return bytes(request.SerializeToString())


def failed(ask: Callable[..., Any], *of: Any, **how: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        ask(*of, **how)
    return caught.value


def is_ready(channel: grpc.Channel) -> bool:
    return channel.unary_unary(READY)(b"", timeout=20) == b"\x08\x01"


def test_what_is_too_much_is_told_at_once(
    live: Live, channel: grpc.Channel, slow: SlowRunner
) -> None:
    slow.let_go.clear()
    ask = channel.unary_unary(INFER)
    waiting = [ask.future(message(4), timeout=60) for _ in range(2)]
    wait_for(lambda: live.service.waiting == 8)
    refused = failed(ask, message(4), timeout=60)
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "8 images wait already, of 10 at most" in refused.details()
    told = dict(refused.trailing_metadata())
    assert told.keys() == {"retry-after", "x-request-id"}
    assert int(told["retry-after"]) >= 1
    assert is_ready(channel)
    slow.let_go.set()
    assert all(len(each.result()) for each in waiting)
    assert ask(message(4), timeout=60)


def test_memory_is_one_budget_with_http(live: Live, channel: grpc.Channel) -> None:
    with live.service.budget.hold() as hold:
        assert hold.grow(LIMITS.memory - 100)
        refused = failed(channel.unary_unary(INFER), message(), timeout=60)
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "other requests hold the memory" in refused.details()
    assert channel.unary_unary(INFER)(message(), timeout=60)
    wait_for(lambda: live.service.budget.used == 0)


@pytest.mark.parametrize("how", ["cancelled", "deadline", "parameter"])
def test_what_nobody_waits_for_is_not_computed(
    live: Live, channel: grpc.Channel, slow: SlowRunner, how: str
) -> None:
    slow.let_go.clear()
    ask = channel.unary_unary(INFER)
    first = ask.future(message(1), timeout=60)
    wait_for(lambda: slow.batches == [1])
    if how == "parameter":
        request = service_pb2.ModelInferRequest.FromString(message(3))
        request.parameters["timeout"].int64_param = 100_000
        waiting = ask.future(request.SerializeToString(), timeout=60)
    else:
        waiting = ask.future(message(3), timeout=60 if how == "cancelled" else 0.3)
    if how != "deadline":
        wait_for(lambda: live.service.waiting == 4)
    if how == "cancelled":
        waiting.cancel()
    if how != "parameter":
        assert failed_or_cancelled(waiting)
        wait_for(lambda: live.service.budget.used == ONE.nbytes)
    else:
        time.sleep(0.2)
    slow.let_go.set()
    assert first.result()
    if how == "parameter":
        refused = failed(waiting.result)
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "time was over" in refused.details()
    assert ask(message(2), timeout=60)
    assert slow.batches == [1, 2]
    wait_for(lambda: live.service.budget.used == 0)


def test_who_leaves_while_its_batch_runs_is_not_counted_as_answered(
    live: Live, channel: grpc.Channel, slow: SlowRunner
) -> None:
    slow.let_go.clear()
    leaves = channel.unary_unary(INFER).future(message(), timeout=60)
    wait_for(lambda: slow.batches == [1])
    leaves.cancel()
    wait_for(lambda: live.service.budget.used == 0)
    slow.let_go.set()
    figures = httpx.get(live.url + "/metrics").text
    assert 'advmoe_requests_total{model="advmoe",status="499",version="1"} 1.0' in figures
    assert 'status="200"' not in figures


def test_what_was_cancelled_leaves_no_images_while_a_batch_runs(
    live: Live, channel: grpc.Channel, slow: SlowRunner
) -> None:
    slow.let_go.clear()
    ask = channel.unary_unary(INFER)
    first = ask.future(message(1), timeout=60)
    wait_for(lambda: slow.batches == [1])
    leaves = ask.future(message(3), timeout=60)
    wait_for(lambda: live.service.waiting == 4)
    leaves.cancel()
    wait_for(lambda: live.service.waiting == 1)
    slow.let_go.set()
    assert first.result()
    assert slow.batches == [1]


def failed_or_cancelled(waiting: Any) -> bool:
    try:
        waiting.result()
    except (grpc.FutureCancelledError, grpc.RpcError):
        return True
    return False


def test_half_a_message_is_not_waited_for_and_keeps_nobody_out(
    live: Live, channel: grpc.Channel
) -> None:
    """There are four turns; five calls without a message wait, and those who ask get answers."""
    let_go = threading.Event()

    def never() -> Iterator[bytes]:
        let_go.wait(timeout=60)
        yield from ()

    half = [channel.stream_unary(INFER).future(never(), timeout=60) for _ in range(5)]
    assert channel.unary_unary(LIVE)(b"", timeout=20)
    assert channel.unary_unary(INFER)(message(), timeout=60)
    ends = {failed(each.result).code() for each in half}
    let_go.set()
    assert ends <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert grpc.StatusCode.DEADLINE_EXCEEDED in ends


def test_the_end_answers_what_waits_and_refuses_the_rest(
    live: Live, channel: grpc.Channel, slow: SlowRunner
) -> None:
    ask = channel.unary_unary(INFER)
    slow.let_go.clear()
    waiting = [ask.future(message(2), timeout=60) for _ in range(5)]
    wait_for(lambda: live.service.waiting == 10)
    live.server.stop()
    assert not is_ready(channel)  # and calls are still taken:
    full = failed(ask, message(1), timeout=60)
    assert full.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    live.server.stop(announced=False)
    wait_for(lambda: failed(ask, message(1), timeout=60).code() == grpc.StatusCode.UNAVAILABLE)
    slow.let_go.set()
    assert all(each.result() for each in waiting)


def test_no_accepted_call_is_lost_when_the_server_stops(tiny_bundle: Bundle) -> None:
    """Eight clients ask without a pause: each call is answered, or refused as by a server gone."""
    ends: list[grpc.StatusCode] = []

    def ask(live: Live) -> None:
        with grpc.insecure_channel(live.grpc) as channel:
            call = channel.unary_unary(INFER)
            while True:
                try:
                    assert len(call(message(), timeout=60)) > 40
                    ends.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    ends.append(error.code())
                    return

    with (
        open_runner(tiny_bundle) as runner,
        running(tiny_bundle, runner, Limits(max_images=8), drain_s=0.2) as live,
        ThreadPoolExecutor(8) as clients,
    ):
        wait_until_ready(live.address)
        asking = [clients.submit(ask, live) for _ in range(8)]
        wait_for(lambda: len(ends) > 100)
        live.server.stop()
        for each in asking:
            each.result(timeout=60)
    assert ends.count(grpc.StatusCode.UNAVAILABLE) == 8
    assert set(ends) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_in_a_hurry_nothing_is_waited_for(
    live: Live, channel: grpc.Channel, slow: SlowRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    slow.let_go.clear()
    waiting = channel.unary_unary(INFER).future(message(), timeout=60)
    wait_for(lambda: live.service.waiting == 1)
    live.server.stop(announced=False)
    live.server.abandon()
    time.sleep(0.1)
    slow.let_go.set()
    assert failed_or_cancelled(waiting) or waiting.result()
    assert "Traceback" not in capfd.readouterr().err


def test_who_says_nothing_is_not_kept(tiny_bundle: Bundle, slow: SlowRunner) -> None:
    limits = Limits(head_s=0.5, keep_alive_s=0.5)
    with running(tiny_bundle, slow, limits) as live:
        wait_until_ready(live.address)
        host, port = live.grpc.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as silent:
            all_of(silent)  # settings of HTTP/2, and the end, which is waited for


TAKEN = """
import socket, sys
from pathlib import Path
from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.errors import MachineError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.grpc.server import GrpcServer
from advmoe_deploy.serving.online.http.rest import run_app
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.protocol import served_model

bundle, models = open_bundle(Path(sys.argv[1])), Models(Limits(drain_s=0.0))
with open_runner(bundle) as runner, socket.create_server(("127.0.0.1", 0)) as other:
    models.add(served_model(bundle), runner)
    beside = GrpcServer(models, other.dup())  # which leaves the port to the other when closed
    with socket.create_server(("127.0.0.1", 0)) as own:
        try:
            run_app(models, own, lambda: None, hosts=None, beside=beside)
        except MachineError as error:
            print(error)
"""


def test_a_port_that_was_taken_meanwhile_ends_the_server(tiny_bundle: Bundle) -> None:
    """In a process of its own, which leaves nothing behind but the line."""
    command = [sys.executable, "-c", TAKEN, str(tiny_bundle.path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "is in use; choose another --grpc-port" in run.stdout
    assert run.stderr == ""


FEW_FILES = """
import resource, sys
from pathlib import Path
import grpc
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from advmoe_deploy.bundle import open_bundle
from tests.serving.online.live import LIMITS, SlowRunner, running
with running(open_bundle(Path(sys.argv[1])), SlowRunner(), LIMITS) as live:
    with grpc.insecure_channel(live.grpc) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)  # its port is open a moment later
    print(live.address, live.grpc, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_connections_of_grpc_leave_descriptors_to_others(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-c", FEW_FILES, str(tiny_bundle.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, text=True, **pipes) as run,  # type: ignore[call-overload]
        contextlib.ExitStack() as stack,
    ):
        stack.callback(run.kill)
        address, rpc = run.stdout.readline().split()
        host, port = rpc.split(":")
        for _ in range(320):
            crowd = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            with contextlib.suppress(OSError):  # it was closed already
                crowd.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        assert httpx.get(f"http://{address}/v2/health/live", timeout=30).status_code == 200


def test_what_was_refused_is_not_kept(live: Live, channel: grpc.Channel) -> None:
    """Not even until circles are collected, which knows nothing of how large a message was."""
    request = service_pb2.ModelInferRequest.FromString(message())
    request.inputs[0].name = "pixels"
    gc.collect()
    gc.disable()
    try:
        for wrong in (request.SerializeToString(), message()[:-1]):
            refused = failed(channel.unary_unary(INFER), wrong, timeout=60)
            assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
        wait_for(lambda: not any(type(each) in (Asked, Cut) for each in gc.get_objects()))
    finally:
        gc.enable()
