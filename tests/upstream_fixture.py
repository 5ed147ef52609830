"""What the released code answered, and its weights, which are filled from their names.

The answers are in the folder that the environment variable ADVMOE_FIXTURES names.
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


def case_of(name: str) -> Case:
    """What the model is, its filled weights, and the released code's answers."""
    folder = os.environ.get("ADVMOE_FIXTURES")
    if not folder:
        pytest.skip("set ADVMOE_FIXTURES to the folder with the released code's answers")
    about = json.loads((Path(folder) / f"{name}.json").read_text())
    shapes = about["tensors"].items()
    state = {n: torch.from_numpy(fill(n, tuple(shape), about["seed"])) for n, shape in shapes}
    with np.load(Path(folder) / f"{name}.npz") as answers:
        return about, state, dict(answers)
