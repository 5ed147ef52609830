"""Sweep of one recipe over values of one setting: AdvMoE's Figures 4 and 5, and others.

Every run keeps a folder of its own, so that a sweep that was interrupted goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import CheckpointError, one_line
from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.reports import Macs
from advmoe_deploy.specs import Frozen
from advmoe_deploy.train.config import Configure, TrainConfig
from advmoe_deploy.train.distributed.launch import process_total
from advmoe_deploy.train.fit import require_fit
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.place import CONFIG, REPORT, require_same
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.train.run.swept import sweep_configs, value_text

SWEEP = "sweep.json"


class SweepPoint(Frozen):
    """One value of the setting: what each seed reached, and what an image costs."""

    value: float
    reports: tuple[TrainReport, ...]
    macs: Macs


class SweepReport(Frozen):
    """Every point of a sweep over ``key``, in the order given."""

    recipe: str
    key: str
    out: str
    points: tuple[SweepPoint, ...]


def sweep(
    config: TrainConfig,
    key: str,
    values: Sequence[float],
    data: Dataset,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    configure: Configure | None = None,
    devices: int = 1,
    progress: Progress | None = None,
) -> SweepReport:
    """Train ``config`` with ``key`` set to each of ``values`` by ``configure``, for each seed.

    Each run is ``out/KEY=VALUE/seed-S``; one that is finished is taken as it is, an interrupted one
    goes on. ``out/sweep.json`` is written after each run.

    Raises:
        UsageError: a value makes no sense for the recipe (before anything is trained), or ``out``
            holds runs of another configuration.
    """
    progress = progress or Silent()
    configs = sweep_configs(config, key, values, seeds, configure)
    for each in configs.values():
        require_fit(each, data, process_total(devices))
    points: list[SweepPoint] = []
    with task(progress, "sweep", len(values) * len(seeds)):
        for value in values:
            reports = []
            for seed in seeds:
                folder = out / f"{key}={value_text(value)}" / f"seed-{seed}"
                reports.append(_run(configs[value, seed], data, folder, devices, progress))
                progress.advance("sweep", robust_accuracy=reports[-1].robust_accuracy)
            macs = macs_of(configs[value, seeds[0]].model)
            points.append(SweepPoint(value=value, reports=tuple(reports), macs=macs))
            result = SweepReport(recipe=config.name, key=key, out=str(out), points=tuple(points))
            write_atomically(out / SWEEP, result.model_dump_json(indent=2).encode() + b"\n")
    return result


def _run(
    config: TrainConfig, data: Dataset, folder: Path, devices: int, progress: Progress
) -> TrainReport:
    started = (folder / CONFIG).is_file()
    report = folder / REPORT
    if started and report.is_file():
        require_same(folder, config, RunData.of(data))
        progress.note(f"{folder} is finished and taken as it is")
        return _read(report)
    return train(config, data, folder, resume=started, devices=devices, progress=progress)


def _read(report: Path) -> TrainReport:
    try:
        return TrainReport.model_validate_json(report.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{report}: {one_line(error)}; delete it to go on") from None
