"""Parallel training of several recipes, each in a process of its own with one thread.

Networks this small hardly gain from a second thread, and two threads that wait for each other on a
busy machine lose more than tenfold.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import multiprocessing

from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.train.distributed.launch import relayed
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.loop import TrainReport, train

FEW = 100  # test images that are attacked in the quick form

_progress: Progress = Silent()  # of a worker process, set when it starts


def train_side_by_side(
    names: Sequence[str], runs: Path, quick: bool, progress: Progress
) -> dict[str, TrainReport]:
    """Return the report of each recipe, trained into ``runs / name``.

    ``quick``: one epoch, and few test images.
    """
    with (
        relayed(progress) as relay,
        ProcessPoolExecutor(
            len(names),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(relay,),
        ) as pool,
    ):
        futures = {name: pool.submit(_train, name, runs / name, quick) for name in names}
        return {name: future.result() for name, future in futures.items()}


def _begin(progress: Progress) -> None:
    global _progress
    _progress = progress
    torch.set_num_threads(1)


def _train(name: str, out: Path, quick: bool) -> TrainReport:
    config = recipe(name)
    if quick:
        config = apply_overrides(config, ["epochs=1", f"test_images={FEW}"])
    named = _Named(_progress, name)
    return train(config, load_dataset(config.data), out, overwrite=True, progress=named)


class _Named:
    """A progress whose tasks carry the recipe's name."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name

    def start(self, task: str, total: int, done: int = 0) -> None:
        self._progress.start(f"{self._name}: {task}", total, done)

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        self._progress.advance(f"{self._name}: {task}", steps, **figures)

    def finish(self, task: str) -> None:
        self._progress.finish(f"{self._name}: {task}")

    def note(self, message: str) -> None:
        self._progress.note(f"{self._name}: {message}")
