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
from benchmarks.serving.client import binary_request, closed_loop, open_loop
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
    """Return latency of one client, throughput of 32, latency at half load, and the targets."""
    request = binary_request(running.model, images_of(bundle, 1))
    closed_loop(running.port, request, 4, min(2.0, seconds))
    one = closed_loop(running.port, request, 1, seconds).summary()
    many = closed_loop(running.port, request, BATCH, seconds).summary()
    half = open_loop(running.port, request, max(1.0, many["per_s"] / 2), seconds).summary()
    return {
        "one_client": one,
        "clients_32": many,
        "half_load": half,
        "over_bare_ms": one["p50_ms"] - alone["batch_1_ms"],
        "share_of_bare": many["per_s"] / alone["images_per_s"],
        "holds": {
            "p50 <= bare + 1.5 ms": one["p50_ms"] <= alone["batch_1_ms"] + 1.5,
            "throughput >= 85 %": many["per_s"] >= 0.85 * alone["images_per_s"],
            "p99 at half load": half["p99_ms"] <= 3 * alone[f"batch_{BATCH}_ms"] + running.delay_ms,
        },
    }
