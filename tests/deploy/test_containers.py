"""Dockerfile and compose file, which nothing here can build: what they name is there."""

import ast
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from advmoe_deploy.cli.app import app
from advmoe_deploy.export.kserve import manifests
from advmoe_deploy.runtime.onnxruntime.kernels.build import find_compiler
from advmoe_deploy.serving.online.http.guard import _OPEN
from advmoe_deploy.serving.online.offers import split_offer

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
DOCKERFILE, COMPOSE = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "compose.yaml"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and what follows each, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (s.partition(" ") for s in text.splitlines())
        if word
    ]


def values_of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def served(arguments: list[str]) -> dict[str, Any]:
    """Return what ``advmoe serve`` makes of its arguments."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given: dict[str, Any] = command.make_context("serve", [*arguments]).params
    return given


@pytest.mark.parametrize("file", [DOCKERFILE, COMPOSE])
def test_the_first_line_says_that_nobody_tried(file: Path) -> None:
    assert re.match("# Never (built|run) here", file.read_text())


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    copied = [rest.split()[:-1] for rest in values_of("COPY") if "--from" not in rest]
    names = [name for each in copied for name in each]
    assert "advmoe_deploy" in names
    assert sorted(names) == sorted(kept)
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_what_a_build_reads_is_copied_and_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = next(rest.split() for rest in values_of("COPY") if "pyproject.toml" in rest)
    assert {project["readme"], *project["license-files"], "setup.py"} <= {*named}
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE.read_text())
    assert {*extras.split(",")} <= project["optional-dependencies"].keys()


def test_the_program_is_ours_and_no_user_is_root() -> None:
    (start,), (user,) = values_of("ENTRYPOINT"), values_of("USER")
    assert json.loads(start) == ["advmoe", "serve"]
    uid = manifests._USERS["advmoe"]
    assert user == f"{uid}:{uid}"
    assert f"--uid {uid} " in DOCKERFILE.read_text()
    last = [word for word, _ in instructions()].index("USER")
    assert "RUN" not in [word for word, _ in instructions()[last:]]


def test_health_is_asked_where_it_is_told_without_a_token() -> None:
    (check,) = values_of("HEALTHCHECK")
    program = json.loads(check[check.index("[") :])
    assert program[:2] == ["python", "-c"]
    ast.parse(program[2])
    (port, path) = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", program[2])[0]
    assert path in _OPEN
    assert int(port) == served(["b"])["port"]
    assert port in values_of("EXPOSE")[0].split()


def test_the_example_of_docker_is_one_that_serve_takes() -> None:
    comment = "\n".join(
        line[1:].strip() for line in DOCKERFILE.read_text().splitlines() if line.startswith("#")
    )
    words = shlex.split(comment[comment.index("docker run") :].replace("\\\n", " "))
    given = served(words[words.index("advmoe-deploy:local") + 1 :])
    assert given["token_file"] == "/run/token"
    assert f"./token:{given['token_file']}:ro" in words
    assert f"./bundle:{given['bundles'][0]}:ro" in words


def test_services_fit_together() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    server = services["server"]
    given = served(server["command"])
    assert split_offer(given["bundles"][0])[2] == server["volumes"][0]["target"]
    assert given["token_file"] == f"/run/secrets/{server['secrets'][0]}"
    inside = {int(port.rpartition(":")[2]) for port in server["ports"]}
    assert inside == {given["port"], given["grpc_port"]}
    assert int(server["stop_grace_period"].rstrip("s")) > given["drain"] + given["timeout"]
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    scrape = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"server:{given['port']}"]
    assert scrape["authorization"]["credentials_file"] == given["token_file"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            if volume["type"] == "bind" and "$" not in volume["source"]:
                assert (ROOT / volume["source"]).is_file()
        assert {*service["secrets"]} <= compose["secrets"].keys()
        assert {each["source"] for each in service.get("configs", ())} <= compose["configs"].keys()
        assert re.search(r":[^:]+$", service["image"])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_secrets_are_read_by_one_group_and_kept_out_of_the_repository(tmp_path: Path) -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    files = sorted(Path(each["file"]).name for each in compose["secrets"].values())
    comment = re.findall("#   (.*)", COMPOSE.read_text())
    made, given = comment[:2]
    subprocess.run(["sh", "-c", made], cwd=tmp_path, check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o440}
    assert sorted(given.split()[3:]) == files
    (own,) = values_of("USER")
    for service in compose["services"].values():
        user = service.get("user", own if "build" in service else "")
        groups = [user.partition(":")[2], *service.get("group_add", ())]
        assert given.split()[2] in groups
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/{file}" for file in files} <= {*ignored}


def test_grafana_and_prometheus_find_what_is_mounted() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    mounted = {
        volume["target"]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if volume["type"] == "bind"
    }
    contents = {name: yaml.safe_load(each["content"]) for name, each in compose["configs"].items()}
    (rules,) = contents["prometheus"]["rule_files"]
    (provider,) = contents["dashboards"]["providers"]
    assert rules in mounted
    assert provider["options"]["path"] in {str(Path(place).parent) for place in mounted}
    (source,) = contents["datasource"]["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"].startswith("http://prometheus:")


@pytest.mark.skipif(find_spec("compose_spec") is None, reason="compose_spec is not installed")
def test_the_compose_specification_has_every_field() -> None:
    from compose_spec import PyCompose

    text = re.sub(r"\$\{BUNDLE:[^}]*\}", "/srv/bundle", COMPOSE.read_text())
    assert PyCompose.from_yaml(text).service_names() == ["server", "prometheus", "grafana"]
    with pytest.raises(Exception, match="cap_dorp"):
        PyCompose.from_yaml(text.replace("cap_drop", "cap_dorp"))


@pytest.mark.slow
def test_what_is_copied_makes_a_wheel_with_all_that_a_server_needs(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for rest in values_of("COPY"):
        for name in () if "--from" in rest else rest.split()[:-1]:
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, source)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [sys.executable, *words, "--wheel-dir", tmp_path, source],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "advmoe_deploy/serving/online/http/page.html" in names
    assert any(name.endswith("advmoe_ops.so") for name in names) or find_compiler() is None
