"""Page that runs a bundle's model in the browser: a folder that any web server can serve.

index.html, *.js, style.css   the page, nobody else's code
ort/                          ONNX Runtime Web, pinned by hash
model.onnx, dense.onnx, ...   the model, and what it is timed against
site.json                     what the page says of them
samples.bin                   test images, clean and attacked: float32 [S, A, C, H, W]
expected.json                 what the bundle's own runner answers to them, natively
SHA256SUMS                    for ``sha256sum --check``
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe_deploy import __version__
from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.export.web.graph import browser_graph, scores_in
from advmoe_deploy.export.web.runtime import RELEASE, Release, runtime_files
from advmoe_deploy.export.web.samples import Samples, attacked_samples
from advmoe_deploy.files import refuse_existing, staged_directory, write_sums
from advmoe_deploy.parity.compare import predictions_of
from advmoe_deploy.plan import Plan
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.runtime.onnxruntime.engine import onnxruntime_version
from advmoe_deploy.runtime.select import open_runner

FACTS = "site.json"
_PAGE = Path(__file__).parent / "page"
# Baselines that are networks of their own.
_BASELINES = ("dense", "s-dense")


@dataclass(frozen=True)
class Site:
    """Facts that a written page shows, and the size in bytes of each file."""

    path: Path
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]


def write_site(
    bundle: Bundle,
    out: Path,
    *,
    data: str | None = None,
    class_map: Mapping[str, str] | None = None,
    images: int = 20,
    epsilon: float | None = None,
    runtime: Path | None = None,
    release: Release = RELEASE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Site:
    """Write a page for ``bundle`` to the folder ``out``.

    Args:
        bundle: an opened, so verified, bundle with its reference weights.
        out: the folder to be.
        data: a data source; by default the one the model was trained on.
        class_map: the model's name of classes that ``data`` calls otherwise.
        images: how many test images go with the page.
        epsilon: an l-inf radius in [0, 1] pixels; by default the one the model was trained for.
        runtime: npm's package of ONNX Runtime Web, a tarball or a folder; by default npm fetches
            it.
        release: which one.
        overwrite: replace an ``out`` that is such a page already.
        progress: who listens.

    Raises:
        UsageError: ``out`` is in the way, or the data do not fit.
        InputError: the bundle or ``runtime`` is not what it should be.
        CheckFailedError: the graph for browsers answers otherwise than the model.
        BackendUnavailableError: npm is needed and not installed.
        MachineError: npm cannot fetch the package.
    """
    refuse_existing(out, overwrite=overwrite, marker=FACTS)
    models = _models(bundle)
    files = {f"ort/{name}": file for name, file in runtime_files(runtime, release).items()}
    samples = attacked_samples(
        bundle, images, progress or Silent(), data=data, class_map=class_map, epsilon=epsilon
    )
    facts = _facts(bundle, models, samples, release)
    files |= models | _page()
    files |= {"samples.bin": samples.images_SACHW.astype("<f4").tobytes()}
    files |= {FACTS: _json(facts), "expected.json": _json(_expected(bundle, samples))}
    with staged_directory(out, overwrite=overwrite) as staged:
        for name, content in files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(content)
        write_sums(staged)
    return Site(out, facts, {name: len(content) for name, content in files.items()})


def _page() -> dict[str, bytes]:
    files = [file for file in _PAGE.rglob("*") if file.is_file()]
    return {file.relative_to(_PAGE).as_posix(): file.read_bytes() for file in files}


def _models(bundle: Bundle) -> dict[str, bytes]:
    """Return the graphs by file name, the model's first."""
    models = {MODEL: browser_graph(bundle)}
    for name in _BASELINES:
        if bundle.manifest.plan.routes and bundle.has(f"baselines/{name}.onnx"):
            models[f"{name}.onnx"] = bundle.graph(f"baselines/{name}.onnx").read()
    return models


def _facts(
    bundle: Bundle, models: Mapping[str, bytes], samples: Samples, release: Release
) -> dict[str, Any]:
    manifest = bundle.manifest
    spec = manifest.model
    return {
        "family": spec.family,
        "backbone": spec.backbone,
        "classes": manifest.class_names,
        "shape": spec.image_shape,
        "labels": samples.labels_S.tolist(),
        "epsilons": samples.epsilons_A,
        "attack": samples.attack,
        "data": samples.source,
        "routes": _routes(manifest.plan, scores_in(models[MODEL], manifest.plan)),
        "models": [_model(bundle, file) for file in models],
        "bundle": bundle.identity,
        "versions": {
            "advmoe_deploy": __version__,
            "onnxruntime": onnxruntime_version(),
            "onnxruntime_web": release.version,
        },
    }


def _routes(plan: Plan, scores: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "layer": route.layer,
            "experts": route.kept,
            "tokens": route.tokens,
            "scores": route.scores if route.scores in scores else None,
        }
        for route in plan.routes
    ]


def _model(bundle: Bundle, file: str) -> dict[str, Any]:
    macs, own = bundle.manifest.macs, "MoE" if bundle.manifest.plan.routes else "dense"
    cost = {MODEL: macs.executed, "dense.onnx": macs.dense, "s-dense.onnx": macs.s_dense}
    name = own if file == MODEL else file.removesuffix(".onnx")
    return {"name": name, "file": file, "macs": cost[file]}


def _expected(bundle: Bundle, samples: Samples) -> dict[str, Any]:
    """Return the native logits [N, classes] and expert ids [N, ...] of all samples, S by A."""
    images_NCHW = samples.images_SACHW.reshape(-1, *samples.images_SACHW.shape[2:])
    with open_runner(bundle, "onnxruntime:fp32") as runner:
        answer = predictions_of(runner, images_NCHW)
    ids = {layer: ids.reshape(len(ids), -1).tolist() for layer, ids in answer.expert_ids.items()}
    return {"logits": answer.logits.tolist(), "expert_ids": ids}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode("ascii")
