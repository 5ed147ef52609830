"""Every program in examples/ runs, as somebody would start it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.select import open_runner
from tests.models.upstream.test_upstream import TINY, model_of, released_of, write_released
from tests.serving.online.live import served, wait_until_ready

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    Image.fromarray(load_dataset("digits").test.images[0, 0]).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


@pytest.fixture
def address(tiny_bundle: Bundle) -> Iterator[str]:
    with open_runner(tiny_bundle) as runner, served(tiny_bundle, runner) as address:
        wait_until_ready(address)
        yield address


def test_train_export_predict(tmp_path: Path) -> None:
    said = output_of("train_export_predict.py", tmp_path, "epochs=1", "model.width=8")
    assert said.count("is called") == 5
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_plain_onnxruntime_answers_what_we_answer(tiny_bundle: Bundle, digit: Path) -> None:
    said = output_of("plain_onnxruntime.py", tiny_bundle.path, digit, digit)
    with open_runner(tiny_bundle) as runner:
        image = load_dataset("digits").test.images[:1].astype("float32") / 255
        best = int(runner.infer(image).logits.argmax())
    assert said.count(f"digit.png: {tiny_bundle.manifest.class_names[best]} (") == 2
    program = (EXAMPLES / "plain_onnxruntime.py").read_text()
    assert "advmoe_deploy" not in program


def test_ask_server(address: str, digit: Path) -> None:
    said = output_of("ask_server.py", f"http://{address}/v2/models/advmoe", digit)
    assert said.startswith("logits [1, 10] [")


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
