"""Bundles that a test may tamper with, as somebody would who knows the format."""

import json
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, hash_line
from advmoe_deploy.files import sha256_of


def put(bundle: Path, name: str, content: bytes) -> None:
    """Write a file and list it with its hash, so that every hash fits again."""
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(content)
    fields = json.loads((bundle / MANIFEST).read_bytes())
    fields["files"][name] = {"sha256": sha256_of(bundle / name), "bytes": len(content)}
    put_manifest(bundle, fields)


def put_manifest(bundle: Path, fields: Any) -> None:
    """Write the manifest, a text or its fields, with a hash that fits."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    (bundle / MANIFEST).write_bytes(text)
    (bundle / MANIFEST_HASH).write_bytes(hash_line(MANIFEST, text))
