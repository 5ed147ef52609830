"""The layers of the package: imports point down only, in no circle, and folders stay small."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "advmoe_deploy"

# The lowest first; a part knows those below its own layer only.
LAYERS = [
    {
        "errors",
        "files",
        "journal",
        "families",
        "hub",
        "closing",
        "decoding",
        "specs",
        "plan",
        "bundle",
        "card",
        "pruning",
        "reports",
        "sealing",
        "process",
        "progress",
        "settings",
        "__init__",
    },
    {"models", "runtime"},
    {"attacks", "data", "parity"},
    {"train", "export"},
    {"serving", "verify", "analysis", "profiling", "evaluation"},
    {"zoo", "comparison"},
    {"api"},
    {"cli"},
]
# Down in the layers, and still forbidden: from export to these only the bundle crosses.
NEVER = {
    (above, below)
    for above in ("serving", "profiling", "verify", "analysis", "evaluation", "comparison")
    for below in ("train", "export")
}
TORCH_FREE = ("runtime", "serving", "profiling", "evaluation", "comparison")
# Bundles of a zoo or a hub are served where there is no torch; models are packed where there is.
TORCH_FREE_OF_ZOO = ("places", "resolve", "record", "entries", "download", "publish")
POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}  # Windows has none of them
NO_NOUN = re.compile("(How|It|What|Whatever|When|Where|Whether|Which|Who|Whoever|Whose|Why) ")
MOST_FILES = 15
MARKERS = ("__init__.py", "py.typed")  # with nothing to look for in them
MODULES = sorted(PACKAGE.rglob("*.py"))
LAZY = PACKAGE / "__init__.py"  # its names are those of api, which is imported when one is used
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
FOLDERS = sorted(
    folder
    for root in ("advmoe_deploy", "benchmarks", "tests", "docs")
    for folder in (ROOT / root, *(ROOT / root).rglob("*"))
    if folder.is_dir() and folder.name != "__pycache__"
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def layer_of(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imported(path: Path) -> set[str]:
    """Return everything that a file imports, inside functions as well."""
    names: set[str] = set()
    if path == LAZY:
        return names
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    inside = [name.split(".") for name in imported(path) if name.startswith("advmoe_deploy.")]
    return {parts[1] for parts in inside if any(parts[1] in layer for layer in LAYERS)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    for other in imported_parts(path) - {own}:
        assert (own, other) not in NEVER, f"{own} must not know {other}"
        lowest = layer_of(own) == layer_of(other) == 0
        assert lowest or layer_of(other) < layer_of(own), f"{own} imports {other}, not below it"


def test_no_import_circle() -> None:
    modules = {module_name(path): path for path in [*MODULES, *BENCHMARKS]}
    graph = {name: imported(path) & {*modules} - {name} for name, path in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("root", [PACKAGE, ROOT / "tests"], ids=lambda root: root.name)
def test_files_can_be_imported_where_posix_is_not(root: Path) -> None:
    for path in root.rglob("*.py"):
        top = ast.parse(path.read_text(encoding="utf-8")).body  # not inside of functions
        names = {each.name for node in top if isinstance(node, ast.Import) for each in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not names & POSIX, path


def test_layers_name_what_is_there() -> None:
    assert sorted(part for parts in LAYERS for part in parts) == sorted({*map(part_of, MODULES)})


def test_the_map_of_the_readme_names_every_folder() -> None:
    where = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things live")[2]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not {name for name in folders if f" {name}/" not in where}


def test_torch_free_parts_import_without_torch() -> None:
    names = [
        module_name(path)
        for path in MODULES
        if part_of(path) in TORCH_FREE or layer_of(part_of(path)) == 0
    ] + [f"advmoe_deploy.zoo.{name}" for name in TORCH_FREE_OF_ZOO]
    program = (
        "import sys, importlib\n"
        "for name in ('torch', 'sklearn'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["train", "export", "serving"])
def test_root_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_noun(path: Path) -> None:
    """Those of modules and classes; a function says what it returns or does."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            assert not NO_NOUN.match(first), first


def test_files_stay_small() -> None:
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_stay_small(folder: Path) -> None:
    files = [f for f in folder.iterdir() if f.is_file() and f.name not in MARKERS]
    assert len(files) <= MOST_FILES, f"{len(files)} files; make folders of them"
