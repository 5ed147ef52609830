"""Training: what is configured, what a step does, and what a run leaves."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from advmoe_deploy.data.dataset import Dataset, Split
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import CheckpointError, DivergedError, UsageError
from advmoe_deploy.models.advmoe import AdvMoE
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.progress import Silent
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.evaluate import effective_routes
from advmoe_deploy.train.feed import Batch, Feed
from advmoe_deploy.train.loop import train
from advmoe_deploy.train.losses import class_routing_loss, trades
from advmoe_deploy.train.recipes import RECIPES, apply_overrides, recipe
from advmoe_deploy.train.schedule import epoch_batches, lr_factor
from advmoe_deploy.train.weights import TrainedWeights

TINY = [
    "model.width=4",
    "model.router_width=2",
    "epochs=2",
    "batch_size=16",
    "attack_steps=1",
    "holdout_attack_steps=1",
    "test_attack_steps=2",
    "evaluate_every=1",
]


def tiny(name: str = "digits-advmoe", *settings: str) -> TrainConfig:
    return apply_overrides(recipe(name), [*TINY, *settings])


def some_digits() -> Dataset:
    digits = load_dataset("digits")
    return Dataset(
        source="digits",
        class_names=digits.class_names,
        train=digits.train.take(np.arange(48)),
        holdout=digits.holdout.take(np.arange(20)),
        test=digits.test.take(np.arange(30)),
    )


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


# --- recipes and overrides


def test_every_recipe_builds_and_names_itself() -> None:
    for name in RECIPES:
        assert recipe(name).name == name
    paper = recipe("cifar10-advmoe")
    assert (paper.epochs, paper.batch_size, paper.beta) == (100, 128, 6)
    assert (paper.lr, paper.weight_decay, paper.schedule) == (0.1, 5e-4, "cosine")
    assert (paper.attack_steps, paper.attack_step_size) == (2, 5 / 255)
    assert (paper.class_routing_weight, paper.balanced_start) == (0, False)


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="digits-advmoe"):
        recipe("digit-advmo")


def test_overrides_reach_nested_values() -> None:
    config = apply_overrides(
        recipe("digits-advmoe"), ["epochs=3", "model.num_experts=4", "ema_decay=null"]
    )
    assert (config.epochs, config.model.num_experts, config.ema_decay) == (3, 4, None)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("epoch=3", "did you mean epochs"),
        ("model.num_expert=3", "did you mean model.num_experts"),
        ("epochs", "key=value"),
        ("epochs=zero", "epochs"),
        ("router_lr=0.1", "router_lr"),
        ("model.top_k=3", "top_k=3 exceeds num_experts=2"),
        ("method=at-dense", "trains family dense"),
        ("model=3", "did you mean"),
    ],
)
def test_bad_settings_are_one_line(setting: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        apply_overrides(recipe("digits-advmoe"), [setting])
    assert "\n" not in str(caught.value)


# --- sums


def test_trades_is_cross_entropy_plus_beta_times_kl() -> None:
    clean, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = clean.softmax(1), adversarial.softmax(1)
    by_hand = -math.log(p[0, 0]) + 6 * float((p * (p / q).log()).sum())
    assert float(trades(clean, adversarial, torch.tensor([0]), 6)) == pytest.approx(by_hand)


def test_trades_survives_probabilities_that_underflow() -> None:
    clean = torch.tensor([[500.0, -500.0]], requires_grad=True)
    adversarial = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    loss = trades(clean, adversarial, torch.tensor([0]), 6)
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    assert all(torch.isfinite(t).all() for t in (loss, *gradients))


def test_class_routing_is_best_when_each_class_has_its_expert() -> None:
    split = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    collapsed = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    both = torch.tensor([0, 1])
    assert float(class_routing_loss(split, both, 2)) == pytest.approx(-math.log(2))
    assert float(class_routing_loss(collapsed, both, 2)) == pytest.approx(0, abs=1e-6)
    # A class that goes half here, half there tells nothing of its expert.
    assert float(class_routing_loss(split, torch.tensor([0, 0]), 2)) == pytest.approx(0, abs=1e-6)


def test_class_routing_has_a_gradient_where_a_batch_lacks_a_class() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    loss = class_routing_loss(scores, torch.tensor([0, 1]), num_classes=5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] < 0
    assert gradient[1, 1] < 0


def test_effective_routes() -> None:
    assert effective_routes((5, 5)) == pytest.approx(2)
    assert effective_routes((10, 0)) == pytest.approx(1)
    assert effective_routes((3, 1)) == pytest.approx(4 / 3**0.75)


def test_schedules_start_and_end_where_they_should() -> None:
    assert [lr_factor("cosine", d) for d in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [lr_factor("one-cycle", d) for d in (0, 0.3, 1)] == pytest.approx([0.04, 1, 0])


def test_an_epoch_visits_every_image_once() -> None:
    batches = epoch_batches(10, 4, seed=1, epoch=0)
    assert [len(b) for b in batches] == [4, 3, 3]
    assert sorted(np.concatenate(batches)) == list(range(10))
    other = epoch_batches(10, 4, seed=1, epoch=1)
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


# --- one step


def first_batch(config: TrainConfig) -> Batch:
    return next(Feed(fabric(), config, some_digits().train).epoch(0))


def moved(before: dict[str, Tensor], model: AdvMoE) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if (p != before[name]).any()}


def test_the_router_step_moves_the_router_and_the_expert_step_the_rest() -> None:
    config = tiny()
    learner = TrainedWeights(fabric(), config).learner
    assert isinstance(learner.model, AdvMoE)
    batch = first_batch(config)
    learner._set_lr(0.3)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner._update(("router",), batch, batch.images)
    assert moved(before, learner.model) == {"router"}
    middle = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner._update(("backbone",), batch, batch.images)
    assert moved(middle, learner.model) == {"backbone"}


def test_a_step_leaves_no_gradient_and_training_mode() -> None:
    for name in ("digits-advmoe", "digits-at-moe", "digits-dense"):
        config = tiny(name)
        weights = TrainedWeights(fabric(), config)
        assert math.isfinite(weights.step(first_batch(config)))
        model = weights.learner.model
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert all(m.training for m in model.modules())


def test_balanced_start_makes_mean_scores_equal() -> None:
    config = tiny()
    learner = TrainedWeights(fabric(), config).learner
    assert isinstance(learner.model, AdvMoE)
    images = first_batch(config).images
    before = {name: b.clone() for name, b in learner.model.named_buffers()}
    learner.balance_start(images)
    assert all(torch.equal(b, before[name]) for name, b in learner.model.named_buffers())
    mean_E = learner.model.score(images).mean(dim=0).detach()
    assert float(mean_E[0]) == pytest.approx(float(mean_E[1]), abs=1e-5)


def test_a_gradient_that_is_not_finite_is_named_and_not_applied() -> None:
    config = tiny()
    weights = TrainedWeights(fabric(), config)
    model = weights.learner.model
    batch = first_batch(config)
    with torch.no_grad():
        model.backbone.linear.weight.fill_(torch.nan)
    before = model.router.fc.weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(DivergedError, match="the loss is not finite in the router step"):
        weights.step(batch)
    assert torch.equal(model.router.fc.weight, before)  # type: ignore[union-attr]


def test_a_weight_that_is_not_finite_is_named_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    weights = TrainedWeights(fabric(), config)
    optimizer = weights.learner.optimizers["backbone"]
    step = optimizer.step

    def overflowing_step() -> None:
        step()
        weights.learner.model.backbone.linear.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(optimizer, "step", overflowing_step)
    with pytest.raises(DivergedError, match=r"backbone.linear.weight holds 1 values"):
        weights.step(first_batch(config))


def test_the_average_follows_the_weights() -> None:
    config = tiny("digits-dense", "ema_decay=0.75")
    weights = TrainedWeights(fabric(), config)
    start = weights.learner.model.backbone.linear.weight.detach().clone()
    weights.step(first_batch(config))
    end = weights.learner.model.backbone.linear.weight.detach()
    averaged = weights.evaluated.backbone.linear.weight.detach()
    assert torch.allclose(averaged, 0.75 * start + 0.25 * end)
    assert F.mse_loss(start, end) > 0


# --- whole runs


def test_a_run_leaves_a_model_a_line_per_epoch_and_two_checkpoints(tmp_path: Path) -> None:
    config = tiny("digits-advmoe", "epochs=4")
    report = train(config, some_digits(), tmp_path / "run")
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text()) == report.model_dump(mode="json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(1 <= line["effective_routes"] <= 2 for line in lines)
    best = max(lines, key=lambda r: (r["robust_accuracy"], r["clean_accuracy"], r["epoch"]))
    assert report.selected_epoch == best["epoch"]
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"epoch-{e:04d}" for e in {3, 4, report.selected_epoch}}
    checkpoint, model = load_checkpoint(run / "model")
    assert checkpoint.provenance["data"] == "digits"
    assert checkpoint.recipe == config.model_dump(mode="json")
    assert isinstance(model, AdvMoE)
    assert set(checkpoint.metrics) == {"clean_accuracy", "robust_accuracy", "effective_routes"}
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob(".*"))
    assert report.images == 30
    assert report.robust_accuracy <= report.clean_accuracy
    assert report.effective_routes is not None


def test_a_dense_run_has_no_routes(tmp_path: Path) -> None:
    report = train(tiny("digits-s-dense", "epochs=1"), some_digits(), tmp_path / "run")
    assert report.effective_routes is None
    assert report.expert_load == ()


def test_the_cifar10_recipe_runs_in_reduced_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noise(n: int) -> Split:
        images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        return Split(images, np.arange(n, dtype=np.int64) % 10)

    data = Dataset("cifar10:noise", tuple("abcdefghij"), noise(12), noise(4), noise(4))
    config = apply_overrides(recipe("cifar10-advmoe"), [*TINY, "precision=bf16-mixed", "epochs=1"])
    report = train(config, data, tmp_path / "run")
    assert report.data == "cifar10:noise"
    _, model = load_checkpoint(tmp_path / "run" / "model")
    assert all(t.dtype != torch.bfloat16 for t in model.state_dict().values())


def test_a_run_in_the_way_is_refused(tmp_path: Path) -> None:
    config, data, run = tiny("digits-dense", "epochs=1"), some_digits(), tmp_path / "run"
    train(config, data, run)
    with pytest.raises(UsageError, match="--resume"):
        train(config, data, run)
    with pytest.raises(UsageError, match=r"trained with lr=0\.02"):
        train(apply_overrides(config, ["lr=0.5"]), data, run, resume=True)
    with pytest.raises(UsageError, match="no run to resume"):
        train(config, data, tmp_path / "new", resume=True)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.png").touch()
    with pytest.raises(UsageError, match="is no run"):
        train(config, data, other, overwrite=True)
    assert (other / "holiday.png").exists()
    train(config, data, run, overwrite=True)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = some_digits()
    with pytest.raises(UsageError, match=r"model\.image_size"):
        train(recipe("cifar10-advmoe"), data, tmp_path / "run")
    with pytest.raises(UsageError, match="num_classes=10"):
        train(tiny("digits-dense", "model.num_classes=7"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_where_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    data, run = some_digits(), tmp_path / "run"

    class Vandal(Silent):
        """Raises the learning rate beyond all reason once the first epoch is over."""

        def advance(self, task: str, steps: int = 1, **figures: float) -> None:
            if figures.get("epoch") == 1:
                parameters["lr"] = 1e30

    parameters: dict[str, float] = {}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(
        "advmoe_deploy.train.learner.lr_factor",
        lambda schedule, done: parameters.get("lr", lr_factor(schedule, done)),
    )
    try:
        with pytest.raises(DivergedError, match=r"epoch 2, step \d.*epoch-0001") as caught:
            train(tiny("digits-dense"), data, run, progress=Vandal())
    finally:
        monkey.undo()
    assert "\n" not in str(caught.value)
    load_checkpoint(run / "checkpoints" / "epoch-0001")
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "resume.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncate", "change", "delete"])
def test_resume_refuses_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, name: str, harm: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoints" / "epoch-0002" / name
    content = file.read_bytes()
    if harm == "delete":
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-9] + b"\xff" + content[-8:])
    with pytest.raises(CheckpointError, match=r"epoch-0002.*; delete .*before it") as caught:
        train(tiny("digits-dense"), some_digits(), run, resume=True)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny("digits-dense"), some_digits(), run)
    return run


def test_a_finished_run_may_be_resumed_and_stays_the_same(finished: Path) -> None:
    before = (finished / "model" / "weights.safetensors").read_bytes()
    train(tiny("digits-dense"), some_digits(), finished, resume=True)
    assert (finished / "model" / "weights.safetensors").read_bytes() == before


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    config = tiny("digits-advmoe", "epochs=1")
    report = train(config, some_digits(), tmp_path / "run", devices=2)
    assert report.devices == 2
    assert report.images == 30
    assert sum(report.expert_load) == 30
    load_checkpoint(tmp_path / "run" / "model")


def test_an_error_in_a_process_comes_back_as_itself(tmp_path: Path) -> None:
    config = tiny("digits-dense", "epochs=1", "lr=1e30", "schedule=cosine")
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        train(config, some_digits(), tmp_path / "run", devices=2)
