"""Packing a run: half the bytes, the same answers, and a record and a card of what was measured."""

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import InputError, UsageError
from advmoe_deploy.files import sha256_of
from advmoe_deploy.models.checkpoint import load_checkpoint, read_checkpoint
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.examples import convergence as convergence_module
from advmoe_deploy.zoo.evaluation import read_evaluation
from advmoe_deploy.zoo.pack import Packing, pack_run, portable, rounded
from advmoe_deploy.zoo.places import own_folder
from advmoe_deploy.zoo.record import AttackStep, Evaluation, Share, read_record
from tests.conftest import assert_nothing_left
from tests.packaging.source import source_in, wheel_of

# One row as benchmarks/training/digits.py writes it.
ROW = {
    "recipe": "digits-advmoe",
    "seed": 0,
    "clean": {"share": 0.975, "low": 0, "high": 1, "n": 400},
    "robust": {"share": 0.9, "low": 0, "high": 1, "n": 400},
    "standing_after": [
        {"attack": {"name": "pgd"}, "share": 0.93},
        {"attack": {"name": "pgd", "target": "pathway", "loss": "margin"}, "share": 0.9},
    ],
}


def result_of(**changes: Any) -> dict[str, Any]:
    return {"epsilon": 0.05, "suite": "standard", "rows": [{**ROW, **changes}]}


def results_file(folder: Path, **changes: Any) -> Path:
    file = folder / "results.json"
    file.write_text(json.dumps(result_of(**changes)))
    return file


def seed_of(run: Path) -> int:
    """Return the seed that a run says it was trained from: a row of results is found by it."""
    seed: int = read_checkpoint(run / "model").provenance["seed"]
    return seed


@pytest.fixture
def packed(trained_run: Path, tmp_path: Path) -> Path:
    """The trained run in fp16 with a row of results."""
    results = results_file(tmp_path, seed=seed_of(trained_run))
    how = Packing(half=True, results=(results,), licence="apache-2.0")
    pack_run(trained_run, tmp_path / "zoo" / "tiny", how)
    return tmp_path / "zoo" / "tiny"


def test_half_the_bytes_and_the_same_predictions(trained_run: Path, packed: Path) -> None:
    stored = load_file(packed / "model/weights.safetensors")
    whole = load_file(trained_run / "model/weights.safetensors")
    for name, tensor in stored.items():
        floating = whole[name].is_floating_point()
        assert tensor.dtype == (torch.float16 if floating else whole[name].dtype)
        assert torch.equal(tensor, whole[name].to(tensor.dtype))
    checkpoint, model = load_checkpoint(packed / "model")
    assert checkpoint.weights_sha256 == sha256_of(packed / "model/weights.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    record = read_record(packed)
    assert record is not None
    assert record.rounding is not None
    assert record.rounding.images == 1000
    assert record.rounding.prediction_agreement > 0.99
    assert record.rounding.measured_sha256 == sha256_of(trained_run / "model/weights.safetensors")


def test_the_card_says_what_was_measured_and_what_it_is_not_for(packed: Path) -> None:
    card = (packed / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| clean | 97.5 % (95.5 to 98.6 %, n = 400) |" in card
    assert "| robust: all 2 attacks of the suite standard | 90.0 %" in card
    assert "| pgd-50 pathway margin | 90.0 % |" in card
    assert "weights: apache-2.0" in card
    assert "CC BY 4.0" in card
    assert "## Intended use" in card
    assert "## Limits" in card
    assert {file.name for file in packed.iterdir()} == {"model", "record.json", "MODEL_CARD.md"}


def test_a_model_can_be_packed_again_as_it_is(packed: Path, tmp_path: Path) -> None:
    again = pack_run(packed, tmp_path / "again", Packing(half=True))
    assert again == read_record(packed)
    assert sha256_of(tmp_path / "again/model/weights.safetensors") == sha256_of(
        packed / "model/weights.safetensors"
    )


def test_what_fp16_cannot_say_is_refused(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"w holds 1 values beyond 65504.*up to 1e\+05"):
        rounded({"w": torch.tensor([1e5, 1.0])})
    large = tmp_path / "run"
    shutil.copytree(trained_run, large)
    state = load_file(large / "model/weights.safetensors")
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] = -7e4
    save_file(state, large / "model/weights.safetensors")
    fields = json.loads((large / "model/checkpoint.json").read_bytes())
    fields["weights_sha256"] = sha256_of(large / "model/weights.safetensors")
    (large / "model/checkpoint.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match="leave --fp16 out"):
        pack_run(large, tmp_path / "out", Packing(half=True))
    assert_nothing_left(tmp_path / "out")
    pack_run(large, tmp_path / "out", Packing())


@pytest.mark.parametrize("name", ["a:b", ".hidden"])
def test_a_name_is_a_folder(trained_run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a model"):
        pack_run(trained_run, tmp_path / name, Packing())


def test_a_path_of_data_stays_on_its_machine(trained_run: Path) -> None:
    checkpoint = read_checkpoint(trained_run / "model")
    for data, left in (("cifar10:/home/me/c10", "cifar10"), ("folder:/home/me?size=64", "")):
        changes = {
            "provenance": {**checkpoint.provenance, "data": data},
            "recipe": {**checkpoint.recipe, "data": data},
        }
        handed_on = portable(checkpoint.model_copy(update=changes))
        assert handed_on.provenance["data"] == left
        assert "/home/me" not in handed_on.model_dump_json()
    assert portable(checkpoint) == checkpoint
    for source, left in (("/home/me/a", ""), ("zoo:cifar10-advmoe", "zoo:cifar10-advmoe")):
        start = {"source": source, "path": "/home/me/a", "weights_sha256": "ab", "new_head": True}
        begun = {"start": start, "chosen": {"from": f"{source}: its weights", "lr": "0.1"}}
        changes = {
            "provenance": {**checkpoint.provenance, "from": start},
            "recipe": {**checkpoint.recipe, **begun},
        }
        handed_on = portable(checkpoint.model_copy(update=changes))
        assert "/home/me" not in handed_on.model_dump_json()
        assert handed_on.recipe["start"] == handed_on.provenance["from"]
        assert handed_on.recipe["start"]["source"] == left
        assert handed_on.recipe["chosen"] == {"lr": "0.1"}


def test_a_training_run_is_not_replaced(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "runs" / "mine")
    before = sorted(run.rglob("*"))
    with pytest.raises(UsageError, match=r"holds no record\.json, so it is not replaced"):
        pack_run(run, run, Packing(half=True), overwrite=True)
    assert sorted(run.rglob("*")) == before


def test_a_zoo_in_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ADVMOE_ZOO", "~/zoo")
    assert own_folder() == tmp_path / "zoo"


def test_results_of_another_model_are_refused(trained_run: Path, tmp_path: Path) -> None:
    own = seed_of(trained_run)
    for changes, complaint in (
        ({"seed": own + 1}, f"0 rows of recipe digits-advmoe with seed {own}"),
        (
            {"seed": own, "weights_sha256": "ab" * 32},
            "measured on weights abababababab, the run has",
        ),
    ):
        file = results_file(tmp_path, **changes)
        with pytest.raises(UsageError, match=complaint):
            pack_run(trained_run, tmp_path / "out", Packing(results=(file,)))
        assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no JSON"),
        ("[]", "holds no object"),
        ("{}", "no file of results"),
        ('{"a":' + "[" * 100_000, "no JSON"),
        ('{"rows": 1}', "missing or odd"),
        ('{"rows": ["x"]}', "missing or odd"),
        (json.dumps(result_of(clean={"share": 5, "n": 400})), "missing or odd"),
        (json.dumps(result_of(clean={"share": math.nan, "n": 400})), "missing or odd"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_evaluation(file, {"name": "digits-advmoe", "seed": 0}, "digits")


def test_what_verify_and_report_write_is_read(
    trained_run: Path,
    trained_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        verify_module, "attack_suite", lambda *_: (AttackSpec(name="pgd", steps=3),)
    )
    monkeypatch.setattr(convergence_module, "STEPS", (1, 2))
    bundle, out = str(trained_bundle.path), tmp_path / "report"
    assert run(["verify", bundle, "--images", "20", "--json"]) in (0, 6)
    file = tmp_path / "verified.json"
    file.write_text(capsys.readouterr().out)
    assert run(["report", bundle, "--images", "20", "--no-card", "--out", str(out)]) in (0, 6)
    recipe = read_checkpoint(trained_run / "model").recipe
    verified = read_evaluation(file, recipe, "digits")
    reported = read_evaluation(out / "report.json", recipe, "digits")
    assert (verified.by, verified.clean.n, verified.threat.epsilon) == ("advmoe verify", 20, 0.05)
    assert [step.title for step in verified.attacks] == ["pgd-3"]
    assert verified.robust == reported.robust
    assert reported.weights == sha256_of(trained_run / "model/weights.safetensors")
    pack_run(trained_run, tmp_path / "tiny", Packing(results=(out / "report.json",)))
    card = (tmp_path / "tiny/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "linf, epsilon 0.05, on the weights that are here" in card


def test_many_attacks_are_counted() -> None:
    few, autoattack = ["pgd-50", "rays"], ["apgd-100", "apgd-t-100", "fab-t-100", "square-5000"]
    share = Share.of(0.5, 10)

    def words(titles: list[str]) -> str:
        steps = tuple(AttackStep(title=title, standing=0.5) for title in titles)
        return Evaluation(
            by="b",
            data="d",
            threat=ThreatModel(epsilon=0.1),
            clean=share,
            robust=share,
            attacks=steps,
        ).attack_words

    assert words(few) == "pgd-50, rays"
    assert words([*few, *autoattack]) == "6 attacks, AutoAttack's four among them"
    assert words([*few, *autoattack[1:]]) == "5 attacks"


def test_an_interval_by_hand() -> None:
    share = Share.of(0.5, 100)  # Wilson's for 50 of 100: 40.4 to 59.6 %
    assert (round(share.low, 3), round(share.high, 3)) == (0.404, 0.596)


@pytest.mark.slow
def test_a_wheel_carries_the_models(packed: Path, tmp_path: Path) -> None:
    source = source_in(tmp_path)
    shutil.copytree(packed, source / "advmoe_deploy/zoo/models/tiny")
    wheel = wheel_of(source)
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("model/weights.safetensors", "model/checkpoint.json", "record.json"):
        assert f"advmoe_deploy/zoo/models/tiny/{name}" in names
    assert "advmoe_deploy/zoo/models/tiny/MODEL_CARD.md" in names
