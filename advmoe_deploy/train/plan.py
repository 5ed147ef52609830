"""Plan of a training: what a request would do, for people, without doing any of it."""

from typing import Any

import numpy as np

from advmoe_deploy.specs import Frozen
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.fit import steps_of
from advmoe_deploy.train.request import TrainRequest


class ClassCounts(Frozen):
    """Images of one class in each split."""

    name: str
    train: int
    holdout: int
    test: int


class RunPlan(Frozen):
    """Settings, images by class and split, optimizer steps and run folder of a training to be."""

    config: TrainConfig
    out: str
    steps: int
    classes: tuple[ClassCounts, ...]

    @property
    def totals(self) -> tuple[int, int, int]:
        """Images to train on, held out and to test on."""
        rows = [(each.train, each.holdout, each.test) for each in self.classes]
        train, holdout, test = map(sum, zip(*rows, strict=True))
        return train, holdout, test

    def report(self) -> dict[str, Any]:
        """Return the plan as JSON takes it."""
        return {"dry_run": True, **self.model_dump(mode="json")}


def plan_of(asked: TrainRequest) -> RunPlan:
    """Return what ``asked`` would do."""
    data, config = asked.data, asked.config
    splits = (
        data.train.first(config.train_images),
        data.holdout,
        data.test.first(config.test_images),
    )
    counts = [np.bincount(split.labels, minlength=len(data.class_names)) for split in splits]
    classes = [
        ClassCounts(name=name, train=train, holdout=holdout, test=test)
        for name, train, holdout, test in zip(
            data.class_names, *(count.tolist() for count in counts), strict=True
        )
    ]
    return RunPlan(
        config=config.model_copy(update={"data": data.source}),
        out=str(asked.out),
        steps=steps_of(config, data),
        classes=tuple(classes),
    )
