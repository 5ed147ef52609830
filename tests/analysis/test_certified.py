"""No attack of verify's finds anything within a certified radius, and empty radii say so."""

import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.analysis.analyze import AnalysisReport
from advmoe_deploy.analysis.certificate import Certificate, Radii, certificate, local_radii
from advmoe_deploy.analysis.lipschitz import lipschitz_constants
from advmoe_deploy.analysis.shares import Share
from advmoe_deploy.analysis.smoothing import CertifiedImage, Smoothing, SmoothingReport, certify
from advmoe_deploy.analysis.smoothing import _report as report_of_smoothing
from advmoe_deploy.analysis.theorem import held_radius
from advmoe_deploy.analysis.vacuous import LEVEL, VACUOUS, is_vacuous
from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.cli.robustness import certified_routes
from advmoe_deploy.cli.tables.analysis import radii_text, sections
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.cli.tables.robustness import certified_text
from advmoe_deploy.cli.verdicts.analysis import conclusions
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify.suites import attack_suite
from tests.families import spec_of
from tests.toys import Linear, LinearMoE, toy_spec

THREAT = ThreatModel(epsilon=0.02)
WITHIN = 0.999  # of a radius: what is proved is about sums that are not rounded
IMAGES = 6
SMOOTH = Smoothing(n=20)
NONE = Share(value=0, low=0, high=0.6)
HALF = Share(value=0.5, low=0.15, high=0.85)


def middling(images: Tensor) -> Tensor:
    """Return ``images`` with half the contrast: no attack meets the bounds of [0, 1]."""
    return 0.25 + 0.5 * images


def digits(images: int | None = None) -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    return x[:images], y[:images]


@pytest.fixture(scope="module")
def toy() -> LinearMoE:
    """Three linear experts behind a linear router, trained together on the digits."""
    split = load_dataset("digits").train
    x, y = middling(torch.from_numpy(to_float(split.images))), torch.from_numpy(split.labels)
    generator = torch.Generator().manual_seed(0)

    def linear(outputs: int) -> Linear:
        return Linear(0.1 * torch.randn(outputs, 64, generator=generator), torch.zeros(outputs))

    spec = toy_spec(10, size=8).model_copy(update={"num_experts": 3})
    model = LinearMoE(spec, linear(3), [linear(10) for _ in range(3)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        routes = Routes(surrogate="probability")
        loss = F.cross_entropy(model(x, routes), y)
        # A third of the classes to each expert, else one takes them all.
        loss = loss + F.cross_entropy(routes.taken["router"].scores_NE, y % 3)
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


def found_within(
    model: Classifier, x: Tensor, y: Tensor, radius_N: Tensor, attack: AttackSpec
) -> Tensor:
    """Return what ``attack`` finds, each image in a ball of its own radius."""
    found = []
    for n, radius in enumerate(radius_N.clamp(max=1.0).tolist()):
        ball = ThreatModel(epsilon=radius)
        found.append(find_adversarial(model, x[n : n + 1], y[n : n + 1], ball, attack))
    return torch.cat(found)


def radii_of(model: Classifier, x: Tensor) -> dict[str, Tensor]:
    radii = local_radii(model, x)
    assert not isinstance(radii, str)
    route_N, answer_N = radii
    assert route_N is not None
    held_N = held_radius(model, x, route_N, lipschitz_constants(model, x, THREAT))
    assert not isinstance(held_N, str)
    assert (held_N <= answer_N * (1 + 1e-6)).all(), "one bound for all margins is no better"
    return {"route": route_N, "answer": answer_N, "theorem": held_N}


def test_no_answer_changes_within_its_radius(toy: LinearMoE) -> None:
    x = middling(digits(IMAGES)[0])
    answer_N, radii = predict(toy, x), radii_of(toy, x)
    assert not is_vacuous(radii["theorem"])
    for attack in (*attack_suite("quick", toy.spec), AttackSpec(name="apgd", steps=10)):
        found = found_within(toy, x, answer_N, WITHIN * radii["answer"], attack)
        assert (predict(toy, found) == answer_N).all(), attack.name
    pgd = AttackSpec(name="pgd", steps=20)
    found = found_within(toy, x, answer_N, WITHIN * radii["theorem"], pgd)
    assert (predict(toy, found) == answer_N).all()
    beyond = found_within(toy, x, answer_N, 4 * radii["answer"], pgd)
    assert (predict(toy, beyond) != answer_N).any(), "what finds nothing anywhere proves nothing"


def test_no_route_changes_within_its_radius(toy: LinearMoE) -> None:
    x = middling(digits(IMAGES)[0])
    answer_N, radius_N = predict(toy, x), radii_of(toy, x)["route"]
    assert len(toy.route(x)["router"].expert_ids_NK.unique()) > 1
    attack = AttackSpec(name="pgd", steps=20, target="router")

    def moved(radius_N: Tensor) -> Tensor:
        found = found_within(toy, x, answer_N, radius_N, attack)
        before, after = (toy.route(images)["router"].expert_ids_NK for images in (x, found))
        return (before != after).any(dim=1)

    assert not moved(WITHIN * radius_N).any()
    assert moved(2 * radius_N).any()


def test_smoothing_holds_as_often_as_it_says(toy: LinearMoE) -> None:
    """A gradient of the smoothed answer, up to the certified l2 radius; alpha may be wrong."""
    settings = Smoothing(sigma=0.12, n=300)
    x = middling(digits(12)[0])
    certified = certify(toy, x, predict(toy, x), settings)
    held = [image for image in certified.certified if image.answer is not None]
    assert len(held) >= 6
    assert not certified.vacuous

    def contradicted(factor: float) -> int:
        """Return how many images just within (or beyond) their radius are answered otherwise."""
        count = 0
        for image in held:
            assert image.answer is not None
            moved = x[image.image] + factor * image.radius * uphill(
                toy, x[image.image], image.answer
            )
            labels = torch.tensor([image.answer])
            (again,) = certify(
                toy, moved[None], labels, settings.model_copy(update={"seed": 1})
            ).certified
            count += again.answer not in (image.answer, None)
        return count

    # Either of the two certificates is wrong with a chance of alpha.
    allowed = int(stats.binom.ppf(0.999, len(held), 2 * settings.alpha))
    assert contradicted(WITHIN) <= allowed
    assert contradicted(4) > allowed


def uphill(model: Classifier, image: Tensor, label: int) -> Tensor:
    """Return the direction, of l2 norm 1, in which the smoothed loss grows fastest."""
    noise = torch.randn(64, *image.shape, generator=torch.Generator().manual_seed(2))
    start = image.clone().requires_grad_(True)
    loss = F.cross_entropy(model(start + 0.12 * noise), torch.full((64,), label))
    (gradient,) = torch.autograd.grad(loss, start)
    return gradient / gradient.norm()


def certificate_of(model: Classifier, x: Tensor, y: Tensor) -> Certificate:
    return certificate(model, x, y, THREAT, lipschitz_constants(model, x, THREAT))


def formal(found: Certificate) -> list[Radii]:
    return [radii for radii in found.radii if radii.tag == "formal"]


def test_a_trained_network_says_that_its_radii_are_vacuous(trained_run: Path) -> None:
    model, (x, y) = open_stored(trained_run).model, digits(4)
    found = formal(certificate_of(model, x, y))
    assert [radii.name for radii in found] == ["route", "answer", "Theorem 5.4, routes held"]
    for radii in found:
        assert radii.vacuous
        assert radii.quantiles[-1] < LEVEL
        assert VACUOUS in radii.note
        assert VACUOUS in radii_text(radii)
    routes = certified_routes(model, x.numpy(), THREAT)
    assert routes.vacuous
    assert VACUOUS in certified_text(routes)
    answer_N, radius_N = predict(model, x), radii_of(model, x)["answer"]
    within = found_within(model, x, answer_N, radius_N, AttackSpec(name="pgd", steps=5))
    assert (predict(model, within) == answer_N).all()


def test_wide_radii_are_not_called_vacuous(toy: LinearMoE) -> None:
    x, y = digits(IMAGES)
    for radii in formal(certificate_of(toy, middling(x), y)):
        assert not radii.vacuous
        assert VACUOUS not in radii.note
    assert is_vacuous(torch.tensor([0.0, 0.9 * LEVEL]))
    assert not is_vacuous(torch.tensor([0.0, LEVEL]))


def test_smoothing_of_nothing_is_vacuous(toy: LinearMoE) -> None:
    x = middling(digits(3)[0])
    wrong = certify(toy, x, (predict(toy, x) + 1) % 10, SMOOTH)
    assert isinstance(wrong, SmoothingReport)
    assert wrong.vacuous
    assert wrong.model_dump(mode="json")["vacuous"] is True


def report_of(found: Certificate | None, smoothed: SmoothingReport | None) -> AnalysisReport:
    """An analysis of nothing but what can be certified."""
    return AnalysisReport(
        model="run",
        recipe="digits-advmoe",
        family="advmoe",
        data="digits",
        images=4,
        threat=THREAT,
        steps=1,
        seed=0,
        class_names=("a", "b"),
        accuracy=NONE,
        certificate=found,
        smoothing=smoothed,
        notes=(),
        versions={},
        seconds=0,
        **dict.fromkeys(
            ("routes", "changes", "experts", "lipschitz", "jumps", "radii", "capacity")
        ),
    )


@pytest.mark.parametrize(
    ("certified", "vacuous", "says"),
    [
        (None, False, "there is no formal bound for this model"),
        (NONE, True, "formal radii are vacuous, below one level of 8 bits"),
        (NONE, False, "formal bounds are too loose to be of use"),
        (HALF, False, "50.0 % of the answers are guaranteed at epsilon"),
    ],
)
def test_the_verdict_of_a_certificate(certified: Share | None, vacuous: bool, says: str) -> None:
    answer = Radii(
        name="answer",
        tag="formal",
        note="by hand",
        epsilon=THREAT.epsilon,
        median=0.001,
        certified=certified,
        vacuous=vacuous,
    )
    found = Certificate(constants=(), radii=(answer,))
    assert says in conclusions(report_of(found, None))[-1].text


@pytest.mark.parametrize("radius", [0.003, 0.3])
def test_smoothing_says_on_the_screen_what_its_radii_are_worth(
    radius: float, capsys: pytest.CaptureFixture[str]
) -> None:
    one = CertifiedImage(image=0, label=1, answer=1, count=20, radius=radius)
    found = report_of_smoothing([one, one.model_copy(update={"answer": 0, "radius": 0.3})], SMOOTH)
    report = report_of(None, found)
    draw_on(sys.stdout, sections(report))
    screen, said = " ".join(capsys.readouterr().out.split()), conclusions(report)[-1].text
    assert (VACUOUS in screen) == ("l2 radii are vacuous" in said) == (radius < LEVEL)
    assert ("guaranteed within an l2 radius of 0.150" in said) == (radius > LEVEL)


def test_the_theorem_blends_its_rates_as_a_dual_model_blends_logits() -> None:
    x, _ = digits(12)
    model = untrained_model(spec_of("dual model"), x)
    radii = radii_of(model, x)  # that each is no larger than the answer's is checked there
    assert (radii["theorem"] > 0).all()
    layers = held_radius(
        untrained_model(spec_of("block experts"), x), x, torch.ones(12).double(), ()
    )
    assert "mixtures of whole networks" in str(layers)
