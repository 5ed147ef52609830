"""The bundle that something is made of, and where that goes."""

from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.bundle import Bundle


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
        """Return where to write: ``--out``, or a name of its own beside the bundle."""
        from advmoe_deploy.zoo.resolve import place_for

        folder = bundle.path.resolve()
        beside = folder.with_name(f"{folder.name}-{ending}")
        return self.out or place_for(self.path, bundle.path, ending, beside)
