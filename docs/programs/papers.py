"""The tables of docs/papers.md that programs make; AdvMoE's MACs beside its paper's are here."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe_deploy.models.families.advmoe import AdvMoE
from advmoe_deploy.models.macs import count_macs
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.train.recipes import RECIPES
from advmoe_deploy.train.recipes.published import advmoe_cells
from docs.programs import claims

BEGIN, END = "<!-- MACs: 'make docs' writes these lines -->\n\n", "\n<!-- end of MACs -->"
# Of columns that cost the same one is shown: sparse as S-Dense, AT MoE as AdvMoE.
COLUMNS = ("dense", "s-dense", "advmoe")
_PER_VALUE = 3  # a BatchNorm scales and shifts, and a ReLU cuts off
HEAD = """\
| data | network | | paper | here | router | norms | the paper's figure is |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Cost:
    """Operations of one image: MACs without the router, the router's, and of BatchNorm and ReLU."""

    selected: int
    router: int
    norms: int


def cost_of(spec: ModelSpec) -> Cost:
    """Return what an image costs; on the meta device, where nothing is computed."""
    values: list[int] = []
    with torch.device("meta"):
        whole = build_model(spec).eval()
        path = build_model(spec.pathway()).eval() if isinstance(whole, AdvMoE) else whole
        for module in path.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda *of: values.append(of[-1].numel()))
        selected = count_macs(path)[0]
        router = _macs_of_router(whole) if isinstance(whole, AdvMoE) else 0
    return Cost(selected=selected, router=router, norms=_PER_VALUE * sum(values))


def _macs_of_router(model: AdvMoE) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.score(torch.zeros(1, *model.spec.image_shape))
    return counter.get_total_flops() // 2


def reason_of(paper: float, cost: Cost) -> str:
    """Return what the paper's figure counts: the first of these sums that it is, to its digits."""
    sums = {
        "the same": cost.selected,
        "with BatchNorm and ReLU": cost.selected + cost.norms,
        "with the router": cost.selected + cost.router,
        "with the router, BatchNorm and ReLU": cost.selected + cost.router + cost.norms,
    }
    for reason, count in sums.items():
        if _is(paper, count / 1e9):
            return reason
    return f"unexplained, {100 * (paper * 1e9 / cost.selected - 1):+.0f} %"


def _is(paper: float, count: float) -> bool:
    """Return whether ``paper`` is ``count``, rounded or cut off to the digits that it has."""
    unit = 10.0 ** -len(str(paper).partition(".")[2])
    return any(math.isclose(paper, f(count / unit) * unit) for f in (round, math.floor))


@cache
def macs_table() -> str:
    """Return a row for each cell of AdvMoE's tables that has a figure."""
    rows = []
    for (data, backbone, column), cell in advmoe_cells().items():
        if cell.giga_macs is None or column not in COLUMNS:
            continue
        cost = cost_of(RECIPES[f"{data}-{backbone}-{column}"].make().model)
        router = _giga(cost.router) if cost.router else ""
        rows.append(
            f"| {data} | {backbone} | {column} | {cell.giga_macs:g} | {_giga(cost.selected)} | "
            f"{router} | {_giga(cost.norms)} | {reason_of(cell.giga_macs, cost)} |\n"
        )
    return HEAD + "".join(rows)


def with_tables(page: str) -> str:
    """Return ``page`` with the tables of now between their marks."""
    page = _between(page, claims.BEGIN, claims.claims_table(), claims.END)
    return _between(page, BEGIN, macs_table(), END)


def _between(page: str, begin: str, table: str, end: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}{table}{end}{rest.split(end)[1]}"


def _giga(count: int) -> str:
    return f"{count / 1e9:.4f}"
