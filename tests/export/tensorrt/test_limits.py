"""Limits that engines built of a bundle's graphs have to keep."""

from dataclasses import replace
from pathlib import Path

from advmoe_deploy.bundle import GOLDEN, Bundle
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.precision.attacked import with_accuracy
from advmoe_deploy.export.precision.gate import (
    AccuracyGate,
    AnsweredImages,
    Findings,
    GateLimits,
    run_gate,
)
from advmoe_deploy.export.tensorrt.builders import OnCpu, check_set
from advmoe_deploy.export.tensorrt.from_bundle import build_from_bundle
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.golden import read_golden
from advmoe_deploy.runtime.tensorrt.load import graph_files
from advmoe_deploy.specs import ThreatModel
from tests.export.tensorrt.cpu_builder import BATCH, BUILD, CpuBuilder


def test_engines_have_to_keep_as_many_routes_as_their_graphs(
    graphs: Bundle, tmp_path: Path
) -> None:
    fp32, fp16 = graphs.manifest.engines
    assert fp16.check is not None
    check = fp16.check.model_copy(update={"least_route_agreement": 0.75})
    told = (fp32, fp16.model_copy(update={"check": check}))
    source = Bundle(graphs.path, graphs.manifest.model_copy(update={"engines": told}))
    out, builder = tmp_path / "bundle", CpuBuilder()
    built = build_from_bundle(source, out, build=BUILD, precisions=["fp16"], builder=builder)
    engines = built.engine_set("tensorrt", "fp16")
    assert engines is not None
    assert engines.is_built
    assert engines.check is not None
    assert engines.check.least_route_agreement == 0.75


def test_of_a_sample_only_what_chance_does_not_explain_counts(graphs: Bundle) -> None:
    examples = AnsweredImages(*read_golden(graphs, ["router"]))
    plan = graphs.manifest.engines[0].plan
    files = {name: graphs.file(file) for name, file in graph_files(plan).items()}
    with CpuBuilder().runner(plan, files, (1, 8, 8), "fp32") as runner:
        findings = run_gate(AccuracyGate(examples, GOLDEN, limits=GateLimits(sample=True)), runner)
    assert not findings.complaint
    # Of 64; 0.5 % may differ of a thousand, and then 2 of 64 do in 4 % of all cases, 3 in 0.4 %.
    two, three = (replace(findings, prediction_agreement=1 - n / 64) for n in (2, 3))
    assert not two.complaint
    assert three.complaint == "4.69 % of the predictions differ"
    assert replace(two, limits=GateLimits()).complaint == "3.12 % of the predictions differ"
    assert not replace(three, limits=GateLimits(sample=True, predictions=0.05)).complaint

    def flipped(rows: int) -> Findings:
        (layer,) = findings.parity.layers
        layers = (layer.model_copy(update={"flips": rows}),)
        return replace(findings, parity=findings.parity.model_copy(update={"layers": layers}))

    assert not flipped(1).complaint
    assert "of the clear routes of a layer agree" in flipped(2).complaint
    assert not replace(flipped(1), limits=GateLimits(least_route_agreement=0.98)).complaint


def test_tf32_is_attacked_by_its_own_answers(tiny_run: Path, graphs: Bundle) -> None:
    _, model = load_checkpoint(tiny_run / "model")
    examples = AnsweredImages(*read_golden(graphs, ["router"]))
    threat = ThreatModel(epsilon=0.02)
    gate = with_accuracy(AccuracyGate(examples, GOLDEN), model, load_dataset("digits"), threat)
    plan, maker = graphs.manifest.engines[0].plan, OnCpu(BATCH)
    exact, rounded = (
        check_set(graphs.path, plan, gate, maker, "fp32", tf32=tf32) for tf32 in (False, True)
    )
    assert exact.own_attack is None
    assert rounded.own_attack is not None
    assert rounded.own_attack.least_drop <= 0 <= rounded.own_attack.most_drop
