"""The page for people: an image is dropped on it, and it says what the model saw."""

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.select import open_runner
from advmoe_deploy.serving.online.protocol import ServedModel, served_model
from tests.serving.online import live as live_module
from tests.serving.online.browser import CHROMIUM, browsing
from tests.serving.online.live import Live, running, wait_until_ready

HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


def hostile(*of: Any, **more: Any) -> ServedModel:
    """Return a model all of whose classes are called by a piece of HTML."""
    model = served_model(*of, **more)
    return replace(model, labels=tuple(f"{HOSTILE} {i}" for i in range(10)))


@contextmanager
def page_of(bundle: Bundle) -> Iterator[Live]:
    with (
        open_runner(bundle, "onnxruntime-plan") as runner,
        patch.object(live_module, "served_model", hostile),
        running(bundle, runner) as live,
    ):
        wait_until_ready(live.address)
        yield live


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(file, "PNG")
    return file.getvalue()


DROP = """
const bytes = Uint8Array.from(atob("{content}"), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "x.png", {{type: "image/png"}}));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: data}}));
const shown = () => ["answer", "problem"].some((id) => !document.getElementById(id).hidden);
for (let i = 0; i < 1000 && !shown(); i++) await new Promise((done) => setTimeout(done, 20));
return document.body.innerText;
"""


def dropped(content: bytes) -> str:
    return DROP.format(content=base64.b64encode(content).decode())


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_an_image_is_dropped(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with page_of(tiny_bundle) as live, browsing(tmp_path / "profile") as browser:
        browser.open(live.url + "/")
        text = browser.run(dropped(png()))
        answer = httpx.post(
            live.url + "/v2/models/advmoe/image",
            content=png(),
            headers={"Content-Type": "image/png"},
        ).json()
        assert f"{answer['label']} ({100 * answer['probability']:.1f} %)" in text
        assert f"expert {answer['routes'][0]['expert_ids'][0]}" in text
        assert f"{answer['routes'][0]['margin']:.3f} ahead of the next" in text
        assert "as seen here" in text
        assert "advmoe, version 1" in text
        assert browser.run("return document.title") == "advmoe serve"
        assert browser.run("return document.querySelectorAll('#answer img').length") == 0
        browser.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert len(shot.convert("RGB").getcolors(1 << 20) or []) > 20  # it is not blank
        assert browser.complaints == []
        # A damaged image is a line on the page; the browser notes the answer's status by itself.
        browser.run('document.getElementById("answer").hidden = true')
        assert "damaged image" in browser.run(dropped(png()[:48]))
        assert browser.run("return document.getElementById('answer').hidden")


def test_the_page_asks_nobody_else(tiny_bundle: Bundle) -> None:
    with page_of(tiny_bundle) as live:
        answer = httpx.get(live.url + "/")
        assert httpx.head(live.url + "/").status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "://" not in answer.text
    assert "innerHTML" not in answer.text


def test_the_page_can_be_left_out(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0", "--no-page"]
    with subprocess.Popen(
        [*command, str(tiny_bundle.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].split("/v2")[0]
        assert httpx.get(url + "/").status_code == 404
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_asks_for_the_token(tiny_bundle: Bundle, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", "--port=0"]
    with subprocess.Popen(
        [*command, f"--token-file={secret}", str(tiny_bundle.path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].split("/v2")[0]
        with browsing(tmp_path / "profile") as browser:
            browser.open(url + "/")
            assert "show the token of this server" in browser.run(dropped(png()))
            said = browser.run(
                'document.getElementById("problem").hidden = true;'
                'document.getElementById("token").value = "0123456789abcdef";'
                'document.querySelector("#enter button").click();' + dropped(png())
            )
            assert "as seen here" in said
            assert "Token" not in said  # it is asked for no more
        process.terminate()
        assert process.wait(timeout=60) == 0
