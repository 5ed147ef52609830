"""What the papers' code releases exports on any processor, whatever its weights happen to be.

Every kind of the fixtures, filled from other seeds and at 224 pixels. ``-m slow`` runs 30 seeds.
"""

from pathlib import Path

import pytest

from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.export.graph_files import check_graphs, write_graphs
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.parity.reference import reference_answers
from tests.conftest import Notes
from tests.export.released_checkpoints import KINDS, run_of

NARROW = "advmoe-resnet18-e5"
WIDE = "advmoe-wrn28x10-e2"
DATA = "random:4"


def checked(kind: str, seed: int, folder: Path, size: int | None = None) -> list[str]:
    """Write and check all graphs but the baselines, which are the same for every seed."""
    checkpoint, model = load_checkpoint(run_of(kind, seed, folder, size) / "model")
    images = parity_images(DATA, checkpoint.model)
    progress = Notes()
    parts, _ = write_graphs(folder, model, images, progress)
    answers = reference_answers(model, images)
    assert check_graphs(folder, model, parts, images, answers, data=DATA).passed
    return progress.notes


def test_another_seed_exports(tmp_path: Path) -> None:
    checked(NARROW, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_written(kind: str, tmp_path: Path) -> None:
    assert export_run(run_of(kind, 1, tmp_path), tmp_path / "b", data=DATA).manifest.parity.passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 31))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != WIDE])
def test_other_seeds_export(kind: str, seed: int, tmp_path: Path) -> None:
    checked(kind, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_other_seeds_of_the_widest_export(seed: int, tmp_path: Path) -> None:
    checked(WIDE, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != WIDE])
def test_large_images_export(kind: str, seed: int, tmp_path: Path) -> None:
    checked(kind, seed, tmp_path, size=224)
