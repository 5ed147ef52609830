"""Measure the route monitor as a detector of attacks, and what it costs.

    python -m benchmarks.serving.route_monitor RUN [--out FILE]

The figures that the monitor watches (load, margin of routes, margin of classes) are recorded over
hold-out images; test images, clean and attacked, are judged against them. AUROC 0.5 is a coin.
Of single images: by low margins, and by how far both margins are from their median; all of them,
those that an attack turned, and, for comparison, the clean selves of those, which are easier to
turn than most. Of windows: by the largest drift, where all images are attacked, or one of four.
Intervals, 95 %, are a bootstrap over test images. The attack that knows the monitor keeps the clean
image's experts and margins while it fools the model. Writes
``benchmarks/results/serving/route_monitor.json``.

Shapes: N images, K classes, E experts, B bins.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advmoe_deploy.attacks.find import find_adversarial
from advmoe_deploy.attacks.pgd import eval_mode
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.stored import threat_or
from advmoe_deploy.parity.compare import compare_answers, predictions_of
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.runtime.pathways import work_of
from advmoe_deploy.runtime.routing import share_margins
from advmoe_deploy.runtime.runner import Prediction, joined
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.operations.monitor import CLASSES, Monitor
from advmoe_deploy.specs import AttackSpec, ThreatModel
from benchmarks.program import run_program, write
from benchmarks.serving.knowing import knowing_attack
from benchmarks.serving.roc import interval, picked, window_areas

RESULT = Path(__file__).parents[1] / "results" / "serving" / "route_monitor.json"
WINDOW = 64  # images: a few hundred test images fill several
SHARES = (1.0, 0.25)
ATTACKS = {
    "pgd": AttackSpec(name="pgd", target="straight-through", steps=50),
    "autoattack": AttackSpec(name="autoattack"),
    "square": AttackSpec(name="square", steps=1000),
}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=10_000, help="test images, at most")
    parser.add_argument("--epsilon", type=float, nargs="+", help="by default the run's own")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    result = measure(wanted)
    write(wanted.out, result)
    print(json.dumps(result, indent=1))


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Return how well each attack is told from clean images, and the monitor's cost."""
    checkpoint, model = load_checkpoint(wanted.run / "model")
    data = load_dataset(wanted.data, checkpoint.decoding)
    test = torch.from_numpy(to_float(data.test.images[: wanted.images]))
    labels = torch.from_numpy(data.test.labels[: wanted.images])
    own = threat_or(None, checkpoint.threat, wanted.run)
    threats = [threat_or(epsilon, own, wanted.run) for epsilon in wanted.epsilon or [None]]
    found = [_attacked(model, test, labels, threat) for threat in threats]
    holdout = to_float(data.holdout.images)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_run(wanted.run, Path(folder) / "bundle", data=wanted.data)
        with open_runner(bundle, "onnxruntime-plan") as runner:
            engine = _with_margins(runner)
            report = compare_answers(
                reference_answers(model, holdout), predictions_of(runner, holdout), data="hold-out"
            )
            usual, clean = engine(holdout), engine(test.numpy())
            answers = [
                {name: engine(images.numpy()) for name, images in each.items()} for each in found
            ]
            some = np.resize(holdout, (256, *holdout.shape[1:]))
            cost = _cost(lambda: engine(some), engine(some), report)
    return {
        "run": wanted.run.name,
        "weights_sha256": checkpoint.weights_sha256,
        "model": checkpoint.model.model_dump(mode="json"),
        "data": wanted.data,
        "trained_epsilon": own.epsilon,
        "recorded_on": {"images": len(holdout), "split": "hold-out"},
        "test_images": len(test),
        "clean_accuracy": round(float((clean.logits.argmax(1) == labels.numpy()).mean()), 4),
        "window": WINDOW,
        "draws": wanted.draws,
        "specs": {name: attack.model_dump() for name, attack in ATTACKS.items()},
        "epsilons": {
            f"{threat.epsilon:g}": {
                name: _judged(clean, answer, labels.numpy(), report, usual, wanted.draws)
                for name, answer in each.items()
            }
            for threat, each in zip(threats, answers, strict=True)
        },
        "cost": cost,
        "processor": processor_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "torch")},
    }


def _attacked(
    model: Classifier, images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel
) -> dict[str, torch.Tensor]:
    found = {
        name: find_adversarial(model, images, labels, threat, attack)
        for name, attack in ATTACKS.items()
    }
    with eval_mode(model):
        return found | {"knows the monitor": knowing_attack(model, images, labels, threat)}


def _with_margins(runner: Any) -> Callable[[np.ndarray], Prediction]:
    """Return what answers as a server does: with the margins of routes."""
    work = work_of(runner)

    def answer(images: np.ndarray) -> Prediction:
        pathways_N, rows = work.route(images)
        order_N = np.argsort(pathways_N, kind="stable")
        parts = [
            work.run(int(pathway), rows[order_N[pathways_N[order_N] == pathway]])
            for pathway in np.unique(pathways_N)
        ]
        return picked(joined(parts), np.argsort(order_N))

    return answer


def _judged(
    clean: Prediction,
    attacked: Prediction,
    labels: np.ndarray,
    report: ParityReport,
    holdout: Prediction,
    draws: int,
) -> dict[str, Any]:
    fooled = (attacked.logits.argmax(1) != labels) & (clean.logits.argmax(1) == labels)
    before, after, usual = (_margins(answer) for answer in (clean, attacked, holdout))
    result: dict[str, Any] = {
        "robust_accuracy": round(float((attacked.logits.argmax(1) == labels).mean()), 4),
        "turned": int(fooled.sum()),
    }
    for name, score in _scores(usual).items():
        one, other = score(before), score(after)
        result[f"image: {name}"] = {
            "all": interval(one, other, draws),
            "turned": interval(one, other[fooled], draws) if fooled.any() else None,
            "their clean selves": interval(one, one[fooled], draws) if fooled.any() else None,
        }
    for share in SHARES:
        areas = window_areas(
            lambda answer: _drift(answer, report), clean, attacked, share, WINDOW, draws // 20
        )
        result[f"window: {share:g} attacked"] = areas
    return result


def _margins(answer: Prediction) -> dict[str, np.ndarray]:
    """Return the margins of an answer's images by figure; of tokens, their mean."""
    images = len(answer.logits)
    routes = {name: m.reshape(images, -1).mean(axis=1) for name, m in answer.margins.items()}
    return {**routes, "classes": share_margins(answer.logits)}


def _scores(
    usual: dict[str, np.ndarray],
) -> dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]]:
    """Return scores of single images, higher for what is more suspicious."""
    ordered = {name: np.sort(values) for name, values in usual.items()}

    def rarity(margins: dict[str, np.ndarray]) -> np.ndarray:
        ranks = [np.searchsorted(ordered[n], m) / len(ordered[n]) for n, m in margins.items()]
        return np.abs(np.array(ranks) - 0.5).sum(axis=0)

    low = {f"low margin of {name}": (lambda m, name=name: -m[name]) for name in usual}
    return {**low, "far from both medians": rarity}


def _drift(answer: Prediction, report: ParityReport) -> float:
    """Return the largest drift of one window, as the monitor of a server has it."""
    monitor = Monitor(report, len(answer.logits))
    monitor.add(*_told(answer))
    return max(each.value for each in monitor.drifts if each.of != "entropy")


def _told(answer: Prediction) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return what a server's metrics tell its monitor."""
    margins = {**answer.margins, CLASSES: share_margins(answer.logits)}
    return len(answer.logits), answer.expert_ids, margins


def _cost(compute: Callable[[], Any], answer: Prediction, report: ParityReport) -> dict[str, Any]:
    """Return CPU seconds of a batch in the engine and in the monitor, taken in turn."""
    monitor = Monitor(report, 512)
    told = _told(answer)  # the margins of classes are in the metrics anyway
    works = {"engine": compute, "monitor": lambda: monitor.add(*told)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(200):
        for name, work in works.items():
            began = time.process_time()
            work()
            times[name].append(time.process_time() - began)
    medians = {f"{name}_cpu_ms": 1e3 * float(np.median(spent)) for name, spent in times.items()}
    share = medians["monitor_cpu_ms"] / medians["engine_cpu_ms"]
    return {
        "images": len(answer.logits),
        "n": 200,
        **medians,
        "monitor_per_engine": round(share, 5),
    }


if __name__ == "__main__":
    run_program(main)
