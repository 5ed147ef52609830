"""The layers of the package: imports point down only, and an edge box needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "advmoe_deploy"

LAYERS = [
    {
        "errors",
        "files",
        "intervals",
        "families",
        "layout",
        "specs",
        "plan",
        "bundle",
        "pruning",
        "reports",
        "progress",
        "__init__",
    },
    {"models"},
    {"attacks", "data"},
    {"train", "export", "runtime"},
    {"serving", "verify", "analysis", "profiling"},
    {"cli"},
]
# Neighbours in one layer that may meet: an export is checked on the runtime it is meant for.
SAME_LAYER = {("export", "runtime")}
# Down in the layers, and still forbidden: only the bundle crosses.
NEVER = {
    ("serving", "train"),
    ("serving", "export"),
    ("profiling", "export"),
    ("profiling", "train"),
}
TORCH_FREE = ("runtime", "serving", "profiling")
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    inside = [name.split(".") for name in names if name.startswith("advmoe_deploy.")]
    return {parts[1] for parts in inside if any(parts[1] in layer for layer in LAYERS)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    for other in imported_parts(path) - {own}:
        assert (own, other) not in NEVER, f"{own} must not know {other}"
        if layer_of(own) > 0:
            below = layer_of(other) < layer_of(own)
            assert below or (own, other) in SAME_LAYER, f"{own} imports {other}, which is not below"
        else:
            assert layer_of(other) == 0, f"{own} is in the lowest layer and imports {other}"


def test_every_module_has_a_layer() -> None:
    for path in MODULES:
        layer_of(part_of(path))


def test_torch_free_parts_import_without_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if part_of(path) in TORCH_FREE or layer_of(part_of(path)) == 0
    ]
    program = (
        "import sys, importlib\n"
        "for name in ('torch', 'sklearn', 'datasets'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["train", "export", "serving"])
def test_root_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name


def test_files_stay_small() -> None:
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 350}
    assert not long
