"""Data record of a run, by which its data are known again wherever they lie."""

from pathlib import Path

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.errors import UsageError
from advmoe_deploy.specs import Fingerprint, Frozen

DATA = "data.json"  # in the folder of a run


class RunData(Frozen):
    """The data of a run: their source, and what tells them wherever they lie."""

    source: str
    fingerprint: Fingerprint | None
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, data: Dataset) -> "RunData":
        """Return what a run keeps of ``data``."""
        return cls(source=data.source, fingerprint=data.fingerprint, class_names=data.class_names)


def require_same_content(path: Path, before: RunData, now: RunData) -> None:
    """Refuse data with a fingerprint for the run at ``path``, which has one of its own.

    Raises:
        UsageError: they hold something else, or would be dealt otherwise.
    """
    kept, found = before.fingerprint, now.fingerprint
    assert kept is not None
    assert found is not None
    if found.images != kept.images:
        raise UsageError(
            f"{path} was trained on {before.source} (content {kept.images[:12]}), and {now.source} "
            f"holds other images or other classes of them (content {found.images[:12]}); resume "
            "with the same images, wherever they lie, or choose another --out"
        )
    if found.dealt != kept.dealt:
        raise UsageError(
            f"{now.source} holds the images that {path} was trained on (content "
            f"{kept.images[:12]}), but in another order (dealt {found.dealt[:12]}, then "
            f"{kept.dealt[:12]}), so that others would be held out; resume with the layout of "
            f"{before.source}, or choose another --out"
        )
    if now.class_names != before.class_names:
        names = (", ".join(each.class_names[:5]) for each in (before, now))
        raise UsageError(
            f"{now.source} holds the images that {path} was trained on, whose classes were "
            f"{' and are '.join(names)}; call them as before, or choose another --out"
        )
