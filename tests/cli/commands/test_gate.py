"""The gate: a bundle against a baseline that was kept, and what it writes for other programs."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.commands.gate import _refusal
from advmoe_deploy.cli.pages import gate_files
from advmoe_deploy.errors import DataError
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.examples import convergence as convergence_module
from advmoe_deploy.verify.examples.baseline import read_baseline
from advmoe_deploy.verify.examples.gate import Check, GateReport

ACTION = Path(__file__).parents[3] / ".github/actions/gate/action.yml"
CUT = (AttackSpec(name="pgd", steps=5), AttackSpec(name="square", steps=5))


@pytest.fixture(scope="module", autouse=True)
def cut_effort() -> Any:
    """Attack a little, so that what is compared shows in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "attack_suite", lambda *_: CUT)
        patch.setattr(convergence_module, "STEPS", (1,))
        patch.setattr(convergence_module, "RESTARTS", (1,))
        yield


@pytest.fixture(scope="module")
def kept(trained_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``advmoe report`` wrote of that bundle on 60 images."""
    folder = tmp_path_factory.mktemp("gate") / "kept"
    assert (
        run(
            [
                "report",
                str(trained_bundle.path),
                "--images",
                "60",
                "--out",
                str(folder),
                "--json",
                "--no-card",
            ]
        )
        == 0
    )
    return folder


def test_the_same_bundle_passes_and_says_so_to_others(
    trained_bundle: Bundle, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml, summary = tmp_path / "new" / "gate.xml", tmp_path / "gate.md"
    arguments = ["gate", str(trained_bundle.path), "--against", str(kept / "report.json"), "--json"]
    capsys.readouterr()
    (tmp_path / "link.xml").symlink_to(xml)
    (tmp_path / "link.md").symlink_to(summary)
    files = ["--junit", str(tmp_path / "link.xml"), "--markdown", str(tmp_path / "link.md")]
    assert run([*arguments, *files]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verdict"], shown["paired"], shown["images"]) == ("passed", True, 60)
    suite = ET.parse(xml).getroot().find("testsuite")
    assert suite is not None
    assert [case.get("name") for case in suite.iter("testcase")] == [
        check["name"] for check in shown["checks"]
    ]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "0", "0")
    assert "| replayed examples | passed |" in summary.read_text()


def test_a_worse_model_fails(
    tiny_bundle: Bundle, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml = tmp_path / "gate.xml"
    assert run(["gate", str(tiny_bundle.path), "--against", str(kept), "--junit", str(xml)]) == 1
    assert capsys.readouterr().err.rstrip().endswith("raise --max-drop and --allow-fragile")
    failed = [
        c.get("name") for c in ET.parse(xml).iter("testcase") if c.find("failure") is not None
    ]
    accuracies = ["replayed examples", "clean accuracy", "robust accuracy"]
    assert failed == [*accuracies, "robustness survived the export"]  # untrained: it has none


def test_too_few_images_of_another_model_decide_nothing(
    trained_bundle: Bundle, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = of_another_model(kept, tmp_path / "other")
    xml = tmp_path / "gate.xml"
    assert (
        run(["gate", str(trained_bundle.path), "--against", str(other), "--junit", str(xml)]) == 6
    )
    assert "or raise --max-drop" in capsys.readouterr().err
    undecided = [c for c in ET.parse(xml).iter("testcase") if c.find("error") is not None]
    assert len(undecided) == 3


def test_no_limit_is_offered_against_answers_that_differ() -> None:
    names = ("clean accuracy", "engine answers as its reference", "robustness survived the export")
    checks = [
        Check(name=name, verdict=verdict, message="router: routes differ", seconds=0.0)
        for name, verdict in zip(names, ("passed", "failed", "failed"), strict=True)
    ]
    seen = SimpleNamespace(findings=("one",), fragility=())
    report: Any = SimpleNamespace(verdict="failed", checks=checks, report=seen)
    assert str(_refusal(report)) == (
        "engine answers as its reference: router: routes differ; do not ship this bundle"
    )


def of_another_model(kept: Path, out: Path) -> Path:
    """Copy a baseline and say that it is of other weights."""
    shutil.copytree(kept, out)
    text = (out / "report.json").read_text()
    model = json.loads(text)["advmoe"]["model"]
    (out / "report.json").write_text(text.replace(model, "0" * 64))
    with np.load(out / "examples.npz") as file:
        values = dict(file)
    values["header"] = np.array(str(values["header"]).replace(model, "0" * 64))
    np.savez(out / "examples.npz", **values)
    return out


def test_figures_alone_are_compared_unpaired(
    trained_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    listed = tmp_path / "listed.json"
    entry = {"name": "Somebody2026", "clean_acc": "60.1", "autoattack_acc": "20", "eps": "1/20"}
    listed.write_text(json.dumps(entry))
    capsys.readouterr()
    assert run(["gate", str(trained_bundle.path), "--against", str(listed), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert not shown["paired"]
    assert "taken as exact" in shown["notes"][0]
    assert "unpaired" in shown["checks"][0]["message"]
    text = (kept / "report.json").read_text().replace('"suite": "quick"', '"suite": "full"')
    (tmp_path / "report.json").write_text(text)
    baseline = read_baseline(tmp_path)
    assert (baseline.images, baseline.examples, baseline.suite) == (60, None, "full")
    assert run(["gate", str(trained_bundle.path), "--against", str(tmp_path), "--json"]) == 6
    assert "pass --attacks full" in " ".join(json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ('{"advmoe": {"bundle": NaN}}', "is no JSON"),
        ('{"eps": 1e999}', "is no JSON"),
        ('{"advmoe": {}}', "bundle: Field required"),
        ('{"eps": "8/255", "clean_acc": "a lot"}', "no percentage"),
        ('{"eps": "8/0", "clean_acc": "90", "autoattack_acc": 50}', "no l-inf radius"),
        ('{"eps": 8, "clean_acc": "90", "autoattack_acc": 50}', "no l-inf radius"),
    ],
)
def test_what_is_no_baseline_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError) as refused:
        read_baseline(tmp_path / "bad.json")
    assert said in str(refused.value)


def test_examples_of_another_report_are_refused(kept: Path, tmp_path: Path) -> None:
    other = of_another_model(kept, tmp_path / "other")
    shutil.copy(kept / "examples.npz", other / "examples.npz")
    with pytest.raises(DataError, match="of another model or engine"):
        read_baseline(other)


@pytest.mark.parametrize("package", ["", "advmoe-deploy[train,cpu]==1.0"])
def test_the_action_installs_its_own_repository(package: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    assert action["inputs"]["package"]["default"] == ""
    step = next(step for step in action["runs"]["steps"] if step["name"] == "Install")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["run"]],
        env={"PATH": path, "PACKAGE": package, "GITHUB_ACTION_PATH": str(ACTION.parent)},
        check=True,
        capture_output=True,
        text=True,
    )
    asked = done.stdout.splitlines()
    assert asked == ["-m", "pip", "install", package or f"{ACTION.parents[3]}[train,cpu]"]


@pytest.mark.parametrize(
    ("code", "undecided", "fragile", "ends"),
    [
        (0, "fail", "false", 0),
        (0, "fail", "true", 0),
        (1, "pass", "false", 1),
        (6, "fail", "false", 6),
        (6, "pass", "false", 0),
    ],
)
def test_the_script_of_the_action_passes_the_answer_on(
    code: int, undecided: str, fragile: str, ends: int, tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "gate")
    assert "${{" not in step["run"], "an input could say other commands"
    fake = tmp_path / "advmoe"
    fake.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "$RUNNER_TEMP/advmoe-gate.md"\nexit {code}\n'
    )
    fake.chmod(0o755)
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    inputs = {name: f"the {name.lower()}" for name in step["env"]}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    asked = {"UNDECIDED": undecided, "ALLOW_FRAGILE": fragile, "RUNNER_TEMP": str(tmp_path)}
    environment = {**inputs, **files, **asked}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]],
        env={**environment, "PATH": path},
        check=False,
    )
    assert done.returncode == ends
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == f"exit-code={code}\n"
    said = (tmp_path / "GITHUB_STEP_SUMMARY").read_text().splitlines()
    assert said[:4] == ["gate", "the bundle", "--against", "the baseline"]
    assert ("--allow-fragile" in said) == (fragile == "true")
    assert "" not in said


def test_nothing_that_is_said_breaks_xml_or_tables(kept: Path) -> None:
    report = json.loads((kept / "report.json").read_text())["advmoe"]["engines"][0]
    report["threat"]["epsilon"] = 8 / 255
    nasty = "<a>&\"'\x00\x1b]]>|`*\nnew ünï"
    checks = tuple(
        Check(name=nasty, verdict=verdict, message=nasty, seconds=0.5)
        for verdict in ("passed", "failed", "undecided")
    )
    gate = GateReport(
        verdict="failed", bundle=nasty, baseline=nasty, engine=nasty, images=1, max_drop=2,
        paired=True, checks=checks, notes=(nasty,), report=report, seconds=1,
    )  # fmt: skip
    root = ET.fromstring(gate_files.junit(gate))
    assert len(list(root.iter("testcase"))) == 3
    assert "ünï" in str(root.find("testsuite/testcase/failure").text)  # type: ignore[union-attr]
    assert ", epsilon 8/255, " in gate_files.markdown(gate).decode()
    rows = [line for line in gate_files.markdown(gate).decode().splitlines() if line[:1] == "|"]
    assert len(rows) == 5
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)
    assert "\x1b" not in "".join(rows)  # which a log in a terminal would obey
