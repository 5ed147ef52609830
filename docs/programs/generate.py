"""Writer of docs/reference/api.md and settings.md, and of the tables in docs/papers.md."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from advmoe_deploy import api
from advmoe_deploy.bundle import BundleManifest
from advmoe_deploy.comparison.report import BenchmarkReport, Contender, MeasuredShare, Timing
from advmoe_deploy.evaluation.report import EvalReport
from advmoe_deploy.models.checkpoint import Checkpoint
from advmoe_deploy.progress import Progress
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow, Pair
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.train.meaning import settings_of
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.verify.report import RobustReport
from docs.programs.papers import with_tables

PAGE = Path(__file__).parents[1] / "reference" / "api.md"
SETTINGS_PAGE = PAGE.with_name("settings.md")
PAPERS_PAGE = Path(__file__).parents[1] / "papers.md"
HEAD = """# Python API

`make docs` writes this page from [advmoe_deploy/api/](../../advmoe_deploy/api). Importing
`advmoe_deploy` loads no library; the first use of a name does. Images are float32 `[N, C, H, W]`
in [0, 1]. Errors are those of [errors.py](../../advmoe_deploy/errors.py), all of them
`AdvMoEError`, each of one line. Where a list of strings is meant, one string is a list of one.

`train`, `export` and `verify` are functions, and sub-packages of the same names have the modules:
`import advmoe_deploy.train.config` and `from advmoe_deploy.train import config` both work, and
`advmoe_deploy.train(...)` beside them.

`threads` bounds the engine alone. PyTorch, which computes half of `verify` and of `export`, keeps
the threads that it has, and those that wait spin, which on a busy machine takes the cores from
others. A command sees to both (`--threads`); from Python, set `OMP_WAIT_POLICY=PASSIVE` in the
environment before PyTorch is imported, and call `torch.set_num_threads`."""
SETTINGS_HEAD = """# Settings of a training

`make docs` writes this page from [fields.py](../../advmoe_deploy/train/fields.py) and
[specs.py](../../advmoe_deploy/specs.py). `advmoe train RECIPE --set KEY=VALUE` changes a setting;
`advmoe show RECIPE` has the values of a recipe. A value is JSON, or a plain word; a radius may be a
fraction, `8/255`. `model.expert_layers` and `model.transformer` are null where they are not for a
family."""
OBJECTS = [getattr(api, name) for name in api.__all__]
FUNCTIONS = sorted(
    map(inspect.unwrap, filter(inspect.isfunction, OBJECTS)),
    key=lambda f: (f.__module__, f.__code__.co_firstlineno),
)
TYPES: list[type] = [
    *filter(inspect.isclass, OBJECTS),
    *(BundleManifest, BatchProfile, Checkpoint, Runner, Prediction, TrainReport, Pair),
    *(BenchmarkReport, Contender, MeasuredShare, Timing),
    *(EvalReport, RobustReport, LatencyReport, LatencyRow, LatencyRatio, Progress),
]
_SECTION = re.compile(r"^(Args|Raises):\n((?:    .*(?:\n|$)|\n)+)", re.MULTILINE)
_QUOTED = re.compile(r":\w+:`[~\w.]*?(\w+)`|``(.+?)``")


def api_page() -> str:
    """Return the page: the functions, then the types that they take and return."""
    functions = [entry(each, signature(each)) for each in FUNCTIONS]
    types = [entry(each, outline(each)) for each in TYPES]
    return "\n\n".join([HEAD, "## Functions", *functions, "## Types", *types]) + "\n"


def settings_page() -> str:
    """Return the page of all settings: a table for each group."""
    tables = []
    for group, settings in groupby(settings_of(), lambda one: one.group):
        rows = [
            f"| `{one.key}` | {'required' if one.is_required else f'`{json.dumps(one.default)}`'} "
            f"| {one.allowed} | {one.meaning} |".replace("||", r"\|\|")
            for one in settings
        ]
        head = "| setting | default | allowed | meaning |\n|---|---|---|---|"
        tables.append("\n".join([f"## {group.capitalize()}\n\n{head}", *rows]))
    return "\n\n".join([SETTINGS_HEAD, *tables]) + "\n"


def entry(thing: Callable[..., Any] | type, code: str) -> str:
    """Return what the page says about one function or type."""
    return f"### {thing.__name__}\n\n```py\n{code}\n```\n\n{markdown(inspect.getdoc(thing) or '')}"


def signature(function: Callable[..., Any]) -> str:
    """Return the lines of the source from ``def`` to the docstring."""
    source = inspect.getsource(function)
    definition: Any = ast.parse(source).body[0]
    lines = source.splitlines()[definition.lineno - 1 : definition.body[0].lineno - 1]
    return re.sub("  # .*", "", "\n".join(lines)).rstrip(":")


def outline(type_: type) -> str:
    """Return the first line of a class, its fields, and the signatures of its public methods."""
    source, lines = inspect.getsource(type_), [f"class {type_.__name__}:"]
    for member in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(member, ast.AnnAssign):
            lines.append(f"    {ast.get_source_segment(source, member)}")
        elif isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
            assert member.returns, f"{type_.__name__}.{member.name} says no type"
            returns, is_property = ast.unparse(member.returns), member.decorator_list
            call = f"def {member.name}({ast.unparse(member.args)}) -> {returns}"
            lines.append(f"    {member.name}: {returns}" if is_property else f"    {call}")
    return "\n".join(lines)


def markdown(docstring: str) -> str:
    """Return a Google-style docstring as Markdown, its sections as lists."""

    def as_list(section: re.Match[str]) -> str:
        joined = re.sub(r"\n {5,}", " ", inspect.cleandoc(section[2]).replace("\n    ", "\n     "))
        items = [re.sub(r"^(\w+): ", r"- `\1`: ", line) for line in joined.splitlines()]
        return f"**{section[1]}**\n\n" + "\n".join(items) + "\n\n"

    quoted = _QUOTED.sub(lambda found: f"`{found[1] or found[2]}`", docstring)
    return _SECTION.sub(as_list, quoted).rstrip()


if __name__ == "__main__":
    pages = {
        PAGE: api_page(),
        SETTINGS_PAGE: settings_page(),
        PAPERS_PAGE: with_tables(PAPERS_PAGE.read_text(encoding="utf-8")),
    }
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {page}\n")
