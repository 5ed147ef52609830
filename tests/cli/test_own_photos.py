"""Five commands from a folder of photographs to a server, and one accuracy, to the image."""

import json
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.demo.photographs import _server
from advmoe_deploy.data.folder import _listed
from advmoe_deploy.export.precision import gate
from advmoe_deploy.reports.cautions import COLLAPSED
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from tests.cli.command_line import Capture
from tests.data.images import write_photos

CUT = (AttackSpec(name="pgd", steps=2), AttackSpec(name="square", steps=2))
# So small that it is trained in seconds, and to nothing.
SMALL = ["epochs=1", "model.width=4", "model.router_width=4", "model.image_size=8"]


def answer(capsys: Capture, command: list[str], codes: tuple[int, ...] = (0,)) -> dict[str, object]:
    """Run a command and return its JSON object."""
    capsys.readouterr()
    assert run([*command, "--json"]) in codes, capsys.readouterr().err
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def kept_for_the_test(photos: Path) -> list[tuple[Path, str]]:
    """Return the files that are kept for the test, and the class of each."""
    _, test, names = _listed(photos)
    labels = test.labels_N.tolist()
    return [(Path(test.where(row)), names[label]) for row, label in enumerate(labels)]


def right_by_the_server(bundle: Path, files: list[tuple[Path, str]]) -> int:
    """Return how many files the endpoint for images answers by their class."""
    right = 0
    with _server(bundle) as url:
        for file, name in files:
            asked = urllib.request.Request(
                url.removesuffix("/infer") + "/image?top=1",
                file.read_bytes(),
                {"Content-Type": "application/octet-stream"},
            )
            with urllib.request.urlopen(asked, timeout=60) as found:
                right += json.load(found)["label"] == name
    return right


def right_by_predict(rows: Path, files: list[tuple[Path, str]]) -> int:
    """Return how many of ``files`` have a row with their class."""
    of_file = {file.resolve(): name for file, name in files}
    answers = [json.loads(line) for line in rows.read_text().splitlines()]
    found = {Path(row["path"]).resolve(): row["label"] for row in answers}
    assert not any(row["error"] for row in answers)
    return sum(found[file] == name for file, name in of_file.items())


def road(
    photos: Path, capsys: Capture, *, settings: list[str], export: list[str], verify: list[str]
) -> tuple[dict[str, object], dict[str, object]]:
    """Go it, compare the accuracies, and return the reports of training and verification."""
    said = [word for setting in settings for word in ("--set", setting)]
    capsys.readouterr()
    assert run(["train", "advmoe", "--data", "photos/", *said, "--json"]) == 0
    printed = capsys.readouterr()
    trained: dict[str, object] = json.loads(printed.out)
    assert ("warning: the router takes" in printed.err) == bool(settings)
    assert trained["run"] == "runs/photos-advmoe"
    answer(capsys, ["export", "runs/photos-advmoe", "--precision", "int8", *export])
    bundle = Path("runs/photos-advmoe/bundle")
    verified = answer(capsys, ["verify", str(bundle), *verify], (0, 1, 6))
    answer(capsys, ["predict", str(bundle), "photos/", "--output", "answers.jsonl"])
    files = kept_for_the_test(photos)
    right = right_by_the_server(bundle, files)
    assert right_by_predict(Path("answers.jsonl"), files) == right
    clean = answer(capsys, ["eval", str(bundle)])
    assert (clean["images"], clean["correct"]) == (len(files), right)
    accuracy = verified["clean_accuracy"]
    assert isinstance(accuracy, dict)
    assert verified["images"] == len(files)
    assert round(accuracy["engine"] * len(files)) == right
    return trained, verified


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where photographs of three classes lie, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_quickly(photos: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(photos, count=10)
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: CUT)
    monkeypatch.setattr(gate, "MAX_DROP", 100.0)  # of what is not trained, int8 may be anything
    options = ["--allow-fragile", "--max-drop", "100"]
    trained, verified = road(photos, capsys, settings=SMALL, export=[], verify=options)
    assert verified["precision"] == "int8"
    told = trained["warnings"]  # said before as well
    assert isinstance(told, list)
    assert told[0].startswith("the router takes")
    formats = Counter(file.suffix for file, _ in kept_for_the_test(photos))
    assert len(formats) > 1


@pytest.mark.slow
def test_as_people_do(photos: Path, capsys: Capture) -> None:
    """Nothing but paths and a precision; how good it gets, and int8, is up to the machine."""
    write_photos(photos, count=40)
    trained, verified = road(photos, capsys, settings=[], export=[], verify=[])
    assert isinstance(trained["clean_accuracy"], float)
    assert 0 <= trained["clean_accuracy"] <= 1
    routes, told = trained["effective_routes"], trained["warnings"]
    assert isinstance(routes, float)
    assert isinstance(told, list)
    assert any("only one expert is in use" in line for line in told) == (routes < COLLAPSED)
    drop = verified["clean_drop"]
    assert isinstance(drop, dict)
    assert drop["images_needed"] > verified["images"]  # however they were answered
    assert verified["verdict"] in ("passed", "failed", "undecided")
