"""Recipes: one for every cell of the papers' tables, each a configuration that makes sense."""

import json
from pathlib import Path

import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.train.recipes import RECIPES, apply_overrides, recipe
from advmoe_deploy.train.recipes.published import advmoe_cells


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_called_what_it_says(name: str) -> None:
    config = recipe(name)
    assert config.name == name
    assert name.startswith(config.data)
    assert apply_overrides(config, []) == config


def test_every_cell_of_advmoes_tables_has_its_recipe() -> None:
    cells = advmoe_cells()
    assert len(cells) == 60
    for (data, backbone, column), cell in cells.items():
        published = RECIPES[f"{data}-{backbone}-{column}"].published
        assert published == cell
    best = RECIPES["cifar10-wrn-28-10-advmoe"].published
    assert best is not None
    assert (best.robust_accuracy, best.clean_accuracy, best.giga_macs) == (55.73, 84.32, 1.75)


def test_the_papers_hyper_parameters() -> None:
    config = recipe("cifar10-resnet18-advmoe")
    assert (config.epochs, config.batch_size, config.lr) == (100, 128, 0.1)
    assert (config.attack_steps, config.attack_step_size) == (2, 5 / 255)
    assert config.schedule == "cosine"
    assert (config.beta, config.threat.epsilon, config.weight_decay) == (6, 8 / 255, 5e-4)
    assert config.test_attack_step_size == 2 / 255
    assert recipe("imagenet-resnet18-dense").model.stem == "imagenet"


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-paper")])
def test_the_papers_objective_alone(name: str) -> None:
    paper, ours = recipe(name), recipe(name.removesuffix("-paper"))
    assert (paper.method, paper.loss, paper.balance_loss) == ("advmoe", "trades", None)
    assert not paper.balanced_start
    assert paper.class_routing_weight == paper.random_routes == paper.route_stability == 0
    assert (paper.model, paper.epochs, paper.attack_steps) == (ours.model, ours.epochs, 2)
    assert ours.balanced_start


def test_no_router_costs_more_than_what_it_chooses() -> None:
    names = [name for name in RECIPES if name.endswith("-resnet18-advmoe")]
    assert "imagenet-resnet18-advmoe" in names
    for name in names:
        macs = macs_of(recipe(name).model)
        assert macs.router < macs.selected, name


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("cifar100-block-moe-layer4-switch", "model.top_k=5", "top_k=5 exceeds num_experts=4"),
        ("cifar10-resnet18-advmoe", "model.ratio=0.001", "leaves no channel"),
        ("cifar10-resnet18-dense", "threat.epsilon=1.5", "less than or equal to 1"),
        ("cifar100-conv-moe-layer4-entropy", "model.backbone=vit", "a ViT has no convolutions"),
        ("cifar10-rt-er", "method=advmoe", "trains family advmoe"),
        ("cifar10-resnet18-dense", "balance_loss=switch", "has none"),
        ("cifar10-vit-moe", "model.transformer.patch_size=5", "does not divide"),
    ],
)
def test_nonsense_is_one_line_before_any_data_is_read(
    name: str,
    setting: str,
    says: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=says):
        apply_overrides(recipe(name), [setting])
    missing = tmp_path / "no data here"
    command = ["train", name, "--set", setting, "--data", f"cifar10:{missing}"]
    assert run([*command, "--out", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_list_shows_paper_and_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "recipes", "--json"]) == 0
    entries = {e["name"]: e["summary"] for e in json.loads(capfd.readouterr().out)["recipes"]}
    assert set(entries) == set(RECIPES)
    assert "paper: 51.83 % robust, 80.15 % clean" in entries["cifar10-resnet18-advmoe"]
    assert "not measured" in entries["cifar10-resnet18-advmoe"]
    assert "PGD-50 85.8" in entries["digits-advmoe"]
