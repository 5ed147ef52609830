"""Reader of what was measured of a model, in the JSON files that this project writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe_deploy.errors import InputError, UsageError, one_line
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.verify.examples.entry import Entry
from advmoe_deploy.verify.report import AttackOutcome, RobustReport
from advmoe_deploy.zoo.record import AttackStep, Evaluation, Share, read_fields


def read_evaluation(file: Path, recipe: Mapping[str, Any], data: str) -> Evaluation:
    """Return what ``file`` says of the model trained by ``recipe`` on ``data``.

    It is what ``advmoe verify --json`` printed, ``report.json`` of ``advmoe report`` or of a run,
    or the result of a program of ``benchmarks/training/``, of which the row of this recipe and seed
    is taken.

    Raises:
        InputError: the file is none of them.
        UsageError: it has no row of this recipe and seed.
    """
    fields = read_fields(file)
    try:
        if "rows" in fields:
            return _of_benchmark(file, fields, recipe, data)
        if "advmoe" in fields:
            return _of_entry(Entry.model_validate(_without(fields, "out")))
        if "consistency" in fields:
            return _of_verify(RobustReport.model_validate(fields))
        return _of_run(TrainReport.model_validate(fields))
    except ValidationError as error:
        raise InputError(f"{file} is no file of results: {one_line(error)}") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{file} is no file of results: {error!r} is missing or odd") from None


def _of_verify(report: RobustReport) -> Evaluation:
    """Return the reference's figures: those of the weights, whatever engine stood beside them."""
    steps = [
        AttackStep(title=o.title, standing=o.robust_accuracy.reference) for o in report.attacks
    ]
    return Evaluation(
        by="advmoe verify",
        data=_name(report.data),
        threat=report.threat,
        clean=Share.of(report.clean_accuracy.reference, report.images),
        robust=Share.of(report.robust_accuracy.reference, report.images),
        attacks=tuple(steps),
    )


def _of_entry(entry: Entry) -> Evaluation:
    measured = entry.advmoe
    found = _of_verify(measured.engines[0])
    changes = {"by": "advmoe report", "suite": measured.suite, "weights": measured.model}
    return found.model_copy(update=changes)


def _of_run(report: TrainReport) -> Evaluation:
    """Return what ``advmoe train`` measured on the test images at the end of the run."""
    title = _title(report.attack)
    steps = [
        AttackStep(title=title, standing=report.pgd_accuracy),
        AttackStep(title=f"{title} on routes and pathways", standing=report.robust_accuracy),
    ]
    return Evaluation(
        by="advmoe train",
        data=_name(report.data),
        threat=report.threat,
        clean=Share.of(report.clean_accuracy, report.images),
        robust=Share.of(report.robust_accuracy, report.images),
        attacks=tuple(steps),
    )


def _of_benchmark(
    file: Path, fields: dict[str, Any], recipe: Mapping[str, Any], data: str
) -> Evaluation:
    wanted = {"recipe": recipe.get("name"), "seed": recipe.get("seed")}
    rows = [row for row in fields["rows"] if all(row.get(k) == v for k, v in wanted.items())]
    if len(rows) != 1:
        raise UsageError(
            f"{file} has {len(rows)} rows of recipe {wanted['recipe']} with seed "
            f"{wanted['seed']}, not one; name the result of this run"
        )
    (row,) = rows
    steps = [
        AttackStep(title=_title(AttackSpec.model_validate(step["attack"])), standing=step["share"])
        for step in row["standing_after"]
    ]
    return Evaluation(
        by=file.name,
        data=_name(data),
        threat=ThreatModel(epsilon=row.get("epsilon", fields.get("epsilon"))),
        suite=fields.get("suite", ""),
        clean=Share.of(row["clean"]["share"], row["clean"]["n"]),
        robust=Share.of(row["robust"]["share"], row["robust"]["n"]),
        attacks=tuple(steps),
        weights=row.get("weights_sha256", ""),
    )


def _title(attack: AttackSpec) -> str:
    # As verify's own tables call it; nothing but the attack goes into a title.
    return AttackOutcome.model_construct(attack=attack).title  # type: ignore[call-arg]


def _name(data: str) -> str:
    """Return the name of a data set without the path, which means nothing elsewhere."""
    return data.partition(":")[0]


def _without(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}
