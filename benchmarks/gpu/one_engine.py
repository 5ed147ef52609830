"""The stage of ``main.py`` that asks whether a model can be one engine, and is faster so."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from advmoe_deploy.runtime.tensorrt.runner import DeviceRunner
from advmoe_deploy.specs import Precision
from benchmarks.gpu.common import Part, Record, Work
from benchmarks.gpu.engines import (
    BASELINES,
    build_one,
    compared,
    image_shapes,
    images_of,
    open_moe,
    open_plan,
    set_of,
)
from benchmarks.gpu.timing import open_baseline, timed


def one_engine(work: Work) -> Iterator[Part]:
    """Build each model as one engine; where that works, compare it, and time it beside the many."""
    for model in work.models:
        for precision in work.precisions:
            name = f"{model} {precision}"
            yield f"{name} build", partial(_build, work, model, precision)
            if not work.dry and not _engine(work, model, precision).is_file():
                continue
            yield f"{name} parity", partial(_parity, work, model, precision)
            for batch in () if work.dry else work.batches:
                yield f"{name} batch {batch}", partial(_latency, work, model, precision, batch)


def _engine(work: Work, model: str, precision: Precision) -> Path:
    return work.engines(model, precision) / "whole.engine"


def _build(work: Work, model: str, precision: Precision) -> Record:
    """Write the one graph of a set's graphs, and build it."""
    import onnx

    from advmoe_deploy.export.graph.writer import write_model
    from benchmarks.gpu.experiments.whole_graph import whole_graph

    bundle, chosen = set_of(work, model, precision)
    target, file = _engine(work, model, precision), work.baseline(model, "whole", precision)
    target.unlink(missing_ok=True)
    graphs = {s.name: onnx.load_model(bundle.file(s.file)) for s in chosen.plan.segments}
    write_model(whole_graph(chosen.plan, graphs), file)
    return build_one(work, file, image_shapes(bundle), precision, target)


def _open(work: Work, model: str, precision: Precision) -> DeviceRunner:
    from benchmarks.gpu.experiments.whole_graph import WHOLE, whole_plan

    _, chosen = set_of(work, model, precision)
    graph = work.baseline(model, "whole", precision)
    return open_plan(work, model, whole_plan(chosen.plan), {WHOLE: graph}, precision)


def _parity(work: Work, model: str, precision: Precision) -> Record:
    """Compare on the test images, and one by one, where all experts but one get no row."""
    with _open(work, model, precision) as one, open_moe(work, model, precision) as many:
        images = images_of(work, model, 16)
        alone = np.concatenate([one.infer(images[i : i + 1]).logits for i in range(len(images))])
        difference = np.abs(alone - many.infer(images).logits).max()
        return {**compared(work, model, one), "max_abs_logit_diff_one_by_one": float(difference)}


def _latency(work: Work, model: str, precision: Precision, batch: int) -> Record:
    with ExitStack() as stack:
        runners = {
            "one engine": stack.enter_context(_open(work, model, precision)),
            "moe": stack.enter_context(open_moe(work, model, precision)),
        }
        for name in BASELINES:
            runners[name] = stack.enter_context(open_baseline(work, model, name, precision))
        return timed(work, runners, images_of(work, model, batch), bases=("dense", "moe"))
