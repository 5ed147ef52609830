"""Several processes train what one does, and torchrun restarts those that fail."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe_deploy.errors import BackendUnavailableError, DivergedError, MachineError, UsageError
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import DataLoader
from advmoe_deploy.train.distributed.launch import launch
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import some_digits, tiny, tiny_of

# 48 images in batches of 16, or of 15 and in two parts: shares of one size and of several.
EVEN, UNEVEN = "batch_size=16", "batch_size=15"
MOVES = ("crop_padding=1", "flip=true")


def configs() -> dict[str, TrainConfig]:
    """What differs most in how processes depend on each other."""
    noisy = ("gate_noise=0.1", "balance_loss=importance-load", "balance_weight=1")
    return {
        "advmoe": tiny("digits-advmoe", EVEN, *MOVES),
        "advmoe on batch statistics": tiny("digits-advmoe", UNEVEN, "attack_in_eval_mode=false"),
        "robust experts": tiny_of("robust-experts", "joint", UNEVEN, *noisy, *MOVES),
        "tokens in parts": tiny_of("vit-moe", "joint", EVEN, "accumulate=2", *noisy),
        "free": tiny_of("advmoe", "joint", UNEVEN, "loss=free", "free_repeats=2"),
        "dual": tiny_of("dual-model", "jtdmoe", EVEN),
    }


def trained(fabric: Fabric, progress: Progress, *, out: Path) -> None:
    """Write the weights of each configuration after two steps in double precision."""
    torch.set_num_threads(1)
    ends = {}
    for name, config in configs().items():
        weights = TrainedWeights(fabric, config)
        weights.learner.model.double()
        batches = DataLoader(fabric, config, some_digits().train).epoch(0)
        for index, batch in enumerate(islice(batches, 2)):
            parts = tuple(replace(part, images=part.images.double()) for part in batch.parts)
            exact = replace(batch, parts=parts)
            if index == 0 and config.balanced_start:
                weights.balance_start(exact)
            weights.step(exact)
        ends[name] = weights.learner.model.state_dict()
    if fabric.is_global_zero:
        torch.save(ends, out)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """The weights that one process and two reach."""
    files = [tmp_path_factory.mktemp("ends") / f"{n}.pt" for n in (1, 2)]
    for n, file in enumerate(files, start=1):
        work = partial(trained, out=file)
        launch(work, devices=n, precision="32-true", progress=Silent())
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("name", configs())
def test_two_processes_reach_the_weights_of_one(
    ends: list[dict[str, dict[str, Tensor]]], name: str
) -> None:
    one, two = (end[name] for end in ends)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], rtol=1e-8, atol=1e-9), key


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    config = tiny("digits-advmoe", "epochs=1")
    report = train(config, some_digits(), tmp_path / "run", devices=2)
    assert report.devices == 2
    assert report.images == 30
    assert sum(report.expert_load["router"]) == 30
    load_checkpoint(tmp_path / "run" / "model")


def test_a_process_may_have_no_image_to_measure(tmp_path: Path) -> None:
    data = some_digits()
    few = replace(data, holdout=data.holdout.first(1))
    config = tiny("digits-advmoe", "epochs=1", "test_images=1", "track_router_robustness=true")
    report = train(config, few, tmp_path / "run", devices=2)
    assert report.images == 1
    assert sum(report.expert_load["router"]) == 1


def test_an_error_in_a_process_comes_back_as_itself(tmp_path: Path) -> None:
    config = tiny("digits-dense", "epochs=1", "lr=1e30", "schedule=cosine")
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        train(config, some_digits(), tmp_path / "run", devices=2)


def killed(fabric: Fabric, progress: Progress) -> None:
    if fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # which the launcher ends


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_process_that_was_killed_says_so() -> None:
    with pytest.raises(MachineError, match="SIGKILL; where memory ran out"):
        launch(killed, devices=2, precision="32-true", progress=Silent())


def out_of_memory(fabric: Fabric, progress: Progress) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_a_process_without_memory_says_so() -> None:
    with pytest.raises(MachineError, match="out of memory; lower the batch size"):
        launch(out_of_memory, devices=2, precision="32-true", progress=Silent())


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="under two images for each of 9 processes"):
        train(tiny(), some_digits(), tmp_path / "run", devices=9)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="needs a GPU"):
            train(tiny("digits-dense", "precision=16-mixed"), some_digits(), tmp_path / "run")
