"""A lower precision that gains no time is said, by medians of rounds taken in turn."""

import re

import numpy as np

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.profiling.lowered import not_faster, slower_than_fp32


def test_medians_decide() -> None:
    fp32 = np.asarray([1.0, 2.0, 30.0])
    slow, quick = np.asarray([2.5, 2.8, 2.9]), np.asarray([1.0, 1.9, 90.0])
    said = not_faster("onnxruntime:int8", slow, "onnxruntime:fp32", fp32)
    assert said.startswith("int8 took 1.4x the time of fp32 at batch 1 on this CPU (onnxruntime,")
    assert "medians of 3 rounds" in said
    assert not_faster("onnxruntime:int8", quick, "onnxruntime:fp32", fp32) == ""
    assert not_faster("onnxruntime:int8", fp32, "onnxruntime:fp32", fp32).startswith(
        "int8 took 1.0"
    )
    other = not_faster("openvino:bf16", slow, "onnxruntime:fp32", fp32)
    assert other.startswith("openvino bf16 took 1.4x the time of onnxruntime fp32 at batch 1")


def test_only_what_is_lower_is_timed(tiny_bundle: Bundle, int8_bundle: Bundle) -> None:
    assert slower_than_fp32(tiny_bundle) == []
    said = slower_than_fp32(int8_bundle, threads=1)
    assert len(said) <= 1
    line = r"int8 took [\d.]+x the time of fp32 at batch 1 on this CPU .*medians of (\d+) rounds\)"
    assert all(int(re.fullmatch(line, each)[1]) >= 20 for each in said)  # type: ignore[index]
