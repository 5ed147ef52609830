"""Verdicts: what an engine lost, whether the images decide it, and what is said beside it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.progress import Silent
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.examples import convergence as convergence_module
from advmoe_deploy.verify.findings import Finding
from advmoe_deploy.verify.trial import Sides
from advmoe_deploy.verify.verdict import chance_of, judge
from tests.analysis.toy_routes import THREAT, corners
from tests.toys import LinearClassifier, toy_spec


def trial(images: int, only_reference: int, only_engine: int) -> Any:
    """A trial whose images are all right on both sides, but for so many."""
    reference, engine = np.ones(images, bool), np.ones(images, bool)
    engine[:only_reference] = False
    reference[only_reference : only_reference + only_engine] = False
    everyone = np.ones(images, bool)
    return SimpleNamespace(clean=Sides(everyone, everyone), standing=Sides(reference, engine))


@pytest.mark.parametrize(
    ("images", "lost", "gained", "max_drop", "same", "verdict"),
    [
        (400, 2, 0, 0.5, True, "passed"),  # the limit itself is allowed
        (10_000, 57, 0, 0.57, True, "passed"),
        (400, 3, 0, 0.5, True, "failed"),
        (400, 3, 3, 0.5, True, "failed"),  # what was gained makes up for nothing
        (5, 0, 0, 0.0, True, "passed"),
        (400, 0, 0, 0.5, False, "passed"),
        (200, 0, 0, 0.5, False, "undecided"),
        (400, 2, 0, 0.5, False, "undecided"),
        (400, 40, 2, 0.5, False, "failed"),
        (400, 0, 0, 0.0, False, "undecided"),
    ],
)
def test_three_outcomes(
    images: int, lost: int, gained: int, max_drop: float, same: bool, verdict: str
) -> None:
    judgement = judge(trial(images, lost, gained), (), max_drop=max_drop, same_function=same)
    assert judgement.verdict == judgement.robust.verdict == verdict
    assert judgement.warnings == ()
    assert judgement.robust.only_reference == lost


def test_a_finding_fails_whatever_was_lost() -> None:
    found = [Finding(kind="router", message="differs")]
    assert judge(trial(400, 0, 0), found, max_drop=5.0, same_function=False).verdict == "failed"


def test_an_engine_that_looks_more_robust_is_a_warning() -> None:
    judgement = judge(trial(400, 0, 12), (), max_drop=0.5, same_function=False)
    assert judgement.verdict == "passed"
    (warning,) = judgement.warnings
    assert "looks more robust than its reference" in warning


@pytest.mark.parametrize(
    ("images", "standing", "chance", "verdict"),
    [
        (100, 0, 0.1, "failed"),
        (400, 40, 0.1, "failed"),  # what guessing gets
        (100, 10, 0.1, "undecided"),  # its interval ends at 17.4 %
        (5, 0, 0.1, "undecided"),  # a third may stand for all that these say
        (100, 15, 0.1, "undecided"),  # its interval begins at 9.3 %
        (100, 16, 0.1, "passed"),  # at 10.1 %
        (4, 4, 0.1, "passed"),
        (4, 1, 0.1, "undecided"),
        (100, 90, 0.9, "failed"),  # always the same answer
    ],
)
def test_a_reference_without_robustness_has_nothing_to_preserve(
    images: int, standing: int, chance: float, verdict: str
) -> None:
    stands = np.arange(images) < standing
    found = SimpleNamespace(clean=Sides(stands, stands), standing=Sides(stands, stands))
    how = {"max_drop": 0.5, "same_function": True, "chance": chance}
    judged = judge(found, (), **how)  # type: ignore[arg-type]
    assert (judged.verdict, judged.reference.verdict) == (verdict, verdict)
    assert len(judged.warnings) == (verdict != "passed")
    allowed = judge(found, (), allow_fragile=True, **how)  # type: ignore[arg-type]
    assert allowed.verdict == "passed"
    assert allowed.warnings == judged.warnings


def test_a_loss_fails_whatever_is_known_of_the_reference(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, engine = np.arange(20) < 3, np.zeros(20, bool)
    found = SimpleNamespace(clean=Sides(reference, engine), standing=Sides(reference, engine))
    judged = judge(found, (), max_drop=0.5, same_function=True, chance=0.1)  # type: ignore[arg-type]
    assert (judged.verdict, judged.reference.verdict) == ("failed", "undecided")
    monkeypatch.setattr(verify_module, "judge", lambda *_, **__: judged)
    monkeypatch.setattr(
        verify_module, "attack_suite", lambda *_: (AttackSpec(name="pgd", steps=1),)
    )
    assert run(["verify", str(tiny_bundle.path), "--images", "20"]) == 1
    assert "do not ship this bundle" in capsys.readouterr().err.splitlines()[-1]


def test_chance_is_that_of_an_answer_which_no_attack_changes() -> None:
    assert chance_of(np.repeat(np.arange(10), 5), 10) == 0.1
    assert chance_of(np.asarray([0, 0, 0, 1, 2]), 10) == 0.1  # five images say little
    assert chance_of(np.asarray([0, 0, 0, 0, 1]), 10) == 0.8
    assert chance_of(np.repeat([0, 1], [90, 10]), 2) == 0.9


@pytest.mark.parametrize("command", ["verify", "report", "gate"])
def test_what_withstands_nothing_ends_with_1_unless_that_is_allowed(
    command: str,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = (AttackSpec(name="pgd", steps=5), AttackSpec(name="square", steps=5))
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: cut)
    monkeypatch.setattr(convergence_module, "STEPS", (1,))
    listed = tmp_path / "listed.json"
    listed.write_text('{"name": "A", "clean_acc": 0, "autoattack_acc": 0, "eps": 0.3}')
    options = {
        "verify": ["--images", "40", "--epsilon", "0.3"],
        "report": ["--images", "40", "--epsilon", "0.3", "--no-card", "--out", str(tmp_path / "r")],
        "gate": ["--against", str(listed), "--markdown", str(tmp_path / "r.md")],
    }[command]
    asked = [command, str(tiny_bundle.path), *options]
    assert run(asked) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    for said in ("the reference is not robust, so there is nothing to preserve: ", "chance gets"):
        assert said in line
    assert line.endswith("or pass --allow-fragile")
    for page in (*tmp_path.glob("r/report.html"), *tmp_path.glob("r.md")):
        assert "there is nothing to preserve" in page.read_text()
    if command == "report":  # what comes of the flag there, verify does
        return
    assert run([*asked, "--allow-fragile"]) == 0
    assert "there is nothing to preserve" in " ".join(capsys.readouterr().out.split())


def test_too_few_images_are_undecided(
    int8_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engine", "onnxruntime:int8", "--images", "20", "--max-drop", "5"]
    code = run(["verify", str(int8_bundle.path), *options])
    printed = capsys.readouterr()
    assert code == 6
    assert "UNDECIDED: 20 images cannot tell" in printed.out
    assert "images would decide" in printed.err.splitlines()[-1]


def test_convergence_tells_which_images_fell_and_which_stood_again() -> None:
    before_N, stands_N = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]]).bool()
    row = convergence_module._row(AttackSpec(name="pgd", steps=10), stands_N, before_N)
    assert (row.robust_accuracy, row.fell, row.stood) == (0.5, 2, 1)
    weight = torch.zeros(2, 16)
    weight[0, 0] = 1
    model = LinearClassifier(toy_spec(), weight, torch.tensor([0.0, 0.5]))
    x_NCHW, labels_N = corners(0.55, 0.9, 0.1).numpy(), np.array([0, 0, 0])
    rows = convergence_module.convergence(model, x_NCHW, labels_N, THREAT, Silent())
    # Only 0.9 is too far from 0.5 to fall, to however few steps.
    assert {(round(3 * row.robust_accuracy), row.fell, row.stood) for row in rows} == {(1, 0, 0)}
