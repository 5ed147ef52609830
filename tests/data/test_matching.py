"""Labels are matched to a model's classes by name."""

from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.data.matching import (
    Trained,
    in_order_of,
    label_map,
    matching_test_images,
    read_class_map,
)
from advmoe_deploy.data.registry import load_dataset, load_first_of_test
from advmoe_deploy.errors import DataError, InputError, UsageError
from advmoe_deploy.specs import build_spec
from tests.data.images import pixels, write_folders, write_png, write_table

NUMBERS = [str(label) for label in range(11)]
BY_ALPHABET = sorted(NUMBERS)
SPEC = build_spec(family="dense", num_classes=3)


@pytest.mark.parametrize(
    ("data", "model", "renamed", "labels", "note"),
    [
        (["a", "b", "c"], ["a", "b", "c"], {}, [0, 1, 2], ""),
        (["a", "b", "c"], ["c", "a", "b"], {}, [1, 2, 0], "another order"),
        (["car", "cat"], ["automobile", "cat"], {"car": "automobile"}, [0, 1], ""),
        (["car", "cat"], ["cat", "automobile"], {"automobile": "car"}, [1, 0], "another order"),
        (["a", "b"], ["a", "b"], {"a": "b", "b": "a"}, [1, 0], "another order"),
        (BY_ALPHABET, NUMBERS, {}, [0, 1, 10, *range(2, 10)], "another order"),
        (BY_ALPHABET, [*"abcdefghijk"], {}, [0, 1, 10, *range(2, 10)], "by number"),
        (["class 0", "class 1"], ["cat", "dog"], {}, [0, 1], "its classes have numbers"),
        ([f"class {i}" for i in range(11)], BY_ALPHABET, {}, [0, 1, *range(3, 11), 2], "by number"),
        (["cat", "dog"], ["0", "1"], {}, [0, 1], "the model's classes have numbers"),
        (["crane", "crane"], ["crane", "crane"], {}, [0, 1], ""),
    ],
)  # fmt: skip
def test_classes_are_matched_by_name(
    data: list[str], model: list[str], renamed: dict[str, str], labels: list[int], note: str
) -> None:
    found = label_map(data, model, renamed)
    assert found.labels_C.tolist() == labels
    assert note in found.note
    assert bool(found.note) == bool(note)


def test_other_names_are_an_error_that_lists_them() -> None:
    with pytest.raises(UsageError) as caught:
        label_map(["car", "cat", "plane"], ["airplane", "automobile", "cat"], {})
    message = str(caught.value)
    assert "classes car, plane, which the model does not know" in message
    assert "airplane, automobile" in message
    assert "--class-map car=airplane" in message
    with pytest.raises(UsageError, match="plane, which"):  # one of two renamings
        names = ["airplane", "automobile", "cat"]
        label_map(["car", "cat", "plane"], names, {"car": "automobile"})
    with pytest.raises(UsageError, match="no class is called bus"):
        label_map(["car", "cat"], ["cat", "automobile"], {"bus": "automobile"})


def test_a_class_map_is_a_list_or_a_file(tmp_path: Path) -> None:
    assert read_class_map(None) == {}
    assert read_class_map("car=automobile, plane = airplane") == {
        "car": "automobile",
        "plane": "airplane",
    }
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffcar=automobile\r\n\r\ncrane, the bird=crane\r\n".encode())
    assert read_class_map(str(file)) == {"car": "automobile", "crane, the bird": "crane"}
    long = {f"name {i}": f"class {i}" for i in range(50)}  # of more bytes than a file's name has
    assert read_class_map(",".join("=".join(pair) for pair in long.items())) == long
    for wrong in ("car=", "=automobile", "car=a,car=b", "car=automobile,plane"):
        with pytest.raises(UsageError, match="OLD=NEW"):
            read_class_map(wrong)
    with pytest.raises(InputError, match="OLD=NEW"):
        read_class_map(str(tmp_path / "gone.txt"))


def test_test_images_have_the_models_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = f"folder:{write_folders(tmp_path, ('cat', 'dog', 'eel'))}?size=32"
    same = matching_test_images(source, Trained(SPEC, ("cat", "dog", "eel")))
    assert caplog.messages == []
    images, labels = matching_test_images(source, Trained(SPEC, ("eel", "cat", "dog")))
    assert np.array_equal(images, same[0])
    assert labels.tolist() == [(label + 1) % 3 for label in same[1]]
    assert "another order" in caplog.text
    eel = np.float32(pixels(250).transpose(2, 0, 1)) / 255
    assert labels[(images == eel).all(axis=(1, 2, 3))].tolist() == [0]
    with pytest.raises(UsageError, match="eel, which the model does not know"):
        matching_test_images(source, Trained(SPEC, ("cat", "dog", "fox")))
    trained = Trained(SPEC, ("cat", "dog", "fox"))
    mapped = matching_test_images(source, trained, class_map={"eel": "fox"})
    assert np.array_equal(mapped[1], same[1])


def test_other_content_than_was_trained_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("cat", "dog", "eel")
    known = load_dataset(f"folder:{write_folders(tmp_path / 'a', names)}?size=32").fingerprint
    moved = f"folder:{write_folders(tmp_path / 'b', names)}?size=32"
    other = f"folder:{write_folders(tmp_path / 'c', names, first=999)}?size=32"
    matching_test_images(moved, Trained(SPEC, names, fingerprint=known))
    assert caplog.messages == []
    matching_test_images(other, Trained(SPEC, names, fingerprint=known))
    assert "holds other images than the model was trained" in caplog.text


def test_a_few_test_images_are_read_alone_and_are_the_first(tmp_path: Path) -> None:
    source = f"folder:{write_folders(tmp_path / 'set', ('cat', 'dog', 'eel'))}?size=32"
    trained = Trained(SPEC, ("eel", "cat", "dog"))
    images, labels = matching_test_images(source, trained)
    (tmp_path / "set" / "train" / "cat" / "0.png").write_bytes(b"no image")
    first = matching_test_images(source, trained, 2)
    assert np.array_equal(first[0], images[:2])
    assert np.array_equal(first[1], labels[:2])
    with pytest.raises(DataError, match=r"cat/0\.png"):
        matching_test_images(source, trained)


def test_they_are_those_of_tables_and_of_a_folder_that_is_split(tmp_path: Path) -> None:
    for name, numbers in (("train", range(60)), ("test", range(100, 120))):
        write_table(tmp_path / "c10" / f"{name}-00000-of-00001.parquet", numbers)
    for name in "abc":
        for index in range(10):
            write_png(tmp_path / "photos" / name / f"{index}.png", 10 * ord(name) + index)
    for source in (
        f"cifar10:{tmp_path / 'c10'}",
        f"folder:{tmp_path / 'photos'}?size=16",
        "digits",
    ):
        whole = load_dataset(source)
        names, few = load_first_of_test(source, None, 4)
        assert names == whole.class_names
        assert np.array_equal(few.images, whole.test.images[:4])
        assert np.array_equal(few.labels, whole.test.labels[:4])


def test_every_split_is_put_into_the_models_order(tmp_path: Path) -> None:
    data = load_dataset(f"folder:{write_folders(tmp_path)}?size=32")
    found = in_order_of(data, ("b", "a"), label_map(("a", "b"), ("b", "a"), {}))
    assert found.class_names == ("b", "a")
    for split in ("train", "holdout", "test"):
        assert np.array_equal(getattr(found, split).labels, 1 - getattr(data, split).labels)


@pytest.mark.parametrize("command", ["verify", "analyze"])
def test_commands_take_a_class_map(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read before the model: a line that is no renaming ends either command."""
    code = run([command, str(tmp_path), "--class-map", "nonsense"])
    assert code != 0
    assert "\n" not in capsys.readouterr().err.strip()
