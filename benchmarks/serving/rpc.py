"""The same questions over gRPC: the runner's own logits, speed, and malformed messages."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from benchmarks.serving.client import HOST, Sample, memory_of, probed
from benchmarks.serving.server import Running
from benchmarks.serving.speed import BATCH, images_of

INFER = "/inference.GRPCInferenceService/ModelInfer"
MIB = 1 << 20
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
        "malformed": malformed(running, one, count),
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

    async def run() -> Sample:
        sample, began = Sample(), time.perf_counter()
        await asyncio.gather(*(one(sample, began + seconds) for _ in range(clients)))
        sample.seconds = time.perf_counter() - began
        return sample

    return asyncio.run(run())


def malformed(running: Running, request: bytes, count: int) -> dict[str, Any]:
    """Return what ``count`` damaged messages and the costly ones were answered."""
    chance, pid = random.Random(0), running.process.pid
    with grpc.insecure_channel(f"{HOST}:{running.grpc}", OPTIONS) as channel:
        ask = channel.unary_unary(INFER)
        with probed(running.port, pid) as seen:
            answers = Counter(_status(ask, _damaged(request, chance)) for _ in range(count))
        named = {str(status): number for status, number in sorted(answers.items())}
        result: dict[str, Any] = {"random": {"answers": named, **seen}}
        for name, costly in _costly().items():
            before, began = memory_of(pid), time.perf_counter()
            with probed(running.port, pid) as seen:
                status = _status(ask, costly)
            result[name] = {
                "mib": round(len(costly) / MIB, 2),
                "status": status,
                "seconds": round(time.perf_counter() - began, 3),
                **seen,
                "more_memory_mib": round(seen["memory_mib"] - before / 1024, 1),
            }
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


def _costly() -> dict[str, bytes]:
    """Return messages that grow to many times their size, or take long to walk through."""
    size = 8 * MIB
    varint = b"\x80\x80\x80\x04"  # 8 MiB
    inside = b"\x2a" + varint
    return {
        "empty tensors": b"\x2a\x00" * (size // 2),
        "empty raw contents": b"\x3a\x00" * (size // 2),
        "parameters": b"\x22\x00" * (size // 2),
        "a long name": b"\x0a" + varint + b"x" * size,
        "a shape of many numbers": inside + b"\x1a" + varint + bytes(size),
        "numbers one by one": inside + b"\x35\x00\x00\x00\x3f" * (size // 5),
        "bytes of no protobuf": b"\xff" * size,
    }


def _status(ask: Any, request: bytes) -> int:
    try:
        ask(request, timeout=60)
    except grpc.RpcError as error:
        return int(error.code().value[0])
    return 200
