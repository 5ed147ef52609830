"""Adversarial training from the first epoch to the selected model.

Each epoch's order and each step's random numbers follow from (seed, epoch, step) alone, so a run
that was killed goes on, from weights, optimizers and counters, to the same weights bit for bit on
the same machine with as many threads and processes; with more or fewer, to the same but for
rounding.
"""

from functools import partial
from pathlib import Path

from lightning_fabric import Fabric

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.distributed.launch import (
    is_first_process,
    kept_refusal,
    launch,
    process_total,
    require_machine,
    was_restarted,
)
from advmoe_deploy.train.fit import require_fit
from advmoe_deploy.train.own_data import told
from advmoe_deploy.train.request import TrainRequest
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.folder import RunFolder, open_run
from advmoe_deploy.train.run.place import claimed, require_place
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.train.run.session import TrainingSession
from advmoe_deploy.train.run.trouble import costly

__all__ = ["TrainReport", "train", "train_requested"]

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
        UsageError: the folder is in the way, another process trains there or another
            configuration did, or the data do not fit the model.
        CheckpointError: the newest checkpoint is truncated or changed.
        BackendUnavailableError: the machine has too few GPUs, or none for the precision.
        DivergedError: a loss, gradient or weight is not finite; the last checkpoint is good.
        MachineError: the disk is full or may not be written; the last checkpoint is good.
    """
    require_fit(config, data, process_total(devices))
    require_machine(devices, config.precision)
    config = config.model_copy(update={"data": data.source})
    if config.chosen:
        progress.note(told(config))
    work = partial(_work, config=config, data=data, folder=RunFolder(out))
    start = partial(launch, work, devices=devices, precision=config.precision, progress=progress)
    if not is_first_process():
        return start()
    for line in costly(config):
        progress.note(f"warning: {line}")
    resume = resume or (was_restarted() and RunFolder(out).was_begun())
    with kept_refusal():
        require_place(out, resume=resume, overwrite=overwrite)
        with claimed(out):
            open_run(out, config, RunData.of(data), resume=resume, overwrite=overwrite)
            return start()


def train_requested(asked: TrainRequest, progress: Progress = _SILENT) -> TrainReport:
    """Train what was asked for; for what is raised see :func:`train`."""
    return train(
        asked.config,
        asked.data,
        asked.out,
        resume=asked.resume,
        overwrite=asked.overwrite,
        devices=asked.devices,
        progress=progress,
    )


def _work(
    fabric: Fabric, progress: Progress, *, config: TrainConfig, data: Dataset, folder: RunFolder
) -> TrainReport:
    session = TrainingSession(fabric, config, data, folder, progress)
    return session.finish(session.train())
