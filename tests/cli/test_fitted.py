"""Tables on terminals of any width: whole cells, and what is left out is named."""

import io

import pytest
from rich.console import Console

from advmoe_deploy.cli.tables.fitted import FittedTable
from advmoe_deploy.reports import LatencyRatio
from advmoe_deploy.settings import epsilon_text


def drawn(width: int) -> str:
    table = FittedTable("title [x]", ("engine", "ms", "n", "MACs"), least=("n", "MACs"))
    table.add_row("onnxruntime-plan", "1.234", "500", "192.3 M")
    table.add_row("openvino")
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("width", "columns", "left_out"),
    [
        # 16 + 2 + 5 + 2 + 3 + 2 + 7 columns are wanted.
        (80, ["engine", "ms", "n", "MACs"], ""),
        (37, ["engine", "ms", "n", "MACs"], ""),
        (36, ["engine", "ms", "MACs"], "without n;"),
        (31, ["engine", "ms"], "without n, MACs;"),
        (20, ["engine", "ms"], "without n, MACs;"),
    ],
)
def test_the_least_columns_give_way(width: int, columns: list[str], left_out: str) -> None:
    out = drawn(width)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].split() == columns
    assert "…" not in out
    assert "1.234" in out
    assert "onnxruntime-plan" in out.replace("\n", "") or width == 20  # there it folds
    assert left_out in " ".join(out.split())


def test_a_ratio_in_words() -> None:
    fields = {"a_engine": "onnxruntime", "engine": "onnxruntime", "ci_low": 0.5, "ci_high": 0.6}
    ratio = LatencyRatio(a="dense", b="moe", batch=1, ratio=0.54, **fields)  # type: ignore[arg-type]
    assert ratio.words == "MoE 0.54x as fast as dense"
    same = ratio.model_copy(update={"a": "moe", "engine": "openvino"})
    assert same.words == "MoE on openvino fp32 0.54x as fast as MoE on onnxruntime fp32"


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(8 / 255, "8/255"), (0.1, "0.1"), (1.0, "1"), (0.5 / 255, "0.001961"), (4 / 255, "4/255")],
)
def test_a_radius_as_people_write_it(epsilon: float, text: str) -> None:
    assert epsilon_text(epsilon) == text
