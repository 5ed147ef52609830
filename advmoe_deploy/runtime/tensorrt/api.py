"""The Python modules of TensorRT and of TensorRT for RTX, imported here alone.

This folder keeps to the names that releases 8.6, 10 and 11 share, and RTX with them. Where one of
them lacks a name, :func:`probe` asks for it; ``tests/runtime/tensorrt/test_names.py`` holds every
other name against the real bindings of each.
"""

import importlib
import os
import re
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import (
    BackendUnavailableError,
    MachineError,
    install_line,
    missing_extra,
    reason_of,
)
from advmoe_deploy.reports.devices import GpuLibrary

# Types of TensorRT's, which a type checker does not know.
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
ILayer: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
ITensor: TypeAlias = Any

# Before this release a graph without types of its own is all there is.
STRONG_TYPES = (10, 0, 0)
# Names a file that gets everything TensorRT says.
LOG_VARIABLE = "ADVMOE_TENSORRT_LOG"
_ERRORS = ("ERROR", "INTERNAL_ERROR")

Version = tuple[int, int, int]

# The module of each library, what pip calls it, and the extra that brings it.
_MODULES: dict[GpuLibrary, tuple[str, str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt", "gpu"),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "tensorrt-rtx-cu13-bindings", "rtx"),
}
TITLES: dict[GpuLibrary, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
# RTX counts its releases anew; its interface is this one's.
_INTERFACE_OF_RTX = (11, 4, 0)


@cache
def tensorrt(library: GpuLibrary = "tensorrt") -> Any:
    """Return the module of a library.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    module, package, extra = _MODULES[library]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != module:
            raise _not_loadable(package, extra, missing) from None
        raise missing_extra(package, extra) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise _not_loadable(package, extra, error) from None


def _not_loadable(package: str, extra: str, error: Exception) -> BackendUnavailableError:
    reason = " ".join(str(error).split())
    return BackendUnavailableError(
        f"{package} is installed but cannot be loaded: {reason}; install its libraries for this "
        f"CUDA version ({install_line(extra)}), or name their folder in "
        "LD_LIBRARY_PATH"
    )


def version_text(library: GpuLibrary = "tensorrt") -> str:
    """Return the version of the installed library in full, such as ``10.16.1.11``.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    return str(tensorrt(library).__version__)


def tensorrt_version(library: GpuLibrary = "tensorrt") -> Version:
    """Return major, minor and patch number of the TensorRT whose interface the library has.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    installed = parse_version(version_text(library))
    return installed if library == "tensorrt" else _INTERFACE_OF_RTX


def parse_version(text: str) -> Version:
    """Return the first three numbers of a version; those that are missing are 0."""
    major, minor, patch = [*map(int, re.findall(r"\d+", text)), 0, 0, 0][:3]
    return major, minor, patch


def probe(owner: Any, name: str) -> Any:
    """Return what ``owner`` calls ``name``, ``None`` where this release has no such name."""
    return getattr(owner, name, None)


class Messages(Closing):
    """Messages of TensorRT: its last error is mostly generic, and the cause comes before it.

    Whatever ``file`` is given gets all of it, the searches of a build included.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Append to ``file``, if there is one.

        Raises:
            MachineError: it cannot be written.
        """
        self._kept: deque[tuple[int, str, str]] = deque(maxlen=1000)
        self._count = 0
        try:
            self._file = file.open("a", encoding="utf-8", buffering=1) if file else None
        except OSError as error:
            raise MachineError(f"{LOG_VARIABLE}={file}: {reason_of(error)}") from None

    def keep(self, severity: str, message: str) -> None:
        """Take what was said, one of TensorRT's names being its severity."""
        heard = severity in (*_ERRORS, "WARNING")
        if not heard and self._file is None:
            return
        text = " ".join(message.split())
        if self._file is not None:
            self._file.write(f"{severity} {text}\n")
        if heard:
            self._count += 1
            self._kept.append((self._count, severity, text))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def listen(self) -> "Heard":
        """Return what will be said from now on."""
        return Heard(self, self._count)

    def after(self, number: int) -> list[tuple[str, str]]:
        """Return severity and text of what came after message ``number``, as far as it is kept."""
        return [(severity, text) for at, severity, text in tuple(self._kept) if at > number]


@dataclass(frozen=True)
class Heard:
    """Messages of TensorRT during a call, those of other threads included."""

    messages: Messages
    start: int

    def reason(self) -> str:
        """Return every error in order, once each; where there is none, every warning."""
        return "; ".join(dict.fromkeys(self._told())) or "it gives no reason"

    def mentions(self, *words: str) -> bool:
        """Return whether what :meth:`reason` tells has one of these in it."""
        return any(word in text for text in self._told() for word in words)

    def _told(self) -> list[str]:
        said = self.messages.after(self.start)
        return [t for severity, t in said if severity in _ERRORS] or [t for _, t in said]


@cache
def _messages() -> Messages:
    file = os.environ.get(LOG_VARIABLE)
    return Messages(Path(file) if file else None)


@cache
def logger(library: GpuLibrary) -> Any:
    """Return the library's logger in this process; it wants one for all its objects.

    Raises:
        BackendUnavailableError: TensorRT is not installed, or its libraries are not.
        MachineError: the file that ``ADVMOE_TENSORRT_LOG`` names cannot be written.
    """
    trt, messages = tensorrt(library), _messages()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.keep(severity.name, str(message))

    return Logger()


def listen() -> Heard:
    """Return what these libraries will say from now on."""
    return _messages().listen()
