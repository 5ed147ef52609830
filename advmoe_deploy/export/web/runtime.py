"""ONNX Runtime Web: the one release that pages run on, and its files out of npm's package."""

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from advmoe_deploy.errors import BackendUnavailableError, InputError, MachineError, reading

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Member:
    """A file of a package: where it lies there, what a page calls it, and its SHA-256."""

    path: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Release:
    """One version of a package of npm, the hash of its tarball, and the files that pages need.

    ``integrity`` is as npm's lock files spell it: ``sha512-`` and base64.
    """

    package: str
    version: str
    integrity: str
    members: tuple[Member, ...]

    @property
    def spec(self) -> str:
        """Package and version as npm spells them."""
        return f"{self.package}@{self.version}"


# The build for CPUs alone, its loader inside of the script. The suffix .js is one that every web
# server knows the type of.
RELEASE = Release(
    package="onnxruntime-web",
    version="1.30.0",
    integrity=(
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
    ),
    members=(
        Member(
            "dist/ort.wasm.bundle.min.mjs",
            "ort.wasm.bundle.min.js",
            "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
        ),
        Member(
            "dist/ort-wasm-simd-threaded.wasm",
            "ort-wasm-simd-threaded.wasm",
            "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        ),
    ),
)


def runtime_files(given: Path | None = None, release: Release = RELEASE) -> dict[str, bytes]:
    """Return the files of ``release`` by the names that pages use.

    Args:
        given: the tarball that ``npm pack`` makes, or the folder of the installed package; without
            it npm fetches the tarball.
        release: what to take, to the byte.

    Raises:
        InputError: ``given`` is not there, or not that release.
        BackendUnavailableError: npm is needed and not installed.
        MachineError: npm cannot fetch the package.
    """
    if given is None:
        return _fetched(release)
    if given.is_dir():
        return _of_folder(given, release)
    with reading(given):
        content = given.read_bytes()
    return _unpacked(content, str(given), release)


def _fetched(release: Release) -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise BackendUnavailableError(
            f"npm is not installed, which fetches {release.spec}; install it, or {_way(release)}"
        )
    with tempfile.TemporaryDirectory(prefix="advmoe-npm-") as folder:
        command = [npm, "pack", release.spec, "--pack-destination", folder]
        command += ["--ignore-scripts", "--prefer-offline", "--no-update-notifier"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        try:
            done = subprocess.run(  # noqa: S603
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _not_fetched(release, f"no answer in {_TIMEOUT_S} s") from None
        tarballs = list(Path(folder).glob("*.tgz"))
        if done.returncode or not tarballs:
            raise _not_fetched(release, _complaint(done.stderr))
        return _unpacked(tarballs[0].read_bytes(), f"what npm fetched as {release.spec}", release)


def _of_folder(folder: Path, release: Release) -> dict[str, bytes]:
    files = {}
    for member in release.members:
        with reading(folder / member.path):
            content = (folder / member.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != member.sha256:
            raise _other(f"{folder / member.path}", "SHA-256", release)
        files[member.name] = content
    return files


def _unpacked(tarball: bytes, where: str, release: Release) -> dict[str, bytes]:
    """Return the members of a tarball, none of which is read unless the whole has its hash."""
    digest = base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    if f"sha512-{digest}" != release.integrity:
        raise _other(where, "SHA-512", release)
    files = {}
    with tarfile.open(fileobj=BytesIO(tarball), mode="r:gz") as archive:
        for member in release.members:
            file = archive.extractfile(f"package/{member.path}")
            assert file is not None  # what has this hash has this file
            files[member.name] = file.read()
    return files


def _other(where: str, kind: str, release: Release) -> InputError:
    return InputError(
        f"{where} is not {release.package} {release.version} (its {kind} differs); {_way(release)}"
    )


def _not_fetched(release: Release, reason: str) -> MachineError:
    return MachineError(f"npm cannot fetch {release.spec}: {reason}; try again, or {_way(release)}")


def _way(release: Release) -> str:
    return f"pass as --runtime the file that 'npm pack {release.spec}' makes elsewhere"


def _complaint(stderr: str) -> str:
    """Return what npm said, in one line."""
    lines = [line.strip() for line in stderr.splitlines()]
    # Before npm 10.7 it is spelled ERR!, and without node it is not npm that speaks.
    errors = [found[1] for line in lines if (found := re.search("npm (?:error|ERR!) *(.*)", line))]
    said = [line for line in errors or lines if line and not line.startswith("at ")]
    return ", ".join(said)[:200] or "it gave no reason"
