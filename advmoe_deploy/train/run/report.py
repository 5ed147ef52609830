"""Reports of training, in words and numbers."""

import platform
from importlib import metadata

from pydantic import Field

from advmoe_deploy import __version__
from advmoe_deploy.specs import AttackSpec, Frozen, ThreatModel
from advmoe_deploy.train.fields import Loss, Method


class EpochRecord(Frozen):
    """One line of metrics.jsonl. Accuracies are those of the hold-out, ``None`` if not measured.

    ``loss`` is the mean over the epoch of what the last phase of the method minimises.
    ``expert_load`` counts the choices of each routed layer, ``effective_routes`` is that of the
    layer with the fewest. ``density`` and ``nonzero_macs`` are of method ``sparse``, the
    ``router_flips`` of ``track_router_robustness``
    (:mod:`~advmoe_deploy.train.run.router_robustness`).
    ``seconds`` is the time since the run began, interruptions left out.
    """

    epoch: int
    loss: float
    clean_accuracy: float | None = None
    pgd_accuracy: float | None = None
    robust_accuracy: float | None = None
    effective_routes: float | None = None
    expert_load: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    density: float | None = None
    nonzero_macs: int | None = None
    router_flips_before: float | None = None
    router_flips_experts_moved: float | None = None
    router_flips_after: float | None = None
    seconds: float

    def measured(self) -> dict[str, float]:
        """Return what was measured on the hold-out."""
        return {name: value for name, value in self.scalars().items() if name != "loss"}

    def scalars(self) -> dict[str, float]:
        """Return what is a number and was measured."""
        fields = self.model_dump(exclude={"epoch", "expert_load", "seconds"})
        return {name: value for name, value in fields.items() if value is not None}


class TrainReport(Frozen):
    """Results of a run: accuracies are shares of the ``images`` of the test set.

    ``pgd_accuracy`` is that under ``attack`` at ``threat``, on the model as it runs: what papers
    report. ``robust_accuracy`` counts the images that the same effort on the routes and pathways
    leaves as well, and is what the epoch is selected by; a dense model has one for both. The
    weights are those of ``selected_epoch``, chosen on the hold-out. ``effective_routes``, of the
    routed layer with the fewest, is ``None`` for a dense model; ``density`` and ``nonzero_macs``
    are of method ``sparse``. ``warnings`` say what went without an error and is hardly wanted:
    experts that nobody visits, a router that costs more than it saves. ``remedies`` are settings,
    each ``key=value``, that train it otherwise.
    """

    run: str
    recipe: str
    method: Method
    loss: Loss
    data: str
    epochs: int
    selected_epoch: int
    images: int
    clean_accuracy: float
    pgd_accuracy: float
    robust_accuracy: float
    threat: ThreatModel
    epsilon: float
    attack: AttackSpec
    effective_routes: float | None
    expert_load: dict[str, tuple[int, ...]]
    density: float | None = None
    nonzero_macs: int | None = None
    seed: int
    seconds: float
    device: str
    devices: int
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that decide what a run gives."""
    packages = ("torch", "lightning-fabric", "numpy", "pillow")
    ours = {"python": platform.python_version(), "advmoe-deploy": __version__}
    return ours | {package: metadata.version(package) for package in packages}
