"""Clean accuracy: figures by hand, and the same images right on a run, its bundle and in files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import advmoe_deploy
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.comparison.compare import _labelled
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.evaluation.measure import (
    class_figures,
    confusion_of,
    expert_use,
    reliability_of,
)
from advmoe_deploy.parity.intervals import wilson_interval
from tests.cli.command_line import Capture, said
from tests.data.images import write_folders, write_png


def test_classes_by_hand() -> None:
    labels, predicted = np.asarray([0, 0, 0, 1, 1]), np.asarray([0, 0, 1, 1, 0])
    confusion = confusion_of(predicted, labels, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    first, second, never = class_figures(confusion, np.asarray([4, 2, 0]), ("a", "b", "c"))
    assert (first.images, first.predicted, first.correct) == (4, 3, 2)  # one has no answer
    assert (first.recall, first.precision) == (2 / 4, 2 / 3)
    assert first.recall_interval == wilson_interval(2, 4)
    assert (second.recall, second.precision) == (1 / 2, 1 / 2)
    assert (never.recall, never.precision) == (None, None)


def test_calibration_by_hand() -> None:
    # Probabilities 0.9 and 0.1 thrice, of which two are right, and 0.6 and 0.4 once, wrong.
    logits = np.log(np.asarray([[9, 1], [9, 1], [9, 1], [3, 2]], np.float32))
    found = reliability_of(logits, np.asarray([0, 0, 1, 1]))
    assert found.mean_confidence == pytest.approx((3 * 0.9 + 0.6) / 4, abs=1e-6)
    assert found.ece == pytest.approx((3 * abs(2 / 3 - 0.9) + abs(0 - 0.6)) / 4, abs=1e-6)
    nats = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4
    assert found.negative_log_likelihood == pytest.approx(nats, abs=1e-6)
    met = [each for each in found.bins if each.images]
    assert (len(found.bins), [each.images for each in met]) == (15, [1, 3])
    assert all(each.low < each.confidence <= each.high for each in met if each.confidence)


def test_experts_by_hand() -> None:
    ids = {"image": np.asarray([[0], [1], [1]]), "token": np.asarray([[[2], [0]], [[2], [2]]])}
    image, token = expert_use(ids, {"image": 2, "token": 4})
    assert (image.expert_load, image.shares) == ((1, 2), (1 / 3, 2 / 3))
    assert (token.expert_load, token.shares) == ((1, 0, 3, 0), (0.25, 0, 0.75, 0))
    assert token.effective_routes == pytest.approx(4 / 3**0.75)


def test_a_run_and_its_bundle_are_right_about_the_same_images(
    trained_run: Path, trained_bundle: Bundle
) -> None:
    of_run, of_bundle = map(advmoe_deploy.evaluate, (trained_run, trained_bundle))
    assert (of_run.engine, of_bundle.engine) == ("torch", "onnxruntime")
    assert of_run.images == of_bundle.images == len(load_dataset("digits").test)
    assert of_run.confusion == of_bundle.confusion
    assert of_run.experts == of_bundle.experts
    assert of_run.accuracy_interval == wilson_interval(of_run.correct, of_run.images)
    assert sum(each.correct for each in of_run.classes) == of_run.correct
    assert sum(sum(row) for row in of_run.confusion) == of_run.images
    worst = of_run.most_confused(1)[0]
    names = trained_bundle.manifest.class_names
    row, column = names.index(worst.label), names.index(worst.taken_for)
    wrong = np.asarray(of_run.confusion) * (1 - np.eye(10, dtype=int))
    assert worst.images == wrong[row, column] == wrong.max()


def test_the_command_shows_a_table_or_one_object(capsys: Capture, trained_bundle: Bundle) -> None:
    command = ["eval", str(trained_bundle.path), "--images", "100"]
    assert run([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["images"], value["kind"], value["precision"]) == (100, "bundle", "fp32")
    assert len(value["confusion"]) == len(value["classes"]) == 10
    assert len(value["reliability"]["bins"]) == 15
    assert run(command) == 0
    out = capsys.readouterr().out
    assert f"{value['correct']} of 100 test images of digits" in out
    assert "onnxruntime fp32" in out
    for text in ("recall", "expected calibration error", "effective routes of 2"):
        assert text in out


def test_the_page_has_the_figures(
    capsys: Capture, trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    (tmp_path / "link.html").symlink_to(page)
    command = ["eval", str(trained_bundle.path), "--images", "100", "--json", "--report"]
    assert run([*command, str(tmp_path / "link.html")]) == 0
    value = json.loads(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    shown = (
        f"{100 * value['accuracy']:.1f} % of 100 clean test images are right",
        f"{value['correct']} images, 95 % interval",
        f"{100 * value['reliability']['ece']:.1f} %",
        "onnxruntime in fp32",
        *(f"<td>{each['images']}</td>" for each in value["classes"]),
    )
    assert all(part in text for part in shown)
    assert text.count('<td style="background') == 100
    assert run([*command, str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run([*command, str(tmp_path / "b.html")]) == 4
    assert capsys.readouterr().err.endswith("run: pip install 'advmoe-deploy[report]'\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "digitz"], 2, "did you mean digits"),
        (["--engine", "openvino"], 2, "leave it out, or export the run first"),
        (["--images", "0"], 2, "images"),
        (["--class-map", "0"], 3, "cannot be read"),
    ],
)
def test_nonsense_is_refused_in_a_line(
    capsys: Capture, trained_run: Path, options: list[str], code: int, message: str
) -> None:
    assert run(["eval", str(trained_run), *options]) == code
    line = said(capsys)
    assert message in line


def test_a_plain_folder_is_read_at_the_size_of_the_model(
    trained_bundle: Bundle, tmp_path: Path
) -> None:
    for name in trained_bundle.manifest.class_names:
        for index in range(5):
            write_png(tmp_path / name / f"{index}.png", 10 * index + int(name))
    found = advmoe_deploy.evaluate(trained_bundle, data=str(tmp_path))
    assert (found.images, found.data.rpartition("?")[2]) == (10, "size=8")
    notes: list[str] = []
    labelled = _labelled(trained_bundle, str(tmp_path), None, 100, notes)
    assert labelled is not None
    assert (len(labelled.labels_N), notes) == (10, [])


def test_what_is_no_model_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert run(["eval", str(tmp_path)]) == 3
    assert "neither a finished run nor a bundle" in capsys.readouterr().err


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from advmoe_deploy.cli.app import run
for data in sys.argv[2:]:
    print(run(["eval", sys.argv[1], "--data", data]))
"""


def test_data_that_do_not_fit_a_run_are_refused_without_torch(
    trained_run: Path, tmp_path: Path
) -> None:
    photos = f"folder:{write_folders(tmp_path / 'photos')}"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(trained_run), "digit", "./gone", photos],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2", "3", "2"]
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    said = ("did you mean digits", "there is no folder", "of 2 classes, the model takes (1, 8, 8)")
    assert all(text in line for text, line in zip(said, lines, strict=True))
