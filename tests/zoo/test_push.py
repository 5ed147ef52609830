"""Pushing to a hub of our own by the real client, and what the uploaded card says to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from advmoe_deploy.bundle import MANIFEST, MANIFEST_HASH, SIGNATURE, Bundle, open_bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.models.checkpoint import load_checkpoint
from advmoe_deploy.zoo.pack import Packing, pack_run
from advmoe_deploy.zoo.publish import _matching
from advmoe_deploy.zoo.upload import _STALE
from tests.zoo.hub_commands import Done, files_in
from tests.zoo.hub_server import TOKEN, Hub
from tests.zoo.test_pack import results_file, seed_of

SLOW = pytest.mark.slow  # each a process that asks the hub


@pytest.fixture
def push(advmoe: Callable[..., Done]) -> Callable[..., Done]:
    def pushed(*arguments: object, **variables: str) -> Done:
        return advmoe("push", *map(str, arguments), **{"HF_TOKEN": TOKEN, **variables})

    return pushed


@pytest.fixture(scope="module")
def packed(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run in fp16 with a row of results. Read it only."""
    folder = tmp_path_factory.mktemp("packed")
    results = results_file(folder, seed=seed_of(trained_run))
    how = Packing(half=True, results=(results,), licence="apache-2.0")
    pack_run(trained_run, folder / "tiny", how)
    return folder / "tiny"


def metadata(readme: str) -> Any:
    """Return the front matter of a card."""
    _, head, _ = readme.split("---\n", 2)
    return yaml.safe_load(head)


def put_down(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
def test_a_run_goes_up_with_a_card_in_the_hubs_form(
    hub: Hub, push: Callable[..., Done], packed: Path, tmp_path: Path
) -> None:
    hub.put("me/tiny", {"model.onnx": b"of an older push", "notes.txt": b"somebody's"})
    done = push(packed, "--to", "me/tiny", "--json")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/tiny"]
    value, files = json.loads(done.stdout), repo.commits[-1]
    assert value["commit"].endswith(f"/me/tiny/commit/{repo.sha(len(repo.commits) - 1)}")
    assert len(repo.commits) == 3  # the first is empty: one commit, whole or not at all
    assert set(files) == {*value["files"], "notes.txt"}
    assert load_checkpoint(put_down(files, tmp_path / "again") / "model")
    card = metadata(files["README.md"].decode())
    assert (card["license"], card["library_name"]) == ("apache-2.0", "advmoe-deploy")
    (model,) = card["model-index"]
    (result,) = model["results"]
    clean, robust = result["metrics"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    assert (clean["type"], clean["value"]) == ("accuracy", 97.5)
    assert robust["value"] == 90.0
    assert "linf, epsilon 0.05; all 2 attacks of the suite standard; n = 400" in robust["name"]
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_bundle_goes_up_and_opens_again(
    hub: Hub, push: Callable[..., Done], trained_bundle: Bundle, tmp_path: Path
) -> None:
    done = push(trained_bundle.path, "--to", "me/served", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.repos["me/served"].private
    assert "hub:me/served" in done.stdout
    files = dict(hub.repos["me/served"].commits[-1])
    readme = files.pop("README.md")  # the hub's own, which no manifest lists and no download brings
    again = open_bundle(put_down(files, tmp_path / "again"))
    # Other tests may have added to the card since the bundle was opened for all.
    assert again.manifest == open_bundle(trained_bundle.path).manifest
    assert metadata(readme.decode())["pipeline_tag"] == "image-classification"


def test_nothing_of_an_older_push_stays(trained_bundle: Bundle, packed: Path) -> None:
    """Also no signature, which would be one of other files."""
    signed = {*trained_bundle.manifest.files, MANIFEST, MANIFEST_HASH, SIGNATURE}
    for old in (signed, files_in(packed)):
        assert {*_matching([*old, "README.md", "notes.txt"], _STALE)} == {*old}


def test_a_dry_run_uploads_nothing(
    hub: Hub, push: Callable[..., Done], packed: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        done = push(packed, "--to", "me/tiny", "--dry-run", "--overwrite", HF_TOKEN="")
        assert done.returncode == 0, done.stderr
        assert "model-index:" in done.stdout
        assert "nothing was uploaded; it is in tiny-upload" in done.stdout
    assert hub.requests == []
    assert load_checkpoint(tmp_path / "tiny-upload/model")


def test_a_dry_run_replaces_nothing_of_yours(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine", "tiny-upload"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny-upload/README.md").touch()
    for out, flag, said in (
        ("mine", ["--overwrite"], "holds no README.md"),
        ("mine", [], "holds no README.md"),
        ("tiny-upload", [], "pass --overwrite"),
        ("tiny-upload", ["--overwrite"], "holds neither manifest.json nor model/checkpoint.json"),
    ):
        to = ["--to", "me/tiny", "--dry-run", "--out", str(tmp_path / out)]
        assert run(["push", str(packed), *to, *flag]) == 2
        assert said in capsys.readouterr().err
    assert [*(tmp_path / "mine").iterdir()] == []
    assert (tmp_path / "tiny-upload/README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "said"),
    [
        (["--to", "me/tiny"], {"HF_TOKEN": ""}, 2, "'hf auth login', or set HF_TOKEN"),
        pytest.param(["--to", "me/tiny"], {"HF_TOKEN": "hf_wrong"}, 3, "HTTP 401", marks=SLOW),
        pytest.param(["--to", "you/tiny"], {}, 3, "HTTP 403", marks=SLOW),
        pytest.param(["--to", "me/open", "--private"], {}, 2, "exists and is public", marks=SLOW),
        (["--to", "me/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "check the network"),
        pytest.param(["--to", "me/tiny"], {"HF_HUB_OFFLINE": "1"}, 5, "HF_HUB_OFFLINE", marks=SLOW),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    hub: Hub,
    push: Callable[..., Done],
    packed: Path,
    arguments: list[str],
    variables: dict[str, str],
    code: int,
    said: str,
) -> None:
    hub.put("me/open", {})
    done = push(packed, *arguments, **variables)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, said in line) == (code, True), line
    assert done.stdout == ""
    assert "me/tiny" not in hub.repos


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "me/tiny@v1"], "leave @ out"),
        (["--to", "tiny"], "write hub:USER/NAME"),
        (["--to", "me/tiny", "--out", "x"], "go with --dry-run"),
    ],
)
def test_what_is_refused_without_a_hub(
    packed: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(packed), *arguments]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert said in line
    assert shown.out == ""


@pytest.mark.slow
def test_a_hub_that_breaks_off(hub: Hub, push: Callable[..., Done], packed: Path) -> None:
    hub.status = 503
    done = push(packed, "--to", "me/tiny")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "HTTP 503" in line) == (5, True), line
