"""The dashboard and the alerts: each metric that they name is one that a server has."""

import json
import re
from pathlib import Path

import httpx

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.limits import Limits
from tests.serving.online.live import INFER, request_for, running, wait_until_ready

DEPLOY = Path(__file__).parents[3] / "deploy"


def exported(bundle: Bundle) -> tuple[set[str], set[str]]:
    """Return names and labels of everything that a server says of itself."""
    images = to_float(load_dataset("digits").test.images[:8])
    with (
        open_runner(bundle, "onnxruntime-plan") as runner,
        running(bundle, runner, Limits(window=8)) as live,
    ):
        wait_until_ready(live.address)
        assert httpx.post(live.url + INFER, json=request_for(images)).status_code == 200
        text = httpx.get(live.url + "/metrics").text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    return {re.split(r"[{ ]", line)[0] for line in samples}, set(re.findall(r'(\w+)="', text))


def test_what_is_watched_is_there(tiny_bundle: Bundle) -> None:
    names, labels = exported(tiny_bundle)
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [each["query"] for each in board["templating"]["list"]]
    alerts = (DEPLOY / "alerts.yml").read_text()
    for text in (*asked, *queries, alerts):
        for name in re.findall(r"\badvmoe_\w+", text):
            assert name in names, name
        for group in re.findall(r"by \(([^)]*)\)", text):
            assert set(re.split(", *", group)) <= labels, group
    for legend in re.findall(r"\{\{(\w+)\}\}", json.dumps(board["panels"])):
        assert legend in labels
    # Whatever a server counts has a place on the board.
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in names}
    unseen = {name for name in families if not any(name in expression for expression in asked)}
    assert unseen == set()


def test_the_board_is_well_made() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
