"""Pruning of the experts that no image visits.

Unused is an expert that none of the images that the export is checked on visits, nor, where labels
and a threat model are known, any hold-out image that was attacked on the whole model: an attack
that moves routes would find the experts that clean images leave alone. The model is built again
with these experts dropped (:class:`~advmoe_deploy.specs.ModelSpec`), so that reference, checks and
attacks judge what is shipped. Its weights stay whole.
"""

from collections.abc import Sequence

import numpy as np

from advmoe_deploy.data.dataset import Dataset, to_float
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.precision.attacked import GATE_IMAGES, attacked_images
from advmoe_deploy.export.precision.gate import ATTACK
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.registry import build_model
from advmoe_deploy.parity.answers import Answers, Images
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.progress import Progress
from advmoe_deploy.pruning import Pruning
from advmoe_deploy.specs import AttackSpec, ModelSpec, ThreatModel


def without_unused(
    model: Classifier,
    images: Images,
    *,
    data: str,
    labelled: Dataset | None,
    threat: ThreatModel | None,
    progress: Progress,
) -> tuple[Classifier, Pruning | None]:
    """Return ``model`` without the experts that it does not use, and what that means.

    Where there is nothing to leave out, that is ``model`` itself and nothing, and a note says why.

    Args:
        model: in eval mode.
        images: float32 images [N, C, H, W] in [0, 1] of ``data``.
        data: where they come from.
        labelled: the data set whose hold-out is attacked, if there is one.
        threat: how, if that is known.
        progress: who listens.

    Raises:
        UsageError: ``data`` is noise, which says nothing about what is used.
    """
    if data.startswith("random:"):
        raise UsageError(
            f"--prune-unused asks which experts the data visits, and {data} is noise; pass --data "
            "with a data set"
        )
    if any(rule.weighting == "probability" for rule in model.rules):
        progress.note(
            "prune_unused declined: weights are shares of the softmax over all experts, so that "
            "those that no image visits count, too"
        )
        return model, None
    found = [images]
    answers = [reference_answers(model, images)]
    attacked, attack = None, _attack_on(model)
    if labelled is not None and threat is not None and _unused(model, answers):
        split = labelled.holdout.first(GATE_IMAGES)
        images_NCHW = to_float(split.images)
        attacked = attacked_images(
            model, images_NCHW, split.labels, threat, attacks=(attack,), progress=progress
        )
    if attacked is not None:
        found.append(attacked)
        answers.append(reference_answers(model, attacked))
    dropped = _unused(model, answers)
    if not dropped:
        progress.note("prune_unused: no expert is unused, so nothing was left out")
        return model, None
    pruned = _rebuilt(model, dropped)
    return pruned, Pruning(
        dropped=dropped,
        data=data,
        images=len(images),
        attacked_data=labelled.source if labelled and attacked is not None else None,
        attacked_images=0 if attacked is None else len(attacked),
        attack=None if attacked is None else attack,
        epsilon=threat.epsilon if threat and attacked is not None else None,
        max_abs_logit_diff=_difference(pruned, found, answers),
    )


def _attack_on(model: Classifier) -> AttackSpec:
    """Return an attack whose gradient enters the routers, hard ones included."""
    hard = any(rule.weighting == "one" for rule in model.rules)
    return ATTACK.model_copy(update={"target": "straight-through"}) if hard else ATTACK


def _unused(model: Classifier, answers: Sequence[Answers]) -> dict[str, tuple[int, ...]]:
    """Return by layer the experts that no row of ``answers`` visits; no layer without any."""
    unused = {}
    for rule in model.rules:
        load_E = np.sum([each.routes[rule.layer].expert_load for each in answers], axis=0)
        unused[rule.layer] = tuple(int(expert) for expert in np.flatnonzero(load_E == 0))
    return {layer: experts for layer, experts in unused.items() if experts}


def _rebuilt(model: Classifier, dropped: dict[str, tuple[int, ...]]) -> Classifier:
    fields = {**model.spec.model_dump(), "dropped_experts": dropped}
    pruned = build_model(ModelSpec.model_validate(fields))
    pruned.load_state_dict(model.state_dict())
    return pruned.eval()


def _difference(pruned: Classifier, found: Sequence[Images], answers: Sequence[Answers]) -> float:
    """Return the largest difference of logits from ``answers``, those of the whole model."""
    differences = (
        np.abs(reference_answers(pruned, images).logits - before.logits).max(initial=0.0)
        for images, before in zip(found, answers, strict=True)
    )
    return float(max(differences))
