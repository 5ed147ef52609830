"""Where the kernels come from: the package, the cache, a compiler, or nowhere, and said so."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BackendUnavailableError, InputError, UsageError
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.runtime.onnxruntime import custom_ops
from advmoe_deploy.runtime.onnxruntime.custom_ops import VARIABLE, find_custom_ops, uses_custom_ops
from advmoe_deploy.runtime.onnxruntime.graph_runner import GraphRunner
from advmoe_deploy.runtime.onnxruntime.kernels.build import (
    BUILD_RECORD,
    FOLDER,
    LIBRARY,
    SOURCES,
    compile_kernels,
    find_compiler,
)
from advmoe_deploy.runtime.select import open_runner
from tests.cli.command_line import Capture

COMPILER = find_compiler()
PREBUILT = (FOLDER / LIBRARY).exists()
compiles = pytest.mark.skipif(COMPILER is None or PREBUILT, reason="nothing is compiled here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no wish."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "advmoe-deploy"


@compiles
def test_kernels_are_compiled_once(cache: Path) -> None:
    first = find_custom_ops()
    assert first.form == "kernels"
    assert first.reason == f"compiled by {COMPILER}"
    assert first.library is not None
    assert first.library.parent.stat().st_mode & 0o777 == 0o700
    made = first.library.stat()
    again = find_custom_ops()
    assert again.reason == "compiled earlier, in the cache"
    assert again.library == first.library
    assert first.library.stat().st_mtime_ns == made.st_mtime_ns
    assert [path.name for path in cache.iterdir()] == [first.library.parent.name]


@compiles
def test_many_may_compile_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: find_custom_ops("kernels").library, range(4)))
    assert len(set(found)) == 1
    assert len(list(cache.iterdir())) == 1


@compiles
def test_a_library_that_was_changed_is_refused(
    cache: Path, tiny_bundle: Bundle, capsys: Capture
) -> None:
    library = find_custom_ops().library
    assert library is not None
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(InputError, match="not the library that was compiled") as caught:
        open_runner(tiny_bundle)
    assert "\n" not in str(caught.value)
    assert str(library.parent) in str(caught.value)
    assert find_custom_ops("bodies").form == "bodies"
    assert run(["doctor", "--json"]) == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["custom_ops"]["form"] is None
    assert "SHA-256 differs" in told.err


@compiles
def test_a_library_that_cannot_be_loaded_is_said_to_be_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    no_library = tmp_path / "cc"
    no_library.write_text('#!/bin/sh\nfor last; do :; done\necho "no library" > "$last"\n')
    no_library.chmod(0o700)
    monkeypatch.setenv("CC", str(no_library))
    with pytest.raises(InputError, match=r"the kernels cannot be loaded: .*set ADVMOE_CUSTOM_OPS"):
        open_runner(tiny_bundle)


@compiles
@pytest.mark.parametrize("missing", [LIBRARY, BUILD_RECORD])
def test_half_a_cache_is_refused(cache: Path, missing: str) -> None:
    library = find_custom_ops().library
    assert library is not None
    (library.parent / missing).unlink()
    with pytest.raises(InputError, match="not the library that was compiled"):
        find_custom_ops()


@compiles
def test_a_cache_that_others_may_write_to_is_refused(cache: Path) -> None:
    library = find_custom_ops().library
    assert library is not None
    library.parent.chmod(0o770)
    with pytest.raises(InputError, match="open to others"):
        find_custom_ops()


@compiles
def test_a_cache_whose_parent_others_may_write_to_is_refused(cache: Path) -> None:
    library = find_custom_ops().library
    assert library is not None
    library.parent.parent.chmod(0o777)
    with pytest.raises(InputError, match="open to others"):
        find_custom_ops()


@compiles
def test_what_another_put_there_meanwhile_is_looked_at(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(compiler: str, cached: Path) -> None:
        cached.mkdir(parents=True, mode=0o777)
        cached.chmod(0o777)
        compile_kernels(compiler, cached)

    monkeypatch.setattr(custom_ops, "_compile", slower)
    with pytest.raises(InputError, match="open to others"):
        find_custom_ops()


@compiles
def test_a_compiler_may_have_flags(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -g0")
    assert find_custom_ops().library is not None


@pytest.mark.skipif(PREBUILT, reason="the package brings its library")
@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_without_a_usable_home_the_bodies_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    closed = tmp_path / "file"
    closed.write_text("no directory")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(closed))
    found = find_custom_ops()
    assert found.form == "bodies"
    assert "could not be compiled" in found.reason


@pytest.mark.skipif(PREBUILT, reason="the package brings its library")
def test_without_a_compiler_the_bodies_run_and_it_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    found = find_custom_ops()
    assert found.form == "bodies"
    assert "no C compiler" in found.reason
    with pytest.raises(BackendUnavailableError, match="install a C compiler or set"):
        find_custom_ops("kernels")
    report = profile_bundle(tiny_bundle, batches=(1,), against=(), n=2, warmup=1)
    assert report.settings["custom_ops"] == str(found)
    assert not cache.exists()


@pytest.mark.skipif(PREBUILT, reason="the package brings its library")
@pytest.mark.parametrize("script", ["echo no luck today >&2; exit 1", "exit 0"])
def test_a_compiler_that_fails_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    found = find_custom_ops()
    assert found.form == "bodies"
    assert "could not be compiled" in found.reason
    assert ("no luck today" in found.reason) == ("luck" in script)
    assert not list(cache.iterdir())


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_library_in_the_package_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILER is not None
    package = tmp_path / "package"
    package.mkdir()
    compile_kernels(COMPILER, package)
    monkeypatch.setattr(custom_ops, "FOLDER", package)
    assert find_custom_ops().reason == "prebuilt in the package"
    (package / LIBRARY).write_bytes(b"something else")
    with pytest.raises(InputError, match="not the library that was compiled"):
        find_custom_ops()
    assert not cache.exists()


def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle) -> None:
    monkeypatch.setenv(VARIABLE, "bodies")
    with open_runner(tiny_bundle) as runner:
        assert isinstance(runner, GraphRunner)
        assert runner.custom_ops is not None
        assert runner.custom_ops.form == "bodies"
    monkeypatch.setenv(VARIABLE, "body")
    with pytest.raises(UsageError, match=f"{VARIABLE}=body is none of auto, kernels, bodies"):
        open_runner(tiny_bundle)


def test_only_graphs_with_our_operators_take_the_library(tiny_bundle: Bundle) -> None:
    assert uses_custom_ops(tiny_bundle.read("model.onnx"))
    for name in ("segments/router.onnx", "baselines/dense.onnx", "baselines/unfused.onnx"):
        assert not uses_custom_ops(tiny_bundle.read(name))


def test_both_forms_answer_the_same(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    with np.load(tiny_bundle.file("golden.npz")) as golden:
        images, logits = golden["images"], golden["logits"]
    for form in ("auto", "bodies"):
        routes = manifest.plan.routes
        with GraphRunner(
            tiny_bundle.file("model.onnx"), images.shape[1:], routes=routes, custom_ops=form
        ) as runner:
            np.testing.assert_allclose(runner.infer(images).logits, logits, rtol=0, atol=3e-5)


@compiles
def test_the_library_needs_libc_alone_and_exports_one_name(cache: Path) -> None:
    library = find_custom_ops().library
    if not sys.platform.startswith("linux") or not shutil.which("readelf"):
        pytest.skip("no ELF, or nothing that reads it")
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    )
    names = [line.split("[")[1][:-1] for line in needed.stdout.splitlines() if "(NEEDED)" in line]
    assert names == ["libc.so.6"]
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]


@compiles
def test_the_source_gives_no_warning(tmp_path: Path) -> None:
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wpedantic", "-fsyntax-only"]
    subprocess.run([str(COMPILER), *strict, *map(str, SOURCES)], check=True)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_wheel_brings_source_and_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel")
    root = Path(__file__).parents[3]
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    command += ["build", "-b", str(tmp_path / "build"), "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, env={**os.environ})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = "advmoe_deploy/runtime/onnxruntime/kernels"
    wanted = {LIBRARY, BUILD_RECORD, "kernel.h", *(source.name for source in SOURCES)}
    assert {f"{kernels}/{name}" for name in wanted} <= names
