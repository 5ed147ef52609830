"""Toy recipes and data that the tests of training share."""

import numpy as np
from lightning_fabric import Fabric

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.families import Family
from advmoe_deploy.specs import build_spec
from advmoe_deploy.train.config import TrainConfig, without_router
from advmoe_deploy.train.data.loader import Batch, DataLoader
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.recipes.base import variant

TINY = [
    "epochs=2",
    "batch_size=16",
    "attack_steps=1",
    "holdout_attack_steps=1",
    "test_attack_steps=2",
    "evaluate_every=1",
]
PARTS: dict[Family, dict[str, object]] = {
    "dense": {},
    "pathway": {"ratio": 0.5},
    "advmoe": {"num_experts": 2, "ratio": 0.5, "router_width": 2},
    "robust-experts": {
        "num_experts": 3,
        "top_k": 2,
        "weighting": "renormalised",
        "expert_layers": {"kind": "conv", "layers": ["layer4.1"]},
    },
    "expert-networks": {"num_experts": 2},
    "dual-model": {"num_experts": 2, "alpha": 0.7},
    "vit-moe": {
        "num_experts": 2,
        "backbone": "vit",
        "width": 12,
        "weighting": "probability",
        "transformer": {"patch_size": 4, "depth": 2, "moe_blocks": [1]},
    },
}


def tiny(name: str = "digits-advmoe", *settings: str) -> TrainConfig:
    """A digits recipe at toy size."""
    narrow = ["model.width=4", "model.router_width=2"]
    return apply_overrides(recipe(name), [*narrow, *TINY, *settings])


def tiny_of(family: Family, method: str, *settings: str) -> TrainConfig:
    """A toy recipe for any family and method, without AdvMoE's own remedies."""
    digits = {"in_channels": 1, "image_size": 8, "mean": (0.0,), "std": (1.0,), "width": 4}
    model = build_spec(family=family, **{**digits, **PARTS[family]})
    base = without_router(recipe("digits-advmoe"), name="toy", model=build_spec(family="dense"))
    loss = "pgd-at" if method in ("rt-er", "jtdmoe") else "trades"
    config = variant(base, name="toy", model=model, method=method, loss=loss)
    return apply_overrides(config, [*TINY, "schedule=cosine", *settings])


def some_digits() -> Dataset:
    """48 images to train on, 20 held out, 30 to test on."""
    digits = load_dataset("digits")
    return Dataset(
        source="digits",
        class_names=digits.class_names,
        train=digits.train.take(np.arange(48)),
        holdout=digits.holdout.take(np.arange(20)),
        test=digits.test.take(np.arange(30)),
    )


def fabric() -> Fabric:
    """One process on the CPU."""
    return Fabric(accelerator="cpu", devices=1)


def first_batch(config: TrainConfig) -> Batch:
    """The first batch of the first epoch."""
    return next(DataLoader(fabric(), config, some_digits().train).epoch(0))
