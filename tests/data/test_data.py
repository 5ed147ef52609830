"""Data sets: what they hold, and one line when they cannot be had."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from advmoe_deploy.data.augment import augment, random_moves, to_unit
from advmoe_deploy.data.dataset import stratified_parts, to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.train.request import train_request


def write_parquet(path: Path, images: list[bytes], labels: list[int]) -> None:
    rows = [{"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path)


def digit_png(row: int, size: int = 32) -> bytes:
    pixels = load_dataset("digits").train.images[row, 0]
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").resize((size, size)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty digits dressed as CIFAR-10, in the hub's layout, the training half in two files."""
    images, labels = [digit_png(row) for row in range(20)], [row % 10 for row in range(20)]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", images[:8], labels[:8])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", images[8:15], labels[8:15])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", images[15:], labels[15:])
    return tmp_path


def test_digits_are_split_once_and_for_all() -> None:
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.holdout), len(digits.test)) == (1197, 200, 400)
    assert digits.image_shape == (1, 8, 8)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    again = load_dataset("digits")
    assert np.array_equal(digits.test.images, again.test.images)
    assert np.bincount(digits.test.labels).min() >= 38  # stratified: 40 of each, to rounding
    assert np.bincount(digits.holdout.labels).min() >= 18


def test_digits_keep_scikit_learns_grey_levels() -> None:
    levels = np.unique(load_dataset("digits").train.images)
    assert levels.tolist() == [round(v * 255 / 16) for v in range(17)]


def test_stratified_parts_are_disjoint_and_complete() -> None:
    labels = np.array([0, 1] * 10)
    first, second, rest = stratified_parts(labels, (4, 6))
    assert sorted([*first, *second, *rest]) == list(range(20))
    assert labels[first].tolist().count(1) == 2
    assert labels[second].tolist().count(1) == 3


def test_small_parts_hold_uneven_classes_evenly() -> None:
    labels = np.repeat([7, 3, 5], [40, 20, 1])
    first, rest = stratified_parts(labels, (15,))
    assert [int((labels[first] == label).sum()) for label in (7, 3, 5)] == [10, 5, 0]
    assert len(rest) == 46
    assert [len(part) for part in stratified_parts(labels[:0], (0,))] == [0, 0]


def test_to_float_is_x_over_255() -> None:
    assert to_float(np.array([0, 51, 255], np.uint8)).tolist() == [0.0, np.float32(0.2), 1.0]


def test_cifar10_is_read_from_the_hubs_layout(folder: Path) -> None:
    data = load_dataset(f"cifar10:{folder}")
    assert data.source == f"cifar10:{folder}"
    assert (len(data.train), len(data.holdout), len(data.test)) == (12, 3, 5)
    assert data.image_shape == (3, 32, 32)
    assert data.test.labels.tolist() == [5, 6, 7, 8, 9]
    with Image.open(io.BytesIO(digit_png(15))) as image:
        assert np.array_equal(data.test.images[0].transpose(1, 2, 0), np.asarray(image))


def test_cifar10_is_found_through_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cifar10").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for said in (str(tmp_path / "root"), "~/root"):
        monkeypatch.setenv("ADVMOE_DATA", said)
        assert len(load_dataset("cifar10").test) == 5


def test_the_real_cifar10() -> None:
    root = Path(os.environ.get("ADVMOE_DATA", "")) / "cifar10"
    if not os.environ.get("ADVMOE_DATA") or not root.is_dir():
        pytest.skip("CIFAR-10 is not here; set ADVMOE_DATA to a folder with cifar10/*.parquet")
    data = load_dataset("cifar10")
    assert len(data.holdout) == 1000
    assert data.image_shape == (3, 32, 32)
    mean = data.train.images.mean(axis=(0, 2, 3)) / 255
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)


def one_line_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    assert "pass --data cifar10:PATH" in one_line_of(f"cifar10:{tmp_path}/nowhere")
    assert "train-*.parquet" in one_line_of(f"cifar10:{tmp_path}")


def test_a_link_in_a_circle_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((DataError, UsageError), match="loop"):
        load_dataset(f"folder:{tmp_path / 'loop'}?size=8")
    with pytest.raises((DataError, UsageError), match="loop"):
        train_request("dense", tmp_path / "run", data=str(tmp_path / "loop"))


def test_a_truncated_parquet_is_one_line(folder: Path) -> None:
    file = folder / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    assert str(file) in one_line_of(f"cifar10:{folder}")


def test_other_columns_are_one_line(folder: Path) -> None:
    file = folder / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [1], "label": [2]}), file)
    assert str(file) in one_line_of(f"cifar10:{folder}")


@pytest.mark.parametrize(
    ("image", "label", "says"),
    [(b"no image", 1, "row 0"), (None, 1, "row 0"), ("small", 1, "not"), ("good", 99, "labels")],
)
def test_bad_rows_are_one_line(folder: Path, image: object, label: int, says: str) -> None:
    data = {"small": digit_png(0, 8), "good": digit_png(0)}.get(image, image)  # type: ignore[call-overload]
    write_parquet(folder / "test-00000-of-00001.parquet", [data], [label])
    assert says in one_line_of(f"cifar10:{folder}")


def test_names_are_checked() -> None:
    with pytest.raises(UsageError, match="did you mean digits"):
        load_dataset("digit")
    with pytest.raises(UsageError, match="takes no path"):
        load_dataset("digits:/somewhere")
    with pytest.raises(UsageError, match="no folder"):
        load_dataset("cifar10:")


def test_a_crop_is_a_shift_with_black_borders() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = {
        bytes(padded[0, 0, top : top + 3, left : left + 3].flatten().tolist())
        for top in range(3)
        for left in range(3)
    }
    rng = torch.Generator().manual_seed(0)
    moves = random_moves(200, crop_padding=1, flip=False, generator=rng)
    crops = augment(image.repeat(200, 1, 1, 1), moves)
    assert {bytes(crop.flatten().tolist()) for crop in crops} == windows


def test_a_flip_mirrors_about_half_the_images() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    rng = torch.Generator().manual_seed(0)
    moves = random_moves(400, crop_padding=0, flip=True, generator=rng)
    both = to_unit(augment(image.repeat(400, 1, 1, 1), moves))
    assert 160 < both[:, 0, 0, 0].sum() < 240
    assert torch.equal(both.sum(dim=(1, 2, 3)), torch.ones(400))
