"""White-box PGD with knowledge of weights and routing; objectives.py describes each target.

Shapes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.batches import labelled_batches, pieces
from advmoe_deploy.attacks.clean_routes import CleanRoutes
from advmoe_deploy.attacks.losses import is_wrong, require_finite_loss
from advmoe_deploy.attacks.objectives import (
    Answer,
    AnsweredBy,
    objectives_for,
    require_target,
)
from advmoe_deploy.attacks.pgd import (
    Objective,
    eval_mode,
    pgd_search,
    random_start,
    step_sizes_of,
)
from advmoe_deploy.attacks.scene import Scene
from advmoe_deploy.errors import UsageError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import frozen_parameters
from advmoe_deploy.specs import AttackSpec, ThreatModel


def attack_model(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: AttackSpec,
    *,
    first_only: bool = False,
    answer: Answer | None = None,
) -> Tensor:
    """Return adversarial images [N, C, H, W] by PGD, on the device of ``images``.

    ``images`` are float in [0, 1]. An image the attack could not turn is returned at its highest
    loss, one it turned at its highest loss among those that fool; ``first_only`` settles for the
    first that fools. What fools is the model's own answer; for target ``experts``, its answer with
    the routes of the clean image. The loss is that of the answer; for target ``router``, that of
    the gates against the clean routes, for ``auxiliary`` V-MoE's auxiliary loss beside it. The same
    seed gives the same examples. The model is attacked in eval mode; its own mode comes back.

    With ``answer``, logits [n, K] of images [n, C, H, W], somebody else is attacked, an engine that
    was made from the model: its answers say what fools, and the model only lends its gradients
    (BPDA, Athalye et al., ICML 2018, arXiv 1802.00420).

    Raises:
        UsageError: the attack is no PGD, its target needs a router and the model has none, or an
            ``answer`` should keep the routes of target ``experts``.
        CheckFailedError: the model's loss is not finite.
    """
    if attack.name != "pgd":
        raise UsageError(f"{attack.name} is no PGD; use find_adversarial")
    require_target(model, attack.target)
    if answer is not None and attack.target == "experts":
        raise UsageError("an engine's routes cannot be held; attack the model for target experts")
    if not len(images):
        return images.clone()
    generator = torch.Generator().manual_seed(attack.seed)
    found = []
    with eval_mode(model), frozen_parameters(model):
        for x, y in labelled_batches(images, labels):
            batch = _Batch(model, x, y, threat, attack, answer)
            found.append(batch.attack(generator, first_only))
    return torch.cat(found)


def predict(model: Classifier, images: Tensor, *, routes_of: Tensor | None = None) -> Tensor:
    """Return the class [N] the model gives each float image, in eval mode and in pieces.

    With ``routes_of``, as many images, it answers with the routes of those.
    """
    if not len(images):
        return torch.empty(0, dtype=torch.int64, device=images.device)
    answers = []
    with eval_mode(model), torch.no_grad():
        for x, *clean in pieces(model, images, *([] if routes_of is None else [routes_of])):
            everyone = torch.arange(len(x), device=x.device)
            routes = CleanRoutes(model, *clean).of(everyone) if clean else None
            answers.append(model(x, routes).argmax(dim=1))
    return torch.cat(answers)


class _Judged(NamedTuple):
    loss_N: Tensor
    fooled_N: Tensor


class _Batch:
    """One batch under one attack."""

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        attack: AttackSpec,
        answer: Answer | None,
    ) -> None:
        self.model = model
        self.answer = answer
        self.images = images
        self.labels = labels
        self.threat = threat
        self.spec = attack
        self.clean = CleanRoutes(model, images) if attack.target == "experts" else None
        self.objectives = objectives_for(Scene.of(model, images, labels), attack, self.clean)
        if answer is not None:
            self.objectives = [AnsweredBy(answer, objective) for objective in self.objectives]

    def attack(self, generator: torch.Generator, first_only: bool) -> Tensor:
        """Return the worst of all restarts of all objectives; a clean mistake stays as it is."""
        result = self.images.clone()
        everyone = torch.arange(len(self.labels), device=self.labels.device)
        left_N = torch.ones_like(everyone, dtype=torch.bool)
        if first_only:
            left_N &= ~self._judge(result, everyone).fooled_N
        for objective, start in self._tries(generator):
            rows_N = left_N.nonzero()[:, 0]
            if not len(rows_N):
                continue  # still draws the starts, so that later batches do not depend on it
            candidates = self._search(objective, start, rows_N, first_only)
            judged = self._judge(candidates[rows_N], rows_N)
            worse_N = judged.loss_N > self._judge(result[rows_N], rows_N).loss_N
            taken_N = rows_N[judged.fooled_N | worse_N]
            result[taken_N] = candidates[taken_N]
            left_N[rows_N[judged.fooled_N]] = False
        if not first_only:
            self._restore_clean_mistakes(result, everyone)
        return result

    def _search(
        self, objective: Objective, start: Tensor, rows_N: Tensor, first_only: bool
    ) -> Tensor:
        return pgd_search(
            objective,
            self.images,
            self.labels,
            start,
            rows_N=rows_N,
            threat=self.threat,
            step_sizes=step_sizes_of(self.spec, self.threat),
            momentum=self.spec.momentum,
            first_only=first_only,
        )

    def _tries(self, generator: torch.Generator) -> Iterator[tuple[Objective, Tensor]]:
        for _ in range(self.spec.restarts):
            start = self.images
            if self.spec.random_start:
                start = random_start(self.images, self.threat.epsilon, generator)
            for objective in self.objectives:
                yield objective, start

    @torch.no_grad()
    def _judge(self, images: Tensor, rows_N: Tensor) -> _Judged:
        """Return what is made of ``images``, which stand for ``rows_N``, by who is attacked."""
        labels_N = self.labels[rows_N]
        logits_NK: Tensor
        if self.answer is not None:  # an engine may overflow where the model does not: a mistake
            logits_NK = self.answer(images)
            loss_N = F.cross_entropy(logits_NK.nan_to_num(), labels_N, reduction="none")
        else:
            parts = pieces(self.model, images, rows_N)
            logits_NK = torch.cat([self._logits(x, rows) for x, rows in parts])
            loss_N = require_finite_loss(F.cross_entropy(logits_NK, labels_N, reduction="none"))
        # A new route may well lower the loss of the answer.
        if self.spec.target in ("router", "auxiliary"):
            (objective,) = self.objectives
            loss_N = objective(images, labels_N, rows_N).loss_N
        return _Judged(loss_N, is_wrong(logits_NK, labels_N))

    def _logits(self, images: Tensor, rows_N: Tensor) -> Tensor:
        logits_NK: Tensor = self.model(images, self.clean.of(rows_N) if self.clean else None)
        return logits_NK

    def _restore_clean_mistakes(self, found: Tensor, everyone: Tensor) -> None:
        """Never let an attack correct a mistake: an image wrong from the start stays wrong."""
        wrong_N = self._judge(self.images, everyone).fooled_N
        rows_N = ~self._judge(found, everyone).fooled_N & wrong_N
        found[rows_N] = self.images[rows_N]
