"""The command line: exit codes, one line per error, one JSON object on stdout."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli import failures
from advmoe_deploy.cli.app import app, run
from advmoe_deploy.cli.examples import EXAMPLES
from advmoe_deploy.cli.options import positive_numbers
from advmoe_deploy.cli.tables import bundle as tables
from advmoe_deploy.cli.tables import latency as latency_tables
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.errors import BundleError, MachineError, UsageError
from advmoe_deploy.parity.drop import Drop
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow, Pair
from advmoe_deploy.specs import ThreatModel
from advmoe_deploy.train.recipes import recipe
from advmoe_deploy.verify.examples.card import _engine
from advmoe_deploy.verify.findings import ConsistencyReport
from advmoe_deploy.verify.report import ReferenceReport, RobustReport
from advmoe_deploy.verify.verdict import judge_reference

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture) -> str:
    """Return the one line on stderr."""
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


def test_the_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("advmoe 0.")


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples(capsys: Capture, command: str) -> None:
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    for example in EXAMPLES[command]:
        assert f"  {example}\n" in out


def test_every_command_has_examples() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == set(EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nope"], 2, "unknown recipe 'nope'"),
        (["train", "digits-advmo"], 2, "did you mean digits-advmoe"),
        (["train", "digits-dense", "--set", "epoch=3"], 2, "did you mean epochs"),
        (["train", "digits-dense", "--data", "digitz"], 2, "did you mean digits"),
        (["train", "digits-dense", "--devices", "0"], 2, "see 'advmoe train --help'"),
        (["train"], 2, "RECIPE"),
        (["trian"], 2, "Did you mean 'train'? See 'advmoe --help'"),
        (["--nonsense"], 2, "see 'advmoe --help'"),
        (["import", "missing", "--from", "advmoe"], 3, "missing is no file"),
        (["import", "missing", "--from", "advmo"], 2, "did you mean advmoe"),
        (["import", "missing", "--from", "advmoe", "--set", "x"], 2, "no KEY=VALUE"),
        (["export", "missing", "--format", "onx"], 2, "unknown format 'onx'; did you mean onnx"),
        (["export", "missing", "--format", "pickle"], 2, "unknown format 'pickle'"),
        (["export", "missing", "--format", "wbe"], 2, "did you mean web?"),
        (["export", "x", "--format", "onnx", "--precision", "int9"], 2, "did you mean int8"),
        (["export", "x", "--format", "onnx", "--precision", "bf16"], 2, "does not compute in bf16"),
        (["export", "missing", "--format", "onnx"], 3, "there is no run missing; name what"),
        (["inspect", "missing"], 3, "there is no bundle missing; name a"),
        (["verify", "missing"], 3, "there is no bundle missing; name a"),
        (["verify", "missing", "--max-drop", "-1"], 2, "max-drop"),
        (
            ["verify", "missing", "--epsilon", "8"],
            2,
            "outside (0, 1], in [0, 1] pixels; write 8/255",
        ),
        (["report", "missing", "--epsilon", "0"], 2, "write 8/255"),
        (["analyze", "missing", "--epsilon", "nan"], 2, "write 8/255"),
        (["export", "x", "--format", "web", "--epsilon", "8/0"], 2, "is no number; write 8/255"),
        (["analyze", "missing", "--epsilon", "8/255"], 3, "no run or bundle missing"),
        (["profile", "missing", "--batch", "1,x"], 2, "'1,x' is no list"),
        (["profile", "missing", "--against", "dens"], 2, "did you mean dense"),
        (["analyze", "missing"], 3, "no run or bundle missing"),
        (["analyze", "missing", "--only", "routs"], 2, "did you mean routes"),
        (["analyze", "missing", "--only", " , "], 2, "names no section"),
        (["analyze", "missing", "--smoothing", "9", "--sigma", "0"], 2, "smoothing: sigma"),
        (["analyze", "missing", "--images", "0"], 2, "images"),
        (["serve", "missing"], 3, "there is no bundle missing; name a"),
        (["serve", "missing", "--input", "x"], 2, "'advmoe predict' classifies files"),
        (["predict", "missing", "--input", "x", "--output", "y.jsonl"], 3, "no bundle missing"),
        (["serve", "missing", "--prot", "1"], 2, "(Possible options: --host, --port); see"),
        (["serve", "missing", "--no-pag"], 2, "--no-access-log, --no-page"),
        (["list", "engine"], 2, "did you mean engines"),
    ],
)
def test_an_error_is_one_line_with_its_code(
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("advmoe: error: ")
    assert message in line
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_under_json_is_an_object_too(capsys: Capture) -> None:
    assert run(["inspect", "missing", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 3
    assert json.loads(captured.out)["error"] in captured.err


def test_debug_shows_the_traceback_wherever_it_stands(capsys: Capture) -> None:
    for arguments in (["--debug", "inspect", "missing"], ["inspect", "missing", "--debug"]):
        assert run(arguments) == 3
        assert "Traceback" in capsys.readouterr().err


def answer(capsys: Capture, *arguments: str) -> Any:
    """Run a command with --json and return its object."""
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_list_and_doctor(capsys: Capture) -> None:
    names = answer(capsys, "list")
    assert {"recipes", "families", "models", "engines", "data"} == set(names)
    assert "digits-advmoe" in [entry["name"] for entry in names["recipes"]]
    assert list(answer(capsys, "list", "engines")) == ["engines"]
    found = answer(capsys, "doctor")
    assert found["packages"]["torch"]["extra"] == "train"
    assert found["cpus"] >= 1
    for command in (["list"], ["doctor"]):
        assert run(command) == 0
        assert "onnxruntime" in capsys.readouterr().out


def test_alone_it_explains_itself(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: advmoe [OPTIONS] COMMAND" in out
    assert err == ""
    assert run(["help"]) == 0
    assert capsys.readouterr().out == out
    commands = out[out.index("Commands:") : out.index("Exit codes")]
    assert "..." not in commands  # each has its whole sentence
    assert run(["help", "train"]) == 0
    assert "Usage: advmoe train" in capsys.readouterr().out
    assert run(["help", "--json", "train"]) == 0
    assert "Usage: advmoe train" in capsys.readouterr().out
    for everything in (["help", "help"], ["help", "--json"]):
        assert run(everything) == 0
        assert capsys.readouterr().out == out


def test_recipes_are_grouped_and_chosen(capsys: Capture) -> None:
    found = answer(capsys, "list", "recipes", "--data", "cifar10", "--family", "advmoe")["recipes"]
    assert {(entry["data"], entry["family"]) for entry in found} == {("cifar10", "advmoe")}
    (chosen,) = [entry for entry in found if entry["name"] == "cifar10-advmoe-cpu"]
    assert chosen["settings"] == recipe("cifar10-advmoe-cpu").model_dump(mode="json")
    everything = [(e["data"], e["family"]) for e in answer(capsys, "list", "recipes")["recipes"]]
    assert everything == [pair for pair, group in groupby(everything) for _ in group]
    assert len({*everything}) == len([*groupby(everything)])  # each group is in one piece
    assert run(["list", "recipes", "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "recipes on digits, family vit-moe" in out
    assert "cifar10" not in out
    assert run(["list", "recipes", "--data", "cifar100", "--family", "expert-networks"]) == 0
    assert "no recipe is on this data set and of this family" in capsys.readouterr().out
    assert run(["list", "recipes", "--data", "cifar"]) == 2
    assert "did you mean cifar10" in said(capsys)
    assert run(["list", "--family", "dense"]) == 2
    assert "'advmoe list recipes'" in said(capsys)


def test_doctor_names_the_extra_of_what_is_missing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "advmoe_deploy.cli.commands.doctor.OPTIONAL", {"x": ("no-such-package", "serve")}
    )
    assert run(["doctor"]) == 0
    assert "pip install 'advmoe-deploy[serve]'" in capsys.readouterr().out


def test_export_and_inspect(capsys: Capture, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    value = answer(capsys, "export", str(tiny_run), "--format", "onnx", "--out", str(out))
    assert value["bundle"] == str(out)
    assert value["parity"]["max_relative_logit_diff"] <= value["parity"]["logit_tolerance"]
    assert value["parity"]["images"] > 0
    assert value["parity"]["route_agreement"] == 1.0
    manifest = answer(capsys, "inspect", str(out))
    assert manifest["model"]["family"] == "advmoe"
    assert run(["inspect", str(out)]) == 0
    assert "model.onnx" in capsys.readouterr().out
    assert run(["export", str(tiny_run), "--format", "onnx", "--out", str(out)]) == 2
    assert "--overwrite" in said(capsys)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "manifest.sha256", "golden.npz"])
def test_one_changed_byte_is_found(
    capsys: Capture, tiny_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert run(["inspect", str(copy)]) == 3
    assert name in said(capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a text file, all called .png."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 80 * index).save(folder / f"{index}.png")
    (folder / "text.png").write_text("text")
    return folder


def test_predict_counts_what_it_could_not_read(
    capsys: Capture, tiny_bundle: Bundle, folder: Path
) -> None:
    output = folder.parent / "a.jsonl"
    files = ["--input", str(folder), "--output", str(output)]
    value = answer(capsys, "predict", str(tiny_bundle.path), *files)
    assert (value["images"], value["errors"], value["output"]) == (4, 1, str(output))
    assert len(output.read_text().splitlines()) == 4
    assert run(["predict", str(tiny_bundle.path), *files, "--overwrite"]) == 0
    assert "1 unreadable" in capsys.readouterr().out
    assert run(["predict", str(tiny_bundle.path), *files, "--overwrite", "--on-error", "fail"]) == 3
    assert "1 of 4 inputs could not be read" in capsys.readouterr().err


def test_predict_fails_if_nothing_could_be_read(
    capsys: Capture, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("text")
    output = tmp_path / "a.jsonl"
    files = ["--input", str(tmp_path), "--output", str(output)]
    assert run(["predict", str(tiny_bundle.path), *files, "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["errors"] == 1  # one object: the report, not the error
    assert "none of 1 inputs" in captured.err
    assert json.loads(output.read_text())["error"].startswith("not a PNG")


def test_targets_that_cannot_be(capsys: Capture, tiny_bundle: Bundle, folder: Path) -> None:
    start = ["predict", str(tiny_bundle.path), "--input", str(folder), "--output"]
    for target, code in (("a.txt", 2), ("0.png/a.jsonl", 3)):
        assert run([*start, str(folder / target)]) == code
        said(capsys)
    for source in ("nothing/*.png", "missing"):
        command = ["predict", str(tiny_bundle.path), "--input", str(folder / source)]
        assert run([*command, "--output", str(folder / "a.jsonl")]) == 3
        assert "no such file or folder" in said(capsys)


def test_serve_refuses_the_world(capsys: Capture, tiny_bundle: Bundle) -> None:
    assert run(["serve", str(tiny_bundle.path), "--host", "0.0.0.0"]) == 2
    assert "(--token-file), use 127.0.0.1 behind a proxy" in said(capsys)
    only = ["serve", str(tiny_bundle.path), "--tls-cert", "cert.pem"]
    assert run(only) == 2
    assert "give --tls-cert and --tls-key" in said(capsys)


def test_serve_without_fastapi_names_the_extra(
    capsys: Capture, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "advmoe_deploy.serving.online.http.rest", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", str(tiny_bundle.path), "--port", "0"]) == 4
    assert said(capsys).endswith(
        "fastapi is not installed; run: pip install 'advmoe-deploy[serve]'"
    )


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["train", "digits-dense"], "torch", "train"),
        (["train", "digits-dense"], "lightning_fabric", "train"),
        (["verify", "BUNDLE"], "torch", "train"),
        (["export", "RUN", "--format", "onnx"], "torch", "train"),
        (["predict", "BUNDLE", "--input", "IN", "--output", "a.jsonl"], "onnxruntime", "cpu"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tiny_bundle: Bundle, folder: Path, arguments: list[str], package: str, extra: str
) -> None:
    places = {"BUNDLE": str(tiny_bundle.path), "IN": str(folder)}
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from advmoe_deploy.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(places.get(a, a) for a in arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"advmoe: error: {package.replace('_', '-')} is not installed")
    assert f"pip install 'advmoe-deploy[{extra}]'" in line
    assert not list(folder.glob(".*"))


def raising(error: BaseException) -> Callable[..., None]:
    def command(*_: object, **__: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BundleError("two\nlines"), 3, "two lines"),
        (MachineError("full"), 5, "full"),
        (OSError(28, "No space left on device", "/x"), 5, "/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), 5, "permission denied"),
        (NotADirectoryError(20, "Not a directory", "/x"), 3, "/x: not a directory"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (ValueError("a bug"), 70, "unexpected ValueError: a bug; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_way_to_end_has_its_code(
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", raising(error))
    assert run(["inspect", "x"]) == code
    assert message in said(capsys)


def test_an_interrupt_that_native_code_disguised_is_still_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def native(_: Path) -> Bundle:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("the callback failed") from None
        raise AssertionError

    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", native)
    assert run(["inspect", "x"]) == 130
    assert said(capsys) == "advmoe: error: interrupted"


def test_what_libraries_print_goes_to_stderr(
    capsys: Capture, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(path: Path) -> Bundle:
        print("noise")  # noqa: T201
        return open_bundle(path)

    monkeypatch.setattr("advmoe_deploy.bundle.open_bundle", noisy)
    assert run(["inspect", str(tiny_bundle.path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["bundle"] == str(tiny_bundle.path)
    assert captured.err == "noise\n"


def test_positive_numbers() -> None:
    assert positive_numbers("1, 8,64", "--batch") == (1, 8, 64)
    for text in ("", "0", "-1", "1.5", "1;2"):
        with pytest.raises(UsageError, match="--batch"):
            positive_numbers(text, "--batch")


def test_parser_errors_have_a_base_of_their_own() -> None:
    assert failures.ParserError.__name__ == "ClickException"


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
