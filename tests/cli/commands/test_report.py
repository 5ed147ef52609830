"""The page, the JSON and the examples that ``advmoe report`` writes."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmoe_deploy import card as card_module
from advmoe_deploy.bundle import CARD, MANIFEST, MODEL, Bundle
from advmoe_deploy.cli import robustness
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.commands import report as command
from advmoe_deploy.cli.pages import robust_report as page_module
from advmoe_deploy.cli.pages.pictures import picture
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.examples import convergence as convergence_module
from advmoe_deploy.verify.examples.entry import Entry
from advmoe_deploy.verify.examples.stored import read_examples
from tests.families import Families

CUT = (
    AttackSpec(name="pgd", steps=5),
    AttackSpec(name="pgd", steps=5, target="pathway", loss="margin", momentum=0.75, decay=True),
    AttackSpec(name="square", steps=5),
)


@pytest.fixture(autouse=True)
def cut_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack a little, so that what is written shows in seconds."""
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: CUT)
    monkeypatch.setattr(convergence_module, "STEPS", (2, 4))
    monkeypatch.setattr(convergence_module, "MOST_IMAGES", 20)


def test_page_json_and_examples_say_the_same(
    trained_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["report", str(trained_bundle.path), "--images", "40", "--out", str(out)]
    arguments += ["--no-card"]
    arguments += ["--engine", "onnxruntime", "--engine", "onnxruntime-plan", "--json"]
    assert run(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("card") is None
    entry = Entry.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    assert {**entry.model_dump(mode="json"), "out": str(out)} == shown
    assert (entry.norm, entry.eps, entry.dataset) == ("Linf", 0.05, "digits")
    assert entry.autoattack_acc is None
    stored = read_examples(out / "examples.npz")
    assert entry.clean_acc == pytest.approx(100 * stored.clean.shares.engine, abs=1e-3)
    assert entry.robust_acc == pytest.approx(100 * stored.standing.shares.engine, abs=1e-3)
    assert (out / "examples-onnxruntime-plan.npz").is_file()
    measured = entry.advmoe
    assert [e.engine for e in measured.engines] == ["onnxruntime", "onnxruntime-plan"]
    assert {(c.target, c.steps, c.restarts) for c in measured.convergence} == {
        (t, s, r) for t in ("model", "pathway") for s in (2, 4) for r in (1, 3)
    }
    for image in measured.rerouted:
        assert stored.attack_N[image.index] == image.attack
        assert all(layer.clean != layer.attacked for layer in image.layers)
    page = (out / "report.html").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert page.index(f"{entry.robust_acc:.1f} %") < page.index("<main>"), "not the headline"
    assert all(sign.seen in page for sign in measured.engines[0].masking)


def test_it_goes_beside_the_bundle_and_replaces_nothing_of_others(
    trained_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unasked(*_: Any, **__: Any) -> None:
        raise AssertionError("the work is not to begin")

    monkeypatch.setattr(robustness, "robustness_of", unasked)
    bundle = tmp_path / "bundle"
    bundle.symlink_to(trained_bundle.path)
    beside = trained_bundle.path.with_name(f"{trained_bundle.path.name}-report")
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")
    try:
        assert run(["report", str(bundle), "--overwrite"]) == 2
        assert f"holds no {command.REPORT}, so it is not replaced" in capsys.readouterr().err
        assert (beside / "thesis.txt").read_text() == "mine"
    finally:
        (beside / "thesis.txt").unlink()
        beside.rmdir()
    twice = ["report", str(bundle), "--engine", "onnxruntime", "--engine", "onnxruntime"]
    assert run(twice) == 2
    monkeypatch.undo()
    monkeypatch.setattr(robustness, "verify_bundle", unasked)
    for other in ("openvin", "onnxruntime:int8"):  # said before the first engine is attacked
        assert run([*twice[:-1], other]) in (2, 3)
        assert other.partition(":")[2] in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(["report", str(bundle)]) == 4


@pytest.mark.parametrize("family", ["dense ViT", "token experts"])
def test_other_families_have_a_page_too(
    family: str, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: CUT[:1])
    _, bundle = families[family]
    out = tmp_path / "out"
    command = ["report", str(bundle.path), "--images", "12", "--out", str(out), "--no-card"]
    code = run([*command, "--allow-fragile"])
    assert code in (0, 6)
    entry = Entry.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    assert entry.advmoe.certified.certified is None
    assert "Certified routes: none known" in (out / "report.html").read_text(encoding="utf-8")
    if family == "dense ViT":
        assert {c.target for c in entry.advmoe.convergence} == {"model"}


@pytest.fixture
def own_bundle(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Report on a copy of the bundle, ``tmp_path / "bundle"``, on few images and by one attack."""
    shutil.copytree(trained_bundle.path, tmp_path / "bundle")
    monkeypatch.setattr(convergence_module, "STEPS", (2,))

    def report(*options: str) -> int:
        target = ["--out", str(tmp_path / "out"), "--overwrite"]
        return run(["report", str(tmp_path / "bundle"), "--images", "12", *target, *options])

    return report


def test_the_card_says_what_was_measured_last(
    own_bundle: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, card = tmp_path / "bundle", tmp_path / "bundle" / CARD
    before, files = card.read_text(), sorted(bundle.rglob("*"))
    assert own_bundle("--no-card") == 0
    assert card.read_text() == before
    capsys.readouterr()
    assert own_bundle("--json") == 0
    assert json.loads(capsys.readouterr().out)["card"] == str(card)
    first, manifest = card.read_text(), (bundle / MANIFEST).read_bytes()
    assert first.startswith(before.rstrip())
    report = read_entry(tmp_path).advmoe.engines[0]
    for share, name in (
        (report.clean_accuracy.engine, "clean"),
        (report.attacks[0].robust_accuracy.engine, "PGD on the model"),
        (report.attacks[1].robust_accuracy.engine, "PGD through the routes"),
        (report.robust_accuracy.engine, "robust: all of them"),
    ):
        assert re.search(rf"^\| \**{name}\** \| {100 * share:.2f} % \|", first, re.MULTILINE)
    low, high = report.robust_interval
    assert f"{100 * low:.2f} to {100 * high:.2f} %" in first
    assert "On 12 test images of `digits`, linf, epsilon 0.05" in first
    assert "`--engine onnxruntime`, fp32: passed" in first
    assert own_bundle() == 0  # the same figures: not a byte changes
    assert (card.read_text(), (bundle / MANIFEST).read_bytes()) == (first, manifest)
    assert own_bundle("--epsilon", "0.01") == 0
    assert "epsilon 0.01 " in card.read_text()
    assert "epsilon 0.05 in [0, 1] pixels" in before  # the threat model of the training stays
    assert card.read_text().count("## Measured by `advmoe report`") == 1
    assert sorted(bundle.rglob("*")) == files
    assert run(["inspect", str(bundle)]) == 0
    assert run(["verify", str(bundle), "--images", "4"]) == 0


def test_a_bundle_that_cannot_be_written_still_has_its_report(
    own_bundle: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = tmp_path / "bundle"
    before = {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}
    monkeypatch.setattr(card_module.os, "access", lambda *_: False)
    assert own_bundle("--json") == 5
    printed = capsys.readouterr()
    assert json.loads(printed.out)["card"] is None
    (line,) = printed.err.splitlines()[-1:]
    assert re.search("the report is written.*permission denied.*--no-card", line)
    assert read_entry(tmp_path).advmoe.engines[0].passed
    assert {file: file.read_bytes() for file in before} == before
    assert own_bundle("--no-card") == 0


def test_what_is_tampered_with_meanwhile_is_not_sealed(
    own_bundle: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph, real = tmp_path / "bundle" / MODEL, page_module.write_report

    def tampering(*given: Any, **named: Any) -> None:
        real(*given, **named)
        graph.write_bytes(graph.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(page_module, "write_report", tampering)
    assert own_bundle() == 3
    assert f"{MODEL} is not what was exported" in capsys.readouterr().err
    assert read_entry(tmp_path).advmoe.engines[0].passed
    assert own_bundle() == 3
    assert "Measured by" not in (tmp_path / "bundle" / CARD).read_text()


def read_entry(folder: Path) -> Entry:
    text = (folder / "out" / "report.json").read_text(encoding="utf-8")
    return Entry.model_validate_json(text)


def test_pictures_keep_their_pixels() -> None:
    grey, colour = np.full((1, 8, 8), 0.5, np.float32), np.ones((3, 8, 8), np.float32)
    for image in (grey, colour):
        assert picture(image).startswith("data:image/png;base64,iVBOR")
