"""A server that other machines reach: TLS on both ports, and a token to show."""

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from tests.serving.online.access.certificates import write_certificate
from tests.serving.online.live import INFER, ONE, request_for

SECRET = "0123456789abcdef"
SHOWN = {"authorization": f"Bearer {SECRET}"}
COMMAND = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--grpc-port=0"]


@dataclass
class Remote:
    """A server on every address of this machine, reached on the loopback."""

    http: int
    grpc: int
    certificate: Path
    process: "subprocess.Popen[str]"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.http}"

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


@pytest.fixture(scope="module")
def remote(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("secrets")
    certificate, key = write_certificate(folder)
    token = folder / "token"
    token.write_text(SECRET)
    token.chmod(0o600)
    options = ["--host=0.0.0.0", f"--token-file={token}", f"--tls-cert={certificate}"]
    with subprocess.Popen(
        [*COMMAND, *options, f"--tls-key={key}", "--drain=0", str(tiny_bundle.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        http, rpc = (process.stdout.readline().split()[1] for _ in range(2))
        assert http.startswith("https://0.0.0.0:")
        ports = int(http.split(":")[2].split("/")[0]), int(rpc.rpartition(":")[2])
        yield Remote(*ports, certificate, process)
        if process.poll() is None:
            process.kill()


def test_who_shows_the_token_gets_answers(remote: Remote, tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle) as runner:
        expected = runner.infer(ONE).logits
    with httpx.Client(verify=remote.context, headers=SHOWN) as http:
        answer = http.post(remote.url + INFER, json=request_for(ONE)).json()
        data = next(each["data"] for each in answer["outputs"] if each["name"] == "logits")
        np.testing.assert_array_equal(np.array(data, np.float32), expected[0])
        assert http.get(remote.url + "/metrics").status_code == 200
    with triton.InferenceServerClient(
        f"127.0.0.1:{remote.grpc}", ssl=True, root_certificates=str(remote.certificate)
    ) as client:
        tensor = triton.InferInput("images", list(ONE.shape), "FP32")
        tensor.set_data_from_numpy(ONE)
        answer = client.infer("advmoe", [tensor], headers=SHOWN)
        np.testing.assert_array_equal(answer.as_numpy("logits"), expected)
        assert client.is_model_ready("advmoe", headers=SHOWN)


@pytest.mark.parametrize("shown", [None, "", f"Bearer {SECRET}x", f"Basic {SECRET}"])
def test_others_learn_that_the_server_lives_and_nothing_else(
    remote: Remote, shown: str | None
) -> None:
    headers = {} if shown is None else {"authorization": shown}
    with httpx.Client(verify=remote.context, headers=headers) as http:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert http.get(remote.url + path).status_code == 200
        answers = [http.get(remote.url + path) for path in ("/v2", "/metrics", "/v2/models/advmoe")]
        answers.append(http.post(remote.url + INFER, json=request_for(ONE)))
        for answer in answers:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert "Authorization: Bearer TOKEN" in answer.json()["error"]
    credentials = grpc.ssl_channel_credentials(remote.certificate.read_bytes())
    service = "/inference.GRPCInferenceService"
    with grpc.secure_channel(f"127.0.0.1:{remote.grpc}", credentials) as channel:
        metadata = tuple(headers.items())
        for name in ("ServerLive", "ServerReady"):
            assert channel.unary_unary(f"{service}/{name}")(b"", metadata=metadata) == b"\x08\x01"
        for name in ("ModelInfer", "ServerMetadata", "ModelStreamInfer", "RepositoryModelLoad"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"{service}/{name}")(b"", metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_without_tls_there_is_no_answer(remote: Remote) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{remote.http}/v2/health/live")
    with grpc.insecure_channel(f"127.0.0.1:{remote.grpc}") as channel:
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        with pytest.raises(grpc.RpcError) as caught:
            live(b"", timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with httpx.Client(verify=remote.context) as http:
        assert http.get(remote.url + "/v2/health/live").status_code == 200


def test_the_end_waits_for_no_handshake_and_writes_nothing(remote: Remote) -> None:
    """The last test of this server: two clients keep connections, one of them without TLS."""
    with (
        httpx.Client(verify=remote.context) as http,
        socket.create_connection(("127.0.0.1", remote.http)) as silent,
    ):
        assert http.get(remote.url + "/v2/health/live").status_code == 200
        remote.process.terminate()
        _, noise = remote.process.communicate(timeout=60)
        assert silent.recv(1) == b""
    assert remote.process.returncode == 0
    assert noise.count("\n") == 1, noise
