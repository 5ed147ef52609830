"""What ``main.py`` measured, against what it has to hold."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
_MODEL = "advmoe-resnet18"
_LOGITS = {"fp32": 1e-4, "fp16": 2e-2}
_ROUTES = 0.999
# Dense over MoE, in fp16: how many times faster the MoE is at least.
_FASTER = {1: 1 / 1.2, 64: 1.7, 256: 2.2}
# What choosing, sending rows and bringing them back may take.
_SHARE_AT_256, _MS_AT_1 = 0.15, 0.030


def bounds(measured: dict[str, Record]) -> list[Record]:
    """Return each bound with what was measured, where it was."""
    parity = [*_parity(_parts(measured, "parity")), *_parity(_ort_parity(measured))]
    return [*parity, *_speed(measured), *_routing(measured)]


def _ort_parity(measured: dict[str, Record]) -> Record:
    """Return what ONNX Runtime answers, which computes in fp32; TensorRT's provider in TF32."""
    parts = _parts(measured, "onnxruntime")
    exact = {n: part for n, part in parts.items() if n.endswith("-cuda parity")}
    return {f"{name.removesuffix(' parity')} fp32": part for name, part in exact.items()}


def _parts(measured: dict[str, Record], stage: str) -> Record:
    parts = measured.get(stage, {}).get("parts", {})
    return {name: part for name, part in parts.items() if "failed" not in part}


def _bound(what: str, value: float, limit: float, *, at_least: bool = False) -> Record:
    holds = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return {"what": what, "value": value, "bound": f"{sign}{limit:.4g}", "holds": holds}


def _parity(parts: Record) -> Iterator[Record]:
    for name, part in parts.items():
        precision = name.split()[-1]
        difference = part["max_relative_logit_diff_routed_alike"]
        yield _bound(f"{name}: logits, relative above 1", difference, _LOGITS[precision])
        for layer, route in part["routes"].items():
            what = f"{name}: routes of {layer}"
            yield _bound(what, route["agreement"], _ROUTES, at_least=True)


def _speed(measured: dict[str, Record]) -> Iterator[Record]:
    for batch, least in _FASTER.items():
        part = _parts(measured, "latency").get(f"{_MODEL} fp16 batch {batch}", {})
        for kind, clock in (("device_ratios", "on the GPU"), ("ratios", "from end to end")):
            if ratio := part.get(kind, {}).get("dense / moe"):
                what = f"fp16 batch {batch}: dense / moe, {clock}"
                yield _bound(what, ratio[0], least, at_least=True)


def _routing(measured: dict[str, Record]) -> Iterator[Record]:
    """Compare the MoE's time with its engines' own.

    Images come in and logits go out of a dense engine as well, so that much is no cost of routing:
    what the dense network takes beyond its engine. Experts run side by side: the longest counts.
    """
    for batch, limit in ((256, None), (1, _MS_AT_1)):
        whole = _parts(measured, "latency").get(f"{_MODEL} fp16 batch {batch}")
        parts = _parts(measured, "parts").get(f"{_MODEL} fp16 batch {batch}")
        if not whole or not parts:
            continue
        ms = {name: part["p50_ms"] for name, part in parts.items()}
        moe, dense = (whole["times"][name]["p50_ms"] for name in ("moe", "dense"))
        experts = [value for name, value in ms.items() if ".expert-" in name]
        rest = moe - ms["router"] - (dense - ms["dense"])
        routing = rest - max(experts)
        yield {"what": f"fp16 batch {batch}: router's engine, ms", "value": ms["router"]}
        follow = f"fp16 batch {batch}: routing if experts follow each other, ms"
        yield {"what": follow, "value": rest - sum(experts)}
        if limit is None:
            yield _bound("fp16 batch 256: routing / MoE", routing / moe, _SHARE_AT_256)
        else:
            yield _bound("fp16 batch 1: routing, ms", routing, limit)
