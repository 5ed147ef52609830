"""Whatever a method or a loss keeps between steps: interrupted runs end in the same bits."""

from pathlib import Path

import pytest

from advmoe_deploy.progress import Silent
from advmoe_deploy.reports.checkpoint import read_checkpoint
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.fields import Start
from advmoe_deploy.train.run.folder import RunState
from advmoe_deploy.train.run.loop import train
from tests.toy_training import some_digits, tiny, tiny_of

EPOCHS = 4
AVERAGED = (f"epochs={EPOCHS}", "ema_decay=0.9", "crop_padding=1", "flip=true")
CONFIGS = {
    "free": tiny_of("advmoe", "joint", "loss=free", "free_repeats=2", *AVERAGED),
    "sparse": tiny_of("dense", "sparse", *AVERAGED),
    "jtdmoe": tiny_of("dual-model", "jtdmoe", *AVERAGED),
    "noise and capacity": tiny_of(
        "robust-experts",
        "joint",
        *AVERAGED,
        "gate_noise=0.1",
        "capacity_factor=1",
        "balance_loss=load",
        "accumulate=2",
    ),
    "experts that agree": tiny(
        "digits-advmoe-agreeing", *AVERAGED, "shared_start=0.5", "router_every=2"
    ),
    "router robustness": tiny("digits-advmoe", *AVERAGED, "track_router_robustness=true"),
}


class Interrupt(Silent):
    """Ctrl-C as soon as ``epoch`` is over and saved."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def advance(self, task: str, steps: int = 1, **figures: float) -> None:
        if figures.get("epoch") == self._epoch:
            raise KeyboardInterrupt


def content(run: Path, epochs: int) -> list[object]:
    last = run / "checkpoints" / f"epoch-{epochs:04d}"
    state = RunState.model_validate_json((last / "state.json").read_bytes())
    history = [record.model_copy(update={"seconds": 0}) for record in state.history]
    files = ("weights.safetensors", "resume.safetensors")
    return [history, state.best_epoch, *((last / name).read_bytes() for name in files)]


def require_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    train(config, some_digits(), tmp_path / "whole")
    for epoch in range(
        1, config.epochs
    ):  # an interruption after each epoch: every border is crossed
        with pytest.raises(KeyboardInterrupt):
            train(
                config,
                some_digits(),
                tmp_path / "torn",
                resume=epoch > 1,
                progress=Interrupt(epoch),
            )
    train(config, some_digits(), tmp_path / "torn", resume=True)
    torn, whole = (content(tmp_path / name, config.epochs) for name in ("torn", "whole"))
    assert torn == whole


@pytest.mark.parametrize("name", CONFIGS)
def test_an_interrupted_run_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    require_same_bits(CONFIGS[name], tmp_path)


def test_so_does_a_sparse_one_that_begins_with_trained_weights(tmp_path: Path) -> None:
    """No stage holds the BatchNorm statistics that a later one moves."""
    begin = tmp_path / "begin"
    train(tiny_of("dense", "joint", "epochs=1"), some_digits(), begin)
    sha256 = read_checkpoint(begin / "model").weights_sha256
    start = Start(
        source=str(begin), path=str(begin / "model"), weights_sha256=sha256, new_head=False
    )
    # Five epochs: one of them begins in the midst of the last stage.
    longer = {"start": start, "epochs": 5}
    require_same_bits(CONFIGS["sparse"].model_copy(update=longer), tmp_path)
