"""Released checkpoints in the wrappers that people put around them: found, named, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.models.upstream.importer import Imported, read_released
from advmoe_deploy.settings import parse_settings
from tests.models.upstream.test_dual import released as released_mixture
from tests.models.upstream.test_robust_experts import released as released_experts
from tests.models.upstream.test_robust_experts import spec_of
from tests.models.upstream.test_upstream import TINY, model_of, refusal, released_of

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def full() -> State:
    """The released network with its router once, as the top of a file has both."""
    network, router, _ = released_of(model_of(TINY))
    return network | below("router", router)


def below(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def moved(state: State) -> State:
    """Other weights of the same names, such as an average of them."""
    return {name: t + 0.5 if t.is_floating_point() else t for name, t in state.items()}


def read(tmp_path: Path, content: object, key: str = "", *settings: str) -> Imported:
    torch.save(content, tmp_path / "file.pt")
    return read_released(tmp_path / "file.pt", "advmoe", parse_settings(settings), key)


def refused(tmp_path: Path, content: object) -> str:
    torch.save(content, tmp_path / "file.pt")
    return refusal(tmp_path / "file.pt")


def bias(imported: Imported) -> Tensor:
    return imported.model.state_dict()["backbone.linear.bias"]


def fsdp(state: State) -> State:
    """Each block wrapped on its own, and the whole again."""
    inner = {n.replace("layer1.0.", "layer1.0._fsdp_wrapped_module."): t for n, t in state.items()}
    return below("_fsdp_wrapped_module", inner)


WRAPPED = {
    "model": (lambda s: {"model": s, "optimizer": {}}, ["model"]),
    "weights": (lambda s: {"weights": s}, ["weights"]),
    "nested": (lambda s: {"checkpoint": {"model": s}}, ["checkpoint", "model"]),
    "a name of their own": (lambda s: {"run": below("student", s)}, ["run", "student"]),
    "Lightning": (lambda s: {"state_dict": below("model", s)}, ["state_dict", "model"]),
    "Lightning of DataParallel": (
        lambda s: {"state_dict": below("net.module", s)},
        ["state_dict", "net", "module"],
    ),
    "torch.compile": (lambda s: below("module._orig_mod", s), ["module", "_orig_mod"]),
    "DeepSpeed": (lambda s: {"module": s}, ["module"]),
    "FSDP": (fsdp, ["_fsdp_wrapped_module"]),
    "an average alone": (
        lambda s: {"n_averaged": torch.tensor(5)} | below("module", s),
        ["module"],
    ),
    "nothing": (lambda s: s, []),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_taken_off_and_named(case: str, full: State, tmp_path: Path) -> None:
    wrap, names = WRAPPED[case]
    imported = read(tmp_path, wrap(full))
    assert list(imported.unwrapped) == names
    for name, tensor in model_of(TINY).state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("model", "model_ema"), "model_ema"),
        (("a.model", "a.ema_model.module"), "ema_model"),
        (("a.model", "a.ema_model.module"), "a.ema_model.module"),
    ],
)
def test_of_two_networks_the_key_chooses(
    names: tuple[str, str], key: str, full: State, tmp_path: Path
) -> None:
    content = below(names[0], full) | below(names[1], moved(full))
    with pytest.raises(CheckpointError, match=f"{names[0]}, {names[1]}; choose one.*--key"):
        read(tmp_path, content)
    imported = read(tmp_path, content, key)
    assert torch.equal(bias(imported), full["linear.bias"] + 0.5)
    assert imported.left_out == (names[0],)
    assert torch.equal(bias(read(tmp_path, content, names[0])), full["linear.bias"])
    with pytest.raises(UsageError, match=f"'swa' names nothing in .*{names[0]}, {names[1]}"):
        read(tmp_path, content, "swa")


def test_the_top_is_a_dot_and_equal_networks_are_one(full: State, tmp_path: Path) -> None:
    assert read(tmp_path, {"model": full, "best": full}).unwrapped == ("best",)
    content = full | {"ema": moved(full)}
    with pytest.raises(CheckpointError, match=r"at \., ema; choose one, such as --key ema"):
        read(tmp_path, content)
    assert torch.equal(bias(read(tmp_path, content, ".")), full["linear.bias"])
    assert torch.equal(bias(read(tmp_path, content, "ema")), full["linear.bias"] + 0.5)


def test_a_router_beside_the_network_is_its_own(full: State, tmp_path: Path) -> None:
    network, router, _ = released_of(model_of(TINY))
    parts = below("model", network) | below("router", router)
    for content in ({"state_dict": parts}, {"run": {"model": network, "router": router}}):
        imported = read(tmp_path, content)
        assert torch.equal(imported.model.state_dict()["router.fc.bias"], router["fc.bias"])
        assert imported.left_out == ()
    other = {**router, "fc.bias": router["fc.bias"] + 1}
    assert "differs" in refused(tmp_path, {"state_dict": full, "router": other})
    both = {"state_dict": full, "state_dict_ema": moved(full), "router": router}
    averaged = read(tmp_path, both, "state_dict_ema").model.state_dict()
    assert torch.equal(averaged["router.fc.bias"], router["fc.bias"] + 0.5)


def normalising(mean: object, std: object) -> State:
    return {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}


def test_normalisation_goes_into_the_spec(full: State, tmp_path: Path) -> None:
    mean, std = [0.4914, 0.4822, 0.4465], [0.25, 0.25, 0.25]
    shaped = {n: t.view(1, 3, 1, 1) for n, t in normalising(mean, std).items()}
    before = below("state_dict", shaped | below("1", full))
    inside = {**full, "mu": torch.tensor(mean), "sigma": torch.tensor(std)}
    named = {"model": full | below("normalize", {n[2:]: t for n, t in shaped.items()})}
    halves = {n: t.half() if t.is_floating_point() else t for n, t in before.items()}
    for content in (before, inside, named):
        imported = read(tmp_path, content)
        assert (imported.spec.mean, imported.spec.std) == (tuple(mean), tuple(std))
        assert len(imported.normalisation) == 2
        assert imported.left_out == ()
    for content in (before, halves):
        assert read(tmp_path, content, "", "mean=0.4914,0.4822,0.4465").spec.mean == tuple(mean)
    with pytest.raises(UsageError, match=r"--set std says 1,1,1, but state_dict.0.std in the file"):
        read(tmp_path, before, "", "std=1,1,1")


def test_normalisation_of_one_channel_and_of_the_wrong_number(full: State, tmp_path: Path) -> None:
    network = below("1", full)
    assert read(tmp_path, network | normalising([0.5], [0.25])).spec.std == (0.25, 0.25, 0.25)
    says = refused(tmp_path, network | normalising([0.5, 0.5], [0.2, 0.2]))
    assert "0.mean has 2 channels, the network 3" in says
    two = network | normalising([0.5], [0.2]) | {"2.mean": torch.ones(1), "2.std": torch.ones(1)}
    assert "two normalisations" in refused(tmp_path, two)
    averaged = below("ema", moved(full) | {"mu": torch.ones(1), "sigma": torch.ones(1)})
    content = below("model", {**full, "mu": torch.zeros(1), "sigma": torch.ones(1)}) | averaged
    assert read(tmp_path, content, "model").spec.mean == (0, 0, 0)
    assert read(tmp_path, content, "ema").spec.mean == (1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_are_counted(
    dtype: torch.dtype, full: State, tmp_path: Path
) -> None:
    cast = {n: nn.Parameter(t.to(dtype)) if t.is_floating_point() else t for n, t in full.items()}
    imported = read(tmp_path, cast)
    count = sum(t.is_floating_point() for t in full.values())
    assert imported.converted == {str(dtype).removeprefix("torch."): count}
    assert torch.equal(bias(imported), full["linear.bias"].to(dtype).float())


def test_of_two_precisions_of_a_router_the_finer_stays(full: State, tmp_path: Path) -> None:
    router = {n: t for n, t in full.items() if n.startswith("router.")}
    halves = {n: t.half() if t.is_floating_point() else t for n, t in full.items()}
    imported = read(tmp_path, below("state_dict", halves) | router)
    ours = imported.model.state_dict()["router.fc.weight"]
    assert torch.equal(ours, full["router.fc.weight"])


def test_what_is_no_number_of_ours_is_refused(full: State, tmp_path: Path) -> None:
    name = "linear.weight"
    for odd, says in (
        (full[name].to(torch.float8_e4m3fn), "float8"),
        (full[name].to_sparse(), "sparse"),
        (full[name].to("meta"), "without values"),
        (full[name].to(torch.int8), "int8, not floating-point"),
        (full[name].double() + 1e300, "not finite"),
    ):
        assert says in refused(tmp_path, {**full, name: odd})


def test_batch_counts_may_be_missing(full: State, tmp_path: Path) -> None:
    without = {n: t for n, t in full.items() if "num_batches_tracked" not in n}
    imported = read(tmp_path, without)
    assert imported.filled == len(full) - len(without)
    count = imported.model.state_dict()["backbone.bn1.num_batches_tracked"]
    assert count == 0
    assert count.dtype == torch.int64


def test_safetensors_with_metadata(full: State, tmp_path: Path) -> None:
    save_file(below("model", full), tmp_path / "a.safetensors", metadata={"format": "pt"})
    imported = read_released(tmp_path / "a.safetensors", "advmoe", {})
    assert imported.unwrapped == ("model",)


def test_flattened_shards_are_named(tmp_path: Path) -> None:
    says = refused(tmp_path, {"_fsdp_wrapped_module._flat_param": torch.zeros(9)})
    assert "StateDictType.FULL_STATE_DICT" in says


@pytest.mark.parametrize("other", ["robust-experts", "dual-model"])
def test_the_wrong_source_is_named_in_wrappers_too(other: str, full: State, tmp_path: Path) -> None:
    content = {"state_dict": below("model", full), "state_dict_ema": moved(full)}
    torch.save(content, tmp_path / "file.pt")
    assert "it looks like --from advmoe" in refusal(tmp_path / "file.pt", other)


def test_robust_experts_in_lightning(tmp_path: Path) -> None:
    state = released_experts(spec_of(), seed=5, prefix="")
    beside = {"criterion.weight": torch.ones(10), "normalize.mean": torch.full((1, 3, 1, 1), 0.5)}
    beside["normalize.std"] = beside["normalize.mean"] / 2
    content = below("model.module", state) | below("attack.model.module", state) | beside
    torch.save({"state_dict": content, "hyper_parameters": Path("x")}, tmp_path / "file.ckpt")
    imported = read_released(tmp_path / "file.ckpt", "robust-experts", {"top_k": 2})
    assert imported.unwrapped == ("state_dict", "model", "module")
    assert imported.left_out == ("state_dict.attack", "state_dict.criterion")
    assert (imported.spec.mean, imported.spec.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("parts", [("",), ("Smoe.", "Rmoe.")])
def test_mixtures_of_the_dual_model(parts: tuple[str, ...], tmp_path: Path) -> None:
    state = {n: t for part in parts for n, t in released_mixture(prefix=part).items()}
    content = {"net": below("module", state), "ema": below("module", moved(state)), "acc": 5.0}
    torch.save(content, tmp_path / "ckpt.t7")
    with pytest.raises(CheckpointError, match=r"at net.module, ema.module|at ema.module, net"):
        read_released(tmp_path / "ckpt.t7", "dual-model", {})
    imported = read_released(tmp_path / "ckpt.t7", "dual-model", {}, "net")
    assert imported.unwrapped == ("net", "module")
    assert imported.spec.family == ("dual-model" if len(parts) == 2 else "expert-networks")
