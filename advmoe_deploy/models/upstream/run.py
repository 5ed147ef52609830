"""A run from a released checkpoint, as ``advmoe import`` and the Python API write it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from advmoe_deploy.files import refuse_existing, sha256_of, staged_directory
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.upstream.importer import read_released
from advmoe_deploy.reports.checkpoint import Known
from advmoe_deploy.settings import parse_settings
from advmoe_deploy.specs import ModelSpec

# What tells a run that may be replaced from a folder that is none.
_MARKER = "model/checkpoint.json"


def numbered(spec: ModelSpec) -> Known:
    """Return that nothing is known of a network: its classes are called by their numbers."""
    return Known(tuple(map(str, range(spec.num_classes))))


def run_from_released(
    file: Path,
    source: str,
    run: Path,
    *,
    settings: Iterable[str] = (),
    key: str = "",
    overwrite: bool = False,
    describe: Callable[[ModelSpec], Known] = numbered,
) -> Checkpoint:
    """Return what ``run`` now says of a released checkpoint; its provenance says how it was read.

    Args:
        file: as :func:`~advmoe_deploy.models.upstream.importer.read_released` takes it.
        source: whose code wrote it.
        run: the run folder to be.
        settings: what shapes cannot tell, each ``KEY=VALUE``.
        key: where the network is in a file of several.
        overwrite: replace an older run.
        describe: tells classes, threat model and data of the network that was found.

    Raises:
        CheckpointError: the file cannot be used, see there.
        UsageError: ``run`` is in the way, or an argument makes no sense.
    """
    refuse_existing(run, overwrite=overwrite, marker=_MARKER)
    overrides = parse_settings(settings)
    imported = read_released(file, source, overrides, key)
    known = describe(imported.spec)
    checkpoint = Checkpoint(
        model=imported.spec,
        threat=known.threat,
        class_names=known.class_names,
        recipe={"name": f"imported from {source}", "settings": overrides},
        metrics={},
        provenance={
            "imported_from": source,
            "file": file.name,
            "file_sha256": sha256_of(file),
            **imported.report(),
            **known.data,
        },
    )
    with staged_directory(run, overwrite=overwrite) as staged:
        (staged / "model").mkdir()
        return save_checkpoint(staged / "model", checkpoint, imported.model)
