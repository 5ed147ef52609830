"""Tables of a bundle on the terminal, and what they decide by."""

import sys
from typing import Any

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.tables import bundle as tables
from advmoe_deploy.cli.tables import latency as latency_tables
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow, Pair
from advmoe_deploy.specs import ThreatModel
from advmoe_deploy.verify.examples.card import _engine
from advmoe_deploy.verify.findings import ConsistencyReport
from advmoe_deploy.verify.report import ReferenceReport, RobustReport
from advmoe_deploy.verify.verdict import judge_reference
from tests.cli.command_line import Capture


def row(model: Any, p50: float) -> LatencyRow:
    return LatencyRow(
        model=model,
        engine="onnxruntime",
        precision="fp32",
        batch=8,
        threads=2,
        device="cpu",
        n=30,
        warmup=5,
        p50_ms=p50,
        p90_ms=p50,
        p99_ms=p50,
        images_per_s=8000 / p50,
        macs=1_500_000,
    )


def robust_report(
    bundle: Bundle, clean: Drop, robust: Drop, reference: ReferenceReport | None = None
) -> RobustReport:
    accuracy = Pair(reference=0.97, engine=0.96)
    consistency = ConsistencyReport(
        images=100,
        exact=True,
        size_images=64,
        file_images=8,
        accuracy=accuracy,
        prediction_agreement=1.0,
        probability_difference=0.0,
        logit_difference=0.0,
        parity=bundle.manifest.parity,
        findings=(),
        seconds=0.1,
    )
    return RobustReport(
        passed=False,
        verdict="failed",
        engine="onnxruntime",
        data="digits",
        images=100,
        threat=ThreatModel(epsilon=0.1),
        max_drop=0.5,
        clean_accuracy=accuracy,
        robust_accuracy=Pair(reference=0.8, engine=0.7),
        robust_interval=(0.6, 0.8),
        clean_drop=clean.report(0.5, counted=True),
        robust_drop=robust.report(0.5, counted=True),
        reference=reference,
        transferred_accuracy=0.75,
        route_agreement=1.0,
        consistency=consistency,
        warnings=("gradients may be masked",),
        masking=(),
        attacks=(),
        seconds=1.0,
    )


def test_reports_are_tables(capsys: Capture, tiny_bundle: Bundle) -> None:
    ratio = LatencyRatio(
        a="dense",
        a_engine="onnxruntime",
        b="moe",
        batch=8,
        engine="onnxruntime-plan",
        ratio=2.5,
        ci_low=2.4,
        ci_high=2.6,
    )
    rows = (row("moe", 2.0), row("dense", 5.0))
    latency = LatencyReport(rows=rows, ratios=(ratio,), versions={})
    draw_on(sys.stdout, latency_tables.latency_report(latency))
    robust = robust_report(
        tiny_bundle,
        Drop(images=100, only_reference=1, only_engine=0),
        Drop(images=100, only_reference=12, only_engine=2),
    )
    draw_on(sys.stdout, tables.robust_report(robust))
    out = capsys.readouterr().out
    faster = "MoE on onnxruntime-plan fp32 2.50x as fast as dense on onnxruntime fp32"
    assert faster in " ".join(out.split())
    count = "12 of 100 images only the reference gets right"
    assert f"{count}: whether robustness was lost is decided by this" in " ".join(out.split())
    assert "docs/" not in out  # which an installed package has not
    exact = robust.consistency.model_copy(update={"exact": False})
    draw_on(sys.stdout, tables.robust_report(robust.model_copy(update={"consistency": exact})))
    assert count not in capsys.readouterr().out
    said = ("ROBUSTNESS WAS LOST", "0.5 points", "warning: gradients may be masked")
    for text in (
        "5.000",
        "images/s",
        "1.5 M",
        "97.0 %",
        "drop in robust accuracy: 10.00 points",
        *said,
    ):
        assert text in out


def test_routes_that_are_none_or_too_close_do_not_agree_on_a_share(
    capsys: Capture, tiny_bundle: Bundle
) -> None:
    kept = Drop(images=1, only_reference=0, only_engine=0)
    report = robust_report(tiny_bundle, kept, kept)
    (layer,) = report.parity.layers
    close = layer.model_copy(update={"rows": 1, "close_calls": 1})
    for layers, said in (((), "nothing is routed; "), ((close,), "for all are close calls; ")):
        parity = report.parity.model_copy(update={"layers": layers})
        consistency = report.consistency.model_copy(update={"parity": parity})
        seen = report.model_copy(update={"consistency": consistency, "images": 1})
        draw_on(sys.stdout, tables.robust_report(seen))
        out = " ".join(capsys.readouterr().out.split())
        assert said in out
        assert "routes agree" not in out
        assert out.startswith("1 image of digits")
        assert tables.robust_verdict(seen.model_copy(update={"verdict": "undecided"})) == (
            "UNDECIDED: 1 image cannot tell (limit: 0.5 points)"
        )


def test_the_interval_is_set_aside_only_where_robustness_is_decided_by_a_count(
    tiny_bundle: Bundle,
) -> None:
    kept, lost = (Drop(images=100, only_reference=n, only_engine=0) for n in (0, 9))
    weak = judge_reference(np.arange(100) < 12, chance=0.1)
    assert weak.verdict != "passed"
    for clean, robust, reference, decides in (
        (kept, kept, None, True),
        (kept, lost, weak, True),
        (lost, kept, None, False),  # accuracy was lost
        (kept, kept, weak, False),  # nothing to preserve
    ):
        report = robust_report(tiny_bundle, clean, robust, reference)
        assert bool(report.decided_by) == decides
        assert ("decided by this" in _engine(report)) == decides  # on the card


def test_the_load_of_experts_says_whose_it_is(capsys: Capture, tiny_bundle: Bundle) -> None:
    parity = tiny_bundle.manifest.parity
    for data, whose in (("digits", "of these images"), ("random:64", "of this noise")):
        changed = parity.model_copy(update={"data": data})
        manifest = tiny_bundle.manifest.model_copy(update={"parity": changed})
        draw_on(sys.stdout, tables.export_report(Bundle(tiny_bundle.path, manifest)))
        out = " ".join(capsys.readouterr().out.split())
        load = ", ".join(map(str, parity.layers[0].expert_load))
        assert f"got {load} {whose}" in out
        assert "trained on" not in out
