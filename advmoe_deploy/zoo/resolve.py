"""The one way from what a user names to a folder on this machine.

PATH                     a run or a bundle; a path that exists wins
NAME, zoo:NAME           a model of :mod:`~advmoe_deploy.zoo.places`
hub:USER/NAME[@REVISION] a repository of the Hugging Face hub, downloaded if need be
"""

import os
from pathlib import Path

from advmoe_deploy.bundle import MANIFEST, Bundle
from advmoe_deploy.bundle import open_bundle as bundle_at
from advmoe_deploy.errors import LIKELY, BundleError, nearest
from advmoe_deploy.sealing.signature import require_signature
from advmoe_deploy.zoo.places import RUN_MARKER, find, is_plain, names, unknown_model
from advmoe_deploy.zoo.record import read_record

StrPath = str | os.PathLike[str]

_ZOO, _HUB = "zoo:", "hub:"


def resolve(source: StrPath) -> Path:
    """Return the folder of the run or bundle that ``source`` names.

    A path comes back as it is, whether or not something is there: who reads it says what is wrong.
    A run that has a record comes back only if that can be read.

    Raises:
        UsageError: no model has that name, or it is not of the form ``hub:USER/NAME``.
        InputError: the repository does not exist, may not be read, or holds nothing of ours; what
            came from it, or a record, is damaged.
        MachineError: the hub cannot be reached, or the disk is full.
        BackendUnavailableError: the client of the hub is not installed.
    """
    found = _folder_of(source)
    if _is_run(found):
        read_record(found)
    return found


def _folder_of(source: StrPath) -> Path:
    text = os.fspath(source)
    if text.startswith(_HUB):
        from advmoe_deploy.zoo.download import download

        return download(text.removeprefix(_HUB))
    name = text.removeprefix(_ZOO)
    if text == name and (Path(text).exists() or not is_plain(name)):
        return Path(source)
    if found := find(name):
        return found
    # A path that is not there is called a misspelt model only if it is very like one.
    if text != name or nearest(name, names(), cutoff=LIKELY):
        raise unknown_model(name)
    return Path(source)


def _is_run(found: Path) -> bool:
    return not (found / MANIFEST).is_file() and (found / RUN_MARKER).is_file()


def place_for(source: StrPath, found: Path, kind: str, own: Path) -> Path:
    """Return where what is made of ``source`` goes unless told: a bundle, an analysis, a report.

    Of a path that is ``own``; of a model with a name ``NAME-KIND`` in the current folder, for the
    package and the caches are not the user's to write to. ``found`` is what :func:`resolve` gave.
    """
    return own if found == Path(source) else Path(f"{name_of(source)}-{kind}")


def name_of(source: StrPath) -> str:
    """Return the name alone: of ``zoo:NAME`` and ``hub:USER/NAME@REVISION`` NAME, of a path its."""
    text = os.fspath(source)
    if text.startswith(_HUB):
        return text.partition("@")[0].rpartition("/")[2]
    return text.removeprefix(_ZOO) if text.startswith(_ZOO) else Path(text).resolve().name


def require_bundle(source: StrPath, found: Path) -> Path:
    """Return ``found`` unless it is a run, where a bundle is asked for.

    Raises:
        BundleError: it is a run.
    """
    if _is_run(found):
        raise BundleError(
            f"{os.fspath(source)} is a run, where a bundle is needed; make one of it: "
            f"advmoe export {os.fspath(source)} --format onnx"
        )
    return found


def open_bundle(path: StrPath, *, signed_by: StrPath | None = None) -> Bundle:
    """Return the bundle at ``path`` after checking the hash of every file.

    ``path`` may be a name, as :func:`resolve` takes it; ``signed_by`` is the public key of whoever
    must have signed the bundle.

    Raises:
        InputError: something is missing, changed, not listed, not signed or of another version.
        UsageError: no bundle has that name.
    """
    bundle = bundle_at(require_bundle(path, resolve(path)))
    return require_signature(bundle, Path(signed_by)) if signed_by else bundle


def opened(bundle: Bundle | StrPath) -> Bundle:
    """Return ``bundle``, opened if it is a path or a name."""
    return bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
