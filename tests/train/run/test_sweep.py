"""Sweeps: every value trained once, nonsense refused before, an interrupted one goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.commands.training.sweep import _values
from advmoe_deploy.cli.pages.plots import DENSE, EXPERT_COLOURS, INK, MOE, PAPER
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckpointError, UsageError
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.sweep import sweep
from advmoe_deploy.train.run.swept import sweep_configs
from tests.cli.command_line import said

TINY = [
    "epochs=1",
    "model.width=4",
    "model.router_width=2",
    "batch_size=400",
    "test_attack_steps=1",
    "holdout_attack_steps=1",
]


def test_the_command_trains_plots_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [part for setting in TINY for part in ("--set", setting)]
    command = ["sweep", "digits-advmoe", "--over", "model.num_experts=2,3", *sets]
    command += ["--out", str(tmp_path), "--json"]
    assert run(command) == 0
    first = json.loads(capfd.readouterr().out)
    assert [point["value"] for point in first["points"]] == [2, 3]
    loads = [len(point["reports"][0]["expert_load"]["router"]) for point in first["points"]]
    assert loads == [2, 3]
    assert "model.num_experts" in (tmp_path / "sweep.svg").read_text()
    # As if it had been killed between the two runs: the first is taken, the second made again.
    (tmp_path / "model.num_experts=3" / "seed-0" / "report.json").unlink()
    assert run(command) == 0
    out, err = capfd.readouterr()
    assert "seed-0 is finished" in err
    again = json.loads(out)
    assert again["points"][0] == first["points"][0]
    accuracy = [x["points"][1]["reports"][0]["robust_accuracy"] for x in (first, again)]
    assert accuracy[0] == accuracy[1]


def test_methods_are_drawn_into_one_plot(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [part for setting in TINY for part in ("--set", setting)]
    command = ["sweep", "digits-advmoe,digits-s-dense", "--over", "model.ratio=0.5..0.6", *sets]
    assert run([*command, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for name, each in zip(("digits-advmoe", "digits-s-dense"), found["sweeps"], strict=True):
        assert each["recipe"] == name
        assert [point["value"] for point in each["points"]] == [0.5, 0.6]
        assert (tmp_path / name / "model.ratio=0.6" / "seed-0" / "report.json").is_file()
        assert name in (tmp_path / "sweep.svg").read_text()
    colours = {*re.findall("#[0-9a-f]{6}", (tmp_path / "sweep.svg").read_text())}
    assert colours >= {MOE, DENSE}
    assert colours <= {*EXPERT_COLOURS, INK, PAPER, "#000000"}
    for wrong in ("digits-advmoe,digits-advmoe", ",", "digits-advmoe,digits-dance"):
        assert run(["sweep", wrong, "--over", "model.ratio=0.5", "--out", str(tmp_path)]) == 2


def test_ranges_count_by_their_last_digit() -> None:
    assert _values("model.num_experts=1..4")[1] == (1, 2, 3, 4)
    assert _values("model.ratio=0.2..0.5,1")[1] == (0.2, 0.3, 0.4, 0.5, 1)
    assert _values("lr=0.05..0.07")[1] == (0.05, 0.06, 0.07)
    assert _values("lr=1e-3,-0.1..0.1")[1] == (0.001, -0.1, 0, 0.1)


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ("lr=1e-3..5e-3", "write 1..10 or 0.001..0.005"),
        ("k=1..inf", "no range of plain decimals"),
        ("k=1..1e9", "no range of plain decimals"),
        ("k=1..", "no range of plain decimals"),
        ("k=..3", "no range of plain decimals"),
        (
            "k=1..2.5",
            "counts by 1 and never comes to 2.5; write 1.0..2.5 for smaller steps, or end at 2",
        ),
        ("k=4..2", "write smaller..larger"),
        ("k=1..1000000", "more than 1,000 values"),
        ("lr=nan", "'nan' is no finite number; write model.num_experts=2,4,8"),
        ("lr=0.1,1e999", "'1e999' is no finite number"),
        ("model.num_experts=two", "'two' is no finite number"),
        ("model.num_experts", "write model.num_experts=2,4,8"),
        ("model.num_experts=", "write model.num_experts=2,4,8"),
    ],
)
def test_what_is_no_sweep_is_one_line(
    over: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", "digits-advmoe", "--over", over]) == 2
    line = said(capsys)
    assert f"--over '{over}' is no sweep" in line
    assert why in line


def test_one_expert_is_that_pathway_alone() -> None:
    configs = sweep_configs(recipe("digits-advmoe"), "model.num_experts", (1, 2), (0,))
    alone, two = (configs[n, 0] for n in (1, 2))
    assert (alone.model.family, alone.model.num_experts) == ("pathway", 1)
    assert macs_of(alone.model).selected == macs_of(two.model).selected
    assert macs_of(alone.model).router == 0


def test_nonsense_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    config = apply_overrides(recipe("digits-advmoe"), TINY)
    with pytest.raises(UsageError, match="leaves no channel"):
        sweep(config, "model.ratio", (0.5, 0.001), load_dataset("digits"), tmp_path / "s")
    with pytest.raises(UsageError, match="the model takes"):  # the second of two
        sweep(config, "model.image_size", (8, 16), load_dataset("digits"), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with pytest.raises(UsageError, match="at least one value"):
        sweep(config, "model.ratio", (), load_dataset("digits"), tmp_path / "s")
    with pytest.raises(UsageError, match="--seeds"):
        sweep(config, "seed", (1, 2), load_dataset("digits"), tmp_path / "s")
    with pytest.raises(UsageError, match="a value is twice among the values 2, 3, 2"):
        sweep(config, "model.num_experts", (2, 3, 2), load_dataset("digits"), tmp_path / "s")
    with pytest.raises(UsageError, match="a seed is twice"):
        sweep(config, "lr", (1,), load_dataset("digits"), tmp_path / "s", seeds=(1, 1))


WITHOUT_TORCH_AND_IMAGES = """
import sys
for name in ("torch", "sklearn"): sys.modules[name] = None
from advmoe_deploy.cli.app import run
for over in sys.argv[1:]:
    print(run(["sweep", "digits-advmoe", "--over", over, "--threads", "1"]))
"""


def test_values_are_refused_before_torch_and_images_are_loaded(tmp_path: Path) -> None:
    refused = {"seed=1,2": "--seeds", "model.ratio=0.001": "leaves no channel", "lr=1,1": "twice"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH_AND_IMAGES, *refused],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2"] * len(refused)
    for line, text in zip(done.stderr.splitlines(), refused.values(), strict=True):
        assert text in line


def test_a_run_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    config = apply_overrides(recipe("digits-advmoe"), TINY)
    data = load_dataset("digits")
    sweep(config, "model.num_experts", (2,), data, tmp_path)
    other = config.model_copy(update={"lr": 0.5})
    with pytest.raises(UsageError, match=r"was trained with lr=0\.02"):
        sweep(other, "model.num_experts", (2,), data, tmp_path)
    (tmp_path / "model.num_experts=2" / "seed-0" / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"report\.json: run: .*; delete it") as caught:
        sweep(config, "model.num_experts", (2,), data, tmp_path)
    assert "\n" not in str(caught.value)


def test_no_value_is_rounded() -> None:
    config = apply_overrides(recipe("digits-advmoe"), TINY)
    for key, values in (("lr", (0.12345678, 0.12345679)), ("train_images", (1234567, 1234568))):
        configs = sweep_configs(config, key, values, (0,))
        assert [getattr(configs[value, 0], key) for value in values] == [*values]
