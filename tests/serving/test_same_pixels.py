"""Training, verify and predict see the same pixels of a file, whatever wrote it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advmoe_deploy.bundle import CARD, MANIFEST, Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.decode import decode_file
from advmoe_deploy.data.matching import Trained, matching_test_images
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.specs import ModelSpec, ThreatModel
from advmoe_deploy.verify.verify import verify_bundle

CLASSES = ("dark", "light")
Rng = np.random.Generator


def wide(light: bool, rng: Rng) -> Image.Image:
    """The thing in the middle, its contrary around it."""
    pixels = rng.integers(0, 60, (16, 48, 3), dtype=np.uint8)
    middle = np.zeros((16, 48, 1), bool)
    middle[:, 16:32] = True
    return Image.fromarray(np.where(middle == light, pixels + 180, pixels))


def on_its_head(light: bool, rng: Rng) -> Image.Image:
    """Light above or below, of another size than the model's."""
    pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
    pixels[slice(10) if light else slice(10, 20)] += 180
    return Image.fromarray(pixels)


def scan(light: bool, rng: Rng) -> Image.Image:
    """16-bit grey."""
    return Image.fromarray(rng.integers(0, 9000, (16, 16), dtype=np.uint16) + 50_000 * light)


def clear(light: bool, rng: Rng) -> Image.Image:
    """Half-transparent, in a palette."""
    pixels = rng.integers(0, 256, (16, 17, 4), dtype=np.uint8) // 2 + 120 * light
    return Image.fromarray(pixels.astype(np.uint8), "RGBA").quantize(16)


KINDS: dict[str, Callable[[bool, Rng], Image.Image]] = {
    "wide.png": wide,
    "head.jpg": on_its_head,
    "scan.tif": scan,
    "clear.png": clear,
    "first.gif": wide,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of each kind and class to train on, and three to test on."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 3
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for kind, made in KINDS.items():
                for index in range(3):
                    options = {"exif": exif, "quality": 95} if kind == "head.jpg" else {}
                    file = folder / split / name / f"{index}-{kind}"
                    made(bool(label), rng).save(file, **options)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An untrained AdvMoE for the photos: which images it gets right is chance, and is compared."""
    source, root = f"folder:{folder}?size=16", tmp_path_factory.mktemp("photo-model")
    spec = ModelSpec(
        family="advmoe", num_classes=2, num_experts=2, ratio=0.5, width=8, router_width=4,
        image_size=16,
    )  # fmt: skip
    images = torch.from_numpy(to_float(load_dataset(source).train.images))
    checkpoint = Checkpoint(
        model=spec,
        threat=ThreatModel(epsilon=0.02),
        class_names=CLASSES,
        recipe={"name": "untrained"},
        metrics={},
        provenance={"data": source},
    )
    (root / "run" / "model").mkdir(parents=True)
    save_checkpoint(root / "run" / "model", checkpoint, untrained_model(spec, images))
    export_run(root / "run", root / "bundle")
    return open_bundle(root / "bundle")


def test_predict_answers_each_image_as_verify_does(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    source, decoding = f"folder:{folder}?size=16", bundle.manifest.decoding
    classify_files(bundle, str(folder / "val"), tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * len(KINDS)
    manifest = bundle.manifest
    trained = Trained(manifest.model, manifest.class_names, decoding)
    images, labels = matching_test_images(source, trained)
    with open_runner(bundle) as runner:
        answers = runner.infer(images).logits.argmax(axis=1)
    of_verify = {
        image.tobytes(): int(answer) for image, answer in zip(images, answers, strict=True)
    }
    assert len(of_verify) == len(rows)
    for row in rows:
        pixels = to_float(decode_file(Path(row["path"]), decoding).pixels)
        assert row["label_id"] == of_verify[pixels.tobytes()], row["path"]
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert right == int((answers == labels).sum())
    report = verify_bundle(bundle, images=len(rows))
    assert report.clean_accuracy.engine == right / len(rows)


def test_the_bundle_says_how_files_are_read(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    assert Decoding.model_validate(manifest["decoding"]) == Decoding.of(16)
    card = (bundle.path / CARD).read_text()
    assert "turned upright by its EXIF orientation and read as RGB" in card
    assert "The central square, 16/16 of the shorter side, is scaled to 16 x 16" in card


def test_predict_and_verify_follow_the_bundle(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    closer = Decoding(size=16, channels=3, shorter_side=24)
    spec, source = bundle.manifest.model, f"folder:{folder}?size=16"
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"decoding": closer}))
    classify_files(changed, str(folder / "val"), tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    files = [Path(row["path"]) for row in rows]
    images = np.stack([to_float(decode_file(file, closer).pixels) for file in files])
    with open_runner(bundle) as runner:
        answers = runner.infer(images).logits.argmax(axis=1)
    assert [row["label_id"] for row in rows] == answers.tolist()
    trained = Trained(spec, bundle.manifest.class_names, closer)
    seen = {image.tobytes() for image in matching_test_images(source, trained)[0]}
    assert seen == {image.tobytes() for image in images}


def test_an_unreadable_file_is_said_alike(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train" / "dark" / "0-head.jpg").read_bytes()
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(3):
                (tmp_path / "data" / split / name / f"{index}.jpg").write_bytes(whole)
    spoilt = tmp_path / "data" / "val" / "dark" / "0.jpg"
    spoilt.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        load_dataset(f"folder:{tmp_path / 'data'}?size=16")
    classify_files(bundle, str(spoilt), tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert str(caught.value) == f"{spoilt}: {row['error']}"
    assert row["error"].startswith("damaged image: ")
