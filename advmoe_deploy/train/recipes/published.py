"""Published figures, cell by cell, to be set beside what we measure.

AdvMoE (Zhang et al., ICCV 2023, arXiv 2308.10110), Tables 1 and 2: means of three trials, RA under
PGD-50 at 8/255, the best epoch chosen on the test set; "MACs" of the selected path without the
router. Robust Experts (arXiv 2509.05086): CIFAR-100, PGD-20. RT-ER (arXiv 2502.06832): PGD-50.
"""

from typing import cast

from advmoe_deploy.families import Backbone
from advmoe_deploy.specs import Frozen


class Published(Frozen):
    """Accuracies in percent; ``giga_macs`` of the selected path, the router left out."""

    paper: str
    robust_accuracy: float
    clean_accuracy: float
    attack: str
    giga_macs: float | None = None


_ADVMOE = "AdvMoE, arXiv 2308.10110"
_EXPERTS = "Robust Experts, arXiv 2509.05086"
_DUAL = "RT-ER, arXiv 2502.06832"

# Columns: dense, s-dense, sparse, at-moe, advmoe; each RA / SA / GMACs.
_ADVMOE_TABLE = """
cifar10 resnet18           50.13/82.99/0.54  48.12/80.18/0.14  47.93/80.45/0.14  45.57/78.84/0.15  51.83/80.15/0.15
cifar10 wrn-28-10          51.75/83.54/5.25  50.66/82.24/1.31  48.95/82.44/1.31  46.73/77.42/1.75  55.73/84.32/1.75
cifar10 vgg16-bn           46.19/82.18/0.31  45.72/80.10/0.07  46.13/79.32/0.07  43.37/76.49/0.12  49.82/80.03/0.12
cifar10 densenet-bc        44.52/74.97/0.07  38.07/69.63/0.02  37.73/67.35/0.02  35.21/64.41/0.03  39.97/70.13/0.03
cifar100 resnet18          27.23/58.21/-     26.41/57.02/-     26.13/57.24/-     22.72/53.34/-     28.05/57.73/-
cifar100 wrn-28-10         27.90/57.60/-     26.30/56.80/-     25.83/57.39/-     22.94/53.39/-     28.82/57.56/-
cifar100 vgg16-bn          22.37/52.36/-     20.58/48.89/-     21.12/48.03/-     19.34/45.51/-     21.21/48.33/-
cifar100 densenet-bc       21.72/48.64/-     16.86/39.97/-     17.72/41.03/-     14.45/36.72/-     23.31/48.97/-
tiny-imagenet resnet18     38.17/53.81/2.23  36.29/52.15/0.55  36.11/50.75/0.55  34.41/47.73/0.75  39.99/53.31/0.75
tiny-imagenet wrn-28-10    38.82/55.30/21.0  37.09/54.83/5.26  37.32/54.32/5.26  33.31/49.91/7.44  40.15/55.18/7.44
imagenet resnet18          44.64/60.32/1.82  41.19/58.32/0.48  40.87/58.22/0.48  35.57/55.47/0.67  43.32/59.72/0.67
imagenet wrn-28-10         45.13/60.97/16.1  41.72/58.98/4.04  39.88/59.21/4.04  37.42/56.44/5.15  46.82/58.87/5.15
"""  # noqa: E501
ADVMOE_COLUMNS = ("dense", "s-dense", "sparse", "at-moe", "advmoe")


def advmoe_cells() -> dict[tuple[str, Backbone, str], Published]:
    """Return the cells of AdvMoE's tables by (data, backbone, column)."""
    cells: dict[tuple[str, Backbone, str], Published] = {}
    for line in _ADVMOE_TABLE.strip().splitlines():
        data, backbone, *figures = line.split()
        for column, text in zip(ADVMOE_COLUMNS, figures, strict=True):
            robust, clean, macs = text.split("/")
            cells[data, cast(Backbone, backbone), column] = Published(
                paper=_ADVMOE,
                robust_accuracy=float(robust),
                clean_accuracy=float(clean),
                attack="PGD-50, 8/255",
                giga_macs=None if macs == "-" else float(macs),
            )
    return cells


def experts_cell(clean: float, robust: float) -> Published:
    """Return a cell of Robust Experts: CIFAR-100, PGD training, PGD-20 at 8/255."""
    return Published(
        paper=_EXPERTS, robust_accuracy=robust, clean_accuracy=clean, attack="PGD-20, 8/255"
    )


def dual_cell(clean: float, robust: float) -> Published:
    """Return a cell of RT-ER: PGD-50 at 8/255. Two re-runs of their code found about half."""
    return Published(
        paper=_DUAL, robust_accuracy=robust, clean_accuracy=clean, attack="PGD-50, 8/255"
    )
