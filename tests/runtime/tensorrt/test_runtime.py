"""What of the TensorRT backend needs no TensorRT: shapes, versions, refusals."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import MachineError, UsageError
from advmoe_deploy.plan import RouteStep, TensorInfo
from advmoe_deploy.reports.devices import Capability, EngineDevice, RtxDevice
from advmoe_deploy.runtime.tensorrt.api import LOG_VARIABLE, Messages, parse_version, probe
from advmoe_deploy.runtime.tensorrt.build import BuildOptions, _not_built
from advmoe_deploy.runtime.tensorrt.rtx import kernels
from advmoe_deploy.runtime.tensorrt.rtx.kernels import prune
from advmoe_deploy.runtime.tensorrt.shapes import (
    BatchProfile,
    Shapes,
    narrowest,
    rows_profile,
    shapes_of,
    shapes_of_segments,
    with_least,
)
from advmoe_deploy.runtime.tensorrt.slot import DeviceArray

BATCH = BatchProfile(min=1, opt=8, max=32)
H100 = EngineDevice(gpu="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), tensorrt="10.16.1.11")


def test_shapes_follow_images_and_rows(tiny_bundle: Bundle) -> None:
    shapes = shapes_of_segments(tiny_bundle.manifest.plan, BATCH)
    assert shapes["router"]["images"] == Shapes((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))
    # Two experts: half of the images is a balanced share, all of them the most.
    assert shapes["router.expert-0"]["images"] == Shapes((1, 1, 8, 8), (4, 1, 8, 8), (32, 1, 8, 8))


def test_tokens_are_rows() -> None:
    route = RouteStep(
        layer="l", scores="s", num_experts=3, top_k=2, weighting="probability", tokens=4
    )
    assert rows_profile(route, 3, BATCH) == BatchProfile(min=1, opt=22, max=128)  # 8 * 4 * 2 / 3
    tensor = TensorInfo(name="x", dtype="float32", shape=("4*N", 16))
    assert shapes_of(tensor, BATCH) == Shapes((4, 16), (32, 16), (128, 16))
    with pytest.raises(UsageError, match="'M' follows no batch"):
        shapes_of(TensorInfo(name="x", dtype="float32", shape=("M",)), BATCH)


def test_the_least_shapes_have_a_profile_of_their_own() -> None:
    shapes = {"x": Shapes((1, 3), (8, 3), (32, 3)), "y": Shapes((4, 2), (32, 2), (128, 2))}
    profiles = with_least(shapes)
    assert profiles == [
        shapes,
        {"x": Shapes((1, 3), (1, 3), (1, 3)), "y": Shapes((4, 2), (4, 2), (4, 2))},
    ]
    ends = [{name: (each.min, each.max) for name, each in of.items()} for of in profiles]
    assert narrowest(ends, {"x": (1, 3), "y": (4, 2)}) == 1
    assert narrowest(ends, {"x": (1, 3), "y": (8, 2)}) == 0  # one of them is not the least
    assert narrowest(ends, {"x": (32, 3), "y": (128, 2)}) == 0
    assert narrowest(ends, {"x": (33, 3), "y": (4, 2)}) == 0  # none takes it; TensorRT says so
    assert BuildOptions().profiles(shapes) == profiles
    assert BuildOptions(batch_min_profile=False).profiles(shapes) == [shapes]
    best = {"x": Shapes((1, 3), (1, 3), (32, 3))}
    assert with_least(best) == [best]


def test_an_array_on_the_device_is_lent() -> None:
    array = DeviceArray(0x100, (2, 3), np.dtype(np.float32))
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0x100, False),
        "version": 3,
        "stream": None,  # nothing to wait for
    }
    array.is_lent = False
    with pytest.raises(UsageError, match="copy them before the block"):
        _ = array.__cuda_array_interface__


def test_of_a_failed_call_every_error_is_told_and_what_came_before_it_is_not(
    tmp_path: Path,
) -> None:
    with Messages(tmp_path / "all.log") as messages:
        messages.keep("ERROR", "of a call before")
        heard = messages.listen()
        assert heard.reason() == "it gives no reason"
        messages.keep("WARNING", "CUDA initialization failure\n with error: 35")
        messages.keep("VERBOSE", "a search")
        assert heard.reason() == "CUDA initialization failure with error: 35"
        for text in ("Requested 9 bytes: out of memory", "no implementation", "no implementation"):
            messages.keep("ERROR", text)
        assert heard.reason() == "Requested 9 bytes: out of memory; no implementation"
        assert isinstance(_not_built("router", heard, "tensorrt"), MachineError)
        later = messages.listen()
        messages.keep("INTERNAL_ERROR", "no implementation")
        assert later.reason() == "no implementation"
        assert not later.mentions("out of memory")
    said = (tmp_path / "all.log").read_text().splitlines()
    assert (len(said), said[1]) == (7, "WARNING CUDA initialization failure with error: 35")
    assert "VERBOSE a search" in said
    with pytest.raises(MachineError, match=rf"^{LOG_VARIABLE}={tmp_path}: "):
        Messages(tmp_path)


def test_versions_are_numbers() -> None:
    assert parse_version("10.16.1.11") == (10, 16, 1)
    assert parse_version("11") == (11, 0, 0)
    assert parse_version("8.6.0") < (10, 0, 0)
    assert probe(np, "no such name") is None


def test_a_device_is_a_name_for_a_folder() -> None:
    assert H100.slug == "nvidia-h100-80gb-hbm3-sm90-10.16.1"


@pytest.mark.parametrize(
    ("gpu", "capability", "tensorrt", "compatible", "why"),
    [
        (H100.gpu, (9, 0), "10.16.1.11", False, ""),
        (H100.gpu, (9, 0), "10.17.0.1", False, "built with TensorRT 10.16.1.11, here is 10.17.0.1"),
        (H100.gpu, (9, 0), "10.17.0.1", True, ""),
        (
            H100.gpu,
            (9, 0),
            "10.15.0.1",
            True,
            "or later releases of that major version, here is 10.15",
        ),
        (H100.gpu, (9, 0), "11.0.0.1", True, "here is 11.0.0.1"),
        ("NVIDIA L4", (8, 9), "10.16.1.11", True, "this is NVIDIA L4 (compute capability 8.9)"),
    ],
)
def test_engines_are_tied_to_their_device(
    gpu: str, capability: tuple[int, int], tensorrt: str, compatible: bool, why: str
) -> None:
    built = H100.model_copy(update={"version_compatible": compatible})
    answer = built.mismatch(gpu=gpu, compute_capability=capability, version=tensorrt)
    assert why in answer
    assert bool(why) == bool(answer)


@pytest.mark.parametrize(
    ("named", "here", "version", "why"),
    [
        ((), (8, 6), "1.7.1.116", ""),
        ((), (12, 1), "1.7.1.116", ""),
        ((), (7, 5), "1.7.1.116", "for compute capability 8.0, 8.6, 8.9, 12.0 and newer, this is"),
        ((), (9, 0), "1.7.1.116", "this is a GPU (compute capability 9.0)"),
        ((), (10, 0), "1.7.1.116", "this is a GPU (compute capability 10.0)"),
        (((8, 9),), (8, 9), "1.7.1.116", ""),
        (((8, 9),), (12, 0), "1.7.1.116", "for compute capability 8.9, this is a GPU"),
        ((), (8, 6), "1.8.0.1", "compiled with TensorRT for RTX 1.7.1.116, here is 1.8.0.1"),
    ],
)
def test_compiled_engines_run_on_the_gpus_that_the_library_names(
    named: tuple[Capability, ...], here: Capability, version: str, why: str
) -> None:
    compiled = RtxDevice(tensorrt_rtx="1.7.1.116", compute_capabilities=named)
    answer = compiled.mismatch(gpu="a GPU", compute_capability=here, version=version)
    assert why in answer
    assert bool(why) == bool(answer)


def test_kernels_are_code_that_nobody_else_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "gpu", lambda: SimpleNamespace(compute_capability=(8, 6)))
    file = kernels.kernels_file(b"engine")
    assert file is not None
    assert file.is_relative_to(tmp_path / "advmoe-deploy" / "tensorrt-rtx")
    file.parent.chmod(0o770)
    assert kernels.kernels_file(b"engine") is None
    assert "is open to others" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "file"))
    (file.parent / "file").touch()
    assert kernels.kernels_file(b"engine") is None  # a convenience, which an engine runs without


def test_of_compiled_kernels_the_last_written_are_kept(tmp_path: Path) -> None:
    for age, name in enumerate(["new.kernels", "old.kernels", "older.kernels", "other.timings"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    prune(tmp_path, 20)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"new.kernels", "old.kernels", "other.timings"}
