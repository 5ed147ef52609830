"""TensorBoard log of a run; no other module knows TensorBoard."""

from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from advmoe_deploy.errors import missing_extra
from advmoe_deploy.train.run.report import EpochRecord


class Board:
    """Event files of one run; what an interrupted run wrote after ``first_epoch`` is purged."""

    def __init__(self, directory: Path, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "train") from None
        self._writer = SummaryWriter(str(directory), purge_step=first_epoch)

    def write(self, record: EpochRecord) -> None:
        """Write the scalars of one epoch."""
        for name, value in record.scalars().items():
            self._writer.add_scalar(name, value, record.epoch)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
