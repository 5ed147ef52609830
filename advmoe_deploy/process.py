"""Process environment, set before libraries read it: no telemetry, bounded threads.

Most libraries read these variables once, when they are loaded, and the processes that we start
inherit them.
"""

import math
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from advmoe_deploy.errors import InputError

_TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# OpenVINO's has no variable: without this package OpenVINO falls back to a stub of its own.
_OPENVINO_TELEMETRY = "openvino_telemetry"
# libgomp, LLVM's and Intel's OpenMP, OpenBLAS: by default their threads spin for the next loop,
# which on a busy machine takes the cores from the thread that they wait for.
_SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}
_THREADS = "OMP_NUM_THREADS"
_POOLS = (
    _THREADS,
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "ORT_INTRA_OP_NUM_THREADS",  # of sessions that others open, such as the quantizer's
)


def prepare() -> None:
    """Switch telemetry off, and let waiting threads sleep where the user has not said otherwise."""
    os.environ.update(_TELEMETRY_OFF)
    for name, value in _SLEEPING.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Let a library that is imported within the block neither report home nor leave an id."""
    os.environ.update(_TELEMETRY_OFF)
    loaded = sys.modules.get(_OPENVINO_TELEMETRY)
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(_OPENVINO_TELEMETRY, None)  # another thread may have been here
        if loaded:
            sys.modules[_OPENVINO_TELEMETRY] = loaded


def cache_folder() -> Path:
    """Return the folder below the user's home that is ours; it need not exist.

    Raises:
        RuntimeError: nothing says where the home is.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advmoe-deploy"


def private_folder(folder: Path) -> Path:
    """Return a folder for code that is loaded later, made if need be: nobody else may write to it.

    Raises:
        InputError: it is open to others, or not the user's own.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder.parent, 0o022)
    require_private(folder, 0o077)
    return folder


def require_private(folder: Path, closed: int) -> None:
    """Raise :class:`InputError` unless ``folder`` is the user's own, its mode ``closed`` to others.

    A link to a folder is none.
    """
    if sys.platform == "win32":
        raise InputError(
            f"who can write to {folder} cannot be checked on Windows, so no code is loaded from "
            "it; run this in WSL"
        )
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & closed:
        raise InputError(f"{folder} is open to others, so no code is loaded from it; delete it")


def use_threads(threads: int, *, processes: int = 1) -> None:
    """Bound the threads of everything that is loaded from now on, here and in child processes.

    0 leaves ``OMP_NUM_THREADS`` as the user has set it. Else it shares the usable CPUs among
    ``processes``, but only where they are fewer than the machine's: where they are not, each
    library knows best, and Lightning shares them out by itself.
    """
    if not threads and (_THREADS in os.environ or usable_cpus() == os.cpu_count()):
        return
    count = threads or max(1, usable_cpus() // processes)
    os.environ.update(dict.fromkeys(_POOLS, str(count)))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def default_threads() -> int:
    """Return the threads of an engine that was told none: ``OMP_NUM_THREADS``, or the usable CPUs.

    0, the engine's own choice, where every CPU of the machine may be used.
    """
    first = os.environ.get(_THREADS, "").split(",")[0].strip()
    if first.isdecimal() and int(first):
        return int(first)
    cpus = usable_cpus()
    return 0 if cpus == os.cpu_count() else cpus


def usable_cpus() -> int:
    """Return how many CPUs this process may use: those of its affinity, or its cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    try:
        own = Path("/proc/self/cgroup").read_text()
    except OSError:
        return allowed
    return min(allowed, quota_cpus(Path("/sys/fs/cgroup"), own) or allowed)


def quota_cpus(mounted: Path, own: str) -> int | None:
    """Return the CPUs' worth of time that cgroups allow, at least one; ``None`` if unlimited.

    ``mounted`` is where the cgroups are, ``own`` the text of ``/proc/self/cgroup``: the groups of
    this process. The least of each group and those around it counts.
    """
    shares = []
    for line in own.splitlines():
        path = line.split(":", 2)[2].strip("/")
        for root in (mounted, mounted / "cpu"):
            folders = [root / path, *(root / path).parents]
            shares += [_share(folder) for folder in folders if folder.is_relative_to(root)]
    return max(1, math.ceil(min(shares))) if shares and min(shares) < math.inf else None


def _share(group: Path) -> float:
    """Return the time per time that ``group`` has, in CPUs; infinity where nothing says so."""
    try:
        if (group / "cpu.max").is_file():  # version 2 of cgroups
            quota, period = (group / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((group / name).read_text().strip() for name in names)
    except OSError:
        return math.inf
    return int(quota) / int(period) if quota.isdecimal() else math.inf


def step_back() -> None:
    """Let this thread go behind the others of its process where cores are few; on Linux alone."""
    if sys.platform == "linux":  # elsewhere threads have no priority of their own
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.nice(0) + 5))
