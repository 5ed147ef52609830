"""Adversarial training from the first epoch to the selected model.

Each epoch's order and each step's random numbers follow from (seed, epoch, step) alone, so a run
that was killed goes on, from weights, optimizers and counters, to the same weights bit for bit on
the same machine with as many threads and processes; with more or fewer, to the same but for
rounding.
"""

import math
from functools import partial
from pathlib import Path

from lightning_fabric import Fabric

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.distributed.launch import (
    is_first_process,
    launch,
    process_total,
    was_restarted,
)
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.folder import RunFolder, open_run
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.train.run.session import Session

__all__ = ["TrainReport", "train"]

_SILENT = Silent()


def train(
    config: TrainConfig,
    data: Dataset,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    devices: int = 1,
    progress: Progress = _SILENT,
) -> TrainReport:
    """Train into the folder ``out`` and return what the selected model reaches on the test set.

    ``out`` must be new, empty, or with ``overwrite`` an older run; ``resume`` goes on with the
    run there, and so does a process that torchrun restarts. ``devices`` processes share each
    batch, BatchNorm statistics included, and train what one would, but for rounding.

    Raises:
        UsageError: the folder is in the way, another configuration trained it, or the data do
            not fit the model.
        CheckpointError: the newest checkpoint is truncated or changed.
        DivergedError: a loss, gradient or weight is not finite; the last checkpoint is good.
        MachineError: the disk is full or may not be written; the last checkpoint is good.
    """
    _require_fit(config, data, process_total(devices))
    config = config.model_copy(update={"data": data.source})
    folder = RunFolder(out)
    if is_first_process():
        resume = resume or (was_restarted() and folder.was_begun())
        folder = open_run(out, config, RunData.of(data), resume=resume, overwrite=overwrite)
    work = partial(_work, config=config, data=data, folder=folder)
    return launch(work, devices=devices, precision=config.precision, progress=progress)


def _work(
    fabric: Fabric, progress: Progress, *, config: TrainConfig, data: Dataset, folder: RunFolder
) -> TrainReport:
    session = Session(fabric, config, data, folder, progress)
    return session.finish(session.train())


def _require_fit(config: TrainConfig, data: Dataset, processes: int) -> None:
    model = config.model
    if model.image_shape != data.image_shape:
        raise UsageError(
            f"{data.source} has images of {data.image_shape}, the model takes "
            f"{model.image_shape}; set model.in_channels and model.image_size"
        )
    if model.num_classes != len(data.class_names):
        raise UsageError(
            f"{data.source} has {len(data.class_names)} classes, not {model.num_classes}; "
            f"set model.num_classes={len(data.class_names)}"
        )
    images = len(data.train.first(config.train_images))
    parts = config.accumulate * math.ceil(images / config.batch_size)
    if images // parts < 2 * processes:
        raise UsageError(
            f"batch_size={config.batch_size} leaves under two images for each of {processes} "
            f"processes, with accumulate={config.accumulate} and {images} images in all"
        )
