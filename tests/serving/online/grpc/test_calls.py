"""Stock clients over gRPC get the runner's own answers, and malformed messages a reason."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.select import open_runner
from tests.serving.online.live import ONE

COMMAND = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--grpc-port=0"]
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def addresses(tiny_bundle: Bundle) -> Iterator[tuple[str, str]]:
    """The addresses of HTTP and gRPC of a process, which writes one line to stderr, a note."""
    offers = [f"{name}={tiny_bundle.path}" for name in ("advmoe", "cats:2", "cats:10")]
    with subprocess.Popen(
        [*COMMAND, "--drain=0", *offers],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        yield lines[0].split()[1].split("/v2")[0], lines[3].split()[1]
        process.terminate()
        _, noise = process.communicate(timeout=60)
        assert process.returncode == 0
        lines = noise.splitlines()
        assert [line for line in lines if not line.startswith("route monitor: ")] == lines[:1], (
            noise
        )


@pytest.fixture(scope="module")
def client(addresses: tuple[str, str]) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(addresses[1]) as client:
        yield client


@pytest.fixture(scope="module")
def call(addresses: tuple[str, str]) -> Iterator[Callable[[bytes], bytes]]:
    """Sends bytes, whatever they are, to the call that infers."""
    with grpc.insecure_channel(addresses[1]) as channel:
        yield channel.unary_unary(INFER)


def tensor(images: NDArray[Any], datatype: str = "FP32") -> triton.InferInput:
    result = triton.InferInput("images", list(images.shape), datatype)
    result.set_data_from_numpy(images)
    return result


def message(images: NDArray[np.float32] = ONE, **changes: Any) -> Any:
    request = service_pb2.ModelInferRequest(
        model_name="advmoe", raw_input_contents=[images.tobytes()]
    )
    own = {"name": "images", "datatype": "FP32", "shape": images.shape, **changes}
    request.inputs.add(**own)
    return request


def status_of(call: Callable[..., bytes], request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request if isinstance(request, bytes) else request.SerializeToString())
    return caught.value.code(), caught.value.details()


def test_answers_are_the_runners_own(
    tiny_bundle: Bundle, client: triton.InferenceServerClient, call: Callable[[bytes], bytes]
) -> None:
    images = to_float(load_dataset("digits").test.images[:70])
    with open_runner(tiny_bundle) as runner:
        expected = runner.infer(images)
    answer = client.infer("advmoe", [tensor(images)], request_id="7")
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("advmoe", "1", "7")
    assert [each.name for each in response.outputs] == [
        "logits",
        "router.expert_ids",
        "router.weights",
    ]
    np.testing.assert_array_equal(answer.as_numpy("logits"), expected.logits)
    np.testing.assert_array_equal(
        answer.as_numpy("router.expert_ids"), expected.expert_ids["router"]
    )
    np.testing.assert_array_equal(answer.as_numpy("router.weights"), expected.weights["router"])
    wanted = [triton.InferRequestedOutput("logits")]
    for options in ({}, {"compression_algorithm": "gzip"}, {"client_timeout": 60}):
        answer = client.infer("cats", [tensor(images)], outputs=wanted, **options)
        assert answer.get_response().model_version == "10"
        assert len(answer.get_response().outputs) == 1
        np.testing.assert_array_equal(answer.as_numpy("logits"), expected.logits)
    request = message(images)
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(images.ravel())
    response = service_pb2.ModelInferResponse.FromString(call(request.SerializeToString()))
    assert response.raw_output_contents[0] == expected.logits.tobytes()


def test_stock_clients_learn_what_there_is(
    client: triton.InferenceServerClient, addresses: tuple[str, str]
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cats", "2")
    http = httpx.get(f"{addresses[0]}/v2").json()
    assert client.get_server_metadata(as_json=True) == http
    index = client.get_model_repository_index().models
    assert [(each.name, each.version, each.state) for each in index] == [
        ("advmoe", "1", "READY"),
        ("cats", "2", "READY"),
        ("cats", "10", "READY"),
    ]
    metadata = client.get_model_metadata("cats")
    assert metadata.versions == ["2", "10"]
    assert metadata.inputs[0].shape == [-1, 1, 8, 8]
    config = client.get_model_config("cats").config
    assert config.max_batch_size == 1024
    assert config.output[0].dims == [10]
    (before,) = client.get_inference_statistics("advmoe").model_stats
    client.infer("advmoe", [tensor(np.repeat(ONE, 3, axis=0))])
    with pytest.raises(InferenceServerException, match="shape"):
        client.infer("advmoe", [tensor(ONE[0])])
    (after,) = client.get_inference_statistics("advmoe").model_stats
    assert after.inference_count - before.inference_count == 3
    for part in ("success", "fail", "queue", "compute_infer"):
        was, is_now = (getattr(each.inference_stats, part) for each in (before, after))
        assert is_now.count - was.count == 1
    assert len(client.get_inference_statistics("cats").model_stats) == 2
    assert len(client.get_inference_statistics().model_stats) == 3
    figures = httpx.get(f"{addresses[0]}/metrics").text
    assert 'advmoe_requests_total{model="advmoe",status="400",version="1"}' in figures


def with_parameter(where: str, name: str, **value: Any) -> Any:
    request = message()
    request.outputs.add(name="logits")
    places = {"request": request, "input": request.inputs[0], "output": request.outputs[0]}
    parameter = places[where].parameters[name]
    for key, each in value.items():
        setattr(parameter, key, each)
    return request


def both() -> Any:
    request = message()
    request.inputs[0].contents.fp32_contents.extend(ONE.ravel())
    return request


def twice() -> Any:
    request = message()
    request.inputs.add(name="images", datatype="FP32", shape=ONE.shape)
    return request


def without() -> Any:
    request = message()
    del request.raw_input_contents[:]
    return request


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (message(name="pixels"), "called 'images'"),
        (message(datatype="INT32"), "INT32"),
        (message(shape=[1, 1, 8, 9]), "has shape"),
        (message(shape=[1, 64]), "has shape"),
        (message(shape=[-1, 1, 8, 8]), "has shape"),
        (message(shape=[1 << 40, 1, 8, 8]), "exceed the limit of 1024"),
        (message(shape=[2, 1, 8, 8]), "needs 512 bytes; it has 256"),
        (message(ONE * np.nan), "not finite"),
        (message(ONE * 3), "ranges over [1.5, 1.5]"),
        (both(), "there 2 times"),
        (twice(), "exactly one"),
        (without(), "there 0 times"),
        (with_parameter("request", "timeout", string_param="soon"), "timeout must be a whole"),
        (with_parameter("request", "timeout", int64_param=-1), "timeout must be a whole"),
        (with_parameter("input", "shared_memory_region", string_param="x"), "shared memory"),
        (with_parameter("output", "shared_memory_region", string_param="x"), "shared memory"),
        (b"\x0a\x02\xff\xff", "no ModelInferRequest"),
        (b"\xff" * 99, "no protobuf"),
    ],
)
def test_what_does_not_fit_has_a_reason(
    call: Callable[[bytes], bytes], request_: Any, reason: str
) -> None:
    code, details = status_of(call, request_)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in details
    assert "\n" not in details


def test_what_is_not_there_is_told(addresses: tuple[str, str]) -> None:
    with grpc.insecure_channel(addresses[1]) as channel:
        unknown = message()
        unknown.model_name = "birds\n\x1b"
        code, details = status_of(channel.unary_unary(INFER), unknown)
        assert code == grpc.StatusCode.NOT_FOUND
        assert "'birds\\n\\x1b'; this server has 'advmoe', 'cats'" in details
        for name in ("ModelStreamInfer", "SystemSharedMemoryStatus", "TraceSetting"):
            stream = channel.stream_unary(f"/inference.GRPCInferenceService/{name}")
            code, details = status_of(lambda each, ask=stream: ask(iter([each])), b"")
            assert code == grpc.StatusCode.UNIMPLEMENTED
            assert "ModelInfer" in details
        long = status_of(channel.unary_unary(INFER), bytes(1 << 20))
        assert long[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        assert status_of(ready, bytes(5000))[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert status_of(ready, b"\x0a\x01\xff")[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(addresses: tuple[str, str]) -> None:
    with grpc.insecure_channel(addresses[1], compression=grpc.Compression.Gzip) as channel:
        code, _ = status_of(channel.unary_unary(INFER), bytes(200 << 20))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_whatever_the_bytes_nothing_worse_than_a_reason(call: Callable[[bytes], bytes]) -> None:
    chance, ends = random.Random(1), set()
    original = message().SerializeToString()
    for _ in range(400):
        damaged = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(40)] = chance.randrange(256)
        damaged = damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))]
        try:
            call(bytes(damaged))
        except grpc.RpcError as error:
            ends.add(error.code())
    assert ends == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert call(original)


def test_deadlines_that_pass_while_an_answer_is_sent_leave_no_traceback(
    call: Callable[..., Any],
) -> None:
    """The fixture counts what the server writes to stderr."""
    many = message(np.repeat(ONE, 50, axis=0)).SerializeToString()
    ends = Counter[str]()
    for _ in range(60):
        waits = np.random.default_rng(0).uniform(0.0005, 0.03, 16)
        for asked in [call.future(many, timeout=wait) for wait in waits]:
            error = asked.exception()
            ends[error.code().name if isinstance(error, grpc.RpcError) else "OK"] += 1
    assert ends.keys() <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    tiny_bundle: Bundle, addresses: tuple[str, str]
) -> None:
    port = addresses[1].split(":")[1]
    command = [*COMMAND[:-1], f"--grpc-port={port}", str(tiny_bundle.path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 5
    assert run.stderr.count("\n") == 1
    assert f"port {port} of 127.0.0.1 is in use; choose another --grpc-port" in run.stderr
