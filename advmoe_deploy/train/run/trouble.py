"""Ways in which a run fails without an error, told while it still runs, or before it begins."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.reports.cautions import COLLAPSED, of_costs, of_routes
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.run.report import EpochRecord

# Attacks of one step, whose models may learn to defeat that step alone.
_SINGLE_STEP = ("n-fgsm", "fast", "free")


def costly(config: TrainConfig) -> tuple[str, ...]:
    """Return what is to be said of a network that costs more than its router saves."""
    if config.model.num_experts == 1:
        return ()
    with torch.random.fork_rng(devices=[]):  # which networks are initialised from
        return of_costs(macs_of(config.model))


def trouble(
    config: TrainConfig, before: Sequence[EpochRecord], record: EpochRecord
) -> Iterator[str]:
    """Yield a line for each kind of trouble that begins with the epoch of ``record``.

    Catastrophic overfitting (Wong et al., ICLR 2020): from one epoch to the next, PGD breaks what
    it did not. Collapse: a router sends nearly all images to one expert. ``before`` are the
    epochs so far.
    """
    measured = [r for r in before if r.pgd_accuracy is not None]
    if record.pgd_accuracy is None:
        return
    best = max(measured, key=lambda r: r.pgd_accuracy or 0.0, default=None)
    if config.loss in _SINGLE_STEP and best is not None and _fell(best, measured[-1], record):
        yield (
            f"epoch {record.epoch}: catastrophic overfitting, PGD leaves "
            f"{100 * record.pgd_accuracy:.1f} % where epoch {best.epoch} kept "
            f"{100 * (best.pgd_accuracy or 0):.1f} %; the best epoch is kept, and more epochs will "
            "hardly help: train again with loss=pgd-at, or with a higher nfgsm_noise"
        )
    if _collapsed(record) and not (measured and _collapsed(measured[-1])):
        yield (
            f"epoch {record.epoch}: the router sends nearly all images to one expert "
            f"({record.effective_routes:.2f} of {config.model.num_experts} routes in use); it may "
            "recover, and the model that is kept is judged at the end"
        )


def unused(
    config: TrainConfig, *loads: Mapping[str, Sequence[int]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is to be said of a model that uses but one expert, and settings that mend it.

    It is judged by all ``loads`` together, each the rows of every expert by routed layer.
    """
    summed: Counter[tuple[str, int]] = Counter()
    for load in loads:
        summed.update({(layer, e): n for layer, row in load.items() for e, n in enumerate(row)})
    pooled = {layer: [summed[layer, e] for e in range(len(row))] for layer, row in loads[0].items()}
    lines = of_routes(pooled, way_out=f"train {_otherwise(config)}, or a dense network")
    return lines, ("even_loads=true",) if lines and _could_be_even(config) else ()


def _otherwise(config: TrainConfig) -> str:
    """Return how to train instead, by settings that act in a run of ``config``."""
    if _could_be_even(config):
        return "with even_loads=true (now false)"
    if config.method == "experts-only":
        return "the router as well, with method=joint (now experts-only)"
    if config.method == "advmoe-released":  # which has no term for even loads
        return "with method=advmoe and even_loads=true (now advmoe-released)"
    layers = config.model.expert_layers
    if layers is not None and layers.gate.startswith("fixed"):
        return f"with a model.expert_layers.gate that learns (now {layers.gate})"
    balance = f"higher balance_weight (now {config.balance_weight:g})"
    if config.balance_loss is None:  # without which the weight does nothing
        balance = "balance_loss such as switch (now null)"
    return f"with a {balance} or a lower router_lr (now {config.router_lr:g})"


def _could_be_even(config: TrainConfig) -> bool:
    learns = config.method in ("advmoe", "joint", "router-only")
    return config.model.family == "advmoe" and learns and not config.even_loads


def _fell(best: EpochRecord, last: EpochRecord, record: EpochRecord) -> bool:
    """Return whether ``record`` keeps under half of the best, and the epoch before it did not."""
    half = (best.pgd_accuracy or 0.0) / 2
    return (record.pgd_accuracy or 0.0) < half <= (last.pgd_accuracy or 0.0)


def _collapsed(record: EpochRecord) -> bool:
    return record.effective_routes is not None and record.effective_routes < COLLAPSED
