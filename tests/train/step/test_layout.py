"""Memory layouts that a model may train in."""

import pytest
import torch
from lightning_fabric import Fabric

from advmoe_deploy.models.registry import build_model
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.step.weights import place


def last_of(channels_last: bool, **fields: object) -> bool:
    spec = ModelSpec(
        **{"family": "advmoe", "backbone": "resnet18", "num_classes": 10, "num_experts": 2}
        | {"ratio": 0.5, "in_channels": 3, "image_size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        | fields
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    model = place(fabric, build_model(spec), channels_last=channels_last)
    layouts = {
        weight.is_contiguous(memory_format=torch.channels_last)
        for weight in model.parameters()
        if weight.dim() == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
    }
    assert len(layouts) == 1
    return layouts.pop()


@pytest.mark.parametrize(
    ("last", "fields"),
    [
        (True, {"width": 32}),
        (False, {"width": 16}),  # 8 channels of a pathway reach a strided shortcut
        (True, {"width": 16, "family": "dense", "ratio": 1.0, "num_experts": 1}),
        (False, {"width": 8, "family": "dense", "ratio": 1.0, "num_experts": 1}),
    ],
)
def test_narrow_shortcuts_keep_channels_first(last: bool, fields: dict[str, object]) -> None:
    assert last_of(True, **fields) is last
    assert last_of(False, **fields) is False
