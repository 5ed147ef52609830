"""What is said about routes and experts, on models whose answers are known by hand."""

import math

import pytest
import torch

from advmoe_deploy.analysis.certificate import certificate
from advmoe_deploy.analysis.lipschitz import boundary_jumps, lipschitz_constants
from advmoe_deploy.analysis.redundancy import (
    ALL_LAYERS,
    disagreement,
    expert_report,
    second_experts,
)
from advmoe_deploy.analysis.routes import route_use
from advmoe_deploy.analysis.routing_change import MovedImage, effect_of, layer_change
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.routing.routing import RoutingRule, choose
from advmoe_deploy.parity.intervals import paired_difference_interval
from advmoe_deploy.specs import AttackSpec, ThreatModel
from tests.analysis.toy_routes import (
    ROUTED,
    THREAT,
    corners,
    digits_model,
    first_pixel_router,
    says,
)
from tests.toys import LinearClassifier, LinearMoE, PixelMoE, toy_spec


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


def test_few_images_seem_to_share_bits_with_routes_that_know_no_class() -> None:
    model = LinearMoE(toy_spec(10), first_pixel_router(), [says(0), says(1)])
    classes = torch.arange(20) % 10
    by_coin, by_class = ((torch.arange(20) % 3 > 0).float(), (classes < 5).float())
    (coin,), (known,) = (
        route_use(model, corners(*pixels.tolist()), classes) for pixels in (by_coin, by_class)
    )
    assert 0.2 < coin.class_information <= coin.chance_information < 0.8
    assert known.class_information == pytest.approx(1.0)
    assert known.chance_information < 0.9


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
    (second,) = report.second  # three are lost by it and one is won
    assert second.lost.value == 0.5
    assert (second.lost.low, second.lost.high) == paired_difference_interval(3, 1, 4)
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
