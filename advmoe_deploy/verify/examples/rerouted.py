"""Images that an attack sent to other experts.

Shapes: N images, L layers that route, K experts per row, R rows of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Answers, Images, RouteAnswers
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.specs import Frozen
from advmoe_deploy.verify.examples.stored import StoredExamples


class LayerRoute(Frozen):
    """One layer's experts of one image, clean and attacked; of tokens, the first that changed."""

    layer: str
    clean: tuple[int, ...]
    attacked: tuple[int, ...]
    rows_changed: int
    rows: int


class Rerouted(Frozen):
    """One image whose adversarial example takes another route through the reference.

    ``index`` is its place among the test images; labels are the model's; ``attack`` is the place
    of the attack it fell to first.
    """

    index: int
    label: int
    clean_answer: int
    attacked_answer: int
    attack: int
    layers: tuple[LayerRoute, ...]


@dataclass(frozen=True)
class _Change:
    clean: Answers
    attacked: Answers
    rows: NDArray[np.int64]

    def layers_of(self, place: int) -> tuple[LayerRoute, ...]:
        routes = [
            _layer(name, route, self.attacked.routes[name], place, len(self.rows))
            for name, route in self.clean.routes.items()
        ]
        return tuple(route for route in routes if route.rows_changed)


def rerouted_images(
    model: Classifier, clean_NCHW: Images, examples: StoredExamples
) -> tuple[Rerouted, ...]:
    """Return those of ``examples`` that the reference sends to other experts than the clean image.

    Only images that an attack broke are looked at; the others have no example.
    """
    rows_N = np.flatnonzero(examples.attack_N >= 0)
    if not len(rows_N) or not model.rules:
        return ()
    change = _Change(
        reference_answers(model, clean_NCHW[rows_N]),
        reference_answers(model, examples.images_NCHW[rows_N]),
        rows_N,
    )
    found = [_rerouted(change, place, examples) for place in range(len(rows_N))]
    return tuple(each for each in found if each.layers)


def _rerouted(change: _Change, place: int, examples: StoredExamples) -> Rerouted:
    index = int(change.rows[place])
    return Rerouted(
        index=index,
        label=int(examples.labels_N[index]),
        clean_answer=int(change.clean.logits[place].argmax()),
        attacked_answer=int(change.attacked.logits[place].argmax()),
        attack=int(examples.attack_N[index]),
        layers=change.layers_of(place),
    )


def _layer(
    name: str, clean: RouteAnswers, attacked: RouteAnswers, place: int, images: int
) -> LayerRoute:
    before_RK, after_RK = (
        np.sort(each.expert_ids.reshape(images, -1, each.expert_ids.shape[-1])[place], axis=1)
        for each in (clean, attacked)
    )
    changed_R = (before_RK != after_RK).any(axis=1)
    shown = int(changed_R.argmax())
    return LayerRoute(
        layer=name,
        clean=tuple(before_RK[shown].tolist()),
        attacked=tuple(after_RK[shown].tolist()),
        rows_changed=int(changed_R.sum()),
        rows=len(changed_R),
    )


def moves(rerouted: tuple[Rerouted, ...]) -> Mapping[str, int]:
    """Return how many images changed their route in each layer."""
    counts: dict[str, int] = {}
    for image in rerouted:
        for layer in image.layers:
            counts[layer.layer] = counts.get(layer.layer, 0) + 1
    return counts
