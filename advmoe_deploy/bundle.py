"""Bundle: the one directory that crosses from export to runtime.

    manifest.json          plan, spec, decoding, parity, and the SHA-256 of every file below
    manifest.sha256        guards the manifest itself, against accident; not against an attacker;
                           for the instant in which a card is replaced, the old and the new of both
    manifest.sig           its signature, if it was signed (sealing/signature.py)
    model.onnx             the whole model in one graph
    segments/              one dense graph per segment of the plan
    engines/               BACKEND-PRECISION/: graphs or engines written for a backend, a precision
    reference.safetensors  the torch weights that ``verify`` attacks
    baselines/             dense, S-Dense and unfused graphs that ``profile`` times
    MODEL_CARD.md          what this model is, for people
    golden.npz             inputs and the reference's answers, routes by layer

Opening a bundle checks every hash before any of its files is handed out, and refuses links and
files that are not listed. A file that is loaded later is read once and hashed as it is handed out,
so that it does not matter who writes to the folder meanwhile.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from advmoe_deploy.decoding import ModelDecoding
from advmoe_deploy.errors import OR_A_MODEL, BundleError, missing_folder, one_line, reading
from advmoe_deploy.files import sha256_of
from advmoe_deploy.plan import Plan
from advmoe_deploy.pruning import Pruning
from advmoe_deploy.reports import Calibration, Macs, ParityReport, PrecisionReport
from advmoe_deploy.reports.cautions import of_export
from advmoe_deploy.reports.devices import Device, RtxDevice
from advmoe_deploy.sealing.files import (
    Sealed,
    is_plain,
    read_at_most,
    read_regular,
    require_alone,
)
from advmoe_deploy.sealing.graphs import self_contained
from advmoe_deploy.specs import (
    Backend,
    ClassNames,
    ComputeDtype,
    Fingerprint,
    Frozen,
    ModelSpec,
    Precision,
    ThreatModel,
)

SCHEMA_VERSION = 5
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
SIGNATURE = "manifest.sig"
MODEL = "model.onnx"
REFERENCE = "reference.safetensors"
GOLDEN = "golden.npz"
CARD = "MODEL_CARD.md"
# Bytes; of what is read before any hash is known.
_MOST_OF_MANIFEST, _MOST_OF_HASHES, _MOST_OF_CARD = 64 << 20, 4096, 16 << 20
# What ``export --format`` calls the backends.
FORMATS: dict[Backend, str] = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "trt",
    "tensorrt-rtx": "trt-rtx",
}


class FileRecord(Frozen):
    """Hash and size of one file of the bundle."""

    sha256: str
    bytes: int


class EngineSet(Frozen):
    """Graphs or engines of one backend at one precision, and what was measured of them.

    ``plan`` joins as few graphs as its precisions allow; ``compute_dtypes`` is what each of them
    computes in, quantised parts aside. ``segments`` says at which precision each segment of the
    bundle's own plan is run there, and ``files`` where those that had to be rewritten are.
    ``check`` is what the export measured, at fp32 nothing but ``parity``; ``calibration`` is what
    int8 scales were taken from. ``device`` is what engines were built for, where they are tied to
    one; TensorRT graphs that were not built yet have none.
    """

    backend: Backend
    precision: Precision
    plan: Plan
    device: Device | None = None
    compute_dtypes: dict[str, ComputeDtype]
    segments: dict[str, Precision]
    files: dict[str, str] = Field(default_factory=dict)
    parity: ParityReport
    check: PrecisionReport | None = None
    calibration: Calibration | None = None

    @property
    def name(self) -> str:
        """Name to pass as an engine to run it."""
        return f"{self.backend}:{self.precision}"

    @property
    def is_built(self) -> bool:
        """True if it runs as it is: TensorRT graphs without a device have to be built first."""
        return self.backend != "tensorrt" or self.device is not None

    def findings(self) -> list[str]:
        """Return what was measured, a sentence each."""
        device = self.device
        lines = [] if self.is_built else ["to be built on a GPU; measured in ONNX Runtime instead"]
        if device is not None:
            lines = [f"for {device.description}"]
            if isinstance(device, RtxDevice):
                lines.append("compiled without a GPU; measured in ONNX Runtime instead")
            lines += ["fp32 is rounded to TF32"] if device.tf32 else []
            if self.parity.data == GOLDEN:
                lines.append(
                    f"built of the bundle's graphs and checked on the {self.parity.images} images "
                    "that travel with it, none of them attacked"
                )
        int8 = [name for name, precision in self.segments.items() if precision == "int8"]
        if any(self.compute_dtypes.get(name) == "fp16" for name in int8):
            lines.append("what int8 leaves unquantised is fp16")
        return lines + self._measured()

    def _measured(self) -> list[str]:
        parity, check = self.parity, self.check
        agree = f"{100 * parity.route_agreement:.4g} % of the clear routes agree"
        agree += f" (limit: {100 * check.least_route_agreement:.4g} %)" if check else ""
        routes = f"{agree}, of {parity.close_calls} close calls {parity.close_flips} went otherwise"
        if check is None:
            return [f"logits differ by {parity.max_relative_logit_diff:.2g} at most; {routes}"]
        lines = [f"{routes}; {100 * check.prediction_agreement:.4g} % of the predictions agree"]
        lines += check.findings()
        lines += [f"{n} stays in {self.segments[n]}: {why}" for n, why in check.raised.items()]
        if self.calibration:
            lines.append(self.calibration.sentence())
        return lines


class BundleManifest(Frozen):
    """Contents of a bundle; ``files`` maps relative POSIX paths to their hashes.

    ``decoding`` is how image files are read for the model; ``pruning`` says which experts were left
    out, ``None`` if none were; ``denormal_weights`` how many weights were denormal numbers and are
    zeros here. It runs on ``made_for`` in ``precision`` unless told otherwise; bundles written
    before that was recorded have none.
    """

    schema_version: int
    created: str
    producer: str
    model: ModelSpec
    decoding: ModelDecoding
    threat: ThreatModel | None
    precision: Precision
    made_for: Backend | None = None
    plan: Plan
    engines: tuple[EngineSet, ...] = ()
    macs: Macs
    parity: ParityReport
    pruning: Pruning | None = None
    denormal_weights: int = 0
    class_names: ClassNames
    training: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Content of the data that the model was trained on, if it is recorded."""
        found = self.training.get("fingerprint")
        return Fingerprint.model_validate(found) if found else None

    @property
    def data(self) -> str:
        """The data source that the model was trained on; empty if unknown."""
        return str(self.training.get("data", ""))

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if not is_plain(name):
                raise ValueError(
                    f"{name[:80]!a} may lead outside the bundle, or is no plain name; do not use "
                    "this bundle"
                )
        return files


class Bundle:
    """A bundle on disk whose every file has the hash its manifest says."""

    def __init__(
        self, path: Path, manifest: BundleManifest, manifest_file: bytes | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        # What stood in the file when it was hashed and parsed: what a signature has to be of.
        self.manifest_text = manifest_file or manifest_text(manifest)

    def file(self, name: str) -> Path:
        """Return the path of a listed file, for people; :meth:`read` is for what is loaded.

        Raises:
            BundleError: the manifest does not list ``name``.
        """
        self._record(name)
        return self.path / name

    def read(self, name: str) -> bytes:
        """Return the content of a listed file, read once: these bytes are the ones that are hashed.

        Raises:
            BundleError: the manifest does not list ``name``, or it is not what was exported.
        """
        record = self._record(name)
        with reading(self.path / name):
            content = read_regular(self.path / name, record.bytes)
        if content is None or hashlib.sha256(content).hexdigest() != record.sha256:
            raise _changed(self.path, name)
        return content

    def sealed(self, name: str) -> Sealed:
        """Return a listed file that is loaded later."""
        return Sealed(self.file(name), lambda: self.read(name))

    def graph(self, name: str) -> Sealed:
        """Return a listed ONNX graph that is loaded later; its data come with it."""
        return Sealed(self.file(name), lambda: self_contained(self.read(name), name, self._beside))

    def _beside(self, name: str) -> bytes | None:
        return self.read(name) if self.has(name) else None

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}; export it again")
        return self.manifest.files[name]

    def has(self, name: str) -> bool:
        """Return whether the manifest lists ``name``."""
        return name in self.manifest.files

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of what is hardly wanted, though no error: see :mod:`reports.cautions`."""
        return of_export(self.manifest.macs, self.manifest.parity)

    @property
    def identity(self) -> str:
        """SHA-256 of all that its answers depend on: of the manifest without the card."""
        files = {n: record for n, record in self.manifest.files.items() if n != CARD}
        manifest = self.manifest.model_copy(update={"files": files})
        return hashlib.sha256(manifest_text(manifest)).hexdigest()

    def engine_set(self, backend: Backend, precision: Precision) -> EngineSet | None:
        """Return what was written for ``backend`` at ``precision``; what is built comes first."""
        found = [
            e for e in self.manifest.engines if (e.backend, e.precision) == (backend, precision)
        ]
        return next(iter(sorted(found, key=lambda each: not each.is_built)), None)


def open_bundle(path: Path) -> Bundle:
    """Return the bundle at ``path`` after checking the hash of the manifest and of every file.

    Raises:
        BundleError: something is missing, changed, not listed, a link, or of another version.
    """
    text, hashes = _read_manifest(path)
    manifest = _parse_manifest(path, text)
    require_alone(path, {*manifest.files, MANIFEST, MANIFEST_HASH, SIGNATURE})
    for name, record in manifest.files.items():
        _check_file(path, name, record, hashes)
    return Bundle(path, manifest, text)


def manifest_text(manifest: BundleManifest) -> bytes:
    """Return what stands in the file of ``manifest``."""
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def hash_line(name: str, content: bytes) -> bytes:
    """Return the line of ``manifest.sha256`` for a file of that content."""
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode("ascii")


def _read_manifest(path: Path) -> tuple[bytes, list[bytes]]:
    """Return what stands in the manifest, and the lines that guard it."""
    if not path.is_dir():
        way_out = f"name a bundle that 'advmoe export' wrote, {OR_A_MODEL}"
        if path.exists():
            raise BundleError(f"{path} is no directory; {way_out}")
        raise BundleError(missing_folder(path, "bundle", way_out))
    with reading(path / MANIFEST):
        text = read_at_most(path / MANIFEST, _MOST_OF_MANIFEST)  # once: what is parsed was hashed
    with reading(path / MANIFEST_HASH):
        guard = read_at_most(path / MANIFEST_HASH, _MOST_OF_HASHES)
    if text is None or guard is None:
        raise BundleError(
            f"{path} has no {MANIFEST} with its {MANIFEST_HASH}, or they are no files of such; "
            "export it again"
        )
    hashes = guard.splitlines(keepends=True)
    if hash_line(MANIFEST, text) not in hashes:
        raise _changed(path, f"{MANIFEST} or {MANIFEST_HASH}")
    return text, hashes


def _parse_manifest(path: Path, text: bytes) -> BundleManifest:
    try:
        fields = json.loads(text)
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, this release reads {SCHEMA_VERSION}; "
                "export it again"
            )
        json.dumps(fields, ensure_ascii=False).encode()  # half a character has no bytes
        return BundleManifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {one_line(error)}; export it again") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is not JSON ({error}); export it again") from None


def _check_file(path: Path, name: str, record: FileRecord, hashes: list[bytes]) -> None:
    file = path / name
    if not file.is_file():
        raise BundleError(f"{path}: {name} is missing; copy the bundle again or export it again")
    same = file.stat().st_size == record.bytes and sha256_of(file) == record.sha256
    # The new card of card.py, whose manifest was about to follow, is as good.
    if same:
        return
    card = read_at_most(file, _MOST_OF_CARD) if name == CARD else None
    if card is None or hash_line(CARD, card) not in hashes:
        raise _changed(path, name)


def _changed(path: Path, name: str) -> BundleError:
    return BundleError(
        f"{path}: {name} is not what was exported (SHA-256 differs); "
        "copy the bundle again or export it again"
    )
