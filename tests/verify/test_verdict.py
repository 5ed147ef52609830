"""Verdicts: what an engine lost, whether the images decide it, and what is said beside it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.verify.findings import Finding
from advmoe_deploy.verify.trial import Sides
from advmoe_deploy.verify.verdict import judge


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
    assert judgement.verdict == verdict
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


def test_too_few_images_are_undecided(
    int8_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engine", "onnxruntime:int8", "--images", "20", "--max-drop", "10"]
    code = run(["verify", str(int8_bundle.path), *options])
    printed = capsys.readouterr()
    assert code == 6
    assert "UNDECIDED: 20 images cannot tell" in printed.out
    assert "images would decide" in printed.err.splitlines()[-1]
