"""Record of a model of the zoo: what is known of it besides its weights, in ``record.json``.

A number never travels alone: images, data, attacks and who measured go with it.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe_deploy.errors import InputError, one_line, reading
from advmoe_deploy.parity.intervals import wilson_interval
from advmoe_deploy.reports import Macs
from advmoe_deploy.specs import Frozen, ThreatModel

RECORD = "record.json"


class Share(Frozen):
    """A share of ``n`` images in [0, 1], with its 95 % interval (Wilson's)."""

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(value: float, n: int) -> "Share":
        """Return the share ``value`` of ``n`` images with its interval."""
        low, high = wilson_interval(round(value * n), n)
        return Share(value=value, low=low, high=high, n=n)


# Attacks that a line of text can name; and AutoAttack's, as they are called with its own steps.
_FEW = 4
_AUTOATTACK = {"apgd-100", "apgd-t-100", "fab-t-100", "square-5000"}


class AttackStep(Frozen):
    """One attack of a suite: its title, and the share that stands after it and those before."""

    title: str
    standing: float


class Evaluation(Frozen):
    """Accuracies on test images, clean and under all ``attacks``, of one file.

    ``weights`` is the SHA-256 of the weights that were measured, empty where the file does not say.
    ``by`` says which command or program measured.
    """

    by: str
    data: str
    threat: ThreatModel
    suite: str = ""
    clean: Share
    robust: Share
    attacks: tuple[AttackStep, ...]
    weights: str = ""

    @property
    def attack_words(self) -> str:
        """The suite or, where it has no name, its attacks; of many their number."""
        if self.suite:
            return f"all {len(self.attacks)} attacks of the suite {self.suite}"
        titles = [step.title for step in self.attacks]
        if len(titles) <= _FEW:
            return ", ".join(titles)
        known = ", AutoAttack's four among them" if {*titles} >= _AUTOATTACK else ""
        return f"{len(titles)} attacks{known}"


class Rounding(Frozen):
    """Effect of rounding float32 weights to fp16, measured on ``images`` images of ``data``.

    ``lost`` weights were nearer to zero than fp16 can say, and are zero. The agreements are shares:
    of predictions, and of the routes of the layer where they agree least.
    """

    data: str
    images: int
    lost: int
    max_abs_logit_diff: float
    prediction_agreement: float
    route_agreement: float
    measured_sha256: str

    def sentence(self) -> str:
        """Return what was found, for a card."""
        lost = f"; {self.lost:,} weights became zero" if self.lost else ""
        return (
            f"Rounded from float32 to fp16{lost}. On {self.images} images of {self.data}, "
            f"{100 * self.prediction_agreement:.4g} % of the predictions and "
            f"{100 * self.route_agreement:.4g} % of the routes are those of the float32 weights; "
            f"logits differ by at most {self.max_abs_logit_diff:.2g}."
        )


class ModelRecord(Frozen):
    """``data`` is the data set it was trained on, ``licence`` that of the weights, if stated.

    ``rounding`` is there if the weights were stored in fp16; ``evaluations`` are of these weights,
    or of those before rounding.
    """

    version: int = 1
    data: str
    licence: str = ""
    macs: Macs
    rounding: Rounding | None = None
    evaluations: tuple[Evaluation, ...] = ()


def read_record(folder: Path) -> ModelRecord | None:
    """Return the record of the model in ``folder``, ``None`` if it has none.

    Raises:
        InputError: it cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return ModelRecord.model_validate(read_fields(file))
    except ValidationError as error:
        raise InputError(f"{file}: {one_line(error)}; add the model again") from None


def read_fields(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        InputError: it holds none.
    """
    try:
        with reading(file):
            fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # no text, or lists in lists without end
        raise InputError(f"{file} is no JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file} holds no object; copy it again")
    return fields
