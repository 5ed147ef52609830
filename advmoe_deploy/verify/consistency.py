"""Consistency of an engine: with itself in any batch, with its torch reference, with image files.

Before any attack. An engine of fp32 must answer what float32 allows; of a lower precision, what
honest exports were measured to answer, several times over.

Shapes: N images, C channels or classes, H height, W width.
"""

import io
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import decode
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.parity.answers import Answers, Flags, Images, Labels
from advmoe_deploy.parity.compare import compare_answers, is_right
from advmoe_deploy.parity.intervals import chance_of_more
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.parity.tolerance import relative_distances, tolerance_for
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.reports import Pair, ParityReport
from advmoe_deploy.runtime.routing import softmax
from advmoe_deploy.runtime.runner import Prediction, Runner
from advmoe_deploy.specs import Precision
from advmoe_deploy.verify.batches import (
    WHOLE,
    answers_in_batches,
    batch_findings,
    images_to_batch,
    rows_of,
)
from advmoe_deploy.verify.diagnosis import diagnose, tie_break
from advmoe_deploy.verify.evidence import UNLIKELY, Closeness, Evidence
from advmoe_deploy.verify.findings import ConsistencyReport, Finding
from advmoe_deploy.verify.preprocessing import slight_change
from advmoe_deploy.verify.router_probes import router_finding

COMPARE, STEPS = "compare answers", 4
_FILES = 8  # images that go through PNG
_NOISE = 0.05  # in [0, 1] pixels


@dataclass(frozen=True)
class PrecisionLimits:
    """Limits on what a lower precision may change.

    ``logits`` is the distance, relative to an image's norm, that a quarter may exceed;
    ``probability`` the mean total variation, one image of ``FAR`` aside; ``far`` the share of
    images whose probabilities move by more than that; ``predictions`` and ``routes`` the shares
    that differ. Of shares, what chance explains on few images is allowed.
    """

    logits: float
    probability: float
    far: float = 0.005
    predictions: float = 0.01
    routes: float = 0.0025


FAR = 0.25
_OVER = 0.25  # share of the images that may exceed the limit on logits
_FEWEST = 32  # images in which a slight change can be told from rounding
# Measured on 400 digits of two models, ONNX Runtime and OpenVINO: int8 moves logits by 1.3 % and
# probabilities by 0.003, bf16 by 0.4 % and 0.0008; 3 predictions and 1 route of 400 differ at most.
_INT8 = PrecisionLimits(logits=0.06, probability=0.0125)
_SIXTEEN_BITS = PrecisionLimits(logits=0.02, probability=0.005)
# Share of the limit on logits from where on images may be slightly changed, and it is looked for.
_SUSPICIOUS = 0.3


def inspect_answers(
    model: Classifier,
    runner: Runner,
    x_NCHW: Images,
    labels_N: Labels,
    *,
    exact: bool,
    rounding: float,
    margin: float,
    least_route_agreement: float = 1.0,
    decoding: Decoding | None = None,
    progress: Progress | None = None,
) -> ConsistencyReport:
    """Return what is wrong with the answers of ``runner`` to clean images, named.

    Args:
        model: the torch reference.
        runner: the engine.
        x_NCHW: float32 images in [0, 1].
        labels_N: their classes.
        exact: whether the engine must answer what float32 allows.
        rounding: the reference's own uncertainty, as the bundle's parity says.
        margin: how near the best scores are in a close call, as the bundle's parity says.
        least_route_agreement: the share of clear routes that the export of a lower precision asked
            for; where it is below what honest exports keep, more routes may differ.
        decoding: how image files are read; without it none is.
        progress: hears of :data:`STEPS` advances of the task :data:`COMPARE`.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    closeness = Closeness(exact, tolerance_for(rounding))
    reference = reference_answers(model, x_NCHW)
    progress.advance(COMPARE)
    answer = answers_in_batches(runner, x_NCHW)
    progress.advance(COMPARE)
    evidence = Evidence(model, x_NCHW, reference, answer, closeness, margin)
    few = images_to_batch(x_NCHW)
    close_N = _close_calls(evidence)[:few]
    whole = rows_of(answer, np.arange(few), len(x_NCHW))
    findings = batch_findings(runner, x_NCHW[:few], whole, close_N, closeness)
    progress.advance(COMPARE)
    parity = compare_answers(reference, answer, rounding=rounding, margin=margin)
    # What depends on its neighbours has no answer of its own that could be judged.
    if not any(finding.kind == "neighbours" for finding in findings):
        limits = _limits_of(runner.precision, least_route_agreement)
        findings += _disagreement(evidence, parity, limits)
        if exact and not findings:
            found = router_finding(evidence, runner, rounding) or _between_pixels(evidence, runner)
            findings += [found] if found else []
    file_images = 0
    if decoding is not None:
        of_files, file_images = _from_files(runner, evidence, decoding)
        findings += of_files
    progress.advance(COMPARE)
    return _report(evidence, labels_N, parity, findings, few, file_images, started)


def _between_pixels(evidence: Evidence, runner: Runner) -> Finding | None:
    """Return whether an engine that is right on 8-bit pixels errs between them, as attacks go."""
    few_NCHW = evidence.x_NCHW[: images_to_batch(evidence.x_NCHW)]
    noise_NCHW = np.random.default_rng(0).uniform(-_NOISE, _NOISE, few_NCHW.shape)
    x_NCHW = np.clip(few_NCHW + noise_NCHW, 0, 1).astype(np.float32)
    noisy = replace(
        evidence,
        x_NCHW=x_NCHW,
        reference=reference_answers(evidence.model, x_NCHW),
        answer=answers_in_batches(runner, x_NCHW),
    )
    if not noisy.wrong.any():
        return None
    message = (
        f"the test images, pixels of 8 bits, are answered as they should be, and "
        f"{int(noisy.wrong.sum())} of {len(x_NCHW)} with noise of {_NOISE:g} are not: the engine "
        "rounds its input, which masks gradients without making it robust; export it with an "
        "input of float32"
    )
    return Finding(kind="preprocessing", message=message)


def _close_calls(evidence: Evidence) -> Flags:
    close = [evidence.by_image(~evidence.clear(layer)) for layer in evidence.reference.routes]
    return np.asarray(np.any(close, axis=0) if close else np.zeros(evidence.images, dtype=bool))


def _limits_of(precision: Precision, least_route_agreement: float) -> PrecisionLimits:
    limits = _INT8 if precision == "int8" else _SIXTEEN_BITS
    return replace(limits, routes=max(limits.routes, 1 - least_route_agreement))


def _disagreement(
    evidence: Evidence, parity: ParityReport, limits: PrecisionLimits
) -> list[Finding]:
    """Return why the engine does not agree with its reference; nothing if it does."""
    if evidence.closeness.exact:
        # Images that were routed otherwise are held to the reference on the same way.
        if not _agrees_exactly(parity) or evidence.wrong.any():
            return diagnose(evidence)
        found = tie_break(evidence)
        return [found] if found else []
    if not _agrees(evidence, parity, limits):
        return diagnose(evidence)
    apart = relative_distances(evidence.answer.logits, evidence.reference.logits)
    suspicious = len(apart) >= _FEWEST and np.median(apart) > _SUSPICIOUS * limits.logits
    found = slight_change(evidence) if suspicious else None
    return [found] if found else []


def _agrees_exactly(parity: ParityReport) -> bool:
    """Return whether nothing differs; where all routes are close calls, nothing can be said."""
    differs = (
        parity.non_finite
        or parity.route_flips
        or not parity.max_relative_logit_diff <= parity.logit_tolerance
        or not parity.max_abs_weight_diff <= parity.logit_tolerance
    )
    return not differs


def _agrees(evidence: Evidence, parity: ParityReport, limits: PrecisionLimits) -> bool:
    reference, answer = evidence.reference.logits, evidence.answer.logits
    if not np.isfinite(answer).all():
        return False
    moved_N = total_variation(answer, reference)
    apart_N = relative_distances(answer, reference)
    images = len(moved_N)
    other_N = answer.argmax(axis=1) != reference.argmax(axis=1)
    return bool(
        _by_chance(int((apart_N > limits.logits).sum()), images, _OVER)
        and moved_N.mean() <= limits.probability + FAR / images
        and _by_chance(int((moved_N > FAR).sum()), images, limits.far)
        and _by_chance(int(other_N.sum()), images, limits.predictions)
        and _by_chance(parity.route_flips, parity.clear_rows, limits.routes)
    )


def _by_chance(found: int, of: int, share: float) -> bool:
    return chance_of_more(found, of, share) >= UNLIKELY


def total_variation(
    logits_NC: NDArray[np.float32], other_NC: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return how far apart the softmax of two rows of logits are, in [0, 1], float64 [N]."""
    ours_NC, theirs_NC = (softmax(each) for each in (logits_NC, other_NC))
    return np.asarray(np.abs(ours_NC - theirs_NC).sum(axis=1) / 2)


def _from_files(
    runner: Runner, evidence: Evidence, decoding: Decoding
) -> tuple[list[Finding], int]:
    """Return what goes wrong from PNG files to logits, and how many there were.

    Images that are no 8-bit pixels, or of channels that no file has, make none.
    """
    x_NCHW = evidence.x_NCHW[:_FILES]
    bytes_NCHW = np.round(x_NCHW * 255).astype(np.uint8)
    fits = x_NCHW.shape[1] in (1, 3) and np.array_equal(to_float(bytes_NCHW), x_NCHW)
    if not fits or "PNG" not in decoding.formats:
        return [], 0
    try:
        pixels = [decode(_png(each), "a test image as PNG", decoding).pixels for each in bytes_NCHW]
    except DataError as error:
        return [_bad_files(f"cannot be read: {error}")], len(x_NCHW)
    decoded_NCHW = np.stack(pixels)
    if decoded_NCHW.shape != bytes_NCHW.shape or not np.array_equal(decoded_NCHW, bytes_NCHW):
        return [_bad_files("give other pixels than the data set has")], len(x_NCHW)
    # Among the same images as before, for nothing else is asked here.
    among_NCHW = np.concatenate([to_float(decoded_NCHW), evidence.x_NCHW[_FILES:WHOLE]])
    read = answers_in_batches(runner, among_NCHW).logits[: len(x_NCHW)]
    near_N = evidence.closeness.near(read, evidence.answer.logits[: len(x_NCHW)])
    if (~near_N & np.isfinite(read).all(axis=1) & ~_close_calls(evidence)[: len(x_NCHW)]).any():
        return [_bad_files("give other logits than the same pixels do directly")], len(x_NCHW)
    return [], len(x_NCHW)


def _png(pixels_CHW: NDArray[np.uint8]) -> io.BytesIO:
    pixels = pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    file.seek(0)
    return file


def _bad_files(what: str) -> Finding:
    message = (
        f"test images saved as PNG and read by the bundle's decoder {what}; compare the manifest's "
        "decoding with that of the training run, and export again"
    )
    return Finding(kind="preprocessing", message=message)


def _report(
    evidence: Evidence,
    labels_N: Labels,
    parity: ParityReport,
    findings: list[Finding],
    few: int,
    file_images: int,
    started: float,
) -> ConsistencyReport:
    reference, answer = evidence.reference.logits, evidence.answer.logits
    finite_N = np.isfinite(answer).all(axis=1) & np.isfinite(reference).all(axis=1)
    same_N = (answer.argmax(axis=1) == reference.argmax(axis=1)) & finite_N
    moved, apart = None, None
    if finite_N.any():
        moved = float(total_variation(answer[finite_N], reference[finite_N]).mean())
        apart = float(np.median(relative_distances(answer[finite_N], reference[finite_N])))
    return ConsistencyReport(
        images=evidence.images,
        exact=evidence.closeness.exact,
        size_images=few,
        file_images=file_images,
        accuracy=_accuracy(evidence.reference, evidence.answer, labels_N),
        prediction_agreement=float(same_N.mean()),
        probability_difference=moved,
        logit_difference=apart,
        parity=parity,
        findings=tuple(findings),
        seconds=time.perf_counter() - started,
    )


def _accuracy(reference: Answers, answer: Prediction, labels_N: Labels) -> Pair:
    ours, theirs = (float(is_right(each.logits, labels_N).mean()) for each in (reference, answer))
    return Pair(reference=ours, engine=theirs)
