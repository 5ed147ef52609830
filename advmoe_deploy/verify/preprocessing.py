"""Preprocessing that an engine does and its reference does not.

Which change of the images, made before the reference, gives the engine's answers?

Shapes: N images, C channels (of images) or classes (of logits), H height, W width.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.specs import ModelSpec
from advmoe_deploy.verify.evidence import Evidence, Logits
from advmoe_deploy.verify.findings import Finding

# What is left of the distance to the engine's answers if the images are changed as it does.
_EXPLAINED, _EXPLAINED_LOSSY = 0.2, 0.4
# A guess that has a name is preferred to fits that leave little less.
_PLAINER = 1.5
_IMAGES, _FEW_IMAGES = 64, 32
# Of rows that are compared: the others may have gone to another expert.
_KEPT = 0.9
_SLIGHT, _NOTICED = 0.02, 0.7
_GAINS = (1 / 255, 0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0, 255.0)
_SHIFTS = (0.5, 0.25, 0.1, 0.05, 0.01)
_POWERS = (0.5, 1 / 2.2, 2.0, 2.2)
_CLIPS = tuple(step / 20 for step in range(1, 20))
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEP = 1e-3  # of a numeric derivative
_ROUNDS = 8


@dataclass(frozen=True)
class Guess:
    """A change of images [N, C, H, W], in words."""

    words: str
    change: Callable[[Images], NDArray[np.floating]]


def preprocessing_finding(evidence: Evidence) -> Finding | None:
    """Return what the engine does to images that its reference does not, if that explains it."""
    search = _Search(evidence, _IMAGES)
    if not search.distance > 0:
        return None
    tried = list(search.tried())
    best = min(left for _, left in tried)
    guess, left = next(pair for pair in tried if pair[1] <= _PLAINER * best)
    limit = _EXPLAINED if evidence.closeness.exact else _EXPLAINED_LOSSY
    return _finding(guess, left, search.distance) if left < limit else None


def slight_change(evidence: Evidence) -> Finding | None:
    """Return by which gain and shift images are off, where that is lost in a lower precision.

    Rounding changes each image otherwise; it is no gain and no shift of all of them.
    """
    search = _Search(evidence, _FEW_IMAGES)
    if not search.distance > 0:
        return None
    gain, shift = search.fitted(1.0, 0.0, rounds=3)
    left = search.left(_affine(gain, shift))
    slight = abs(gain - 1) < _SLIGHT and abs(shift) < _SLIGHT / 2
    return (
        None if slight or left > _NOTICED else _finding(_affine(gain, shift), left, search.distance)
    )


def _finding(guess: Guess, left: float, distance: float) -> Finding:
    message = (
        f"the engine answers as the reference does to {guess.words}: its logits are "
        f"{distance * left:.3g} from those on average, and {distance:.3g} from those to the images "
        "themselves; take the mean, std, range, channel order and layout of the images from the "
        "bundle's spec, do it once, and export again"
    )
    return Finding(kind="preprocessing", message=message)


class _Search:
    """Guesses tried on the first images."""

    def __init__(self, evidence: Evidence, images: int) -> None:
        self.model: Classifier = evidence.model
        self.x_NCHW = evidence.x_NCHW[:images]
        self.wanted = evidence.answer.logits[:images].astype(np.float64)
        self.before = evidence.reference.logits[:images]
        self.distance = self._distance(self.before)

    def tried(self) -> Iterator[tuple[Guess, float]]:
        """Yield each guess with the share of the distance that it leaves; the plainest first."""
        tried = [(guess, self.left(guess)) for guess in _known(self.model.spec)]
        yield from tried
        affine = [(pair, self.left(_affine(*pair))) for pair in _coarse()]
        best = min(affine, key=lambda pair: pair[1])[0]
        for start in {(1.0, 0.0), best}:
            found = _affine(*self.fitted(*start, rounds=_ROUNDS))
            yield found, self.left(found)
        for kind in (_clipped_above, _clipped_below):
            yield self._finer(kind)

    def left(self, guess: Guess) -> float:
        """Return the share of the distance that is left where the reference sees a change."""
        changed = np.ascontiguousarray(guess.change(self.x_NCHW), dtype=np.float32)
        left = self._distance(self._logits(changed)) / self.distance
        return left if np.isfinite(left) else float("inf")

    def _finer(self, kind: Callable[[float], Guess]) -> tuple[Guess, float]:
        """Return the best limit of ``kind``: of a coarse grid, then of a finer one around it."""
        best = min(_CLIPS, key=lambda limit: self.left(kind(limit)))
        around = [best + step / 100 for step in range(-4, 5)]
        found = [(kind(limit), self.left(kind(limit))) for limit in around]
        return min(found, key=lambda pair: pair[1])

    def fitted(self, gain: float, shift: float, *, rounds: int) -> tuple[float, float]:
        """Return gain and shift after Gauss-Newton steps over the rows that are fitted best."""
        for _ in range(rounds):
            here = self._logits(self.x_NCHW * gain + shift)
            by_gain = (self._logits(self.x_NCHW * (gain + _STEP) + shift) - here) / _STEP
            by_shift = (self._logits(self.x_NCHW * gain + shift + _STEP) - here) / _STEP
            rest = self.wanted - here
            size_N = np.linalg.norm(rest, axis=1) + np.abs(by_gain).max(axis=1)
            rows = size_N <= np.median(size_N)  # not those that a step takes to another expert
            columns = np.stack([by_gain[rows].ravel(), by_shift[rows].ravel()], axis=1)
            if not (np.isfinite(columns).all() and np.isfinite(rest[rows]).all()):
                break
            step = np.linalg.lstsq(columns, rest[rows].ravel(), rcond=None)[0]
            gain, shift = gain + float(step[0]), shift + float(step[1])
        return gain, shift

    def _logits(self, x_NCHW: NDArray[np.floating]) -> Logits:
        return reference_answers(self.model, x_NCHW.astype(np.float32)).logits

    def _distance(self, logits_NC: Logits) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            apart_N = np.sort(np.linalg.norm(self.wanted - logits_NC, axis=1))
            return float(apart_N[: max(1, round(_KEPT * len(apart_N)))].mean())


def _coarse() -> list[tuple[float, float]]:
    shifts = [(1.0, sign * shift) for shift in _SHIFTS for sign in (1, -1)]
    return [*((gain, 0.0) for gain in _GAINS), *shifts, (-1.0, 1.0), (2.0, -1.0), (0.5, 0.5)]


def _affine(gain: float, shift: float) -> Guess:
    words = f"images times {gain:.5g}"
    if abs(shift) >= 5e-5:
        words += f" {'plus' if shift > 0 else 'minus'} {abs(shift):.4g}"
    return Guess(words, lambda x: x * gain + shift)


def _clipped_above(limit: float) -> Guess:
    words = f"images clipped above {limit:.2g} (scales of a quantiser that saw darker images?)"
    return Guess(words, lambda x: np.minimum(x, limit))


def _clipped_below(limit: float) -> Guess:
    return Guess(f"images clipped below {limit:.2g}", lambda x: np.maximum(x, limit))


def _known(spec: ModelSpec) -> Iterator[Guess]:
    """Yield the mistakes that have a name."""
    yield from _normalised(spec)
    yield from _turned()
    yield from _channels(spec.in_channels)
    yield Guess("black images (divided by 255 twice, and rounded?)", lambda x: 0 * x)
    for gain in (2.0, 255.0):
        yield Guess(f"images times {gain:g}, clipped at 1", _saturated(gain))
    for power in _POWERS:
        yield Guess(f"images to the power of {power:.3g} (gamma)", _raised(power))
    for axis, way in itertools.product((2, 3), (1, -1)):
        yield Guess(f"images moved by a pixel along axis {axis}", _moved(axis, way))


def _normalised(spec: ModelSpec) -> Iterator[Guess]:
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (spec.mean, spec.std))
    if np.any(mean != 0) or np.any(std != 1):
        yield Guess("images whose normalisation is left out", lambda x: x * std + mean)
        yield Guess("images that are normalised twice", lambda x: (x - mean) / std)
        yield Guess("images from which no mean is taken", lambda x: x + mean)
        yield Guess("images that are not divided by std", lambda x: (x - mean) * std + mean)
    if spec.in_channels == len(_IMAGENET[0]):
        other, spread = (np.array(each, np.float32)[:, None, None] for each in _IMAGENET)
        yield Guess(
            "images normalised with ImageNet's mean and std, not the spec's",
            lambda x: (x - other) / spread * std + mean,
        )


def _turned() -> Iterator[Guess]:
    yield Guess("transposed images (height and width swapped)", lambda x: x.transpose(0, 1, 3, 2))
    yield Guess("images flipped left to right", lambda x: x[..., ::-1])
    yield Guess("images flipped upside down", lambda x: x[..., ::-1, :])
    yield Guess("images turned by 180 degrees", lambda x: x[..., ::-1, ::-1])
    for turns in (1, 3):
        yield Guess(f"images turned by {90 * turns} degrees", _rotated(turns))


def _channels(count: int) -> Iterator[Guess]:
    if count != 3:
        return
    names = "RGB"
    for order in list(itertools.permutations(range(3)))[1:]:
        words = f"images with channels {''.join(names[c] for c in order)} for RGB"
        yield Guess(words, _permuted(order))
    yield Guess("images without colours", lambda x: np.repeat(x.mean(axis=1, keepdims=True), 3, 1))


def _rotated(turns: int) -> Callable[[Images], Images]:
    return lambda x: np.rot90(x, turns, axes=(2, 3))


def _permuted(order: tuple[int, ...]) -> Callable[[Images], Images]:
    return lambda x: x[:, list(order)]


def _saturated(gain: float) -> Callable[[Images], Images]:
    return lambda x: np.clip(x * np.float32(gain), 0, 1)


def _raised(power: float) -> Callable[[Images], Images]:
    return lambda x: np.power(x, np.float32(power))


def _moved(axis: int, way: int) -> Callable[[Images], Images]:
    return lambda x: np.roll(x, way, axis)
