"""Pickles of CIFAR are read by a reader that runs nothing in them."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.data.layouts import pickles
from advmoe_deploy.data.layouts.pickles import read_pickle
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import DataError
from tests.data.layouts import TEST, batches, python_batches


def written_by_python_2() -> bytes:
    """A batch of one black image as Python 2 wrote it: names are text, arrays are old strings."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x01M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T\x00\x0c\x00\x00" + bytes(3072) + b"tb"
    )
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au."


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(written_by_python_2())
    found = read_pickle(tmp_path / "batch")
    assert found["labels"] == [7]
    assert np.array_equal(found["data"], np.zeros((1, 3072), np.uint8))
    assert pickle.loads(written_by_python_2(), encoding="bytes")[b"data"].shape == (1, 3072)


class Runs:
    """Pickles as a call, which an ordinary reader makes."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, getattr])
def test_a_pickle_runs_no_code(
    tmp_path: Path, protocol: int, function: Callable[..., object]
) -> None:
    python_batches(tmp_path)
    made = tmp_path / "made"
    argument = {os.mkdir: str(made), eval: f"__import__('os').mkdir({str(made)!r})"}
    call = Runs(function, argument.get(function, "x"), *(["y"] if function is getattr else []))
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({**batches(TEST), b"more": call}, protocol))
    with pytest.raises(DataError, match=r"it asks for .*nothing in it was run"):
        load_dataset(f"cifar10:{tmp_path}")
    assert not made.exists()


def test_a_pickle_leaves_the_reader_as_it_was(tmp_path: Path) -> None:
    # BUILD: the attributes of a global become what a dictionary says.
    (tmp_path / "batch").write_bytes(b"\x80\x02c_codecs\nencode\n}U\x03fooK\x05sb0}.")
    assert read_pickle(tmp_path / "batch") == {}
    assert not any(vars(function) for function in (pickles._latin1, pickles._reconstruct))


def test_a_pickle_of_other_arrays_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    for written, says in (
        (pickle.dumps({"data": np.zeros(3, object)}), "not uint8"),
        (pickle.dumps({"data": np.zeros(3)}), "not uint8"),
        (pickle.dumps([1]), "it holds a list"),
        (pickle.dumps(batches(TEST))[:-100], "no pickle"),
        (b"", "no pickle"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R.", "by rot13"),
    ):
        file.write_bytes(written)
        with pytest.raises(DataError, match=says):
            read_pickle(file)
