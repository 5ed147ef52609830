"""Recipes and data that make no sense are refused, in one line, before anything is trained."""

from pathlib import Path

import pytest

from advmoe_deploy.errors import UsageError
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.run.loop import train
from tests.toy_training import some_digits, tiny, tiny_of


def refused(config: TrainConfig, *settings: str) -> str:
    with pytest.raises(UsageError) as caught:
        apply_overrides(config, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("setting", ["lr=inf", "beta=Infinity", "gate_noise=1e999", "lr=nan"])
def test_no_number_is_infinite(setting: str) -> None:
    assert "finite number" in refused(tiny(), setting)


@pytest.mark.parametrize("family", ["advmoe", "expert-networks", "dual-model"])
def test_no_image_is_left_without_an_answer(family: str) -> None:
    config = tiny_of(family, "joint")  # type: ignore[arg-type]
    told = refused(config, "capacity_factor=1", "capacity_overflow=drop")
    assert f"images of family {family} without an answer" in told
    assert apply_overrides(config, ["capacity_factor=1"]).capacity_factor == 1
    tokens = tiny_of("vit-moe", "joint", "capacity_factor=0.5", "capacity_overflow=drop")
    assert tokens.capacity_overflow == "drop"


def test_a_fixed_gate_has_nothing_to_learn() -> None:
    config = tiny("digits-conv-moe")
    assert "cannot teach gate fixed" in refused(config, "model.expert_layers.gate=fixed-gap-fc")
    fixed = ["model.expert_layers.gate=fixed-gap-fc", "balance_loss=null"]
    assert "router-only cannot train" in refused(config, *fixed, "method=router-only")
    assert apply_overrides(config, fixed).balance_loss is None


def test_a_density_of_its_own_needs_no_ratio() -> None:
    small = ["epochs=3", "model.ratio=0.5"]
    assert "nothing to prune" in refused(tiny("digits-sparse", "epochs=3"), *small)
    assert tiny("digits-sparse", *small, "sparse_density=0.2").sparse_density == 0.2


def test_parts_are_counted_of_the_images_trained_on(tmp_path: Path) -> None:
    config = tiny("digits-dense", "train_images=3", "batch_size=16", "accumulate=2")
    with pytest.raises(UsageError, match="accumulate=2 and 3 images in all"):
        train(config, some_digits(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
