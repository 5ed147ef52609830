"""Trial that several models are put to alike: the same images, the same attack.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advmoe_deploy.analysis.redundancy import Withstood, withstood
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import absolute
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.stored import StoredModel
from advmoe_deploy.progress import Progress
from advmoe_deploy.specs import AttackSpec, ThreatModel


@dataclass(frozen=True)
class TrialSettings:
    """On what and how hard: ``steps`` are PGD's; ``epsilon`` is by default the model's own."""

    images: int | None = 200
    data: str | None = None
    class_map: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True)
class SharedTrial:
    """Images [N, C, H, W] of ``source``, their labels [N], and the attack on them."""

    source: str
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attack: AttackSpec

    @classmethod
    def of(cls, stored: StoredModel, settings: TrialSettings) -> "SharedTrial":
        """Return the trial of ``stored`` on its own test images, or those that are named.

        Raises:
            UsageError: no threat model, no data, or data that does not fit.
        """
        source = absolute(settings.data or stored.data, stored.model.spec.image_size)
        known = Trained(stored.model.spec, stored.class_names, stored.decoding, stored.fingerprint)
        pixels, labels = matching_test_images(
            source, known, settings.images, class_map=settings.class_map
        )
        return cls(
            source,
            torch.from_numpy(pixels),
            torch.from_numpy(labels),
            stored.threat_model(settings.epsilon),
            AttackSpec(name="pgd", steps=settings.steps, seed=settings.seed),
        )

    def put_to(self, model: Classifier, progress: Progress, told: str) -> Withstood:
        """Return what ``model``, which routes, withstands; ``told`` is the task that advances."""
        return withstood(
            model,
            self.images,
            self.labels,
            self.threat,
            self.attack,
            progress=progress,
            told=told,
        )
