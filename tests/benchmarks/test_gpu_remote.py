"""An engine in another process, for benchmarks on machines with two interpreters."""

import sys

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import MachineError
from advmoe_deploy.runtime.select import open_runner
from benchmarks.gpu.remote import RemoteRunner

IMAGES = np.random.default_rng(1).random((5, 1, 8, 8), dtype=np.float32)


def test_it_answers_what_the_engine_answers(tiny_bundle: Bundle) -> None:
    python = f"exec {sys.executable}"
    with (
        open_runner(tiny_bundle) as here,
        RemoteRunner(python, tiny_bundle, "onnxruntime", "fp32") as there,
    ):
        for images in (IMAGES, IMAGES[:1]):
            answer, expected = there.infer(images), here.infer(images)
            np.testing.assert_allclose(answer.logits, expected.logits, atol=1e-6)
            for layer, ids in expected.expert_ids.items():
                np.testing.assert_array_equal(answer.expert_ids[layer], ids)
                np.testing.assert_array_equal(answer.weights[layer], expected.weights[layer])


def test_a_process_that_ends_is_no_answer(tiny_bundle: Bundle) -> None:
    many = np.zeros((5000, 1, 8, 8), np.float32)  # more than a pipe holds
    with (
        RemoteRunner("exit 4; true", tiny_bundle, "tensorrt", "fp16") as there,
        pytest.raises(MachineError, match="ended with code 4"),
    ):
        there.infer(many)
