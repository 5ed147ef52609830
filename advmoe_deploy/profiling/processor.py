"""Name of the processor."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the model name of the processor where the system tells it, else its architecture.

    AMX, which models of one name may have or lack, is named with it: bf16 and int8 run there
    several times as fast.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (li.partition(":") for li in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, AMX" if "amx_tile" in facts.get("flags", "").split() else name
