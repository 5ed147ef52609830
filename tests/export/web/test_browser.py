"""The page in a headless Chromium, on the real ONNX Runtime Web."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import MachineError
from advmoe_deploy.export.web.runtime import RELEASE, runtime_files
from advmoe_deploy.export.web.site import write_site
from benchmarks.serving import web
from benchmarks.serving.web import ISOLATED, checked, served, with_ratios
from tests.families import Families
from tests.serving.online.browser import CHROMIUM, Browser, browsing

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
IMAGES, ATTACKS = 10, 6


@pytest.fixture(scope="module")
def hostile(trained_bundle: Bundle) -> Bundle:
    """A bundle all of whose classes are called by a piece of HTML."""
    names = tuple(f"{HOSTILE} {i}" for i in range(10))
    manifest = trained_bundle.manifest.model_copy(update={"class_names": names})
    return Bundle(trained_bundle.path, manifest)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return npm's package, as if it were installed; without the registry nothing here runs."""
    folder = tmp_path_factory.mktemp("package")
    try:
        files = runtime_files()
    except MachineError as error:  # other bytes than those that are pinned are another error
        pytest.skip(str(error))
    for member in RELEASE.members:
        (folder / member.path).parent.mkdir(exist_ok=True)
        (folder / member.path).write_bytes(files[member.name])
    return folder


@pytest.fixture(scope="module")
def site(hostile: Bundle, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "site"
    return write_site(hostile, out, images=IMAGES, runtime=package).path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path / "profile") as browser:
        yield browser


@pytest.mark.parametrize("headers", [{}, ISOLATED], ids=["plain", "isolated"])
def test_logits_are_the_native_ones(site: Path, browser: Browser, headers: dict[str, str]) -> None:
    with served(site, headers) as url:
        found = checked(browser, url, rounds=2)
    assert found["samples"] == IMAGES * ATTACKS
    assert found["not_finite"] == 0
    assert found["compared"] == found["samples"] - found["other_routes"] > 0
    assert found["largest_difference"] < 1e-4
    assert found["margin_of_other_routes"] < 1e-3
    assert found["other_classes"] == 0
    assert found["onnxruntime_web"] == RELEASE.version
    assert list(found["times"]) == ["MoE", "dense", "s-dense"]
    assert all(each["n"] == 2 and each["median_ms"] > 0 for each in found["times"].values())
    assert (found["threads"] > 1) == bool(headers)
    times = with_ratios(found, [{"name": "MoE"}])["times"]
    assert times["dense"]["relative"]["low"] <= times["dense"]["relative"]["high"]
    assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["conv experts", "block experts", "token experts", "dense ViT"])
def test_every_kind_of_expert_runs(
    families: Families, family: str, package: Path, browser: Browser, tmp_path: Path
) -> None:
    _, bundle = families[family]
    made = write_site(bundle, tmp_path / "s", data="digits", images=3, runtime=package)
    with served(made.path) as url:
        found = checked(browser, url, rounds=2)
    assert found["compared"] > 0
    assert found["largest_difference"] < 1e-4
    assert found["margin_of_other_routes"] < 1e-3
    assert browser.complaints == []


SHOWN = """
for (let i = 0; i < 1000 && !document.querySelector("#classes div"); i++) {
  await new Promise((done) => setTimeout(done, 20));
}
"""
MOVED = """
const at = (id) => document.getElementById(id), level = at("level"), time = at("time");
document.querySelectorAll("#strip button")[3].click();
time.textContent = "";
level.value = 5;
level.dispatchEvent(new Event("input"));
for (let i = 0; i < 500 && !time.textContent; i++) {
  await new Promise((done) => setTimeout(done, 20));
}
return document.body.innerText;
"""
TIMED = """
const start = document.getElementById("start");
start.click();
for (let i = 0; i < 3000 && start.disabled; i++) await new Promise((done) => setTimeout(done, 20));
return [...document.querySelectorAll("#times tr")].map((row) => row.cells[0].textContent);
"""


def test_a_page_that_does_not_begin_is_no_endless_wait(
    site: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "BEGINS_WITHIN", 3)
    shutil.copytree(site, tmp_path / "s")
    (tmp_path / "s" / "ort" / RELEASE.members[0].name).unlink()
    with served(tmp_path / "s") as url, pytest.raises(AssertionError, match="If this line stays"):
        checked(browser, url, rounds=2)


BROKEN = """
const at = (id) => document.getElementById(id);
Float32Array.prototype.subarray = () => { throw new Error("no memory left"); };
at("level").value = 5;
at("level").dispatchEvent(new Event("input"));
for (let i = 0; i < 500 && at("status").hidden; i++) {
  await new Promise((done) => setTimeout(done, 20));
}
return at("status").textContent;
"""


def test_what_fails_later_is_said(site: Path, browser: Browser) -> None:
    with served(site) as url:
        browser.open(f"{url}/")
        browser.run(SHOWN)
        assert browser.run(BROKEN) == "no memory left"


def test_the_slider_attacks(site: Path, browser: Browser, tmp_path: Path) -> None:
    with served(site) as url:
        browser.open(f"{url}/")
        browser.run(SHOWN)
        assert browser.run("return document.getElementById('strength').textContent") == "none"
        text = browser.run(MOVED)
        assert "every pixel by at most" in text
        assert f"{HOSTILE} 3" in text
        assert "Experts" in text
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert browser.run("return document.title") == "Mixture of experts under attack"
        assert browser.run(TIMED) == ["MoE", "dense", "s-dense"]
        browser(
            "Emulation.setDeviceMetricsOverride",
            **{"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True},
        )
        assert browser.run("return document.documentElement.scrollWidth") <= 400
        browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert len(shot.convert("RGB").getcolors(1 << 20) or []) > 20  # it is not blank
    assert browser.complaints == []
