"""What a bundle was exported for is what runs, unless another engine is asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, Bundle, hash_line, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.export.targets import PORTABLE, Target
from advmoe_deploy.runtime.select import engine_for, open_runner, own_engine, resolved
from advmoe_deploy.serving.batch import classify_files
from tests.cli.command_line import Capture


def with_fields(bundle: Bundle, copy: Path, **fields: Any) -> Bundle:
    """Copy ``bundle`` with other fields in its manifest; ``None`` leaves one out."""
    shutil.copytree(bundle.path, copy)
    known = json.loads((copy / MANIFEST).read_text()) | fields
    text = json.dumps({n: v for n, v in known.items() if n not in fields or v is not None}).encode()
    (copy / MANIFEST).write_bytes(text)
    (copy / MANIFEST_HASH).write_bytes(hash_line(MANIFEST, text))
    return open_bundle(copy)


def test_the_first_target_is_recorded_and_runs(int8_bundle: Bundle, tiny_bundle: Bundle) -> None:
    assert (int8_bundle.manifest.made_for, int8_bundle.manifest.precision) == (
        "onnxruntime",
        "int8",
    )
    with open_runner(int8_bundle, threads=1) as runner:
        assert (runner.name, runner.precision) == ("onnxruntime", "int8")
    with open_runner(int8_bundle, "onnxruntime:fp32", threads=1) as runner:
        assert runner.precision == "fp32"
    assert resolved(tiny_bundle, own_engine(tiny_bundle)) == ("onnxruntime", "fp32")
    assert PORTABLE.runs_on == Target("tensorrt", "fp16", onnx_only=True).runs_on == "onnxruntime"
    assert Target("tensorrt", "fp16").runs_on == "tensorrt"


def test_commands_run_what_was_exported_and_name_it(
    tiny_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    bundle = with_fields(tiny_bundle, tmp_path / "bundle", made_for="openvino")
    few = ["--images", "20", "--json"]
    assert run(["eval", str(bundle.path), *few]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["engine"], value["precision"]) == ("openvino", "fp32")
    once = ["--batch", "1", "--against", "", "--json"]
    assert run(["profile", str(bundle.path), *once]) == 0
    assert [row["engine"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["openvino"]
    assert run(["eval", str(bundle.path), "--engine", "onnxruntime", "--images", "20"]) == 0
    captured = capsys.readouterr()
    assert "on onnxruntime fp32" in captured.out
    assert "does not record" not in captured.err
    assert run(["inspect", str(bundle.path)]) == 0
    assert "openvino fp32, unless told otherwise" in capsys.readouterr().out


def test_of_an_older_bundle_the_usual_engine_runs_and_that_is_said(
    int8_bundle: Bundle, tmp_path: Path
) -> None:
    older = with_fields(int8_bundle, tmp_path / "bundle", made_for=None)
    said: list[str] = []
    assert engine_for(older, None, said.append) == "onnxruntime"
    (line,) = said
    assert line.endswith("it runs on onnxruntime in int8; --engine chooses another")
    assert engine_for(older, "onnxruntime:fp32", said.append) == "onnxruntime:fp32"
    assert engine_for(int8_bundle, None, said.append) == "onnxruntime"
    assert len(said) == 1


def test_rows_of_a_batch_job_say_what_computed_them(int8_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("nothing.png\n")
    report = classify_files(
        int8_bundle, str(tmp_path / "list.txt"), tmp_path / "a.jsonl", threads=1
    )
    assert (report.engine, report.precision) == ("onnxruntime", "int8")
