"""Demo on real handwritten digits: train, export, verify, profile, classify, report."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.demo.photographs import show_photographs, timing_budget
from advmoe_deploy.cli.demo.report import write_demo_report
from advmoe_deploy.cli.demo.result import DENSE, MOE, DemoResult
from advmoe_deploy.cli.demo.training import FEW, train_side_by_side
from advmoe_deploy.data.dataset import Dataset, Split, to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.progress import Progress
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.verify.curve import CurvePoint, robustness_curve
from advmoe_deploy.verify.verify import verify_bundle

_EPSILONS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.26, 0.32)
_MARKER = ".advmoe-demo"
_CLASSIFIED = 100
_STEPS = 10


def run_demo(out: Path, *, quick: bool, progress: Progress) -> DemoResult:
    """Return what the whole road on digits came to, and leave it all in ``out``.

    ``quick`` trains for one epoch, attacks few images and times fewer rounds: enough to see every
    stage run, not to see robustness.
    An ``out`` that an earlier demo made is used again.

    Raises:
        UsageError: ``out`` holds something that no demo made.
    """
    started = time.perf_counter()
    _claim(out)
    photographs = show_photographs(out / "photographs", quick=quick, progress=progress)
    data = load_dataset("digits")
    progress.note(f"train: {MOE} and {DENSE} side by side, one thread each")
    reports = train_side_by_side((MOE, DENSE), out / "runs", quick, progress)
    progress.note("export: cut into router and pathways, fold, stitch, compare with torch")
    run = out / "runs" / MOE
    export_run(run, out / "bundle", overwrite=True, progress=progress)
    bundle = open_bundle(out / "bundle")
    progress.note("verify: the same attacks on the torch model and on the exported one")
    verified = verify_bundle(
        bundle, images=FEW if quick else None, allow_fragile=quick, progress=progress
    )
    progress.note("profile: interleaved with the dense baseline")
    latency = profile_bundle(
        bundle, batches=(1, 64), budget_s=timing_budget(quick), progress=progress
    )
    folder = _write_digits(data, out / "digits")
    batch = classify_files(
        bundle, str(folder), out / "predictions.jsonl", overwrite=True, progress=progress
    )
    result = DemoResult(
        out=str(out),
        quick=quick,
        photographs=photographs,
        train=reports,
        verify=verified,
        profile=latency,
        macs=bundle.manifest.macs,
        curves=_curves(out, data.test, quick, progress),
        load_by_class=_load_by_class(bundle, data),
        class_names=data.class_names,
        classified=batch.images - batch.errors,
        unreadable=batch.errors,
        report=str(out / "report.html"),
        seconds=time.perf_counter() - started,
    )
    write_demo_report(result, out)
    return result


def _claim(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise UsageError(f"{out} holds other things; choose an empty --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _curves(
    out: Path, test: Split, quick: bool, progress: Progress
) -> dict[str, tuple[CurvePoint, ...]]:
    progress.note(
        f"robustness curve: PGD-{_STEPS} at growing epsilon, AdvMoE (its routes too) and dense"
    )
    curves = {}
    test, epsilons = (test.first(FEW), _EPSILONS[::3]) if quick else (test, _EPSILONS)
    for label, name in (("AdvMoE", MOE), ("dense", DENSE)):
        _, model = load_checkpoint(out / "runs" / name / "model")
        curves[label] = robustness_curve(model, test, epsilons, steps=_STEPS, progress=progress)
    return curves


def _load_by_class(bundle: Bundle, data: Dataset) -> tuple[tuple[int, ...], ...]:
    with open_runner(bundle) as runner:
        prediction = runner.infer(to_float(data.test.images))
    (ids_NK,) = prediction.expert_ids.values()
    experts = bundle.manifest.model.num_experts
    return tuple(
        tuple(np.bincount(ids_NK[data.test.labels == label, 0], minlength=experts).tolist())
        for label in range(len(data.class_names))
    )


def _write_digits(data: Dataset, folder: Path) -> Path:
    """Write test images as PNG files, and one text file that only claims to be one."""
    folder.mkdir(exist_ok=True)
    for index in range(_CLASSIFIED):
        name = f"{index:03}-is-{data.class_names[data.test.labels[index]]}.png"
        Image.fromarray(data.test.images[index, 0]).save(folder / name)
    (folder / "not-an-image.png").write_text("This is text.\n")
    return folder
