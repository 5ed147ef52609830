"""Seal of a bundle: the hash of every file, in a manifest that is written last."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from advmoe_deploy import __version__
from advmoe_deploy.bundle import (
    MANIFEST,
    MANIFEST_HASH,
    SCHEMA_VERSION,
    SIGNATURE,
    BundleManifest,
    FileRecord,
    hash_line,
    manifest_text,
)
from advmoe_deploy.files import flush_to_disk, sha256_of


def seal_bundle(path: Path, **fields: Any) -> BundleManifest:
    """Hash every file under ``path``, write the manifest and its hash last, and return it."""
    files = {
        file.relative_to(path).as_posix(): FileRecord(
            sha256=sha256_of(file), bytes=file.stat().st_size
        )
        for file in sorted(path.rglob("*"))
        if file.is_file() and file != path / SIGNATURE  # which is of another manifest
    }
    manifest = BundleManifest(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        producer=f"advmoe-deploy {__version__}",
        files=files,
        **fields,
    )
    text = manifest_text(manifest)
    (path / MANIFEST).write_bytes(text)
    (path / MANIFEST_HASH).write_bytes(hash_line(MANIFEST, text))
    for name in [*files, MANIFEST, MANIFEST_HASH]:
        flush_to_disk(path / name)
    return manifest


def seal_again(path: Path, manifest: BundleManifest, **changed: Any) -> BundleManifest:
    """Seal what was copied to ``path`` and ``changed``: the fields that are not ``manifest``'s."""
    own = {"schema_version", "created", "producer", "files"}
    fields = {name: getattr(manifest, name) for name in BundleManifest.model_fields}
    return seal_bundle(path, **{n: v for n, v in (fields | changed).items() if n not in own})
