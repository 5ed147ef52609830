"""Ways around a hard route: pathways with two goals, the soft form, the weakest expert."""

import pytest
import torch
from torch import Tensor

from advmoe_deploy.attacks import pathways
from advmoe_deploy.attacks.losses import attack_loss, likeliest_targets
from advmoe_deploy.attacks.objectives import objectives_for
from advmoe_deploy.attacks.pathways import forced, second_choices, weakest_pathway, whole_pathways
from advmoe_deploy.attacks.pgd import Ascent, pgd_search, step_sizes_of
from advmoe_deploy.attacks.route_aware import route_aware, withstanding
from advmoe_deploy.attacks.scene import Scene
from advmoe_deploy.attacks.soft import SoftForm
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.specs import AttackSpec, AttackTarget, ThreatModel
from tests.conftest import TINY
from tests.families import spec_of
from tests.toys import Linear, LinearClassifier, LinearMoE, toy_spec

SETTLING = AttackSpec(name="pgd", steps=20, loss="margin", momentum=0.75, decay=True)


def noise(n: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def two_goals() -> tuple[LinearMoE, Tensor]:
    """Expert 1 errs where the first pixel is low, and is chosen where the second is high.

    Expert 0 is right everywhere, and chosen while the second pixel is below 0.5.
    """
    score, error = torch.zeros(2, 4), torch.zeros(2, 4)
    score[1, 1] = 1.0
    error[0, 0] = 20.0
    router = Linear(score, torch.tensor([0.5, 0.0]))
    experts = [
        Linear(torch.zeros(2, 4), torch.tensor([2.0, 0.0])),
        Linear(error, torch.tensor([-10.0, 0.0])),
    ]
    x = torch.full((1, 1, 2, 2), 0.45)
    x[0, 0, 0, 0] = 0.55
    return LinearMoE(toy_spec(), router, experts), x


@pytest.mark.parametrize("target", ["pathway", "weakest", "soft"])
def test_both_goals_are_reached(target: str) -> None:
    model, x = two_goals()
    y = torch.tensor([0])
    attack = SETTLING.model_copy(update={"target": target, "random_start": False})
    for epsilon, fools in ((0.08, True), (0.04, False)):  # either goal is 0.05 away
        found = attack_model(model, x, y, ThreatModel(epsilon=epsilon), attack)
        assert bool(predict(model, found) != y) == fools


def test_a_goal_that_is_reached_no_longer_pulls() -> None:
    model, x = two_goals()
    x, y = x.clone(), torch.tensor([0])
    attack = AttackSpec(name="pgd", target="pathway")
    ascend = objectives_for(Scene.of(model, x, y), attack, None)[1]  # towards expert 1
    x[0, 0, 0, 0] = 0.4  # errs
    gradient = ascend(x, y, torch.tensor([0])).gradient_NCHW[0, 0]
    assert gradient[0, 0] == 0
    assert gradient[0, 1] > 0
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.55, 0.6  # is routed there, and right
    gradient = ascend(x, y, torch.tensor([0])).gradient_NCHW[0, 0]
    assert gradient[0, 0] < 0
    assert gradient[0, 1] == 0
    x[0, 0, 0, 0] = 0.4
    ascent = ascend(x, y, torch.tensor([0]))
    assert ascent.fooled_N.all()
    assert not ascent.gradient_NCHW.any()


@pytest.fixture(scope="module")
def moe() -> Classifier:
    return untrained_model(TINY, noise(64, TINY.image_shape)).eval()


@torch.no_grad()
def test_the_soft_form_lies_between_the_model_and_the_mean_of_its_pathways(moe: Classifier) -> None:
    x = noise(32, TINY.image_shape)
    wanted = [p.requires_grad for p in moe.parameters()]
    routes = Routes()
    hard = moe(x, routes)
    each = torch.stack([moe(x, moe.forced(expert)) for expert in range(2)])
    cold, warm = (SoftForm(moe, routes.taken, t)(x) for t in (1e-6, 1e6))
    torch.testing.assert_close(cold, hard, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(warm, each.mean(dim=0), rtol=1e-4, atol=1e-4)
    assert [p.requires_grad for p in moe.parameters()] == wanted


def test_every_pair_of_a_dual_models_experts_is_tried() -> None:
    spec = spec_of("dual model")
    model = untrained_model(spec, noise(16, spec.image_shape)).eval()
    x = noise(4, spec.image_shape)
    clean = Scene.of(model, x, torch.zeros(4, dtype=torch.int64)).routings
    whole = whole_pathways(model, clean, len(x))
    chosen = {tuple(int(ids[0, 0]) for ids in pathway.values()) for pathway in whole}
    experts = spec.num_experts
    assert chosen == {(one, other) for one in range(experts) for other in range(experts)}
    assert second_choices(model, clean, len(x)) == []


def test_of_too_many_layers_second_choices_are_tried_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pathways, "MOST_COMBINATIONS", 1)
    spec = spec_of("token experts")
    model = untrained_model(spec, noise(16, spec.image_shape)).eval()
    x = noise(3, spec.image_shape)
    clean = Scene.of(model, x, torch.zeros(3, dtype=torch.int64)).routings
    whole = whole_pathways(model, clean, len(x))
    assert len(whole) == len(model.experts_in_use)
    second = second_choices(model, clean, len(x))
    assert [list(pathway) for pathway in second] == [[rule.layer] for rule in model.rules]
    for pathway in second:
        ((layer, ids_NT),) = pathway.items()
        assert (ids_NT.flatten()[:, None] != clean[layer].expert_ids_NK).all()


@torch.no_grad()
def test_the_weakest_pathway_is_that_of_the_least_margin(moe: Classifier) -> None:
    x = noise(20, TINY.image_shape)
    y = predict(moe, x)
    clean = Scene.of(moe, x, y).routings
    pathway = weakest_pathway(moe, whole_pathways(moe, clean, len(x)), x, y)
    everyone = torch.arange(len(x))
    lead = attack_loss("margin", moe(x, forced(pathway, everyone)), y)
    others = [attack_loss("margin", moe(x, moe.forced(expert)), y) for expert in range(2)]
    torch.testing.assert_close(lead, torch.stack(others).amax(dim=0))
    assert set(pathway["router"].flatten().tolist()) <= {0, 1}


def test_losses_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    y, target = torch.tensor([0]), torch.tensor([1])
    assert attack_loss("margin", logits, y).tolist() == [-1.0]
    assert attack_loss("margin", logits, y, target).tolist() == [-2.0]
    assert attack_loss("cross-entropy", logits, y, target) == logits.log_softmax(1)[0, 1]
    assert [t.tolist() for t in likeliest_targets(logits, y, 9)] == [[2], [1]]


def test_steps_settle() -> None:
    sizes = step_sizes_of(SETTLING, ThreatModel(epsilon=0.2))
    assert sizes[0] == 0.2
    assert sizes[-1] == pytest.approx(0.01)
    assert sizes == sorted(sizes, reverse=True)


def test_momentum_remembers_the_way() -> None:
    """A gradient that turns back once is outvoted by the steps before it."""
    seen: list[float] = []

    def objective(x: Tensor, y: Tensor, rows: Tensor) -> Ascent:
        seen.append(float(x))
        sign = -1.0 if len(seen) == 3 else 1.0
        one = torch.zeros(1)
        return Ascent(torch.full_like(x, sign), one, one.bool())

    x, y = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    for momentum, end in ((0.0, 0.2), (0.75, 0.4)):
        seen.clear()
        pgd_search(
            objective,
            x,
            y,
            x,
            rows_N=torch.tensor([0]),
            threat=ThreatModel(epsilon=1.0),
            step_sizes=[0.1] * 4,
            momentum=momentum,
        )
        assert seen[-1] == pytest.approx(end)


def test_a_targeted_search_tries_each_class() -> None:
    # Class 1 is nearest but cannot be reached; class 2 can.
    weight, bias = torch.zeros(3, 4), torch.tensor([1.0, 0.9, 0.0])
    weight[2, 0] = 2.0
    model = LinearClassifier(toy_spec(3), weight, bias)
    x, y = torch.full((1, 1, 2, 2), 0.4), torch.tensor([0])
    for classes, fools in ((1, False), (2, True)):
        attack = AttackSpec(
            name="pgd", steps=10, loss="margin", classes=classes, random_start=False
        )
        found = attack_model(model, x, y, ThreatModel(epsilon=0.2), attack)
        assert bool(predict(model, found) != y) == fools


def test_route_aware_means_the_pathways_of_what_routes(moe: Classifier) -> None:
    attack = AttackSpec(name="pgd", steps=5, seed=3)
    ours = route_aware(moe, attack)
    assert [(a.target, a.steps, a.seed) for a in ours] == [("model", 5, 3), ("pathway", 5, 3)]
    dense = LinearClassifier(toy_spec(2), torch.eye(2, 16), torch.zeros(2))
    assert route_aware(dense, attack) == (attack,)
    model, x = two_goals()
    stands = withstanding(
        model, x, torch.tensor([0]), ThreatModel(epsilon=0.08), route_aware(model, attack)
    )
    assert [s.tolist() for s in stands] == [[True], [False]]


def test_the_routes_of_both_mixtures_are_attacked_or_held() -> None:
    """RA-R and RA-E of a dual model: each image has two routes."""
    test = load_dataset("digits").test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    model = untrained_model(spec_of("dual model"), x)
    x, y, wide = x[:24], y[:24], ThreatModel(epsilon=0.3)
    clean = model.route(x)
    assert set(clean) == {"standard", "robust"}
    moved = model.route(attack_model(model, x, y, wide, _pgd("router")))
    for layer, routing in clean.items():
        assert (moved[layer].expert_ids_NK != routing.expert_ids_NK).any(), layer
    found = attack_model(model, x, y, wide, _pgd("experts"))
    with torch.no_grad():
        held_N = model(found, Routes(clean)).argmax(dim=1)
    assert (predict(model, found, routes_of=x) == held_N).all()


def _pgd(target: AttackTarget) -> AttackSpec:
    return AttackSpec(name="pgd", steps=5, target=target)
