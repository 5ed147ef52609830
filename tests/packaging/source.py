"""What a wheel is made of, copied away, and the wheel that 'make wheel' makes of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FILES = ("Makefile", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def source_in(folder: Path) -> Path:
    """Return a copy of what the package is built from, without what earlier builds left."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
    shutil.copytree(ROOT / "advmoe_deploy", source / "advmoe_deploy", ignore=ignored)
    for name in _FILES:
        shutil.copyfile(ROOT / name, source / name)
    return source


def wheel_of(source: Path) -> Path:
    """Return the wheel of 'make wheel', which builds it in an environment of its own."""
    command = ["make", "wheel", f"PYTHON={sys.executable}"]
    # An outer make hands its variables and its job server on.
    own = {key: text for key, text in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(command, cwd=source, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel
