"""What is said about routes, experts and limits, on models whose answers are known by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.analysis.certificate import certificate, local_radii
from advmoe_deploy.analysis.lipschitz import boundary_jumps, lipschitz_constants
from advmoe_deploy.analysis.redundancy import (
    ALL_LAYERS,
    disagreement,
    expert_report,
    second_experts,
)
from advmoe_deploy.analysis.routes import route_use
from advmoe_deploy.analysis.routing_change import MovedImage, effect_of, layer_change
from advmoe_deploy.analysis.slopes import (
    UnboundedError,
    in_float64,
    pair_slopes,
    sloped_image,
    with_slope,
)
from advmoe_deploy.analysis.theorem import theorem_radius, theorem_rate
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.cli.tables.analysis import bound_text
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.specs import AttackSpec, ThreatModel
from tests.conftest import TINY
from tests.families import spec_of
from tests.toys import Linear, LinearClassifier, LinearMoE, PixelMoE, toy_spec

THREAT = ThreatModel(epsilon=0.1)
ROUTED = (
    "AdvMoE",
    "conv experts",
    "block experts",
    "expert networks",
    "dual model",
    "token experts",
)
BOUNDED = (*ROUTED[:-1], "ResNet-50", "wide ResNet", "VGG", "DenseNet")


def digits_model(name: str, images: int) -> tuple[Classifier, Tensor, Tensor]:
    """Return a random network that uses every expert, float test digits and their labels."""
    test = load_dataset("digits").test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    spec = TINY if name == "AdvMoE" else spec_of(name)
    return untrained_model(spec, x), x[:images], y[:images]


def first_pixel_router(at: float = 0.5) -> Linear:
    """Expert 0 where the first of 16 pixels is above ``at``, else expert 1; scores (p, at)."""
    weight = torch.zeros(2, 16)
    weight[0, 0] = 1
    return Linear(weight, torch.tensor([0.0, at]))


def says(class_: int) -> Linear:
    """An expert that always answers ``class_`` of two."""
    return Linear(torch.zeros(2, 16), F.one_hot(torch.tensor(class_), 2).float())


def corners(*first_pixels: float) -> Tensor:
    """Images of 4 x 4 pixels: these first pixels, the others 0.5."""
    images = torch.full((len(first_pixels), 1, 4, 4), 0.5)
    images[:, 0, 0, 0] = torch.tensor(first_pixels)
    return images


def test_who_goes_where() -> None:
    model = LinearMoE(toy_spec(), first_pixel_router(), [says(0), says(1)])
    (use,) = route_use(model, corners(0.9, 0.8, 0.7, 0.1), torch.tensor([0, 0, 0, 1]))
    assert use.load == (3, 1)
    assert use.by_class == ((3, 0), (0, 1))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert use.effective_routes == pytest.approx(math.exp(entropy))
    assert use.class_information == pytest.approx(
        entropy / math.log(2)
    )  # the route tells the class
    assert use.rows_per_image == 1


def test_tokens_count_for_their_image() -> None:
    model = PixelMoE(toy_spec(), top_k=2, weighting="renormalised")
    x = torch.tensor([[0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]]).view(2, 1, 2, 2)
    (use,) = route_use(model, x, torch.tensor([1, 0]))
    assert use.rows_per_image == 4
    assert use.by_class == ((4, 4, 0), (3, 4, 1))


def test_a_dense_model_has_no_routes() -> None:
    dense = LinearClassifier(toy_spec(), torch.zeros(2, 16), torch.zeros(2))
    with pytest.raises(UsageError, match="routes nothing"):
        route_use(dense, corners(0.1), torch.tensor([0]))


def test_change_of_routes_by_hand() -> None:
    rule = RoutingRule("layer", 3, 2, "renormalised")
    clean = choose(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 0.0]]), rule)
    # Same set in another order; one of two kept; nothing changed.
    other = choose(torch.tensor([[2.0, 3.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 0.0]]), rule)
    change = layer_change("layer", clean, other)
    assert change.set_change == pytest.approx(1 - (1 + 1 / 3 + 1) / 3)
    assert change.flip_rate == pytest.approx(1 / 3)
    assert change.margin_clean == 1.0
    assert change.margins is not None
    assert sum(change.margins.clean) == sum(change.margins.attacked) == 3


def test_certain_gates_that_disagree_are_one_bit_apart() -> None:
    rule = RoutingRule("layer", 2)
    one, other = (choose(torch.tensor([scores]), rule) for scores in ([99.0, 0.0], [0.0, 99.0]))
    assert layer_change("layer", one, other).js_distance == pytest.approx(1.0)
    same = layer_change("layer", one, one)
    assert (same.js_distance, same.set_change, same.flip_rate) == (0.0, 0.0, 0.0)


def test_an_attack_on_the_router_is_seen_in_answers_and_routes() -> None:
    model = LinearMoE(toy_spec(), first_pixel_router(), [says(0), says(1)])
    x, y = corners(0.55, 0.9), torch.tensor([0, 0])
    attack = AttackSpec(name="pgd", steps=8, target="router")
    moved: list[MovedImage] = []
    effect = effect_of(model, x, y, THREAT, attack, moved=moved)
    assert effect.accuracy_clean.value == 1.0
    assert effect.accuracy_attacked.value == 0.5  # 0.9 is too far from 0.5
    assert effect.prediction_change.value == effect.route_change.value == 0.5
    assert effect.layers[0].set_change == 0.5
    assert effect.loss_attacked > effect.loss_clean
    (image,) = moved
    assert (image.index, image.label, image.answers) == (0, 0, (0, 1))
    assert (image.layer, image.before, image.after) == ("router", (0,), (1,))
    clean, attacked = image.pictures
    assert clean[0, 0, 0] == pytest.approx(0.55)
    assert 0.45 - 1e-6 <= attacked[0, 0, 0] < 0.5


def test_experts_by_hand() -> None:
    model = LinearMoE(toy_spec(), first_pixel_router(), [says(0), says(1)])
    x, y = corners(0.55, 0.9, 0.1, 0.2), torch.tensor([0, 0, 1, 0])
    report = expert_report(model, x, y, THREAT, AttackSpec(name="pgd", steps=8))
    assert report.accuracy.value == 0.75
    assert [row.accuracy.value for row in report.second] == [0.25]
    assert report.disagreement == ((0.0, 1.0), (1.0, 0.0))
    assert [row.clean_accuracy.value for row in report.fixed] == [0.75, 0.25]
    assert [row.robust_accuracy.value for row in report.fixed] == [0.75, 0.25]
    assert [row.apgd_accuracy.value for row in report.fixed] == [0.75, 0.25]
    assert report.fixed[0].withstood == report.fixed[0].apgd_accuracy
    gated = report.gated  # what is constant on both sides of a jump has no gradient: not attacked
    assert (gated.expert, gated.clean_accuracy.value, gated.robust_accuracy.value) == (
        None,
        0.75,
        0.75,
    )
    accuracy = {row.target: row.accuracy.value for row in report.targets}
    assert accuracy["experts"] == 0.75  # experts that always say the same cannot be attacked
    assert accuracy["router"] == accuracy["pathway"] == report.together.value == 0.5


@pytest.mark.parametrize("family", ROUTED)
def test_every_family_is_analysed(family: str) -> None:
    model, x, y = digits_model(family, 24)
    threat, attack = ThreatModel(epsilon=0.05), AttackSpec(name="pgd", steps=2)
    uses = route_use(model, x, y)
    assert [use.layer for use in uses] == [rule.layer for rule in model.rules]
    assert all(sum(use.load) == 24 * use.rows_per_image * use.top_k for use in uses)
    effect = effect_of(model, x, y, threat, attack)
    assert effect.accuracy_attacked.value <= effect.accuracy_clean.value
    report = expert_report(model, x, y, threat, attack)
    assert report.together.value <= min(
        row.accuracy.value for row in report.targets if row.target != "experts"
    )
    names = [row.layer for row in report.second]
    assert names[: len(uses)] == [use.layer for use in uses]
    assert (ALL_LAYERS in names) == (len(uses) > 1)
    constants = lipschitz_constants(model, x, threat)
    assert all(c.bound is None or c.bound >= c.sampled * 0.9999 > 0 for c in constants)
    assert all((c.bound is None) == (c.reason is not None) for c in constants)
    radii = certificate(model, x, y, threat, constants).radii
    assert {r.tag for r in radii} <= {"formal", "diagnostic", "not applicable"}
    certified = [r for r in radii if r.tag == "formal" and r.name == "answer"]
    robust_N = predict(model, x) == y
    assert all(r.certified and r.certified.value <= robust_N.float().mean() for r in certified)
    jumps = boundary_jumps(model, x, pairs=10)
    assert jumps is not None
    assert jumps.distance <= 2e-6


def test_taking_the_best_expert_away_leaves_the_second() -> None:
    model = LinearMoE(toy_spec(), first_pixel_router(), [says(0), says(1)])
    (row,) = second_experts(model, corners(0.9, 0.1), torch.tensor([1, 0]))
    assert (row.accuracy.value, row.agreement.value) == (1.0, 0.0)
    assert disagreement(model, corners(0.9)) == ((0.0, 1.0), (1.0, 0.0))


def random_linear(classes: int, seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 16, generator=generator)
    return Linear(weight, torch.randn(classes, generator=generator))


def test_the_constant_of_a_linear_map_is_exact() -> None:
    linear = random_linear(3, 0)
    weight = linear.fc.weight.detach()
    model = LinearClassifier(toy_spec(3, std=0.25), weight, linear.fc.bias)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    exact = max(float((weight[i] - weight[j]).abs().sum()) / 0.25 for i, j in pairs)
    (constant,) = lipschitz_constants(model, corners(0.1, 0.9), THREAT)
    assert constant.part == "the network"
    assert constant.bound == pytest.approx(exact, rel=1e-6)
    assert constant.sampled <= exact * (1 + 1e-5)
    assert constant.useful
    far = constant.model_copy(update={"bound": 101 * constant.sampled})
    none = constant.model_copy(update={"bound": None, "reason": "attention has no global bound"})
    assert not far.useful
    assert not none.useful
    shown = [bound_text(part) for part in (constant, far, none)]
    assert shown == [f"{exact:.3g}", "no useful bound", "attention has no global bound"]


@pytest.mark.parametrize("family", BOUNDED)
def test_no_two_images_differ_by_more_than_the_bound(family: str) -> None:
    model, x, _ = digits_model(family, 16)
    routes = model.forced(1)
    slope_K = in_float64(model)(sloped_image(model.spec.image_shape), routes).slope[0]
    near = (x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).double()
    double = in_float64(model)
    with torch.no_grad():
        moved_NK = (double(near, model.forced(1)) - double(x.double(), model.forced(1))).abs()
    distance_N = (near - x.double()).abs().amax(dim=(1, 2, 3))
    assert (moved_NK <= slope_K * distance_N[:, None]).all()
    assert float(slope_K.min()) > 0


def test_what_has_no_bound_is_refused() -> None:
    image = sloped_image((1, 2, 2))
    with pytest.raises(UnboundedError, match="product"):
        image * image
    with pytest.raises(UnboundedError, match="choice"):
        image.argmax()
    with pytest.raises(UnboundedError, match="choice"):
        bool(image.sum() > 0)
    with pytest.raises(UnboundedError, match="choice"):
        torch.equal(image, image)
    with pytest.raises(UnboundedError, match="choice"):
        torch.zeros(1, 1, 2, 2, dtype=torch.float64)[:] = image
    with pytest.raises(UnboundedError, match="layer_norm"):
        F.layer_norm(image, (2, 2))
    with pytest.raises(UnboundedError, match="exp"):
        image.exp()


def test_bounds_of_small_operations_by_hand() -> None:
    x = with_slope(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 3.0]]))
    assert (2 * x - x / 4).slope.tolist() == [[2.25, 6.75]]  # bounds add, signs or not
    assert F.relu(x).slope.tolist() == [[1.0, 3.0]]
    assert x.softmax(dim=1).slope.tolist() == [[1.0, 1.5]]
    twice = F.linear(x, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert twice.slope.tolist() == [[4.0, 4.0]]
    assert pair_slopes(twice)[0, 1] == 6  # the rows differ by (0, 2) alone
    assert pair_slopes(0.5 * twice + 0.5 * twice)[0, 1] == 6
    # 4 and 4 one by one; but together they move by sqrt(2) * sqrt(10) at most.
    assert float(pair_slopes(F.relu(twice))[0, 1]) == pytest.approx(math.sqrt(40))
    thrice = F.linear(x, torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]]))
    assert pair_slopes(thrice[torch.tensor([0])])[0, 2] == 3  # the same row
    assert pair_slopes(thrice[:, torch.tensor([0, 2, 1])])[0, 1] >= 3  # others' places


def test_the_radius_of_a_linear_route_is_tight() -> None:
    router = random_linear(3, 1)
    experts = [random_linear(2, seed) for seed in (2, 3, 4)]
    model = LinearMoE(toy_spec(std=0.5), router, experts)
    x = 0.3 + 0.4 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    radii = local_radii(model, x)
    assert not isinstance(radii, str)
    route_N, answer_N = radii
    assert route_N is not None
    assert (answer_N <= route_N).all()
    scores = model.route(x)["router"].scores_NE.detach().double()
    weight = router.fc.weight.detach().double()
    for n in range(len(x)):
        best = int(scores[n].argmax())
        ratio_E = (scores[n, best] - scores[n]) / (weight[best] - weight).abs().sum(dim=1)
        ratio_E[best] = torch.inf
        worst = int(ratio_E.argmin())
        assert float(route_N[n]) == pytest.approx(0.5 * float(ratio_E[worst]), rel=1e-4)
        direction = (weight[worst] - weight[best]).sign().view(1, 1, 4, 4).float()
        for factor, flips in ((0.999, False), (1.001, True)):
            moved = x[n : n + 1] + factor * float(route_N[n]) * direction
            assert (int(model.route(moved)["router"].expert_ids_NK) != best) == flips


def test_the_radius_of_a_linear_answer_is_tight() -> None:
    linear = random_linear(2, 5)
    model = LinearClassifier(toy_spec(), linear.fc.weight, linear.fc.bias)
    x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    radii = local_radii(model, x)
    assert not isinstance(radii, str)
    assert radii[0] is None
    answer_N = predict(model, x)
    direction = (linear.fc.weight[1] - linear.fc.weight[0]).sign().view(1, 1, 4, 4)
    away_N = torch.where(answer_N == 0, 1.0, -1.0)[:, None, None, None] * direction
    for factor, flips in ((0.999, False), (1.001, True)):
        moved = x + (factor * radii[1].float())[:, None, None, None] * away_N
        assert ((predict(model, moved) != answer_N) == flips).all()


def test_theorem_5_4_holds_for_a_soft_mixture() -> None:
    """Softmax weights of a linear router over linear experts, all constants known."""
    router, experts = random_linear(2, 6), [random_linear(2, 7), random_linear(2, 8)]
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def mixture(images: Tensor) -> Tensor:
        weights_NE = router(images).softmax(dim=1)
        return (weights_NE[:, :, None] * torch.stack([e(images) for e in experts], 1)).sum(1)

    gap = (router.fc.weight[0] - router.fc.weight[1]).abs().sum() / 4  # sigmoid' <= 1/4
    margins = [e.fc.weight[0] - e.fc.weight[1] for e in experts]
    slope_E = torch.stack([margin.abs().sum() for margin in margins])
    # A linear margin is largest at a corner of the cube, here widened to -1..2.
    grey = torch.full((1, 1, 4, 4), 0.5)
    middle_E = torch.stack([e(grey)[0, 0] - e(grey)[0, 1] for e in experts])
    bound_E = middle_E.abs() + 1.5 * slope_E
    with torch.no_grad():
        weights_NE = router(x).softmax(dim=1)
        rate_N = theorem_rate(weights_NE, gap.repeat(2), bound_E, slope_E)
        radius_N = theorem_radius(mixture(x), rate_N)
        answer_N = mixture(x).argmax(dim=1)
        for seed in range(200):
            noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            moved = x + radius_N[:, None, None, None] * noise.sign()
            assert (mixture(moved).argmax(dim=1) == answer_N).all()
    assert (radius_N > 0).all()


def test_the_answer_jumps_where_the_route_changes() -> None:
    model = LinearMoE(toy_spec(), first_pixel_router(), [says(0), says(1)])
    jumps = boundary_jumps(model, corners(0.9, 0.1, 0.8, 0.2))
    assert jumps is not None
    assert jumps.jump_median == jumps.jump_max == 1.0
    assert jumps.answer_changes.value == 1.0
    assert jumps.distance < 1e-5
    assert boundary_jumps(model, corners(0.9, 0.8)) is None


def test_what_cannot_be_certified_says_why() -> None:
    model = PixelMoE(toy_spec())
    assert "tokens" in str(local_radii(model, corners(0.2, 0.9)))
    soft = PixelMoE(toy_spec(), weighting="probability")
    assert "weights" in str(local_radii(soft, corners(0.2, 0.9)))


@pytest.mark.parametrize(("top_k", "jumps"), [(2, True), (3, False)])
def test_only_a_choice_jumps(top_k: int, jumps: bool) -> None:
    model, x = PixelMoE(toy_spec(), top_k, "probability"), corners(0.2, 0.9)
    labels = torch.zeros(2, dtype=torch.int64)
    found = certificate(model, x, labels, THREAT, lipschitz_constants(model, x, THREAT))
    (weights,) = (c for c in found.constants if c.symbol == "r")
    assert ("jumps" in weights.note) == jumps
    assert ("jumps" in found.radii[-1].note) == jumps
    assert all(c.value is None or c.value >= 0 for c in found.constants)
