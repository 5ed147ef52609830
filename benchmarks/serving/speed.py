"""How fast the server answers, against the runner alone in the same engine."""

import json
import statistics
import subprocess
import time
from typing import Any

import numpy as np
import tritonclient.http as triton

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from benchmarks.serving.client import (
    Times,
    binary_request,
    closed_loop,
    evenly,
    open_loop,
    randomly,
)
from benchmarks.serving.server import Running

BATCH = 32


def images_of(bundle: Bundle, count: int) -> np.ndarray:
    """Return golden images, repeated."""
    with np.load(bundle.file("golden.npz")) as golden:
        images = golden["images"]
    return np.resize(images, (count, *images.shape[1:]))


def bare(bundle: Bundle, engine: str, threads: int, seconds: float) -> dict[str, float]:
    """Return the runner's own median time of one image, and its pace at batch 32."""
    result = {}
    with open_runner(bundle, engine, threads=threads) as runner:
        for batch in (1, BATCH):
            images, times = images_of(bundle, batch), list[float]()
            runner.infer(images)
            until = time.perf_counter() + seconds
            while time.perf_counter() < until or len(times) < 5:
                began = time.perf_counter()
                runner.infer(images)
                times.append(time.perf_counter() - began)
            result[f"batch_{batch}_ms"] = 1e3 * statistics.median(times)
    return result | {"images_per_s": 1e3 * BATCH / result[f"batch_{BATCH}_ms"]}


def same_logits(running: Running, bundle: Bundle, engine: str) -> dict[str, float]:
    """Return how far the answers that tritonclient and curl get are from the runner's."""
    images = images_of(bundle, 8)
    with open_runner(bundle, engine) as runner:
        expected = runner.infer(images).logits
    client = triton.InferenceServerClient(f"127.0.0.1:{running.port}")
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    answer = client.infer(running.model, [tensor]).as_numpy("logits")
    client.close()
    request = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    return {
        "tritonclient": float(np.abs(answer - expected).max()),
        "curl": float(np.abs(_by_curl(running, request, images) - expected).max()),
    }


def _by_curl(running: Running, request: dict[str, Any], images: np.ndarray) -> np.ndarray:
    body = {"inputs": [{**request, "data": images.ravel().tolist()}]}
    url = f"http://127.0.0.1:{running.port}/v2/models/{running.model}/infer"
    command = ["curl", "--silent", "--fail", url, "--data-binary", "@-"]
    said = subprocess.run(command, input=json.dumps(body).encode(), capture_output=True, check=True)
    (logits,) = (o for o in json.loads(said.stdout)["outputs"] if o["name"] == "logits")
    return np.reshape(logits["data"], logits["shape"])


def speed(
    running: Running, bundle: Bundle, alone: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Return latency of one client, throughput of 32, latency at half load, and the targets.

    Half the load comes at even intervals, and at random times.
    """
    request = binary_request(running.model, images_of(bundle, 1))
    closed_loop(running.port, request, 4, min(2.0, seconds))
    one = closed_loop(running.port, request, 1, seconds).summary()
    many = closed_loop(running.port, request, BATCH, seconds).summary()
    load = max(1.0, many["per_s"] / 2)
    even, random = (
        at_times(running, request, times(load, seconds), alone) for times in (evenly, randomly)
    )
    allowed_ms = 3 * alone["batch_1_ms"] + running.delay_ms
    return {
        "one_client": one,
        "clients_32": many,
        "half_load": even,
        "half_load_at_random": random,
        "over_bare_ms": one["p50_ms"] - alone["batch_1_ms"],
        "share_of_bare": many["per_s"] / alone["images_per_s"],
        "holds": {
            "p50 <= bare + 1.5 ms": one["p50_ms"] <= alone["batch_1_ms"] + 1.5,
            "throughput >= 85 %": many["per_s"] >= 0.85 * alone["images_per_s"],
            "p99 at half load <= 3 x one image + delay": even["p99_ms"] <= allowed_ms,
            "the same at random times": random["p99_ms"] <= allowed_ms,
        },
    }


def at_times(
    running: Running, request: bytes, times: Times, alone: dict[str, float]
) -> dict[str, Any]:
    """Return what came of requests of one image at ``times``, and the runner's own p99 at them."""
    before = counted(running)
    found = open_loop(running.port, request, times).summary()
    found |= batches_between(before, counted(running))
    return {**found, "p99_of_the_runner_alone_ms": queued_p99_ms(times, alone["batch_1_ms"])}


def queued_p99_ms(times: Times, one_ms: float) -> float:
    """Return the 99th percentile of waiting and being answered, one image after the other.

    No server in front of a runner that takes ``one_ms`` for an image has less, unless images cost
    less together.
    """
    free, answered = 0.0, list[float]()
    for at in times:
        free = max(at, free) + 1e-3 * one_ms
        answered.append(free - at)
    return round(1e3 * float(np.percentile(answered or [np.nan], 99)), 3)


def counted(running: Running) -> dict[str, int]:
    """Return what the server has counted: images, batches, requests, nanoseconds of their batches.

    The time of a batch counts for each request that had images in it.
    """
    with triton.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        (stats,) = client.get_inference_statistics(running.model)["model_stats"]
    compute = stats["inference_stats"]["compute_infer"]
    return {
        "images": stats["inference_count"],
        "batches": stats["execution_count"],
        "requests": compute["count"],
        "compute_ns": compute["ns"],
    }


def batches_between(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Return the mean batch, and the mean time that a request's batches took, as the server has it.

    A request is held against what is computed together with it, which at half load is little.
    """
    more = {name: after[name] - before[name] for name in after}
    return {
        "mean_batch": round(more["images"] / max(1, more["batches"]), 3),
        "mean_compute_ms": round(1e-6 * more["compute_ns"] / max(1, more["requests"]), 3),
    }
