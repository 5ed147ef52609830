"""What each target can do to a route, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from advmoe_deploy.attacks.black_box import attack_predictions
from advmoe_deploy.attacks.clean_routes import CleanRoutes
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.families.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel, Weighting, build_spec
from tests.attacks.digits import TARGETS, THREAT, accuracy, some_digits
from tests.toys import Linear, LinearMoE, PixelMoE, toy_spec


def test_only_a_router_has_routes_to_attack() -> None:
    dense = build_model(build_spec(family="dense", width=4, in_channels=1, mean=[0], std=[1]))
    assert isinstance(dense, DenseClassifier)
    x, y = some_digits(2)
    with pytest.raises(UsageError, match="needs a router"):
        attack_model(dense, x, y, THREAT, AttackSpec(name="pgd", target="pathway"))
    with pytest.raises(UsageError, match="square is no PGD"):
        attack_model(dense, x, y, THREAT, AttackSpec(name="square"))
    with pytest.raises(UsageError, match="needs gradients"):
        attack_predictions(lambda a: a, x.numpy(), y.numpy(), THREAT, AttackSpec(name="pgd"))


def opposites() -> tuple[LinearMoE, Tensor]:
    """Expert 0 always says class 0, expert 1 class 1; the router goes by the first pixel.

    Its scores are (p, 0.5), so that at p = 0.6 the route turns at an epsilon of 0.1.
    """
    weight, still = torch.zeros(2, 4), torch.zeros(2, 4)
    weight[0, 0] = 1
    router = Linear(weight, torch.tensor([0.0, 0.5]))
    experts = [Linear(still, torch.tensor(bias)) for bias in ([1.0, 0.0], [0.0, 1.0])]
    return LinearMoE(toy_spec(size=4), router, experts), torch.full((1, 1, 2, 2), 0.6)


@pytest.mark.parametrize(
    ("target", "fools"),
    [("straight-through", True), ("pathway", True), ("router", True), ("experts", False)],
)
def test_what_each_target_can_do_to_a_route(target: AttackTarget, fools: bool) -> None:
    model, x = opposites()
    y = torch.tensor([0])
    for epsilon, enough in ((0.12, True), (0.08, False)):
        attack = AttackSpec(name="pgd", steps=8, target=target)
        found = attack_model(model, x, y, ThreatModel(epsilon=epsilon), attack)
        assert bool(predict(model, found) != y) == (fools and enough)


def test_attacked_experts_keep_the_clean_route() -> None:
    weight = torch.zeros(2, 4)
    weight[0, 0] = 1
    router = Linear(weight, torch.tensor([0.0, 0.5]))
    # Expert 0 errs once the pixels' sum falls below 2; by then the route would be expert 1's.
    sums = torch.stack([torch.ones(4), torch.zeros(4)])
    experts = [Linear(sums, torch.tensor([-2.0, 0.0])), Linear(0 * sums, torch.tensor([1.0, 0.0]))]
    model = LinearMoE(toy_spec(size=4), router, experts)
    x, y = torch.full((1, 1, 2, 2), 0.6), torch.tensor([0])
    attack = AttackSpec(name="pgd", steps=8, target="experts")
    found = attack_model(model, x, y, ThreatModel(epsilon=0.15), attack)
    assert predict(model, found).tolist() == [0]
    assert predict(model, found, routes_of=x).tolist() == [1]


def test_clean_routes_of_tokens_stay_with_their_image() -> None:
    model = PixelMoE(toy_spec(size=4), top_k=2, weighting="renormalised")
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    clean, rows = CleanRoutes(model, x), torch.tensor([4, 1])
    assert torch.allclose(model(x[rows], clean.of(rows)), model(x[rows]))
    assert not torch.allclose(model(x[rows], clean.of(rows.flip(0))), model(x[rows]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighting", ["one", "probability"])
def test_tokens_can_be_attacked(target: AttackTarget, weighting: Weighting) -> None:
    model = PixelMoE(toy_spec(size=4), weighting=weighting)
    x = 0.45 + 0.1 * torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = predict(model, x)
    found = attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=10, target=target))
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    if weighting == "one" and target in ("pathway", "router"):  # the others meet no gradient
        assert accuracy(model, found, y) < 0.5
    assert torch.equal(
        found, attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=10, target=target))
    )


def test_an_attack_on_the_router_turns_routes_that_do_no_harm() -> None:
    model, x = opposites()
    with torch.no_grad():  # expert 1 is right too, and surer
        for expert, bias in zip(model.experts, ([1.0, 0.0], [5.0, 0.0]), strict=True):
            expert.fc.bias.copy_(torch.tensor(bias))
    attack = AttackSpec(name="pgd", steps=8, target="router", restarts=2)
    found = attack_model(model, x, torch.tensor([0]), ThreatModel(epsilon=0.12), attack)
    assert model.route(x)["router"].expert_ids_NK.tolist() == [[0]]
    assert model.route(found)["router"].expert_ids_NK.tolist() == [[1]]


def test_the_straight_through_weight_is_exactly_one_and_reaches_the_router() -> None:
    scores = torch.randn(1000, 3, requires_grad=True)
    routing = choose(scores, RoutingRule("router", scores.shape[1]), "probability")
    assert bool((routing.weights_NK == 1).all())
    routing.weights_NK.sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().min() > 0


def test_the_pathway_attack_moves_more_routes(model: AdvMoE) -> None:
    x, y = some_digits(100)
    clean = model.route(x)["router"].expert_ids_NK
    moved = []
    for target in ("model", "pathway"):
        attack = AttackSpec(name="pgd", steps=10, target=target)
        found = attack_model(model, x, y, THREAT, attack)
        moved.append(int((model.route(found)["router"].expert_ids_NK != clean).sum()))
    assert moved[1] > moved[0]
