"""Roles of the runs of a dissection, told by how each was trained; read without PyTorch.

AdvMoE (Zhang et al., ICCV 2023, arXiv 2308.10110) asks what a robust router and robust experts are
each worth alone, and whether a router stays robust while experts are trained on. Four runs answer:

standard         router and experts trained on clean images: where the others begin
robust router    its router alone trained adversarially, over the standard experts
robust experts   its experts alone trained adversarially, under the standard router
experts moved    the experts of ``robust router`` trained adversarially behind it

Beside them any number of ``both``: router and experts trained adversarially, jointly or in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from advmoe_deploy.bundle import MANIFEST
from advmoe_deploy.errors import UsageError
from advmoe_deploy.reports.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from advmoe_deploy.specs import Fingerprint

Role = Literal["standard", "robust router", "robust experts", "experts moved", "both"]
Needed = Literal["standard", "robust router", "robust experts", "experts moved"]
NEEDED: tuple[Needed, ...] = get_args(Needed)
ROLES: tuple[Role, ...] = get_args(Role)
# The role that a run begins with the weights of.
BEGINS_WITH: dict[Role, Needed] = {
    "robust router": "standard",
    "robust experts": "standard",
    "experts moved": "robust router",
}
# What trains a router on attacked images whatever the loss.
_ATTACKED_TERMS = ("class_routing_weight", "route_stability")


@dataclass(frozen=True)
class Run:
    """A run as it was named, where it lies, and what its checkpoint says."""

    name: str
    path: Path
    checkpoint: Checkpoint

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        return self.checkpoint.weights_sha256

    @property
    def start(self) -> dict[str, Any] | None:
        """The model that the run began with, as ``start`` of its configuration; or ``None``."""
        found: dict[str, Any] | None = self.checkpoint.recipe.get("start")
        return found


def read_run(name: str, path: Path) -> Run:
    """Return the run at ``path``, which was named ``name``; weights unseen.

    Raises:
        UsageError: it is a bundle.
        InputError: it is no finished run, or damaged.
    """
    if (path / MANIFEST).is_file():
        raise UsageError(f"{name} is a bundle; name the run that it was exported from")
    return Run(name, path, read_checkpoint(checkpoint_folder(path)))


def roles_of(runs: Sequence[Run]) -> dict[Role, list[Run]]:
    """Return the runs by role; some of :data:`NEEDED` may be missing.

    Raises:
        UsageError: a run has no role in a dissection, two have the same of :data:`NEEDED`, the
            networks or data differ, or a run began with weights that are none of these runs'.
    """
    for run in runs:
        _require_same_network(runs[0], run)
    trained = {run.path: _trained(run) for run in runs}
    found: dict[Role, list[Run]] = {}
    for run in runs:
        if trained[run.path] in ("standard", "both"):
            found.setdefault(trained[run.path], []).append(run)  # type: ignore[arg-type]
    if "standard" not in found:
        _name_the_beginning(runs)
    for method, role in (("router-only", "robust router"), ("experts-only", "robust experts")):
        for run in (run for run in runs if trained[run.path] == method):
            found.setdefault(_begun_role(run, role, found), []).append(run)  # type: ignore[arg-type]
    for needed in NEEDED:
        if len(same := found.get(needed, [])) > 1:
            names = " and ".join(run.name for run in same)
            raise UsageError(f"{names} are both the run '{needed}' of a dissection; name one")
    return found


class TrainedOn(Protocol):
    """A model of which it is known on what it was trained: a source, and what that held."""

    @property
    def data(self) -> str:
        """The data source; empty if unknown."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Its content, if it is recorded."""


def on_the_same_data(one: TrainedOn, other: TrainedOn) -> bool:
    """Return whether two models were trained on the same images, as far as is known."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint.images == other.fingerprint.images
    return one.data == other.data or not (one.data and other.data)


def _trained(run: Run) -> str:
    """Return who was trained: ``standard``, ``both``, or the method that trains a part alone."""
    recipe = run.checkpoint.recipe
    family, method, loss = run.checkpoint.model.family, recipe.get("method"), recipe.get("loss")
    if family in ("dense", "pathway"):
        raise UsageError(f"{run.name} is dense and has no router to dissect; leave it out")
    if method is None or loss is None:
        raise UsageError(
            f"{run.name} does not say how it was trained; name runs that 'advmoe train' wrote"
        )
    if method in ("router-only", "experts-only"):
        part = method.removesuffix("-only")
        if loss == "standard":
            raise UsageError(
                f"{run.name} trained its {part} on clean images, where a dissection asks for "
                "adversarial training; train it without loss=standard"
            )
        if run.start is None:
            raise UsageError(
                f"{run.name} trained its {part} beside what was random; begin with a run that was "
                "trained on clean images: advmoe train ... --from RUN"
            )
        return str(method)
    if loss != "standard":
        return "both"
    terms = [f"{term}={recipe[term]:g}" for term in _ATTACKED_TERMS if recipe.get(term)]
    if terms:
        raise UsageError(
            f"{run.name} trained its router on attacked images ({terms[0]}) and all else on clean "
            f"ones; train it with {terms[0].partition('=')[0]}=0"
        )
    return "standard"


def _begun_role(run: Run, role: Needed, found: dict[Role, list[Run]]) -> Role:
    """Return the role of a run that trained one part of another, of which it has the weights."""
    begun = (run.start or {}).get("weights_sha256")
    if begun in [standard.sha256 for standard in found.get("standard", [])]:
        return role
    routers = found.get("robust router", [])
    if role == "robust experts" and begun in [router.sha256 for router in routers]:
        return "experts moved"
    source = (run.start or {}).get("source")
    raise UsageError(
        f"{run.name} began with the weights of {source}, which none of these runs has now; name "
        "that run too, or train this one anew"
    )


def _name_the_beginning(runs: Sequence[Run]) -> None:
    """Refuse runs of which it is known where they began, but not given."""
    if sources := dict.fromkeys(run.start["source"] for run in runs if run.start):
        raise UsageError(
            f"none of these runs was trained on clean images; name {next(iter(sources))} too, with "
            "which they began"
        )


def _require_same_network(first: Run, run: Run) -> None:
    ours, theirs = (each.checkpoint.model.model_dump() for each in (first, run))
    odd = [key for key in ours if ours[key] != theirs[key]]
    if odd:
        raise UsageError(
            f"{run.name} has model.{odd[0]}={theirs[odd[0]]}, {first.name} {ours[odd[0]]}; a "
            "dissection compares runs of one network"
        )
    if run.checkpoint.class_names != first.checkpoint.class_names:
        raise UsageError(f"{run.name} has other classes than {first.name}; leave one of them out")
    if not on_the_same_data(first.checkpoint, run.checkpoint):
        raise UsageError(
            f"{run.name} was trained on other images ({run.checkpoint.data}) than {first.name} "
            f"({first.checkpoint.data}); leave one of them out"
        )
