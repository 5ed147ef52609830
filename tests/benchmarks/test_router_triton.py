"""The router's kernel for GPUs, run by Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is defined
pytest.importorskip("triton", reason="Triton is not installed")

import torch

from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.runtime.routing import route
from advmoe_deploy.specs import Weighting
from benchmarks.gpu.experiments.router_triton import route_rows, without_scratch


@pytest.mark.parametrize(
    ("weighting", "rows", "experts", "top_k"),
    [
        ("one", 1, 2, 1),
        ("one", 33, 5, 1),
        ("probability", 1, 2, 1),
        ("probability", 70, 8, 3),
        ("renormalised", 33, 5, 2),
        ("renormalised", 70, 8, 8),
    ],
)
def test_the_kernel_follows_the_rule(
    weighting: Weighting, rows: int, experts: int, top_k: int
) -> None:
    scores = np.random.default_rng(rows).normal(0, 3, (rows, experts)).astype(np.float32)
    step = RouteStep(layer="l", scores="s", num_experts=experts, top_k=top_k, weighting=weighting)
    expected = route(step, scores)
    ids, weights = route_rows(torch.from_numpy(scores), top_k, weighting)
    assert ids.dtype == torch.int32
    np.testing.assert_array_equal(ids.numpy(), expected["l.expert_ids"])
    np.testing.assert_allclose(weights.numpy(), expected["l.weights"], rtol=2e-6)


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[0.0, 1, 1, 1], [2, 2, 2, 2], [0, 0, 5, 0]])
    ids, weights = route_rows(scores, 2, "probability")
    assert ids.tolist() == [[1, 2], [0, 1], [2, 0]]
    np.testing.assert_allclose(weights[1].numpy(), [0.25, 0.25])


AHEAD_OF_TIME = """
import json, re, sys
from benchmarks.gpu.experiments.router_triton import compiled_router
from advmoe_deploy.plan import RouteStep
made = []
for weighting, top_k in (("one", 1), ("probability", 3), ("renormalised", 2)):
    route = RouteStep(layer="l", scores="s", num_experts=5, top_k=top_k, weighting=weighting)
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0)):
        kernel = compiled_router(route, capability)
        (given,) = re.findall(rf"\\.entry {kernel.entry}\\(([^)]*)\\)", kernel.ptx)
        (target,) = re.findall(r"\\.target sm_(\\d+)", kernel.ptx)
        made.append([capability, int(target), given.split(","), kernel.threads, kernel.top_k])
json.dump(made, sys.stdout)
"""


def test_it_is_compiled_without_a_gpu_as_tensorrt_launches_it() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", AHEAD_OF_TIME]
    done = subprocess.run(program, env=environment, capture_output=True, timeout=300, check=True)
    kernels = json.loads(done.stdout)
    assert len(kernels) == 15
    for capability, target, given, threads, top_k in kernels:
        assert target == 10 * capability[0] + capability[1]
        # What is read, a number, what is written, and nothing of Triton's own.
        kinds = [parameter.split()[1] for parameter in given]
        assert kinds == [".u64", ".u32", ".u64", ".u64"]
        assert threads % 32 == 0
        assert top_k in (1, 2, 3)


def test_memory_of_tritons_own_that_is_used_is_refused() -> None:
    ptx = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{{ {} }}"
    unused = without_scratch(ptx.format("ld.param.b64 %r, [k_param_0];"), "k", 1)
    assert "k_param_1" not in unused
    assert unused.startswith(".visible .entry k(\n\t.param .u64 k_param_0\n)")
    with pytest.raises(CheckFailedError, match="memory of its own"):
        without_scratch(ptx.format("ld.param.b64 %r, [k_param_1];"), "k", 1)
