"""Form of the custom operators on this machine: our kernels, or bodies of standard operators.

The library is the one that came in the wheel, else it is compiled once into the user's cache, else
there is none and the bodies run; whoever asks is told which, and why.
"""

import json
import mmap
import os
import shutil
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from advmoe_deploy.errors import BackendUnavailableError, InputError, UsageError, reason_of
from advmoe_deploy.files import sha256_of
from advmoe_deploy.process import cache_folder
from advmoe_deploy.runtime.onnxruntime.kernels.build import (
    FOLDER,
    LIBRARY,
    RECORD,
    compile_kernels,
    find_compiler,
    source_hash,
)

DOMAIN = "ai.advmoe"
VARIABLE = "ADVMOE_CUSTOM_OPS"


@dataclass(frozen=True)
class CustomOps:
    """The form in use, why, and the library where there is one."""

    form: Literal["kernels", "bodies"]
    reason: str
    library: Path | None = None

    def __str__(self) -> str:
        return f"{self.form}: {self.reason}"

    def as_json(self) -> dict[str, str | None]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "library": str(self.library) if self.library else None}


def find_custom_ops(wanted: str | None = None) -> CustomOps:
    """Return the form to use; compiles the kernels if nobody did before.

    Args:
        wanted: ``bodies`` leaves the kernels aside, ``kernels`` insists on them; ``auto`` takes
            them where they are. By default what the variable ``ADVMOE_CUSTOM_OPS`` says.

    Raises:
        UsageError: ``wanted`` is none of the three.
        BackendUnavailableError: there are no kernels, and they are insisted on.
        InputError: a library is not the one whose hash was recorded.
    """
    wanted = wanted or os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "kernels", "bodies"):
        raise UsageError(f"{VARIABLE}={wanted} is none of auto, kernels, bodies")
    if wanted == "bodies":
        return CustomOps("bodies", f"{VARIABLE} or the caller asked for them")
    found = _find()
    if wanted == "kernels" and found.library is None:
        raise BackendUnavailableError(
            f"no kernels of {DOMAIN}: {found.reason}; install a C compiler or set {VARIABLE}=bodies"
        )
    return found


def uses_custom_ops(model: bytes | Path) -> bool:
    """Return whether the serialised graph, or the file, names the custom operators' domain."""
    name = DOMAIN.encode()
    if isinstance(model, bytes):
        return name in model
    if not model.is_file() or not model.stat().st_size:
        return False
    with (
        model.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.rfind(name) >= 0  # functions stand at the end


def _find() -> CustomOps:
    if (FOLDER / RECORD).is_file() and _record(FOLDER).get("source_sha256") == source_hash():
        return CustomOps("kernels", "prebuilt in the package", _checked(FOLDER))
    try:
        cached = cache_folder() / f"kernels-{source_hash()[:32]}"
        if cached.is_dir():
            return CustomOps("kernels", "compiled earlier, in the cache", _checked_cache(cached))
        compiler = find_compiler()
        if compiler is None:
            return CustomOps("bodies", "no library in the package and no C compiler (cc, or CC)")
        _compile(compiler, cached)
    except (OSError, RuntimeError) as error:  # a home that is unknown or closed to us included
        reason = reason_of(error) if isinstance(error, OSError) else error
        return CustomOps("bodies", f"the kernels could not be compiled: {reason}")
    return CustomOps("kernels", f"compiled by {compiler}", _checked_cache(cached))


def _compile(compiler: str, cached: Path) -> None:
    """Compile in a directory of its own, which becomes ``cached`` unless another was faster."""
    cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = Path(tempfile.mkdtemp(prefix=".kernels-", dir=cached.parent))  # 0700
    try:
        compile_kernels(compiler, partial)
        try:
            partial.rename(cached)
        except OSError:
            if not cached.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked_cache(cached: Path) -> Path:
    """Return the library in ``cached``, which nobody else can have written or replaced."""
    _require_private(cached.parent, 0o022)
    _require_private(cached, 0o077)
    return _checked(cached)


def _require_private(directory: Path, closed: int) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & closed:
        raise InputError(
            f"{directory} is open to others, so its library is not loaded; delete it, or set "
            f"{VARIABLE}=bodies"
        )


def _checked(directory: Path) -> Path:
    """Return the library in ``directory``, whose hash is the recorded one."""
    library = directory / LIBRARY
    try:
        same = sha256_of(library) == _record(directory).get("library_sha256")
    except FileNotFoundError:
        same = False
    if not same:
        raise InputError(
            f"{library} is not the library that was compiled (its SHA-256 differs); delete "
            f"{directory}, or set {VARIABLE}=bodies"
        )
    return library


def _record(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
