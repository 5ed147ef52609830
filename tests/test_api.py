"""The Python API: a name loads what it needs when it is used; the README's block runs."""

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

import advmoe_deploy
from advmoe_deploy import api
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import AdvMoEError, UsageError
from advmoe_deploy.train.run import loop

STANDARD = sys.stdlib_module_names
README = Path(__file__).parent.parent / "README.md"


def test_importing_the_package_loads_no_library_and_no_other_module_of_ours() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import advmoe_deploy\n"
        "print(*set(sys.modules) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    names = [name for name in done.stdout.split() if name.split(".")[0] not in STANDARD]
    assert names == ["advmoe_deploy"]


def test_the_package_offers_what_the_api_defines() -> None:
    assert advmoe_deploy.__all__ == api.__all__
    for name in api.__all__:
        assert getattr(advmoe_deploy, name) is getattr(api, name)
        assert name in dir(advmoe_deploy)
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        advmoe_deploy.sweep  # noqa: B018


@pytest.mark.parametrize("name", ["train", "export", "verify"])
def test_a_function_stands_before_the_sub_package_of_its_name(name: str) -> None:
    module = sys.modules.get(f"advmoe_deploy.{name}") or __import__(f"advmoe_deploy.{name}")
    setattr(advmoe_deploy, name, module)  # as the import system does
    function = getattr(advmoe_deploy, name)
    assert function is getattr(api, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert "progress" in inspect.signature(function).parameters
    assert loop.train is not advmoe_deploy.train  # what the sub-package holds is there all the same


def test_modules_are_imported_in_every_form_beside_the_functions() -> None:
    program = (
        "import sys\n"
        "import advmoe_deploy.train.run.report as report\n"
        "import advmoe_deploy.export.targets, advmoe_deploy.verify.suites as suites\n"
        "from advmoe_deploy.train import config\n"
        "import advmoe_deploy as advmoe\n"
        "assert report is sys.modules['advmoe_deploy.train.run.report']\n"
        "assert suites is advmoe.verify.suites and config is advmoe.train.config\n"
        "assert advmoe.export.targets is sys.modules['advmoe_deploy.export.targets']\n"
        "try: advmoe.train('digits-advmo')\n"
        "except advmoe_deploy.errors.UsageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "did you mean digits-advmoe" in done.stdout


# What the functions need, and no model is asked for it: each is refused before.
NEEDED = {"recipe": "digits-advmoe", "file": "x.pt", "source": "advmoe"}
NEEDED |= dict.fromkeys(("run", "bundle", "model", "path"), "nowhere")


def call_with(name: str, **arguments: object) -> object:
    """Call a function of the API with ``arguments`` and whatever else it needs."""
    function = getattr(advmoe_deploy, name)
    needed = {key: NEEDED[key] for key in NEEDED if key in inspect.signature(function).parameters}
    return function(**{**needed, **arguments})


FUNCTIONS = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, key) for name in FUNCTIONS for key in inspect.signature(getattr(api, name)).parameters],
)
def test_what_is_of_no_use_to_an_argument_is_refused_before_anything_is_done(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        call_with(name, **{argument: {3: object()}})
    assert str(refused.value).startswith((f"{argument}=", f"a key of {argument}="))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("train", {"devices": 0}, "devices=0 is too small; the least is 1"),
        ("train", {"devices": True}, "devices=True is no whole number; pass one of at least 1"),
        ("train", {"settings": [3]}, "settings[0]=3 is no text; pass a string"),
        ("train", {"settings": "epoch=1"}, "unknown setting 'epoch'; did you mean epochs?"),
        ("train", {"settings": "precision=16-mixed"}, "needs a GPU, and here is none"),
        ("train", {"resume": "no"}, "resume='no' is neither True nor False"),
        ("train", {"recipe": None}, "recipe=None is no text; pass a string"),
        ("import_checkpoint", {"epsilon": -1}, "epsilon=-1.0 is outside (0, 1]"),
        ("import_checkpoint", {"epsilon": nan}, "epsilon=nan is outside (0, 1]"),
        ("import_checkpoint", {"classes": [1, 2]}, "classes[0]=1 is no text"),
        ("export", {"precisions": "int7"}, "unknown precision 'int7'; did you mean int8?"),
        ("export", {"least_route_agreement": 95}, "=95 is no share; pass a number from 0 to 1"),
        ("export", {"build": {}}, "build={} is no advmoe_deploy.BuildOptions"),
        ("open_runner", {"engine": 3}, "engine=3 is no text; pass a string"),
        ("open_runner", {"threads": -1}, "threads=-1 is too small; the least is 0"),
        ("evaluate", {"class_map": ["a"]}, "class_map=['a'] is no mapping"),
        ("evaluate", {"progress": print}, "has no method start; pass one with start"),
        ("verify", {"max_drop": nan}, "max_drop=nan makes no sense; pass a number of at least 0"),
        ("verify", {"max_drop": -5}, "max_drop=-5 makes no sense"),
        ("verify", {"max_drop": "x"}, "max_drop='x' is no number"),
        ("verify", {"max_drop": 10**400}, "is too large; pass a smaller number"),
        ("export", {"out": "a\0b"}, "holds a NUL, which no path does"),
        ("verify", {"budget": -1.0}, "budget=-1 makes no sense"),
        ("verify", {"images": 2.5}, "images=2.5 is no whole number; pass one of at least 1"),
        ("verify", {"images": "5"}, "images='5' is no whole number"),
        ("verify", {"images": 0}, "images=0 is too small; the least is 1"),
        ("verify", {"resume": True}, "resume=True is no path; pass a string or a pathlib.Path"),
        ("profile", {"batches": [1.5]}, "batches[0]=1.5 is no whole number"),
        ("profile", {"batches": 8}, "batches=8 is no list; pass a list of whole numbers"),
    ],
)
def test_wrong_values_are_refused_in_a_line_and_leave_nothing(
    name: str,
    arguments: dict[str, object],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AdvMoEError, match=re.escape(complaint)) as refused:
        call_with(name, **arguments)
    assert len(str(refused.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_argument_is_told_as_python_does() -> None:
    with pytest.raises(TypeError, match=re.escape("verify() got an unexpected keyword argument")):
        call_with("verify", image=3)


def test_numbers_of_numpy_are_numbers_and_one_string_is_a_list_of_one(tiny_bundle: Bundle) -> None:
    report = advmoe_deploy.profile(
        tiny_bundle, batches=[np.int64(2)], against="dense", engines="onnxruntime:fp32"
    )
    assert {(row.model, row.batch) for row in report.rows} == {("moe", 2), ("dense", 2)}
    (clean,) = {advmoe_deploy.evaluate(tiny_bundle, images=np.int32(4)).images}
    assert clean == 4


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda _: advmoe_deploy.train("digits-advmo"), "did you mean digits-advmoe"),
        (lambda _: advmoe_deploy.export("no run", format="onix"), "did you mean onnx"),
        (lambda _: advmoe_deploy.export("no run", precisions=["int7"]), "did you mean int8"),
        (
            lambda _: advmoe_deploy.export("no run", onnx_only=True),
            "goes with --format trt, not onnx",
        ),
        (
            lambda _: advmoe_deploy.export("no run", least_route_agreement=0.9),
            "--least-route-agreement goes with a --precision below fp32",
        ),
        (lambda bundle: advmoe_deploy.export(bundle.path), "this is a bundle"),
        (
            lambda bundle: advmoe_deploy.export(
                bundle.path, format="trt", precisions=["fp16"], least_route_agreement=0.0
            ),
            "--least-route-agreement goes with a run, and this is a bundle",
        ),
        (lambda bundle: advmoe_deploy.open_runner(bundle, "onnx"), "did you mean onnxruntime"),
        (lambda bundle: advmoe_deploy.verify(bundle, attacks="quik"), "did you mean quick"),
        (lambda bundle: advmoe_deploy.profile(bundle, against=["dence"]), "did you mean dense"),
    ],
)
def test_nonsense_is_refused_with_the_nearest_name(
    call: Callable[[Bundle], object], complaint: str, tiny_bundle: Bundle
) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        call(tiny_bundle)


def test_the_block_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, README, "exec"), names)
    trained, bundle, verified, timed = (
        names[n] for n in ("trained", "bundle", "verified", "timed")
    )
    assert trained.epochs == 1
    assert bundle.path == Path("bundle")
    assert verified.images == 50
    assert verified.robust_accuracy.engine <= verified.clean_accuracy.engine
    assert {row.model for row in timed.rows} == {"moe", "dense"}
    assert names["prediction"].logits.shape == (4, 10)
    assert not names["model"].training
