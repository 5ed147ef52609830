"""A page of each kind, made once."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from advmoe_deploy import api
from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.demo.report import write_demo_report
from advmoe_deploy.cli.demo.result import DENSE, MOE, DemoResult
from advmoe_deploy.cli.pages.eval_report import write_eval_report
from advmoe_deploy.cli.pages.profile_report import write_profile_report
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.reports import LatencyReport
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.curve import CurvePoint
from advmoe_deploy.verify.examples import convergence
from tests.cli.pages.shown import KINDS, Pages, entry_of
from tests.conftest import made_once


@pytest.fixture(scope="session")
def pages(
    trained_bundle: Bundle, trained_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pages:
    """A page of each kind. Read them only."""
    make = partial(write_pages, trained_bundle, trained_run)
    folder = made_once(tmp_path_factory, "pages", make)
    return {kind: folder / kind / "report.html" for kind in KINDS}


def write_pages(trained: Bundle, trained_run: Path, out: Path) -> None:
    """Write a page of each kind, of little work: good for nothing but to be looked at."""
    with pytest.MonkeyPatch.context() as patch:
        cut = (AttackSpec(name="pgd", steps=5), AttackSpec(name="square", steps=5))
        patch.setattr(verify_module, "attack_suite", lambda *_: cut)
        patch.setattr(convergence, "STEPS", (2, 4))
        patch.setattr(convergence, "MOST_IMAGES", 10)
        few, quick = ("--images", "20"), ("--steps", "1", "--smoothing", "10")
        bundle = str(trained.path)
        assert run(["report", bundle, *few, "--no-card", "--out", str(out / "report")]) == 0
        assert run(["analyze", bundle, *few, *quick, "--out", str(out / "analysis")]) == 0
    report = profile_bundle(trained, batches=(1, 4), n=3, warmup=1)
    for kind in ("demo", "eval", "profile"):
        (out / kind).mkdir()
    write_profile_report(report, trained, out / "profile" / "report.html")
    write_eval_report(api.evaluate(trained, images=40), out / "eval" / "report.html")
    shutil.copytree(trained_run, out / "demo" / "runs" / MOE)
    shutil.copytree(trained.path, out / "demo" / "bundle")
    write_demo_report(demo_result(out, report), out / "demo")


def demo_result(out: Path, profile: LatencyReport) -> DemoResult:
    bundle = open_bundle(out / "demo" / "bundle")
    verified = entry_of(out).advmoe.engines[0]
    trained = TrainReport(
        run="r", recipe="r", method="advmoe", loss="trades", data="digits", epochs=1,
        selected_epoch=1, images=40, clean_accuracy=0.9, pgd_accuracy=0.8, robust_accuracy=0.7,
        threat=verified.threat, epsilon=0.05, attack=AttackSpec(name="pgd", steps=50),
        effective_routes=2.0, expert_load={}, device="cpu", devices=1, versions={}, seed=0,
        seconds=1.0,
    )  # fmt: skip
    curve = tuple(CurvePoint(epsilon=e, accuracy=1 - e, low=0.5, high=1.0) for e in (0.0, 0.1, 0.2))
    return DemoResult(
        out=str(out), quick=True, photographs=None, train={MOE: trained, DENSE: trained},
        verify=verified, profile=profile, macs=bundle.manifest.macs,
        curves={"AdvMoE": curve, "dense": curve}, load_by_class=((3, 1),) * 10,
        class_names=bundle.manifest.class_names, classified=100, unreadable=1, report="r",
        seconds=1.0,
    )  # fmt: skip
