"""Files of checkpoints: what may lie beside the weights, what is never run, and what is none."""

import argparse
import collections
import datetime
import gzip
import io
import pathlib
import pickle
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmoe_deploy.models.upstream.files import content_of
from advmoe_deploy.models.upstream.importer import read_released
from tests.models.upstream.test_upstream import TINY, model_of, refusal, released_of

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def full() -> State:
    network, router, _ = released_of(model_of(TINY))
    return network | {f"router.{name}": tensor for name, tensor in router.items()}


def saved(content: object, file: Path, *, legacy: bool = False) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file


HARMLESS = {
    "Namespace": argparse.Namespace(lr=0.1, out=Path("x")),
    "paths": [Path("x"), pathlib.PurePosixPath("y"), pathlib.PureWindowsPath("z")],
    "numpy numbers": [np.float32(1), np.float64(1), np.int64(1), np.bool_(True), np.str_("x")],
    "numpy types": [np.float32, np.dtype("f4"), np.dtype([("a", "i4")])],
    "arrays": [np.zeros(3), np.array(["a"], dtype=object), np.zeros((2, 2), dtype="<u2")],
    "random states": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
    "generators": [np.random.default_rng(0), np.random.RandomState(0)],
    "containers": [collections.defaultdict(list, a=[1]), collections.deque([1], 3), {1}, range(3)],
    "dates and versions": [datetime.datetime(2024, 1, 1), torch.__version__],
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_classes_do_not_matter(
    name: str, legacy: bool, full: State, tmp_path: Path
) -> None:
    content = {"extra": HARMLESS[name], "state_dict": full, "args": HARMLESS[name]}
    file = saved(content, tmp_path / "file.pt", legacy=legacy)
    model = read_released(file, "advmoe", {}).model
    assert torch.equal(model.state_dict()["backbone.linear.bias"], full["linear.bias"])


def test_weights_in_a_mapping_with_code_of_its_own(full: State, tmp_path: Path) -> None:
    file = saved({"model": collections.defaultdict(dict, full)}, tmp_path / "file.pt")
    assert read_released(file, "advmoe", {}).unwrapped == ("model",)


class Call:
    """What pickle would call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_run(legacy: bool, full: State, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for call in (
        Call(__import__("os").system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(Path.touch, marker),
        Call(getattr, Path("x"), "touch"),
        Call(np.load, str(marker)),
    ):
        for content in ({"state_dict": full, "x": call}, {**full, "linear.bias": call}):
            file = saved(content, tmp_path / "file.pt", legacy=legacy)
            assert "needs the code of" in refusal(file)
    assert not marker.exists()


def test_a_stand_in_never_becomes_what_it_stands_for(tmp_path: Path) -> None:
    file = saved({"x": Path("x"), "y": np.random.default_rng(0)}, tmp_path / "file.pt")
    names = {type(value).__name__ for value in content_of(file).values()}
    assert names == {"_Unread"}


def test_a_whole_module_is_refused_with_a_way_out(tmp_path: Path) -> None:
    for content in (nn.Linear(2, 2), {"model": nn.Sequential(nn.ReLU())}):
        says = refusal(saved(content, tmp_path / "file.pt"))
        assert "holds a whole module" in says
        assert "torch.save(torch.load(FILE, weights_only=False).state_dict()" in says


def tar_of(file: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(file, "best.pth")
    return stream.getvalue()


def zip_of(file: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.write(file, "best.pth")
    return stream.getvalue()


def test_what_arrives_in_place_of_a_checkpoint_is_named(full: State, tmp_path: Path) -> None:
    file = saved(full, tmp_path / "good.pth")
    script, arrays = io.BytesIO(), io.BytesIO()
    with pytest.deprecated_call():
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), script)
    np.savez(arrays, a=np.zeros(1))
    whole = file.read_bytes()
    for content, says in (
        (b"", "it is empty"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (whole[: len(whole) // 2], "ends too early"),
        (gzip.compress(whole), "gunzip"),
        (tar_of(file), "tar archive that begins with 'best.pth'; unpack it"),
        (zip_of(file), "zip archive of best.pth; unpack it"),
        (script.getvalue(), "TorchScript archive"),
        (arrays.getvalue(), "NumPy archive"),
        (pickle.dumps(full), "a pickle of another protocol"),
        (pickle.dumps(full, protocol=2), "needs the code of torch.storage"),
    ):
        (tmp_path / "file").write_bytes(content)
        assert says in refusal(tmp_path / "file")
