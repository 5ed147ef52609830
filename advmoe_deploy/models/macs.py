"""Multiply-accumulates per image, counted as executed; the router is never left out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.models.routing.routing import Execution, Routes, Routing, RoutingRule
from advmoe_deploy.reports import Macs
from advmoe_deploy.specs import ModelSpec

# The counter knows attention on every device but this one.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def macs_of(spec: ModelSpec) -> Macs:
    """Return the multiply-accumulates of the network ``spec`` describes and of its baselines.

    Counted are convolutions, linear layers, other matrix products and attention, each at its real
    size, on one image; ``selected`` is all that is not a router. Dropped experts count nowhere;
    gates count whole, for what an expert's score takes in their last layer is next to nothing.
    """
    model = build_model(spec)
    executed, router = count_macs(model, "grouped")
    return Macs(
        selected=executed - router,
        router=router,
        executed=executed,
        unfused=count_macs(model, "masked")[0] - _dropped(model, executed),
        dense=count_macs(build_model(spec.dense()))[0],
        s_dense=count_macs(build_model(spec.s_dense()))[0],
    )


def _dropped(model: Classifier, executed: int) -> int:
    """Return what the dropped experts would compute."""
    total = 0
    for rule in model.rules:
        if rule.dropped:
            others = _count(model, _MaskedAt(rule.layer))[0] - executed
            total += others * len(rule.dropped) // (rule.num_experts - rule.top_k)
    return total


class _MaskedAt(Routes):
    """Routes that compute every expert of one layer, and of the others those that are chosen."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def decide(self, rule: RoutingRule, gate: Callable[[Tensor], Tensor], x: Tensor) -> Routing:
        """Return the routing, and say how it is to be executed."""
        self.execution = "masked" if rule.layer == self.layer else "grouped"
        return super().decide(rule, gate, x)


def count_macs(model: Classifier, execution: Execution = "grouped") -> tuple[int, int]:
    """Return what ``model`` computes for one image, and how much of that its routers do.

    Grouped execution runs the chosen experts only, masked execution all of them.
    """
    return _count(model, Routes(execution=execution))


def _count(model: Classifier, routes: Routes) -> tuple[int, int]:
    parameter = next(model.parameters())
    image = torch.zeros(1, *model.spec.image_shape, dtype=parameter.dtype, device=parameter.device)
    was_training = model.training
    try:
        counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
        with counter, torch.no_grad():
            model.eval()(image, routes)
    finally:
        model.train(was_training)
    # One multiply-accumulate is two floating-point operations.
    return counter.get_total_flops() // 2, _of_routers(counter) // 2


def _of_routers(counter: FlopCounterMode) -> int:
    """Return the operations in modules called router or gate, none counted twice."""
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return sum(
        flops
        for name, flops in by_module.items()
        if is_router_parameter(name) and not is_router_parameter(name.rpartition(".")[0])
    )


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
