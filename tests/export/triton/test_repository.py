"""Model repositories for Triton: what is in one, and what a real Triton answers of it."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError
from advmoe_deploy.export.triton.repository import write_repository
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.select import open_runner
from tests.families import Families

# The interpreter of an environment with nvidia-pytriton, whose wheel brings a Triton; it needs an
# older NumPy than ours. The package, onnxruntime and pydantic have to be there as well.
TRITON = os.environ.get("ADVMOE_TRITON_PYTHON", "")
SHAPES = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)


def configs_of(repository: Path) -> dict[str, Any]:
    """Return by model what its configuration says, read by the schema of Triton's own client."""
    code = (
        "import json, pathlib, sys\n"
        "from google.protobuf import json_format, text_format\n"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
        "def read(file):\n"
        "    config = text_format.Parse(file.read_text(), ModelConfig())\n"
        "    return json_format.MessageToDict(config, preserving_proto_field_name=True)\n"
        "files = pathlib.Path(sys.argv[1]).glob('*/config.pbtxt')\n"
        "print(json.dumps({file.parent.name: read(file) for file in files}))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, repository]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    )
    return found


def names(ends: list[dict[str, Any]]) -> list[str]:
    return [end["name"] for end in ends]


@pytest.fixture(scope="module")
def repository(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    assert run(["export", str(tiny_bundle.path), "--format", "triton", "--out", str(out)]) == 0
    return out


def test_every_file_has_its_hash(repository: Path) -> None:
    lines = (repository / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {f.relative_to(repository).as_posix(): f for f in repository.rglob("*") if f.is_file()}
    assert listed.keys() == files.keys() - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest


def test_graphs_and_configurations_agree(repository: Path) -> None:
    configs = configs_of(repository)
    experts = ["advmoe.router.expert-0", "advmoe.router.expert-1"]
    assert sorted(configs) == ["advmoe", "advmoe-pathways", "advmoe.router", *experts]
    for model, config in configs.items():
        assert config["name"] == model
        if config["backend"] != "python":
            graph = onnx.load_model(repository / model / "1" / "model.onnx").graph
            assert names(config["input"]) == [end.name for end in graph.input]
            assert {*names(config["output"])} <= {end.name for end in graph.output}
            assert [sample["batch_size"] for sample in config["model_warmup"]] == [1, 64]
    assert names(configs_of(repository)["advmoe"]["output"])[0] == "logits"


@pytest.mark.skipif(find_custom_ops().library is None, reason="no C compiler")
def test_the_library_of_operators_is_named_where_the_server_sees_it(repository: Path) -> None:
    (library,) = (repository / "advmoe" / "1").glob("advmoe_ops.*")
    named = configs_of(repository)["advmoe"]["model_operations"]["op_library_filename"]
    assert named == [f"/models/advmoe/1/{library.name}"]


def test_a_gpu_runs_the_operators_as_bodies(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_repository(tiny_bundle, tmp_path / "m", device="gpu", max_batch=8)
    config = configs_of(tmp_path / "m")["advmoe"]
    assert config["instance_group"][0]["kind"] == "KIND_GPU"
    assert config["max_batch_size"] == 8
    assert "model_operations" not in config
    assert not list((tmp_path / "m").rglob("advmoe_ops.*"))


def test_rows_of_tokens_are_no_batch_but_an_expert_s(families: Families, tmp_path: Path) -> None:
    _, bundle = families["token experts"]
    write_repository(bundle, tmp_path / "m", max_batch=8)
    plan, family = bundle.manifest.plan, bundle.manifest.model.family
    configs = configs_of(tmp_path / "m")
    for segment in plan.segments:
        first = {end.shape[0] for end in (*segment.inputs, *segment.outputs)}
        most = configs[f"{family}.{segment.name}"].get("max_batch_size", 0)
        assert most == (8 if first == {"N"} else 8 * 4 if first == {"R"} else 0)


def test_what_is_wrong_is_said(
    tiny_bundle: Bundle, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = str(tiny_bundle.path), tmp_path / "m"

    def complaint(*words: str) -> str:
        code = run(["export", *words])
        said = capsys.readouterr().err.strip().splitlines()
        assert not out.exists()
        return f"{code} {said[-1]}"

    options = ["--format", "triton", "--out", str(out)]
    assert "no absolute path" in complaint(bundle, *options, "--mount", "models")
    assert complaint(str(tiny_run), *options).startswith("3 ")
    assert "goes with --format triton alone" in complaint(
        str(tiny_run), "--format", "onnx", "--out", str(out), "--mount", "/models"
    )
    assert "--precision does not go" in complaint(bundle, *options, "--precision", "fp16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").touch()
    words = [bundle, "--format", "triton", "--out", str(tmp_path / "other"), "--overwrite"]
    assert "not replaced" in complaint(*words)
    assert (tmp_path / "other" / "thesis").exists()


@pytest.mark.parametrize("name", ["x/../../../out", "..", "a b", "é", "a\n"])
def test_a_segment_is_called_as_a_folder_can_be(tiny_bundle: Bundle, name: str) -> None:
    segment = tiny_bundle.manifest.plan.segments[0]
    with pytest.raises(ValidationError, match="String should match pattern"):
        type(segment).model_validate(segment.model_dump() | {"name": name})


def test_what_changed_after_it_was_hashed_is_not_copied(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    moved = Bundle(tmp_path / "b", tiny_bundle.manifest)
    file = moved.file(moved.manifest.plan.segments[-1].file)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(BundleError, match="SHA-256 differs"):
        write_repository(moved, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="ADVMOE_TRITON_PYTHON names no interpreter with a Triton")
@pytest.mark.parametrize("family", ["conv experts", "block experts", "token experts"])
def test_triton_answers_what_the_runner_answers(
    families: Families, family: str, tmp_path: Path
) -> None:
    _, bundle = families[family]
    repository = tmp_path / "models"
    models = write_repository(bundle, repository, mount=str(repository))
    with open_runner(bundle, threads=1) as runner, triton(repository, tmp_path) as url:
        for name in models[:2]:
            for count in (1, 2, 9):
                images = SHAPES[:count]
                expected, answer = runner.infer(images), asked(url, name, images)
                np.testing.assert_allclose(answer["logits"], expected.logits, atol=1e-5)
                for layer, ids in expected.expert_ids.items():
                    np.testing.assert_array_equal(answer[f"{layer}.expert_ids"], ids)


@contextmanager
def triton(repository: Path, folder: Path) -> Iterator[str]:
    """Run a real Triton on a port of loopback until the block ends."""
    site = Path(
        subprocess.run(
            [TRITON, "-c", "import pytriton; print(pytriton.__path__[0])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    server, backends = site / "tritonserver", folder / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    shutil.copy(next(server.glob("python_backend_stubs/3.11/*")), backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(
        Path(__file__).parent / "onnxruntime_backend.py", backends / "onnxruntime" / "model.py"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    libraries = str(site.parent / "nvidia_pytriton.libs")
    environment = os.environ | {
        "LD_LIBRARY_PATH": libraries,
        "PATH": f"{Path(TRITON).parent}:{os.environ['PATH']}",
    }
    options = [f"--model-repository={repository}", f"--backend-directory={backends}"]
    options += ["--http-address=127.0.0.1", f"--http-port={port}"]
    options += ["--allow-grpc=false", "--allow-metrics=false"]
    log = folder / "triton.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [server / "bin" / "tritonserver", *options], env=environment, stdout=out, stderr=out
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            with urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except (URLError, OSError):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def asked(url: str, model: str, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return a model's outputs by name, as JSON has them."""
    tensor = {"name": "images", "shape": images.shape, "datatype": "FP32"}
    body = json.dumps({"inputs": [tensor | {"data": images.ravel().tolist()}]}).encode()
    with urlopen(Request(f"{url}/v2/models/{model}/infer", body), timeout=60) as response:
        outputs = json.load(response)["outputs"]
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in outputs}
