"""One text per errno, for what was being done, with the file's name and the right exit code."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import (
    AdvMoEError,
    InputError,
    MachineError,
    file_error,
    install_line,
    missing_folder,
    naming,
    nearest,
    reading,
    writing,
)
from advmoe_deploy.files import sha256_of, write_atomically

Doing = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("number", "kind", "reading_says", "writing_says"),
    [
        (errno.ENOENT, InputError, "no such file", "its folder is not there"),
        (errno.EACCES, MachineError, "you may not read it", "choose a place you may write to"),
        (errno.EPERM, MachineError, "forbids reading it", "choose a place you may write to"),
        (errno.EIO, MachineError, "while it was read", "while it was written"),
        (errno.EISDIR, InputError, "is a folder", "is a folder"),
        (errno.ENOTDIR, InputError, "not a directory", "not a directory"),
        (errno.ENAMETOOLONG, InputError, "name is too long", "name is too long"),
        (errno.ELOOP, InputError, "links lead in a circle", "links lead in a circle"),
        (errno.ENOSPC, MachineError, "disk is full", "disk is full"),
        (errno.EDQUOT, MachineError, "quota is used up", "quota is used up"),
        (errno.EROFS, MachineError, "read-only", "read-only"),
        (errno.EFBIG, MachineError, "ulimit -f", "ulimit -f"),
        (errno.EMFILE, MachineError, "ulimit -n", "ulimit -n"),
        (errno.ESTALE, MachineError, "mount it again", "mount it again"),
        (errno.ENOTTY, InputError, "some file: Inappropriate ioctl", "Inappropriate ioctl"),
    ],
)
def test_the_text_fits_the_errno_and_what_was_being_done(
    number: int, kind: type[Exception], reading_says: str, writing_says: str
) -> None:
    for doing, words in ((reading, reading_says), (writing, writing_says)):
        found = refused(lambda doing=doing: fail(doing, OSError(number, os.strerror(number))))
        assert type(found) is kind
        assert str(found).startswith(f"{Path('nowhere', 'some file')}: ")
        assert words in str(found)


def fail(doing: Doing, error: OSError) -> None:
    with doing(Path("nowhere", "some file")):
        raise error


def refused(work: Callable[[], object]) -> AdvMoEError:
    """Return what an OSError of ``work`` amounts to."""
    try:
        work()
    except OSError as error:
        found = file_error(error)
        assert found is not None
        return found
    raise AssertionError("nothing was wrong")


def test_a_folder_that_is_there_is_not_called_missing(tmp_path: Path) -> None:
    """As /proc, in which nobody makes a file."""

    def write() -> None:
        with writing(tmp_path / "new"):
            raise OSError(errno.ENOENT, "")

    assert "though the folder is there" in str(refused(write))


def test_a_rename_is_a_write_and_a_library_speaks_for_itself() -> None:
    assert "may write to" in str(file_error(OSError(errno.EACCES, "", "a", None, "b")))
    assert str(file_error(OSError("cc failed"))) == "cc failed"
    assert file_error(OSError(errno.ENOTTY, "no file at all")) is None


def test_a_name_that_is_there_is_kept() -> None:
    inner, nameless = OSError(errno.EIO, "", "inner"), OSError(errno.EIO, "")
    assert str(refused(lambda: fail(naming, inner))).startswith("inner: ")
    assert str(refused(lambda: fail(naming, nameless))).startswith(
        f"{Path('nowhere', 'some file')}: "
    )


def test_what_the_system_really_says(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "circle", "links lead in a circle"),
        (tmp_path / "file" / "below", "not a directory"),
        (tmp_path, "is a folder"),
        (tmp_path / ("a" * 300), "name is too long"),
        (tmp_path / "missing", "no such file"),
    ):
        said = str(refused(lambda path=path: sha256_of(path)))
        assert said.startswith(f"{path}: ")
        assert words in said


@pytest.mark.skipif(sys.platform != "linux", reason="its special files")
def test_what_special_files_say() -> None:
    unmapped = Path("/proc/self/mem")  # nothing is at address 0
    assert "failed while it was read" in str(refused(lambda: sha256_of(unmapped)))
    assert "the disk is full" in str(refused(lambda: Path("/dev/full").write_bytes(b"x")))


def test_too_many_open_files() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        said = str(refused(lambda: sha256_of(Path(__file__))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert said.startswith(f"{__file__}: too many files are open in this process")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out.json"
    assert str(refused(lambda: write_atomically(target, b""))).startswith(f"{target}: ")


def as_nobody(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``advmoe`` as somebody whom permissions bind: root without its two exemptions."""
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("nothing is forbidden to root, and there is no setpriv")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def predicted(bundle: Path, cwd: Path) -> str:
    """Return what ``predict`` complains of, which ends with 5."""
    files = ["--input", str(cwd / "list.txt"), "--output", str(cwd / "a.jsonl")]
    done = as_nobody("predict", str(bundle), *files, cwd=cwd)
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("advmoe: error: ")


def test_a_model_that_may_not_be_looked_into_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVMOE_ZOO", str(tmp_path))
    (tmp_path / "closed").mkdir(mode=0)
    done = as_nobody("list", "models", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    closed = json.loads(done.stdout)["models"][0]
    assert (closed["name"], closed["kind"]) == ("closed", "unknown")
    assert "permission denied" in closed["note"]


def test_a_home_of_somebody_else_leaves_the_packaged_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ADVMOE_ZOO", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir(mode=0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = as_nobody("list", "models", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {each["source"] for each in json.loads(done.stdout)["models"]} == {"packaged"}


def test_what_may_not_be_read_is_not_about_writing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle, names = tmp_path / "bundle", tmp_path / "list.txt"
    shutil.copytree(tiny_bundle.path, bundle)
    names.write_text("a.png\n")
    manifest, graph = bundle / "manifest.json", bundle / "model.onnx"
    for locked, named in ((manifest, manifest), (graph, graph), (names, names), (bundle, manifest)):
        mode = locked.stat().st_mode
        locked.chmod(0)
        said = predicted(bundle, tmp_path)
        locked.chmod(mode)
        assert said == (
            f"{named}: permission denied: you may not read it; change its permissions, or name a "
            "copy"
        )


def test_what_may_not_be_written_is_not_about_reading(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\n")
    tmp_path.chmod(0o500)
    said = predicted(tiny_bundle.path, tmp_path)
    tmp_path.chmod(0o700)
    assert said == (
        f"{tmp_path / 'a.jsonl'}: permission denied: you may not write there; "
        "choose a place you may write to"
    )


def test_of_a_checkout_that_is_not_installed_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install_line("cpu") == "pip install 'advmoe-deploy[cpu]'"
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    root = Path(__file__).parents[1]
    assert install_line("gpu", "rtx") == f"pip install '{root}[gpu]' or '{root}[rtx]'"


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("onxx", ["onnx", "triton", "web"], ["onnx"]),
        ("image_sze", ["model.image_size", "model.stem", "test_images"], ["model.image_size"]),
        ("avdmoe", ["advmoe", "at-moe", "cifar10-jtdmoe"], ["advmoe"]),
        ("digits-advmo", ["digits-advmoe", "digits-advmoe-paper", "advmoe"], None),
        ("onnx", ["onnxruntime", "openvino"], ["onnxruntime"]),
        ("epoch", ["epochs", "even_loads"], ["epochs"]),
        ("pickle", ["onnx", "web"], []),
    ],
)
def test_only_near_names_are_offered(name: str, known: list[str], near: list[str] | None) -> None:
    assert nearest(name, known) == (known[:2] if near is None else near)


def test_a_folder_that_is_not_there_has_the_like_one_beside_it_named(tmp_path: Path) -> None:
    (tmp_path / "pets-advmoe").mkdir()
    (tmp_path / "pet-advmof").write_text("a file is none")
    slip = missing_folder(tmp_path / "pet-advmoe", "run", "train one")
    assert slip.endswith(f"pet-advmoe; did you mean {tmp_path}/pets-advmoe? If not, train one")
    assert missing_folder(tmp_path / "pets-dense", "run", "train one").endswith("e; train one")
    assert missing_folder(tmp_path / "x" / "y", "run", "train one").endswith("y; train one")
