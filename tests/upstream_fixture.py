"""What the released code answered, and its weights, which are filled from their names.

The answers are in the folder that the environment variable ADVMOE_FIXTURES names, by default in
../shared/fixtures/upstream beside the repository. A folder that is named has to be there, as CI's
is; without one, these tests are skipped.
"""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

DEFAULT = Path(__file__).parents[2] / "shared" / "fixtures" / "upstream"

Case = tuple[dict, dict[str, Tensor], dict[str, np.ndarray]]


def fill(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Return the float32 tensor that ``name`` stands for."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        values = np.zeros(shape)
    elif last == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif last in ("running_mean", "bias"):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = math.sqrt(2 / math.prod(shape[1:])) * rng.standard_normal(shape)
    return np.asarray(values, dtype=np.float32)


def answers_folder() -> Path:
    """The folder with the released code's answers."""
    named = os.environ.get("ADVMOE_FIXTURES")
    folder = Path(named) if named else DEFAULT
    if not folder.is_dir():
        reason = f"{folder} is no folder; set ADVMOE_FIXTURES to the one with the released answers"
        (pytest.fail if named else pytest.skip)(reason)
    return folder


def case_of(name: str) -> Case:
    """What the model is, its filled weights, and the released code's answers."""
    folder = answers_folder()
    about = json.loads((folder / f"{name}.json").read_text())
    shapes = about["tensors"].items()
    state = {n: torch.from_numpy(fill(n, tuple(shape), about["seed"])) for n, shape in shapes}
    with np.load(folder / f"{name}.npz") as answers:
        return about, state, dict(answers)
