"""Pages for browsers: what is in the folder, and what is refused before there is one."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from advmoe_deploy.bundle import MODEL, Bundle, FileRecord
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import BundleError, CheckFailedError
from advmoe_deploy.export.graph.op_bodies import nodes_of
from advmoe_deploy.export.web import samples
from advmoe_deploy.export.web.site import Site, write_site
from advmoe_deploy.progress import Silent
from advmoe_deploy.runtime.select import open_runner
from tests.conftest import assert_nothing_left
from tests.export.web.test_runtime import PACKED, SMALL
from tests.families import Families

IMAGES = 12


def written(bundle: Bundle, out: Path, images: int = 1, **how: Any) -> Site:
    tarball = out.with_name("small.tgz")
    tarball.write_bytes(PACKED)
    return write_site(bundle, out, images=images, runtime=tarball, release=SMALL, **how)


@pytest.fixture(scope="module")
def site(trained_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(trained_bundle, tmp_path_factory.mktemp("web") / "site", IMAGES).path


def facts_of(site: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((site / "site.json").read_text())
    return facts


def test_every_file_has_its_hash(site: Path) -> None:
    lines = (site / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {f.relative_to(site).as_posix(): f for f in site.rglob("*") if f.is_file()}
    assert listed.keys() == files.keys() - {"SHA256SUMS"}
    assert {"index.html", "page.js", "model.onnx", "dense.onnx", "ort/a.wasm"} <= files.keys()
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest


def test_the_page_asks_nobody_else(site: Path) -> None:
    for name in ("index.html", "style.css", "page.js", "model.js", "check.js", "timing.js"):
        text = (site / name).read_text()
        assert "://" not in text
        assert not any(word in text for word in ("innerHTML", "insertAdjacent", "document.write"))
    policy = (site / "index.html").read_text().partition("Content-Security-Policy")[2]
    assert "default-src 'none'; script-src 'self' 'wasm-unsafe-eval';" in policy
    assert "unsafe-inline" not in policy


@pytest.mark.parametrize("family", ["conv experts", "token experts", "dense ViT"])
def test_graphs_hold_standard_operators_only(
    families: Families, family: str, tmp_path: Path
) -> None:
    _, bundle = families[family]
    made = written(bundle, tmp_path / "s", data="digits").path
    for file in made.glob("*.onnx"):
        model = onnx.load_model(file)
        assert {node.domain for node in nodes_of(model.graph)} == {""}
        assert [entry.domain for entry in model.opset_import] == [""]
        assert not model.functions
    outputs = {end.name for end in onnx.load_model(made / MODEL).graph.output}
    assert {route["scores"] for route in facts_of(made)["routes"]} <= outputs
    assert len(facts_of(made)["routes"]) == len(bundle.manifest.plan.routes)


def test_samples_are_attacked_ever_harder(site: Path, trained_bundle: Bundle) -> None:
    facts = facts_of(site)
    epsilon = trained_bundle.manifest.threat.epsilon  # type: ignore[union-attr]
    assert facts["epsilons"] == pytest.approx([epsilon * k for k in (0, 0.25, 0.5, 0.75, 1, 1.5)])
    assert facts["labels"][:10] == list(range(10))  # one of each class, then again
    flat = np.fromfile(site / "samples.bin", "<f4")
    images_SACHW = flat.reshape(IMAGES, len(facts["epsilons"]), *facts["shape"])
    assert 0 <= images_SACHW.min() < images_SACHW.max() <= 1
    moved_SA = np.abs(images_SACHW - images_SACHW[:, :1]).max(axis=(2, 3, 4))
    assert (moved_SA <= np.array(facts["epsilons"]) + 1e-6).all()
    assert (moved_SA[:, 1:] > 0).all()
    expected = json.loads((site / "expected.json").read_text())
    with open_runner(trained_bundle) as runner:
        answer = runner.infer(images_SACHW.reshape(-1, *facts["shape"]))
    np.testing.assert_allclose(expected["logits"], answer.logits, atol=1e-5)
    assert expected["expert_ids"]["router"] == answer.expert_ids["router"].tolist()
    labels_N = np.repeat(facts["labels"], len(facts["epsilons"]))
    right_SA = (answer.logits.argmax(axis=1) == labels_N).reshape(IMAGES, -1)
    assert (np.diff(right_SA.astype(int), axis=1) <= 0).all()  # what fell stays down


def test_where_images_lie_is_not_told(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = trained_bundle.manifest.model.image_shape
    found = np.zeros((2, *shape), np.float32), np.arange(2)
    monkeypatch.setattr(samples, "matching_test_images", lambda *_, **__: found)
    folder = tmp_path / "photos"
    folder.mkdir()
    assert (
        samples.attacked_samples(trained_bundle, 1, Silent(), data=str(folder)).source == "folder"
    )


def test_a_page_replaces_a_page_and_nothing_else(
    trained_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").touch()
    words = ["export", str(trained_bundle.path), "--format", "web", "--out"]
    assert run([*words, str(tmp_path / "theirs"), "--overwrite"]) == 2
    assert "holds no site.json, so it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "thesis").exists()
    made = written(trained_bundle, tmp_path / "s").path
    before = (made / "SHA256SUMS").read_text()
    assert run([*words, str(made)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    (made / "old").touch()
    written(trained_bundle, made, overwrite=True)
    assert (made / "SHA256SUMS").read_text() == before
    assert not (made / "old").exists()


def without(bundle: Bundle, prefix: str) -> Bundle:
    """Return ``bundle`` less the files of that prefix."""
    files = {n: r for n, r in bundle.manifest.files.items() if not n.startswith(prefix)}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"files": files}))


def test_without_baselines_there_is_one_network(trained_bundle: Bundle, tmp_path: Path) -> None:
    made = written(without(trained_bundle, "baselines/"), tmp_path / "s").path
    assert [each["file"] for each in facts_of(made)["models"]] == [MODEL]
    assert [file.name for file in made.glob("*.onnx")] == [MODEL]


def test_what_is_wrong_is_said(
    trained_bundle: Bundle, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out, other = str(trained_bundle.path), tmp_path / "s", tmp_path / "other.tgz"
    other.write_bytes(PACKED)

    def complaint(*words: str) -> str:
        code = run(["export", *words, "--out", str(out)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert_nothing_left(out)
        return f"{code} {line}"

    web = ["--format", "web"]
    assert complaint(str(trained_run), *web).startswith("3 ")
    assert "its SHA-512 differs" in (said := complaint(bundle, *web, "--runtime", str(other)))
    assert said.startswith("3 ")
    assert "3 advmoe: error: " in complaint(bundle, *web, "--runtime", str(tmp_path / "missing"))
    assert "--precision does not go" in complaint(bundle, *web, "--precision", "int8")
    assert "--mount" in complaint(bundle, *web, "--mount", "/models")
    assert "goes with --format web alone" in complaint(bundle, "--format", "onnx", "--images", "3")
    assert "--images goes with --format web alone" in complaint(
        bundle, "--format", "triton", "--images", "3"
    )


def test_without_torch_the_extra_is_named(trained_bundle: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from advmoe_deploy.cli.app import run\n"
        "sys.exit(run(['export', sys.argv[1], '--format', 'web', '--out', sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", code, trained_bundle.path, tmp_path / "s"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install 'advmoe-deploy[train]'" in done.stderr
    assert_nothing_left(tmp_path / "s")


def test_attacks_need_the_reference(trained_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="without its reference weights"):
        written(without(trained_bundle, "reference"), tmp_path / "s")


def changed(bundle: Bundle, folder: Path, model: onnx.ModelProto) -> Bundle:
    """Return a copy of ``bundle`` in ``folder`` whose model is another, with the hash of that."""
    shutil.copytree(bundle.path, folder)
    content = model.SerializeToString()
    (folder / MODEL).write_bytes(content)
    record = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    files = {**bundle.manifest.files, MODEL: record}
    return Bundle(folder, bundle.manifest.model_copy(update={"files": files}))


def test_a_graph_that_answers_otherwise_is_not_written(
    trained_bundle: Bundle, tmp_path: Path
) -> None:
    model = onnx.load_model(trained_bundle.path / MODEL)
    (end,) = (node for node in model.graph.node if "logits" in node.output)
    end.output[list(end.output).index("logits")] = "before"
    model.graph.node.append(helper.make_node("Mul", ["before", "by"], ["logits"], "louder"))
    model.graph.initializer.append(helper.make_tensor("by", onnx.TensorProto.FLOAT, [], [1.01]))
    with pytest.raises(CheckFailedError, match="logits differ by"):
        written(changed(trained_bundle, tmp_path / "b", model), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_bodies_in_a_circle_are_no_graph(trained_bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load_model(trained_bundle.path / MODEL)
    body = model.functions[0]
    body.node.append(helper.make_node(body.name, ["x"], ["y"], domain=body.domain))
    body.opset_import.append(helper.make_opsetid(body.domain, 1))
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read: .*[Cc]ycl") as caught:
        written(changed(trained_bundle, tmp_path / "b", model), tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_an_operator_without_a_body_is_named(trained_bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load_model(trained_bundle.path / MODEL)
    del model.functions[:]
    with pytest.raises(BundleError, match=r"without bodies.*ai\.advmoe\.ExpertDispatch"):
        written(changed(trained_bundle, tmp_path / "b", model), tmp_path / "s")
