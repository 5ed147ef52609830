"""Own images in one line: what is chosen for them, and what is refused before PyTorch is loaded."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe_deploy.cli.app import run
from advmoe_deploy.data.dataset import Dataset, Split, to_float
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.checkpoint import read_checkpoint
from advmoe_deploy.train import device, own_data
from advmoe_deploy.train.recipes.by_family import FAMILIES, MANY, family_recipe
from advmoe_deploy.train.request import train_request
from advmoe_deploy.train.run.swept import sweep_configs
from tests.data.images import write_photos, write_png

SMALL = ["--set", "model.width=4", "--set", "model.router_width=2", "--set", "attack_steps=1"]
SMALL += ["--set", "test_attack_steps=2", "--set", "holdout_attack_steps=1", "--image-size", "8"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve photographs each, without a split."""
    return write_photos(tmp_path_factory.mktemp("own") / "photos")


def test_one_line_trains_on_a_folder_and_says_what_it_chose(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    out = tmp_path / "run"
    line = ["train", "advmoe", "--data", "photos/", "--epochs", "1", *SMALL, "--out", str(out)]
    assert run([*line, "--epsilon", "4/255", "--json"]) == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    assert (report["recipe"], report["images"], report["epochs"]) == ("photos-advmoe", 7, 1)
    assert report["epsilon"] == 4 / 255
    assert (
        "split              24 to train on, 5 to choose the epoch by, 7 to test on" in captured.err
    )
    assert "model.num_classes  3: digit, flower, temple" in captured.err
    assert max(len(each) for each in captured.err.splitlines() if each.startswith("  ")) <= 80
    assert caplog.text.count("is kept for the test") == 1
    config = json.loads((out / "config.json").read_text())
    assert config["chosen"]["batch_size"] == "16: for 24 training images"
    assert (config["even_loads"], config["lr"]) == (True, 0.01)
    # What the user said is none of our choices.
    assert not {"epochs", "threat.epsilon", "model.image_size"} & {*config["chosen"]}
    checkpoint = read_checkpoint(out / "model")
    assert checkpoint.class_names == ("digit", "flower", "temple")
    assert checkpoint.model.image_shape == (3, 8, 8)
    assert checkpoint.provenance["data"] == f"folder:{photos}?size=8"
    assert run([*line, "--epsilon", "4/255", "--resume"]) == 0
    assert "nothing is trained" in capfd.readouterr().err
    assert run(line) == 2
    assert "holds a finished run; pass --overwrite to replace it" in capfd.readouterr().err


def test_classes_that_are_held_out_whole_are_said(tmp_path: Path) -> None:
    for number in range(5):
        write_png(tmp_path / "set" / "train" / f"c{number}" / "0.png", number)
        write_png(tmp_path / "set" / "val" / f"c{number}" / "0.png", 10 + number)
    asked = train_request("dense", tmp_path / "run", data=str(tmp_path / "set"))
    (held,) = asked.data.holdout.labels
    said = f"4 to train on, 1 to choose the epoch by, 5 to test on; none to train on of c{held}"
    assert asked.config.chosen["split"] == said


def test_mean_and_deviation_are_those_of_the_training_part(photos: Path, tmp_path: Path) -> None:
    asked = train_request("dense", tmp_path / "run", data=str(photos))
    images = to_float(asked.data.train.images)
    np.testing.assert_allclose(asked.config.model.mean, images.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(asked.config.model.std, images.std((0, 2, 3)), atol=1e-4)
    assert asked.config.model.family == "dense"
    assert asked.config.flip


def test_mean_and_deviation_take_little_memory() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, 32, 32), dtype=np.uint8)
    images[:, 1], images[:, 2] = 255, 77
    split = Split(images, np.arange(2000) % 2)
    data = Dataset("digits", ("a", "b"), split, split, split)
    tracemalloc.start()
    chosen = {choice.key: choice.value for choice in own_data.of_images(data, None)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes
    mean, std = images.mean((0, 2, 3)) / 255, images.std((0, 2, 3)) / 255
    np.testing.assert_allclose(chosen["model.mean"], mean, atol=1e-4)
    np.testing.assert_allclose(chosen["model.std"], [std[0], 1 / 255, 1 / 255], atol=1e-4)


def test_grey_images_get_one_channel_and_no_mirror(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / "scans" / str(label)).mkdir(parents=True)
        for index in range(8):
            grey = np.random.default_rng([label, index]).integers(0, 255, (20, 30), np.uint8)
            Image.fromarray(grey).save(tmp_path / "scans" / str(label) / f"{index}.png")
    model = (asked := train_request("at-moe", data=str(tmp_path / "scans"))).config.model
    assert (model.image_shape, len(model.mean)) == ((1, 16, 16), 1)
    assert not asked.config.flip
    assert asked.out == Path("runs/scans-at-moe")


def test_a_recipe_takes_a_folder_too_and_a_family_a_data_set(photos: Path) -> None:
    config = train_request("digits-advmoe", data=f"folder:{photos}?size=16").config
    assert config.model.image_shape == (3, 16, 16)
    assert (config.model.num_classes, config.epochs, config.name) == (3, 24, "digits-advmoe")
    asked = train_request("s-dense", data="digits")
    assert asked.config.model.image_shape == (1, 8, 8)
    assert (asked.config.name, asked.config.batch_size) == ("digits-s-dense", 64)


def test_what_depends_on_a_swept_setting_is_chosen_anew(photos: Path) -> None:
    asked = train_request("advmoe", data=str(photos))
    assert asked.config.attack_step_size == 0.625 * 8 / 255
    swept = sweep_configs(asked.config, "threat.epsilon", (4 / 255, 0.1), (0, 1), asked.configure)
    assert [each.threat.epsilon for each in swept.values()] == [4 / 255, 4 / 255, 0.1, 0.1]
    for config in swept.values():
        assert config.attack_step_size == pytest.approx(0.625 * config.threat.epsilon)
        assert "threat.epsilon" not in config.chosen
    said = train_request("advmoe", data=str(photos), settings=["attack_step_size=0.01"])
    assert said.configure(["threat.epsilon=0.1"]).attack_step_size == 0.01


def test_settings_are_chosen_for_the_images_that_are_used(photos: Path) -> None:
    few = ["train_images=12", "test_images=3"]
    chosen = train_request("advmoe", data=str(photos), settings=few).config.chosen
    assert chosen["split"] == "12 to train on, 5 to choose the epoch by, 3 to test on"
    assert chosen["batch_size"] == "16: for 12 training images"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_recipe_for_few_images_and_for_many(family: str) -> None:
    few, many = family_recipe(family, MANY - 1), family_recipe(family, MANY)
    assert few.name.startswith("digits-")
    assert many.name == f"cifar10-{family}-cpu"
    assert few.model.family == many.model.family


def test_size_and_precision_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(side: int) -> int:
        return own_data.size_for(own_data.Survey(("a", "b"), side, is_grey=False))

    monkeypatch.setattr(own_data, "has_gpu", lambda: False)
    assert [size(side) for side in (5, 9, 31, 32, 4000)] == [8, 8, 16, 32, 32]
    monkeypatch.setattr(own_data, "has_gpu", lambda: True)
    assert [size(side) for side in (31, 100, 4000)] == [16, 64, 128]
    assert device.has_bf16() in (True, False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.image_size=64"], "size 64 contradict each other"),
        (["model.in_channels=2"], "write 1 or 3"),
        (["model.num_classes=5"], "has 3 classes, not 5; set model.num_classes=3"),
        (["data=digits"], "both name data"),
        (["threat.epsilon=1/0"], "divides by zero"),
        (["threat.epsilon=8"], "less than or equal to 1"),
        (["seed=18446744073709551616"], "seed: Input should be less than 18446744073709551616"),
    ],
)
def test_contradictions_are_one_line(photos: Path, settings: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        train_request("advmoe", data=f"folder:{photos}?size=32", settings=settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "epochs", "size", "epsilon"),
    [
        (["epochs=24.0", "model.image_size=16.0", 'threat.epsilon="8/255"'], 24, 16, 8 / 255),
        (['epochs="3"', 'model.image_size="8"', "threat.epsilon=1.0"], 3, 8, 1),
    ],
)
def test_a_value_in_another_spelling_counts_as_validated(
    photos: Path, settings: list[str], epochs: int, size: int, epsilon: float
) -> None:
    config = train_request("advmoe", data=str(photos), settings=settings).config
    assert (config.epochs, config.evaluate_every) == (epochs, max(1, epochs // 6))
    assert config.model.image_shape == (3, size, size)
    assert (config.threat.epsilon, config.attack_step_size) == (epsilon, 0.625 * epsilon)


OWN, ZOO = ["advmoe", "--data", "photos"], "zoo:cifar10-advmoe"
REFUSED = [
    (["nope"], 2, "unknown recipe 'nope'"),
    (["advmo"], 2, "did you mean advmoe"),
    (["advmoe"], 2, "pass --data FOLDER"),
    (["advmoe", "--data", "missing/"], 3, "there is no folder "),
    (["advmoe", "--data", "./phtos"], 3, "phtos; did you mean"),
    (["photos"], 2, "to train on its images: advmoe train advmoe --data photos"),
    (["nothing-like-any"], 2, "'advmoe list recipes' names them"),
    (["advmoe", "photos"], 2, "a folder of images is named by --data FOLDER"),
    (["advmoe", "--data", "missing"], 2, "And no folder is called 'missing'"),
    (["advmoe", "--data", "one"], 3, "holds 1 class folder, cats; give at least two"),
    (["advmoe", "--data", "empty"], 3, "dogs holds no image"),
    ([*OWN, "--epsilon", "8"], 2, "outside (0, 1], in [0, 1] pixels; write 8/255"),
    ([*OWN, "--epsilon", "eight"], 2, "is no number; write 8/255, or 0.03"),
    ([*OWN, "--image-size", "4"], 2, "outside 8..512; write --image-size 32"),
    ([*OWN, "--set", "lr=fast"], 2, "lr: "),
    ([*OWN, "--set", "epoch=1"], 2, "did you mean epochs"),
    ([*OWN, "--epochs", "2", "--set", "epochs=3"], 2, "are one setting; give one"),
    ([*OWN, "--out", "photos"], 2, "exists and is no run"),
    ([*OWN, "--out", "photos/runs/first"], 2, "and would be taken for one of them; choose"),
    ([*OWN, "--resume"], 2, "holds no run to resume"),
    ([*OWN, "--dry-run", "--out", "photos"], 2, "exists and is no run"),
    ([*OWN, "--dry-run", "--resume"], 2, "holds no run to resume"),
    (["advmoe", "--data", "photos?size=abc"], 2, "names no size in 8..512"),
    (["advmoe", "--data", "photos?size="], 2, "names no size in 8..512"),
    ([*OWN, "--from", "runs/missing"], 3, "is not there; name what 'advmoe train'"),
    ([*OWN, "--from", "photos"], 3, "no finished run, no checkpoint and no bundle"),
    ([*OWN, "--from", "zoo:nope"], 2, "unknown model 'nope'"),
    (["advmoe", "--data", "digits", "--from", ZOO], 2, f"other data, or leave --from {ZOO} out"),
    (["digits-dense", *OWN[1:], "--set", "batch_size=2", "--devices", "2"], 2, "under two images"),
    (["digits-dense", *OWN[1:], "--set", "model.num_classes=4"], 2, "has 3 classes, not 4"),
]
# Of other commands, whose radius and data are refused as early.
ELSEWHERE = [
    (["import", "x.pth", "--from", "advmoe"], 3, "x.pth is no file"),
    (["import", "x.pth", "--from", "advmo"], 2, "did you mean advmoe"),
    (
        ["import", "one/cats/0.png", "--from", "advmoe", "--data", "missing/"],
        3,
        "there is no folder ",
    ),
    (
        ["import", "one/cats/0.png", "--from", "advmoe", "--data", "./photos.zip"],
        3,
        "photos.zip is a file; unpack it (unzip photos.zip)",
    ),
    (["sweep", *OWN, "--over", "model.num_experts=two"], 2, "is no finite number; write"),
    (["sweep", "advmoe", "--over", "lr=0.1"], 2, "pass --data FOLDER"),
    (["sweep", *OWN, "--over", "lr=0.1", "--out", "photos/s"], 2, "would be taken for one of them"),
    (["import", "one/cats/0.png", "--from", "advmoe", "--classes", "a,a"], 2, "names a twice"),
    (["verify", "x", "--epsilon", "8"], 2, "write 8/255"),
]
PROGRAM = """
import contextlib, io, json, sys
from advmoe_deploy.cli.app import run
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run([*arguments, "--threads", "1"])
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


def test_every_refusal_is_one_line_before_pytorch_is_loaded(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    for index in range(5):
        write_png(tmp_path / "one" / "cats" / f"{index}.png", index)
        write_png(tmp_path / "empty" / "cats" / f"{index}.png", index)
    (tmp_path / "empty" / "dogs").mkdir()
    (tmp_path / "photos.zip").touch()
    cases = [(["train", *arguments], code, says) for arguments, code, says in REFUSED] + ELSEWHERE
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([arguments for arguments, _, _ in cases])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, code, says), (found, said, loaded) in zip(cases, answers, strict=True):
        *notices, line = said.splitlines()
        assert (found, loaded) == (code, False), arguments
        assert says in line
        assert line.startswith("advmoe: error: ")
        assert not [one for one in notices if "is kept for the test" not in one]
    assert sorted(tmp_path.iterdir()) == before
