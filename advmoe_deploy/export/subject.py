"""Subject of an export: the model, its parts and everything that its engines are measured on."""

from dataclasses import dataclass, field

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.export.partition.cut import Partition
from advmoe_deploy.export.precision.attacked import with_accuracy
from advmoe_deploy.export.precision.gate import AccuracyGate, AnsweredImages
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.golden import golden_rows
from advmoe_deploy.parity.reference import Reference
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.specs import ThreatModel

# Images that each expert is forced on.
_FEW = 16


@dataclass(frozen=True)
class Subject:
    """The torch model, its plan in fp32, and what it is examined on.

    ``labelled`` has the images that int8 is calibrated on, ``threat`` how they are attacked;
    ``progress`` hears of the attacks.
    """

    reference: Reference
    parts: Partition
    gate: AccuracyGate
    few: Images
    labelled: Dataset | None
    threat: ThreatModel | None
    progress: Progress = field(default_factory=Silent)


def subject_of(
    model: Classifier,
    parts: Partition,
    parity: AnsweredImages,
    *,
    data: str,
    labelled: Dataset | None,
    threat: ThreatModel | None,
    progress: Progress | None = None,
) -> Subject:
    """Return what is exported; ``parity`` is of images from ``data``.

    With ``labelled``, accuracy is measured on its hold-out, clean and under ``threat``.
    """
    reference = Reference(model)
    few = parity.images[golden_rows(parity.answers)][:_FEW]
    uncertain = reference.uncertainty(few)
    gate = AccuracyGate(parity, data, uncertain.rounding, uncertain.margin)
    if labelled is not None:
        gate = with_accuracy(gate, model, labelled, threat, progress)
    return Subject(reference, parts, gate, few, labelled, threat, progress or Silent())
