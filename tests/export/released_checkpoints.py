"""Checkpoints of the kinds of the released code's fixtures, filled from any seed, at any size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.upstream.importer import read_released
from tests.upstream_fixture import answers_folder, fill

KINDS = (
    "advmoe-resnet18-e2",
    "advmoe-resnet18-e5",
    "advmoe-resnet18-imagenet-e2",
    "advmoe-resnet50-e3",
    "advmoe-vgg16bn-e2",
    "advmoe-wrn28x10-e2",
    "dual-model-resnet18-a0.7",
    "dual-moe-resnet18-e4",
    "experts-block-layer4-e8-k1",
    "experts-block-layer4.1-e4-k2",
    "experts-conv-layer4-e4-k2",
    "experts-conv-layer4.1-e4-k1",
)


@dataclass(frozen=True)
class _Released:
    about: dict[str, Any]
    seed: int
    size: int | None

    def state(self) -> dict[str, Tensor]:
        tensors = {name: self._shape(name, shape) for name, shape in self.about["tensors"].items()}
        filled = {name: fill(name, shape, self.seed) for name, shape in tensors.items()}
        routers = self.about.get("router_tensors", {}).items()
        filled |= {f"router.{n}": fill(f"router/{n}", tuple(s), self.seed) for n, s in routers}
        return {name: torch.from_numpy(values) for name, values in filled.items()}

    def _shape(self, name: str, shape: list[int]) -> tuple[int, ...]:
        """The dual model's gates read pixels, so that their shape follows the size."""
        if self.size and name.endswith("router.gate.weight"):
            return (shape[0], 3 * self.size**2)
        return tuple(shape)

    @property
    def settings(self) -> dict[str, object]:
        settings: dict[str, object] = {}
        if self.size:
            settings["image_size"] = self.size
        if self.about["family"] == "robust-experts":
            settings["top_k"] = self.about["kwargs"]["k"]
        return settings


def run_of(kind: str, seed: int, folder: Path, size: int | None = None) -> Path:
    """Import a checkpoint of ``kind`` filled from ``seed`` and return the run under ``folder``.

    The routers of AdvMoE are balanced as the fixtures' are: of scores far apart, rounding would
    never move a route.
    """
    about = json.loads((answers_folder() / f"{kind}.json").read_text())
    released = _Released(about, seed, size)
    file = folder / "released.pth"
    torch.save({"state_dict": released.state()}, file)
    imported = read_released(file, about["family"], released.settings)
    spec, model = imported.spec, imported.model
    file.unlink()
    _balance(model, spec.image_shape)
    names = tuple(str(label) for label in range(spec.num_classes))
    checkpoint = Checkpoint(
        model=spec, threat=None, class_names=names, recipe={}, metrics={}, provenance={}
    )
    (folder / "run" / "model").mkdir(parents=True)
    save_checkpoint(folder / "run" / "model", checkpoint, model)
    return folder / "run"


def _balance(model: Classifier, image_shape: tuple[int, int, int]) -> None:
    if not isinstance(model, AdvMoE):
        return
    images = torch.rand(4, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bias_E = model.router.fc.bias
        bias_E -= model.score(images).mean(dim=0)
