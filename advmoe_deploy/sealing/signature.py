"""Signature of a bundle through OpenSSF's ``model-signing`` (extra ``[sign]``), offline.

The manifest is signed, which has the hash of every other file. No other module knows the
library.

Source: OpenSSF Model Signing specification 1.0, https://github.com/sigstore/model-transparency.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from advmoe_deploy.bundle import CARD, MANIFEST, SIGNATURE, Bundle
from advmoe_deploy.errors import BundleError, InputError, MachineError, missing_extra, reading
from advmoe_deploy.files import remove_abandoned, write_atomically
from advmoe_deploy.sealing.files import read_at_most

_MOST_BYTES = 1 << 20


def sign_bundle(bundle: Bundle, private_key: Path) -> Path:
    """Sign an opened bundle, in the place of an older signature, and return the signature's file.

    Args:
        bundle: what is signed is its manifest as it was opened.
        private_key: an elliptic-curve key (P-256, P-384 or P-521) in PEM, without a password.

    Raises:
        InputError: the key cannot be read, or is of another kind.
        BackendUnavailableError: ``model-signing`` is not installed.
    """
    signing = _library("signing")
    with _laid_out(bundle) as (folder, signature):
        with _of_key(private_key, "private"):
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.sign(folder, signature)
        target = bundle.path / SIGNATURE
        remove_abandoned(bundle.path, SIGNATURE)
        write_atomically(target, signature.read_bytes())
    return target


def require_signature(bundle: Bundle, public_key: Path) -> Bundle:
    """Return an opened bundle, unless it is one whose manifest the owner of a key has not signed.

    The manifest is checked as it was opened, not its file, which may be another by now.

    Raises:
        BundleError: there is no signature, or it is of another manifest or card, or by another key.
        InputError: the key cannot be read, or is of another kind.
        BackendUnavailableError: ``model-signing`` is not installed.
    """
    verifying = _library("verifying")
    file = bundle.path / SIGNATURE
    with _of_key(public_key, "public"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    with reading(file):
        content = read_at_most(file, _MOST_BYTES)
    if content is None:
        raise BundleError(
            f"{bundle.path} has no {SIGNATURE}; sign it with 'advmoe sign', or do not use it"
        )
    if bundle.has(CARD):
        bundle.read(CARD)  # which may be newer than the manifest, where nobody has signed
    with _laid_out(bundle) as (folder, signature):
        signature.write_bytes(content)
        try:
            with redirect_stdout(StringIO()):  # a warning on signatures of old releases
                config.verify(folder, signature)
        except Exception:
            raise BundleError(
                f"{bundle.path}: {SIGNATURE} is not a signature of this bundle by {public_key}; do "
                "not use this bundle, or name the key of whoever signed it"
            ) from None
    return bundle


@contextmanager
def _laid_out(bundle: Bundle) -> Iterator[tuple[Path, Path]]:
    """Give a private folder with the manifest as it was opened, and a place for a signature."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="advmoe-sign-"))
            folder = Path(made) / "bundle"
            folder.mkdir()
            (folder / MANIFEST).write_bytes(bundle.manifest_text)
        except OSError as error:
            raise MachineError(
                "signatures are made and checked in a temporary folder, and none can be written "
                f"({error.strerror}); set TMPDIR to one that can"
            ) from None
        yield folder, Path(made) / SIGNATURE


@contextmanager
def _of_key(key: Path, kind: str) -> Iterator[None]:
    """Say of what the library makes of a key that it is none."""
    try:
        with reading(key):
            yield
    except OSError:
        raise
    except Exception as error:
        # The first sentence: what follows is advice on that library's own use, with an address.
        reason = " ".join(str(error).split()).partition(". ")[0][:100]
        raise InputError(
            f"{key} is no {kind} elliptic-curve key in PEM without a password ({reason}); make a "
            "pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in "
            "key.pem -pubout -out key.pub"
        ) from None


def _library(part: str) -> Any:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError:
        raise missing_extra("model-signing", "sign") from None
    return getattr(model_signing, part)
