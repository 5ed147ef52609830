"""The page, the JSON and the examples that ``advmoe report`` writes."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli import robustness
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.commands import report as command
from advmoe_deploy.cli.pages.robust_report import picture
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
    arguments += ["--engine", "onnxruntime", "--engine", "onnxruntime-plan", "--json"]
    assert run(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
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
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert f"{entry.robust_acc:.1f} %" in page
    assert all(sign.seen in page for sign in measured.engines[0].masking)
    assert not re.search(r"""(src|href)=["']http""", page), "the page is to need no other file"


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
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(["report", str(bundle)]) == 4


@pytest.mark.parametrize("family", ["dense ViT", "token experts"])
def test_other_families_have_a_page_too(
    family: str, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: CUT[:1])
    _, bundle = families[family]
    out = tmp_path / "out"
    code = run(["report", str(bundle.path), "--images", "12", "--out", str(out), "--json"])
    assert code in (0, 6)
    entry = Entry.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    assert entry.advmoe.certified.certified is None
    assert "Certified routes: none known" in (out / "report.html").read_text(encoding="utf-8")
    if family == "dense ViT":
        assert {c.target for c in entry.advmoe.convergence} == {"model"}


def test_pictures_keep_their_pixels() -> None:
    grey, colour = np.full((1, 8, 8), 0.5, np.float32), np.ones((3, 8, 8), np.float32)
    for image in (grey, colour):
        assert picture(image).startswith("data:image/png;base64,iVBOR")
