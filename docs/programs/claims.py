"""What ``benchmarks.training.claims`` found of the papers' claims: a part of docs/papers.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "claims.json"
BEGIN, END = "<!-- claims: 'make docs' writes these lines -->\n\n", "\n<!-- end of claims -->"
HEAD = """\
| claim | paper | figures, of three seeds | difference | over seeds | over images | so it is |
|---|---|---|---|---|---|---|
"""


def claims_table() -> str:
    """Return a row for each claim that was asked."""
    claims = json.loads(RESULT.read_text())["claims"]
    return HEAD + "".join(f"| {' | '.join(_cells(row))} |\n" for row in claims.values())


def _cells(row: dict[str, Any]) -> list[str]:
    # One number of all images is a count of experts, others are shares.
    shown = _share if row["images"] > 1 else _count
    names = [name for name in row["seeds"][0] if name != "seed"]
    figures = [f"{n} {', '.join(shown(seed[n]) for seed in row['seeds'])}" for n in names]
    over = (_interval(row.get(key), shown) for key in ("over_seeds", "over_images"))
    difference = shown(row["difference"])
    return [row["says"], row["paper"], "; ".join(figures), difference, *over, row["answer"]]


def _interval(ends: list[float] | None, shown: Callable[[float], str]) -> str:
    return "" if ends is None else " to ".join(map(shown, ends))


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _count(value: float) -> str:
    return f"{value:.2f}"
