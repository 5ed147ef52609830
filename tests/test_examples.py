"""Every program in examples/ runs, as somebody would start it."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.data.decode import decode_file
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.runtime.select import open_runner
from tests.models.upstream.test_upstream import TINY, model_of, released_of, write_released
from tests.serving.online.live import served, wait_until_ready

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """A wide, a turned and a 16-bit picture, and one with nothing to it."""
    rng, turned = np.random.default_rng(7), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    noise = rng.integers(0, 256, (4, 90, 90, 3), np.uint8)
    Image.fromarray(noise[0, :40]).save(tmp_path / "wide.png")
    Image.fromarray(noise[1, :60]).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(noise[2, ..., 0].astype(np.uint16) * 100).save(tmp_path / "sixteen.png")
    Image.fromarray(noise[3, :8, :8]).save(tmp_path / "small.png")
    return [tmp_path / f"{name}.png" for name in ("sixteen", "small", "turned", "wide")]


@pytest.fixture
def predicted(
    tiny_bundle: Bundle, pictures: list[Path], tmp_path: Path
) -> list[tuple[str, float, list[int]]]:
    """Class, probability and experts of each picture, as ``advmoe predict`` has them."""
    rows = tmp_path / "rows.jsonl"
    asked = ("predict", tiny_bundle.path, tmp_path / "*.png", "--output", rows)
    assert run([*map(str, asked)]) == 0
    answers = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["path"] for row in answers] == [*map(str, pictures)]
    return [(row["label"], row["probability"], row["expert_ids"]["router"]) for row in answers]


@pytest.fixture
def address(tiny_bundle: Bundle) -> Iterator[str]:
    with open_runner(tiny_bundle) as runner, served(tiny_bundle, runner) as address:
        wait_until_ready(address)
        yield address


def test_train_export_predict(tmp_path: Path) -> None:
    said = output_of("train_export_predict.py", tmp_path, "epochs=1", "model.width=8")
    assert said.count("is called") == 5
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_plain_onnxruntime_answers_what_we_answer(
    tiny_bundle: Bundle, pictures: list[Path], predicted: list, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    said = output_of("plain_onnxruntime.py", tiny_bundle.path, *pictures, HOME=str(home))
    shown = re.findall(r"png: (\w+) \(([\d.]+)%\); router.expert_ids (\[\d\])", said)
    assert len(shown) == len(predicted), said
    for (name, percent, ids), (label, probability, experts) in zip(shown, predicted, strict=True):
        assert (name, json.loads(ids)) == (label, experts)
        assert float(percent) == pytest.approx(100 * probability, abs=0.06)  # it shows one decimal
    assert not [*home.iterdir()]
    program = (EXAMPLES / "plain_onnxruntime.py").read_text()
    assert "advmoe_deploy" not in program


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (8, 3), (72, 3)])
def test_plain_onnxruntime_sees_our_pixels(size: int, channels: int, pictures: list[Path]) -> None:
    decoding = Decoding.of(size, channels)
    pixels_of = runpy.run_path(str(EXAMPLES / "plain_onnxruntime.py"))["pixels_of"]
    for picture in pictures:
        ours = decode_file(picture, decoding).pixels
        theirs = pixels_of(picture, decoding.model_dump(mode="json"))
        assert np.array_equal(np.rint(theirs * 255).astype(np.uint8), ours), picture.name


def test_ask_server(address: str, pictures: list[Path], predicted: list) -> None:
    for picture, (label, probability, experts) in zip(pictures, predicted, strict=True):
        said = output_of("ask_server.py", f"http://{address}/v2/models/advmoe", picture)
        name, percent = said.splitlines()[0].rstrip("%").split(": ")
        assert (name, float(percent)) == (label, pytest.approx(100 * probability, abs=0.006))
        assert said.endswith(f"experts of router: {experts}\n")


def test_a_server_that_is_not_there_is_one_line(pictures: list[Path]) -> None:
    command = [sys.executable, EXAMPLES / "ask_server.py", "http://127.0.0.1:9/v2/models/advmoe"]
    done = subprocess.run([*command, pictures[0]], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not answer" in line
    assert "advmoe serve" in line


def test_import_released(tmp_path: Path) -> None:
    file = write_released(tmp_path / "best.pth", *released_of(model_of(TINY)))
    said = output_of("import_released.py", file, "advmoe", tmp_path / "out", "image_size=16")
    assert "unwrapped: state_dict" in said
    assert (tmp_path / "out" / "bundle" / "manifest.json").is_file()


def test_sample_photos_lie_as_ones_own_would(tmp_path: Path) -> None:
    output_of("sample_photos.py", tmp_path / "photos", 5)  # the least that a class may have
    found = {each.name: len([*each.glob("*.jpg")]) for each in (tmp_path / "photos").iterdir()}
    assert found == {"flower": 5, "leaves": 5, "palace": 5}


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "photos.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # it leaves its run and its bundle there
    notebook = nbformat.read(EXAMPLES / "photos.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": EXAMPLES}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    said = "".join(output.get("text", "") for output in outputs)
    (bundle,) = re.findall(r"advmoe serve (.+)", said)
    open_bundle(Path(bundle))
    assert re.search(r"standing after all attacks: \d+\.\d%", said)


def test_examples_stay_short() -> None:
    programs = sorted(EXAMPLES.glob("*.py"))
    assert programs
    assert all(len(program.read_text().splitlines()) < 60 for program in programs)
