"""The application on a real Ray Serve on the loopback: answers, scaling, overload, damage."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from tests.families import Families
from tests.serving.processes import children

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None
        or importlib.util.find_spec("watchfiles") is None  # of the packages that Serve needs
        or sys.platform != "linux",
        reason="Ray Serve is not installed (extra 'ray')",
    ),
]
DRIVER = Path(__file__).parent / "driver.py"
IMAGES = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
INFER = "/v2/models/advmoe/infer"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def deployed(bundle: Path, settings: dict[str, Any], *damaged: Path) -> Iterator[tuple[str, Any]]:
    """Deploy, and yield the address and what the driver said, a line each."""
    port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(  # of a short name, for Ray's sockets lie in it
        prefix="advmoe-rs-", ignore_cleanup_errors=True
    ) as folder:
        words = (DRIVER, bundle, port, grpc_port, folder, json.dumps(settings), *damaged)
        with driving(Path(folder), [str(word) for word in words]) as driver:
            lines = []
            while "status" not in (lines[-1] if lines else {}):
                assert driver.stdout is not None
                line = driver.stdout.readline()
                assert line, (Path(folder) / "driver.log").read_text()[-3000:]
                if line.startswith("{"):
                    lines.append(json.loads(line))
            also = {"pid": driver.pid, "grpc": f"127.0.0.1:{grpc_port}"}
            yield f"127.0.0.1:{port}", [*lines, also]


@contextlib.contextmanager
def driving(folder: Path, words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Yield the driver, whose files are in ``folder``; whatever happens, it ends with the block."""
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "HOME": str(folder),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("RAY_ADDRESS", None)
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, env=environment, cwd=folder,
        )  # fmt: skip
        try:
            yield driver
        finally:
            try:
                driver.communicate(timeout=120)
            finally:
                driver.kill()


BY_GRPC = """
import json, sys, numpy as np, tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException
images = np.array(json.loads(sys.stdin.read()), np.float32)
client, found = grpc.InferenceServerClient(sys.argv[1]), {}
def asked(model, images):
    given = grpc.InferInput("images", images.shape, "FP32")
    given.set_data_from_numpy(images)
    try:
        return client.infer(model, [given]).as_numpy("logits").tolist()
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
found["answer"] = asked("advmoe", images)
found["unknown"] = asked("dogs", images)
found["flat"] = asked("advmoe", images.reshape(len(images), -1))
if "answer" in sys.argv[2:]:
    assert client.is_server_ready() and client.is_model_ready("advmoe")
    assert client.get_model_metadata("advmoe").inputs[0].shape == [-1, 1, 8, 8]
    assert client.get_model_config("advmoe").config.max_batch_size == 64
print(json.dumps(found))
"""


def by_grpc(address: str, images: np.ndarray[Any, Any], *words: str) -> dict[str, Any]:
    """Return what NVIDIA's client is answered to good and bad requests."""
    return told(BY_GRPC, images, address, *words)


def told(code: str, images: np.ndarray[Any, Any], *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        input=json.dumps(images.tolist()), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_client(address: str, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return logits and ids as NVIDIA's client gets them, binary and as JSON."""
    code = (
        "import json, sys, numpy as np, tritonclient.http as http\n"
        "images = np.array(json.loads(sys.stdin.read()), np.float32)\n"
        "client, found = http.InferenceServerClient(sys.argv[1]), {}\n"
        "assert client.is_server_ready() and client.is_model_ready('advmoe')\n"
        "assert client.get_model_metadata('advmoe')['inputs'][0]['shape'] == [-1, 1, 8, 8]\n"
        "for binary in (True, False):\n"
        "    given = http.InferInput('images', images.shape, 'FP32')\n"
        "    given.set_data_from_numpy(images, binary_data=binary)\n"
        "    answer = client.infer('advmoe', [given])\n"
        "    found[str(binary)] = answer.as_numpy('logits').tolist()\n"
        "    found['ids'] = answer.as_numpy('router.expert_ids').tolist()\n"
        "print(json.dumps(found))\n"
    )
    return told(code, images, address)


def request_for(images: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    return {"inputs": [tensor | {"data": images.ravel().tolist()} | changes]}


def test_it_answers_what_the_runner_answers(tiny_bundle: Bundle) -> None:
    settings = {
        "batch": 4,
        "at_once": 8,
        "queue": 64,
        "insecure": True,
        "deployments": {"router.expert-0": {"num_replicas": 2}},
    }
    with deployed(tiny_bundle.path, settings) as (address, said):
        assert "unknown deployment 'rooter'" in said[0]["refused"]
        assert "options of deployment 'router'" in said[1]["refused"]
        assert said[-2]["status"] == "RUNNING"
        assert said[-2]["replicas"] == {
            "server": {"RUNNING": 1},
            "router": {"RUNNING": 1},
            "router.expert-0": {"RUNNING": 2},
            "router.expert-1": {"RUNNING": 1},
        }
        with open_runner(tiny_bundle, "onnxruntime-plan", threads=1) as runner:
            for count in (1, 2, 9):
                expected = runner.infer(IMAGES[:count])
                found = by_client(address, IMAGES[:count])
                for kind in ("True", "False"):
                    np.testing.assert_allclose(found[kind], expected.logits, atol=1e-6)
                np.testing.assert_array_equal(found["ids"], expected.expert_ids["router"])
                over_grpc = by_grpc(said[-1]["grpc"], IMAGES[:count], "answer")
                np.testing.assert_allclose(over_grpc["answer"], expected.logits, atol=1e-6)
        assert over_grpc["unknown"].startswith("StatusCode.NOT_FOUND unknown model 'dogs'")
        assert over_grpc["flat"].startswith("StatusCode.INVALID_ARGUMENT images has shape [9, 64]")
        refused(f"http://{address}")
        overloaded(f"http://{address}")
        killed(f"http://{address}", said[-1]["pid"])


def overloaded(url: str) -> None:
    """Check the answers to more than the queue holds, and that all is well afterwards."""
    body = json.dumps(request_for(np.resize(IMAGES, (60, 1, 8, 8))))

    def asked(_: int) -> httpx.Response:
        return httpx.post(url + INFER, content=body, timeout=60)

    with ThreadPoolExecutor(16) as threads:
        answers = [*threads.map(asked, range(32))]
    assert {each.status_code for each in answers} == {200, 503}
    assert all("retry-after" in each.headers for each in answers if each.status_code == 503)
    assert asked(0).status_code == 200


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def killed(url: str, driver: int) -> None:
    """Check that requests are refused or answered while an expert is gone, and it comes back."""
    (pid,) = [pid for pid in children(driver) if b"router.expert-1" in command_of(pid)]
    body = json.dumps(request_for(IMAGES))

    def asked(number: int) -> httpx.Response:
        if number == 100:
            os.kill(pid, signal.SIGKILL)  # it may have rows
        return httpx.post(url + INFER, content=body, timeout=60)

    before = asked(0).json()
    with ThreadPoolExecutor(6) as threads:  # as many as the queue has room for
        answers = [*threads.map(asked, range(200))]
    assert {each.status_code for each in answers} <= {200, 503}
    assert next(a for a in map(asked, [0] * 1000) if a.status_code != 503).json() == before


@pytest.mark.parametrize("family", ["token experts"])
def test_experts_of_tokens_answer_as_well(families: Families, family: str) -> None:
    _, bundle = families[family]
    address_of = f"/v2/models/{bundle.manifest.model.family}/infer"
    with deployed(bundle.path, {"batch": 4}) as (address, said):
        assert said[-2]["status"] == "RUNNING"
        for answer in by_grpc(said[-1]["grpc"], IMAGES).values():  # nobody said who may come
            assert answer.startswith("StatusCode.UNAUTHENTICATED Ray's port is open")
        with open_runner(bundle, "onnxruntime-plan", threads=1) as runner:
            for count in (1, 9):
                expected = runner.infer(IMAGES[:count])
                body = request_for(IMAGES[:count])
                answer = httpx.post(f"http://{address}{address_of}", json=body, timeout=60).json()
                found = {o["name"]: np.reshape(o["data"], o["shape"]) for o in answer["outputs"]}
                np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5)
                for layer, ids in expected.expert_ids.items():
                    np.testing.assert_array_equal(found[f"{layer}.expert_ids"], ids)


def refused(url: str) -> None:
    """Check the answers to what cannot be answered."""
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/v2/health/ready").status_code == 200
        flat = client.post(INFER, json=request_for(IMAGES[:1], shape=[1, 64]))
        assert (flat.status_code, flat.json()["error"].count("\n")) == (400, 0)
        unknown = client.post("/v2/models/dogs/infer", json=request_for(IMAGES[:1]))
        assert (unknown.status_code, unknown.json()["error"]) == (
            404,
            "unknown model 'dogs'; this server has 'advmoe'",
        )
        many = client.post(INFER, json=request_for(np.zeros((65, 1, 8, 8), np.float32)))
        assert many.status_code == 400
        elsewhere = client.post(
            INFER, json=request_for(IMAGES[:1]), headers={"host": "example.org"}
        )
        assert elsewhere.status_code == 421
        # A request whose time is over before its turn comes.
        late = request_for(IMAGES) | {"parameters": {"timeout": 1}}
        overloaded = client.post(INFER, json=late)
        assert overloaded.status_code == 503
        assert int(overloaded.headers["retry-after"]) >= 1
        assert client.post(INFER, json=request_for(IMAGES)).status_code == 200


def test_a_bundle_that_changed_is_never_healthy(tiny_bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "b"
    shutil.copytree(tiny_bundle.path, place)
    file = Bundle(place, tiny_bundle.manifest).file(tiny_bundle.manifest.plan.segments[-1].file)
    with deployed(place, {}, file) as (address, said):
        assert "failed" in said[-3]
        assert said[-2]["status"] == "DEPLOY_FAILED"
        assert any("SHA-256 differs" in message for message in said[-2]["messages"])
        assert not any("RUNNING" in states for states in said[-2]["replicas"].values())
        with contextlib.suppress(httpx.TimeoutException):  # or Ray lets requests wait for replicas
            assert httpx.get(f"http://{address}/v2/health/ready", timeout=2).status_code >= 400
