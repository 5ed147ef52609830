"""Adversarial examples that a verification keeps: what is in the file, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.bundle import REFERENCE, Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.errors import DataError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as verify_module
from advmoe_deploy.verify.examples.stored import read_examples

CUT = (AttackSpec(name="pgd", steps=5), AttackSpec(name="square", steps=5))
IMAGES = 60


@pytest.fixture(scope="module")
def kept(
    trained_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path, Any]:
    """A bundle, the file of its examples under a cut suite, and the report as JSON."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "attack_suite", lambda *_: CUT)
        report = verify_module.verify_bundle(
            trained_bundle, images=IMAGES, threads=1, examples=folder / "kept.npz"
        )
    return trained_bundle, folder / "kept.npz", report


def test_the_file_holds_what_the_report_counts(kept: tuple[Bundle, Path, Any]) -> None:
    bundle, path, report = kept
    stored = read_examples(path)
    assert stored.clean.shares == report.clean_accuracy
    assert stored.standing.shares == report.robust_accuracy
    assert [s.attack for s in stored.header.attacks] == list(CUT)
    assert stored.header.model == bundle.manifest.files[REFERENCE].sha256
    assert (stored.header.engine, stored.header.precision) == ("onnxruntime", "fp32")
    assert stored.header.same_function
    assert {"torch", "numpy"} <= set(stored.header.versions)
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["header"]))["threat"] == {"norm": "linf", "epsilon": 0.05}


def test_each_example_fools_who_it_says_and_nobody_else_was_touched(
    kept: tuple[Bundle, Path, Any],
) -> None:
    bundle, path, _ = kept
    stored, test = read_examples(path), load_dataset("digits").test
    clean = to_float(test.images[:IMAGES])
    stored.require_of(clean, test.labels[:IMAGES], path)
    touched_N = (stored.images_NCHW != clean).any(axis=(1, 2, 3))
    assert 1 < touched_N.sum() < IMAGES
    assert (touched_N == (stored.attack_N >= 0)).all()
    with open_runner(bundle, "onnxruntime") as runner:
        answers_N = runner.infer(stored.images_NCHW).logits.argmax(axis=1)
    assert ((answers_N == stored.labels_N) == stored.standing.engine_N).all()


def changed(path: Path, out: Path, **arrays: Any) -> Path:
    """Write the file at ``path`` to ``out`` with other arrays in it; ``None`` leaves one out."""
    with np.load(path) as file:
        values = {**file, **arrays}
    np.savez(out, **{name: value for name, value in values.items() if value is not None})
    return out


def spoilt(values: Any, index: Any, value: Any) -> Any:
    values = values.copy()
    values[index] = value
    return values


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("images", lambda v: v.astype(np.float64), "images is float64, not float32"),
        ("images", lambda v: v[0], "images has shape (1, 8, 8)"),
        ("images", lambda v: spoilt(v, (3, 0, 1, 1), np.nan), "NaN or infinity"),
        ("images", lambda v: spoilt(v, (3, 0, 1, 1), 7.0), "not 0 to 1"),
        ("labels", lambda v: v[:-1], "labels has shape (59,); expected (60,)"),
        ("attack", lambda v: np.full_like(v, 9), "attack names one that is not among the 2"),
        ("attack", lambda v: np.full_like(v, -1), "fooled by no attack"),
        ("fooled_engine", lambda _: None, "fooled_engine is not a file"),
        ("clean_right_engine", lambda v: ~v, "wrong before any attack"),
        ("header", lambda _: np.array("{"), "its header is no JSON"),
        ("header", lambda _: np.array('{"format": 2}'), "its header says"),
        ("header", lambda _: np.array(["a", "b"]), "not one string"),
        ("labels", lambda v: v.astype(object), "allow_pickle"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(
    kept: tuple[Bundle, Path, Any], tmp_path: Path, name: str, how: Any, said: str
) -> None:
    with np.load(kept[1]) as file:
        value = how(file[name])
    out = changed(kept[1], tmp_path / "changed.npz", **{name: value})
    with pytest.raises(DataError) as refused:
        read_examples(out)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_half_a_file_and_text_are_refused(kept: tuple[Bundle, Path, Any], tmp_path: Path) -> None:
    whole = kept[1].read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not at all", whole[:-400] + b"x" * 400):
        (tmp_path / "half.npz").write_bytes(content)
        with pytest.raises(DataError):
            read_examples(tmp_path / "half.npz")


def test_examples_outside_the_ball_or_of_other_images_are_refused(
    kept: tuple[Bundle, Path, Any], tmp_path: Path
) -> None:
    stored, test = read_examples(kept[1]), load_dataset("digits").test
    clean, labels = to_float(test.images[:IMAGES]), test.labels[:IMAGES]
    further = clean.copy()
    further[7] = np.where(stored.images_NCHW[7] > 0.5, 0.0, 1.0)
    for x, y, said in (
        (further, labels, "image 7 is"),
        (clean[:-1], labels[:-1], "the test images are (59, 1, 8, 8)"),
        (clean, np.roll(labels, 1), "has another label"),
    ):
        with pytest.raises(DataError, match=r"kept\.npz: ") as refused:
            stored.require_of(x, y, Path("kept.npz"))
        assert said in str(refused.value)


def test_the_command_writes_them_and_refuses_a_folder_before_the_work(
    kept: tuple[Bundle, Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: CUT[:1])
    command = ["verify", str(kept[0].path), "--images", "20", "--save-examples"]
    assert run([*command, str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err
    (tmp_path / "link.npz").symlink_to(tmp_path / "kept.npz")
    assert run([*command, str(tmp_path / "link.npz"), "--json"]) == 0
    assert len(read_examples(tmp_path / "kept.npz").labels_N) == 20


@pytest.mark.parametrize("option", ["--save-examples", "--resume"])
def test_a_file_without_a_place_is_refused_before_the_attacks(
    option: str,
    kept: tuple[Bundle, Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verify_module, "open_runner", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("in the way")
    nowhere = tmp_path / "file" / "kept.npz"
    assert run(["verify", str(kept[0].path), option, str(nowhere)]) == 3
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert str(nowhere) in said
    argument = {"--save-examples": "examples", "--resume": "resume"}[option]
    with pytest.raises(OSError, match="file"):
        verify_module.verify_bundle(kept[0], **{argument: nowhere})
