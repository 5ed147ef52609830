"""What our processes leave behind, whom they ask, and how many threads they use."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.process import (
    default_threads,
    quota_cpus,
    step_back,
    usable_cpus,
    without_telemetry,
)
from tests.models.upstream.test_upstream import TINY as RELEASED
from tests.models.upstream.test_upstream import model_of, released_of, write_released

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc are Linux's")

# Between any library, C++ ones included, and libc: notes the name or the port, then goes on.
LISTENER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static void note(const char *what, const char *name, int port) {
    FILE *log = fopen(getenv("LOOKUPS"), "a");
    fprintf(log, "%s %s %d\n", what, name ? name : "-", port);
    fclose(log);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    note("lookup", name, 0);
    return real(name, service, hints, found);
}

int connect(int socket, const struct sockaddr *to, socklen_t size) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    if (to->sa_family == AF_INET || to->sa_family == AF_INET6)
        note("connect", "", ntohs(((const struct sockaddr_in *)to)->sin_port));
    return real(socket, to, size);
}
"""


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for LD_PRELOAD that writes every lookup and connection to the file LOOKUPS."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("listener")
    (folder / "listener.c").write_text(LISTENER)
    library = folder / "listener.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "listener.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def run_python(arguments: list[str], cwd: Path, **environment: str) -> str:
    """Run python with ``arguments`` and nothing in its environment but what it needs."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
def test_the_listener_hears_native_lookups(listener: Path, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    program = (
        "import ctypes, socket\n"
        "found = ctypes.c_void_p()\n"
        "ctypes.CDLL(None).getaddrinfo(b'localhost', None, None, ctypes.byref(found))\n"
        "socket.socket().connect_ex(('127.0.0.1', 9))\n"
    )
    run_python(["-c", program], tmp_path, LD_PRELOAD=str(listener), LOOKUPS=str(heard))
    assert heard.read_text().splitlines() == ["lookup localhost 0", "connect  9"]


# One process for all of these, as nobody starts it, for libraries take seconds to load.
COMMANDS = """
import json, sys
from pathlib import Path
from advmoe_deploy.cli.app import run
heard, home = map(Path, sys.argv[1:3])
for command in json.loads(sys.argv[3]):
    assert run(command) == 0, command
    assert not heard.exists(), f"{command[0]}: {heard.read_text()}"
    left = {file.relative_to(home).parts[:2] for file in home.rglob("*") if file.is_file()}
    assert left <= {(".cache", "advmoe-deploy")}, f"{command[0]}: {left}"
"""


def leaves_nothing(arguments: list[str], listener: Path, heard: Path, home: Path) -> None:
    """Run python with ``arguments``, and look at whom it asked and what is left in ``home``."""
    home.mkdir()
    run_python(arguments, home.parent, HOME=str(home), LD_PRELOAD=str(listener), LOOKUPS=str(heard))
    assert not heard.exists(), heard.read_text()
    left = {file.relative_to(home).parts[:2] for file in home.rglob("*") if file.is_file()}
    assert left <= {(".cache", "advmoe-deploy")}, left


@LINUX
def test_no_command_leaves_an_id_or_looks_up_a_name(
    tiny_bundle: Bundle, listener: Path, tmp_path: Path
) -> None:
    """Commands of seconds: not analyze, benchmark, demo, gate, serve and sweep, nor a hub's."""
    home, heard = tmp_path / "home", tmp_path / "heard"
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    write_released(tmp_path / "best.pth", *released_of(model_of(RELEASED)))
    bundle = str(tiny_bundle.path)
    commands = (
        ["list"],
        ["show", "digits-advmoe"],
        ["train", "digits-advmoe", "--out", "run", "--dry-run"],
        ["inspect", bundle],
        ["import", "best.pth", "--from", "advmoe", "--set", "image_size=16", "--out", "imported"],
        ["export", bundle, "--format", "triton", "--out", "repository"],
        ["predict", bundle, "--input", "black.png", "--output", "a.parquet"],
        ["profile", bundle, "--batch", "1", "--against", "", "--html", "page.html"],
        ["doctor"],
        ["verify", bundle, "--images", "2", "--engine", "openvino", "--allow-fragile"],
        ["eval", bundle, "--images", "2"],
        ["report", bundle, "--images", "2", "--allow-fragile", "--no-card", "--out", "report"],
    )
    program = ["-c", COMMANDS, str(heard), str(home), json.dumps(commands)]
    leaves_nothing(program, listener, heard, home)


SMALL = [
    *("--set", "model.width=8", "--set", "model.router_width=4", "--set", "epochs=1"),
    *("--set", "train_images=80", "--set", "test_images=20"),
    *("--set", "holdout_attack_steps=1", "--set", "test_attack_steps=1"),
]


@LINUX
@pytest.mark.parametrize(
    "command",
    [
        ("export", "RUN", "--format", "openvino", "--out", "bundle"),
        ("train", "digits-advmoe", "--out", "run", *SMALL),
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_is_started_alone_leaves_nothing_either(
    command: tuple[str, ...], tiny_run: Path, listener: Path, tmp_path: Path
) -> None:
    """No other command has loaded its libraries, or told them to be quiet."""
    arguments = [str(tiny_run) if word == "RUN" else word for word in command]
    program = ["-m", "advmoe_deploy.cli.app", *arguments]
    leaves_nothing(program, listener, tmp_path / "heard", tmp_path / "home")


@LINUX
def test_an_engine_opened_from_python_reports_nothing_home(
    tiny_bundle: Bundle, listener: Path, tmp_path: Path
) -> None:
    home, heard = tmp_path / "home", tmp_path / "heard"
    home.mkdir()
    program = (
        "import sys, advmoe_deploy.export.precision.quantize\n"
        "from pathlib import Path\n"
        "from advmoe_deploy.bundle import open_bundle\n"
        "from advmoe_deploy.runtime.select import open_runner\n"
        f"bundle = open_bundle(Path({str(tiny_bundle.path)!r}))\n"
        "for engine in ('onnxruntime', 'openvino'):\n"
        "    open_runner(bundle, engine).close()\n"
    )
    run_python(
        ["-c", program],
        tmp_path,
        HOME=str(home),
        LD_PRELOAD=str(listener),
        LOOKUPS=str(heard),
        ADVMOE_CUSTOM_OPS="bodies",
    )
    assert not heard.exists()
    assert not [file for file in home.rglob("*") if file.is_file()]


THREADS = (
    "import json, os, sys\n"
    "from advmoe_deploy.cli.app import run\n"
    "assert run(sys.argv[1:]) == 0\n"
    "import torch\n"
    "from threadpoolctl import threadpool_info\n"
    "pools = [pool['num_threads'] for pool in threadpool_info()]\n"
    "pools += [torch.get_num_threads(), torch.get_num_interop_threads()]\n"
    "print(json.dumps([sorted(set(pools)), os.environ['OMP_WAIT_POLICY']]))\n"
)


def test_threads_hold_for_everything_in_the_process(tiny_bundle: Bundle, tmp_path: Path) -> None:
    command = ["verify", str(tiny_bundle.path), "--images", "2", "--threads", "1"]
    command += ["--allow-fragile"]
    said = run_python(["-c", THREADS, *command], tmp_path, HOME=str(tmp_path))
    assert json.loads(said.splitlines()[-1]) == [[1], "PASSIVE"]


def test_the_users_own_wait_policy_stands(tmp_path: Path) -> None:
    program = "import os, advmoe_deploy.cli.app; print(os.environ['OMP_WAIT_POLICY'])"
    assert run_python(["-c", program], tmp_path, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_one_cpu_to_use_is_one_thread(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from advmoe_deploy.process import default_threads, usable_cpus, use_threads\n"
        "print(usable_cpus(), default_threads() or os.cpu_count())\n"
        "use_threads(0)\n"
        "print(os.environ.get('OMP_NUM_THREADS', os.cpu_count()))\n"
    )
    assert run_python(["-c", program], tmp_path).split() == ["1", "1", "1"]


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_omp_num_threads_is_the_default(
    said: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert default_threads() == threads


@pytest.mark.parametrize("said", ["", "0", "many"])
def test_nonsense_in_omp_num_threads_says_nothing(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert default_threads() in (0, usable_cpus())


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),  # a CPU and a half needs two threads
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n", "a/b/cpu.max": "400000 100000\n"}, 4),
        ({"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cpus_of_a_container(files: dict[str, str], cpus: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cpus(tmp_path, "0::/a/b\n") == cpus


@LINUX
def test_a_thread_that_steps_back_leaves_the_others_where_they_are() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=step_back) as pool:
        behind = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, 0)).result()
    assert behind == min(19, before + 5)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_two_threads_may_load_without_telemetry_at_once() -> None:
    first, second = without_telemetry(), without_telemetry()
    with ExitStack() as one, ExitStack() as other:
        one.enter_context(first)
        other.enter_context(second)
        one.close()
    assert "openvino_telemetry" not in sys.modules
