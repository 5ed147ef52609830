"""What the shell offers for a Tab, in a process where torch cannot be loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Else typer asks which shell is above, and a test runner may have none that it knows.
ROOT = Path(__file__).parent.parent.parent
SHELL_IS_SAID = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
PROGRAM = (
    "import os, sys\n"
    "for heavy in ('torch', 'onnxruntime', 'sklearn'): sys.modules[heavy] = None\n"
    "from advmoe_deploy.cli.app import main\n"
    "sys.argv = ['advmoe']\n"
    "main()\n"
)


def offered(line: str) -> list[str]:
    """Return what bash would be offered behind ``line``."""
    words = line.split(" ")
    environment = {
        "_ADVMOE_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("advmoe ver", "verify"),
        ("advmoe train digits-a", "digits-advmoe-agreeing"),
        ("advmoe sweep s-", "s-dense"),
        ("advmoe show cifar10-advmoe", "cifar10-advmoe-cpu"),
        ("advmoe export z", "zoo:cifar10-advmoe"),
        ("advmoe eval bundle --engine openv", "openvino-plan"),
        ("advmoe train dense --data cif", "cifar100"),
        ("advmoe list rec", "recipes"),
        ("advmoe list recipes --family robust", "robust-experts"),
    ],
)
def test_names_are_completed_without_torch(line: str, among: str) -> None:
    offers = offered(line)
    assert among in offers
    assert all(offer.startswith(line.rpartition(" ")[2]) for offer in offers)


def test_where_a_file_is_meant_the_shell_offers_files() -> None:
    assert offered("advmoe verify bun") == offered("advmoe verify ") == []


def script() -> str:
    """Return what bash is to source."""
    done = subprocess.run(
        [sys.executable, "-m", "advmoe_deploy.cli.app", "--show-completion", "bash"],
        env={**os.environ, SHELL_IS_SAID: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_the_script_to_source_is_printed() -> None:
    assert "complete -o default -F _advmoe_completion advmoe" in script()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("export zoo:cifar10-a", "export zoo:cifar10-advmoe"),  # a colon ends a word of bash
        ("export zoo:", "export zoo:cifar10-advmoe"),
        ("export z", "export zoo:cifar10-advmoe"),
        (
            "eval zoo:cifar10-advmoe --engine openvino-p",
            "eval zoo:cifar10-advmoe --engine openvino-plan",
        ),
    ],
)
def test_bash_itself_completes(typed: str, becomes: str, tmp_path: Path) -> None:
    (tmp_path / "completion.sh").write_text(script())
    # Asked by bash it answers, and run it says what it was given.
    (tmp_path / "advmoe").write_text(
        f'#!/bin/sh\n[ -n "$_ADVMOE_COMPLETE" ] && exec {sys.executable} -m advmoe_deploy.cli.app\n'
        'echo "given: $*."\n'
    )
    (tmp_path / "advmoe").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    terminal, of_bash = os.openpty()
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=of_bash,
        stdout=of_bash,
        stderr=of_bash,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "TERM": "dumb"},
    ) as bash:
        os.close(of_bash)
        keys = f". {tmp_path}/completion.sh\nadvmoe {typed}\t\nexit\n"
        os.write(terminal, keys.encode())
        screen = "".join(iter(lambda: read(terminal), ""))
        os.close(terminal)
        bash.wait(timeout=60)
    assert f"given: {becomes}." in screen


def read(terminal: int) -> str:
    """Return what comes next; nothing once the other end is closed."""
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # how Linux says so
        return ""
