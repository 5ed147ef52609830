"""A lower precision is taken where routes and accuracy allow it, and the report says where not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.graph.fuse import fuse
from advmoe_deploy.export.precision.attacked import with_accuracy
from advmoe_deploy.export.precision.gate import (
    AccuracyGate,
    AnsweredImages,
    Findings,
    GateLimits,
    precision_report,
    run_gate,
)
from advmoe_deploy.export.precision.search import Precisions, choose_precisions
from advmoe_deploy.export.request import targets_of
from advmoe_deploy.export.targets import Target, require_supported
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.answers import Answers
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.plan import Plan
from advmoe_deploy.reports import LayerParity, OwnAttack, Pair, ParityReport, PrecisionReport
from advmoe_deploy.reports.drops import ACCURACIES, Accuracy
from advmoe_deploy.runtime.openvino.engine import OpenVinoEngine, has_precision
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.runtime.select import compute_dtypes_of, open_runner
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.specs import ComputeDtype, Precision
from tests.conftest import assert_nothing_left, write_run
from tests.families import Families, spec_of

IMAGES = np.random.default_rng(1).random((24, 1, 8, 8), dtype=np.float32)
needs_bf16 = pytest.mark.skipif(not has_precision("bf16"), reason="this CPU has no bf16")


LADDER = ("int8", "fp32")


def findings(agreement: float = 1.0, lost: float = 0.0, rows: int = 1000) -> Findings:
    """Return what an accuracy gate of 1,000 images may find: ``lost`` is the drop in points."""
    layer = LayerParity(
        layer="router",
        rows=rows,
        flips=round(rows * (1 - agreement)),
        close_calls=0,
        close_flips=0,
        smallest_margin=0.1,
        expert_load=(500, 500),
    )
    parity = ParityReport(
        images=1000,
        compared=1000,
        non_finite=0,
        max_abs_logit_diff=0.1,
        max_relative_logit_diff=0.1,
        max_abs_weight_diff=0,
        rounding=0,
        logit_tolerance=1e-5,
        route_agreement=agreement,
        margin=1e-4,
        layers=(layer,),
    )
    accuracy = Pair(reference=0.5, engine=0.5 - lost / 100)
    drops: dict[Accuracy, Drop] = {"clean": drop(1000), "robust": drop(1000, round(10 * lost))}
    clean = Pair(reference=0.8, engine=0.8)
    return Findings(parity, 1.0, lost, clean, accuracy, 1.0, drops=drops)


def drop(images: int, only_reference: int = 0, only_engine: int = 0) -> Drop:
    return Drop(images=images, only_reference=only_reference, only_engine=only_engine)


@pytest.mark.parametrize("name", ["clean", "robust", "own_attack"])
def test_a_drop_is_refused_where_chance_hardly_explains_it(name: Accuracy) -> None:
    def complaint(lost: int, won: int, images: int = 200) -> str:
        return replace(findings(), drops={name: drop(images, lost, won)}).complaint

    failed = complaint(12, 1)
    assert failed.startswith(f"{ACCURACIES[name]} falls by 5.50 points (1.89 to 9.00, ")
    assert failed.endswith("95 % interval) on 200 images, p = 0.0034")
    assert complaint(3, 0)  # p = 1/8, one-sided
    assert complaint(30, 22, images=1000)  # 0.8 points, p = 0.17
    assert not complaint(2, 0)  # p = 1/4: of 200 images, one point is no more than chance
    assert not complaint(6, 4)
    assert not complaint(40, 10, images=10_000)  # 0.3 points, and certainly lost
    assert not complaint(0, 20)


def test_a_drop_that_was_found_under_its_own_attack_is_told_apart() -> None:
    pair = Pair(reference=0.5, engine=0.48)
    own = OwnAttack(robust_accuracy=pair, least_drop=0.6, most_drop=3.4)
    found = replace(findings(), own_attack=own, drops={"own_attack": drop(1000, 26, 6)})
    assert found.complaint == (
        "robust accuracy under an attack of its own falls by 2.00 points (0.88 to 3.11, "
        "95 % interval) on 1,000 images, p = 0.00054"
    )


def test_what_was_lost_is_recorded_with_its_verdict() -> None:
    drops: dict[Accuracy, Drop] = {
        "clean": drop(1000, 1, 1),
        "robust": drop(1000, 5, 4),
        "own_attack": drop(1000, 0, 12),
    }
    noise = AccuracyGate(AnsweredImages(IMAGES, Answers(np.zeros((24, 2), np.float32))), "noise")
    report = precision_report(noise, {}, replace(findings(), drops=drops))
    verdicts = {name: each.verdict for name, each in report.drops.items()}
    assert verdicts == {"clean": "passed", "robust": "undecided", "own_attack": "passed"}
    assert {each.max_drop for each in report.drops.values()} == {report.max_drop} == {0.5}
    needed = drops["robust"].images_needed(0.5)
    said = "\n".join(report.findings())
    assert "clean accuracy: a drop of 0.00 points (-0.34 to 0.34, 95 % interval)" in said
    assert f"undecided (limit 0.5 points): {needed:,} images would decide" in said
    assert said.count("more than chance explains are right here alone") == 1
    stored = report.model_dump(mode="json")
    assert PrecisionReport.model_validate(stored) == report
    older = {k: v for k, v in stored.items() if k not in ("drops", "attacks", "pathway_images")}
    assert PrecisionReport.model_validate(older).drops == {}
    assert "would decide" not in "\n".join(PrecisionReport.model_validate(older).findings())


def test_answers_that_depend_on_the_batch_are_refused() -> None:
    assert replace(findings(), batches="in batches of 3, ...").complaint == "in batches of 3, ..."


def all_int8(plan: Plan) -> Precisions:
    return {segment.name: "int8" for segment in plan.segments}


def low(precisions: Precisions) -> set[str]:
    return {name for name, precision in precisions.items() if precision == "int8"}


def test_everything_is_lowered_where_nothing_is_lost(tiny_bundle: Bundle) -> None:
    plan = tiny_bundle.manifest.plan

    def trial(_: Precisions) -> Findings:
        return findings()

    choice = choose_precisions(plan, all_int8(plan), LADDER, trial, trial)
    assert low(choice.precisions) == {"router", "router.expert-0", "router.expert-1"}
    assert not choice.raised
    assert choice.lowered is None


def test_a_router_whose_routes_differ_stays_in_fp32(tiny_bundle: Bundle) -> None:
    def trial(precisions: Precisions) -> Findings:
        return findings(agreement=0.998 if precisions["router"] == "int8" else 1.0)

    plan = tiny_bundle.manifest.plan
    choice = choose_precisions(plan, all_int8(plan), LADDER, trial, trial)
    assert low(choice.precisions) == {"router.expert-0", "router.expert-1"}
    assert choice.raised == {
        "router": "99.80 % of the clear routes of a layer agree, less than 99.90 %"
    }
    assert choice.lowered is not None
    assert choice.lowered.parity.route_agreement == 0.998


def test_how_many_routes_differ_is_up_to_whoever_exports(tiny_bundle: Bundle) -> None:
    def trial(_: Precisions) -> Findings:
        return replace(findings(agreement=0.95), limits=GateLimits(least_route_agreement=0.95))

    plan = tiny_bundle.manifest.plan
    choice = choose_precisions(plan, all_int8(plan), LADDER, trial, trial)
    assert "router" in low(choice.precisions)
    fewer = replace(findings(agreement=0.949), limits=GateLimits(least_route_agreement=0.95))
    assert fewer.complaint == "94.90 % of the clear routes of a layer agree, less than 95.00 %"
    nearly = findings(agreement=0.99996, rows=100_000)
    nearly = replace(nearly, limits=GateLimits(least_route_agreement=1))
    assert nearly.complaint == "99.99 % of the clear routes of a layer agree, less than 100.00 %"


def test_every_target_is_told_how_many_routes_may_differ() -> None:
    build = BuildOptions()
    wanted: tuple[Precision, ...] = ("fp32", "int8")
    told = targets_of("onnx", wanted, build, onnx_only=False, least_route_agreement=0.0)
    assert [target.least_route_agreement for target in told] == [0.0, 0.0]
    untold = targets_of("onnx", wanted, build, onnx_only=False)
    assert [target.least_route_agreement for target in untold] == [0.999, 0.999]


def test_int8_is_raised_by_steps(tiny_bundle: Bundle) -> None:
    tried: list[Precision] = []

    def trial(precisions: Precisions) -> Findings:
        tried.append(precisions["router"])
        return findings(agreement=0.99 if precisions["router"] == "int8" else 1.0)

    plan = tiny_bundle.manifest.plan
    choice = choose_precisions(plan, all_int8(plan), ("int8", "bf16", "fp32"), trial, trial)
    assert tried == ["int8", "bf16"]
    assert choice.precisions["router"] == "bf16"
    assert low(choice.precisions) == {"router.expert-0", "router.expert-1"}


def test_the_most_sensitive_segments_are_raised_first(families: Families) -> None:
    _, bundle = families["block experts"]
    plan = bundle.manifest.plan
    experts = [step.segments for step in plan.steps if step.kind == "experts"]
    assert len(experts) == 2
    points = {"trunk-0": 0.1, "trunk-1": 0.05, "trunk-2": 0.05, experts[0][0]: 0.2}
    points[experts[1][0]] = 0.6

    def trial(precisions: Precisions) -> Findings:
        return findings(lost=sum(points.get(name, 0) for name in low(precisions)))

    choice = choose_precisions(plan, all_int8(plan), LADDER, trial, trial)
    assert choice.raised.keys() == set(experts[1])  # 1.0 points were lost, 0.4 are left
    assert (
        choice.raised[experts[1][0]]
        == f"robust accuracy falls by {drop(1000, 10).report(0.5).figures()}"
    )
    assert choice.findings.robust_accuracy == Pair(reference=0.5, engine=0.5 - 0.4 / 100)


def test_a_model_that_stands_no_lower_precision_is_refused(tiny_bundle: Bundle) -> None:
    def trial(precisions: Precisions) -> Findings:
        return findings(lost=2.0 if low(precisions) else 0.0)

    plan = tiny_bundle.manifest.plan
    with pytest.raises(CheckFailedError, match=r"nothing of this model can run in int8: robust"):
        choose_precisions(plan, all_int8(plan), LADDER, trial, trial)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["conv experts", "token experts", "VGG"])
def test_graphs_of_a_plan_cut_by_precision_answer_alike(
    families: Families, family: str, split: bool
) -> None:
    _, bundle = families[family]
    plan = bundle.manifest.plan
    graphs = {s.name: onnx.load_model(bundle.file(s.file)) for s in plan.segments}
    experts = {name for step in plan.steps if step.kind == "experts" for name in step.segments}
    precisions: dict[str, ComputeDtype] = {
        name: "bf16" if split and name in experts else "fp32" for name in graphs
    }
    fused = fuse(plan, graphs, precisions, folder="engines", form="gather", for_host=["router"])
    assert (len(fused.graphs) > 1) == (split or family == "VGG")  # pooling wants rows
    sources = {name: graph.SerializeToString() for name, graph in fused.graphs.items()}
    with (
        PlanRunner(
            fused.plan,
            sources,
            bundle.manifest.model.image_shape,
            routes=plan.routes,
            open_engine=lambda _, graph: OpenVinoEngine(graph, threads=1),
        ) as runner,
        open_runner(bundle, threads=1) as portable,
    ):
        for images in (IMAGES, IMAGES[:1]):
            answer, expected = runner.infer(images), portable.infer(images)
            np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=3e-5)
            for layer, ids in expected.expert_ids.items():
                np.testing.assert_array_equal(answer.expert_ids[layer], ids)
                np.testing.assert_allclose(
                    answer.weights[layer], expected.weights[layer], rtol=0, atol=1e-5
                )


def test_without_a_threat_model_only_clean_accuracy_is_examined(
    tiny_run: Path, tiny_bundle: Bundle
) -> None:
    _, model = load_checkpoint(tiny_run / "model")
    parity = AnsweredImages(IMAGES, reference_answers(model, IMAGES))
    gate = with_accuracy(AccuracyGate(parity, "noise"), model, load_dataset("digits"), None)
    with open_runner(tiny_bundle, threads=1) as runner:
        found, unlabelled = run_gate(gate, runner), run_gate(AccuracyGate(parity, "noise"), runner)
    assert found.clean_accuracy is not None
    assert found.clean_accuracy.engine == found.clean_accuracy.reference
    assert found.robust_accuracy is found.attacked_route_agreement is None
    assert found.complaint == unlabelled.complaint == ""
    changed = replace(unlabelled, prediction_agreement=0.99)
    assert changed.complaint == "1.00 % of the predictions differ"
    assert replace(found, prediction_agreement=0.99).complaint == ""  # accuracy is what counts


def test_bf16_is_taken_around_int8_where_it_is_there_already() -> None:
    assert compute_dtypes_of({"a": "int8", "b": "fp32"}) == {"a": "fp32", "b": "fp32"}
    mixed: Precisions = {"a": "int8", "b": "bf16", "c": "fp32"}
    assert compute_dtypes_of(mixed) == {"a": "bf16", "b": "bf16", "c": "fp32"}


@needs_bf16
@pytest.mark.parametrize("family", ["block experts", "token experts"])
def test_bf16_bundles_keep_their_routes(family: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", spec_of(family))
    target = Target("openvino", "bf16")
    export_run(run, tmp_path / "bundle", data="random:64", targets=[target])
    bundle = open_bundle(tmp_path / "bundle")
    (engines,) = bundle.manifest.engines
    assert bundle.manifest.precision == "bf16"
    assert set(engines.segments.values()) <= {"fp32", "bf16"}
    assert "bf16" in engines.segments.values()
    assert engines.check is not None
    assert {n for n, p in engines.segments.items() if p == "fp32"} == engines.check.raised.keys()
    assert engines.parity.route_agreement >= 0.999
    assert engines.check.holdout_images == 200
    with open_runner(bundle, "onnxruntime", threads=1) as exact:
        expected = exact.infer(IMAGES)
    for name in ("openvino", "openvino-plan"):
        with open_runner(bundle, name, threads=1) as runner:
            assert (runner.name, runner.precision) == (name, "bf16")
            answer = runner.infer(IMAGES)
        difference = np.abs(answer.logits - expected.logits).max()
        assert 1e-5 < difference < 0.2 * np.abs(expected.logits).max()


@pytest.mark.parametrize(
    "target", [Target("onnxruntime", "bf16"), Target("onnxruntime", "fp16")], ids=str
)
def test_what_no_machine_computes_is_a_usage_error(tmp_path: Path, target: Target) -> None:
    with pytest.raises(UsageError, match=rf"onnxruntime does not compute in {target.precision}"):
        require_supported(target)
    run = tmp_path / "none"
    with pytest.raises(UsageError):  # before the run is looked at
        export_run(run, tmp_path / "bundle", targets=[target])
    assert_nothing_left(tmp_path / "bundle")
