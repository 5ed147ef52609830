"""What only a process of its own can show: signals, purity of stdout, start-up, closed pipes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle

ADVMOE = [sys.executable, "-m", "advmoe_deploy.cli.app"]


def advmoe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ADVMOE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*ADVMOE, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_help_starts_without_the_heavy_imports(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from advmoe_deploy.cli.app import run\n"
        "code = run(['--help'])\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'fastapi', 'pyarrow', 'sklearn', 'numpy'}\n"
        "sys.exit(code or ' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_recipe_in_a_process(tmp_path: Path) -> None:
    done = advmoe("train", "zzz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "advmoe: error: unknown recipe 'zzz'; 'advmoe list recipes' names them"
    )
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_during_training_ends_with_130(tmp_path: Path) -> None:
    with started("train", "digits-advmoe", "--threads", "1", cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    going_on = "advmoe train digits-advmoe --threads 1 --resume"
    known = ("advmoe: error: interrupted", f"advmoe: error: interrupted; to go on: {going_on}")
    assert err.splitlines()[-1] == known[(tmp_path / "runs/digits-advmoe/checkpoints").is_dir()]
    assert "Traceback" not in err


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*ADVMOE, "doctor"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_ends_with_5_and_nothing_half_written(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "list.txt").write_text("missing.png\n" * 3000)
    limit = 100_000  # bytes per file: to a program, the same as a disk that fills up
    done = subprocess.run(
        [*ADVMOE, "predict", str(tiny_bundle.path), "--input", "list.txt", "--output", "a.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 5
    assert "file size limit" in done.stderr.splitlines()[-1]
    assert ".a.jsonl.partial.jsonl" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "a.jsonl").exists()


def url_of(process: subprocess.Popen[str]) -> str:
    """Return the address that a starting server says it is ready at."""
    assert process.stderr is not None
    line = process.stderr.readline()
    match = re.search(r"http://\S+:\d+", line)
    assert match, line + process.stderr.read()
    return match[0]


def test_sigterm_finishes_what_runs_and_exits_0(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with started("serve", str(tiny_bundle.path), "--port", "0", "--json", cwd=tmp_path) as process:
        url = url_of(process)
        images = np.full((512, 1, 8, 8), 0.5)
        tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
        body = json.dumps({"inputs": [{**tensor, "data": images.ravel().tolist()}]}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = (
                "POST /v2/models/advmoe/infer HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Length: {len(body)}"
            )
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["url"] == url


def test_ctrl_c_stops_the_server_with_130(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with started("serve", str(tiny_bundle.path), "--port", "0", cwd=tmp_path) as process:
        assert httpx.get(f"{url_of(process)}/v2/health/ready").status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped by Ctrl-C"
    assert "error" not in err
    takes = [(line.rpartition("/")[2], line.partition("http")[0]) for line in out.splitlines()]
    assert takes == [
        ("infer  # tensors", "POST "),
        ("image  # an image file", "POST "),
        ("  # a page to drop an image on", "GET "),
    ]


def test_ctrl_c_leaves_the_one_object_of_a_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with started("serve", str(tiny_bundle.path), "--port", "0", "--json", cwd=tmp_path) as process:
        url = url_of(process)
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[-1]) == (130, "stopped by Ctrl-C")
    assert json.loads(out)["url"] == url


def test_a_port_in_use_is_one_line_and_5(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = advmoe("serve", str(tiny_bundle.path), "--port", port, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        f"advmoe: error: port {port} of 127.0.0.1 is in use; choose another --port\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_target_is_the_machines_fault(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    tmp_path.chmod(0o500)
    files = ["--input", "a.png", "--output", "b.jsonl"]
    done = advmoe("predict", str(tiny_bundle.path), *files, cwd=tmp_path)
    tmp_path.chmod(0o700)
    assert done.returncode == 5
    assert "permission denied" in done.stderr


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is caught")
@pytest.mark.parametrize("after_s", [0.0, 0.4, 1.5])
def test_sigterm_while_it_starts_ends_well(
    tiny_bundle: Bundle, tmp_path: Path, after_s: float
) -> None:
    with started("serve", str(tiny_bundle.path), "--port", "0", cwd=tmp_path) as process:
        while not catches(process, signal.SIGTERM):
            time.sleep(0.001)
        time.sleep(after_s)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("advmoe", ["serve"], 0),
        ("advmoe", ["--debug", "serve"], 0),
        ("advmoe", ["predict", "serve"], -signal.SIGTERM),
        ("theirs.py", ["serve"], -signal.SIGTERM),
    ],
)
def test_sigterm_is_handled_from_the_first_import_on_by_a_server_alone(
    name: str, arguments: list[str], code: int
) -> None:
    program = (
        f"import sys\nsys.argv[0] = '/somewhere/{name}'\n"
        "import os, signal, advmoe_deploy.cli\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], timeout=60, check=False)
    assert done.returncode == code


@pytest.mark.parametrize(("name", "ours"), [("advmoe", True), ("notebook", False)])
def test_ctrl_c_is_handled_from_the_first_import_on_by_the_program_alone(
    name: str, ours: bool
) -> None:
    program = (
        f"import os, signal, sys\nsys.argv[0] = '/somewhere/{name}'\n"
        "import advmoe_deploy.cli\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.pause()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    if ours:
        assert (done.returncode, done.stderr) == (130, "advmoe: error: interrupted\n")
    else:
        assert "KeyboardInterrupt" in done.stderr


def test_ctrl_c_ends_with_its_code_though_nobody_can_be_told() -> None:
    program = (
        "import os, signal, sys\nsys.argv[0] = '/somewhere/advmoe'\n"
        "import advmoe_deploy.cli\n"
        "os.close(2)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 130


def test_a_second_ctrl_c_does_not_wait(tiny_bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["serve", str(tiny_bundle.path), "--port", "0", "--timeout", "600"]
    with started(*arguments, cwd=tmp_path) as process:
        host, port = url_of(process).removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n")  # keeps it from ending
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped by Ctrl-C"
    assert "Traceback" not in err


def test_two_servers_do_not_share_a_port(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with started("serve", str(tiny_bundle.path), "--port", "0", cwd=tmp_path) as process:
        port = url_of(process).rpartition(":")[2]
        done = advmoe("serve", str(tiny_bundle.path), "--port", port, cwd=tmp_path)
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1)
    assert "in use" in done.stderr
