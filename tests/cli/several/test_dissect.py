"""``analyze --dissect``: each run by how it was trained, and what a part is worth alone."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from advmoe_deploy.analysis.redundancy import TARGETS, TargetRow, Withstood
from advmoe_deploy.analysis.several.dissect import Dissected, DissectionReport
from advmoe_deploy.analysis.several.roles import Role, Run, roles_of
from advmoe_deploy.analysis.several.trial import SharedTrial
from advmoe_deploy.analysis.shares import Marked, marked
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.several.dissect import _command
from advmoe_deploy.cli.several.dissection import insights, shown_dissection
from advmoe_deploy.cli.several.presentation import screen
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.checkpoint import read_checkpoint
from advmoe_deploy.specs import ThreatModel
from tests.cli.command_line import Capture, said
from tests.conftest import write_run
from tests.families import spec_of

QUICK = [
    *("epochs=1", "train_images=64", "test_images=4", "attack_steps=1"),
    *("test_attack_steps=1", "holdout_attack_steps=1"),
]
SMALL = [*QUICK, "model.width=4", "model.router_width=2"]
NAMES = ("standard", "robust-router", "robust-experts", "experts-moved")


def trained(recipe: str, out: Path, settings: list[str], *more: str) -> None:
    sets = [part for setting in settings for part in ("--set", setting)]
    assert run(["train", recipe, "--out", str(out), *sets, *more]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the four runs of a dissection."""
    out = tmp_path_factory.mktemp("dissected")
    trained("digits-moe-standard", out / "standard", SMALL)
    for name, recipe, start in (
        ("robust-router", "digits-router-only", "standard"),
        ("robust-experts", "digits-experts-only", "standard"),
        ("experts-moved", "digits-experts-only", "robust-router"),
    ):
        trained(recipe, out / name, QUICK, "--from", str(out / start))
    return out


def named(folder: Path, *names: str) -> list[Run]:
    return [
        Run(name, folder / name, read_checkpoint(folder / name / "model"))
        for name in names or NAMES
    ]


def test_four_runs_are_told_apart_and_attacked_alike(
    capsys: Capture, runs: Path, tmp_path: Path
) -> None:
    order = ("experts-moved", "robust-router", "standard", "robust-experts")  # any
    line = ["analyze", "--dissect", *(str(runs / name) for name in order)]
    options = ["--images", "12", "--steps", "1", "--out", str(tmp_path / "out")]
    assert run([*line, *options, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [Path(each["run"]).name for each in value["runs"]] == list(NAMES)
    assert [each["role"].replace(" ", "-") for each in value["runs"]] == list(NAMES)
    assert value["images"] == 12
    for each in value["runs"]:
        rows = {row["target"]: row["accuracy"]["value"] for row in each["withstood"]["targets"]}
        assert list(rows) == list(TARGETS)
        assert each["withstood"]["together"]["value"] <= min(
            accuracy for target, accuracy in rows.items() if target != "experts"
        )
    kept = json.loads((tmp_path / "out" / "dissection.json").read_text())
    assert kept == {key: item for key, item in value.items() if key != "out"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == len(list((tmp_path / "out").glob("*.png"))) == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing else"
    assert run([*line, *options]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    draw_on(sys.stdout, screen(shown_dissection(DissectionReport(**kept)), tmp_path))
    out = capsys.readouterr().out
    for text in ("robust router", "by PGD on the routes", "A robust router over standard experts"):
        assert text in out


def test_what_is_missing_comes_with_the_commands_that_train_it(capsys: Capture, runs: Path) -> None:
    assert run(["analyze", "--dissect", str(runs / "standard")]) == 2
    line = said(capsys)
    commands = line.partition("; train: ")[2].split("; ")
    assert [shlex.split(command)[2] for command in commands] == [
        "digits-router-only",
        *["digits-experts-only"] * 2,
    ]
    # The third begins with what the first makes.
    asked, made = (shlex.split(commands[index]) for index in (2, 0))
    assert asked[asked.index("--from") + 1] == made[made.index("--out") + 1]
    for command in commands[:2]:
        out = shlex.split(command.replace("--out ", "--out new-"))
        assert run([*out[1:], "--dry-run"]) == 0
    (gone,) = named(runs, "standard")
    clean = shlex.split(_command("standard", gone, ["--out", "new"]))
    assert run([*clean[1:], "--dry-run"]) == 0
    assert {"model.width=4", "model.router_width=2"} <= {*clean}


def test_a_family_without_a_recipe_of_its_own_gets_settings(
    capsys: Capture, tmp_path: Path
) -> None:
    path = write_run(tmp_path / "networks", spec_of("expert networks"))
    like = Run("networks", path, read_checkpoint(path / "model"))
    for role in ("standard", "robust router", "robust experts"):
        begun = [] if role == "standard" else ["--from", str(path)]
        command = shlex.split(_command(role, like, begun))  # type: ignore[arg-type]
        assert command[2] == "digits-rt-er"
        assert run([*command[1:], "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    assert "model.num_experts=2" in shlex.split(_command("standard", like, []))
    wider = like.checkpoint.model_copy(update={"threat": ThreatModel(epsilon=8 / 255)})
    assert "--epsilon 8/255" in _command("standard", Run("networks", path, wider), [])


def test_refusals_come_before_torch(runs: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from advmoe_deploy.cli.app import run\n"
        f"sys.exit(run(['analyze', '--dissect', {str(runs / 'standard')!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "lacks the runs 'robust router', 'robust experts' and 'experts moved'" in done.stderr


def changed(one: Run, **recipe: object) -> Run:
    """Return ``one`` as if it had been trained otherwise."""
    checkpoint = one.checkpoint.model_copy(update={"recipe": {**one.checkpoint.recipe, **recipe}})
    return Run(one.name, one.path, checkpoint)


@pytest.mark.parametrize(
    ("which", "recipe", "says"),
    [
        (1, {"loss": "standard"}, "robust-router trained its router on clean images"),
        (2, {"start": None}, "robust-experts trained its experts beside what was random"),
        (0, {"route_stability": 6.0}, r"on attacked images \(route_stability=6\)"),
        (0, {"loss": "trades"}, "none of these runs was trained on clean images; name"),
        (2, {"method": "joint", "loss": "standard"}, "are both the run 'standard'"),
        (3, {"start": {"source": "gone", "weights_sha256": "0"}}, "weights of gone, which none"),
        (1, {"method": None}, "does not say how it was trained"),
    ],
)
def test_what_does_not_fit_is_one_line(
    runs: Path, which: int, recipe: dict[str, object], says: str
) -> None:
    given = named(runs)
    given[which] = changed(given[which], **recipe)
    with pytest.raises(UsageError, match=says) as caught:
        roles_of(given)
    assert "\n" not in str(caught.value)


def test_runs_on_other_data_are_refused(runs: Path) -> None:
    def trained_on(**data: object) -> list[Run]:
        standard, router, *others = named(runs)
        known = {**router.checkpoint.provenance, **data}
        checkpoint = router.checkpoint.model_copy(update={"provenance": known})
        return [standard, Run(router.name, router.path, checkpoint), *others]

    for data in ({"fingerprint": {"images": "0", "dealt": "0"}}, {"fingerprint": None}):
        with pytest.raises(UsageError, match=r"robust-router was trained on other images \(there"):
            roles_of(trained_on(data="there", **data))
    assert len(roles_of(trained_on(data="there"))) == 4, "the same images in another place"


def test_other_networks_and_bundles_are_refused(
    capsys: Capture, runs: Path, tmp_path: Path, tiny_run: Path
) -> None:
    dense = write_run(tmp_path / "dense", spec_of("dense ViT"))
    for path, says in (
        (tiny_run, "a dissection compares runs of one network"),
        (dense, "compares runs of one network"),
        (tmp_path, "neither a finished run"),
    ):
        assert run(["analyze", "--dissect", str(runs / "standard"), str(path)]) in (2, 3)
        line = said(capsys)
        assert says in line
    for arguments, says in (
        ([str(tiny_run), str(dense)], "analyze looks into one model, not 2"),
        (["--dissect", str(tiny_run), "--only", "routes"], "--only is for the analysis of one"),
        (["--dissect", "--alpha", "0.5", str(tiny_run)], "two analyses; ask for one"),
    ):
        assert run(["analyze", *arguments]) == 2
        assert says in capsys.readouterr().err


def share(percent: int) -> Marked:
    """Return so many of 100 images, always the first ones."""
    return marked(torch.arange(100) < percent)


def dissected(role: Role, together: int, flips: int, of_routes: int = 50) -> Dissected:
    rows = tuple(
        TargetRow(target=target, accuracy=share(of_routes), route_change=None) for target in TARGETS
    )
    found = Withstood(accuracy=share(90), targets=rows, together=share(together))
    return Dissected(
        role=role, run="r", recipe="r", method="joint", loss="trades", withstood=found,
        flips=share(flips), router_flips=share(10),
    )  # fmt: skip


def test_insights_by_hand() -> None:
    report = DissectionReport(
        family="advmoe", data="digits", images=100, threat=ThreatModel(epsilon=0.1), steps=20,
        seed=0,
        runs=(
            dissected("standard", 10, 50), dissected("robust router", 30, 20),
            dissected("robust experts", 12, 50), dissected("experts moved", 60, 28),
            dissected("both", 70, 30),
        ),
        versions={}, seconds=1.0,
    )  # fmt: skip
    router, experts, kept, which, both = insights(report)
    assert (router.tone, experts.tone, kept.tone) == ("gain", "unsure", "worse")
    assert (
        "gains robustness: 30.0 % withstand PGD with every target, 10.0 % without it, +"
        in router.text
    )
    assert "100 images decide no gain or loss: 12.0 %" in experts.text
    assert "-1.3 to +5.3 points apart" in experts.text
    assert "not kept as experts move" in kept.text
    assert "20.0 % of the images" in kept.text
    assert "a robust router is worth more" in which.text
    assert "70.0 % of r" in both.text


def test_what_was_measured_outlives_what_stops_it(
    capsys: Capture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacks on the second run fail: the first one's figures are shown beside the error."""
    attacked: list[None] = []

    def once(self: SharedTrial, *arguments: object) -> Withstood:
        if attacked:
            raise OSError("no space left")
        attacked.append(None)
        return put_to(self, *arguments)  # type: ignore[arg-type]

    put_to = SharedTrial.put_to
    monkeypatch.setattr(SharedTrial, "put_to", once)
    line = ["analyze", "--dissect", *(str(runs / name) for name in NAMES), "--images", "4"]
    out = tmp_path / "out"
    assert run([*line, "--steps", "1", "--out", str(out), "--json"]) != 0
    (kept,) = json.loads(capsys.readouterr().out)["measured"]
    assert kept["role"] == "standard"
    attacked.clear()
    assert run([*line, "--steps", "1", "--out", str(out)]) != 0
    screen = capsys.readouterr().out
    assert "Measured before it was stopped" in screen
    assert "standard" in screen
    assert not out.exists()
