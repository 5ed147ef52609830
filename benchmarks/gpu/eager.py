"""The stages of ``main.py`` that need PyTorch."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from advmoe_deploy.runtime.select import ENGINES
from benchmarks.gpu.common import BATCH, MODELS, Part, Record, Work, ratios_to, summary
from benchmarks.gpu.engines import images_of
from benchmarks.gpu.remote import RemoteRunner, build_remotely

_FITTING = 256
_VERIFIED = 1000
_EXPORTED_ON = "random:128"


def export(work: Work) -> Iterator[Part]:
    """Write each model's bundle, with the graphs that TensorRT builds, and its baselines'."""
    for model in work.models:
        yield model, partial(_export, work, model)


def _export(work: Work, model: str) -> Record:
    import onnx
    import torch

    from advmoe_deploy.export.from_run import export_run
    from advmoe_deploy.export.graph.writer import write_model
    from advmoe_deploy.export.precision.casts import lowered
    from advmoe_deploy.export.targets import Target
    from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
    from advmoe_deploy.models.untrained import untrained_model
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions

    spec, run = MODELS[model], work.folder / model / "run"
    pixels, _ = _test_images(work, _FITTING)
    (run / "model").mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(
        model=spec,
        threat=None,
        class_names=tuple(str(label) for label in range(spec.num_classes)),
        recipe={},
        metrics={},
        provenance={"data": _EXPORTED_ON},
    )
    save_checkpoint(run / "model", checkpoint, untrained_model(spec, torch.from_numpy(pixels)))
    options = BuildOptions(batch=BATCH)
    targets = [Target("tensorrt", p, onnx_only=True, build=options) for p in work.precisions]
    bundle = export_run(run, work.bundle(model), overwrite=True, targets=targets)
    for name in ("dense", "unfused"):
        graph = onnx.load_model(bundle.file(f"baselines/{name}.onnx"))
        for precision in work.precisions:
            routes = bundle.manifest.plan.routes if name == "unfused" else ()
            file = work.baseline(model, name, precision)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_model(lowered(graph, precision, routes), file)
    return {
        "macs": bundle.manifest.macs.model_dump(),
        "parity": bundle.manifest.parity.model_dump(mode="json"),
        "sets": [
            {"precision": each.precision, "segments": each.segments, "findings": each.findings()}
            for each in bundle.manifest.engines
        ],
    }


def _test_images(work: Work, count: int) -> tuple[np.ndarray, np.ndarray]:
    from advmoe_deploy.data.dataset import to_float

    split = _test_split(work.data)
    return to_float(split.images[:count]), split.labels[:count]


@cache
def _test_split(data: str) -> Any:
    """Return the test split; decoding takes its time."""
    from advmoe_deploy.data.registry import load_test_split

    return load_test_split(data)


def reference(work: Work) -> Iterator[Part]:
    """Keep torch's answers to the test images, on the CPU: in float32, no TF32."""
    for model in work.models:
        yield model, partial(_reference, work, model)


def _reference(work: Work, model: str) -> Record:
    from advmoe_deploy.bundle import open_bundle
    from advmoe_deploy.models.stored import reference_model
    from advmoe_deploy.parity.reference import reference_answers

    pixels, labels = _test_images(work, work.images)
    answers = reference_answers(reference_model(open_bundle(work.bundle(model))), pixels)
    # A quarter of the size, and as exact.
    as_bytes = np.rint(pixels * 255).astype(np.uint8)
    arrays = {"images": as_bytes, "labels": labels, "logits": answers.logits}
    for layer, routing in answers.routes.items():
        arrays[f"{layer}.expert_ids"] = routing.expert_ids
        arrays[f"{layer}.margins"] = routing.margins
    np.savez_compressed(work.reference(model), **arrays)
    return {
        "images": len(pixels),
        "loads": {
            layer: np.bincount(routing.expert_ids.reshape(-1)).tolist()
            for layer, routing in answers.routes.items()
        },
    }


def eager(work: Work) -> Iterator[Part]:
    """Time the papers' masked layer, the grouped one and the dense network in torch."""
    yield from _rows(work, with_compiled=False)


def compiled(work: Work) -> Iterator[Part]:
    """Time them beside what ``torch.compile`` makes of them, which takes its time."""
    yield from _rows(work, with_compiled=True)


def _rows(work: Work, *, with_compiled: bool) -> Iterator[Part]:
    for model in work.models:
        for precision in work.precisions:
            for batch in work.batches:
                name = f"{model} {precision} batch {batch}"
                row = partial(_torch_row, work, model, precision, batch)
                yield name, partial(row, with_compiled=with_compiled)


def _torch_row(
    work: Work, model: str, precision: str, batch: int, *, with_compiled: bool
) -> Record:
    import torch

    from advmoe_deploy.bundle import open_bundle
    from advmoe_deploy.models.routing.routing import Routes
    from advmoe_deploy.models.stored import reference_model
    from advmoe_deploy.models.untrained import untrained_model
    from advmoe_deploy.profiling.timing import time_interleaved

    torch.compiler.reset()  # what was compiled for other models would count, up to a limit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dtype = torch.float16 if precision == "fp16" else torch.float32
    pixels = torch.from_numpy(images_of(work, model, batch))
    fitting = torch.from_numpy(images_of(work, model, _FITTING))
    moe = reference_model(open_bundle(work.bundle(model))).to("cuda", dtype)
    dense = untrained_model(MODELS[model].dense(), fitting).to("cuda", dtype)
    masked = Routes(execution="masked")
    forms: dict[str, Callable[[Any], Any]] = {
        "masked": lambda x: moe(x, masked),
        "grouped": moe,
        "dense": dense,
    }
    if with_compiled:
        forms["masked compiled"] = torch.compile(forms["masked"])
        forms["dense compiled"] = torch.compile(dense)
    forms = {
        name: form
        for name, form in forms.items()
        if not isinstance(_tried(form, pixels, dtype), Exception)
    }

    def call(form: Callable[[Any], Any]) -> Callable[[], object]:
        return lambda: form(pixels.to("cuda", dtype)).float().cpu()

    with torch.inference_mode():
        calls = {name: call(form) for name, form in forms.items()}
        times = time_interleaved(calls, warmup=5, budget_s=work.seconds)
    return {"device": torch.cuda.get_device_name(), **_row(times, "dense")}


def _tried(form: Callable[[Any], Any], pixels: Any, dtype: Any) -> Exception | None:
    import torch

    try:
        with torch.inference_mode():
            form(pixels.to("cuda", dtype))
    except Exception as error:
        print(f"  left out: {' '.join(str(error).split())[:300]}", flush=True)
        return error
    return None


def _row(times: dict[str, np.ndarray], base: str) -> Record:
    return {"times": summary(times), "ratios": ratios_to(times, base) if base in times else {}}


def router_kernel(work: Work) -> Iterator[Part]:
    """Check the router's Triton kernel on the GPU, and time it against torch's operators."""
    for experts, top_k in ((2, 1), (8, 2)):
        yield f"{experts} experts, top {top_k}", partial(_router_kernel, work, experts, top_k)


def _router_kernel(work: Work, experts: int, top_k: int) -> Record:
    import torch

    from advmoe_deploy.plan import RouteStep
    from advmoe_deploy.profiling.timing import time_interleaved
    from advmoe_deploy.runtime.routing import route
    from benchmarks.gpu.experiments.router_triton import route_rows

    scores = np.random.default_rng(0).normal(0, 3, (256, experts)).astype(np.float32)
    step = RouteStep(
        layer="l", scores="s", num_experts=experts, top_k=top_k, weighting="probability"
    )
    there = torch.from_numpy(scores).cuda()
    ids, weights = route_rows(there, top_k, "probability")
    expected = route(step, scores)
    difference = np.abs(weights.cpu().numpy() - expected["l.weights"]).max()

    def native() -> None:
        torch.topk(torch.softmax(there, dim=1), top_k)
        torch.cuda.synchronize()

    def kernel() -> None:
        route_rows(there, top_k, "probability")
        torch.cuda.synchronize()

    times = time_interleaved({"triton": kernel, "torch": native}, budget_s=work.seconds)
    return {
        "ids_agree": bool((ids.cpu().numpy() == expected["l.expert_ids"]).all()),
        "max_abs_weight_diff": float(difference),
        **_row(times, "torch"),
    }


def verify(work: Work) -> Iterator[Part]:
    """Run the quick attacks against the fp16 engine of a trained model, built and examined here."""
    yield "fp16", partial(_verify, work)


def _verify(work: Work) -> Record:
    from advmoe_deploy.errors import UsageError
    from advmoe_deploy.export.from_run import export_run
    from advmoe_deploy.export.targets import Target
    from advmoe_deploy.runtime.tensorrt.build import BuildOptions
    from advmoe_deploy.verify.verify import verify_bundle

    if work.trained is None:
        raise UsageError("robustness is verified on a trained model; give --trained RUN")
    elsewhere = work.tensorrt_python is not None
    target = Target("tensorrt", "fp16", onnx_only=elsewhere, build=BuildOptions(batch=BATCH))
    bundle = export_run(
        work.trained, work.folder / "trained", data=work.data, overwrite=True, targets=[target]
    )
    if work.tensorrt_python is not None:
        bundle = build_remotely(work.tensorrt_python, bundle.path, work.folder / "trained-trt")
        ENGINES["tensorrt"] = lambda bundle, precision, _: RemoteRunner(
            str(work.tensorrt_python), bundle, "tensorrt", precision
        )
    images = min(_VERIFIED, work.images)
    report = verify_bundle(bundle, engine="tensorrt:fp16", data=work.data, images=images)
    return report.model_dump(mode="json")
