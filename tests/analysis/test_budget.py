"""Which sections, on how many images, fit into a time."""

from pathlib import Path

import pytest

from advmoe_deploy.analysis.analyze import AnalysisSettings, analyze
from advmoe_deploy.analysis.budget import FEWEST, BudgetPlan, plan_within
from advmoe_deploy.models.stored import open_stored
from tests.conftest import Notes

PASSES = {"routes": 1, "changes": 60, "experts": 39}


@pytest.mark.parametrize(
    ("seconds", "plan"),
    [
        # Of 80 % of the time; a pass with an image takes 0.01 s, all sections 1 s an image.
        (1000.0, BudgetPlan(200, ("routes", "changes", "experts"), ())),
        (50.0, BudgetPlan(40, ("routes", "changes", "experts"), ())),
        (10.0, BudgetPlan(8, ("routes", "changes", "experts"), ())),
        (9.0, BudgetPlan(18, ("routes", "experts"), ("changes",))),
        (4.0, BudgetPlan(8, ("routes", "experts"), ("changes",))),
        (3.0, BudgetPlan(200, ("routes",), ("changes", "experts"))),
        (0.0, BudgetPlan(FEWEST, ("routes",), ("changes", "experts"))),
    ],
)
def test_the_most_that_fits(seconds: float, plan: BudgetPlan) -> None:
    assert plan_within(seconds, 0.01, PASSES, 200) == plan


def test_what_is_less_than_asked_for_is_said() -> None:
    assert BudgetPlan(200, ("routes",), ()).notes(200, 60) == ()
    few, left_out = BudgetPlan(40, ("routes",), ("changes",)).notes(200, 60)
    assert few == "the budget of 60 s is for 40 of 200 images"
    assert left_out.endswith("even for 8 images: changes")


def test_an_analysis_keeps_to_its_budget(tiny_run: Path) -> None:
    heard = Notes()
    settings = AnalysisSettings(sections=("routes", "experts"), images=50, steps=5, budget=0.0)
    report = analyze(open_stored(tiny_run), settings, progress=heard)
    assert report.images == FEWEST
    assert report.routes is not None
    assert report.experts is None
    assert list(report.notes) == heard.notes
    assert heard.notes[0] == "the budget of 0 s is for 8 of 50 images"
    assert heard.notes[1].endswith("experts")
    whole = analyze(
        open_stored(tiny_run), AnalysisSettings(sections=("routes",), images=50, budget=1e6)
    )
    assert (whole.images, whole.notes) == (50, ())
