"""Tables of bundles and of what was measured on them; render.py draws them."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from advmoe_deploy.bundle import Bundle, EngineSet
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.errors import install_line
from advmoe_deploy.plan import RouteStep
from advmoe_deploy.pruning import Pruning
from advmoe_deploy.reports import (
    Pair,
    ParityReport,
)
from advmoe_deploy.reports.text import count_of
from advmoe_deploy.runtime.select import own_engine, resolved
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.verify.report import AttackOutcome, RobustReport


def export_report(bundle: Bundle) -> RenderableType:
    """Return where the bundle is and how close it is to the model."""
    size = sum(record.bytes for record in bundle.manifest.files.values())
    rows = [
        ("files", f"{len(bundle.manifest.files)}, {size / 1e6:.1f} MB"),
        *_pruning_rows(bundle.manifest.pruning),
        *_denormal_rows(bundle.manifest.denormal_weights),
        *_parity_rows(bundle.manifest.parity),
        *_engine_rows(bundle.manifest.engines),
    ]
    built = [each for each in bundle.manifest.engines if each.is_built]
    warnings = (escape(f"warning: {line}") for line in bundle.warnings)
    return Group(facts(str(bundle.path), rows), *warnings, escape(_next(bundle, built[:1])))


def _next(bundle: Bundle, engines: Sequence[EngineSet]) -> str:
    """Return the command that attacks the engines, and what it takes beyond what is here."""
    lacks = [] if find_spec("torch") else ["PyTorch"]
    lacks += ["a GPU they are compiled for"] * any(e.backend == "tensorrt-rtx" for e in engines)
    where = f", with {' and '.join(lacks)}" if lacks else ""
    own = resolved(bundle, own_engine(bundle))
    others = [each for each in engines if (each.backend, each.precision) != own]
    options = "".join(f" --engine {each.name}" for each in others)
    path, manifest = quote(str(bundle.path)), bundle.manifest
    if not manifest.data:
        return f"next: advmoe profile {path}; 'advmoe verify' needs --data: what it was trained on"
    radius = "" if manifest.threat else " --epsilon 8/255"
    return f"next{where}: advmoe verify {path}{options}{radius}"


def repository_report(out: Path, models: Sequence[str]) -> RenderableType:
    """Return where a model repository is, its models, and how a server is given it."""
    rows = [("whole", models[0]), ("routed by the server", models[1])]
    rows += [("asked by it", ", ".join(models[2:]))]
    hint = f"next, where Triton is: tritonserver --model-repository={quote(str(out))}"
    return Group(facts(str(out), rows), escape(hint))


def site_report(out: Path, shown: Mapping[str, Any], sizes: Mapping[str, int]) -> RenderableType:
    """Return where a page is, what is shown on it, its size, and how to look at it."""
    models = [f"{each['name']} ({sizes[each['file']] / 1e6:.1f} MB)" for each in shown["models"]]
    rows = [
        ("networks", ", ".join(models)),
        ("images", f"{len(shown['labels'])} of {shown['data']}; {shown['attack']}"),
        ("runtime", f"ONNX Runtime Web {shown['versions']['onnxruntime_web']}"),
        ("size", f"{sum(sizes.values()) / 1e6:.1f} MB"),
    ]
    hint = f"next: python -m http.server --bind 127.0.0.1 --directory {quote(str(out))}"
    return Group(facts(str(out), rows), escape(hint))


def manifests_report(out: Path, name: str, bundle: Bundle) -> RenderableType:
    """Return where manifests are, what of, and how a cluster is given them."""
    rows = [("service and model", name), ("bundle", f"SHA-256 {bundle.identity}")]
    hint = f"next, where the cluster is: kubectl apply -f {quote(str(out))}"
    return Group(facts(str(out), rows), escape(hint))


def robust_report(report: RobustReport) -> RenderableType:
    """Return accuracies of both sides, clean and as the attacks go on, and the verdict."""
    norm, epsilon = report.threat.norm, report.threat.epsilon
    table = FittedTable(
        f"{count_of(report.images, 'image')} of {report.data}, {norm} epsilon "
        f"{epsilon_text(epsilon)}; engine: {report.engine} {report.precision}",
        _OUTCOMES,
    )
    table.add_row("none (clean)", "", "", *_pair(report.clean_accuracy), "", "")
    _add_outcomes(table, report.attacks)
    table.add_row(
        "all of them", "", "", *_pair(report.robust_accuracy), "", f"{report.seconds:.1f}"
    )
    low, high = report.robust_interval
    engine = f"{escape(report.engine)}, {report.precision}{' with TF32' if report.tf32 else ''}"
    lines = [
        f"robust on {engine}: 95 % interval {percent(low)} to {percent(high)}; "
        f"{_agreement(report.parity)}; "
        f"largest logit difference {report.parity.max_abs_logit_diff:.2g}, "
        f"relative {report.parity.max_relative_logit_diff:.2g}",
        f"drop in robust accuracy: {report.robust_drop.figures()}",
        *([report.decided_by] if report.decided_by else []),
        *(f"warning: {line}" for line in report.warnings),
        *(f"{finding.kind}: {finding.message}" for finding in report.findings),
        robust_verdict(report),
    ]
    return Group(table, *map(escape, (_LEGEND, *lines)))


def _agreement(parity: ParityReport) -> str:
    if not parity.layers:
        return "nothing is routed"
    if not parity.clear_rows:
        return "routes cannot be compared, for all are close calls"
    return f"routes agree on {percent(parity.route_agreement)}"


def robust_verdict(report: RobustReport) -> str:
    """Return the verdict in a line; capitals where it is not that robustness survived."""
    limit = f"(limit: {report.max_drop:g} points)"
    if report.findings:
        return f"THE ENGINE ANSWERS OTHERWISE {limit}"
    if report.lost or (report.verdict == "failed" and not report.fragility):
        what, drop = "ROBUSTNESS WAS LOST", report.robust_drop
        if report.lost == "clean":
            what, drop = "ACCURACY WAS LOST", report.clean_drop
        counted = f": {drop.counted()}" if report.consistency.same_function else ""
        return f"{what}{counted} {limit}"
    return _of_reference(report) or (
        f"UNDECIDED: {count_of(report.images, 'image')} cannot tell {limit}"
        if report.verdict == "undecided"
        else f"robustness survived the export {limit}"
    )


def _of_reference(report: RobustReport) -> str:
    """Return the verdict where it is one on the reference; empty where it is on the engine."""
    unknown = report.reference is not None and report.reference.verdict == "undecided"
    images = count_of(report.images, "image")
    if report.fragility and not unknown:
        return "THE REFERENCE IS NOT ROBUST: there is nothing to preserve"
    if report.fragility:
        return f"UNDECIDED: {images} cannot tell whether the reference is robust"
    if report.verdict == "passed" and report.fragile and not unknown:
        return "nothing was lost, but the reference itself is not robust at this epsilon"
    if report.verdict == "passed" and not report.robust_accuracy.reference:
        return "nothing was lost, for nothing withstands these attacks, before or after the export"
    return ""


def attack_outcomes(outcomes: Sequence[AttackOutcome], engine: str) -> RenderableType:
    """Return accuracies of reference and engine under those attacks that ended."""
    table = FittedTable(f"unfinished; engine: {engine}", _OUTCOMES)
    _add_outcomes(table, outcomes)
    return table


_LEGEND = (
    "found on: whose answers were attacked, those of the reference (the trained model in PyTorch) "
    "or of the engine (what is shipped); images: those left to attack; flipped: attacked images "
    "that the engine sends to another expert, whether or not their class changed; attack: its "
    "name, its steps and its way, where it is not on the model as it runs: along fixed pathways, "
    "or on the soft form at a temperature; margin is its loss, else cross-entropy"
)
_OUTCOMES = ("attack", "found on", "images", "reference", "engine", "flipped", "seconds")


def _add_outcomes(table: FittedTable, outcomes: Iterable[AttackOutcome]) -> None:
    for outcome in outcomes:
        flips = outcome.route_flip_rate
        table.add_row(
            outcome.title,
            outcome.found_on,
            str(outcome.images),
            *_pair(outcome.robust_accuracy),
            "-" if flips is None else percent(flips),
            f"{outcome.seconds:.1f}",
        )


def bundle_contents(bundle: Bundle) -> RenderableType:
    """Return what a bundle says about itself."""
    manifest = bundle.manifest
    spec, macs, threat = manifest.model, manifest.macs, manifest.threat
    rows = [
        ("model", f"{spec.family} {spec.backbone}, {spec.num_experts} experts of {spec.ratio:g}"),
        ("images", "float32 " + " x ".join(map(str, spec.image_shape)) + " in [0, 1]"),
        ("classes", f"{len(manifest.class_names)}: {', '.join(manifest.class_names[:10])}"),
        ("runs on", " ".join(resolved(bundle, own_engine(bundle))) + ", unless told otherwise"),
        (
            "threat",
            f"{threat.norm} epsilon {epsilon_text(threat.epsilon)}" if threat else "none named",
        ),
        (
            "MACs per image",
            f"{macs.executed / 1e6:.2f} M (network {macs.selected / 1e6:.2f} + routers "
            f"{macs.router / 1e6:.2f}); unfused {macs.unfused / 1e6:.2f}, "
            f"dense {macs.dense / 1e6:.2f}",
        ),
        ("plan", f"{len(manifest.plan.segments)} segments, {len(manifest.plan.routes)} routes"),
        *((f"route {route.layer}", _route(route)) for route in manifest.plan.routes),
        *_pruning_rows(manifest.pruning),
        *_denormal_rows(manifest.denormal_weights),
        *_parity_rows(manifest.parity),
        *_engine_rows(manifest.engines),
        ("made", f"{manifest.created} by {manifest.producer}"),
    ]
    files = FittedTable("files", ("name", "bytes", "SHA-256"))
    for name, record in manifest.files.items():
        files.add_row(escape(name), str(record.bytes), record.sha256[:16])
    warnings = (escape(f"warning: {line}") for line in bundle.warnings)
    return Group(facts(f"{bundle.path}: every hash is as listed", rows), files, *warnings)


def _route(route: RouteStep) -> str:
    what = "image" if route.tokens is None else f"of {route.tokens} tokens"
    weights = {
        "one": "weight 1",
        "probability": "weighted by probability",
        "renormalised": "weights renormalised",
    }[route.weighting]
    experts = f"{len(route.kept)} experts"
    if route.experts is not None:
        left = ", ".join(map(str, route.experts))
        experts += f" ({left}, left of {route.num_experts})"
    return f"each {what} to {route.top_k} of {experts}, {weights}"


def doctor_report(value: Mapping[str, Any]) -> RenderableType:
    """Return what the machine has, package by package."""
    machine = [(key, str(value[key])) for key in ("advmoe", "python", "platform", "cpu", "cpus")]
    packages = [
        (name, found["version"] or f"missing: {install_line(found['extra'])}")
        for name, found in value["packages"].items()
    ]
    custom_ops = value["custom_ops"]
    running = [
        *((name, version or "not installed") for name, version in value["engines"].items()),
        ("custom operators", f"{custom_ops['form'] or 'none'}: {custom_ops['reason']}"),
        ("their library", custom_ops["library"] or "none"),
        ("C compiler", value["compiler"] or "none"),
    ]
    gpu = [
        (name, part["found"] or f"missing: {part['missing']}")
        for name, part in value["gpu"].items()
    ]
    return Group(
        facts("machine", machine),
        facts("engines", running),
        facts("the way to a GPU", gpu),
        facts("packages", packages),
    )


def _denormal_rows(count: int) -> list[tuple[str, str]]:
    return [("denormal weights", f"{count:,}, written as zeros")] if count else []


def _pruning_rows(pruning: Pruning | None) -> list[tuple[str, str]]:
    lines = pruning.findings() if pruning else []
    return [("" if number else "experts left out", line) for number, line in enumerate(lines)]


def _parity_rows(parity: ParityReport) -> list[tuple[str, str]]:
    noise = (parity.data or "").startswith("random:")
    whose = "of this noise" if noise else "of these images"
    return [
        (
            f"logits, {count_of(parity.images, 'image')}",
            f"differ by {parity.max_abs_logit_diff:.2g} at most, relative to logits above 1 by "
            f"{parity.max_relative_logit_diff:.2g}, limit {parity.logit_tolerance:g}",
        ),
        (
            "routes",
            f"{percent(parity.route_agreement)} agree; "
            f"{count_of(parity.close_calls, 'close call')}, {parity.close_flips} of them flipped"
            if parity.layers
            else "none",
        ),
        *(
            (f"experts of {layer.layer}", f"got {', '.join(map(str, layer.expert_load))} {whose}")
            for layer in parity.layers
        ),
    ]


def _engine_rows(engines: Iterable[EngineSet]) -> list[tuple[str, str]]:
    return [
        ("" if number else _engine_name(each), line)
        for each in engines
        for number, line in enumerate(each.findings())
    ]


def _engine_name(engines: EngineSet) -> str:
    return f"engine {engines.name}" if engines.is_built else f"graphs for {engines.name}"


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and what they are."""
    table = Table(
        title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False
    )
    for name, text in rows:
        table.add_row(f"  {escape(name)}", escape(text))
    return table


def _pair(pair: Pair) -> tuple[str, str]:
    return percent(pair.reference), percent(pair.engine)
