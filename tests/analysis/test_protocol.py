"""V-MoE's protocol: growing radii, little room for experts, and the dense twin, at toy size."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advmoe_deploy.analysis.analyze import AnalysisSettings, analyze
from advmoe_deploy.analysis.budget import passes_by_section
from advmoe_deploy.analysis.protocol.capacity import CapacityLimited, over_capacities
from advmoe_deploy.analysis.protocol.radii import Protocol, Standing, over_radii
from advmoe_deploy.analysis.shares import difference_of, marked
from advmoe_deploy.analysis.smoothing import Smoothing
from advmoe_deploy.attacks.objectives import AUXILIARY_WEIGHT
from advmoe_deploy.attacks.white_box import attack_model
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.verdicts.analysis import judged
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.macs import count_macs
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.balance import importance_and_load_loss
from advmoe_deploy.models.routing.routing import Routes
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.progress import Silent
from advmoe_deploy.specs import AttackSpec, ThreatModel
from tests.cli.command_line import Capture, said
from tests.conftest import write_run
from tests.families import spec_of
from tests.toys import PixelMoE, toy_spec

FEW = ("--images", "16", "--steps", "2")
THREAT = ThreatModel(epsilon=0.1)


def pixels(*images: tuple[float, ...]) -> Tensor:
    """Grey images of 2 x 2."""
    return torch.tensor(images).view(len(images), 1, 2, 2)


def test_the_step_reaches_the_radius_from_the_image_itself() -> None:
    """Class 0 of the toy is its mean: each step takes the same off every pixel."""
    attack = Protocol(steps=4).attack(ThreatModel(epsilon=0.2))
    assert (attack.step_size, attack.random_start) == (0.05, False)
    # All pixels above 0.75 are multiplied by 1; 0.95 on average, class 0 leads by 0.05.
    image = pixels((0.95, 0.95, 0.95, 0.95))
    found = attack_model(
        PixelMoE(toy_spec()), image, torch.tensor([0]), ThreatModel(epsilon=0.2), attack
    )
    torch.testing.assert_close(found, image - 0.2)


class Unsure(Classifier):
    """Two experts whose answers do not matter, and a gate that scores (x, 0) by the mean pixel."""

    def __init__(self) -> None:
        super().__init__(toy_spec())
        self.rules = PixelMoE(toy_spec()).rules

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        mean_N1 = images.flatten(1).mean(dim=1, keepdim=True)
        zero_N1 = torch.zeros_like(mean_N1)
        routes.decide(self.rules[0], lambda _: torch.cat([mean_N1, zero_N1, zero_N1], 1), mean_N1)
        return torch.cat([0 * mean_N1 + 1, zero_N1], dim=1)


def test_the_auxiliary_loss_is_ascended_beside_the_error() -> None:
    """The error has no gradient here, so all that moves is the balance of the gate."""
    model, images = Unsure(), pixels((0.5,) * 4, (0.6,) * 4)
    labels = torch.tensor([0, 0])

    def balance(x: Tensor) -> float:
        return float(importance_and_load_loss(model.route(x)["pixels"]))

    plain, auxiliary = (
        attack_model(model, images, labels, THREAT, Protocol(steps=2).attack(THREAT, target))
        for target in ("model", "auxiliary")
    )
    torch.testing.assert_close(plain, images)
    torch.testing.assert_close(auxiliary, images + 0.1)  # ever more to expert 0
    assert balance(auxiliary) > balance(images)
    assert 0 < AUXILIARY_WEIGHT < 1


def test_little_room_by_hand() -> None:
    """Four tokens, three experts: at 0.75 each has room for one, the surest first."""
    model = PixelMoE(toy_spec())
    model.spec = model.spec.model_copy(update={"family": "vit-moe"})
    images = pixels((1.0, 0.9, 0.8, 0.1))  # 1.0, 0.9 and 0.8 to expert 0, 0.1 to expert 2
    routes = Routes()
    logits = CapacityLimited(model, 0.75)(images, routes)
    assert routes.taken["pixels"].weights_NK.flatten().tolist() == [1, 0, 0, 1]
    assert float(logits[0, 0]) == pytest.approx((1.0 * 1 + 0.1 * 3) / 4)
    assert torch.equal(CapacityLimited(model, 3.0)(images), model(images))  # room for all


def test_who_has_no_residual_goes_to_the_next_best_expert() -> None:
    model, images = PixelMoE(toy_spec()), pixels((1.0, 0.9, 0.1, 0.2))
    routes = Routes()
    CapacityLimited(model, 1.0)(images, routes)  # two rows each
    assert routes.taken["pixels"].expert_ids_NK.flatten().tolist() == [0, 0, 2, 2]
    images = pixels((1.0, 0.9, 0.8, 0.2))
    CapacityLimited(model, 1.0)(images, routes)
    assert routes.taken["pixels"].expert_ids_NK.flatten().tolist() == [0, 0, 1, 2]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("tokens") / "run", spec_of("token experts"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("dense") / "run", spec_of("dense ViT"))


def test_the_whole_protocol_beside_a_twin(
    capsys: Capture, tokens: Path, dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    more = ("--radii", "4/255,1/255", "--capacity", "0.5,3", "--twin", str(dense))
    line = ["analyze", str(tokens), *FEW, "--only", "radii", *more, "--out", str(out)]
    assert run(line) == 0, capsys.readouterr().err
    value = json.loads((out / "analysis.json").read_text())
    radii, capacity = value["radii"], value["capacity"]
    points = radii["points"]
    assert [round(255 * point["effect"]["epsilon"]) for point in points] == [1, 4, 1, 4]
    assert [p["effect"]["attack"]["target"] for p in points] == ["model"] * 2 + ["auxiliary"] * 2
    for point in points:
        attack = point["effect"]["attack"]
        assert attack["step_size"] == pytest.approx(point["effect"]["epsilon"] / 2)
        assert not attack["random_start"]
        assert {layer["layer"] for layer in point["effect"]["layers"]} == {"block-0", "block-1"}
        assert 0 <= point["disagreement"] <= 1
    assert len(radii["twin"]["points"]) == len(radii["standing"]) == 2
    assert radii["targets"] == ["model", "auxiliary"]  # its gates have a gradient
    half, ample = capacity["points"]
    assert (half["ratio"], ample["ratio"]) == (0.5, 3.0)
    assert 0 < half["served"] < ample["served"] == 1
    assert half["macs"] < ample["macs"] == capacity["macs"] == radii["macs"]
    assert ample["accuracy"] == value["accuracy"]
    assert capacity["twin"]["accuracy"] == radii["twin"]["accuracy"]
    plots = {"radii", "radii-routes", "redundancy", "capacity", "capacity-macs"}
    assert {path.stem for path in out.glob("*.png")} == plots
    page = (out / "report.html").read_text()
    assert "its dense twin" in page
    assert "points apart" in page
    assert "With room for 0.5 of an even share" in page
    screen = capsys.readouterr().out
    assert "accuracy as the radius grows, 2 steps" in screen
    assert "room of an expert, 16 images a batch" in screen


def test_macs_fall_by_what_is_not_served(tokens: Path) -> None:
    """Of two experts a row, at room for none of the second choices, half the experts' work goes."""
    spec = spec_of("token experts")
    model = build_model(spec).eval()
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    protocol = Protocol(steps=1, capacities=(0.5, 1.5))
    report = over_capacities(model, images, labels, THREAT, protocol, Silent())
    chosen, every = count_macs(model)[0], count_macs(model, "masked")[0]
    own = 2 * (every - chosen)  # one of three experts is left out, two are chosen
    half, ample = report.points
    assert half.macs == pytest.approx(chosen - own * (1 - half.served))
    assert ample.served == 1
    assert report.batch == 4


def test_any_family_has_radii_and_room(tiny_run: Path) -> None:
    protocol = Protocol(steps=2, radii=(8 / 255,), capacities=(1.0, 2.0))
    settings = AnalysisSettings(sections=("radii", "capacity"), images=16, protocol=protocol)
    report = analyze(open_stored(tiny_run), settings)
    assert report.radii
    assert report.capacity
    assert report.radii.twin is report.capacity.twin is None
    # Its hard router gives no exact gradient, so that the loss alone is not enough beside a twin.
    assert report.radii.targets == ("model", "auxiliary", "pathway")
    (left,), (plain,), (other,) = (
        report.radii.standing, report.radii.of("model"), report.radii.of("auxiliary")
    )  # fmt: skip
    assert left.accuracy.value == left.accuracy.marks.count("1") / 16
    attacked = [point.effect.accuracy_attacked.value for point in (plain, other)]
    assert left.accuracy.value <= min(attacked)
    even, ample = report.capacity.points
    assert even.macs == ample.macs  # every image has an expert
    assert ample.served == 1
    assert ample.accuracy == report.accuracy


def standing(epsilon: float, right: int) -> Standing:
    """Return that so many of 100 images withstand, always the first ones."""
    return Standing(epsilon=epsilon, accuracy=marked(torch.arange(100) < right))


def test_a_twin_is_judged_where_there_is_something_to_judge() -> None:
    pairs = [(standing(e, ours), standing(e, 0)) for e, ours in ((0.1, 60), (0.2, 30), (0.3, 1))]
    assert judged(pairs, 0.3, 0.1)[0].epsilon == 0.3  # what it was trained for
    assert judged(pairs, 0.25, 0.1)[0].epsilon == 0.2  # else the largest above chance
    assert judged(pairs[2:], 0.25, 0.1)[0].epsilon == 0.3


def test_a_pair_is_told_apart_by_its_own_images() -> None:
    """Wilson intervals of 50 and 58 of 100 overlap; no image speaks for the smaller one."""
    more = difference_of(standing(0.1, 58).accuracy, standing(0.1, 50).accuracy)
    assert more.value == pytest.approx(0.08)
    assert 0 < more.low < 0.08 < more.high
    same = difference_of(standing(0.1, 50).accuracy, standing(0.1, 50).accuracy)
    assert same.low < 0 < same.high


def test_the_budget_knows_what_the_protocol_takes(tokens: Path, dense: Path) -> None:
    """One batch: a pass through a model is a pass with each image."""
    stored, twin = open_stored(tokens), open_stored(dense)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    protocol = Protocol(steps=10, radii=(0.01, 0.02), capacities=(0.5, 1.0), twin=twin)
    planned = passes_by_section(stored.model, ("radii", "capacity"), (), 20, Smoothing(), protocol)
    passes: list[None] = []
    for model in (stored.model, twin.model):
        model.register_forward_hook(lambda *_: passes.append(None))
    over_radii(stored.model, images, labels, protocol, Silent())
    assert 0.8 * planned["radii"] < len(passes) < 1.2 * planned["radii"]
    passes.clear()
    over_capacities(stored.model, images, labels, THREAT, protocol, Silent())
    assert 0.8 * planned["capacity"] < len(passes) < 1.2 * planned["capacity"]


def test_an_attack_grows_with_its_radius(tokens: Path) -> None:
    test, model = load_dataset("digits").test.first(30), open_stored(tokens).model
    images, labels = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    report = over_radii(model, images, labels, Protocol(steps=3, radii=(0.3, 0.01)), Silent())
    small, large = (point.effect for point in report.of("model"))
    assert small.epsilon < large.epsilon
    assert large.loss_attacked > small.loss_attacked > small.loss_clean


def test_what_makes_no_sense_is_one_line(
    capsys: Capture, tiny_run: Path, tokens: Path, tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "out"))
    other = write_run(tmp_path / "other", spec_of("dense ViT").model_copy(update={"image_size": 4}))
    for arguments, words in (
        ((tiny_run, "--capacity", "0.5"), "capacity 0.5 leaves images of family advmoe without"),
        ((tiny_run, "--capacity", "0"), "'0' is no list of positive numbers"),
        ((tiny_run, "--capacity", ","), "no list of positive numbers"),
        ((tiny_run, "--radii", "8"), "write 8/255"),
        ((tiny_run, "--twin", tokens), "give one of them"),
        ((tiny_run, "--radii", "8/255", "--twin", tokens), "routes, too"),
        ((tokens, "--only", "capacity", "--twin", other), "on the same data"),
        ((other, "--radii", "8/255"), "radii needs a router"),
        ((tokens, "--only", "radii", "--epsilon", "0.1"), "--epsilon attacks nothing where radii"),
    ):
        assert run(["analyze", *map(str, arguments), *FEW, *out]) == 2, arguments
        line = said(capsys)
        assert words in line
    assert not (tmp_path / "out").exists()


def test_the_attack_of_the_study_is_forty_steps() -> None:
    attack = Protocol().attack(ThreatModel(epsilon=4 / 255))
    assert attack == AttackSpec(name="pgd", steps=40, step_size=4 / 255 / 40, random_start=False)
