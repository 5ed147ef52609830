"""The measurement on CIFAR-10: it goes on where it was, and its four attacks are AutoAttack."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.white_box import predict
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.specs import AttackSpec, ThreatModel
from benchmarks.training import cifar10, results_page
from benchmarks.training.cifar10 import (
    AUTOATTACK,
    Flags,
    Standing,
    attack_all,
    key_of,
    require_images,
    sequence,
    turner,
)

IMAGES = 10


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Classifier:
    return load_checkpoint(trained_run / "model")[1].eval()


def by_lot(attack: AttackSpec, rows: NDArray[np.int64]) -> Flags:
    """Four rows in five stand, which of them depends on nothing but the attack and the row."""
    seeds = [np.random.default_rng([*key_of(attack).encode(), int(row)]) for row in rows]
    return np.array([rng.random() < 0.8 for rng in seeds], bool)


def test_what_was_stopped_goes_on_to_the_same_flags(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "CHUNK", 3)
    clean = np.arange(IMAGES) % 4 != 0
    whole = Standing(tmp_path / "whole.json", "weights", clean)
    chunks = len(list(attack_all(by_lot, model, whole, IMAGES)))
    assert chunks == 4 * len(sequence(model))
    file = tmp_path / "stopped.json"
    stopped = attack_all(by_lot, model, Standing(file, "weights", clean), IMAGES)
    for _ in range(chunks // 2):
        next(stopped)
    again = Standing(file, "weights", clean)
    assert len(list(attack_all(by_lot, model, again, IMAGES))) == chunks - chunks // 2
    assert again.flags.keys() == whole.flags.keys()
    for key, flags in whole.flags.items():
        np.testing.assert_array_equal(again.flags[key], flags)
    more = Standing(file, "weights", np.ones(IMAGES + 2, bool))
    assert len(list(attack_all(by_lot, model, more, IMAGES + 2))) == len(sequence(model))


@pytest.mark.parametrize(("asked", "attacked"), [(0, 0), (13, 0), (7, 8)])
def test_images_that_cannot_be_attacked_are_refused(asked: int, attacked: int) -> None:
    with pytest.raises(UsageError, match=f"ask for {max(1, attacked)} to 12"):
        require_images(asked, 12, attacked)
    require_images(8, 12, 8)


def test_autoattack_gets_what_its_own_attacks_left(model: Classifier, tmp_path: Path) -> None:
    given: dict[str, list[int]] = {}

    def turn(attack: AttackSpec, rows: NDArray[np.int64]) -> Flags:
        given[key_of(attack)] = rows.tolist()
        return by_lot(attack, rows)

    standing = Standing(tmp_path / "s.json", "weights", np.ones(IMAGES, bool))
    list(attack_all(turn, model, standing, IMAGES))
    left = np.ones(IMAGES, bool)
    for attack in AUTOATTACK:
        assert given[key_of(attack)] == np.flatnonzero(left).tolist()
        left &= standing.of(attack)
    every = standing.after(sequence(model), slice(IMAGES))
    assert not (every & ~left).any()


def test_flags_of_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    Standing(file, "one", np.ones(2, bool)).add(cifar10.PGD, np.ones(2, bool), 1.0)
    with pytest.raises(UsageError, match="other weights"):
        Standing(file, "another", np.ones(2, bool))


def test_what_is_known_of_the_training_is_of_the_same_settings(
    trained_run: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(trained_run / "model")[0]
    row = {"settings": cifar10._settings(checkpoint), "selected_epoch": 7, "train_seconds": 60.0}
    file = tmp_path / "row.json"
    assert cifar10.row_in(file, checkpoint) == {}
    file.write_text(json.dumps({"rows": [row]}))
    assert cifar10.row_in(file, checkpoint) == row
    # A model of the zoo travels without the report of its run.
    assert cifar10.trained(tmp_path, row) == {"selected_epoch": 7, "train_seconds": 60.0}
    other = checkpoint.model_copy(update={"recipe": checkpoint.recipe | {"epochs": 99}})
    assert cifar10.row_in(file, other) == {}


def test_routes_are_measured_anew_of_other_weights_or_images() -> None:
    row = {"weights_sha256": "a", "pgd_50": {"n": 500}, "routes": {"clean": 2.0}}
    assert cifar10.known_routes(row, "a", 500) == {"routes": {"clean": 2.0}}
    assert cifar10.known_routes(row, "b", 500) == {}
    assert cifar10.known_routes(row, "a", 1000) == {}
    assert cifar10.known_routes({}, "a", 500) == {}


@pytest.mark.slow
def test_the_four_in_a_row_are_autoattack(model: Classifier, tmp_path: Path) -> None:
    test, threat = load_dataset("digits").test.first(30), ThreatModel(epsilon=0.12)
    x, y = torch.from_numpy(to_float(test.images)), torch.from_numpy(test.labels)
    clean = (predict(model, x) == y).numpy()
    standing = Standing(tmp_path / "s.json", "weights", clean)
    turn = turner(model, x, y, threat)
    for attack in AUTOATTACK:
        rows = np.flatnonzero(standing.after(AUTOATTACK, slice(len(y))))
        flags = np.ones(len(y), bool)
        flags[rows] = turn(attack, rows)
        standing.add(attack, flags, 0.0)
    ours = standing.after(AUTOATTACK, slice(len(y)))
    found = find_adversarial(model, x, y, threat, AttackSpec(name="autoattack"))
    theirs = clean & (predict(model, found) == y).numpy()
    assert 0 < theirs.sum() < clean.sum()
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


def test_twins_are_compared_image_by_image_once_both_were_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four images the MoE keeps the first two, S-Dense the second and the last."""
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    clean = np.array([True, True, False, True])

    def attacked(name: str, attacks: Sequence[AttackSpec], stand: list[bool]) -> None:
        standing = Standing(tmp_path / f"{name}.attacked.json", name, clean)
        for attack in attacks:
            standing.add(attack, np.array(stand), 1.0)

    attacked(results_page.OURS, [cifar10.PGD, *AUTOATTACK], [True, True, True, False])
    attacked(results_page.S_DENSE, [cifar10.PGD, *AUTOATTACK[:3]], [False, True, True, True])
    row = results_page.beside_s_dense("PGD-50", [cifar10.PGD])
    assert row is not None
    assert row[1].startswith("+0.0 points (-")
    assert row[1].endswith(" of 4")
    assert row[2] == "open"
    assert results_page.beside_s_dense("AutoAttack", AUTOATTACK) is None
    assert results_page.beside_s_dense("all attacks", []) is None
    attacked(results_page.S_DENSE, AUTOATTACK[3:], [False, False, False, False])
    (_, told, _) = results_page.beside_s_dense("all attacks", []) or ("", "", "")
    assert told.startswith("+50.0 points (")
    assert results_page.beside_dense() == ""
    attacked(results_page.DENSE, [cifar10.PGD], [True, True, True, True])
    assert "under PGD-50 -25.0 points (" in results_page.beside_dense()
