"""File of adversarial examples: what each test image fell to first, and everything to check it.

    images                 float32 [N, C, H, W] in [0, 1]; the clean image where nothing broke it
    labels                 int64 [N]
    clean_right_reference  bool [N], and clean_right_engine: right about the clean image
    attack                 int64 [N]: which attack of the header broke it first, -1 none
    fooled_reference       bool [N], and fooled_engine: an attack changed the right answer
    header                 a 0-d string of JSON, see :class:`Header`

Nothing in it is pickled. Shapes: N images, C channels, H height, W width.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from advmoe_deploy.bundle import REFERENCE, Bundle
from advmoe_deploy.errors import DataError, one_line, reading
from advmoe_deploy.files import write_output
from advmoe_deploy.parity.answers import Images, Labels
from advmoe_deploy.reports.versions import installed_versions
from advmoe_deploy.specs import AttackSpec, Frozen, Precision, ThreatModel
from advmoe_deploy.verify.report import FoundOn, RobustReport
from advmoe_deploy.verify.trial import Sides, Trial

# What float32 may add to a pixel that lies on the edge of the ball.
SLACK = 1e-6
_HEADER = "header"
_FLAGS = ("clean_right_reference", "clean_right_engine", "fooled_reference", "fooled_engine")
_KINDS: Mapping[str, type[np.generic]] = {
    "images": np.float32,
    "labels": np.int64,
    "attack": np.int64,
    **dict.fromkeys(_FLAGS, np.bool_),
}


class Search(Frozen):
    """One attack, seed included, and whose answers it looked for mistakes in."""

    attack: AttackSpec
    found_on: FoundOn


class Header(Frozen):
    """Header of stored examples; ``model`` is the SHA-256 of the torch weights.

    ``same_function`` says that the engine was shown to answer as the reference does.
    """

    format: Literal[1] = 1
    attacks: tuple[Search, ...]
    threat: ThreatModel
    engine: str
    precision: Precision
    tf32: bool
    same_function: bool
    data: str
    model: str
    versions: dict[str, str]


@dataclass(frozen=True)
class StoredExamples:
    """Examples as they are in the file, checked against nothing but themselves."""

    header: Header
    images_NCHW: Images
    labels_N: Labels
    attack_N: NDArray[np.int64]
    clean: Sides
    fooled: Sides

    @property
    def standing(self) -> Sides:
        """Images [N] that no attack turned: right about the clean one, and not fooled."""
        clean, fooled = self.clean, self.fooled
        return Sides(
            clean.reference_N & ~fooled.reference_N,
            clean.engine_N & ~fooled.engine_N,
        )

    def require_of(self, x_NCHW: Images, labels_N: Labels, where: Path) -> None:
        """Raise :class:`DataError` unless these are examples of clean images ``x_NCHW`` [N].

        ``where`` is the file, for the message.
        """
        if self.images_NCHW.shape != x_NCHW.shape:
            shapes = f"images {self.images_NCHW.shape}, the test images are {x_NCHW.shape}"
            raise DataError(f"{where}: {shapes}; pass the data they were made of with --data")
        if not np.array_equal(self.labels_N, labels_N):
            first = int(np.flatnonzero(self.labels_N != labels_N)[0])
            raise DataError(f"{where}: image {first} has another label; pass its data with --data")
        distance_N = np.abs(self.images_NCHW - x_NCHW).reshape(len(x_NCHW), -1).max(axis=1)
        epsilon = self.header.threat.epsilon
        if float(distance_N.max()) > epsilon + SLACK:
            worst = int(distance_N.argmax())
            raise DataError(
                f"{where}: image {worst} is {distance_N[worst]:.6g} from the clean one, epsilon is "
                f"{epsilon:.6g}; it belongs to other data, or was changed"
            )


def write_examples(path: Path, trial: Trial, report: RobustReport, bundle: Bundle) -> None:
    """Write the examples of ``trial``, of which ``report`` tells, to ``path``, whole or not."""
    consistency = report.consistency
    header = Header(
        attacks=tuple(Search(attack=o.attack, found_on=o.found_on) for o in trial.outcomes),
        threat=trial.threat,
        engine=report.engine,
        precision=report.precision,
        tf32=report.tf32,
        same_function=consistency.same_function,
        data=report.data,
        model=bundle.manifest.files[REFERENCE].sha256,
        versions=installed_versions(),
    )
    clean, fooled = trial.clean, trial.examples.fooled
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=trial.examples.images_NCHW.astype(np.float32, copy=False),
        labels=trial.labels_N.astype(np.int64, copy=False),
        attack=trial.examples.attack_N.astype(np.int64, copy=False),
        clean_right_reference=clean.reference_N,
        clean_right_engine=clean.engine_N,
        fooled_reference=fooled.reference_N,
        fooled_engine=fooled.engine_N,
        header=np.array(header.model_dump_json()),
    )
    write_output(path, buffer.getvalue())


def read_examples(path: Path) -> StoredExamples:
    """Return the examples of the file at ``path``.

    Raises:
        DataError: it is no such file, damaged, or contradicts itself.
    """
    try:
        with reading(path), path.open("rb") as opened:
            values = npz_arrays(opened, (*_KINDS, _HEADER))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).strip("'\"").splitlines()[0] if str(error) else "it ends too early"
        raise _bad(path, reason) from None
    header = _header(path, values)
    _check(path, values, header)
    return StoredExamples(
        header=header,
        images_NCHW=values["images"],
        labels_N=values["labels"],
        attack_N=values["attack"],
        clean=Sides(values["clean_right_reference"], values["clean_right_engine"]),
        fooled=Sides(values["fooled_reference"], values["fooled_engine"]),
    )


def npz_arrays(opened: BinaryIO, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` file, those of ``names`` or all of them; none is a pickle.

    Raises:
        ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error: it is none, or damaged.
    """
    if opened.read(2) != b"PK":  # what NumPy would take for a pickle
        raise ValueError("it is no .npz file")
    opened.seek(0)
    with np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in (file.files if names is None else names)}


def _header(path: Path, values: Mapping[str, NDArray[Any]]) -> Header:
    text = values[_HEADER]
    if text.shape != () or text.dtype.kind != "U":
        raise _bad(path, f"its header is {text.dtype} {text.shape}, not one string")
    try:
        return Header.model_validate(json.loads(str(text)))
    except ValidationError as error:
        raise _bad(path, f"its header says {one_line(error)}") from None
    except ValueError as error:
        raise _bad(path, f"its header is no JSON: {error}") from None


def _check(path: Path, values: Mapping[str, NDArray[Any]], header: Header) -> None:
    images, attack_N = values["images"], values["attack"]
    for name, kind in _KINDS.items():
        shape, expected = values[name].shape, images.shape[:1]
        if values[name].dtype != kind:
            raise _bad(path, f"{name} is {values[name].dtype}, not {np.dtype(kind)}")
        if (images.ndim != 4 or not images.size) if name == "images" else shape != expected:
            raise _bad(path, f"{name} has shape {shape}; expected {_expected(name, expected)}")
    if not np.isfinite(images).all():
        raise _bad(path, "images holds NaN or infinity")
    if images.min() < -SLACK or images.max() > 1 + SLACK:
        raise _bad(path, f"images reach {images.min():.4g} to {images.max():.4g}, not 0 to 1")
    if attack_N.min() < -1 or attack_N.max() >= len(header.attacks):
        raise _bad(path, f"attack names one that is not among the {len(header.attacks)}")
    fooled_N = values["fooled_reference"] | values["fooled_engine"]
    if (fooled_N != (attack_N >= 0)).any():
        first = int(np.flatnonzero(fooled_N != (attack_N >= 0))[0])
        raise _bad(path, f"image {first} is fooled by no attack, or attacked and not fooled")
    for side in ("reference", "engine"):
        if (values[f"fooled_{side}"] & ~values[f"clean_right_{side}"]).any():
            raise _bad(path, f"fooled_{side} counts images that were wrong before any attack")


def _expected(name: str, expected: tuple[int, ...]) -> str:
    return "[N, C, H, W]" if name == "images" else str(expected)


def _bad(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}; write it again with advmoe verify --save-examples")
