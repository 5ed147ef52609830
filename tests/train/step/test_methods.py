"""Every method trains its families, and every loss goes down."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from advmoe_deploy.families import Family
from advmoe_deploy.models.base import is_router_parameter
from advmoe_deploy.models.routing.balance import BALANCE_LOSSES
from advmoe_deploy.train.combinations import FAMILIES_OF_METHOD
from advmoe_deploy.train.fields import BalanceLoss, Loss, Method
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import PARTS, fabric, first_batch, tiny_of

PAIRS = [
    (method, family)
    for method, families in FAMILIES_OF_METHOD.items()
    for family in families
    if method != "sparse"  # whose stages are in test_train_sparse
]


def parameters(weights: TrainedWeights) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in weights.learner.model.named_parameters()}


def moved(before: dict[str, Tensor], weights: TrainedWeights) -> set[str]:
    return {name for name, p in parameters(weights).items() if not torch.equal(p, before[name])}


def test_the_families_and_the_names_are_all_there() -> None:
    assert set(FAMILIES_OF_METHOD) == set(get_args(Method))
    assert set(get_args(BalanceLoss)) == set(BALANCE_LOSSES)
    assert {family for families in FAMILIES_OF_METHOD.values() for family in families} == set(PARTS)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_every_method_trains_its_families(method: Method, family: Family) -> None:
    config = tiny_of(family, method, "lr=0.02", "attack_step_size=0.05")
    weights = TrainedWeights(fabric(), config)
    before = parameters(weights)
    batch = first_batch(config)
    losses = [weights.step(batch) for _ in range(16 if family == "advmoe" else 8)]
    assert all(math.isfinite(loss) for loss in losses)
    if method != "router-only":  # which hardly moves anything in so few steps
        assert losses[-1] < losses[0]
    changed = {is_router_parameter(name) for name in moved(before, weights)}
    learns = {"router-only": {True}, "experts-only": {False}}
    assert changed == learns.get(
        method, {False} if family in ("dense", "pathway") else {True, False}
    )


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("method", ["joint", "advmoe"])
def test_every_loss_goes_down(loss: Loss, method: Method) -> None:
    config = tiny_of("advmoe", method, f"loss={loss}", "lr=0.02", "free_repeats=2")
    weights = TrainedWeights(fabric(), config)
    batch = first_batch(config)
    losses = [weights.step(batch) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", sorted(BALANCE_LOSSES))
def test_balance_losses_reach_every_gate(name: str) -> None:
    settings = [f"balance_loss={name}", "gate_noise=0.1", "loss=standard", "lr=1e-9"]
    config = tiny_of("robust-experts", "joint", *settings, "balance_weight=1")
    plain = tiny_of("robust-experts", "joint", "gate_noise=0.1", "loss=standard", "lr=1e-9")
    with_term, without = (TrainedWeights(fabric(), c) for c in (config, plain))
    assert with_term.step(first_batch(config)) != without.step(first_batch(plain))
    moved_gates = []
    for key, p in with_term.learner.model.named_parameters():
        if is_router_parameter(key):
            other = without.learner.model.get_parameter(key)
            moved_gates.append(not torch.equal(p, other))
    assert moved_gates
    assert all(moved_gates)


def test_capacity_acts_in_training_only() -> None:
    settings = ["capacity_factor=1", "loss=standard"]
    config = tiny_of("robust-experts", "joint", *settings)
    weights = TrainedWeights(fabric(), config)
    learner, batch = weights.learner, first_batch(config)
    scene = learner._scene(learner.phases[0], batch.parts[0])
    scene.trained(batch.parts[0].images)
    for routing in scene.trained.taken.values():
        assert int(routing.expert_load_E.max()) <= math.ceil(16 * 2 / 3)
    scene.attacked(batch.parts[0].images)
    overfull = [r.expert_load_E.max() > 11 for r in scene.attacked.taken.values()]
    assert any(overfull)


def test_parts_of_a_batch_add_up_where_nothing_is_shared_by_its_rows() -> None:
    """A ViT has no BatchNorm: two halves give the gradient of the whole."""
    whole, halves = (
        tiny_of("vit-moe", "joint", "loss=standard", f"accumulate={n}") for n in (1, 2)
    )
    ends = []
    for config in (whole, halves):
        weights = TrainedWeights(fabric(), config)
        batch = first_batch(config)
        assert len(batch.parts) == config.accumulate
        weights.step(batch)
        ends.append(parameters(weights))
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-6), name


def test_the_standard_phase_leaves_the_robust_mixture_alone() -> None:
    config = tiny_of("dual-model", "jtdmoe", "lr=0.02")
    weights = TrainedWeights(fabric(), config)
    learner, batch = weights.learner, first_batch(config)
    learner._set_lr(0.3)
    robust, standard = learner.phases
    for phase, other in ((robust, "standard"), (standard, "robust")):
        before = {n: t.clone() for n, t in learner.model.state_dict().items()}
        learner._update(phase, batch, [None])
        after = learner.model.state_dict()
        changed = {
            name.split(".")[0] for name in after if not torch.equal(after[name], before[name])
        }
        assert changed == {"robust", "standard"} - {other}


def test_the_standard_phase_balances_its_own_router_alone() -> None:
    """Exactly as much as if the robust mixture, which is frozen, had no router."""
    plain = tiny_of("dual-model", "jtdmoe")
    balanced = tiny_of("dual-model", "jtdmoe", "balance_loss=switch", "balance_weight=0.25")
    losses = []
    for config in (plain, balanced):
        learner = TrainedWeights(fabric(), config).learner
        part = first_batch(config).parts[0]
        phase = learner.phases[1]
        scene = learner._scene(phase, part)
        losses.append(learner._loss(phase, scene, part.images))
    term = BALANCE_LOSSES["switch"](learner.model.route(part.images)["standard"])
    assert term > 0.01
    assert torch.allclose(losses[1] - losses[0], 0.25 * term, atol=1e-5)


@pytest.mark.parametrize("method", ["advmoe", "advmoe-released", "joint"])
def test_an_attack_on_the_model_alone_does_not_enter_the_router(method: str) -> None:
    for target, enters in (("model", False), ("straight-through", True)):
        learner = TrainedWeights(
            fabric(), tiny_of("advmoe", method, f"attack_target={target}")
        ).learner
        part = first_batch(learner.config).parts[0]
        for phase in learner.phases:
            scene = learner._scene(phase, part)
            scene.attacked(part.images)
            assert scene.attacked.taken["router"].scores_NE.requires_grad == enters
