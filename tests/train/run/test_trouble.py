"""Catastrophic overfitting and collapse are said when they begin, and once."""

from pathlib import Path

import pytest

from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.run.report import EpochRecord
from advmoe_deploy.train.run.trouble import trouble, unused
from tests.conftest import Notes
from tests.toy_training import some_digits, tiny, tiny_of


def told(config: TrainConfig, *epochs: dict[str, float | None]) -> list[tuple[int, str]]:
    """The epochs in which something is said, and its second word."""
    records = [
        EpochRecord.model_validate({"epoch": n, "loss": 1, "seconds": n, **fields})
        for n, fields in enumerate(epochs, 1)
    ]
    return [
        (record.epoch, line)
        for record in records
        for line in trouble(config, records[: record.epoch - 1], record)
    ]


def pgd(*accuracies: float | None) -> list[dict[str, float | None]]:
    return [{"pgd_accuracy": accuracy} for accuracy in accuracies]


def test_a_sudden_fall_under_half_of_the_best_is_told_once() -> None:
    config = tiny("digits-s-dense", "loss=n-fgsm")
    ((epoch, line),) = told(config, *pgd(0.3, None, 0.5, 0.2, 0.1))
    assert epoch == 4
    assert "catastrophic overfitting" in line
    assert "20.0 %" in line
    assert "epoch 3 kept 50.0 %" in line


@pytest.mark.parametrize(
    ("loss", "accuracies"), [("trades", (0.5, 0.1)), ("n-fgsm", (0.5, 0.3, 0.26)), ("fast", (0.1,))]
)
def test_other_falls_are_not(loss: str, accuracies: tuple[float, ...]) -> None:
    assert not told(tiny("digits-s-dense", f"loss={loss}"), *pgd(*accuracies))


def test_a_collapse_is_told_when_it_begins() -> None:
    routes = [
        {"pgd_accuracy": 0.5, "effective_routes": used} for used in (1.9, 1.05, 1.0, 1.8, 1.02)
    ]
    lines = told(tiny(), *routes)  # type: ignore[arg-type]
    assert [epoch for epoch, _ in lines] == [2, 5]
    assert "1.05 of 2 routes" in lines[0][1]


def test_routes_are_counted_as_soon_as_experts_part() -> None:
    config = recipe("cifar10-advmoe-cpu")
    assert config.shared_epochs == 13
    evaluated = [epoch for epoch in range(1, 16) if config.evaluates(epoch)]
    assert evaluated == [3, 6, 9, 12, 14, 15]
    assert not recipe("cifar10-s-dense-cpu").evaluates(14)


def test_the_model_that_is_kept_is_judged_by_all_that_was_counted() -> None:
    config = tiny("digits-advmoe-agreeing")
    test, holdout = {"router": (12, 0)}, {"router": (0, 9)}
    assert unused(config, test, {"router": (9, 0)})[1] == ("even_loads=true",)
    assert unused(config, test, holdout) == ((), ())
    assert unused(config, test, {"router": (3, 0)}) == ((), ())  # 15 may be chance


@pytest.mark.parametrize(
    ("config", "way_out", "settings"),
    [
        (tiny("digits-advmoe"), "with even_loads=true (now false)", ["even_loads=true"]),
        (
            tiny("digits-advmoe", "even_loads=true"),
            "with a balance_loss such as switch (now null) or a lower router_lr (now 0.01)",
            ["balance_loss=switch", "router_lr=0.005"],
        ),
        (
            tiny("digits-advmoe", "even_loads=true", "balance_loss=switch"),
            "with a higher balance_weight (now 0.5) or a lower router_lr (now 0.01)",
            ["balance_weight=1", "router_lr=0.005"],
        ),
        (tiny("digits-rt-er"), "with a balance_loss such as switch", ["balance_loss=switch"]),
        (tiny("digits-jtdmoe"), "with a balance_loss such as switch", ["balance_loss=switch"]),
        (tiny("digits-experts-only"), "as well, with method=joint", ["method=joint"]),
        (
            tiny("digits-advmoe-released"),
            "with method=advmoe and even_loads=true",
            ["method=advmoe", "even_loads=true"],
        ),
        (
            tiny_of("robust-experts", "joint", "model.expert_layers.gate=fixed-gap-fc"),
            "with a model.expert_layers.gate that learns (now fixed-gap-fc)",
            ["model.expert_layers.gate=gap-fc"],
        ),
    ],
    ids=lambda each: each.name if isinstance(each, TrainConfig) else None,
)
def test_the_way_out_of_one_expert_acts_in_the_run(
    config: TrainConfig, way_out: str, settings: list[str]
) -> None:
    ((line,), remedies) = unused(config, {"router": (40, 0)})
    assert way_out in line
    assert apply_overrides(config, settings) != config  # what is named can be set
    assert list(remedies) == (["even_loads=true"] if "(now false)" in way_out else [])


def test_a_network_without_routes_is_not_told_of_them() -> None:
    assert unused(tiny("digits-s-dense"), {"router": (40,)}) == ((), ())


def test_a_run_says_what_its_records_tell(tmp_path: Path) -> None:
    # Nothing holds the router, whose bias decides for all images alike.
    free = ("balanced_start=false", "class_routing_weight=0", "epochs=1", "loss=standard")
    notes = Notes()
    train(tiny("digits-advmoe", *free), some_digits(), tmp_path / "run", progress=notes)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = EpochRecord.model_validate_json(line)
    collapsed = (record.effective_routes or 2) < 1.1
    assert collapsed == any("to one expert" in line for line in notes.notes)
