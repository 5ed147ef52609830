"""Checkpoints of AdvMoE's released code: the same answers and gradients, and what is refused."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.models.backbones.layers import RoutedConv2d
from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.upstream.advmoe import upstream_name
from advmoe_deploy.models.upstream.importer import read_released
from advmoe_deploy.settings import parse_settings
from advmoe_deploy.specs import build_spec
from tests.upstream_fixture import case_of, fill

CASES = {
    "advmoe-resnet18-e2": ("resnet18", "small", 2, 0.5),
    "advmoe-resnet18-e5": ("resnet18", "small", 5, 0.25),
    "advmoe-resnet50-e3": ("resnet50", "small", 3, 0.125),
    "advmoe-resnet18-imagenet-e2": ("resnet18", "imagenet", 2, 0.5),
    "advmoe-vgg16bn-e2": ("vgg16-bn", "small", 2, 0.5),
    "advmoe-wrn28x10-e2": ("wrn-28-10", "small", 2, 0.125),
}


FIRST_BANK = {"vgg16-bn": "convs.1"}


def write_released(file: Path, network: dict, router: dict, layers: list[str]) -> Path:
    """Write a checkpoint as the released code does: the router once more under every layer."""
    state = dict(network)
    for place in ("", *(f"{layer}." for layer in layers)):
        state |= {f"{place}router.{name}": tensor for name, tensor in router.items()}
    torch.save({"state_dict": state, "router": router, "arch": "x", "epoch": 7}, file)
    return file


def imported(case: str, tmp_path: Path) -> tuple[dict, AdvMoE, dict[str, np.ndarray]]:
    about, network, answers = case_of(case)
    router = {
        name: torch.from_numpy(fill(f"router/{name}", tuple(shape), about["seed"]))
        for name, shape in about["router_tensors"].items()
    }
    router["fc.bias"] -= torch.from_numpy(answers["router_bias_shift"])
    file = write_released(tmp_path / "best.pth", network, router, about["moe_layers"])
    size = {"image_size": answers["x"].shape[-1]}
    imported = read_released(file, "advmoe", size)
    spec, model = imported.spec, imported.model
    assert (spec.backbone, spec.stem, spec.num_experts, spec.ratio) == CASES[case]
    assert spec.num_classes == about["kwargs"]["num_classes"]
    assert isinstance(model, AdvMoE)
    return about, model, answers


def near(actual: Tensor, expected: np.ndarray, scale: float = 0) -> None:
    """Sums of large terms may end near zero, so what is relative is relative to the row."""
    scales = np.maximum(np.abs(expected).max(axis=1, keepdims=True), scale)
    assert (np.abs(actual.detach().numpy() - expected) <= 1e-5 * (1 + scales)).all()


def near_gradient(actual: Tensor | None, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    assert scale > 0
    assert actual is not None
    assert np.abs(actual.numpy() - expected).max() <= 1e-4 * scale


@pytest.mark.parametrize("case", CASES)
def test_the_released_codes_answers(case: str, tmp_path: Path) -> None:
    _, model, answers = imported(case, tmp_path)
    x = torch.from_numpy(answers["x"]).requires_grad_(True)
    targets = torch.from_numpy(answers["targets"])
    routes = Routes(surrogate="score")
    logits = model(x, routes)
    near(logits, answers["logits"])
    scale = float(np.abs(answers["router_bias_shift"]).max())  # what was subtracted at the end
    near(routes.taken["router"].scores_NE, answers["router_logits"], scale)
    assert routes.taken["router"].expert_ids_NK[:, 0].tolist() == answers["expert_ids"].tolist()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets), x)
    near_gradient(gradient, answers["input_grad"])


@pytest.mark.parametrize("case", CASES)
def test_the_released_codes_training_step(case: str, tmp_path: Path) -> None:
    _, model, answers = imported(case, tmp_path)
    x, targets = torch.from_numpy(answers["x"]), torch.from_numpy(answers["targets"])
    logits = model.train()(x, Routes(surrogate="score"))
    near(logits, answers["train_logits"])
    F.cross_entropy(logits, targets).backward()
    first = FIRST_BANK.get(CASES[case][0], "stages.0.0.conv1")
    bank = model.backbone.get_submodule(first)
    assert isinstance(bank, RoutedConv2d)
    near_gradient(bank.weight.grad, answers["train_first_moe_conv_grad"])
    near_gradient(model.router.fc.weight.grad, answers["train_router_fc_weight_grad"])


def released_of(model: AdvMoE) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return network, router and names of the routed layers as the released code has them."""
    network = {upstream_name(name, model.spec): t for name, t in model.state_dict().items()}
    start = "router."
    router = {n.removeprefix(start): network.pop(n) for n in [*network] if n.startswith(start)}
    layers = [
        upstream_name(f"{name}.weight", model.spec).removesuffix(".weight")
        for name, module in model.named_modules()
        if isinstance(module, RoutedConv2d)
    ]
    if model.spec.backbone.startswith("wrn"):  # made there and never used
        network |= {f"block{stage}.layer.0.bn1.weight": torch.ones(3) for stage in (1, 2, 3)}
    return network, router, layers


SMALL = {"width": 8, "router_width": 4}
SPECS = [
    ({"backbone": "resnet18", "in_channels": 1, "mean": [0.0], "std": [1.0], **SMALL}, ()),
    ({"backbone": "resnet18", "num_experts": 8, "ratio": 1.0, "num_classes": 3, **SMALL}, ()),
    ({"backbone": "resnet34", "num_experts": 4, "ratio": 0.3, "width": 16}, ()),
    (
        {"backbone": "resnet50", "stem": "imagenet", "image_size": 64, **SMALL},
        ("width=8", "image_size=64"),
    ),
    ({"backbone": "resnet18", "stem": "imagenet", "image_size": 224, "ratio": 0.0625}, ()),
    ({"backbone": "vgg16-bn", "ratio": 0.25, "image_size": 48, **SMALL}, ("width=8",)),
    ({"backbone": "vgg16-bn", "ratio": 0.1, "num_experts": 3}, ()),
    ({"backbone": "wrn-28-4", "ratio": 0.125, "num_experts": 3}, ()),
    ({"backbone": "wrn-28-4", "width": 16, "router_width": 4}, ("width=16",)),
    ({"backbone": "wrn-28-10", "ratio": 0.0625, "mean": [0.5, 0.4, 0.3]}, ("mean=0.5,0.4,0.3",)),
]


def model_of(fields: dict[str, object], *, seed: int = 3) -> AdvMoE:
    torch.manual_seed(seed)
    spec = build_spec(**{"family": "advmoe", "num_experts": 2, "ratio": 0.5, **fields})
    model = build_model(spec)
    assert isinstance(model, AdvMoE)
    return model.eval()


@pytest.mark.parametrize(("fields", "settings"), SPECS)
def test_other_seeds_and_sizes_come_back_exactly(
    fields: dict[str, object], settings: tuple[str, ...], tmp_path: Path
) -> None:
    model = model_of(fields)
    file = write_released(tmp_path / "best.pth", *released_of(model))
    imported = read_released(file, "advmoe", parse_settings(settings))
    spec, twin = imported.spec, imported.model
    assert spec == model.spec
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


TINY: dict[str, object] = {"backbone": "resnet18", **SMALL}


def write(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def refusal(file: Path, source: str = "advmoe", *settings: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_released(file, source, parse_settings(settings))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer3.1.bn2.bias": None}, "layer3.1.bn2.bias is missing"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight has no place in a resnet18"),
        ({"layer2.0.conv2.weight": torch.zeros(16, 8, 1, 1)}, "[16, 8, 1, 1], not [16, 8, 3, 3]"),
        ({"layer2.0.conv1.weight": torch.zeros(15, 4, 3, 3)}, "2 experts cannot share evenly"),
        ({"layer4.0.conv1.weight": torch.zeros(16, 16, 3, 3)}, "no one ratio"),
        ({"layer1.2.conv1.weight": torch.zeros(8, 4, 3, 3)}, "3-2-2-2 blocks"),
        ({"layer1.0.conv1.weight": None}, "none of layer1.0.conv1.weight"),
        ({"linear.weight": None}, "linear.weight is missing"),
        ({"bn1.bias": torch.full((8,), torch.nan)}, "bn1.bias holds 8 values that are not finite"),
    ],
)
def test_odd_networks_are_refused(
    changes: dict[str, Tensor | None], says: str, tmp_path: Path
) -> None:
    network, router, layers = released_of(model_of(TINY))
    changed = {name: t for name, t in {**network, **changes}.items() if t is not None}
    assert says in refusal(write_released(tmp_path / "odd.pth", changed, router, layers))


def test_copies_of_the_router_that_differ_are_refused(tmp_path: Path) -> None:
    network, router, _ = released_of(model_of(TINY))
    network["layer1.0.conv1.router.fc.bias"] = torch.ones(2)
    file = write(tmp_path, {"state_dict": network, "router": router})
    assert "router.fc.bias differs from the other copies" in refusal(file)
    assert "router.fc.weight is missing" in refusal(write(tmp_path, released_of(model_of(TINY))[0]))


def test_wrappers_and_other_containers_are_seen_through(tmp_path: Path) -> None:
    model = model_of(TINY)
    network, router, layers = released_of(model)
    wrapped = {f"module.{name}": tensor for name, tensor in network.items()}
    wrapped |= {f"module.{layers[0]}.router.{name}": tensor for name, tensor in router.items()}
    save_file(wrapped, tmp_path / "a.safetensors")
    torch.save({"net": wrapped, "acc": np.float64(3)}, tmp_path / "b.t7")
    torch.save(wrapped, tmp_path / "c.t7", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        imported = read_released(file, "advmoe", {})
        spec, twin = imported.spec, imported.model
        assert spec == model.spec
        assert torch.equal(twin.state_dict()["router.fc.bias"], router["fc.bias"])


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    network, router, _ = released_of(model_of(TINY))
    content = {"state_dict": network, "router": router}
    network["module.linear.weight"] = network["linear.weight"] + 1
    assert "holds linear.weight twice" in refusal(write(tmp_path, content))


class Code:
    """Something that only running code could bring back."""


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path, {"state_dict": {"a": torch.zeros(100)}}).read_bytes()
    damaged = {
        "empty": b"",
        "text": b"hello, world\n",
        "half": whole[: len(whole) // 2],
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "pickle": pickle.dumps({"a": 1})[:-3],
        "lying": (2**60).to_bytes(8, "little") + b"{",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert re.search("is no file of torch.save|cannot be read", refusal(tmp_path / name)), name
    assert "is no file" in refusal(tmp_path / "missing")
    assert "is no file" in refusal(tmp_path)
    assert "needs the code of" in refusal(write(tmp_path, {"net": {}, "hyper": Code()}))
    assert "holds one Tensor" in refusal(write(tmp_path, torch.zeros(3)))
    assert "no tensors by name, but epoch, acc" in refusal(write(tmp_path, {"epoch": 1, "acc": 2}))
    assert "no tensors by name" in refusal(write(tmp_path, {"state_dict": [torch.zeros(3)]}))


def test_another_familys_file_is_named(tmp_path: Path) -> None:
    file = write_released(tmp_path / "best.pth", *released_of(model_of(TINY)))
    assert "it looks like --from advmoe" in refusal(file, "dual-model")
    assert "it looks like --from advmoe" in refusal(file, "robust-experts")


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ("advmo", (), "unknown source 'advmo'; did you mean advmoe"),
        ("advmoe", ("imge_size=64",), "did you mean image_size"),
        ("advmoe", ("image_size",), "is no KEY=VALUE"),
        ("advmoe", ("image_size=big",), "image_size: "),
        ("advmoe", ("mean=0.5",), "mean and std need in_channels=3"),
        ("advmoe", ("std=1,NaN,1",), "finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    source: str, settings: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    file = write_released(tmp_path / "best.pth", *released_of(model_of(TINY)))
    with pytest.raises(UsageError, match=says) as caught:
        read_released(file, source, parse_settings(settings))
    assert "\n" not in str(caught.value)
