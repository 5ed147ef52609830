"""Signals: a closed terminal ends a server that was not told to stay; an operator loads again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from advmoe_deploy.bundle import Bundle
from tests.serving.online.live import wait_for

fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

SERVE = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--drain=0"]
UNCHANGED = 'advmoe_reloads_total{outcome="unchanged"} 1.0'


@contextmanager
def at_terminal(*command: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Yield a process that a terminal controls, no stream of it leads there, and its other end."""
    outer, inner = os.openpty()

    def begin() -> None:
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which these tests' own process may ignore

    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=begin,
    ) as process:
        os.close(inner)
        try:
            yield process, outer
        finally:
            process.kill()


def url_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[1].split("/v2")[0]


def reloads(url: str) -> bool:
    return UNCHANGED in httpx.get(url + "/metrics").text


def test_a_terminal_that_closes_ends_the_server(tiny_bundle: Bundle) -> None:
    with at_terminal(*SERVE, str(tiny_bundle.path)) as (process, outer):
        url = url_of(process)
        process.send_signal(signal.SIGHUP)  # the terminal is there: somebody wants a reload
        wait_for(lambda: reloads(url))
        os.close(outer)  # of which the kernel tells the process
        assert process.wait(timeout=60) == 0


def test_a_server_under_nohup_stays_and_loads_again(tiny_bundle: Bundle) -> None:
    with at_terminal("nohup", *SERVE, str(tiny_bundle.path)) as (process, outer):
        url = url_of(process)
        os.close(outer)
        wait_for(lambda: reloads(url))
        process.terminate()
        assert process.wait(timeout=60) == 0


NO_DESCRIPTORS = """
import os, resource, signal, sys
from advmoe_deploy.serving.online.operations.signals import hangups
asked = []
with hangups(lambda: asked.append(1)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    os.kill(os.getpid(), signal.SIGHUP)
print(len(asked))
"""


def test_a_server_without_descriptors_does_not_take_that_for_a_closed_terminal() -> None:
    with at_terminal(sys.executable, "-c", NO_DESCRIPTORS) as (process, outer):
        assert process.stdout is not None
        assert process.stdout.read() == "1\n"
        assert process.wait(timeout=60) == 0
        os.close(outer)


EARLY = """
import signal, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            seen.append(name.partition(".")[0])

seen, sys.argv = [], ["advmoe", "serve", "bundle"]
sys.meta_path.insert(0, Watch())
import advmoe_deploy.cli
print(*sorted(set(seen) - set(sys.stdlib_module_names)))
"""


def test_sigterm_is_heard_before_any_library_is_loaded() -> None:
    command = [sys.executable, "-c", EARLY]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == ["advmoe_deploy"]
