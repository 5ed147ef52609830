"""How a command may end: its exit code, one line, and whose output goes where."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli import failures
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError, MachineError
from tests.cli.command_line import Capture, said


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["train", "digits-dense"], "torch", "train"),
        (["train", "digits-dense"], "lightning_fabric", "train"),
        (["verify", "BUNDLE"], "torch", "train"),
        (["export", "RUN", "--format", "onnx"], "torch", "train"),
        (["predict", "BUNDLE", "--input", "IN", "--output", "a.jsonl"], "onnxruntime", "cpu"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tiny_bundle: Bundle, tmp_path: Path, arguments: list[str], package: str, extra: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    places = {"BUNDLE": str(tiny_bundle.path), "IN": str(tmp_path)}
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from advmoe_deploy.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(places.get(a, a) for a in arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"advmoe: error: {package.replace('_', '-')} is not installed")
    assert f"pip install 'advmoe-deploy[{extra}]'" in line
    assert not list(tmp_path.glob(".*"))


def raising(error: BaseException) -> Callable[..., None]:
    def command(*_: object, **__: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BundleError("two\nlines"), 3, "two lines"),
        (MachineError("full"), 5, "full"),
        (OSError(28, "No space left on device", "/x"), 5, "/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), 5, "permission denied"),
        (NotADirectoryError(20, "Not a directory", "/x"), 3, "/x: not a directory"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (ValueError("a bug"), 70, "unexpected ValueError: a bug; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_way_to_end_has_its_code(
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", raising(error))
    assert run(["inspect", "x"]) == code
    assert message in said(capsys)


def test_an_interrupt_that_native_code_disguised_is_still_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def native(_: Path) -> Bundle:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("the callback failed") from None
        raise AssertionError

    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", native)
    assert run(["inspect", "x"]) == 130
    assert said(capsys) == "advmoe: error: interrupted"


def test_what_libraries_print_goes_to_stderr(
    capsys: Capture, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(path: Path) -> Bundle:
        print("noise")  # noqa: T201
        return open_bundle(path)

    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", noisy)
    assert run(["inspect", str(tiny_bundle.path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["bundle"] == str(tiny_bundle.path)
    assert captured.err == "noise\n"


def test_parser_errors_have_a_base_of_their_own() -> None:
    assert failures.ParserError.__name__ == "ClickException"
