"""Constants, radii and jumps on models for which they are known by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.analysis.certificate import certificate, local_radii
from advmoe_deploy.analysis.lipschitz import boundary_jumps, lipschitz_constants
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
from tests.analysis.toy_routes import (
    BOUNDED,
    THREAT,
    corners,
    digits_model,
    first_pixel_router,
    random_linear,
    says,
)
from tests.toys import LinearClassifier, LinearMoE, PixelMoE, toy_spec


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
