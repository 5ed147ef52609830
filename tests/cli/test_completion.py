"""What the shell offers for a Tab, in a process where torch cannot be loaded."""

import os
import subprocess
import sys

import pytest

# Else typer asks which shell is above, and a test runner may have none that it knows.
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
        "COMP_WORDS": line,
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


def test_the_script_to_source_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "advmoe_deploy.cli.app", "--show-completion", "bash"],
        env={**os.environ, SHELL_IS_SAID: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "complete -o default -F _advmoe_completion advmoe" in done.stdout
