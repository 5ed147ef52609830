"""Write docs/measured/cifar10.md: what recipes for CPUs reach, beside the papers' table.

    python -m benchmarks.training.results_page

A recipe's row is ``benchmarks/results/cifar10/NAME.json``, by ``benchmarks.training.cifar10``;
before that is measured, ``NAME.train.json``, what its run said of its own test images. Without
either it is "not trained".
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.files import write_atomically
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.parity.intervals import paired_difference_interval
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.train.recipes import RECIPES, recipe
from advmoe_deploy.zoo.record import Share
from benchmarks.training.cifar10 import AUTOATTACK, PGD, Flags, flags_of, key_of

HERE = Path(__file__).parents[1]
RESULTS, PAGE = HERE / "results" / "cifar10", HERE.parent / "docs/measured/cifar10.md"
OURS, S_DENSE, DENSE = "cifar10-advmoe-cpu", "cifar10-s-dense-cpu", "cifar10-dense-cpu"
ROWS = {
    OURS: "AdvMoE, experts that agree",
    "cifar10-at-moe-cpu": "AT MoE",
    S_DENSE: "S-Dense",
    DENSE: "dense",
}
# Attacks by which twins are compared image by image; without any, by all that each of them saw.
COMPARED: dict[str, Sequence[AttackSpec]] = {
    "PGD-50": [PGD],
    "AutoAttack": AUTOATTACK,
    "all attacks": [],
}
COLUMNS = ("clean", "pgd_50", "autoattack", "robust")
HEAD = """\
# What was reached

CIFAR-10, ResNet-18 at 32x32, N = 2, ratio 0.5, l-inf 8/255: [one schedule](../training.md) of hours
on two CPU cores. The checkpoint is chosen on a hold-out. Clean accuracy is of all {test} test
images (of 10,000; the copy that was measured lacks {missing}), the rest of the first n. AutoAttack
is the standard four, on the model as it runs; *worst* is what stands, image by image, after PGD-50,
AutoAttack and the attacks on routes of `verify --attacks standard`. 95 % intervals. Other work held
up the training of dense.
{raw}[Program](../../benchmarks/training/cifar10.py), and
[of this page](../../benchmarks/training/results_page.py).

| | clean | PGD-50 | AutoAttack | worst | n | routes in use | MACs | trained in |
|---|---|---|---|---|---|---|---|---|
"""
PUBLISHED = """
For comparison, AdvMoE's paper after 100 epochs of TRADES on GPUs; its MACs leave the router out:

| | PGD-50 | clean | MACs |
|---|---|---|---|
| AdvMoE | 51.83 | 80.15 | 0.15 G |
| AT MoE | 45.57 | 78.84 | 0.15 G |
| S-Dense | 48.12 | 80.18 | 0.14 G |
| dense | 50.13 | 82.99 | 0.54 G |
"""


GOALS = """
Aims of `cifar10-advmoe-cpu`, set before it was trained:

| aim | reached | |
|---|---|---|
"""


def goals(found: dict[str, Any]) -> str:
    """Return what the MoE was to reach, what it did, and whether that is known to be enough."""
    clean, worst = (100 * found[column]["share"] for column in ("clean", "robust"))
    auto = 100 * found["autoattack_so_far"]["share"]
    n, used = found["robust"]["n"], found["routes"]["clean"]
    attacked, ended = found["autoattack"] is not None, not found["attacks_left"]
    at_most, so_far = "" if attacked else "at most ", "" if ended else " so far"
    rows = [
        ("clean at least 72 %", f"{clean:.1f} %", verdict(clean >= 72)),
        ("at least 1.7 routes in use", f"{used:.2f}", verdict(used >= 1.7)),
        (
            "AutoAttack leaves at least 38 % of 1,000",
            f"{at_most}{auto:.1f} % of {n:,}",
            # Every attack takes from it: once below, it stays so.
            verdict(auto >= 38, known=(attacked and n >= 1000) or auto < 38),
        ),
        (
            "attacks on routes as well: at most 3 points fewer",
            f"{auto - worst:.1f} points{so_far}",
            verdict(auto - worst <= 3, known=ended),
        ),
    ]
    rows += [row for each in COMPARED.items() if (row := beside_s_dense(*each)) is not None]
    return GOALS + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n" + beside_dense()


def beside_s_dense(title: str, attacks: Sequence[AttackSpec]) -> tuple[str, str, str] | None:
    """Return how the MoE compares with S-Dense, image by image, if both were attacked."""
    if (found := difference(S_DENSE, attacks)) is None:
        return None
    told, high, n = found
    aim = f"under {title} level with S-Dense, or ahead, within the interval"
    return aim, told, verdict(high >= 0, known=n >= 1000)


def beside_dense() -> str:
    """Return how the MoE compares with the dense network, image by image, as far as is known."""
    told = [
        f"under {title} {found[0]}"
        for title, attacks in COMPARED.items()
        if (found := difference(DENSE, attacks)) is not None
    ]
    return f"\nAdvMoE less dense, image by image: {'; '.join(told)}.\n" if told else ""


def difference(theirs: str, attacks: Sequence[AttackSpec]) -> tuple[str, float, int] | None:
    """Return what the MoE keeps more than ``theirs``, in words, its upper end, and of how many."""
    ours_N, theirs_N = (
        stands(RESULTS / f"{name}.attacked.json", attacks) for name in (OURS, theirs)
    )
    if ours_N is None or theirs_N is None:
        return None
    n = min(len(ours_N), len(theirs_N))
    ours_N, theirs_N = ours_N[:n], theirs_N[:n]
    only = int((ours_N & ~theirs_N).sum()), int((theirs_N & ~ours_N).sum())
    low, high = (100 * end for end in paired_difference_interval(*only, n))
    told = f"{100 * (only[0] - only[1]) / n:+.1f} points ({low:+.1f} to {high:+.1f}) of {n:,}"
    return told, high, n


def stands(path: Path, attacks: Sequence[AttackSpec]) -> Flags | None:
    """Return which images are right and stand after ``attacks``, or all of them, once all ran."""
    kept = json.loads(path.read_text()) if path.exists() else {"standing": {}}
    needed = {key_of(attack) for attack in attacks or (PGD, *AUTOATTACK)}
    if not needed <= kept["standing"].keys():
        return None
    flags = [flags_of(kept["standing"][key]) for key in (needed if attacks else kept["standing"])]
    if len({len(each) for each in flags}) > 1:
        return None
    clean_N = flags_of(kept["clean"])[: len(flags[0])]
    standing_N: Flags = np.logical_and.reduce([clean_N, *flags])
    return standing_N


def verdict(held: bool, *, known: bool = True) -> str:
    """Return a word for an aim."""
    return ("reached" if held else "**missed**") if known else "open"


def row(name: str, title: str) -> str:
    """Return one row of the table, of a recipe that was trained or not."""
    macs = f"{macs_of(recipe(name).model).executed / 1e9:.3f} G"
    path = RESULTS / f"{name}.json"
    if not path.exists() and path.with_suffix(".train.json").exists():
        return provisional(json.loads(path.with_suffix(".train.json").read_text()), title, macs)
    if not path.exists():
        return f"| {title} | not trained | | | | | | {macs} | |"
    (found,) = json.loads(path.read_text())["rows"]
    routes = f"{found['routes']['clean']:.2f} of 2" if "routes" in found else ""
    trained_s = found["train_seconds"]  # a model of the zoo has lost it
    seconds = f"{trained_s / 60:.0f} min" if trained_s else ""
    cells = " | ".join(cell(found, column) for column in COLUMNS)
    return f"| {title} | {cells} | {found['robust']['n']} | {routes} | {macs} | {seconds} |"


def cell(found: dict[str, Any], column: str) -> str:
    """Return a share; of an AutoAttack that is not done, what its first attacks left."""
    if column == "robust" and found["attacks_left"]:
        return f"at most {share(found[column])}, {len(found['attacks_left'])} attacks to come"
    if found[column] is not None:
        return share(found[column])
    so_far = found["autoattack_so_far"]
    if not so_far["by"]:
        return "not measured"
    return f"at most {share(so_far)}, by {' and '.join(so_far['by'])}"


def provisional(report: dict[str, Any], title: str, macs: str) -> str:
    """Return the row of a run of which only its own measurement is known."""
    n, steps = report["images"], report["attack"]["steps"]
    names = ("clean_accuracy", "pgd_accuracy", "robust_accuracy")
    clean, pgd, routes = (percent(Share.of(report[name], n)) for name in names)
    used = f"{report['effective_routes']:.2f} of 2" if report["effective_routes"] else ""
    by = ", on its routes too" if used else ""
    worst = f"{routes}, PGD-{steps}{by}"
    cells = f"{clean}, of n | {pgd} | not measured | {worst}"
    return f"| {title} | {cells} | {n} | {used} | {macs} | {report['seconds'] / 60:.0f} min |"


def share(measured: dict[str, Any]) -> str:
    """Return a share of a row in percent, with its interval."""
    return percent(Share.of(measured["share"], measured["n"]))


def percent(share: Share) -> str:
    """Return a share in percent, with its interval."""
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def main() -> None:
    """Write the page."""
    assert set(ROWS) <= set(RECIPES)
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    test = max((each["rows"][0]["test_images"] for each in found if "rows" in each), default=9975)
    raw = "[Raw](../../benchmarks/results/cifar10). " if found else ""
    head = HEAD.format(test=f"{test:,}", missing=10_000 - test, raw=raw)
    rows = "\n".join(row(name, title) for name, title in ROWS.items())
    aims = ""
    if (ours := RESULTS / f"{OURS}.json").exists():
        aims = goals(json.loads(ours.read_text())["rows"][0])
    write_atomically(PAGE, f"{head}{rows}\n{aims}{PUBLISHED}".encode())


if __name__ == "__main__":
    main()
