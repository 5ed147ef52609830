"""Schedules that depend only on the position in a run: learning rates, batches, seeds."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

_WARM_UP = 0.3


def lr_factor(schedule: Literal["cosine", "one-cycle"], done: float) -> float:
    """Return the share of the peak learning rate when the share ``done`` of the run is over.

    ``one-cycle`` climbs in a line for the first 30 %, then falls by a cosine to zero.
    """
    if schedule == "cosine":
        return _falling(done)
    if done < _WARM_UP:
        return 0.04 + 0.96 * done / _WARM_UP
    return _falling((done - _WARM_UP) / (1 - _WARM_UP))


def epoch_batches(
    images: int, batch_size: int, *, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each batch of this epoch: all images, in batches of nearly one size."""
    order = np.random.default_rng([seed, epoch]).permutation(images).astype(np.int64)
    return np.array_split(order, max(1, math.ceil(images / batch_size)))


def step_generator(*, seed: int, epoch: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step, known from its place alone."""
    state = np.random.SeedSequence([seed, epoch, step, 0]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _falling(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
