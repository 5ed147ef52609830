"""Cautions: what a model may be without an error, and nobody wants; each a line with a way out."""

from collections.abc import Iterator, Mapping, Sequence

from advmoe_deploy.plan import effective_routes
from advmoe_deploy.reports import LatencyRatio, Macs, ParityReport

# Fewer effective routes than this are one expert and a few strays.
COLLAPSED = 1.1
# Of fewer rows, all may have gone to one expert by chance: of 16, an expert that gets a fifth of
# all images has none in three of a hundred cases.
FEWEST_ROWS = 16
# For where the settings of the training are not at hand; its own summary names their values.
_WAY_OUT = "train with even_loads=true (AdvMoE) or a balance_loss, or a dense network"
_NAMED = 3


def of_export(macs: Macs, parity: ParityReport) -> tuple[str, ...]:
    """Return what is to be said of an exported model, from what its manifest keeps."""
    loads = {layer.layer: layer.expert_load for layer in parity.layers}
    noise = (parity.data or "").startswith("random:")  # which tells nothing of images
    return (*of_costs(macs), *(() if noise else of_routes(loads)))


def of_costs(macs: Macs) -> tuple[str, ...]:
    """Return what is to be said of a network whose router takes more than it saves."""
    dense = f"; the dense network takes {macs.dense / 1e6:.2f} M"
    # Of experts as wide as the dense network nobody expects that they save anything.
    in_vain = macs.router > 0 and macs.s_dense < macs.dense <= macs.executed
    if macs.router > macs.selected:
        return (
            f"the router takes {macs.router / 1e6:.2f} M MACs per image, more than the pathway "
            f"that it chooses ({macs.selected / 1e6:.2f} M){dense if in_vain else ''}: train with "
            "a lower model.router_width",
        )
    if in_vain:
        return (
            f"router and pathway take {macs.executed / 1e6:.2f} M MACs per image{dense}: routing "
            "saves nothing; train with a lower model.ratio or model.router_width, or dense",
        )
    return ()


def of_routes(loads: Mapping[str, Sequence[int]], *, way_out: str = _WAY_OUT) -> tuple[str, ...]:
    """Return what is to be said of layers, with the rows of each expert, that use but one of them.

    Of fewer than 16 rows nothing is said: they may have gone to one expert by chance.
    """
    found = dict(_collapsed(loads))
    if not found:
        return ()
    names = ", ".join([*found][:_NAMED])
    names += f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    least = min(found.values())
    return (
        f"only one expert is in use in {names} ({least:.2f} effective routes): the others cost "
        f"memory and answer nothing; {way_out}",
    )


def _collapsed(loads: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, float]]:
    for layer, load in loads.items():
        if len(load) > 1 and sum(load) >= FEWEST_ROWS:
            routes = effective_routes(tuple(load))
            if routes < COLLAPSED:
                yield layer, routes


def of_latency(ratios: Sequence[LatencyRatio]) -> tuple[str, ...]:
    """Return what is to be said where a dense network is faster at every batch size, beyond chance.

    ``ratios`` are of the dense network's time over the model's; each engine is judged by itself,
    and only where the dense network ran on it as well.
    """
    lines = []
    alike = [ratio for ratio in ratios if ratio.a == "dense" and ratio.same_engine]
    for engine, precision in dict.fromkeys((r.engine, r.precision) for r in alike):
        own = [r for r in alike if (r.engine, r.precision) == (engine, precision)]
        if all(ratio.ci_high < 1 for ratio in own):
            times = ", ".join(f"{ratio.ratio:.2f} at {ratio.batch}" for ratio in own)
            lines.append(
                f"the dense network is faster than {engine} {precision} at every batch size that "
                f"was timed (its time over the model's: {times}): routing saves nothing here"
            )
    return tuple(lines)
