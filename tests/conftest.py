"""Fixtures that several areas share: a small run on digits, and what it exports to."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import onnx
import pytest
from filelock import FileLock

# Networks this small gain nothing from threads, and on a busy machine threads that wait for each
# other lose more than tenfold. Set before torch is loaded, and for every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts background jobs with Ctrl-C ignored, and the processes of a test would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.export.targets import PORTABLE, Target
from advmoe_deploy.models.checkpoint import Checkpoint, save_checkpoint
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.specs import ModelSpec, ThreatModel
from tests.families import Families, spec_of

TINY = ModelSpec(
    family="advmoe",
    num_experts=2,
    ratio=0.5,
    width=8,
    router_width=4,
    image_size=8,
    in_channels=1,
    mean=(0.3,),
    std=(0.4,),
)

TRAINED_RUN = Path(__file__).parent / "data" / "trained-run"

# Bundles that tests share run on every engine.
OPENVINO = Target("openvino", "fp32")


class Notes(Silent):
    """A listener that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name`` that ``make`` fills, in one of the processes that run tests."""
    own = factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, done = shared / "shared" / name, shared / "shared" / f"{name}.made"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def write_run(directory: Path, spec: ModelSpec, *, seed: int = 0) -> Path:
    """Return a run directory with a random model whose BatchNorm and router fit digits."""
    digits = load_dataset("digits")
    images = torch.from_numpy(to_float(digits.test.images))
    (directory / "model").mkdir(parents=True)
    checkpoint = Checkpoint(
        model=spec,
        threat=ThreatModel(epsilon=0.1),
        class_names=digits.class_names,
        recipe={"name": "untrained"},
        metrics={"clean_accuracy": 0.1, "robust_accuracy": 0.0},
        provenance={"data": "digits", "seed": seed},
    )
    save_checkpoint(directory / "model", checkpoint, untrained_model(spec, images, seed=seed))
    return directory


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo what a command that a test ran in this process has set for its own process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def baselines_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace and optimise each dense baseline once: all exports of one architecture write the same.

    It is half of the time of an export.
    """
    from advmoe_deploy.export import graph_files
    from advmoe_deploy.export.graph.writer import write_model

    trace = graph_files._baseline

    def once(spec: ModelSpec, progress: Progress) -> onnx.ModelProto:
        key = sha256(spec.model_dump_json().encode()).hexdigest()[:16]

        def make(folder: Path) -> None:
            folder.mkdir()
            write_model(trace(spec, progress), folder / "model.onnx")

        return onnx.load_model(made_once(tmp_path_factory, f"baseline-{key}", make) / "model.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_files, "_baseline", once)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a seeded random AdvMoE for digits, both experts in use."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The export of ``tiny_run``. Read it only; copy the directory to change a file."""
    from advmoe_deploy.export.from_run import export_run

    def make(out: Path) -> None:
        export_run(tiny_run, out, targets=[OPENVINO], made_for=PORTABLE)

    return open_bundle(made_once(tmp_path_factory, "tiny", make))


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """The folder of a bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


@pytest.fixture
def copy(copied: Path) -> Bundle:
    """A bundle that a test may damage."""
    return open_bundle(copied)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what runs whole commands: at the end it would keep one worker busy alone.

    Neighbours wait for the bundle that they share, so that files of sixteen parts take turns.
    Of another ``--trained-run`` only the tests that read it run.
    """
    if config.getoption("--trained-run").resolve() != TRAINED_RUN.resolve():
        read = [each for each in items if "trained_run" in getattr(each, "fixturenames", ())]
        config.hook.pytest_deselected(items=[*{*items} - {*read}])
        items[:] = read
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    files = [*dict.fromkeys(item.path for item in items)]
    part = len(files) // 16 + 1
    places = {path: (i % part, i // part) for i, path in enumerate(files)}
    items.sort(key=lambda item: places[item.path])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let another run stand for ``trained_run``: tests hold whatever was trained."""
    parser.addoption("--trained-run", type=Path, default=TRAINED_RUN)


@pytest.fixture(scope="session")
def trained_run(request: pytest.FixtureRequest) -> Path:
    """The run of a small AdvMoE that is robust on digits. Read it only.

    Its weights are kept, for a training ends otherwise on another CPU; see tests/data/README.md.
    """
    run: Path = request.config.getoption("--trained-run")
    return run.resolve()


@pytest.fixture(scope="session")
def trained_bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The export of ``trained_run``. Read it only."""
    from advmoe_deploy.export.from_run import export_run

    return open_bundle(
        made_once(tmp_path_factory, "trained", lambda out: export_run(trained_run, out))
    )


@pytest.fixture(scope="session")
def int8_bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``trained_run`` in int8 for ONNX Runtime, whatever that loses on this CPU. Read it only."""
    from advmoe_deploy.export.from_run import export_run
    from advmoe_deploy.export.precision import gate

    def make(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate, "MAX_DROP", 100.0)
            export_run(trained_run, out, targets=[Target("onnxruntime", "int8")])

    return open_bundle(made_once(tmp_path_factory, "int8", make))


def assert_nothing_left(out: Path) -> None:
    """Check that neither ``out`` nor a part of it is there."""
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A run and a bundle of each family by name, made when first asked for. Read them only."""
    from advmoe_deploy.export.from_run import export_run

    class Exports(Families):
        def __missing__(self, name: str) -> tuple[Path, Bundle]:
            def make(folder: Path) -> None:
                run = write_run(folder / "run", spec_of(name))
                bundle = folder / "bundle"
                export_run(run, bundle, data="random:64", targets=[OPENVINO], made_for=PORTABLE)

            folder = made_once(tmp_path_factory, name.replace(" ", "-"), make)
            self[name] = folder / "run", open_bundle(folder / "bundle")
            return self[name]

    return Exports()
