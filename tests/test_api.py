"""The Python API: a name loads what it needs when it is used; the README's block runs."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import advmoe_deploy
from advmoe_deploy import api
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
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
    assert getattr(advmoe_deploy, name) is getattr(api, name)
    assert loop.train is not advmoe_deploy.train  # what the sub-package holds is there all the same


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
        (lambda bundle: advmoe_deploy.export(bundle.path), "this is a bundle"),
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
