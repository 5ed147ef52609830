"""Compilation of the kernels, the same for a wheel and for a user's cache.

Only the standard library is needed, so that ``setup.py`` can load this file on its own.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.c")))
LIBRARY = "advmoe_ops.so"
BUILD_RECORD = "advmoe_ops.json"

# For any processor of the kind, not only for this one: caches and wheels are shared.
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_SECONDS = 120


def find_compiler() -> str | None:
    """Return the C compiler and its flags, from ``CC``, else ``cc``; ``None`` if there is none."""
    if os.name == "nt":  # libraries of another kind, with other flags
        return None
    name, *flags = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    found = shutil.which(name)
    return shlex.join([found, *flags]) if found else None


def source_hash() -> str:
    """Return the SHA-256 of all that decides what the library does."""
    kind = f"{platform.system()} {platform.machine()} {' '.join(FLAGS)}\n".encode()
    digest = hashlib.sha256(kind)
    for file in (*SOURCES, *sorted(FOLDER.glob("*.h"))):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def compile_kernels(compiler: str, directory: Path) -> None:
    """Write the library and the record of its hash into ``directory``.

    Raises:
        OSError: the compiler cannot be run or fails, or the disk does not take the library.
    """
    library = directory / LIBRARY
    command = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(library)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{compiler} took more than {_SECONDS} seconds") from None
    if done.returncode != 0 or not library.is_file():
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise OSError(f"{compiler} failed: {reason}")
    record = {
        "source_sha256": source_hash(),
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "compiler": compiler,
        "flags": FLAGS,
    }
    (directory / BUILD_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
