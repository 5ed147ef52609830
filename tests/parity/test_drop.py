"""What a drop in accuracy on the same images says, by hand and over many repetitions."""

import numpy as np
import pytest

from advmoe_deploy.parity.drop import PLANTED, POWER, Drop

LIMIT = 0.5
REPETITIONS = 1000
RATES = (0.01, 0.02, 0.03, 0.04)


def drop(images: int, only_reference: int, only_engine: int) -> Drop:
    return Drop(images=images, only_reference=only_reference, only_engine=only_engine)


def repeated(rate: float, images: int, lost: float = 0.0) -> list[Drop]:
    """Return what repetitions find where ``rate`` of the images differ, and ``lost`` on top."""
    draws = np.random.default_rng(round(1e4 * rate)).multinomial(
        images, [rate / 2 + lost, rate / 2, 1 - rate - lost], size=REPETITIONS
    )
    return [drop(images, int(lost), int(gained)) for lost, gained, _ in draws]


def needed(rate: float, limit: float = LIMIT) -> int:
    """Return what decides where ``rate`` of 10,000 images differed."""
    half = round(5000 * rate)
    images = drop(10_000, half, half).images_needed(limit)
    assert images is not None
    return images


def shares(drops: list[Drop]) -> dict[str, float]:
    verdicts = [each.verdict(LIMIT) for each in drops]
    kinds = ("passed", "failed", "undecided")
    return {kind: verdicts.count(kind) / len(verdicts) for kind in kinds}


def test_images_are_counted_by_who_is_right() -> None:
    reference_N = np.array([True, True, True, False, False])
    engine_N = np.array([True, False, False, True, False])
    assert Drop.between(reference_N, engine_N) == drop(5, 2, 1)
    assert drop(200, 2, 1).points == LIMIT
    assert drop(0, 0, 0).points == 0


def test_p_is_that_of_fair_coins() -> None:
    assert drop(200, 0, 0).p == drop(200, 3, 3).p == 1
    # Of 3 coins none falls heads in 1 of 8 cases; of 5 at most one in 6 of 32.
    assert drop(200, 3, 0).p == pytest.approx(1 / 4)
    assert drop(200, 3, 0).p_lost == pytest.approx(1 / 8)
    assert drop(200, 1, 4).p == pytest.approx(12 / 32)
    assert drop(200, 1, 4).p_lost == pytest.approx(31 / 32)


def test_where_nothing_differs_the_number_of_images_decides() -> None:
    """The interval of Agresti and Min still says 0.97 points of 200 images, and 0.49 of 400."""
    assert drop(200, 0, 0).interval == pytest.approx((-0.970, 0.970), abs=1e-3)
    assert drop(400, 0, 0).interval == pytest.approx((-0.488, 0.488), abs=1e-3)
    assert drop(200, 0, 0).verdict(LIMIT) == "undecided"
    assert drop(400, 0, 0).verdict(LIMIT) == "passed"
    # The floor is one image that differs.
    assert drop(200, 0, 0).images_needed(LIMIT) == drop(10_098, 25, 24).images_needed(LIMIT)


def test_three_outcomes() -> None:
    assert drop(200, 12, 1).verdict(LIMIT) == "failed"
    assert drop(200, 2, 1).verdict(LIMIT) == "undecided"
    assert drop(10_000, 40, 40).verdict(LIMIT) == "passed"
    assert drop(200, 150, 0).verdict(100) == "passed"
    assert not drop(200, 1, 4).gained_beyond_chance
    assert drop(200, 1, 12).gained_beyond_chance


def test_sentences() -> None:
    said = drop(200, 2, 1).sentence()
    assert said == ("a drop of 0.50 points (-1.44 to 2.43, 95 % interval) on 200 images, p = 1")
    report = drop(200, 2, 1).report(LIMIT)
    assert report.sentence() == said
    assert report.judgement() == (
        f"undecided (limit 0.5 points): {report.images_needed:,} images would decide"
    )
    assert drop(200, 12, 1).report(LIMIT).judgement() == "failed (limit 0.5 points)"
    assert "no number of images" in drop(200, 0, 0).report(0).judgement()
    # 0.4 points are really lost: more images than pass a drop of nil, and they cannot tell.
    assert "too near the limit" in drop(6000, 42, 18).report(LIMIT).judgement()


def test_a_smaller_limit_and_a_larger_discordance_need_more_images() -> None:
    assert needed(0.01) < needed(0.02) < needed(0.04)
    assert needed(0.02, limit=1.0) < needed(0.02, limit=0.5) < needed(0.02, limit=0.1)
    assert drop(200, 1, 1).images_needed(0) is None
    assert drop(200, 0, 0).images_needed(100) == 1


@pytest.mark.parametrize("rate", RATES)
def test_with_as_many_images_as_are_needed_a_drop_of_nil_passes(rate: float) -> None:
    found = shares(repeated(rate, needed(rate)))
    assert found["failed"] <= 0.01
    assert found["passed"] >= POWER - 0.03  # of 1,000 repetitions, 0.03 are over four deviations


@pytest.mark.parametrize("rate", RATES)
def test_with_as_many_images_as_are_needed_a_planted_drop_fails(rate: float) -> None:
    assert LIMIT + PLANTED == 2.0
    found = shares(repeated(rate, needed(rate), lost=0.02))
    assert found["passed"] == 0
    assert found["failed"] >= POWER


@pytest.mark.parametrize("limit", [2.0, 5.0])
def test_where_the_limit_is_wide_the_planted_drop_counts(limit: float) -> None:
    """Then it takes more images to find a drop of 1.5 points more than to pass one of nil."""
    images = needed(0.02, limit)
    found = repeated(0.02, images, lost=(limit + PLANTED) / 100)
    failed = [each.verdict(limit) == "failed" for each in found]
    assert POWER - 0.03 <= np.mean(failed) <= POWER + 0.03
    passed = [each.verdict(limit) == "passed" for each in repeated(0.02, images)]
    assert np.mean(passed) >= POWER


@pytest.mark.parametrize(
    ("rate", "claimed"), [(0.01, 0.27), (0.02, 0.35), (0.03, 0.38), (0.04, 0.40)]
)
def test_of_few_images_an_estimate_claims_what_is_not_there(rate: float, claimed: float) -> None:
    """Of 100 images without a drop, 27 to 40 % have an estimate above 0.5 points: one image.

    Of as few, the three outcomes claim a drop in at most 1 %.
    """
    found = repeated(rate, 100)
    assert np.mean([each.points > LIMIT for each in found]) == pytest.approx(claimed, abs=0.05)
    assert shares(found)["failed"] <= 0.01
