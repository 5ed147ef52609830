"""What reads a bundle copes with every family: verify, profile, inspect, serving, batches."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from advmoe_deploy.cli.app import run
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.serving.online.protocol import served_model
from advmoe_deploy.verify.verify import verify_bundle
from tests.families import Families

ROUTED = ("conv experts", "dual model", "token experts")


@pytest.mark.parametrize("family", ROUTED)
def test_verify(families: Families, family: str) -> None:
    _, bundle = families[family]
    report = verify_bundle(bundle, images=60, threads=1, allow_fragile=True)
    assert report.passed
    assert report.parity.passed
    assert {layer.layer for layer in report.parity.layers} == {
        route.layer for route in bundle.manifest.plan.routes
    }
    attacked = [outcome for outcome in report.attacks if outcome.images]
    assert attacked
    for outcome in attacked:
        assert outcome.route_agreement == 1.0
        assert 0 <= outcome.route_flip_rate <= 1


@pytest.mark.parametrize("family", ROUTED)
def test_profile(families: Families, family: str) -> None:
    _, bundle = families[family]
    report = profile_bundle(bundle, batches=(5,), n=2, warmup=1, threads=1)
    assert [row.model for row in report.rows] == ["moe", "dense", "unfused"]
    assert "s-dense" in str(report.settings["left_out"])
    for route in bundle.manifest.plan.routes:
        load = str(report.settings[f"{route.layer}.expert_load_5"]).split(",")
        assert len(load) == route.num_experts
        assert sum(map(int, load)) == 5 * (route.tokens or 1) * route.top_k


def test_inspect(families: Families, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = families["token experts"]
    assert run(["inspect", str(bundle.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "each of 4 tokens to 2 of 3 experts, weighted by probability" in shown


def test_the_server_describes_outputs_by_layer(families: Families) -> None:
    _, bundle = families["token experts"]
    outputs = served_model(bundle).outputs
    assert outputs["block-1.expert_ids"] == ("INT64", (4, 2))
    assert outputs["block-1.weights"] == ("FP32", (4, 2))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_batches(families: Families, tmp_path: Path, suffix: str) -> None:
    _, bundle = families["token experts"]
    images = load_dataset("digits").test.images[:3]
    for index, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / f"{index}.png")
    output = tmp_path / f"answers{suffix}"
    classify_files(bundle, str(tmp_path / "*.png"), output, batch=2)
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = parquet.read_table(output).to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["expert_ids"].keys() == {"block-0", "block-1"}
        assert np.shape(row["expert_ids"]["block-1"]) == (4, 2)
