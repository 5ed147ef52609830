"""The losses of RT-ER and JTDMoE: by hand, in both executions, and where their gradients go."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.families.dual import (
    DualModel,
    ExpertNetworks,
    second_expert,
    second_expert_routes,
)
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Execution, Routes, Routing
from advmoe_deploy.specs import build_spec
from advmoe_deploy.train.objectives.expert_losses import (
    robust_phase_loss,
    rt_er_loss,
    standard_phase_logits,
)
from advmoe_deploy.train.objectives.losses import divergence

LABELS = torch.arange(12) % 10


def images(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(12, 1, 8, 8, dtype=torch.float64, generator=generator)


def toy(family: str = "expert-networks") -> nn.Module:
    torch.manual_seed(0)
    spec = build_spec(
        family=family,
        num_experts=3,
        width=4,
        in_channels=1,
        image_size=8,
        mean=[0.0],
        std=[1.0],
        alpha=0.7 if family == "dual-model" else None,
    )
    model = build_model(spec).double().eval()
    with torch.no_grad():  # so that all experts are used
        for part in model.modules():
            if isinstance(part, ExpertNetworks):
                part.router.bias -= part.score(images()).mean(dim=0)
    return model


def mixture() -> ExpertNetworks:
    model = toy()
    assert isinstance(model, ExpertNetworks)
    return model


def dual() -> DualModel:
    model = toy("dual-model")
    assert isinstance(model, DualModel)
    return model


class TwoExperts:
    """Two experts whose logits are known: the image itself, and twice the image."""

    def __call__(self, images_NK: Tensor, routes: Routes) -> Tensor:
        routing = routes.forced.get("router", 0)
        if isinstance(routing, Routing):
            return images_NK * (1 + routing.expert_ids_NK)
        return images_NK * (1 + routing)


# Logits (ln 3, 0) are the probabilities 3/4 and 1/4; doubled, 9/10 and 1/10.
CLEAN = torch.tensor([[math.log(3), 0.0]])
EVEN = torch.zeros(1, 2)
KL_SINGLE = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
KL_DOUBLED = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)


def test_divergence_has_the_attacked_distribution_first() -> None:
    assert divergence(EVEN, CLEAN).item() == pytest.approx(KL_SINGLE)
    both = divergence(torch.cat([EVEN, CLEAN]), torch.cat([CLEAN, CLEAN]))
    assert both.item() == pytest.approx(KL_SINGLE / 2)
    far = divergence(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert far.item() == pytest.approx(1e4)


def test_rt_er_loss_by_hand() -> None:
    scores_NE = torch.tensor([[1.0, 0.0]])  # the second expert is 1, which doubles
    routing = Routing(scores_NE, torch.tensor([[0]]), torch.ones(1, 1))
    loss = rt_er_loss(
        TwoExperts(),
        CLEAN,
        torch.tensor([1]),
        attacked_NCHW=CLEAN,
        attacked_second_NCHW=EVEN,
        taken={"router": routing},
        beta=6,
    )
    assert loss.item() == pytest.approx(-math.log(1 / 4) + 6 * KL_DOUBLED)


def test_robust_phase_loss_by_hand() -> None:
    loss = robust_phase_loss(
        TwoExperts(),
        CLEAN,
        torch.tensor([0]),
        attacked_NCHW=CLEAN,
        attacked_experts_ENCHW=[EVEN, EVEN],
        layer="router",
        beta=6,
    )
    assert loss.item() == pytest.approx(-math.log(3 / 4) + 3 * (KL_SINGLE + KL_DOUBLED))


def rt_er_of(model: ExpertNetworks, execution: Execution = "grouped", beta: float = 6) -> Tensor:
    def forward(x_NCHW: Tensor, routes: Routes) -> Tensor:
        routes.execution = execution
        logits: Tensor = model(x_NCHW, routes)
        return logits

    return rt_er_loss(
        forward,
        images(),
        LABELS,
        attacked_NCHW=images(2),
        attacked_second_NCHW=images(3),
        taken=model.route(images()),
        beta=beta,
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def test_grouped_and_masked_give_one_loss_and_one_gradient() -> None:
    model = mixture()
    grouped, masked = rt_er_of(model), rt_er_of(model, "masked")
    torch.testing.assert_close(grouped, masked)
    expected = gradients(model, masked)
    for name, gradient in gradients(model, grouped).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_each_image_meets_its_second_expert() -> None:
    model = mixture()
    taken = model.route(images())
    ids_N = second_expert(taken["router"])
    assert len(ids_N.unique()) > 1
    assert (ids_N != taken["router"].expert_ids_NK[:, 0]).all()
    every_ENK = torch.stack([model.pathway(e)(images()) for e in range(3)])
    expected = every_ENK[ids_N, torch.arange(12)]
    torch.testing.assert_close(model(images(), second_expert_routes(taken)), expected)


def test_gradient_reaches_the_router_and_the_second_experts() -> None:
    model = mixture()
    ids_N = second_expert(model.route(images())["router"])
    first = gradients(model, rt_er_of(model, beta=0))
    whole = gradients(model, rt_er_of(model))
    assert first["router.weight"].abs().sum() > 0
    torch.testing.assert_close(whole["router.weight"], first["router.weight"])
    for expert in range(3):
        change = whole[f"experts.{expert}.linear.weight"] - first[f"experts.{expert}.linear.weight"]
        assert bool(change.abs().sum() > 0) == (expert in ids_N)


def test_robust_phase_reaches_every_expert() -> None:
    model = mixture()
    loss = robust_phase_loss(
        model,
        images(),
        LABELS,
        attacked_NCHW=images(2),
        attacked_experts_ENCHW=[images(3 + e) for e in range(3)],
        layer=model.layer,
        beta=6,
    )
    clean, attacked = images(), [images(3 + e) for e in range(3)]
    changes = [divergence(model.pathway(e)(attacked[e]), model.pathway(e)(clean)) for e in range(3)]
    expected = F.cross_entropy(model(images(2)), LABELS) + 2 * sum(changes)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model, loss).items():
        assert gradient.abs().sum() > 0, name


def test_standard_phase_leaves_the_robust_mixture_alone() -> None:
    model = dual()
    torch.testing.assert_close(standard_phase_logits(model, images()), model(images()))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = gradients(model, F.cross_entropy(standard_phase_logits(model, images()), LABELS))
    assert model.robust.experts[0].training
    for name, gradient in found.items():
        if name.startswith("robust."):
            assert not gradient.any(), name
    assert found["standard.router.weight"].any()
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed
    assert all(name.startswith("standard.") for name in changed)


def test_training_on_rt_er_reduces_it() -> None:
    model = mixture().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = rt_er_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
