"""Sections of an analysis: their names, and which of them a model can have."""

from typing import Literal, get_args

from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier

Section = Literal[
    "routes", "changes", "experts", "lipschitz", "certificate", "radii", "capacity", "smoothing"
]
SECTIONS: tuple[Section, ...] = get_args(Section)
ON_REQUEST: tuple[Section, ...] = ("radii", "capacity", "smoothing")  # for they take time
DENSE_SECTIONS: tuple[Section, ...] = ("lipschitz", "certificate", "smoothing")


def sections_for(
    model: Classifier, wanted: tuple[Section, ...] | None, also: tuple[Section, ...] = ()
) -> tuple[Section, ...]:
    """Return the sections to run on ``model``: those ``wanted``, and ``also`` these.

    By default all are wanted but those that are only run on request.

    Raises:
        UsageError: a section is about routes and the model has none.
    """
    possible = SECTIONS if model.rules else DENSE_SECTIONS
    if wanted is None:
        wanted = tuple(section for section in possible if section not in ON_REQUEST)
    for section in (*wanted, *also):
        if section not in possible:
            raise UsageError(
                f"{section} needs a router; of a dense model {', '.join(DENSE_SECTIONS)} "
                "can be analysed"
            )
    return tuple(section for section in SECTIONS if section in {*wanted, *also})
