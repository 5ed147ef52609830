"""Settings for people: one source of what each means, and a plan that does nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.train.fields import TrainFields
from advmoe_deploy.train.meaning import GROUPS, settings_of
from advmoe_deploy.train.recipes import RECIPES, apply_overrides, recipe
from tests.cli.command_line import Capture
from tests.data.images import write_photos


def test_every_setting_is_in_one_group_and_has_a_meaning() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted({*TrainFields.model_fields} - {"chosen", "start"})
    for setting in settings_of():
        assert setting.meaning.endswith("."), setting.key


@pytest.mark.parametrize("name", ["digits-advmoe", "cifar10-vit-moe", "digits-conv-moe"])
def test_what_is_shown_is_what_set_takes(name: str) -> None:
    config = recipe(name)
    said = [
        f"{setting.key}={json.dumps(setting.value)}"
        for setting in settings_of(config)
        if setting.key != "model.dropped_experts"
    ]
    assert apply_overrides(config, said) == config


def test_a_recipe_is_shown_with_values_defaults_and_meanings(capsys: Capture) -> None:
    assert run(["show", "digits-advmoe", "--set", "epochs=7"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "AdvMoE, two experts of half width" in text
    assert "epochs 7 Passes over the training images. Default: 100" in text
    assert run(["show", "digits-advmoe", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    (lr,) = [one for one in settings if one["key"] == "lr"]
    assert (lr["value"], lr["default"], lr["allowed"]) == (0.02, 0.1, "> 0")


def test_a_family_is_shown_and_an_unknown_recipe_refused(capsys: Capture) -> None:
    assert run(["show", "s-dense", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "digits-s-dense"
    assert run(["show", "digits-advmo"]) == 2
    assert "did you mean digits-advmoe" in capsys.readouterr().err


def test_a_plan_writes_nothing_and_loads_no_pytorch(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=6)
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import sys; from advmoe_deploy.cli.app import run\n"
        "assert run(['show', 'advmoe']) == 0\n"
        "code = run(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    line = ["train", "advmoe", "--data", "photos", "--dry-run"]
    texts = []
    for arguments in (line, [*line, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        texts.append(done.stdout)
    assert sorted(tmp_path.rglob("*")) == before
    plan = json.loads(texts[1][texts[1].index("{\n") :])
    assert plan["classes"][0] == {"name": "digit", "train": 4, "holdout": 1, "test": 1}
    assert (plan["steps"], plan["out"]) == (40, "runs/photos-advmoe")
    assert plan["config"]["chosen"]["split"].startswith("12 to train on, 3 to choose")
    words = " ".join(texts[0].split())
    assert "epochs 40 Passes over" in words
    assert "steps 40 of up to 16 images" in words
    assert set(RECIPES) >= {plan["config"]["chosen"]["recipe"].partition(":")[0]}
