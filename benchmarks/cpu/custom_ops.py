"""What the kernels of our operators are worth against their bodies of standard operators.

    python -m benchmarks.cpu.custom_ops [--only advmoe,vit] [--batches 1,64] [--seconds 10]

Untrained models at 32x32, exported, each run in several forms, interleaved in one process on one
thread that does not spin:

* ``kernels`` and ``bodies``: the graph as exported, with the library of the kernels and without;
* ``unfused router``: kernels, pooling and linear layer of the gate left to ONNX Runtime;
* where experts are linear layers, ``branches`` and ``branches, bodies``: an ``If`` per expert in
  place of one node for all.

``routing alone`` is the tail of AdvMoE's router (64 x 8 x 8 features) and experts that only pool
their rows: there the difference is not lost in what convolutions take. Where a session's memory
lies can make 1 % of difference by itself, so all are opened anew in several orders. The ratios
are of medians, with 95 % intervals; above 1, the kernels are faster. Rows of an earlier result that
were not measured again are kept, with what was other then.

Writes ``benchmarks/results/custom_ops.json``.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import torch
from onnx import ModelProto

from advmoe_deploy.export.graph.stitch import graph_from_plan
from advmoe_deploy.export.graph.writer import GraphWriter
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.passes.fuse_router import fuse_router
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Segment, TensorInfo
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians, time_interleaved
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine, onnxruntime_version
from advmoe_deploy.specs import ModelSpec
from benchmarks.cpu.export import CASES, advmoe, numbers
from benchmarks.program import run_program, with_kept_rows, with_part, write

RESULT = Path(__file__).parents[1] / "results" / "custom_ops.json"
EXPERTS = (2, 5, 10)
CHANNELS, SIZE = 64, 8
NEW_GRAPH = Callable[..., ModelProto]


def model_graph(spec: ModelSpec) -> tuple[NEW_GRAPH, np.ndarray]:
    """Return what makes the graph of an untrained model, its routers not fused, and images."""
    images = np.random.default_rng(0).random((64, *spec.image_shape), dtype=np.float32)
    parts, _ = apply_passes(partition(untrained_model(spec, torch.from_numpy(images))), images)
    return partial(graph_from_plan, parts.plan, parts.graphs), images


def routing_graph(experts: int) -> tuple[NEW_GRAPH, np.ndarray]:
    """Return what makes a graph that does little else than route, and feature maps for it."""
    random = np.random.default_rng(0)
    features = TensorInfo(name="images", dtype="float32", shape=("N", CHANNELS, SIZE, SIZE))
    scores = TensorInfo(name="router.scores", dtype="float32", shape=("N", experts))
    rows = features.model_copy(update={"shape": ("R", CHANNELS, SIZE, SIZE)})
    answer = TensorInfo(name="logits", dtype="float32", shape=("R", CHANNELS))
    names = [f"router.expert-{expert}" for expert in range(experts)]
    gate = GraphWriter()
    gate.emit("ReduceMean", ["images"], "row", axes=[2, 3], keepdims=0)
    gate.constant("weight", random.standard_normal((experts, CHANNELS)).astype(np.float32))
    gate.emit("Gemm", ["row", "weight"], scores.name, transB=1)
    graphs = {"router": gate.model("router", [features], [scores])}
    for name in names:
        expert = GraphWriter()
        expert.emit("ReduceMean", ["images"], "logits", axes=[2, 3], keepdims=0)
        graphs[name] = expert.model(name, [rows], [answer])
    plan = Plan(
        segments=(
            Segment(name="router", file="router", inputs=(features,), outputs=(scores,)),
            *(Segment(name=name, file=name, inputs=(rows,), outputs=(answer,)) for name in names),
        ),
        steps=(
            RunStep(segment="router"),
            RouteStep(layer="router", scores=scores.name, num_experts=experts),
            ExpertsStep(layer="router", input="images", output="logits", segments=tuple(names)),
        ),
        outputs=("logits", "router.expert_ids"),
    )
    maps = random.standard_normal((64, CHANNELS, SIZE, SIZE)).astype(np.float32)
    return partial(graph_from_plan, plan, graphs), maps


def rows_of(
    name: str, new_graph: NEW_GRAPH, images: np.ndarray, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per batch size."""
    plain, fused = new_graph(), new_graph()
    report = fuse_router(fused)
    forms = {
        "kernels": (fused, "kernels"),
        "bodies": (fused, "bodies"),
        "unfused router": (plain, "kernels"),
    }
    if any(node.op_type == "ExpertLinear" for node in fused.graph.node):
        branches = new_graph("if")
        fuse_router(branches)
        forms |= {"branches": (branches, "kernels"), "branches, bodies": (branches, "bodies")}
    rows = []
    for batch in arguments.batches:
        given = {"images": np.resize(images, (batch, *images.shape[1:]))}
        times = times_of(forms, given, arguments.seconds)
        rows.append({"case": name, "batch": batch, "fused": report.applied, **figures(times)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def times_of(
    forms: dict[str, tuple[ModelProto, str]], given: dict[str, np.ndarray], seconds: float
) -> dict[str, np.ndarray]:
    """Return the seconds of every form; each is opened once in every place."""
    parts = []
    for start in range(len(forms)):
        order = [*forms][start:] + [*forms][:start]
        with ExitStack() as stack:
            calls = {}
            for form in order:
                graph, wanted = forms[form]
                engine = OrtEngine(graph.SerializeToString(), threads=1, custom_ops=wanted)
                calls[form] = partial(stack.enter_context(engine).run, given)
            parts.append(
                time_interleaved(calls, budget_s=seconds / len(forms), least=10, most=2000)
            )
    return {form: np.concatenate([part[form] for part in parts]) for form in forms}


def figures(times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return medians in milliseconds, and ratios to the kernels."""
    ratios = {}
    for form in [*times][1:]:
        ratio = ratio_of_medians(times[form], times["kernels"])
        ratios[f"{form} / kernels"] = [
            round(value, 4) for value in (ratio.value, ratio.low, ratio.high)
        ]
    medians = {form: round(1e3 * float(np.median(values)), 4) for form, values in times.items()}
    return {"n": len(times["kernels"]), "p50_ms": medians, "ratio_low_high": ratios}


def main() -> None:
    """Run every case and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of the names of the cases")
    parser.add_argument("--batches", type=numbers, default=(1, 64))
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring per row")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], tuple[NEW_GRAPH, np.ndarray]]] = {
        **{f"routing alone, N={n}": partial(routing_graph, n) for n in EXPERTS},
        **{f"advmoe-{n}": partial(model_graph, advmoe(n)) for n in EXPERTS},
        **{name: partial(model_graph, CASES[name][0]) for name in ("conv-moe-k2", "vit-moe")},
    }
    load_before = os.getloadavg()
    rows = []
    for name in with_part(arguments.only, cases):
        rows += rows_of(name, *cases[name](), arguments)
    facts = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime_version()},
        "custom_ops": find_custom_ops("kernels").reason,
        "settings": {"threads": 1, "spinning": False, "order": "interleaved, shuffled"},
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }
    write(arguments.out, with_kept_rows(arguments.out, facts, rows, ("case", "batch")))


if __name__ == "__main__":
    run_program(main)
