"""Baseline of a gate: the entry of a robustness report, and the examples beside it, if any.

RobustBench's own entries will do: figures alone, with which nothing can be paired or replayed.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe_deploy.errors import DataError, one_line, reading
from advmoe_deploy.verify.examples.entry import Robustness
from advmoe_deploy.verify.examples.stored import StoredExamples, read_examples
from advmoe_deploy.verify.suites import Suite

_ENTRY = "report.json"


@dataclass(frozen=True)
class Baseline:
    """Baseline of a gate: shares in [0, 1], an l-inf radius in [0, 1] pixels.

    ``images`` is ``None`` where nobody says of how many images the shares are; ``examples`` where
    there are none, and ``note`` says why. ``suite`` is what it was attacked with, if that is known.
    """

    name: str
    clean: float
    robust: float
    epsilon: float
    images: int | None
    examples: StoredExamples | None
    path: Path
    suite: Suite | None = None
    note: str = ""


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in the JSON file at ``path``, or in the folder that ``report`` wrote.

    Raises:
        DataError: it is no entry, or the examples beside it are damaged or of another model.
    """
    path = path / _ENTRY if path.is_dir() else path
    entry = _json(path)
    if "advmoe" in entry:
        return _of_report(path, entry)
    named = [entry.get(key) for key in ("robust_acc", "autoattack_acc")]
    robust = next((value for value in named if value is not None), None)
    return Baseline(
        name=str(entry.get("model_name") or entry.get("name") or path.stem),
        clean=_share(path, "clean_acc", entry.get("clean_acc")),
        robust=_share(path, "autoattack_acc", robust),
        epsilon=_radius(path, entry.get("eps")),
        images=None,
        examples=None,
        path=path,
        note="the baseline has figures only: nothing is replayed, they are taken as exact",
    )


def _of_report(path: Path, entry: dict[str, Any]) -> Baseline:
    try:
        measured = Robustness.model_validate(entry["advmoe"])
    except ValidationError as error:
        raise DataError(f"{path}: {one_line(error)}; write it again with advmoe report") from None
    if not measured.engines:
        raise DataError(f"{path}: it tells of no engine; write it again with advmoe report")
    report = measured.engines[0]
    examples = _examples(path, measured)
    return Baseline(
        name=measured.bundle,
        clean=report.clean_accuracy.engine,
        robust=report.robust_accuracy.engine,
        epsilon=report.threat.epsilon,
        images=report.images,
        examples=examples,
        path=path,
        suite=measured.suite,
        note=""
        if examples
        else "no examples.npz beside the baseline: nothing is replayed or paired",
    )


def _examples(path: Path, measured: Robustness) -> StoredExamples | None:
    # The name alone: a report of somebody else may not lead elsewhere.
    file = path.with_name(Path(next(iter(measured.examples), "examples.npz")).name)
    if not file.exists():
        return None
    examples, report = read_examples(file), measured.engines[0]
    header = examples.header
    if (header.model, header.engine) != (measured.model, report.engine):
        raise DataError(
            f"{file} is of another model or engine than {path}; keep what belongs together"
        )
    if len(examples.labels_N) != report.images or header.threat != report.threat:
        raise DataError(
            f"{file} is of other images or another epsilon than {path}; write both again"
        )
    return examples


def _json(path: Path) -> dict[str, Any]:
    with reading(path):
        content = path.read_bytes()
    try:
        entry = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is no JSON; name the report.json of advmoe report") from None
    if not isinstance(entry, dict):
        raise DataError(f"{path} holds no JSON object; name the report.json of advmoe report")
    return entry


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # 1e999 is one of those as well
        raise ValueError(f"{text} is no number")
    return number


def _share(path: Path, name: str, value: object) -> float:
    """Return a share in [0, 1] of a figure in percent, a number or its text."""
    try:
        percent = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        percent = math.nan
    if not 0 <= percent <= 100:
        raise DataError(f"{path}: {name} is {value!r}, no percentage from 0 to 100")
    return percent / 100


def _radius(path: Path, value: object) -> float:
    """Return the radius that ``0.03``, ``"0.03"`` or ``"8/255"`` is."""
    try:
        radius = float(Fraction(value) if isinstance(value, str) else float(str(value)))
    except (ValueError, ZeroDivisionError, OverflowError):
        radius = math.nan
    if not 0 < radius <= 1:
        raise DataError(f"{path}: eps is {value!r}, no l-inf radius in (0, 1] such as 8/255")
    return radius
