"""Signs of masked gradients: an attack that fails for its own sake, not for the model's strength.

Sources: Athalye et al., ICML 2018 (arXiv 1802.00420); Carlini et al., arXiv 1902.06705.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.attacks.batches import pieces
from advmoe_deploy.attacks.black_box import NAMES
from advmoe_deploy.attacks.effort import attack_task
from advmoe_deploy.attacks.white_box import attack_model, predict
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.progress import Progress, Silent, task
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify.report import AttackOutcome, Sign

# Of so many images that the reference gets right; more would tell little more.
_IMAGES = 64
_STEPS = (5, 10, 20)
# What 64 images may differ by without telling anything.
_SLACK = 0.05
_MOST_LOST_GRADIENTS = 0.01
_MOST_BROKEN = 0.02
_TASK = "signs of masked gradients"


def masking_signs(
    model: Classifier,
    x_NCHW: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    threat: ThreatModel,
    outcomes: Sequence[AttackOutcome],
    progress: Progress | None = None,
) -> tuple[Sign, ...]:
    """Return every sign for ``model`` on float images in [0, 1]; ``outcomes`` are of the suite.

    Images that the model gets wrong are left out; where there is none it gets right, no attack
    ran, and the outcomes alone are looked at.
    """
    right_N = predict(model, torch.from_numpy(x_NCHW)).numpy() == labels_N
    rows_N = np.flatnonzero(right_N)[:_IMAGES]
    signs = [_black_box(outcomes)]
    if len(rows_N):
        x, y = torch.from_numpy(x_NCHW[rows_N]), torch.from_numpy(labels_N[rows_N])
        known = _left_by_suite(outcomes, right_N)
        probe = _Probe(model, x, y, threat, progress or Silent(), known)
        searches = len(_STEPS) + 2 - (known is not None)
        with task(probe.progress, _TASK, searches):
            signs += [probe.steps(), probe.unbounded(), probe.losses(), probe.gradients()]
    return tuple(signs)


def _left_by_suite(outcomes: Sequence[AttackOutcome], right_N: NDArray[np.bool_]) -> float | None:
    """Return what the suite's first attack left, if it was the longest of a probe, on its images.

    Those are images that the model gets right, so many that a probe takes them all; the starts are
    drawn alike, and the same search need not run again.
    """
    first, right = next(iter(outcomes), None), int(right_N.sum())
    asked = (AttackSpec(name="pgd", steps=_STEPS[-1]), "reference", right)
    if first is None or (first.attack, first.found_on, first.images) != asked or right > _IMAGES:
        return None
    return round(first.robust_accuracy.reference * len(right_N)) / right


def warnings_of(signs: Sequence[Sign]) -> tuple[str, ...]:
    """Return a line for each sign that speaks of masked gradients."""
    return tuple(
        f"gradients may be masked, so robust accuracy may be overstated: {sign.seen}"
        for sign in signs
        if sign.suspicious
    )


def _black_box(outcomes: Sequence[AttackOutcome]) -> Sign:
    """Return whether attacks that know nothing broke what white-box searches could not."""
    broken, left = 0.0, 1.0
    for outcome in outcomes:
        after = outcome.robust_accuracy.reference
        if outcome.attack.name not in NAMES:
            left = after
        elif left > 0:  # Square and RayS count together
            broken = max(broken, (left - after) / left)
    return Sign(
        name="black box against white box",
        seen=f"black-box attacks broke {100 * broken:.1f} % of the images that white-box ones had "
        "left",
        suspicious=broken > _MOST_BROKEN,
    )


class _Probe:
    """A few images that the model gets right, attacked in ways that tell of the gradients."""

    def __init__(
        self,
        model: Classifier,
        x_NCHW: Tensor,
        y_N: Tensor,
        threat: ThreatModel,
        progress: Progress,
        left_by_longest: float | None = None,
    ) -> None:
        self.model, self.x_NCHW, self.y_N, self.threat = model, x_NCHW, y_N, threat
        self.progress = progress
        self._left_by_longest = left_by_longest
        # Two signs look at the same 10 steps.
        self._left_by_pgd = cache(lambda steps: self._left(AttackSpec(name="pgd", steps=steps)))

    def steps(self) -> Sign:
        """Return whether more steps helped the defender."""
        left = [self._left_by_pgd(steps) for steps in _STEPS[:-1]]
        known = self._left_by_longest
        left.append(self._left_by_pgd(_STEPS[-1]) if known is None else known)
        worst = max(after - before for before, after in pairwise(left))
        told = ", ".join(f"{100 * a:.0f} % at {n}" for n, a in zip(_STEPS, left, strict=True))
        return Sign(name="steps", seen=f"PGD leaves {told} steps", suspicious=worst > _SLACK)

    def unbounded(self) -> Sign:
        """Return whether an attack that may do anything was withstood."""
        attack = AttackSpec(name="pgd", steps=40, loss="margin", momentum=0.75, decay=True)
        left = self._left(attack, ThreatModel(epsilon=1.0))
        return Sign(
            name="epsilon 1",
            seen=f"an attack that may do anything leaves {100 * left:.1f} %",
            suspicious=left > 0,
        )

    def losses(self) -> Sign:
        """Return whether cross-entropy saturates: a loss that does not breaks many more."""
        entropy = self._left_by_pgd(10)
        margin = self._left(AttackSpec(name="pgd", steps=10, loss="margin"))
        return Sign(
            name="losses",
            seen=f"cross-entropy leaves {100 * entropy:.1f} %, the class margin "
            f"{100 * margin:.1f} %",
            suspicious=entropy - margin > _SLACK,
        )

    def gradients(self) -> Sign:
        """Return whether gradients of the cross-entropy vanish in float32."""
        largest, leads = [], []
        for x, y_N in pieces(self.model, self.x_NCHW, self.y_N):
            x = x.clone().requires_grad_(True)
            with torch.enable_grad():
                logits_NK = self.model(x)
                loss = F.cross_entropy(logits_NK, y_N, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x)
            largest.append(gradient.flatten(1).abs().amax(dim=1))
            best_N2 = logits_NK.detach().topk(2, dim=1).values
            leads.append(best_N2[:, 0] - best_N2[:, 1])
        gone = float((torch.cat(largest) < 1e-20).float().mean())
        lead = float(torch.cat(leads).median())
        return Sign(
            name="gradients",
            seen=f"no gradient for {100 * gone:.1f} %; the best class leads by {lead:.3g} "
            "in the median",
            suspicious=gone > _MOST_LOST_GRADIENTS,
        )

    def _left(self, attack: AttackSpec, threat: ThreatModel | None = None) -> float:
        ball = threat or self.threat
        with attack_task(self.progress, self.model, attack, len(self.y_N)):
            found = attack_model(self.model, self.x_NCHW, self.y_N, ball, attack, first_only=True)
        self.progress.advance(_TASK)
        return float((predict(self.model, found) == self.y_N).float().mean())
