"""The bundle that something is made of, and where that goes."""

import os
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError


@dataclass(frozen=True)
class Source:
    """A bundle, or a name of one, and what ``--out`` and ``--overwrite`` say."""

    path: Path
    out: Path | None
    overwrite: bool

    def opened(self) -> Bundle:
        """Return the bundle, every hash of it checked."""
        from advmoe_deploy import api

        return api.open_bundle(self.path)

    def place(self, bundle: Bundle, ending: str) -> Path:
        """Return where to write: ``--out``, or a name of its own beside the bundle.

        Raises:
            UsageError: it is in the bundle, whose every file is listed.
        """
        from advmoe_deploy.zoo.resolve import place_for

        folder = bundle.path.resolve()
        beside = folder.with_name(f"{folder.name}-{ending}")
        out = self.out or place_for(self.path, bundle.path, ending, beside)
        if Path(os.path.realpath(out)).is_relative_to(folder):  # of a circle that is itself
            raise UsageError(f"{out} is in the bundle, which takes no more files; name another")
        return out
