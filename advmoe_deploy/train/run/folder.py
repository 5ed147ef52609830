"""Folder of one run, with the checkpoints to resume from.

RUN/config.json                 the whole configuration
RUN/data.json                   where the data lay, what they hold, what their classes are called
RUN/checkpoints/epoch-NNNN/     weights.safetensors, checkpoint.json, resume.safetensors, state.json
RUN/metrics.jsonl               a line per epoch
RUN/tensorboard/
RUN/model/                      the selected model, at the end
RUN/report.json                 what it reached, at the end

Every file is whole or absent. The two newest checkpoints are kept, and the best so far of each.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, one_line
from advmoe_deploy.files import (
    remove_abandoned,
    sha256_of,
    staged_directory,
    write_atomically,
    write_in_turn,
)
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import (
    CHECKPOINT,
    WEIGHTS,
    Checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from advmoe_deploy.specs import Frozen
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.run.data import DATA, RunData
from advmoe_deploy.train.run.place import CONFIG, REPORT, require_place, require_same
from advmoe_deploy.train.run.report import EpochRecord, TrainReport

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
MODEL_FOLDER = "model"
RESUME = "resume.safetensors"
STATE = "state.json"
_EPOCH_NAME = re.compile(r"epoch-(\d{4,})")
_KEPT = 2


class RunState(Frozen):
    """State of a run after ``epoch`` epochs; ``best_epoch`` is the best on the hold-out.

    ``best_epoch`` is 0 as long as no epoch could be the result, ``best_before`` is that of the
    epoch before. ``processes`` and ``threads`` of the last epoch decide how sums are rounded.
    """

    epoch: int
    best_epoch: int
    best_before: int = 0
    history: tuple[EpochRecord, ...]
    seconds: float
    processes: int = 1
    threads: int = 1
    resume_sha256: str = ""

    def after(
        self,
        record: EpochRecord,
        seconds: float,
        *,
        selectable: bool = True,
        processes: int = 1,
        threads: int = 1,
    ) -> "RunState":
        """Return the state one epoch later; the better of two epochs is the more robust one.

        Clean accuracy decides between equals, and of equals in both the later one is kept. One
        that is not ``selectable`` is never the best.
        """
        history = (*self.history, record)
        best = self.best_epoch
        measured = selectable and record.robust_accuracy is not None
        if measured and (not best or _merit(record) >= _merit(self.history[best - 1])):
            best = record.epoch
        return RunState(
            epoch=record.epoch,
            best_epoch=best,
            best_before=self.best_epoch,
            history=history,
            seconds=seconds,
            processes=processes,
            threads=threads,
        )


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensorboard = path / "tensorboard"
        self._checkpoints = path / CHECKPOINTS

    def was_begun(self) -> bool:
        """Return whether the configuration of a run is there."""
        return (self.path / CONFIG).is_file()

    def checkpoint(self, epoch: int) -> Path:
        """Return where the checkpoint of this epoch, counted from 1, lies."""
        return self._checkpoints / f"epoch-{epoch:04d}"

    def epochs(self) -> list[int]:
        """Return the epochs that have a checkpoint, oldest first."""
        if not self._checkpoints.is_dir():
            return []
        matches = (_EPOCH_NAME.fullmatch(path.name) for path in self._checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self, state: RunState, checkpoint: Checkpoint, model: Classifier, resume: dict[str, Tensor]
    ) -> None:
        """Write the checkpoint of ``state.epoch``, then the metrics, then drop old checkpoints."""
        with staged_directory(self.checkpoint(state.epoch), overwrite=True) as partial:
            save_checkpoint(partial, checkpoint, model)
            (partial / RESUME).write_bytes(save(resume))
            sealed = state.model_copy(update={"resume_sha256": sha256_of(partial / RESUME)})
            (partial / STATE).write_text(sealed.model_dump_json(indent=2), encoding="utf-8")
        self.write_metrics(state.history)
        for epoch in self.epochs()[:-_KEPT]:
            if epoch not in (state.best_epoch, state.best_before):
                shutil.rmtree(self.checkpoint(epoch), ignore_errors=True)

    def write_metrics(self, history: Sequence[EpochRecord]) -> None:
        """Write metrics.jsonl anew, so that no line is ever doubled or half-written."""
        lines = "".join(record.model_dump_json() + "\n" for record in history)
        write_atomically(self.path / METRICS, lines.encode())

    def load(self) -> tuple[RunState, Classifier, dict[str, Tensor]] | None:
        """Return the newest checkpoint, or ``None`` if there is none yet.

        Raises:
            CheckpointError: it is truncated or changed. An older one is never taken in silence.
        """
        epochs = self.epochs()
        if not epochs:
            return None
        directory = self.checkpoint(epochs[-1])
        way_out = f"delete {directory} to go on from the checkpoint before it"
        if len(epochs) == 1:
            way_out = "train again"
        try:
            state = _read_state(directory, epochs[-1])
            _, model = load_checkpoint(directory)
            return state, model, load_file(directory / RESUME)
        except (CheckpointError, SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"cannot resume: {error}; {way_out}") from None

    def publish(self, epoch: int, source: str) -> None:
        """Write RUN/model: the weights of this epoch, and where the data lie by now."""
        checkpoint = read_checkpoint(self.checkpoint(epoch))
        provenance = {**checkpoint.provenance, "data": source}
        found = checkpoint.model_copy(update={"provenance": provenance})
        with staged_directory(self.path / MODEL_FOLDER, overwrite=True) as partial:
            shutil.copyfile(self.checkpoint(epoch) / WEIGHTS, partial / WEIGHTS)
            (partial / CHECKPOINT).write_text(found.model_dump_json(indent=2) + "\n", "utf-8")

    def write_report(self, report: TrainReport) -> None:
        """Write report.json."""
        write_atomically(self.path / REPORT, report.model_dump_json(indent=2).encode() + b"\n")


def open_run(
    path: Path, config: TrainConfig, data: RunData, *, resume: bool, overwrite: bool
) -> RunFolder:
    """Return the folder of a new run, or of one to go on with, rid of what a kill left behind.

    Raises:
        UsageError: the folder is in the way, is no run, or was trained by another configuration or
            on other data.
        CheckpointError: its configuration cannot be read.
    """
    for directory in (path, path / CHECKPOINTS):
        remove_abandoned(directory)
    if resume:
        require_place(path, resume=True, overwrite=overwrite)
        require_same(path, config, data)
    else:
        require_place(path, resume=False, overwrite=overwrite)
        _clear(path)
    # Written again by a resumed run, whose data may have moved. First what says that it was begun:
    # with it alone the run can be replaced and resumed.
    told = ((CONFIG, config), (DATA, data))
    write_in_turn(
        [(path / name, value.model_dump_json(indent=2).encode() + b"\n") for name, value in told]
    )
    return RunFolder(path)


def _merit(record: EpochRecord) -> tuple[float, float]:
    return (record.robust_accuracy or 0.0, record.clean_accuracy or 0.0)


def _clear(path: Path) -> None:
    """Remove what is in the folder of a run, last what says that it is one.

    The folder itself, which may be a link or a mounted volume, stays.
    """
    inside = path.iterdir() if path.is_dir() else ()
    for entry in sorted(inside, key=lambda entry: entry.name == CONFIG):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_state(directory: Path, epoch: int) -> RunState:
    file = directory / STATE
    try:
        state = RunState.model_validate(json.loads(file.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except ValidationError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error})") from None
    recorded = [record.epoch for record in state.history]
    if state.epoch != epoch or recorded != [*range(1, epoch + 1)]:
        raise CheckpointError(
            f"{file}: epoch={state.epoch} and {len(recorded)} in its history are "
            f"not the {epoch} of its folder"
        )
    if not 0 <= state.best_epoch <= epoch:
        raise CheckpointError(f"{file}: best_epoch={state.best_epoch} is outside 0..{epoch}")
    resume = directory / RESUME
    if not resume.is_file():
        raise CheckpointError(f"{resume} is missing")
    if sha256_of(resume) != state.resume_sha256:
        raise CheckpointError(f"{resume} is truncated or changed (SHA-256 differs)")
    return state
