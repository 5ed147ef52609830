"""Checkpoints of the released dual-model code: the same answers, and specs from shapes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.models.families.dual import second_expert
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.upstream.dual import convert
from tests.upstream_fixture import case_of, fill

State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("dual-moe-resnet18-e4", ("router",)),
        ("dual-model-resnet18-a0.7", ("standard", "robust")),
    ],
)
def test_the_released_codes_answers(name: str, layers: tuple[str, ...]) -> None:
    about, state, answers = case_of(name)
    spec, weights = convert(state, {})
    assert spec.alpha == about["kwargs"].get("alpha")
    assert spec.image_size == about["kwargs"]["size"]
    model = build_model(spec).eval()
    model.load_state_dict(weights)
    routes = Routes()
    with torch.no_grad():
        logits = model(torch.from_numpy(answers["x"]), routes)
    np.testing.assert_allclose(logits, answers["logits"], rtol=1e-5, atol=1e-5)
    assert tuple(routes.taken) == layers
    for row, layer in enumerate(layers):  # the standard mixture is the first row
        routing = routes.taken[layer]
        assert routing.expert_ids_NK[:, 0].tolist() == answers["expert_ids"][row].tolist()
        assert second_expert(routing).tolist() == answers["second_expert_ids"][row].tolist()


def released(
    *,
    seed: int = 1,
    num_experts: int = 3,
    width: int = 4,
    num_classes: int = 10,
    in_channels: int = 3,
    size: int = 16,
    prefix: str = "",
) -> State:
    """One mixture in the released code's form, filled from its names."""
    shapes: dict[str, tuple[int, ...]] = {
        "router.gate.weight": (num_experts, in_channels * size**2),
        "router.gate.bias": (num_experts,),
    }
    for expert in range(num_experts):
        for name, shape in _resnet18(width, num_classes, in_channels).items():
            shapes[f"experts.{expert}.net.{name}"] = shape
    return {prefix + n: torch.from_numpy(fill(prefix + n, s, seed)) for n, s in shapes.items()}


def _resnet18(width: int, num_classes: int, in_channels: int) -> dict[str, tuple[int, ...]]:
    shapes = {"conv1.weight": (width, in_channels, 3, 3), **_norm("bn1", width)}
    before = width
    for block in range(8):
        stage, channels = block // 2, width * 2 ** (block // 2)
        name = f"layer{stage + 1}.{block % 2}"
        shapes |= {
            f"{name}.conv1.weight": (channels, before, 3, 3),
            **_norm(f"{name}.bn1", channels),
        }
        shapes |= {f"{name}.conv2.weight": (channels, channels, 3, 3)}
        shapes |= _norm(f"{name}.bn2", channels)
        if before != channels:
            shapes |= {f"{name}.shortcut.0.weight": (channels, before, 1, 1)}
            shapes |= _norm(f"{name}.shortcut.1", channels)
        before = channels
    return {**shapes, "linear.weight": (num_classes, before), "linear.bias": (num_classes,)}


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{kind}": (channels,) for kind in kinds} | {f"{name}.num_batches_tracked": ()}


def answer(state: State, x_NCHW: Tensor, prefix: str = "") -> Tensor:
    """What the released code answers, written out: each image by its best-scored ResNet-18."""
    gate = f"{prefix}router.gate"
    scores_NE = F.linear(x_NCHW.flatten(1), state[f"{gate}.weight"], state[f"{gate}.bias"])
    rows = zip(x_NCHW, scores_NE.argmax(dim=1).tolist(), strict=True)
    return torch.cat([_run(state, f"{prefix}experts.{e}.net.", x[None]) for x, e in rows])


def _run(state: State, prefix: str, h: Tensor) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{prefix}{name}.{kind}"] for kind in kinds))

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{prefix}{name}.weight"], stride=stride, padding=padding)

    h = F.relu(norm("bn1", conv("conv1", h)))
    for block in range(8):
        name = f"layer{block // 2 + 1}.{block % 2}"
        stride = 2 if block in (2, 4, 6) else 1
        y = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", h, stride)))
        y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
        if stride == 2:
            h = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", h, 2, padding=0))
        h = F.relu(y + h)
    return F.linear(
        h.mean(dim=(2, 3)), state[f"{prefix}linear.weight"], state[f"{prefix}linear.bias"]
    )


SIZES = [
    {"seed": 7},
    {"seed": 2, "num_experts": 5, "num_classes": 3, "size": 8},
    {"seed": 3, "num_experts": 2, "width": 6, "in_channels": 1, "size": 28},
]


@pytest.mark.parametrize("wrapped", ["", "module."])
@pytest.mark.parametrize("sizes", SIZES, ids=["3-experts", "5-experts", "grey"])
def test_mixtures_of_other_seeds_and_sizes(sizes: dict[str, int], wrapped: str) -> None:
    state = released(**sizes)  # type: ignore[arg-type]
    spec, weights = convert({f"{wrapped}{name}": t for name, t in state.items()}, {})
    assert spec.family == "expert-networks"
    for field in sizes.keys() & {"num_experts", "num_classes", "width", "in_channels"}:
        assert getattr(spec, field) == sizes[field]
    assert spec.image_size == sizes.get("size", 16)
    model = build_model(spec).eval()
    model.load_state_dict(weights)
    x_NCHW = images_for(spec.image_shape)
    torch.testing.assert_close(model(x_NCHW), answer(state, x_NCHW), rtol=1e-5, atol=1e-5)


def images_for(shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", [None, "0.5", 1.0])
def test_dual_models_of_other_seeds_and_shares(alpha: object) -> None:
    state = released(seed=4, prefix="Smoe.") | released(seed=4, prefix="Rmoe.")
    spec, weights = convert(state, {} if alpha is None else {"alpha": alpha})
    assert spec.family == "dual-model"
    share = 0.7 if alpha is None else float(str(alpha))
    assert spec.alpha == share
    model = build_model(spec).eval()
    model.load_state_dict(weights)
    x_NCHW = images_for(spec.image_shape)
    standard, robust = (answer(state, x_NCHW, part) for part in ("Smoe.", "Rmoe."))
    expected = (1 - share) * standard + share * robust
    torch.testing.assert_close(model(x_NCHW), expected, rtol=1e-5, atol=1e-5)


def test_normalisation_is_told() -> None:
    spec, _ = convert(released(), {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)})
    assert spec.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"router.gate.weight": None}, "no router.gate.weight"),
        ({"experts.0.net.conv1.weight": None}, "no experts.0.net.conv1.weight"),
        ({"experts.2.net.layer3.1.bn2.bias": None}, "stages.2.1.bn2.bias"),
        ({"experts.3.net.conv1.weight": torch.zeros(4, 3, 3, 3)}, "experts.3.conv1.weight"),
        ({"experts.1.net.linear.bias": torch.zeros(11)}, "experts.1.linear.bias"),
        ({"router.gate.weight": torch.zeros(3, 3 * 17)}, "square"),
        ({"router.gate.weight": torch.zeros(3)}, "router.gate.weight is .3., not 2 sizes"),
        ({"experts.0.net.conv1.weight": torch.zeros(4, 0, 3, 3)}, "not 4 sizes above 0"),
        ({"experts.0.net.linear.weight": torch.tensor(1.0)}, "linear.weight is .., not 2 sizes"),
    ],
)
def test_what_is_no_mixture_is_refused(changed: dict[str, Tensor | None], says: str) -> None:
    state = {**released(), **changed}
    with pytest.raises(CheckpointError, match=says):
        convert({name: t for name, t in state.items() if t is not None}, {})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [({"alhpa": 0.5}, "alpha"), ({"alpha": 0.5}, "alpha goes with"), ({"std": (0, 1, 1)}, "std")],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        convert(released(), overrides)
