"""Form of the custom operators on this machine: our kernels, or bodies of standard operators.

The library is the one that came in the wheel, else it is compiled once into the user's cache, else
there is none and the bodies run; callers are told which, and why.
"""

import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal

from advmoe_deploy.errors import BackendUnavailableError, InputError, UsageError, reason_of
from advmoe_deploy.process import cache_folder, require_private
from advmoe_deploy.runtime.onnxruntime.kernels.build import (
    BUILD_RECORD,
    FOLDER,
    LIBRARY,
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
    # What to load: a private copy of the library, made while its hash was taken.
    loaded: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.form}: {self.reason}"

    def as_json(self) -> dict[str, str | None]:
        """Return the fields as JSON has them."""
        library = str(self.library) if self.library else None
        return {"form": self.form, "reason": self.reason, "library": library}


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


def uses_custom_ops(model: bytes) -> bool:
    """Return whether the serialised graph names the custom operators' domain."""
    return model.rfind(DOMAIN.encode()) >= 0  # functions stand at the end


def _find() -> CustomOps:
    if (FOLDER / BUILD_RECORD).is_file() and _record(FOLDER).get("source_sha256") == source_hash():
        return CustomOps("kernels", "prebuilt in the package", *_checked(FOLDER))
    try:
        cached = cache_folder() / f"kernels-{source_hash()[:32]}"
        if cached.is_dir():
            return CustomOps("kernels", "compiled earlier, in the cache", *_checked_cache(cached))
        compiler = find_compiler()
        if compiler is None:
            return CustomOps("bodies", "no library in the package and no C compiler (cc, or CC)")
        _compile(compiler, cached)
    except (OSError, RuntimeError) as error:  # a home that is unknown or closed to us included
        reason = reason_of(error) if isinstance(error, OSError) else error
        return CustomOps("bodies", f"the kernels could not be compiled: {reason}")
    return CustomOps("kernels", f"compiled by {compiler}", *_checked_cache(cached))


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


def _checked_cache(cached: Path) -> tuple[Path, str]:
    """Do as :func:`_checked` with what nobody else can have written or replaced."""
    try:
        require_private(cached.parent, 0o022)
        require_private(cached, 0o077)
    except InputError as error:
        raise InputError(f"{error}, or set {VARIABLE}=bodies") from None
    return _checked(cached)


def _checked(directory: Path) -> tuple[Path, str]:
    """Return the library in ``directory``, whose hash is the recorded one, and what to load."""
    library = directory / LIBRARY
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        content = b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != _record(directory).get("library_sha256"):
        raise InputError(
            f"{library} is not the library that was compiled (its SHA-256 differs); delete "
            f"{directory}, or set {VARIABLE}=bodies"
        )
    return library, _private_copy(digest, content)


_copies: dict[str, str] = {}
_copying = Lock()


def _private_copy(digest: str, content: bytes) -> str:
    """Return the path of a copy that nobody can change any more, one per process and content.

    On Linux that is sealed memory; elsewhere a file in a folder closed to others, until exit.
    """
    with _copying:
        if digest not in _copies:
            _copies[digest] = _sealed_memory(content) or _private_file(content)
        return _copies[digest]


def _sealed_memory(content: bytes) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    try:
        descriptor = os.memfd_create(LIBRARY, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # the kernel was told to give none
        return None
    with open(descriptor, "wb", closefd=False) as file:  # it stays open as long as the process
        file.write(content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return f"/proc/self/fd/{descriptor}"


def _private_file(content: bytes) -> str:
    folder = Path(tempfile.mkdtemp(prefix="advmoe-kernels-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / LIBRARY).write_bytes(content)
    return str(folder / LIBRARY)


def _record(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / BUILD_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
