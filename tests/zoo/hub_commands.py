"""What tests of the hub check of a process that has ended."""

import subprocess
from pathlib import Path

Done = subprocess.CompletedProcess[str]
WEIGHTS = "model/weights.safetensors"


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def refused(done: Done, code: int, *said: str) -> None:
    """Check that it ended with ``code`` and one line that says all of ``said``."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert all(each in line for each in said), line
    assert done.stdout == ""
