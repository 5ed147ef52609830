"""Packing a run as a model of the zoo: weights, checkpoint, record and card, nothing else.

NAME/model/weights.safetensors   as trained, or rounded to fp16
NAME/model/checkpoint.json       with the hash of these weights
NAME/record.json                 what was measured
NAME/MODEL_CARD.md
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from advmoe_deploy.bundle import CARD
from advmoe_deploy.data.hub import HUB_SETS
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.checks.images import parity_images
from advmoe_deploy.files import refuse_existing, sha256_of, staged_directory
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import (
    CHECKPOINT,
    WEIGHTS,
    Checkpoint,
    load_checkpoint,
)
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.zoo.card import run_card
from advmoe_deploy.zoo.evaluation import read_evaluation
from advmoe_deploy.zoo.places import is_plain
from advmoe_deploy.zoo.record import RECORD, Evaluation, ModelRecord, Rounding, read_record

State = dict[str, Tensor]

_TRAIN_REPORT = "report.json"


@dataclass(frozen=True)
class Packing:
    """Settings of packing: whether to round to fp16, and what goes into record and card.

    ``results`` are files that :func:`~advmoe_deploy.zoo.evaluation.read_evaluation` reads; without
    any, what the run says of itself is taken. ``data`` are the images on which rounding is
    measured, by default the run's own. ``licence`` is that of the weights. ``portable`` leaves out
    where the data lay on this machine, for those who get the model have them elsewhere.
    """

    half: bool = False
    portable: bool = False
    results: tuple[Path, ...] = ()
    data: str | None = None
    licence: str = ""


def pack_run(run: Path, target: Path, how: Packing, *, overwrite: bool = False) -> ModelRecord:
    """Return the record of the model that is written to ``target`` from the one in ``run``.

    Raises:
        UsageError: ``target`` is in the way or no name, results are of other weights, or a weight
            is beyond what fp16 can say.
        CheckpointError: the run's checkpoint cannot be used.
        InputError: a file of results cannot be read.
        DataError: the images to measure rounding on cannot be had.
    """
    if not is_plain(target.name) or ":" in target.name:
        raise UsageError(f"'{target.name}' is no name of a model; use letters, digits and dashes")
    refuse_existing(target, overwrite=overwrite, marker=RECORD)  # which no training run has
    checkpoint, model = load_checkpoint(run / "model")
    with staged_directory(target, overwrite=overwrite) as staged:
        (staged / "model").mkdir()
        stored, rounding = _write_model(staged / "model", run / "model", checkpoint, model, how)
        record = ModelRecord(
            data=_data_name(checkpoint),
            licence=how.licence or _licence_in(run),
            macs=macs_of(checkpoint.model),
            rounding=rounding or _rounding_in(run),
            evaluations=evaluations_of(run, checkpoint, how.results, also=stored.weights_sha256),
        )
        (staged / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (staged / CARD).write_text(run_card(target.name, stored, record), encoding="utf-8")
    return record


def record_of(run: Path, checkpoint: Checkpoint, how: Packing) -> ModelRecord:
    """Return the record of the model in ``run`` as it is, with what ``how`` says of it."""
    return ModelRecord(
        data=_data_name(checkpoint),
        licence=how.licence or _licence_in(run),
        macs=macs_of(checkpoint.model),
        rounding=_rounding_in(run),
        evaluations=evaluations_of(run, checkpoint, how.results),
    )


def evaluations_of(
    run: Path, checkpoint: Checkpoint, results: Sequence[Path], *, also: str = ""
) -> tuple[Evaluation, ...]:
    """Return what ``results`` say of the model, else what the run's own record or report says.

    ``also`` is the SHA-256 of other weights that count as this model's: those after rounding.

    Raises:
        UsageError: a file is about other weights.
        InputError: a file cannot be read.
    """
    data = checkpoint.data
    files = list(results)
    if not files and (known := read_record(run)):
        return known.evaluations
    if not files and (run / _TRAIN_REPORT).is_file():
        files = [run / _TRAIN_REPORT]
    found = tuple(read_evaluation(file, checkpoint.recipe, data) for file in files)
    before = _rounding_in(run)
    own = {"", checkpoint.weights_sha256, also, *([before.measured_sha256] if before else ())}
    for file, evaluation in zip(files, found, strict=True):
        if evaluation.weights not in own:
            raise UsageError(
                f"{file} was measured on weights {evaluation.weights[:12]}, the run has "
                f"{checkpoint.weights_sha256[:12]}; name results of this run"
            )
    return found


def portable(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` without paths of its data, and of the model that it began with.

    Data keep a name that means the same elsewhere. Where a name alone names no data, as of image
    folders, none is left.
    """
    name = _data_name(checkpoint)
    data = name if name == "digits" or name in HUB_SETS else ""
    recipe = {**checkpoint.recipe, "data": name} if "data" in checkpoint.recipe else {}
    provenance = {**checkpoint.provenance, "data": data} if name else checkpoint.provenance
    changes = {
        "recipe": _without_origin(recipe or checkpoint.recipe, "start"),
        "provenance": _without_origin(provenance, "from"),
    }
    return checkpoint.model_copy(update=changes)


def _without_origin(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """Return ``fields`` without the place of the model at ``key``, which its hash tells as well."""
    if not (start := fields.get(key)):
        return fields
    is_public = start["source"].startswith(("zoo:", "hub:"))
    start = {**start, "path": "", "source": start["source"] if is_public else ""}
    told = {k: text for k, text in fields.get("chosen", {}).items() if k != "from"}
    return {**fields, key: start, **({"chosen": told} if "chosen" in fields else {})}


def checkpoint_text(checkpoint: Checkpoint) -> bytes:
    """Return ``checkpoint`` as its file holds it."""
    return (checkpoint.model_dump_json(indent=2) + "\n").encode()


def rounded(state: State) -> State:
    """Return ``state`` with its floating tensors in fp16.

    Raises:
        UsageError: a value is beyond the largest that fp16 can say.
    """
    largest = torch.finfo(torch.float16).max
    for name, tensor in state.items():
        if tensor.is_floating_point():
            half = tensor.to(torch.float16)
            if bool(half.isinf().any()):
                count, most = int(half.isinf().sum()), float(tensor.abs().max())
                raise UsageError(
                    f"{name} holds {count} values beyond {largest:g}, the largest of fp16 "
                    f"(up to {most:.4g}); leave --fp16 out"
                )
    return {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in state.items()}


def _write_model(
    target: Path, source: Path, checkpoint: Checkpoint, model: Classifier, how: Packing
) -> tuple[Checkpoint, Rounding | None]:
    """Write weights and checkpoint; return the checkpoint, and what rounding did if there was."""
    content = (source / WEIGHTS).read_bytes()
    state = load_file(source / WEIGHTS)
    if how.half:
        content = save(rounded(state))
    # Through Python's own file, whose error says that a disk is full.
    (target / WEIGHTS).write_bytes(content)
    stored = portable(checkpoint) if how.portable else checkpoint
    stored = stored.model_copy(update={"weights_sha256": sha256_of(target / WEIGHTS)})
    (target / CHECKPOINT).write_bytes(checkpoint_text(stored))
    if not how.half or stored.weights_sha256 == checkpoint.weights_sha256:
        return stored, None
    return stored, _rounding(target, state, checkpoint, model, how)


def _rounding(
    target: Path, state: State, checkpoint: Checkpoint, model: Classifier, how: Packing
) -> Rounding:
    """Return how the model at ``target`` differs from ``model``, of which it was rounded."""
    source = how.data or checkpoint.data
    images = parity_images(source, checkpoint.model, checkpoint.decoding)
    before = reference_answers(model, images)
    after = reference_answers(load_checkpoint(target)[1], images)
    routes = [
        float(np.mean(before.routes[name].expert_ids == after.routes[name].expert_ids))
        for name in before.routes
    ]
    same = before.logits.argmax(axis=1) == after.logits.argmax(axis=1)
    noise = source.startswith("random:")
    place = source if noise else absolute(source, checkpoint.model.image_size)
    return Rounding(
        data=source if noise else place.partition(":")[0],  # of images of one's own no path
        images=len(images),
        lost=_lost(state),
        max_abs_logit_diff=float(np.abs(before.logits - after.logits).max()),
        prediction_agreement=float(same.mean()),
        route_agreement=min(routes, default=1.0),
        measured_sha256=checkpoint.weights_sha256,
    )


def _lost(state: State) -> int:
    """Return how many weights are zero in fp16 and are not in ``state``."""
    floating = [tensor for tensor in state.values() if tensor.is_floating_point()]
    return sum(int(((t != 0) & (t.to(torch.float16) == 0)).sum()) for t in floating)


def _data_name(checkpoint: Checkpoint) -> str:
    return checkpoint.data.partition(":")[0]


def _licence_in(run: Path) -> str:
    record = read_record(run)
    return record.licence if record else ""


def _rounding_in(run: Path) -> Rounding | None:
    record = read_record(run)
    return record.rounding if record else None
