"""Kernels of TensorRT for RTX, compiled where an engine runs, for the sizes that it meets.

Written against the documented interface; not run on a GPU yet.
"""

import hashlib
import logging
from pathlib import Path

from advmoe_deploy.closing import Closing
from advmoe_deploy.errors import BackendUnavailableError, InputError, reason_of
from advmoe_deploy.files import write_atomically
from advmoe_deploy.process import cache_folder, private_folder
from advmoe_deploy.runtime.tensorrt.api import ICudaEngine, IExecutionContext, tensorrt
from advmoe_deploy.runtime.tensorrt.cuda import gpu

_LOG = logging.getLogger(__name__)
_SUFFIX = ".kernels"
# What the kernels of all engines may take on the disk.
_MOST_BYTES = 1 << 30


class Kernels(Closing):
    """The kernels of an engine, compiled for each size of its inputs, and kept from run to run.

    A context waits for those of its sizes, rather than run others meanwhile, because a CUDA graph
    would hold on to these.
    """

    def __init__(self, engine: ICudaEngine, file: Path | None, *, weight_streaming: bool) -> None:
        """Begin with the kernels in ``file``, unless those are of another GPU, driver or release.

        With ``weight_streaming`` the library says which weights stay in the host's memory. Without
        a file, or if it cannot be read, kernels are compiled anew.

        Raises:
            BackendUnavailableError: the library takes no cache.
        """
        trt = tensorrt("tensorrt-rtx")
        if weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        self._cache = config.create_runtime_cache()
        if kept := _read(file):
            self._cache.deserialize(kept)
        if not config.set_runtime_cache(self._cache):
            raise BackendUnavailableError("TensorRT for RTX takes no cache of compiled kernels")
        self._engine, self._config, self._file = engine, config, file

    def context(self) -> IExecutionContext:
        """Return a context without memory for the tensors inside, ``None`` if there is none."""
        return self._engine.create_execution_context(self._config)

    def close(self) -> None:
        """Write the kernels to the file, a convenience only: where it fails, a warning says so."""
        kernels = self._cache.serialize()
        try:
            if kernels is not None and self._file is not None:
                write_atomically(self._file, bytes(memoryview(kernels)))
                prune(self._file.parent, _MOST_BYTES)
        except OSError as error:
            _LOG.warning("kernels are compiled again next time: %s", reason_of(error))
        self._engine = self._config = self._cache = None


def _read(file: Path | None) -> bytes:
    """Return what a file of kernels has, nothing if there is none that can be used."""
    try:
        return file.read_bytes() if file is not None and file.is_file() else b""
    except OSError as error:
        _LOG.warning("kernels are compiled again: %s", reason_of(error))
        return b""


def kernels_file(engine: bytes) -> Path | None:
    """Return where the kernels that were compiled here for an engine are kept.

    They are code: the folder has to be closed to others. Without one they are not kept.
    """
    major, minor = gpu().compute_capability
    name = f"sm{major}{minor}-{hashlib.sha256(engine).hexdigest()[:32]}{_SUFFIX}"
    try:
        return private_folder(cache_folder() / "tensorrt-rtx") / name
    except OSError as error:
        reason = reason_of(error)
    except (RuntimeError, InputError) as error:  # no home, or a folder that others can write to
        reason = str(error)
    _LOG.warning("compiled kernels are not kept: %s", reason)
    return None


def prune(folder: Path, most_bytes: int) -> None:
    """Delete kernels, those that were written longest ago, until the others fit ``most_bytes``.

    Raises:
        OSError: a file cannot be examined or deleted.
    """
    newest_first = sorted(
        ((file.stat(), file) for file in folder.glob(f"*{_SUFFIX}")),
        key=lambda found: found[0].st_mtime_ns,
        reverse=True,
    )
    total = 0
    for facts, file in newest_first:
        total += facts.st_size
        if total > most_bytes:
            file.unlink(missing_ok=True)
