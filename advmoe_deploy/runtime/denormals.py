"""Mode of a thread in which denormal numbers count as zeros.

Weights that training lets decay end below 1e-38, where many processors compute 40 to 80 times
slower. Engines have an option for the threads of their own, but the thread that calls them computes
as well, and in what mode its processor is, only that thread can change.
"""

import ctypes
import platform
import threading

import numpy as np

# Flush results to zero and take denormal operands for zero: bits 15 and 6 of MXCSR, bit 24 of FPCR.
_X86, _ARM = 0x8040, 1 << 24
# Where the C library's fenv_t keeps that register, and its bits. Run on x86-64 Linux only.
_REGISTERS: dict[tuple[str, str], tuple[int, int]] = {
    ("Linux", "x86_64"): (28, _X86),
    ("Linux", "aarch64"): (0, _ARM),
    ("Darwin", "x86_64"): (4, _X86),
    ("Darwin", "arm64"): (8, _ARM),
}
# Of _controlfp_s: the mode of denormals, and the bits that it is kept in.
_WINDOWS_FLUSH, _WINDOWS_DENORMALS = 0x01000000, 0x03000000

_thread = threading.local()


def flush_denormals() -> bool:
    """Take denormals for zeros in this thread and in those it starts; return whether it does."""
    if not hasattr(_thread, "flushes"):
        for dtype in (np.float32, np.float64):
            np.finfo(dtype)  # kept by numpy, of which 1.26 would warn afterwards
        _thread.flushes = _flush()
    return bool(_thread.flushes)


def _flush() -> bool:
    if platform.system() == "Windows":
        mode = ctypes.c_uint()
        control = ctypes.CDLL("ucrtbase")._controlfp_s
        return bool(control(ctypes.byref(mode), _WINDOWS_FLUSH, _WINDOWS_DENORMALS) == 0)
    register = _REGISTERS.get((platform.system(), platform.machine()))
    if register is None:
        return False
    offset, bits = register
    process, environment = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    if process.fegetenv(environment) != 0:
        return False
    ctypes.c_uint32.from_buffer(environment, offset).value |= bits
    return bool(process.fesetenv(environment) == 0)
