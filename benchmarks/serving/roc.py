"""Areas under ROC curves, with bootstrap intervals over images."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import rankdata

from advmoe_deploy.runtime.runner import Prediction, joined

_WINDOWS = 100  # clean ones, and as many attacked ones, of each draw


def area(clean: np.ndarray, attacked: np.ndarray) -> float:
    """Return the chance that an attacked one scores higher than a clean one, ties half."""
    ranks = rankdata(np.concatenate([clean, attacked]))[len(clean) :]
    above = ranks.sum() - len(attacked) * (len(attacked) + 1) / 2
    return float(above / (len(clean) * len(attacked)))


def interval(clean: np.ndarray, attacked: np.ndarray, draws: int) -> dict[str, Any]:
    """Return the area and its 95 % interval; both sides are drawn again."""
    random = np.random.default_rng(0)
    areas = [
        area(random.choice(clean, len(clean)), random.choice(attacked, len(attacked)))
        for _ in range(draws)
    ]
    return _described(area(clean, attacked), areas, len(clean), len(attacked))


def window_areas(
    score: Callable[[Prediction], float],
    clean: Prediction,
    attacked: Prediction,
    share: float,
    window: int,
    draws: int,
) -> dict[str, Any]:
    """Return the area for windows of images, of which ``share`` are attacked.

    In each draw the test images are drawn again, and windows from those.
    """
    random = np.random.default_rng(0)
    images, bad = len(clean.logits), round(share * window)
    areas = []
    for _ in range(draws):
        pool = random.integers(images, size=images)
        scores: tuple[list[float], list[float]] = ([], [])
        for _ in range(_WINDOWS):
            scores[0].append(score(picked(clean, random.choice(pool, window))))
            some = random.choice(pool, window)
            scores[1].append(score(_mixed(clean, attacked, some, bad)))
        areas.append(area(np.array(scores[0]), np.array(scores[1])))
    return _described(float(np.mean(areas)), areas, _WINDOWS, _WINDOWS)


def _described(value: float, areas: list[float], clean: int, attacked: int) -> dict[str, Any]:
    low, high = np.quantile(areas, [0.025, 0.975])
    return {
        "auroc": round(value, 4),
        "ci_low": round(float(low), 4),
        "ci_high": round(float(high), 4),
        "n_clean": clean,
        "n_attacked": attacked,
    }


def picked(answer: Prediction, rows: np.ndarray) -> Prediction:
    """Return the answer to the images that ``rows`` number."""

    def of(parts: dict[str, Any]) -> dict[str, Any]:
        return {name: values[rows] for name, values in parts.items()}

    return Prediction(
        answer.logits[rows], of(answer.expert_ids), of(answer.weights), of(answer.margins)
    )


def _mixed(clean: Prediction, attacked: Prediction, rows: np.ndarray, bad: int) -> Prediction:
    return joined([picked(attacked, rows[:bad]), picked(clean, rows[bad:])])
