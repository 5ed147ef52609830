"""A server is ready only once its engines answer the golden images as the bundle says."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import GOLDEN, MANIFEST, MANIFEST_HASH, Bundle, open_bundle
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.sealing.seal import seal_again
from advmoe_deploy.serving.online.golden import golden_of


def test_engines_of_a_bundle_answer_as_it_says(tiny_bundle: Bundle) -> None:
    golden = golden_of(tiny_bundle)
    on_cpu = [
        each.name
        for each in tiny_bundle.manifest.engines
        if each.backend in {"onnxruntime", "openvino"}
    ]
    assert on_cpu
    for engine in ("onnxruntime", "onnxruntime-plan", *on_cpu):
        with open_runner(tiny_bundle, engine) as runner:
            golden.require(runner.infer(golden.images), runner)


def test_other_routes_and_logits_are_told(tiny_bundle: Bundle) -> None:
    golden = golden_of(tiny_bundle)
    with open_runner(tiny_bundle) as runner:
        answer = runner.infer(golden.images)
        turned = replace(answer, expert_ids={"router": 1 - answer.expert_ids["router"]})
        with pytest.raises(CheckFailedError, match="clear routes flipped"):
            golden.require(turned, runner)
        logits = answer.logits.copy()
        logits[3, 0] += 0.01
        with pytest.raises(CheckFailedError, match="logits differ by"):
            golden.require(replace(answer, logits=logits), runner)
        logits[3, 0] = np.nan
        with pytest.raises(CheckFailedError):
            golden.require(replace(answer, logits=logits), runner)


def test_a_server_that_answers_otherwise_ends(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    seals = shutil.ignore_patterns(MANIFEST, MANIFEST_HASH)
    shutil.copytree(tiny_bundle.path, bundle, ignore=seals)
    with np.load(bundle / GOLDEN) as arrays:
        changed = dict(arrays)
    changed["logits"][5] += 0.5
    np.savez(bundle / GOLDEN, **changed)
    seal_again(bundle, tiny_bundle.manifest)
    assert open_bundle(bundle).has(GOLDEN)  # its hashes are right
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", str(bundle)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    assert "answers the golden images of" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
