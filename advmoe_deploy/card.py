"""Another model card for a bundle that is whole at any moment, before, after and in between."""

import errno
import hashlib
import os

from advmoe_deploy.bundle import (
    CARD,
    MANIFEST,
    MANIFEST_HASH,
    SIGNATURE,
    Bundle,
    FileRecord,
    hash_line,
    manifest_text,
    open_bundle,
)
from advmoe_deploy.errors import BundleError, writing
from advmoe_deploy.files import remove_abandoned, write_in_turn


def replace_card(bundle: Bundle, card: str) -> Bundle:
    """Write ``card`` in the place of the bundle's, seal the manifest again, return the bundle.

    Only the card is hashed anew; every other file is checked against the hash that it had. Whatever
    happens, ``kill -9`` included, the bundle opens afterwards, with the old card or the new one.

    Raises:
        BundleError: the bundle has changed since it was opened, or is signed.
        OSError: it cannot be written, and is as it was: no permission, or the disk is full.
    """
    now = open_bundle(bundle.path)
    if now.identity != bundle.identity:
        raise BundleError(
            f"{bundle.path} is another bundle than the one that was opened; try again"
        )
    if (bundle.path / SIGNATURE).exists():
        raise BundleError(
            f"{bundle.path} is signed, and another card would end that; delete {SIGNATURE} first, "
            "and sign it again"
        )
    content = card.encode()
    record = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    if now.manifest.files.get(CARD) != record:
        files = {**now.manifest.files, CARD: record}
        now = Bundle(now.path, now.manifest.model_copy(update={"files": files}))
        _write(now, content)
    return now


def _write(bundle: Bundle, card: bytes) -> None:
    """Replace three files, of which no two can be replaced at once, so that they always agree.

    For that, ``manifest.sha256`` holds for an instant what was and what will be.
    """
    path, manifest = bundle.path, manifest_text(bundle.manifest)
    _require_writable(bundle)
    remove_abandoned(path)
    last = hash_line(MANIFEST, manifest)
    both = hash_line(MANIFEST, (path / MANIFEST).read_bytes()) + last + hash_line(CARD, card)
    write_in_turn(
        [
            (path / MANIFEST_HASH, both),
            (path / CARD, card),
            (path / MANIFEST, manifest),
            (path / MANIFEST_HASH, last),
        ]
    )


def _require_writable(bundle: Bundle) -> None:
    # A file that is read-only could be replaced in a folder that is not, against its owner's will.
    for name in (CARD, MANIFEST, MANIFEST_HASH):
        file = bundle.path / name
        if not os.access(file, os.W_OK):
            with writing(file):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
