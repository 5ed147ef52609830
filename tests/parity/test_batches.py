"""An image's answer does not depend on its batch, and a runner whose answers do is found."""

import numpy as np
import pytest

from advmoe_deploy.parity.answers import Answers, RouteAnswers
from advmoe_deploy.parity.batches import batch_complaint, steady_images
from advmoe_deploy.runtime.runner import Prediction

IMAGES = np.random.default_rng(0).random((21, 1, 2, 2), dtype=np.float32)


class Fake:
    """Answers the sum of an image and its opposite, disturbed in batches of ``size``."""

    name, precision, tf32 = "fake", "fp32", False

    def __init__(self, size: int, moved: float = 0.0, reroutes: bool = False) -> None:
        self.size, self.moved, self.reroutes = size, moved, reroutes

    def infer(self, images: np.ndarray) -> Prediction:
        sums_N = images.sum(axis=(1, 2, 3))
        logits = np.stack([sums_N, -sums_N], axis=1)
        ids = (sums_N > 2).astype(np.int64)[:, None]
        if len(images) == self.size:
            logits[-1] *= 1 + self.moved
            ids[-1] ^= self.reroutes
        return Prediction(logits, {"router": ids}, {"router": np.ones(ids.shape, np.float32)})

    def close(self) -> None: ...

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_answer_that_depends_on_the_batch_is_found(size: int) -> None:
    assert not batch_complaint(Fake(size), IMAGES, 1e-5)
    assert not batch_complaint(Fake(size, moved=1e-6), IMAGES, 1e-5)
    found = batch_complaint(Fake(size, moved=1e-3), IMAGES, 1e-5)
    assert found.startswith(f"in batches of {size}, logits differ from those in one batch by 0.001")
    assert found.endswith("(limit 1e-05)")
    assert not batch_complaint(Fake(size, moved=0.09), IMAGES, None)
    assert batch_complaint(Fake(size, moved=0.11), IMAGES, None).endswith("(limit 0.1)")
    for tolerance in (1e-5, None):
        assert "by nan" in batch_complaint(Fake(size, moved=np.nan), IMAGES, tolerance)


def test_in_fp32_no_route_depends_on_the_batch() -> None:
    found = batch_complaint(Fake(3, reroutes=True), IMAGES, 1e-5)
    assert found == "in batches of 3, 7 rows go to other experts than in one batch"
    assert not batch_complaint(Fake(3, reroutes=True), IMAGES, None)  # its logits tell


def test_few_images_or_none() -> None:
    assert not batch_complaint(Fake(2), IMAGES[:0], 1e-5)
    assert not batch_complaint(Fake(2, moved=1.0), IMAGES[:1], 1e-5)


def test_images_whose_routes_are_close_calls_are_left_out() -> None:
    scores = np.array([[0.1, 0], [0.5, 0], [0, 0.3], [0, 0.2], [0, 9]], np.float32)
    ids = scores.argmax(axis=1)[:, None]
    answers = Answers(scores, {"router": RouteAnswers(scores, ids, np.ones_like(ids, np.float32))})
    np.testing.assert_array_equal(steady_images(IMAGES[:5], answers), IMAGES[[1, 2, 4]])
    np.testing.assert_array_equal(steady_images(IMAGES[:5], answers, 2), IMAGES[[1, 2]])
    np.testing.assert_array_equal(steady_images(IMAGES[:4], Answers(scores[:4])), IMAGES[:2])
