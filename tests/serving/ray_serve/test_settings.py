"""Settings of the Ray Serve application, its plan walked without Ray, and what replicas check."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import BackendUnavailableError, BundleError, CheckFailedError
from advmoe_deploy.plan import Segment
from advmoe_deploy.runtime.pathways import plan_margins, work_of
from advmoe_deploy.runtime.plan_walk import walk
from advmoe_deploy.runtime.routing import Tensors
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online import golden
from advmoe_deploy.serving.ray_serve.app import application
from advmoe_deploy.serving.ray_serve.replicas import BundleOrigin, checked_engines
from advmoe_deploy.serving.ray_serve.settings import Settings, expert_names, most_rows
from tests.families import Families

ROOT = Path(__file__).parents[3]
IMAGES = np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32)
LONG = [pytest.param(f"{kind} experts", marks=pytest.mark.slow) for kind in ("conv", "block")]


@pytest.mark.parametrize("family", ["token experts", *LONG])
def test_a_walk_over_others_engines_gives_the_runner_s_tensors(
    families: Families, family: str
) -> None:
    _, bundle = families[family]
    plan, asked = bundle.manifest.plan, list[tuple[str, int]]()
    engines = checked_engines(bundle, {s.name for s in plan.segments}, threads=1)

    async def ask(segment: Segment, ends: Tensors) -> Tensors:
        asked.append((segment.name, len(next(iter(ends.values())))))
        await asyncio.sleep(0)
        return engines[segment.name].run(ends)

    tensors = asyncio.run(walk(plan, IMAGES, ask))
    with open_runner(bundle, "onnxruntime-plan", threads=1) as runner:
        expected = runner.infer(IMAGES)
    np.testing.assert_array_equal(tensors["logits"], expected.logits)
    for route in plan.routes:
        np.testing.assert_array_equal(tensors[route.expert_ids], expected.expert_ids[route.layer])
        np.testing.assert_array_equal(tensors[route.weights], expected.weights[route.layer])
    experts, most = expert_names(plan), most_rows(plan, len(IMAGES))
    assert experts
    assert max(rows for name, rows in asked if name in experts) <= most
    assert all(rows for _, rows in asked)


def test_margins_are_those_of_the_server_s_own_batches(tiny_bundle: Bundle) -> None:
    with open_runner(tiny_bundle, "onnxruntime-plan", threads=1) as runner:
        rows = work_of(runner).route(IMAGES)[1]
        made = plan_margins(runner.plan, runner.before_last(IMAGES))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made["router.margins"], rows.tensors["router.margins"])
    assert made["router.margins"].shape == (9,)


def test_the_engines_that_were_checked_stay_and_others_are_closed(tiny_bundle: Bundle) -> None:
    (expert, _) = expert_names(tiny_bundle.manifest.plan)
    assert [*checked_engines(tiny_bundle, {expert}, threads=1)] == [expert]


def test_wrong_answers_to_golden_images_are_no_replica(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, answers = golden.read_golden(tiny_bundle, ["router"])
    monkeypatch.setattr(golden, "read_golden", lambda *_: (images[::-1].copy(), answers))
    with pytest.raises(CheckFailedError, match="answers the golden images"):
        checked_engines(tiny_bundle, set(), threads=1)


def test_a_replica_takes_only_the_bundle_that_was_deployed(
    tiny_bundle: Bundle, families: Families, tmp_path: Path
) -> None:
    place = tmp_path / "b"
    shutil.copytree(tiny_bundle.path, place)
    origin = BundleOrigin.of(open_bundle(place))
    assert origin.open().identity == tiny_bundle.identity
    shutil.rmtree(place)
    shutil.copytree(families["token experts"][1].path, place)
    with pytest.raises(BundleError, match="another bundle than the application was built of"):
        origin.open()
    file = open_bundle(place).file("model.onnx")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        origin.open()


def test_without_ray_the_extra_is_named(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"advmoe-deploy\[ray\]"):
        application(tiny_bundle.path)


def test_words_of_a_command_line_are_settings() -> None:
    words = {"bundle": "/srv/cats", "batch": "32", "delay_ms": "0.5", "insecure": "true"}
    settings = Settings.model_validate(words)
    assert (settings.batch, settings.delay_ms, settings.insecure) == (32, 0.5, True)
    limits = Settings.model_validate({**words, "queue": "100", "timeout": "3"}).limits
    assert (limits.queue, limits.max_images, limits.timeout_s) == (100, 100, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "bundle"),
        ({"bundle": "b", "bach": 3}, "bach"),
        ({"bundle": "b", "batch": 0}, "greater than or equal to 1"),
        ({"bundle": "b", "hosts": ["*"]}, "ask for a token"),
        ({"bundle": "b", "batch": 1, "at_once": 257}, "as many as may wait"),
    ],
)
def test_nonsense_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings.model_validate(words)


def test_the_file_of_deploy_fits_a_bundle_of_two_experts(tiny_bundle: Bundle) -> None:
    (app,) = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())["applications"]
    assert app["import_path"] == f"{application.__module__}:build"
    assert Settings.model_validate(app["args"]).batch == 64
    names = [each["name"] for each in app["deployments"]]
    assert names == ["server", "router", *expert_names(tiny_bundle.manifest.plan)]
