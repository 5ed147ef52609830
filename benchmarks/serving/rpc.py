"""The same questions over gRPC: the runner's own logits, speed, and malformed messages."""

import asyncio
import random
import time
from collections import Counter
from functools import partial
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.grpc.wire import MAX_ENVELOPE
from advmoe_deploy.serving.online.protocol import served_model
from benchmarks.serving.client import HOST, Sample, probed, together
from benchmarks.serving.malformed import held
from benchmarks.serving.server import Running
from benchmarks.serving.speed import BATCH, images_of

INFER = "/inference.GRPCInferenceService/ModelInfer"
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))


def rpc(
    running: Running, bundle: Bundle, engine: str, seconds: float, count: int
) -> dict[str, Any]:
    """Return what holds over gRPC; statuses are gRPC's numbers, but for 200, which is OK."""
    one = message(running.model, images_of(bundle, 1)).SerializeToString()
    closed_loop(running, one, 4, min(2.0, seconds))
    return {
        "logits_differ_by": _difference(running, bundle, engine),
        "one_client": closed_loop(running, one, 1, seconds).summary(),
        "clients_32": closed_loop(running, one, BATCH, seconds).summary(),
        "malformed": malformed(running, one, count, longest_of(bundle)),
        "traceback": "Traceback" in running.said,
    }


def message(model: str, images: np.ndarray) -> Any:
    """Return a request."""
    request = service_pb2.ModelInferRequest(
        model_name=model, raw_input_contents=[images.astype("<f4").tobytes()]
    )
    request.inputs.add(name="images", datatype="FP32", shape=images.shape)
    return request


def closed_loop(running: Running, request: bytes, clients: int, seconds: float) -> Sample:
    """Let each of so many clients, a connection each, ask again as soon as it is answered."""

    async def one(sample: Sample, until: float) -> None:
        async with grpc.aio.insecure_channel(f"{HOST}:{running.grpc}", OPTIONS) as channel:
            ask = channel.unary_unary(INFER)
            while (began := time.perf_counter()) < until:
                try:
                    await ask(request)
                except grpc.RpcError as error:
                    sample.answers[error.code().value[0]] += 1
                    await asyncio.sleep(0.05)
                else:
                    sample.answers[200] += 1
                    sample.latencies_s.append(time.perf_counter() - began)

    return asyncio.run(together(one, clients, seconds))


def longest_of(bundle: Bundle) -> int:
    """Return the bytes of the longest message that a server of ``bundle`` takes.

    Longer ones are refused by gRPC's own library, before any code of ours sees them.
    """
    model = served_model(bundle)
    return min(model.limits.max_body, model.longest + MAX_ENVELOPE)


def malformed(running: Running, request: bytes, count: int, longest: int) -> dict[str, Any]:
    """Return what ``count`` damaged messages and the costly ones were answered."""
    chance, pid = random.Random(0), running.process.pid
    with grpc.insecure_channel(f"{HOST}:{running.grpc}", OPTIONS) as channel:
        ask = channel.unary_unary(INFER)
        with probed(running.port, pid) as seen:
            answers = Counter(_status(ask, _damaged(request, chance)) for _ in range(count))
        named = {str(status): number for status, number in sorted(answers.items())}
        result: dict[str, Any] = {"random": {"answers": named, **seen}}
        for name, costly in costly_messages(longest).items():
            for packed in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
                asked = partial(_status, ask, costly, packed)
                row = held(running.port, pid, len(costly), asked)
                row["holds"]["INVALID_ARGUMENT"] = row["status"] == INVALID
                result[name + " in gzip" * (packed == grpc.Compression.Gzip)] = row
    return result


def _difference(running: Running, bundle: Bundle, engine: str) -> float:
    images = images_of(bundle, 8)
    with open_runner(bundle, engine) as runner:
        expected = runner.infer(images).logits
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    with triton.InferenceServerClient(f"{HOST}:{running.grpc}") as client:
        answer = client.infer(running.model, [tensor]).as_numpy("logits")
    return float(np.abs(answer - expected).max())


def _damaged(request: bytes, chance: random.Random) -> bytes:
    """Return ``request`` with other bytes, more often where there are no pixels, or its begin."""
    damaged, head = bytearray(request), min(64, len(request))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(chance.choice((head, len(request))))
        damaged[place] = chance.randrange(256)
    return bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))])


def costly_messages(longest: int) -> dict[str, bytes]:
    """Return messages that grow to many times their size, or take long to walk through.

    None is longer than the ``longest`` that is read.
    """
    size = longest - 32  # for what lies around
    name, tensors, shape, contents = 1, 5, 3, 5  # numbers of fields
    return {
        "empty tensors": b"\x2a\x00" * (size // 2),
        "empty raw contents": b"\x3a\x00" * (size // 2),
        "parameters": b"\x22\x00" * (size // 2),
        "a long name": _field(name, b"x" * size),
        "a shape of many numbers": _field(tensors, _field(shape, bytes(size))),
        "numbers one by one": _field(
            tensors, _field(contents, b"\x35\x00\x00\x00\x3f" * (size // 5))
        ),
        "bytes of no protobuf": b"\xff" * size,
    }


def _field(number: int, content: bytes) -> bytes:
    """Return a field of protobuf that has bytes: its number, their length, and they."""
    length, varint = len(content), bytearray()
    while length > 127:
        varint.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *varint, length]) + content


def _status(
    ask: Any, request: bytes, packed: grpc.Compression = grpc.Compression.NoCompression
) -> int:
    try:
        ask(request, timeout=60, compression=packed)
    except grpc.RpcError as error:
        return int(error.code().value[0])
    return 200
