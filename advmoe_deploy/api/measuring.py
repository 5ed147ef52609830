"""Functions of the public Python API that measure a model: its answers, robustness and speed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe_deploy.api.arguments import checked, place
from advmoe_deploy.bundle import MANIFEST, Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.zoo.resolve import StrPath, opened, resolve

if TYPE_CHECKING:
    from advmoe_deploy.comparison.report import Aim, BenchmarkReport
    from advmoe_deploy.evaluation.report import EvalReport
    from advmoe_deploy.progress import Progress
    from advmoe_deploy.reports import LatencyReport
    from advmoe_deploy.verify.report import RobustReport
    from advmoe_deploy.verify.suites import Suite


@checked()
def evaluate(
    model: Bundle | StrPath,
    *,
    engine: str | None = None,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure clean accuracy, by class as well, calibration and the use of the experts.

    Args:
        model: a bundle, or the path or name of one or of a run, as for :func:`load_model`.
        engine: of a bundle, as for :func:`open_runner`; a run is computed by PyTorch.
        data: a data source; by default the one the model was trained on. Its test split is used.
        class_map: the model's name of classes that ``data`` calls otherwise.
        images: how many test images; by default all.
        threads: of a bundle's engine; 0 lets it choose. A run has those of PyTorch.
        progress: receives progress reports.

    Raises:
        UsageError: no model or engine has that name, an engine is given for a run, or the data do
            not fit the model or are not named.
        InputError: the model is missing or damaged, or the data cannot be read.
        BackendUnavailableError: the engine's package, or PyTorch for a run, is not installed.
    """
    from advmoe_deploy.evaluation.evaluate import evaluate_bundle, evaluate_run

    found = model if isinstance(model, Bundle) else resolve(model)
    if isinstance(found, Bundle) or (found / MANIFEST).is_file():
        return evaluate_bundle(
            opened(found),
            engine=engine,
            data=data,
            class_map=class_map,
            images=images,
            threads=threads,
            progress=progress,
        )
    if engine is not None:
        raise UsageError(
            f"engine '{engine}' is for a bundle, and {os.fspath(found)} is none; leave it out, or "
            "export the run first"
        )
    return evaluate_run(found, data=data, class_map=class_map, images=images, progress=progress)


@checked(resume=place)
def verify(
    bundle: Bundle | StrPath,
    *,
    engine: str | None = None,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    attacks: Suite = "quick",
    max_drop: float = 0.5,
    images: int | None = None,
    epsilon: float | None = None,
    threads: int = 0,
    allow_fragile: bool = False,
    examples: StrPath | None = None,
    resume: StrPath | None = None,
    budget: float = 0.0,
    progress: Progress | None = None,
) -> RobustReport:
    """Attack the reference and the engine alike; ``passed`` says whether robustness survived.

    Args:
        bundle: a bundle with its reference weights, or its path.
        engine: as for :func:`open_runner`.
        data: a data source; by default the one the model was trained on. Its test split is used.
        class_map: the model's name of classes that ``data`` calls otherwise.
        attacks: ``quick``, ``standard`` or ``full``.
        max_drop: percentage points of clean or robust accuracy that the engine may lose.
        images: how many test images; by default all.
        epsilon: an l-inf radius in [0, 1] pixels; by default the one the model was trained for.
        threads: of the engine; 0 lets it choose.
        allow_fragile: whether ``passed`` may be true of a reference that withstands no more than
            chance, for a trial of the tools.
        examples: a file ``.npz`` to keep the adversarial image that each image fell to in.
        resume: a file ``.npz`` that keeps the state after each attack; if it is there, it goes on.
        budget: seconds of attacks: what the suite leaves of them goes into restarts; where they are
            over before it, the rest of it is left out, which is a warning. 0: the suite.
        progress: receives progress reports.

    Raises:
        BundleError: the bundle is damaged or holds no reference weights.
        UsageError: neither the bundle nor the caller names a threat model, or data do not fit.
        DataError: the data cannot be read.
    """
    from advmoe_deploy.verify.verify import verify_bundle

    return verify_bundle(
        opened(bundle),
        engine=engine,
        data=data,
        class_map=class_map,
        attacks=attacks,
        max_drop=max_drop,
        images=images,
        epsilon=epsilon,
        threads=threads,
        allow_fragile=allow_fragile,
        examples=Path(examples) if examples is not None else None,
        resume=Path(resume) if resume is not None else None,
        budget=budget,
        progress=progress,
    )


@checked()
def profile(
    bundle: Bundle | StrPath,
    *,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 64),
    against: Sequence[str] = ("dense", "s-dense", "unfused"),
    threads: int = 2,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time the bundle's model and its baselines in turn, in this process.

    Args:
        bundle: a bundle, or its path.
        engines: as for :func:`open_runner`, by default the bundle's own; baselines run in fp32 on
            ONNX Runtime.
        batches: batch sizes.
        against: baselines out of ``dense``, ``s-dense`` and ``unfused``.
        threads: of the engines.
        progress: receives progress reports.

    Raises:
        UsageError: an engine, a baseline or a size makes no sense.
    """
    from advmoe_deploy.profiling.profile import profile_bundle

    return profile_bundle(
        opened(bundle),
        engines=engines,
        batches=batches,
        against=against,
        threads=threads,
        progress=progress,
    )


@checked()
def benchmark(
    bundle: Bundle | StrPath,
    *,
    aim: Aim = "latency",
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int = 500,
    attacks: Suite | None = None,
    batches: Sequence[int] = (1, 8, 64),
    threads: int = 2,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Set all engines and precisions of a bundle beside each other: size, accuracy, time.

    Args:
        bundle: a bundle, or its path.
        aim: ``latency``, ``throughput`` or ``size``: what the best is marked for.
        data: a data source; by default the one the model was trained on. Its test split is used.
        class_map: the model's name of classes that ``data`` calls otherwise.
        images: how many test images, at most.
        attacks: ``quick``, ``standard`` or ``full``, by which each engine is attacked; without one,
            robust accuracy is what the export recorded, where it did.
        batches: batch sizes to time.
        threads: of the engines.
        progress: receives progress reports.

    Raises:
        UsageError: the aim or a size makes no sense, or ``data`` do not fit the model.
        DataError: ``data`` cannot be read.
        BundleError: the bundle is damaged, or attacks need reference weights that it lacks.
        BackendUnavailableError: no engine of the bundle can run here.
    """
    from advmoe_deploy.comparison.compare import benchmark_bundle

    return benchmark_bundle(
        opened(bundle),
        aim=aim,
        data=data,
        class_map=class_map,
        images=images,
        attacks=attacks,
        batches=batches,
        threads=threads,
        progress=progress,
    )
