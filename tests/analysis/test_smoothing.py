"""Randomized smoothing against what is known exactly: counts, radii, and runs that were cut off."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from advmoe_deploy.analysis.smoothing import (
    Smoothing,
    certify,
    l2_radius,
    lower_confidence_bound,
)
from advmoe_deploy.errors import CheckFailedError, MachineError, UsageError
from tests.toys import LinearClassifier, toy_spec

QUICK = Smoothing(sigma=0.5, n0=20, n=400)


def halfspace(distance: float) -> tuple[LinearClassifier, torch.Tensor]:
    """A linear classifier, and an image whose l2 distance from its boundary is ``distance``."""
    direction = torch.ones(16) / 4  # of norm 1
    weight = torch.stack([direction, -direction])
    model = LinearClassifier(toy_spec(), weight, torch.tensor([-2.0, 2.0]))
    return model, torch.full((1, 1, 4, 4), 0.5 + distance / 4)


def test_the_bound_of_a_count() -> None:
    assert lower_confidence_bound(0, 10, 0.001) == 0
    # All n hits: the bound p solves p ** n = alpha.
    assert lower_confidence_bound(50, 50, 0.001) == pytest.approx(0.001 ** (1 / 50))

    def tail(p: float, hits: int, trials: int) -> float:
        return sum(
            math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(hits, trials + 1)
        )

    bound = lower_confidence_bound(40, 60, 0.01)
    assert tail(bound, 40, 60) == pytest.approx(0.01)


def test_the_bound_is_exceeded_as_rarely_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    share, trials, runs, alpha = 0.8, 100, 4000, 0.05
    hits = (torch.rand(runs, trials, generator=generator) < share).sum(dim=1).tolist()
    wrong = sum(lower_confidence_bound(count, trials, alpha) > share for count in hits)
    assert wrong / runs <= alpha + 3 * math.sqrt(alpha / runs)


@pytest.mark.parametrize("distance", [0.1, 0.4, 0.8])
def test_the_radius_of_a_halfspace_is_its_distance(distance: float) -> None:
    model, x = halfspace(distance)
    settings = Smoothing(sigma=0.5, n0=50, n=20_000, alpha=0.001)
    (image,) = certify(model, x, torch.tensor([0]), settings).certified
    assert image.answer == 0
    assert distance - 0.05 < image.radius <= distance


def test_certificates_of_a_halfspace_are_hardly_ever_wrong() -> None:
    model, x = halfspace(0.3)
    many = x.repeat(300, 1, 1, 1)
    settings = Smoothing(sigma=0.5, n0=10, n=100, alpha=0.05)
    report = certify(model, many, torch.zeros(300, dtype=torch.int64), settings)
    too_far = sum(image.correct and image.radius > 0.3 for image in report.certified)
    assert too_far / 300 <= 0.05 + 3 * math.sqrt(0.05 / 300)
    assert len({image.count for image in report.certified}) > 5  # each image has its own noise


def test_close_to_the_boundary_it_abstains() -> None:
    model, x = halfspace(0.001)
    report = certify(model, x, torch.tensor([0]), QUICK)
    assert (report.abstained, report.accuracy.value, report.mean_radius) == (1, 0.0, 0.0)
    assert report.certified[0].answer is None


def test_the_curve_counts_what_is_right_and_far() -> None:
    model, near = halfspace(0.2)
    x = torch.cat([near, halfspace(3.0)[1], halfspace(3.0)[1]])
    report = certify(model, x, torch.tensor([0, 0, 1]), QUICK)
    assert report.accuracy.value == pytest.approx(2 / 3)
    assert report.largest_radius == l2_radius(QUICK.n, QUICK)
    assert report.curve.accuracy[0] == pytest.approx(2 / 3)
    assert report.curve.accuracy[-1] == pytest.approx(1 / 3)
    assert list(report.curve.accuracy) == sorted(report.curve.accuracy, reverse=True)


def test_a_run_that_was_cut_off_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model, x = halfspace(0.3)
    x, y, journal = x.repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64), tmp_path / "j.jsonl"
    whole = certify(model, x, y, QUICK, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    changed = json.loads(lines[2])
    changed["radius"] = 9.0  # so that it shows which lines are taken as they are
    journal.write_bytes(b"".join([*lines[:2], json.dumps(changed).encode() + b"\n", lines[3][:9]]))
    again = certify(model, x, y, QUICK, journal=journal)
    assert again.certified[1].radius == 9.0
    assert again.certified[2:] == whole.certified[2:]
    assert len(journal.read_bytes().splitlines()) == 7
    fewer = certify(model, x, y, QUICK, first=4, journal=journal)  # as a budget may leave
    assert fewer.certified == again.certified[:4]
    assert certify(model, x, y, QUICK, first=5, journal=journal).certified[1].radius == 9.0


def test_the_journal_of_another_job_is_begun_anew(tmp_path: Path) -> None:
    model, x = halfspace(0.3)
    y, journal = torch.zeros(1, dtype=torch.int64), tmp_path / "j.jsonl"
    certify(model, x, y, QUICK, journal=journal)
    other = QUICK.model_copy(update={"seed": 1})
    assert certify(model, x, y, other, journal=journal) == certify(model, x, y, other)
    model.linear.fc.bias.data += 0.1
    first = journal.read_bytes()
    certify(model, x, y, other, journal=journal)
    assert journal.read_bytes() != first


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    model, x = halfspace(0.3)
    journal = tmp_path / "j.jsonl"
    with journal.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing"):
            certify(model, x, torch.tensor([0]), QUICK, journal=journal)


def test_where_files_cannot_be_locked_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", missing)
    model, x = halfspace(0.3)
    with pytest.raises(MachineError, match="name a place on another one"):
        certify(model, x, torch.tensor([0]), QUICK, journal=tmp_path / "j.jsonl")


def test_a_model_that_answers_nan_is_not_certified() -> None:
    model, x = halfspace(0.3)
    model.linear.fc.bias.data[0] = torch.nan
    with pytest.raises(CheckFailedError, match="under noise are not finite"):
        certify(model, x, torch.tensor([0]), QUICK)
