"""``analyze --alpha``: a dual model blended anew, without training."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advmoe_deploy.analysis.redundancy import TARGETS, TargetRow, Withstood
from advmoe_deploy.analysis.several.blend import (
    BlendPoint,
    BlendReport,
    _require_alike,
    blended,
    front_of,
)
from advmoe_deploy.analysis.shares import marked
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.several.alpha import alphas_of, shown_blend
from advmoe_deploy.cli.several.presentation import screen
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.families.dual import DualModel
from advmoe_deploy.models.stored import open_stored
from advmoe_deploy.specs import ThreatModel
from tests.cli.command_line import Capture, said
from tests.conftest import write_run
from tests.families import spec_of


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two mixtures, its alpha 0.7."""
    return write_run(tmp_path_factory.mktemp("blends") / "dual", spec_of("dual model"))


def test_each_alpha_is_attacked_beside_other_runs(
    capsys: Capture, dual: Path, tmp_path: Path
) -> None:
    networks = write_run(tmp_path / "networks", spec_of("expert networks"))
    line = ["analyze", "--alpha", "0,0.7..1", str(dual), str(networks), "--images", "20"]
    assert run([*line, "--steps", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [point["alpha"] for point in value["points"]] == [0, 0.7, 0.8, 0.9, 1]
    assert value["trained_alpha"] == 0.7
    assert [other["run"] for other in value["beside"]] == [str(networks)]
    model = open_stored(dual).model
    assert isinstance(model, DualModel)
    test = load_dataset("digits").test.first(20)
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    for point, part in ((0, model.standard), (-1, model.robust)):  # the ends are one mixture each
        right = float((predict(part, x) == y).double().mean())
        assert value["points"][point]["withstood"]["accuracy"]["value"] == right
    for each in (*value["points"], *value["beside"]):
        found = {row["target"]: row for row in each["withstood"]["targets"]}
        assert list(found) == list(TARGETS)
        assert found["experts"]["route_change"] is None  # RA-E: the clean routes stay
    kept = json.loads((tmp_path / "out" / "alpha.json").read_text())
    assert kept == {key: item for key, item in value.items() if key != "out"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == len(list((tmp_path / "out").glob("*.png"))) == 2
    draw_on(sys.stdout, screen(shown_blend(BlendReport(**kept)), tmp_path))
    out = capsys.readouterr().out
    assert all(text in out for text in ("alpha 0.7", "RA-E", "RA-R", "Beside it untrained"))


def test_only_the_blend_follows_alpha(dual: Path) -> None:
    model = open_stored(dual).model
    assert isinstance(model, DualModel)
    x = torch.rand(6, *model.spec.image_shape, generator=torch.Generator().manual_seed(0))
    other = blended(model, 0.25)
    with torch.no_grad():
        expected = 0.75 * model.standard(x) + 0.25 * model.robust(x)
        torch.testing.assert_close(other(x), expected)
    assert (other.spec.alpha, model.spec.alpha, model.alpha) == (0.25, 0.7, 0.7)
    assert next(other.parameters()) is next(model.parameters())


def test_the_front_by_hand() -> None:
    def found(clean: float, robust: float) -> Withstood:
        shares = [marked(torch.arange(10) < 10 * value) for value in (clean, robust)]
        return Withstood(accuracy=shares[0], targets=(), together=shares[1])

    pairs = [(0.9, 0.1), (0.8, 0.5), (0.8, 0.4), (0.7, 0.5), (0.6, 0.6)]
    points = [BlendPoint(alpha=i / 4, withstood=found(*pair)) for i, pair in enumerate(pairs)]
    assert front_of(points) == (0.0, 0.25, 1.0)


def test_alphas_that_the_images_do_not_tell_apart_are_named() -> None:
    """Of 100 images the first 50, 48 and 20 are left: 2 more are chance, 30 more are not."""

    def point(alpha: float, robust: int) -> BlendPoint:
        clean, left = (marked(torch.arange(100) < count) for count in (90, robust))
        rows = tuple(TargetRow(target=t, accuracy=left, route_change=None) for t in TARGETS)
        found = Withstood(accuracy=clean, targets=rows, together=left)
        return BlendPoint(alpha=alpha, withstood=found)

    points = (point(0.5, 20), point(0.7, 50), point(1, 48))
    report = BlendReport(
        model="m", recipe="r", data="digits", images=100, threat=ThreatModel(epsilon=0.1), steps=1,
        seed=0, trained_alpha=0.7, points=points, front=(0.7,), beside=(), versions={}, seconds=1.0,
    )  # fmt: skip
    robust, _ = shown_blend(report).verdict
    assert robust.text == (
        "Most images withstand PGD with every target at alpha 0.7: 90.0 % are right unattacked, "
        "50.0 % withstand; 100 images do not tell it from alpha 1"
    )
    assert robust.tone == "unsure"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5..2", "1.1 is no share"),
        ("0.5,0.5", "or one twice"),
        (",", "has no value"),
        ("half", "is no finite number; write 0.5..1 or 0.5,0.7,1"),
    ],
)
def test_alphas_are_shares(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        alphas_of(text)
    assert "\n" not in str(caught.value)


def test_runs_on_other_data_do_not_stand_beside(dual: Path) -> None:
    stored = open_stored(dual)
    _require_alike(stored, stored)
    with pytest.raises(UsageError, match=r"trained on other images \(cifar10\)"):
        _require_alike(stored, replace(stored, data="cifar10"))


def test_what_blends_nothing_is_refused(capsys: Capture, tiny_run: Path, dual: Path) -> None:
    assert run(["analyze", "--alpha", "0.5..1", str(tiny_run)]) == 2
    line = said(capsys)
    assert "is of family advmoe and blends nothing" in line
    assert run(["analyze", "--alpha", "0.5", str(dual), "--smoothing", "10"]) == 2
    assert "--smoothing is for the analysis of one model" in capsys.readouterr().err
    assert run(["analyze", "--alpha", "0.5", str(dual), "--sigma", "0.5"]) == 2
    assert "--sigma is for the analysis of one model" in capsys.readouterr().err
