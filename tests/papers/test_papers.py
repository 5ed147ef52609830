"""Every command of docs/papers.md does what it says, at toy size: no row names what is not there.

Trainings are planned on images of the right shape, analyses are made of random runs. A command that
would train or attack for long is stopped at its data: by then all it says has been checked.
"""

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.config import apply_overrides
from advmoe_deploy.train.recipes import RECIPES, recipe
from advmoe_deploy.train.recipes.published import advmoe_cells
from docs.programs.generate import PAPERS_PAGE
from docs.programs.papers import Cost, reason_of, with_tables
from tests.cli.command_line import Capture
from tests.conftest import TINY, write_run
from tests.data.packed import png
from tests.families import spec_of

PAGE = PAPERS_PAGE.read_text(encoding="utf-8")
COMMANDS = list(dict.fromkeys(re.findall(r"`advmoe ([^`]+)`", PAGE)))
SPECS: dict[str, ModelSpec] = {
    "digits-advmoe": TINY,
    "digits-block-moe": spec_of("block experts"),
    "digits-conv-moe": spec_of("conv experts"),
    "digits-rt-er": spec_of("expert networks"),
    "digits-jtdmoe": spec_of("dual model"),
    "digits-vit-moe": spec_of("token experts"),
    "digits-vit": spec_of("dense ViT"),
}
TOY = ("--images", "8", "--steps", "1")


def commands(*names: str) -> list[str]:
    return [command for command in COMMANDS if command.partition(" ")[0] in names]


# Analyses of several runs, which tests/cli/several has. Those of a dissection begin with each other
# and are not here.
SEVERAL = [c for c in commands("analyze") if "--alpha" in c or "--dissect" in c]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of as few images as there are classes, by data set."""
    folder = tmp_path_factory.mktemp("images")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        spec = recipe(next(r for r in RECIPES if r.startswith(f"{name}-"))).model
        rng = np.random.default_rng(0)
        for split, count in (("train", 2 * spec.num_classes), ("test", spec.num_classes)):
            rows = [
                {
                    "bytes": png(rng.integers(0, 256, (spec.image_size,) * 2 + (3,), np.uint8)),
                    "path": None,
                }
                for _ in range(count)
            ]
            labels = pa.array([i % spec.num_classes for i in range(count)], pa.int64())
            table = pa.table({"img": pa.array(rows, kind), "label": labels})
            (folder / name).mkdir(exist_ok=True)
            pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random run of each recipe on digits that the page looks into."""
    folder = tmp_path_factory.mktemp("papers") / "runs"
    for name, spec in SPECS.items():
        if f"runs/{name}" in PAGE:
            write_run(folder / name, spec)
    return folder


def test_the_page_is_made_of_commands() -> None:
    assert len(COMMANDS) > 40
    assert {c.partition(" ")[0] for c in COMMANDS} == {
        "train", "sweep", "analyze", "verify", "profile",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands("train"))
def test_a_training_can_be_planned(command: str, images: Path, capsys: Capture) -> None:
    config = recipe(shlex.split(command)[1])
    data = [] if config.data == "digits" else ["--data", f"{config.data}:{images / config.data}"]
    assert run([*shlex.split(command), *data, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert plan["dry_run"]
    assert len(plan["classes"]) == config.model.num_classes


@pytest.mark.parametrize("command", [c for c in commands("analyze") if c not in SEVERAL])
def test_an_analysis_is_made(command: str, runs: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = [part.replace("runs/", f"{runs}/") for part in shlex.split(command)]
    out = tmp_path / "out"
    assert run([*arguments, *TOY, "--out", str(out)]) == 0, capsys.readouterr().err
    (section,) = re.findall(r"--only (\w+)", command)
    assert json.loads((out / "analysis.json").read_text())[section]


@pytest.mark.parametrize("command", [*commands("sweep", "verify"), *SEVERAL])
def test_the_rest_is_stopped_by_nothing_but_its_data(
    command: str, tiny_bundle: Bundle, runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = re.sub(r"\S+/bundle", str(tiny_bundle.path), command).replace("runs/", f"{runs}/")
    nowhere = tmp_path / "nowhere"
    assert run([*shlex.split(arguments), "--data", f"cifar10:{nowhere}"]) in (2, 3)
    err = capsys.readouterr().err
    assert (str(runs / "standard") if "--dissect" in command else str(nowhere)) in err


@pytest.mark.parametrize("command", commands("profile"))
def test_times_are_taken(command: str, tiny_bundle: Bundle, capsys: Capture) -> None:
    arguments = re.sub(r"\S+/bundle", str(tiny_bundle.path), command)
    assert run([*shlex.split(arguments), "--batch", "1", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("command", "also"), re.findall(r"`advmoe ([^`]+)`; also ([^|;]+?)(?:;| \|)", PAGE)
)
def test_what_a_row_also_names_is_there(command: str, also: str) -> None:
    """Other values of the setting at the end of its command, or recipes with one beginning."""
    first, *others = also.split(", ")
    if settings := re.findall(r"--set (\S+)", command):
        base, key = recipe(shlex.split(command)[1]), settings.pop().partition("=")[0]
        found = [apply_overrides(base, [*settings, f"{key}={value}"]) for value in (first, *others)]
    else:
        begin = first.removesuffix("-moe-standard")
        found = [recipe(name) for name in (first, *(f"{begin}{other}" for other in others))]
    assert all(one != other for one, other in itertools.combinations(found, 2))


def test_the_page_names_every_cell_of_advmoes_tables() -> None:
    (columns,) = re.findall(r"COLUMN of ([^|]+) \|", PAGE)
    grids = re.findall(r"DATA of (.+?) with NETWORK of (.+?)(?:, and|;)", PAGE)
    named = [
        f"{data}-{network}-{column}"
        for sets, networks in grids
        for data in sets.split(", ")
        for network in networks.split(", ")
        for column in columns.split(", ")
    ]
    assert len(named) == 60, "as the row says"
    assert {*named} == {"-".join(cell) for cell in advmoe_cells()}
    assert all(recipe(name).model for name in named)


def test_every_recipe_of_a_paper_is_on_the_page() -> None:
    """By name, or as a cell of AdvMoE's tables, which are named by their parts."""
    cells = {"-".join(cell) for cell in advmoe_cells()}
    for name in RECIPES.keys() - cells:
        of_paper = name.startswith(("cifar100-", "tiny-imagenet-rt", "cifar10-rt", "cifar10-vit"))
        if of_paper and not name.endswith("-advmoe-paper"):
            assert f"advmoe train {name}" in PAGE, name


def test_the_page_has_the_macs_of_now() -> None:
    assert with_tables(PAGE) == PAGE, "run 'make docs'"


@pytest.mark.parametrize(
    ("paper", "cost", "reason"),
    [
        (0.14, Cost(139_300_000, 0, 0), "the same"),
        (0.07, Cost(79_100_000, 0, 0), "the same"),  # cut off
        (5.25, Cost(5_243_300_000, 0, 6_100_000), "with BatchNorm and ReLU"),
        (0.12, Cost(79_100_000, 40_600_000, 400_000), "with the router"),
        (21.0, Cost(20_973_400_000, 0, 0), "the same"),  # a figure of one digit after the point
        (1.75, Cost(1_310_900_000, 40_600_000, 3_100_000), "unexplained, +33 %"),
    ],
)
def test_a_reason_is_the_sum_that_the_paper_gives(paper: float, cost: Cost, reason: str) -> None:
    assert reason_of(paper, cost) == reason


def test_no_network_grows_as_the_papers_do() -> None:
    """What the page says of the figures that are unexplained."""
    cells = {key: cell.giga_macs for key, cell in advmoe_cells().items()}

    def growth(backbone: str, column: str) -> float:
        small, large = (cells[data, backbone, column] for data in ("cifar10", "tiny-imagenet"))  # type: ignore[index]
        assert small
        assert large
        return large / small

    assert f"{growth('wrn-28-10', 'advmoe'):.1f}" == "4.3"
    assert f"{growth('resnet18', 'advmoe'):.1f}" == "5.0"
    for backbone in ("wrn-28-10", "resnet18"):
        for column in ("dense", "s-dense"):
            assert 3.9 < growth(backbone, column) < 4.15
    assert "unexplained" in PAGE
