"""TensorRT's Python module, imported here alone.

This folder keeps to the names that releases 8.6, 10 and 11 share. Where one of them lacks a name,
:func:`probe` asks for it; ``tests/runtime/tensorrt/test_names.py`` holds every other name against
the real bindings of each.
"""

import re
from functools import cache
from typing import Any, TypeAlias

from advmoe_deploy.errors import BackendUnavailableError, missing_extra

# A type of TensorRT's, which a type checker does not know.
IExecutionContext: TypeAlias = Any

# Before this release a graph without types of its own is all there is.
STRONG_TYPES = (10, 0, 0)

Version = tuple[int, int, int]


@cache
def tensorrt() -> Any:
    """Return the module.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "tensorrt":
            raise _not_loadable(missing) from None
        raise missing_extra("tensorrt", "gpu") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise _not_loadable(error) from None
    return trt


def _not_loadable(error: Exception) -> BackendUnavailableError:
    reason = " ".join(str(error).split())
    return BackendUnavailableError(
        f"tensorrt is installed but cannot be loaded: {reason}; install its libraries for this "
        "CUDA version (pip install 'advmoe-deploy[gpu]'), or name their folder in LD_LIBRARY_PATH"
    )


def version_text() -> str:
    """Return the version of the installed TensorRT in full, such as ``10.16.1.11``.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    return str(tensorrt().__version__)


def tensorrt_version() -> Version:
    """Return major, minor and patch number of the installed TensorRT.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries are not.
    """
    return parse_version(version_text())


def parse_version(text: str) -> Version:
    """Return the first three numbers of a version; those that are missing are 0."""
    major, minor, patch = [*map(int, re.findall(r"\d+", text)), 0, 0, 0][:3]
    return major, minor, patch


def probe(owner: Any, name: str) -> Any:
    """Return what ``owner`` calls ``name``, ``None`` where this release has no such name."""
    return getattr(owner, name, None)


@cache
def logger() -> Any:
    """Return the logger of this process, which keeps errors in ``problems``.

    TensorRT wants one for all its objects.
    """
    trt = tensorrt()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.problems.append(" ".join(str(message).split()))

        def last_problem(self) -> str:
            return self.problems[-1] if self.problems else "it gives no reason"

    return Logger()
