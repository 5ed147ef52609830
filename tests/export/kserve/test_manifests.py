"""Manifests for KServe: valid and strict, safe names, and arguments that our own server takes."""

import copy
import io
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator, ValidationError, validate
from rich.console import Console

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import app, run
from advmoe_deploy.cli.tables import bundle as tables
from advmoe_deploy.export.kserve.manifests import Manifests, ServingRuntime, kubernetes_name
from advmoe_deploy.export.kserve.yaml_text import yaml_text
from advmoe_deploy.serving.online.offers import split_offer
from tests.export.kserve.schema import INFERENCE_SERVICE, SERVING_RUNTIME, strict

SCHEMAS = {"ServingRuntime": SERVING_RUNTIME, "InferenceService": INFERENCE_SERVICE}
PLACE = ["--storage-uri", "s3://models/cats", "--image", "registry.example.org/advmoe:1.0"]
# A folder with KServe's own definitions, config/crd/full of its repository.
CRD = os.environ.get("ADVMOE_KSERVE_CRD", "")


def documents(runtime: ServingRuntime) -> list[dict[str, Any]]:
    manifests = Manifests("cats", "0" * 64, "s3://models/cats", "registry/advmoe:1", runtime)
    return [*yaml.safe_load_all(manifests.text())]


def places_of(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every key that is ours to misspell, with the mapping that holds it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "annotations":  # whose keys are anybody's
                yield value, key
                yield from places_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from places_of(item)


def test_the_command_writes_what_the_schema_has(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "k.yaml"
    words = ["export", str(tiny_bundle.path), "--format", "kserve", "--out", str(out), *PLACE]
    assert run(words) == 0
    runtime, service = yaml.safe_load_all(out.read_text())
    for document in (runtime, service):
        validate(document, SCHEMAS[document["kind"]], Draft202012Validator)
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"] == "tiny"
    assert predictor["model"]["storageUri"] == "s3://models/cats"
    assert set(predictor["annotations"].values()) == {tiny_bundle.identity}
    assert run(words) == 2
    assert run([*words, "--overwrite", "--server", "triton"]) == 0
    runtime, service = yaml.safe_load_all(out.read_text())
    assert runtime["spec"]["containers"][0]["command"] == ["tritonserver"]
    for document in (runtime, service):
        validate(document, SCHEMAS[document["kind"]], Draft202012Validator)


@pytest.mark.parametrize("runtime", ["advmoe", "triton"])
def test_no_misspelt_field_passes(runtime: ServingRuntime) -> None:
    tried = 0
    for document in documents(runtime):
        judge = Draft202012Validator(SCHEMAS[document["kind"]])
        judge.validate(document)
        for number, _ in enumerate(places_of(document)):
            wrong = copy.deepcopy(document)
            holder, key = [*places_of(wrong)][number]
            holder[f"{key}s"] = holder.pop(key)
            assert not judge.is_valid(wrong), f"{key}s"
            tried += 1
    assert tried > 80


def test_our_server_takes_the_arguments() -> None:
    (container,) = documents("advmoe")[0]["spec"]["containers"]
    assert container["command"] == ["advmoe", "serve"]
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", [*container["args"]]).params
    assert split_offer(given["bundles"][0]) == ("cats", "1", "/mnt/models")
    assert (given["host"], given["insecure"]) == ("0.0.0.0", False)
    ports = [each["containerPort"] for each in container["ports"]]
    assert [given["port"], given["grpc_port"]] == ports
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("readiness", "liveness")} == {
        given["port"]
    }
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert given["token_file"] == f"{mounts['token']}/token"
    grace = documents("advmoe")[1]["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > given["drain"] + given["timeout"]


@pytest.mark.parametrize("runtime", ["advmoe", "triton"])
def test_nothing_runs_with_more_rights_than_it_needs(runtime: ServingRuntime) -> None:
    serving, service = documents(runtime)
    (container,) = serving["spec"]["containers"]
    assert container["securityContext"] == {
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert service["spec"]["predictor"]["securityContext"]["runAsUser"] > 0
    modes = [
        each["secret"]["defaultMode"] for each in serving["spec"]["volumes"] if "secret" in each
    ]
    assert modes == ([0o440] if runtime == "advmoe" else [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cats", "cats"),
        ("Cats_and.Dogs v2", "cats-and-dogs-v2"),
        ("--7 cats--", "model-7-cats"),
        ("été", "t"),
        ("猫", "model"),
        ("", "model"),
        ("a" * 39 + "-b", "a" * 39),
    ],
)
def test_names_are_labels(text: str, name: str) -> None:
    assert kubernetes_name(text) == name
    schema = INFERENCE_SERVICE["properties"]["metadata"]["properties"]["name"]
    validate(kubernetes_name(text), schema)


@pytest.mark.parametrize(
    "value", ["no", "1", "1.5", "a: b", "- a", "x # y", "'", '"', "", " a", "Null", "s3://é\n", "~"]
)
def test_a_string_stays_one(value: str) -> None:
    given = {value or "k": [{"a": value, "b": [value, True, 7]}], "deep": {"er": {"c": value}}}
    assert yaml.safe_load(yaml_text(given)) == given


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (PLACE[:2], "needs --storage-uri and --image"),
        ([*PLACE[:3], "advmoe:latest"], "names no tag or digest"),
        ([*PLACE[:3], "registry:5000/advmoe"], "names no tag or digest"),
        (["--storage-uri", "/srv/cats", *PLACE[2:]], "no address that KServe fetches"),
        (["--storage-uri", "s3://a\nb: c", *PLACE[2:]], "no address that KServe fetches"),
        ([*PLACE, "--precision", "fp16"], "--precision does not go with --format kserve"),
        ([*PLACE, "--mount", "/m"], "goes with --format triton alone"),
        ([*PLACE, "--format", "onnx"], "goes with --format kserve alone"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str],
    said: str,
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "k.yaml"
    words = ["export", str(tiny_bundle.path), "--format", "kserve", "--out", str(out), *words]
    assert run(words) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("to", ["kserve", "triton", "web"])
def test_nothing_is_put_into_the_bundle(
    to: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(tiny_bundle.path), "--format", to]
    out = tiny_bundle.path / "segments" / "k"
    assert run([*words, "--out", str(out), *(PLACE if to == "kserve" else [])]) == 2
    assert "is in the bundle" in capsys.readouterr().err
    assert not out.exists()


def test_what_to_type_next_is_safe_to_paste(tiny_bundle: Bundle) -> None:
    console, out = Console(width=200, file=io.StringIO(), record=True), Path("k [b]; id.yaml")
    console.print(tables.manifests_report(out, "cats", tiny_bundle))
    (hint,) = [line for line in console.export_text().splitlines() if line.startswith("next")]
    assert shlex.split(hint)[-1] == str(out)


def test_the_token_is_on_no_command_line() -> None:
    manifests = Manifests("cats", "0" * 64, "s3://models/cats", "registry/advmoe:1", "advmoe")
    (line,) = [line for line in manifests.text().splitlines() if "create secret" in line]
    assert line.split("|")[0].strip("# ") == "openssl rand -hex 32"
    assert "generic cats-token --from-file=token=/dev/stdin" in line


def test_json_says_what_was_written(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "k.yaml"
    words = ["export", str(tiny_bundle.path), "--format", "kserve", "--out", str(out), *PLACE]
    assert run([*words, "--json"]) == 0
    expected = {"manifests": str(out), "name": "tiny", "bundle": tiny_bundle.identity}
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.slow
@pytest.mark.skipif(not CRD, reason="ADVMOE_KSERVE_CRD names no folder with KServe's definitions")
@pytest.mark.parametrize("runtime", ["advmoe", "triton"])
def test_kserve_s_own_definitions_have_every_field(runtime: ServingRuntime) -> None:
    for document in documents(runtime):
        plural = f"{document['kind'].lower()}s"
        definition = yaml.safe_load((Path(CRD) / f"serving.kserve.io_{plural}.yaml").read_text())
        version = document["apiVersion"].rpartition("/")[2]
        (schema,) = [
            each["schema"]["openAPIV3Schema"]
            for each in definition["spec"]["versions"]
            if each["name"] == version
        ]
        schema = strict(schema)
        schema["properties"]["metadata"].pop("additionalProperties", None)  # Kubernetes' own
        validate(document, schema, Draft202012Validator)
        wrong = copy.deepcopy(document)
        holder = wrong["spec"].get("predictor", wrong["spec"])
        holder["protocolVersionss"] = "v2"
        with pytest.raises(ValidationError):
            validate(wrong, schema, Draft202012Validator)
