"""What counts as the same answer, by hand."""

import numpy as np
import pytest

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.parity.answers import Answers, RouteAnswers
from advmoe_deploy.parity.compare import compare_answers, require_parity
from advmoe_deploy.runtime.runner import Prediction


def test_parity_counts_flips_by_margin() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.50005], [0.0, 1.0]], np.float32)
    ids = np.array([[0], [1], [1], [1]])
    answered = np.array([[0, 0], [0, 2e-6], [9, 9], [9, 9]], np.float32)
    routed = np.array([[0], [1], [0], [0]])  # a close flip, then a clear one
    reference, prediction = routed_answers(scores)
    np.testing.assert_array_equal(reference.routes["router"].expert_ids, ids)
    answer = Prediction(answered, {"router": routed}, prediction.weights)
    report = compare_answers(reference, answer)
    assert (report.route_flips, report.close_flips, report.close_calls) == (1, 1, 1)
    assert report.route_agreement == pytest.approx(2 / 3)
    assert report.max_abs_logit_diff == pytest.approx(2e-6)
    assert report.compared == 2
    assert report.layers[0].expert_load == (1, 3)
    assert not report.passed


def test_each_image_is_compared_relative_to_its_own_logits() -> None:
    expected = np.array([[0.5, -0.2], [3.0, -20.0]], np.float32)
    answers = Answers(expected)
    small_off, large_off = expected.copy(), expected.copy()
    small_off[0, 0] += 1e-4  # within 1e-5 of the largest logit of the set, not of its own
    large_off[1, 0] += 1e-4
    report = compare_answers(answers, Prediction(small_off))
    assert report.max_relative_logit_diff == pytest.approx(1e-4, rel=1e-2)
    assert not report.passed
    report = compare_answers(answers, Prediction(large_off))
    assert report.max_abs_logit_diff == pytest.approx(1e-4, rel=1e-2)
    assert report.max_relative_logit_diff == pytest.approx(5e-6, rel=1e-2)
    assert report.logit_tolerance == 1e-5
    assert report.passed


def routed_answers(scores: np.ndarray) -> tuple[Answers, Prediction]:
    ids = scores.argmax(axis=1)[:, None]
    logits = np.zeros((len(scores), 2), np.float32)
    weights = np.ones(ids.shape, np.float32)
    reference = Answers(logits, {"router": RouteAnswers(scores, ids, weights)})
    return reference, Prediction(logits.copy(), {"router": ids}, {"router": weights})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference logits", "engine logits", "both", "scores"])
def test_what_is_not_finite_fails(bad: float, where: str) -> None:
    answers, prediction = routed_answers(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
    if where in ("reference logits", "both"):
        answers.logits[1, 0] = bad
    if where in ("engine logits", "both"):
        prediction.logits[1, 0] = bad
    if where == "scores":
        answers.routes["router"].scores[1, 2] = bad
    report = compare_answers(answers, prediction)
    assert report.non_finite == 1
    assert not report.passed
    with pytest.raises(CheckFailedError, match="not finite on 1 of 2 images") as caught:
        require_parity(report, "model.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_to_compare_fails(images: int) -> None:
    answers, prediction = routed_answers(np.full((images, 2), 0.5, np.float32))
    report = compare_answers(answers, prediction)
    assert report.close_calls == report.images == images
    assert report.route_agreement == 0.0
    assert not report.passed
    with pytest.raises(CheckFailedError, match="cannot be compared"):
        require_parity(report, "model.onnx")


@pytest.mark.parametrize(("flipped", "passes"), [(1, True), (2, False), (3, False)])
def test_close_calls_are_no_way_around_the_comparison(flipped: int, passes: bool) -> None:
    scores = np.full((4, 2), 0.5, np.float32)
    scores[3, 0] = 1  # one clear route
    answers, prediction = routed_answers(scores)
    prediction.expert_ids["router"] = answers.routes["router"].expert_ids.copy()
    prediction.expert_ids["router"][:flipped] = 1
    report = compare_answers(answers, prediction)
    assert (report.route_flips, report.close_flips) == (0, flipped)
    assert report.passed == passes
    if not passes:
        with pytest.raises(CheckFailedError, match=f"only {4 - flipped} of 4 images"):
            require_parity(report, "model.onnx")
