"""Attacks stay inside the threat model, do harm, and can be repeated."""

import copy
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from advmoe_deploy.attacks.autoattack import _lead_of_target
from advmoe_deploy.attacks.black_box import attack_predictions
from advmoe_deploy.attacks.clean_routes import CleanRoutes
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.losses import is_wrong
from advmoe_deploy.attacks.pgd import eval_mode, pgd_kl, project, step_size_of
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckFailedError, UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.families.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel, Weighting, build_spec
from tests.toys import Linear, LinearClassifier, LinearMoE, PixelMoE, toy_spec

THREAT = ThreatModel(epsilon=0.1)
TARGETS = get_args(AttackTarget)


def some_digits(n: int) -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    return torch.from_numpy(to_float(test.images[:n])), torch.from_numpy(test.labels[:n])


@pytest.fixture(scope="module")
def model() -> AdvMoE:
    """A tiny AdvMoE after sixty plain steps: right about most digits, not robust."""
    torch.manual_seed(0)
    spec = build_spec(
        family="advmoe",
        num_experts=2,
        ratio=0.5,
        width=8,
        router_width=4,
        in_channels=1,
        image_size=8,
        mean=[0.3],
        std=[0.4],
    )
    built = build_model(spec)
    assert isinstance(built, AdvMoE)
    train = load_dataset("digits").train
    x, y = torch.from_numpy(to_float(train.images)), torch.from_numpy(train.labels)
    built.router.fc.bias.data -= built.score(x).mean(dim=0).detach()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.05, momentum=0.9)
    for rows in [part for _ in range(6) for part in torch.randperm(1000).split(100)]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(built(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return built.eval()


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((predict(model, images) == labels).float().mean())


@pytest.mark.parametrize("target", TARGETS)
def test_pgd_stays_inside_and_lowers_accuracy(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(60)
    found = attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=8, target=target))
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    answers = predict(model, found, routes_of=x if target == "experts" else None)
    assert (answers == y).float().mean() < accuracy(model, x, y) - 0.1


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "experts"])
def test_another_function_is_attacked_by_its_own_answers(
    model: AdvMoE, target: AttackTarget
) -> None:
    x, y = some_digits(100)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.05 * parameter.data.abs().mean() * noise
    attack = AttackSpec(name="pgd", steps=8, target=target)
    asked = []

    @torch.no_grad()
    def answer(images: Tensor) -> Tensor:
        asked.append(len(images))
        logits: Tensor = other(images)
        return logits

    transferred = attack_model(model, x, y, THREAT, attack)
    found = attack_model(model, x, y, THREAT, attack, answer=answer)
    assert asked
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert accuracy(other, found, y) <= accuracy(other, transferred, y)
    assert accuracy(model, found, y) >= accuracy(model, transferred, y)


@torch.no_grad()
def test_an_answer_that_is_not_finite_is_a_mistake(model: AdvMoE) -> None:
    x, y = some_digits(20)
    left, right = x[:, 0, :, :4].sum(dim=(1, 2)), x[:, 0, :, 4:].sum(dim=(1, 2))
    assert 0 < int((left > right).sum()) < len(x)

    def overflowing(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        heavy_N = images[:, 0, :, :4].sum(dim=(1, 2)) > images[:, 0, :, 4:].sum(dim=(1, 2))
        logits[heavy_N] = torch.inf
        return logits

    attack = AttackSpec(name="pgd", steps=4)
    found = attack_model(model, x, y, THREAT, attack, answer=overflowing)
    lost_N = is_wrong(overflowing(found), y)
    assert lost_N[left > right].all()  # wrong from the start, and so they stay
    assert (~torch.isfinite(overflowing(found)).all(dim=1)).any()


def test_what_cannot_attack_another_function_is_refused(model: AdvMoE) -> None:
    x, y = some_digits(4)
    for attack in (AttackSpec(name="pgd", target="experts"), AttackSpec(name="apgd")):
        with pytest.raises(UsageError, match=r"attack the model|use pgd"):
            find_adversarial(model, x, y, THREAT, attack, answer=model)


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_seed_finds_the_same_examples(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(10)
    attack = AttackSpec(name="pgd", steps=2, target=target, restarts=2, seed=5)
    first = attack_model(model, x, y, THREAT, attack)
    assert torch.equal(first, attack_model(model, x, y, THREAT, attack))
    other = attack_model(model, x, y, THREAT, attack.model_copy(update={"seed": 6}))
    assert not torch.equal(first, other)


def test_an_attack_leaves_the_model_as_it_was(model: AdvMoE) -> None:
    x, y = some_digits(8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    model.backbone.bn1.eval()
    try:
        attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=1))
        assert model.training
        assert not model.backbone.bn1.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    finally:
        model.eval()


def test_settling_for_the_first_fools_as_many(model: AdvMoE) -> None:
    x, y = some_digits(60)
    attack = AttackSpec(name="pgd", steps=6)
    worst = attack_model(model, x, y, THREAT, attack)
    first = attack_model(model, x, y, THREAT, attack, first_only=True)
    assert accuracy(model, worst, y) == pytest.approx(accuracy(model, first, y), abs=0.04)


def test_a_clean_mistake_is_never_corrected(model: AdvMoE) -> None:
    x, _ = some_digits(30)
    wrong = (predict(model, x) + 1) % 10
    found = attack_model(model, x, wrong, THREAT, AttackSpec(name="pgd", steps=2))
    assert accuracy(model, found, wrong) == 0


class TwoHalves(nn.Module):
    """Logits (s, -s) with s the sum of the pixels less two: the best attack is known."""

    rules = ()

    def forward(self, x: Tensor, routes: object = None) -> Tensor:
        s = x.sum(dim=(1, 2, 3)) - 2
        return torch.stack([s, -s], dim=1)


def test_pgd_reaches_the_corner_a_linear_model_wants() -> None:
    x = torch.full((1, 1, 2, 2), 0.6)  # sum 2.4: class 0; lowering each pixel by 0.15 flips it
    attack = AttackSpec(name="pgd", steps=5)
    fooled = attack_model(TwoHalves(), x, torch.tensor([0]), ThreatModel(epsilon=0.15), attack)  # type: ignore[arg-type]
    assert torch.allclose(fooled, torch.full_like(x, 0.45))


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


def test_without_a_random_start_the_seed_does_not_matter(model: AdvMoE) -> None:
    x, y = some_digits(10)
    one, other = (
        attack_model(
            model, x, y, THREAT, AttackSpec(name="pgd", steps=2, random_start=False, seed=seed)
        )
        for seed in (0, 1)
    )
    assert torch.equal(one, other)
    with pytest.raises(ValidationError, match="would all be the same"):
        AttackSpec(name="pgd", random_start=False, restarts=2)


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgd-t", "fab-t", "square", "rays"])
def test_every_attack_is_found_by_name(model: AdvMoE, name: Literal["pgd", "apgd"]) -> None:
    x, y = some_digits(30)
    attack = AttackSpec(name=name, steps=20, seed=1)
    state = torch.random.get_rng_state()
    found = find_adversarial(model, x, y, THREAT, attack)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert accuracy(model, found, y) < accuracy(model, x, y)
    assert torch.equal(found, find_adversarial(model, x, y, THREAT, attack))
    assert find_adversarial(model, x[:0], y[:0], THREAT, attack).shape == (0, 1, 8, 8)


def test_apgd_does_what_it_can_aim_at(model: AdvMoE) -> None:
    x, y = some_digits(20)
    for target in ("model", "straight-through"):
        attack = AttackSpec(name="apgd", steps=20, target=target)
        found = find_adversarial(model, x, y, THREAT, attack)
        pgd = attack_model(model, x, y, THREAT, AttackSpec(name="pgd", steps=20, target=target))
        assert accuracy(model, found, y) <= accuracy(model, pgd, y) + 0.1
    with pytest.raises(UsageError, match="cannot aim at target pathway"):
        find_adversarial(model, x, y, THREAT, AttackSpec(name="apgd", target="pathway"))


def test_default_step_and_projection() -> None:
    assert step_size_of(AttackSpec(name="pgd", steps=10), THREAT) == pytest.approx(0.025)
    assert step_size_of(AttackSpec(name="pgd", step_size=0.3), THREAT) == 0.3
    x = torch.tensor([0.0, 0.5, 1.0])
    assert project(x + 0.2, x, 0.1).tolist() == pytest.approx([0.1, 0.6, 1.0])


def test_pgd_kl_raises_the_divergence_it_climbs(model: AdvMoE) -> None:
    x, _ = some_digits(20)

    def divergence(x_adv: Tensor) -> float:
        with torch.no_grad():
            p, q = model(x).log_softmax(1), model(x_adv).log_softmax(1)
        return float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    start = x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = pgd_kl(model, x, start, threat=THREAT, steps=3, step_size=0.05)
    assert (found - x).abs().max() <= THREAT.epsilon + 1e-6
    assert divergence(found) > 0.1


def test_square_attacks_anything_that_answers(model: AdvMoE) -> None:
    x, y = some_digits(40)

    def answer(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()

    attack = AttackSpec(name="square", steps=60, seed=1)
    state = torch.random.get_rng_state()
    found = attack_predictions(answer, x.numpy(), y.numpy(), THREAT, attack)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.abs(found - x.numpy()).max() <= THREAT.epsilon + 1e-6
    assert accuracy(model, torch.from_numpy(found), y) < accuracy(model, x, y)
    again = attack_predictions(answer, x.numpy(), y.numpy(), THREAT, attack)
    assert np.array_equal(found, again)


def test_autoattack_leaves_nothing_of_a_weak_model(model: AdvMoE) -> None:
    x, y = some_digits(6)
    wide = ThreatModel(epsilon=0.5)  # so that its first attack succeeds and the test is short
    found = find_adversarial(model, x, y, wide, AttackSpec(name="autoattack"))
    assert (found - x).abs().max() <= wide.epsilon + 1e-5
    assert accuracy(model, found, y) == 0


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_knows_fewer_than_ten_classes(classes: int) -> None:
    model = pixels(classes)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1.0
    # A ball of 0.2 leaves 0.8 against 0.2, whatever is tried; one of 0.6 leaves 0.4 against 0.6.
    for epsilon, right in ((0.2, 1), (0.6, 0)):
        threat, attack = ThreatModel(epsilon=epsilon), AttackSpec(name="autoattack")
        found = find_adversarial(model, x, torch.tensor([0]), threat, attack)
        assert accuracy(model, found, torch.tensor([0])) == right


def pixels(classes: int) -> LinearClassifier:
    """A model whose logits are the first pixels."""
    return LinearClassifier(toy_spec(classes), torch.eye(classes, 16), torch.zeros(classes))


def test_autoattacks_third_loss_is_the_targets_lead() -> None:
    class Attack:
        y_target = torch.tensor([2, 0])

    logits = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
    assert _lead_of_target(Attack(), logits, torch.tensor([0, 1])).tolist() == [-1.0, 1.0]


def test_eval_mode_gives_each_module_its_own_mode_back() -> None:
    pair = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1)).train()
    pair[1].eval()
    with eval_mode(pair):
        assert not pair[0].training
    assert pair[0].training
    assert not pair[1].training


def test_an_attack_on_the_router_turns_routes_that_do_no_harm() -> None:
    model, x = opposites()
    with torch.no_grad():  # expert 1 is right too, and surer
        for expert, bias in zip(model.experts, ([1.0, 0.0], [5.0, 0.0]), strict=True):
            expert.fc.bias.copy_(torch.tensor(bias))
    attack = AttackSpec(name="pgd", steps=8, target="router", restarts=2)
    found = attack_model(model, x, torch.tensor([0]), ThreatModel(epsilon=0.12), attack)
    assert model.route(x)["router"].expert_ids_NK.tolist() == [[0]]
    assert model.route(found)["router"].expert_ids_NK.tolist() == [[1]]


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "router"])
def test_more_restarts_never_find_less(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(60)
    losses = []
    for restarts in (1, 4):
        attack = AttackSpec(name="pgd", steps=3, target=target, restarts=restarts)
        found = attack_model(model, x, y, THREAT, attack)
        routes = CleanRoutes(model, x).of(torch.arange(60)) if target == "experts" else None
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(found, routes), y, reduction="none"))
    right_N = losses[1] < np.log(2)  # certainly right: such an image is still under attack
    assert right_N.any()
    assert (losses[1] >= losses[0] - 1e-6)[right_N].all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_that_answers_nan_is_not_called_robust(model: AdvMoE, target: AttackTarget) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.backbone.linear.bias[3] = torch.nan
    with pytest.raises(CheckFailedError, match="not finite under attack"):
        attack_model(broken, *some_digits(5), THREAT, AttackSpec(name="pgd", target=target))


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


@pytest.mark.parametrize("target", TARGETS)
def test_no_images_are_no_problem(model: AdvMoE, target: AttackTarget) -> None:
    x, y = some_digits(0)
    assert attack_model(model, x, y, THREAT, AttackSpec(name="pgd", target=target)).shape == x.shape
    assert predict(model, x).shape == (0,)
