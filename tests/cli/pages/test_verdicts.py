"""Verdicts on pages and in tables: what was measured, told as it is."""

import re

import pytest

from advmoe_deploy import api
from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.redundancy import FixedExpertRow
from advmoe_deploy.analysis.shares import Difference, Share
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.commands.verify import refusal
from advmoe_deploy.cli.tables.bundle import robust_verdict as robust_verdict_line
from advmoe_deploy.cli.verdicts.analysis import conclusions
from advmoe_deploy.cli.verdicts.evaluation import evaluation_verdict
from advmoe_deploy.cli.verdicts.latency import latency_verdict, macs_verdict, tone_of
from advmoe_deploy.cli.verdicts.robust import (
    export_verdict,
    model_only,
    robust_verdict,
    withstands,
)
from advmoe_deploy.cli.verdicts.said import Said, percent
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.reports import LatencyRatio, LatencyReport, Macs, Pair
from advmoe_deploy.specs import ThreatModel
from tests.cli.pages.shown import Pages, entry_of


def test_all_but_one_is_not_all() -> None:
    shares = (0, 1 / 10_000, 1 / 3, 1999 / 2000, 9999 / 10_000, 1)
    assert [percent(share) for share in shares] == [
        "0.0 %", "0.01 %", "33.3 %", "99.95 %", "99.99 %", "100.0 %"
    ]  # fmt: skip
    assert [percent(share) for share in (1e-18, 1 - 1e-12)] == ["0.0 %", "100.0 %"]


def ratio(
    a: str, batch: int, value: float, low: float, high: float, on: str = "onnxruntime"
) -> LatencyRatio:
    return LatencyRatio.model_validate(
        {"a": a, "a_engine": on, "b": "moe", "batch": batch, "engine": "onnxruntime",
         "ratio": value, "ci_low": low, "ci_high": high}
    )  # fmt: skip


@pytest.fixture
def profile(tiny_bundle: Bundle) -> LatencyReport:
    return profile_bundle(tiny_bundle, batches=(1,), against=(), n=2, warmup=1)


def test_times_are_told_as_they_are(profile: LatencyReport) -> None:
    ratios = (
        ratio("dense", 1, 2.17, 2.1, 2.2),
        ratio("dense", 8, 2.5, 2.4, 2.6),
        ratio("s-dense", 1, 0.5, 0.49, 0.51),
        ratio("unfused", 1, 1.5, 1.4, 1.6),
        ratio("unfused", 8, 1.0, 0.9, 1.1),
        ratio("unfused", 64, 0.8, 0.7, 0.9),
    )
    dense, smaller, unfused = latency_verdict(profile.model_copy(update={"ratios": ratios}))
    said = "The MoE is 2.17x as fast as the dense network at batch 1 and 2.5x at batch 8"
    assert (dense.text, dense.tone) == (said, "gain")
    assert smaller.text == "The MoE takes 2x the time of S-Dense at batch 1"
    assert smaller.tone == "worse"
    assert unfused.text == (
        "The MoE is 1.5x as fast as computing every expert at batch 1, is neither faster nor "
        "slower than it at batch 8 (0.90x to 1.10x) and takes 1.25x the time of it at batch 64"
    )
    assert unfused.tone == ""
    assert [tone_of(r) for r in ratios[3:]] == ["gain", "", "worse"]
    lowered = profile.rows[0].model_copy(update={"precision": "int8"})
    (alone,) = latency_verdict(profile.model_copy(update={"rows": (*profile.rows, lowered)}))
    assert re.fullmatch(r"An answer takes [\d.]+ ms at batch 1, in the median", alone.text)


def test_what_ran_on_another_engine_is_no_gain_of_routing(profile: LatencyReport) -> None:
    elsewhere = ratio("dense", 1, 3.0, 2.9, 3.1, on="openvino")
    (said,) = latency_verdict(profile.model_copy(update={"ratios": (elsewhere,)}))
    assert said.text == (
        "The MoE on onnxruntime fp32 is 3x as fast as the dense network on openvino fp32 at batch 1"
    )
    assert said.tone == tone_of(elsewhere) == ""


def test_multiply_accumulates_are_a_gain_only_where_they_are_fewer() -> None:
    macs = Macs(selected=4, router=1, executed=5, unfused=9, dense=10, s_dense=4)
    assert macs_verdict(macs).tone == "gain"
    assert macs_verdict(macs.model_copy(update={"executed": 12})).tone == ""


def test_robustness_is_told_as_it_is(pages: Pages) -> None:
    measured = entry_of(pages["report"].parent.parent).advmoe
    report = measured.engines[0]
    kept = report.robust_accuracy.engine
    said = export_verdict(report)
    assert said.text == f"Robust accuracy survived the export: {kept:.1%} → {kept:.1%}".replace(
        "%", " %"
    )
    assert said.tone == ""
    undecided = export_verdict(report.model_copy(update={"verdict": "undecided"}))
    assert undecided.text.startswith("Undecided: 20 images cannot tell")
    assert report.reference
    fragile, unknown = (
        report.reference.model_copy(update={"verdict": verdict})
        for verdict in ("failed", "undecided")
    )
    none = export_verdict(report.model_copy(update={"reference": fragile}))
    assert none.text.startswith("The reference is not robust, so there is nothing to preserve")
    unsure = export_verdict(report.model_copy(update={"reference": unknown}))
    assert unsure.text.startswith("Undecided: these images cannot tell whether the reference")
    tones = [said.tone for said in (undecided, unsure, none)]
    assert tones == ["unsure", "unsure", "worse"]
    everywhere = withstands(report.model_copy(update={"threat": ThreatModel(epsilon=8 / 255)}))
    assert "at l-inf epsilon 8/255 (95 %" in everywhere.text
    _, everything, *_ = robust_verdict(measured)
    assert f"of 20 test images withstand all {len(report.attacks)} attacks" in everything.text
    alone = model_only(report)
    assert alone is not None
    assert alone.title == "pgd-5"
    page = pages["report"].read_text(encoding="utf-8")
    headline, footnote = page.index("robust accuracy under all"), page.index("* pgd-5 on the model")
    assert headline < footnote


@pytest.mark.parametrize(
    ("lost", "begins", "line"),
    [
        ("robust_drop", "Robust accuracy was lost: ", "ROBUSTNESS WAS LOST"),
        ("clean_drop", "Accuracy was lost: ", "ACCURACY WAS LOST"),
    ],
)
def test_a_loss_is_told_by_the_rule_that_found_it(
    lost: str, begins: str, line: str, pages: Pages
) -> None:
    """What was gained makes up for nothing where images are counted, and for the rest elsewhere."""
    report = entry_of(pages["report"].parent.parent).advmoe.engines[0]
    assert report.consistency.same_function
    assert report.reference
    unknown = report.reference.model_copy(update={"verdict": "undecided"})
    drop = Drop(images=200, only_reference=5, only_engine=5).report(0.5, counted=True)
    failed = report.model_copy(update={"verdict": "failed", lost: drop, "reference": unknown})
    count = "5 of 200 images only the reference gets right"
    said = export_verdict(failed)
    assert said.text.startswith(f"{begins}{count} (")
    assert said.text.endswith("), more than the 0.5 points allowed")
    assert said.tone == "worse"
    assert robust_verdict_line(failed) == f"{line}: {count} (limit: 0.5 points)"
    assured = failed.model_copy(update={"reference": report.reference})
    assert count in str(refusal(assured))
    assert "fell by" not in str(refusal(assured))
    other = failed.consistency.model_copy(update={"exact": False})
    lowered = assured.model_copy(update={"consistency": other})
    assert "reference gets right" not in export_verdict(lowered).text
    assert "accuracy fell by 0.00 points" in str(refusal(lowered))
    won = Drop(images=200, only_reference=0, only_engine=1).report(0.5)
    gained = lowered.model_copy(update={"clean_drop": won})
    assert "clean accuracy rose by 0.50 points" in str(refusal(gained))


def test_a_reference_that_is_not_robust_is_told_from_a_loss(pages: Pages) -> None:
    report = entry_of(pages["report"].parent.parent).advmoe.engines[0]
    assert report.reference

    def line(**update: object) -> str:
        return robust_verdict_line(report.model_copy(update=update))

    fragile, unknown = (
        report.reference.model_copy(update={"verdict": verdict})
        for verdict in ("failed", "undecided")
    )
    assert line() == "robustness survived the export (limit: 0.5 points)"
    assert line(verdict="undecided") == "UNDECIDED: 20 images cannot tell (limit: 0.5 points)"
    assert line(verdict="undecided", reference=unknown) == (
        "UNDECIDED: 20 images cannot tell whether the reference is robust"
    )
    assert line(reference=unknown, allow_fragile=True).startswith("robustness survived")
    assert line(verdict="failed", reference=fragile).startswith("THE REFERENCE IS NOT ROBUST")
    assert line(reference=fragile, allow_fragile=True).startswith("nothing was lost, but the refer")
    nothing = {"reference": None, "robust_accuracy": Pair(reference=0.0, engine=0.0)}
    assert line(**nothing).startswith("nothing was lost, for nothing withstands these attacks")
    said = export_verdict(report.model_copy(update=nothing))
    assert said.text == "Nothing withstands these attacks, before or after: 0.0 % → 0.0 %"
    assert said.tone == "worse"


def test_steps_that_still_break_more_are_said(pages: Pages) -> None:
    measured = entry_of(pages["report"].parent.parent).advmoe
    some = {"images": 40, "robust_accuracy": 0.6, "low": 0.446}
    first = measured.convergence[0].model_copy(update=some)
    last = first.model_copy(update={"steps": 50})

    def said(fell: int, stood: int = 0) -> tuple[str, str]:
        share = first.robust_accuracy - (fell - stood) / first.images
        update = {"robust_accuracy": share, "fell": fell, "stood": stood}
        rows = (first, last.model_copy(update=update))
        sentence = robust_verdict(measured.model_copy(update={"convergence": rows}))[-1]
        return sentence.text, sentence.tone

    assert said(0) == (
        "50 steps of PGD instead of 2 break no more: the attack has converged", ""
    )  # fmt: skip
    # Of the same images: what is left is within the interval of what stood before.
    assert "break 12.5 points more: the true figure is lower" in said(5)[0]
    assert said(5)[1] == "unsure"
    assert said(1)[0].endswith("break 2.5 points more at most, within chance")
    assert said(6, 4)[0].endswith("break 5.0 points more at most, within chance")


def test_an_analysis_draws_conclusions(pages: Pages) -> None:
    folder = pages["analysis"].parent
    report = AnalysisReport.model_validate_json((folder / "analysis.json").read_text())
    texts = [said.text for said in conclusions(report)]
    assert report.changes
    moved = next(e for e in report.changes if e.epsilon == 0.05 and e.attack.target == "router")
    page = pages["analysis"].read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert all(text in page.split("<main>")[0].replace("&#39;", "'") for text in texts)
    assert "All experts are used: " in texts[1]
    assert "No answer is guaranteed" in "".join(texts)
    assert page.count("no useful bound") == 3
    count = round(20 * moved.route_change.value)
    assert f"sends {count} of 20 images to other experts" in page
    assert page.count("<img ") == 2 * min(count, 12)
    assert not re.search(r"\de\+?\d\d", page.split("<main>")[1].split("<svg")[0])
    assert all(part.bound and part.bound > 1e6 for part in report.lipschitz or ())
    assert report.routes
    (use,) = report.routes
    collapsed = use.model_copy(update={"effective_routes": 1.0})
    said = conclusions(report.model_copy(update={"routes": (collapsed,)}))[1]
    assert said.text == "Routing has collapsed onto one expert: 1.00 effective routes of 2"
    assert said.tone == "worse"
    few = use.model_copy(update={"effective_routes": 1.0, "load": (4, 0)})
    said = conclusions(report.model_copy(update={"routes": (few,)}))[1]
    assert said.text.startswith("4 choices of experts cannot tell how evenly they are used: 1.00")
    assert said.tone == "unsure"
    by_chance = use.model_copy(update={"class_information": use.chance_information})
    said = conclusions(report.model_copy(update={"routes": (by_chance,)}))[2]
    assert said.text.startswith("Routes follow the class no more than chance explains")
    assert "under the stronger of PGD and APGD" in page.split("<main>")[1]


def test_experts_are_redundant_only_where_that_is_shown(pages: Pages) -> None:
    file = pages["analysis"].parent / "analysis.json"
    report = AnalysisReport.model_validate_json(file.read_text())

    def said(low: float, high: float) -> str:
        assert report.experts
        lost = Difference(value=(low + high) / 2, low=low, high=high)
        second = report.experts.second[-1].model_copy(update={"lost": lost})
        experts = report.experts.model_copy(update={"second": (second,)})
        texts = [each.text for each in conclusions(report.model_copy(update={"experts": experts}))]
        return next(text for text in texts if "with their best expert" in text)

    assert said(0.07, 0.48).startswith("Experts do not stand in for each other: ")
    assert said(-0.01, 0.04).startswith("Experts are redundant: ")
    assert said(-0.1, 0.1).startswith("Whether experts stand in for each other, 20 images do not")
    assert said(-0.1, 0.1).endswith("-10.0 to +10.0 points apart")


def test_routing_is_judged_by_the_stronger_attack(pages: Pages) -> None:
    file = pages["analysis"].parent / "analysis.json"
    report = AnalysisReport.model_validate_json(file.read_text())
    assert report.experts

    def row(expert: int | None, pgd: float, apgd: float) -> FixedExpertRow:
        clean, robust, other = (
            Share(value=v, low=v - 0.05, high=v + 0.05) for v in (0.9, pgd, apgd)
        )
        return FixedExpertRow(
            expert=expert, clean_accuracy=clean, robust_accuracy=robust, apgd_accuracy=other
        )

    def worth(routed_by_apgd: float) -> Said:
        alone = (row(0, 0.3, 0.35), row(1, 0.45, 0.4))
        rows = {"fixed": alone, "gated": row(None, 0.8, routed_by_apgd)}
        assert report.experts
        experts = report.experts.model_copy(update=rows)
        found = conclusions(report.model_copy(update={"experts": experts}))
        return next(said for said in found if said.text.startswith("Routing "))

    assert worth(0.7).tone == "gain"
    assert worth(0.4).text == (
        "Routing gains no robustness beyond chance: the stronger of PGD and APGD leaves expert 1 "
        "alone 40.0 %, the routed model 40.0 %"
    )
    assert worth(0.1).tone == "worse"


def test_an_evaluation_says_that_nothing_was_attacked(trained_bundle: Bundle) -> None:
    report = api.evaluate(trained_bundle, images=40)
    first, *_, last = evaluation_verdict(report)
    assert first.text.endswith("of 40 clean test images are right")
    assert last.text == "Nothing was attacked: this says nothing about robustness"
    assert {said.tone for said in evaluation_verdict(report)} == {""}
