"""A server before it is ready, and connections that nobody uses."""

import socket
import subprocess
import sys
import threading

import httpx

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.serve import create_app
from advmoe_deploy.serving.online.server import Server
from tests.serving.online.live import (
    INFER,
    ONE,
    SlowRunner,
    request_for,
    served,
    wait_until_ready,
)


def test_ready_comes_after_the_warm_up_and_health_answers_meanwhile(tiny_bundle: Bundle) -> None:
    runner = SlowRunner()
    with served(tiny_bundle, runner) as address, httpx.Client(base_url=f"http://{address}") as http:
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/v2/health/ready").status_code == 503
        assert http.get("/v2/models/advmoe/ready").status_code == 503
        assert http.post(INFER, json=request_for(ONE)).status_code == 503
        runner.let_go.set()
        wait_until_ready(address)
        runner.let_go.clear()
        answers: list[int] = []
        url = f"http://{address}{INFER}"
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=request_for(ONE)).status_code)
        )
        waiting.start()
        assert http.get("/v2/health/ready").status_code == 200
        assert answers == []
        runner.let_go.set()
        waiting.join()
        assert answers == [200]


def test_idle_connections_are_kept_longer_than_proxies_keep_theirs(tiny_bundle: Bundle) -> None:
    app = create_app(tiny_bundle, SlowRunner())
    assert Server(app, Limits()).config.timeout_keep_alive == 75


def test_an_idle_connection_is_closed_when_its_time_is_over(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", str(tiny_bundle.path)]
    with subprocess.Popen([*command, "--port=0", "--keep-alive=0"], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        port = int(run.stdout.readline().split(b":")[2].split(b"/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while more := connection.recv(4096):  # ends when the server closes
                answer += more
        assert answer.endswith(b'{"live":true}')
        run.terminate()
