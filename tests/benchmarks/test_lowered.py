"""The robust accuracy of lowered engines: a row for each that was asked for, kept beside others."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from benchmarks.training.lowered import main


def attack(
    work: Path, out: Path, monkeypatch: pytest.MonkeyPatch, engines: str
) -> list[dict[str, object]]:
    given = ["lowered", "unread", "--work", str(work), "--out", str(out), "--engines", engines]
    monkeypatch.setattr(sys, "argv", [*given, "--images", "16", "--threads", "1"])
    main()
    return json.loads(out.read_text())["rows"]


def test_each_engine_is_attacked_itself(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "rows.json"
    shutil.copytree(tiny_bundle.path, work / "bundle")
    assert not out.exists()
    (row,) = attack(work, out, monkeypatch, "openvino:fp32,openvino:int8")  # which was not written
    assert (row["engine"], row["images"], row["suite"]) == ("openvino:fp32", 16, "quick")
    assert row["weights_sha256"] == tiny_bundle.manifest.files["reference.safetensors"].sha256
    drop, robust = row["robust_drop"], row["robust_accuracy"]
    assert drop["drop"] == pytest.approx(100 * (robust["reference"] - robust["engine"]))
    assert drop["least_drop"] <= drop["drop"] <= drop["most_drop"]
    assert {each["found_on"] for each in row["attacks"]} >= {"reference"}

    kept = json.loads(out.read_text())
    kept["rows"].append(row | {"model": "another"})
    out.write_text(json.dumps(kept))
    again = attack(work, out, monkeypatch, "openvino:fp32")  # from the kept state, in its place
    assert [each["model"] for each in again] == sorted(["another", str(row["model"])])
