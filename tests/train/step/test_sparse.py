"""Pruning: what is kept, what it costs, and that the result is an ordinary dense checkpoint."""

from pathlib import Path

import pytest
import torch

from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.models.macs import macs_of
from advmoe_deploy.train.data.loader import DataLoader
from advmoe_deploy.train.run.folder import RunFolder
from advmoe_deploy.train.run.loop import train
from advmoe_deploy.train.step.sparse import (
    WeightPruning,
    density_of,
    layer_macs,
    nonzero_macs,
    stage_bounds,
    stage_of,
)
from advmoe_deploy.train.step.weights import TrainedWeights
from tests.toy_training import fabric, some_digits, tiny_of


def test_stages_share_the_epochs_as_hydra_does() -> None:
    assert stage_bounds(220) == (0, 100, 120, 220)
    assert stage_bounds(3) == (0, 1, 2, 3)
    assert [stage_of(epoch, 4) for epoch in range(4)] == ["dense", "dense", "scores", "fine-tune"]


def test_the_density_leaves_what_s_dense_computes() -> None:
    config = tiny_of("dense", "sparse", "epochs=3", "model.width=16")
    small = config.model.model_copy(update={"ratio": 0.5})
    layers, others = layer_macs(config.model)
    assert sum(layers.values()) + others == macs_of(config.model).executed
    assert density_of(config) * sum(layers.values()) + others == pytest.approx(
        macs_of(small).executed
    )
    assert density_of(config.model_copy(update={"sparse_density": 0.1})) == 0.1


def test_scores_start_as_the_size_of_the_weights_and_learn_through_the_mask() -> None:
    config = tiny_of("dense", "sparse", "epochs=3")
    weights = TrainedWeights(fabric(), config)
    model, pruning = weights.learner.model, weights.learner.pruning
    assert isinstance(pruning, WeightPruning)
    weights.begin_epoch(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruned = pruning.evaluated()
    assert pruned is not None
    name = "backbone.linear.weight"
    full, kept = before[name].abs(), pruned.get_parameter(name)
    assert full[kept != 0].min() >= full[kept == 0].max()
    assert abs(int(kept.count_nonzero()) - pruning.density * kept.numel()) <= 1
    scores = {name: score.detach().clone() for name, score in pruning.scores.items()}
    weights.step(next(DataLoader(fabric(), config, some_digits().train).epoch(1)))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(not torch.equal(score, scores[n]) for n, score in pruning.scores.items())


def test_a_sparse_run_publishes_a_dense_checkpoint_of_s_denses_cost(tmp_path: Path) -> None:
    config = tiny_of("dense", "sparse", "epochs=6", "model.width=8", "ema_decay=0.5")
    report = train(config, some_digits(), tmp_path / "run")
    assert report.selected_epoch > stage_bounds(6)[2]
    checkpoint, model = load_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.model.family == "dense"
    s_dense = macs_of(config.model.model_copy(update={"ratio": 0.5})).executed
    macs, density = nonzero_macs(model)
    # A layer keeps a whole number of weights: each is off by half a weight's uses at most.
    assert macs == pytest.approx(s_dense, rel=0.01)
    assert (report.nonzero_macs, report.density) == (macs, density)
    assert checkpoint.provenance["nonzero_macs"] == macs
    assert checkpoint.metrics["density"] == density
    state = RunFolder(tmp_path / "run").load()
    assert state is not None
    masks = {n.removeprefix("mask."): m for n, m in state[2].items() if n.startswith("mask.")}
    assert masks
    for name, mask in masks.items():
        assert not model.get_parameter(name)[mask == 0].any(), name
    history = state[0].history
    dense = macs_of(config.model).executed
    assert history[0].nonzero_macs == dense
    assert [record.nonzero_macs for record in history[3:]] == [macs] * 3
