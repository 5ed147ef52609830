"""The robust accuracy of lowered engines: a row for each that was asked for, kept beside others."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import CheckFailedError, UsageError
from benchmarks.training.lowered import main, merge


def attack(
    model: Path, work: Path, out: Path, monkeypatch: pytest.MonkeyPatch, engines: str
) -> list[dict[str, object]]:
    given = ["lowered", str(model), "--work", str(work), "--out", str(out), "--engines", engines]
    monkeypatch.setattr(sys, "argv", [*given, "--images", "16", "--threads", "1"])
    main()
    return json.loads(out.read_text())["rows"]


def test_each_engine_is_attacked_itself(
    tiny_run: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "rows.json"
    shutil.copytree(tiny_bundle.path, work / "openvino-fp32")
    assert not out.exists()
    (row,) = attack(tiny_run, work, out, monkeypatch, "openvino:fp32")
    assert (row["engine"], row["images"], row["suite"]) == ("openvino:fp32", 16, "quick")
    assert row["weights_sha256"] == tiny_bundle.manifest.files["reference.safetensors"].sha256
    assert row["reference"]["images"] == 16
    drop, robust = row["robust_drop"], row["robust_accuracy"]
    assert drop["drop"] == pytest.approx(100 * (robust["reference"] - robust["engine"]))
    assert drop["least_drop"] <= drop["drop"] <= drop["most_drop"]
    assert {each["found_on"] for each in row["attacks"]} >= {"reference"}

    kept = json.loads(out.read_text())
    others = [{"model": "another"}, {"weights_sha256": "0"}, {"images": 8}, {"suite": "full"}]
    kept["rows"] += [row | other for other in others]
    out.write_text(json.dumps(kept))
    again = attack(tiny_run, work, out, monkeypatch, "openvino:fp32")  # kept state, in its place
    assert len(again) == 1 + len(others)
    assert all(row | other in again for other in others)


def test_other_weights_and_unknown_engines_are_refused(
    tiny_run: Path,
    trained_run: Path,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, out = tmp_path / "work", tmp_path / "rows.json"
    shutil.copytree(tiny_bundle.path, work / "openvino-fp32")
    with pytest.raises(UsageError, match=r"is of other weights than .*trained-run"):
        attack(trained_run, work, out, monkeypatch, "openvino:fp32")
    with pytest.raises(SystemExit):
        attack(tiny_run, work, out, monkeypatch, "openvino:fp32,openvino:int4")
    assert not out.exists()


def test_a_precision_that_the_gate_refuses_is_a_row_with_the_reason(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckFailedError("nothing of this model can run in int8: it loses too much")

    monkeypatch.setattr("benchmarks.training.lowered.export_run", refuse)
    out = tmp_path / "rows.json"
    (row,) = attack(tiny_run, tmp_path / "work", out, monkeypatch, "openvino:int8")
    assert (row["engine"], row["images"]) == ("openvino:int8", 16)
    assert "it loses too much" in str(row["refused"])
    assert "robust_drop" not in row

    merge(out, row | {"images": 400, "refused": "for another reason"})
    merge(out, {**{k: v for k, v in row.items() if k != "refused"}, "images": 400})
    assert ["refused" in each for each in json.loads(out.read_text())["rows"]] == [False]
