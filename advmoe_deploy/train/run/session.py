"""Training session of one process: epochs, checkpoints, the test at the end."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import numpy as np
import torch
from lightning_fabric import Fabric

from advmoe_deploy.data.augment import to_unit
from advmoe_deploy.data.dataset import Dataset, Split
from advmoe_deploy.errors import DivergedError
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.checkpoint import Checkpoint, load_checkpoint
from advmoe_deploy.progress import Progress, task
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.data.loader import DataLoader, on_device
from advmoe_deploy.train.run.evaluate import Measured, measure, together
from advmoe_deploy.train.run.folder import RunFolder, RunState
from advmoe_deploy.train.run.report import EpochRecord, TrainReport, versions
from advmoe_deploy.train.run.router_robustness import (
    PROBED_IMAGES,
    FlipProbe,
    router_state,
    with_router,
)
from advmoe_deploy.train.run.tensorboard import Board
from advmoe_deploy.train.run.trouble import costly, trouble, unused
from advmoe_deploy.train.step.sparse import is_selectable, nonzero_macs
from advmoe_deploy.train.step.weights import TrainedWeights, place

# Images on which the experts' loads are evened out.
_EVEN_LOADS = 2000
# Values of the images that are measured together; as floats they take four times as many bytes.
_MEASURED_AT_ONCE = 1 << 27


class TrainingSession:
    """The state and the collaborators of one run in one process."""

    def __init__(
        self,
        fabric: Fabric,
        config: TrainConfig,
        data: Dataset,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.fabric = fabric
        self.config = config
        self.data = data
        self.folder = folder
        self.progress = progress
        self.weights = TrainedWeights(fabric, config)
        self.loader = DataLoader(fabric, config, data.train.first(config.train_images))

    def train(self) -> RunState:
        """Train the epochs that are left and return where the run stands."""
        state = self._start()
        per_epoch = self.loader.batches_per_epoch
        leads = self.fabric.is_global_zero
        board = Board(self.folder.tensorboard, state.epoch + 1) if leads else None
        steps, done = self.config.epochs * per_epoch, state.epoch * per_epoch
        if done < steps:
            images = len(self.data.test.first(self.config.test_images))
            self.progress.note(announced(self.config, images, state.epoch))
        with task(self.progress, "train", steps, done), board or nullcontext():
            for _ in range(state.epoch, self.config.epochs):
                state = self._epoch(state)
                if board is not None:
                    board.write(state.history[-1])
        return state

    def finish(self, state: RunState) -> TrainReport:
        """Publish the selected model and return what it reaches on the test set."""
        began = perf_counter()
        self.fabric.barrier()  # the first process has written the checkpoints by now
        _, model = load_checkpoint(self.folder.checkpoint(state.best_epoch))
        attack = _test_attack(self.config)
        with task(self.progress, "test", 1):
            placed = place(self.fabric, model, channels_last=self.config.channels_last)
            measured = self._measure(placed, self.data.test.first(self.config.test_images), attack)
            self.progress.advance("test", robust_accuracy=measured.robust_accuracy)
        seconds = state.seconds + perf_counter() - began
        report = self._report(measured, attack, state, seconds, _cost(self.config, model))
        if self.fabric.is_global_zero:
            self.folder.publish(state.best_epoch, self.data.source)
            self.folder.write_report(report)
        return report

    def _start(self) -> RunState:
        loaded = self.folder.load()
        if loaded is None:
            if self.config.start is not None:
                self.weights.start_from(self.config.start)
            return RunState(epoch=0, best_epoch=0, history=(), seconds=0)
        state, model, tensors = loaded
        self.weights.restore(state.epoch - 1, model, tensors)
        if self.fabric.is_global_zero:
            self.folder.write_metrics(state.history)
        self.progress.note(f"going on after epoch {state.epoch}")
        if state.epoch == self.config.epochs:
            self.progress.note("it was the last: nothing is trained, the test alone is made again")
        if state.processes != self.fabric.world_size or state.threads != torch.get_num_threads():
            self.progress.note(
                f"so far with processes={state.processes} and threads={state.threads}, now "
                f"{self.fabric.world_size} and {torch.get_num_threads()}: the weights will be the "
                "same but for rounding, not bit for bit"
            )
        return state

    def _epoch(self, before: RunState) -> RunState:
        began = perf_counter()
        epoch, config = before.epoch + 1, self.config
        evaluates = config.evaluates(epoch)
        self.weights.begin_epoch(before.epoch)
        if config.balanced_start and before.epoch == config.shared_epochs:
            self.weights.balance_start(next(self.loader.epoch(before.epoch)))
        flips = self._router_flips() if evaluates and config.track_router_robustness else None
        found: dict[str, object] = {"epoch": epoch, "loss": self._steps(before)}
        if config.even_loads and epoch > config.shared_epochs:
            self._even_loads()
        if evaluates:
            attack = AttackSpec(name="pgd", steps=config.holdout_attack_steps)
            model = self.weights.evaluated
            found |= _fields(self._measure(model, self.data.holdout, attack))
            found |= _cost(config, model) | (flips() if flips else {})
        seconds = before.seconds + perf_counter() - began
        record = EpochRecord.model_validate({**found, "seconds": round(seconds, 3)})
        state = before.after(
            record,
            seconds,
            selectable=before.epoch >= config.shared_epochs and is_selectable(config, before.epoch),
            processes=self.fabric.world_size,
            threads=torch.get_num_threads(),
        )
        if self.fabric.is_global_zero:
            self._save(state)
        self.progress.advance("train", 0, epoch=epoch, **record.scalars())
        for line in trouble(config, before.history, record):
            self.progress.note(line)
        return state

    def _steps(self, before: RunState) -> float:
        """Train one epoch and return its mean loss."""
        losses: list[float] = []
        try:
            for batch in self.loader.epoch(before.epoch):
                losses.append(self.weights.step(batch))
                self.progress.advance("train", loss=losses[-1])
        except DivergedError as error:
            kept = f"the last good checkpoint is {self.folder.checkpoint(before.epoch)}"
            if not before.epoch:
                kept = "there is no checkpoint yet"
            raise DivergedError(
                f"epoch {before.epoch + 1}, step {len(losses) + 1}: {error}; {kept}; "
                "train again with a lower lr and router_lr"
            ) from None
        return sum(losses) / len(losses)

    def _even_loads(self) -> None:
        train = self.data.train.first(self.config.train_images)
        rows = np.linspace(0, len(train) - 1, min(len(train), _EVEN_LOADS)).astype(np.int64)
        images, _ = on_device(self.fabric, train.take(rows))
        self.weights.even_loads(to_unit(images))

    def _router_flips(self) -> Callable[[], dict[str, float]]:
        """Count flips now and return what counts them again once the epoch is over."""
        images, labels = on_device(self.fabric, self.data.holdout)
        probe = FlipProbe(
            self.fabric,
            to_unit(images[:PROBED_IMAGES]),
            labels[:PROBED_IMAGES],
            self.config.threat,
            AttackSpec(
                name="pgd", target="straight-through", steps=self.config.holdout_attack_steps
            ),
        )
        model = self.weights.learner.model
        before, router = probe.flips(model), router_state(model)

        def again() -> dict[str, float]:
            with with_router(model, router):
                moved = probe.flips(model)
            return {
                "router_flips_before": before,
                "router_flips_experts_moved": moved,
                "router_flips_after": probe.flips(model),
            }

        return again

    def _measure(self, model: Classifier, split: Split, attack: AttackSpec) -> Measured:
        """Measure part by part: an attack keeps its images as floats, four times over."""
        size = max(1, _MEASURED_AT_ONCE // math.prod(split.images.shape[1:]))
        parts = [
            Split(split.images[first : first + size], split.labels[first : first + size])
            for first in range(0, max(1, len(split)), size)
        ]
        return together([self._measure_part(model, part, attack) for part in parts])

    def _measure_part(self, model: Classifier, split: Split, attack: AttackSpec) -> Measured:
        images, labels = on_device(self.fabric, split)
        threat = self.config.threat
        return measure(
            self.fabric,
            model,
            to_unit(images),
            labels,
            threat=threat,
            attack=attack,
            progress=self.progress,
        )

    def _save(self, state: RunState) -> None:
        checkpoint = Checkpoint(
            model=self.weights.evaluated.spec,
            threat=self.config.threat,
            class_names=self.data.class_names,
            recipe=self.config.model_dump(mode="json"),
            metrics=state.history[-1].measured(),
            provenance={
                "data": self.data.source,
                "fingerprint": self.data.fingerprint and self.data.fingerprint.model_dump(),
                "seed": self.config.seed,
                "epoch": state.epoch,
                "versions": versions(),
                **({"from": start.model_dump()} if (start := self.config.start) else {}),
                **_cost(self.config, self.weights.evaluated),
            },
        )
        self.folder.save(state, checkpoint, self.weights.evaluated, self.weights.resume_tensors())

    def _report(
        self,
        measured: Measured,
        attack: AttackSpec,
        state: RunState,
        seconds: float,
        cost: dict[str, object],
    ) -> TrainReport:
        config = self.config
        # On the hold-out as well, for a test set may be too small to judge by.
        kept = state.history[state.best_epoch - 1]
        lines, remedies = unused(config, measured.expert_load, kept.expert_load)
        return TrainReport(
            **cost,
            run=str(self.folder.path),
            recipe=config.name,
            method=config.method,
            loss=config.loss,
            data=self.data.source,
            epochs=config.epochs,
            selected_epoch=state.best_epoch,
            images=measured.images,
            **_fields(measured),
            threat=config.threat,
            epsilon=config.threat.epsilon,
            attack=attack,
            seed=config.seed,
            seconds=round(seconds, 3),
            device=self.fabric.device.type,
            devices=self.fabric.world_size,
            versions=versions(),
            warnings=(*costly(config), *lines),
            remedies=remedies,
        )


def announced(config: TrainConfig, images: int, done: int) -> str:
    """Return what an estimate of the time left cannot know, once so many epochs are ``done``.

    Steps take unequal times, and a test on so many ``images`` follows.
    """
    longer = ""
    if done < config.shared_epochs:
        longer = f"; from epoch {config.shared_epochs + 1} on steps take longer, for the router"
    return (
        f"epochs: {config.epochs}, then a test that no time left counts ({images:,} images, "
        f"PGD-{config.test_attack_steps}){longer}"
    )


def _fields(measured: Measured) -> dict[str, object]:
    return {
        "clean_accuracy": measured.clean_accuracy,
        "pgd_accuracy": measured.pgd_accuracy,
        "robust_accuracy": measured.robust_accuracy,
        "effective_routes": measured.effective_routes,
        "expert_load": measured.expert_load,
    }


def _test_attack(config: TrainConfig) -> AttackSpec:
    steps, size = config.test_attack_steps, config.test_attack_step_size
    return AttackSpec(name="pgd", steps=steps, step_size=size, seed=config.seed)


def _cost(config: TrainConfig, model: Classifier) -> dict[str, object]:
    """Return what is left of a pruned network."""
    if config.method != "sparse":
        return {}
    macs, density = nonzero_macs(model)
    return {"nonzero_macs": macs, "density": density}
