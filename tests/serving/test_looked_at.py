"""What people look at: one picture, lines on stdout, a table, accuracy of a labelled folder."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import advmoe_deploy
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.tables.predict import batch_lines
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.stored import reference_model
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.tally import labels_in, trained_on
from advmoe_deploy.specs import ThreatModel
from advmoe_deploy.verify.trial import Trial
from tests.cli.command_line import Capture, said
from tests.serving.online.live import running, wait_until_ready


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first hundred test digits, in a folder for each class."""
    folder = tmp_path_factory.mktemp("labelled")
    digits = load_dataset("digits").test
    for index, (image, label) in enumerate(zip(digits.images[:100], digits.labels, strict=False)):
        place = folder / str(label)
        place.mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{index:03}.png")
    return folder


def predict(bundle: Bundle, *arguments: object) -> int:
    return run(["predict", str(bundle.path), *map(str, arguments)])


def test_one_picture_is_shown(capsys: Capture, trained_bundle: Bundle, labelled: Path) -> None:
    picture = next((labelled / "3").iterdir())
    assert predict(trained_bundle, picture, "--json", "--top-k", 2) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(picture)
    assert answer["top_k"][0]["label"] == answer["label"]
    assert (answer["engine"], answer["precision"]) == ("onnxruntime", "fp32")
    (expert,) = answer["expert_ids"]["router"]
    assert predict(trained_bundle, "--input", picture) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"class {answer['label']} probability {100 * answer['probability']:.1f} %" in shown
    assert f"expert of router {expert} computed by onnxruntime fp32" in shown


def test_lines_on_stdout_are_those_of_the_file(
    capsys: Capture, trained_bundle: Bundle, labelled: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(labelled / "3", source)
    (source / "zz.png").write_text("text")
    report = classify_files(trained_bundle, str(source), tmp_path / "a.jsonl", top_k=1)
    assert predict(trained_bundle, source, "--output", "-", "--top-k", 1) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "a.jsonl").read_text()
    assert f"{report.images - 1} of {report.images} images classified" in captured.err
    assert f"1 unreadable, each a row with its error: '{source / 'zz.png'}' (not a" in captured.err
    assert [each.path for each in report.unread] == [str(source / "zz.png")]
    lost = ["--output", "-", "--on-error", "fail"]
    assert predict(trained_bundle, source, *lost) == 3
    assert "the field error of their lines says why" in capsys.readouterr().err
    assert predict(trained_bundle, source, "--output", "-", "--max-errors", 0) == 3
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == report.images
    assert "more than --max-errors 0" in captured.err


def test_a_table_has_the_same_cells(trained_bundle: Bundle, labelled: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(labelled / "3", source)
    (source / 'a "quote", ж.png').write_text("text")
    for suffix in ("jsonl", "csv"):
        classify_files(trained_bundle, str(source), tmp_path / f"a.{suffix}", top_k=2)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(lines)
    for line, cells in zip(map(json.loads, lines), table, strict=True):
        plain = ("path", "label", "label_id", "probability", "error")
        assert all(cells[name] == text(line[name]) for name in plain)
        best = line["top_k"] or [dict.fromkeys(("label", "probability"))] * 2
        for place, each in enumerate(best, 1):
            assert cells[f"label_{place}"] == text(each["label"])
            assert cells[f"probability_{place}"] == text(each["probability"])
        ids = (line["expert_ids"] or {"router": []})["router"]
        assert cells["expert_ids_router"] == " ".join(map(str, ids))


def text(value: Any) -> str:
    return "" if value is None else str(value)


def test_tokens_are_lists_in_a_table(families: Any, tmp_path: Path) -> None:
    _, bundle = families["token experts"]
    spec = bundle.manifest.model
    pixels = np.zeros((spec.image_size, spec.image_size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for suffix in ("jsonl", "csv"):
        classify_files(bundle, str(tmp_path / "a.png"), tmp_path / f"a.{suffix}")
    ids = json.loads((tmp_path / "a.jsonl").read_text())["expert_ids"]
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        (cells,) = csv.DictReader(file)
    for layer, rows in ids.items():
        assert json.loads(cells[f"expert_ids_{layer}"]) == rows


def test_accuracy_of_a_labelled_folder_is_that_of_eval(
    capsys: Capture, trained_bundle: Bundle, labelled: Path, tmp_path: Path
) -> None:
    measured = advmoe_deploy.evaluate(trained_bundle, images=100)
    output = tmp_path / "a.jsonl"
    report = classify_files(trained_bundle, str(labelled), output)
    assert report.accuracy is not None
    assert (report.accuracy.correct, report.accuracy.images) == (measured.correct, 100)
    assert report.accuracy.interval == wilson_interval(measured.correct, 100)
    assert predict(trained_bundle, labelled, "--output", output, "--overwrite") == 0
    said = f"{measured.correct} of 100 images, by the names of their folders"
    assert said in " ".join(capsys.readouterr().out.split())
    resumed = classify_files(trained_bundle, str(labelled), output, resume=True, overwrite=True)
    assert resumed.accuracy == report.accuracy


def test_the_folder_of_the_training_flatters_which_is_said(labelled: Path) -> None:
    data = f"folder:{labelled.parent}?size=8"
    assert trained_on(str(labelled.parent), data)
    assert trained_on(f"{labelled.parent}/", data)
    assert trained_on(str(labelled.parent / "train"), data)
    for other in (labelled.parent / "test", labelled.parent / "other", labelled.parent.parent):
        assert not trained_on(str(other), data)
    assert not trained_on(str(labelled), "digits")


def test_the_accuracy_of_the_training_has_a_note(
    capsys: Capture, trained_bundle: Bundle, labelled: Path, tmp_path: Path
) -> None:
    training = {**trained_bundle.manifest.training, "data": f"folder:{labelled}?size=8"}
    manifest = trained_bundle.manifest.model_copy(update={"training": training})
    own = Bundle(trained_bundle.path, manifest)
    report = classify_files(own, str(labelled), tmp_path / "a.jsonl")
    assert "note: the model was trained on images of this folder" in "".join(batch_lines(report))
    other = classify_files(trained_bundle, str(labelled), tmp_path / "b.jsonl")
    assert "trained on" not in "".join(batch_lines(other))


def test_verify_and_a_server_are_right_about_as_many(
    trained_bundle: Bundle, labelled: Path
) -> None:
    measured = advmoe_deploy.evaluate(trained_bundle, images=100)
    digits = load_dataset("digits").test.first(100)
    model, threat = reference_model(trained_bundle), ThreatModel(epsilon=0.05)
    with open_runner(trained_bundle, threads=1) as runner:
        trial = Trial(model, runner, to_float(digits.images), digits.labels, threat)
        assert trial.clean.engine_N.sum() == measured.correct
        with running(trained_bundle, runner, Limits()) as live, httpx.Client() as client:
            wait_until_ready(live.address)
            url, kind = f"{live.url}/v2/models/advmoe/image", {"Content-Type": "image/png"}
            answers = [
                client.post(url, content=file.read_bytes(), headers=kind).json()["label"]
                == file.parent.name
                for file in labelled.rglob("*.png")
                if file.parent != labelled
            ]
    assert (len(answers), sum(answers)) == (100, measured.correct)


def test_labels_are_sub_folders_that_are_all_classes(tmp_path: Path) -> None:
    classes, root = ("cat", "dog"), str(tmp_path)

    def found(*names: str) -> tuple[bool, str]:
        labels, note = labels_in(root, [f"{root}/{name}" for name in names], classes)
        return labels is not None, note

    assert found("cat/1.png", "dog/deep/2.png") == (True, "")
    assert found("1.png", "2.png") == found("birds/1.png") == (False, "")
    has, note = found("cat/1.png", "birds/1.png", "2.png")
    assert not has
    assert "1 are classes of the model, and others are not: 'birds', 'images beside them'" in note
    assert labels_in(f"{root}/*/1.png", [f"{root}/cat/1.png"], classes) == (None, "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no input; name a picture"),
        (["3", "--input", "4"], 2, "two inputs, '3' and --input '4'; give one"),
        (["3"], 2, "--output FILE.jsonl, .parquet or .csv"),
        (["3", "4", "5"], 2, "one input, and these are 3; give their folder, a pattern in quotes"),
        (["-"], 2, "many inputs need --output"),
        (["-", "--output", "-", "--engine", "ray"], 2, "say --on ray"),
        (["3", "--output", "-", "--json"], 2, "leave out one of them"),
        (["3", "--output", "-", "--resume"], 2, "go with an --output file"),
        (["3", "--overwrite"], 2, "go with an --output file"),
        (["missing.png"], 3, "no such file or folder"),
        (["../text.png"], 3, "text.png cannot be classified: not a PNG"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    capsys: Capture,
    trained_bundle: Bundle,
    labelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (labelled.parent / "text.png").write_text("text")
    monkeypatch.chdir(labelled)
    assert predict(trained_bundle, *arguments) == code
    line = said(capsys)
    assert message in line
