"""Measure the pages of ``advmoe export --format web`` in headless Chromium.

    python -m benchmarks.serving.web SITE... [--rounds 100]

Each page checks itself: its logits against the native ones, and its networks timed in turns, on one
thread and, as an isolated page, on several. Leave the machine alone meanwhile. Writes
``benchmarks/results/serving/web.json``, or what ``--out`` names.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.profiling.timing import ratio_of_medians
from benchmarks.program import run_program, write
from tests.serving.online.browser import Browser, browsing

RESULT = Path(__file__).parents[1] / "results" / "serving" / "web.json"
SHOWN = ("family", "backbone", "shape", "bundle", "versions", "models", "attack", "data")
# What a page needs to have threads.
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
BEGINS_WITHIN = 1200  # tenths of a second, until a page that has not begun is given up
_WAIT = """
for (let i = 0; ; i++) {
  const found = document.getElementById("check"), said = document.getElementById("status");
  if (!found.hidden) return JSON.parse(found.textContent);
  const asleep = i > %d && said.textContent.startsWith("Loading");
  if (said.className || asleep) throw new Error(said.textContent);
  await new Promise((done) => setTimeout(done, 100));
}
"""


def main() -> None:
    """Measure the pages and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sites", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    result: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "sites": [measured(site, wanted.rounds) for site in wanted.sites],
        "load_after": os.getloadavg(),
    }
    write(wanted.out, result)
    print(json.dumps(result, indent=1))


def measured(site: Path, rounds: int) -> dict[str, Any]:
    """Return what the page at ``site`` is, and what it finds with and without threads."""
    facts = json.loads((site / "site.json").read_text())
    found: dict[str, Any] = {name: facts[name] for name in SHOWN}
    for name, headers in (("plain", {}), ("isolated", ISOLATED)):
        with (
            tempfile.TemporaryDirectory() as folder,
            browsing(Path(folder)) as browser,
            served(site, headers) as url,
        ):
            found[name] = with_ratios(checked(browser, url, rounds), facts["models"])
    return found


def checked(browser: Browser, url: str, rounds: int) -> dict[str, Any]:
    """Return what the page at ``url`` finds when it checks itself."""
    browser.open(f"{url}/index.html?check&rounds={rounds}")
    result: dict[str, Any] = browser.run(_WAIT % BEGINS_WITHIN)
    return result


def with_ratios(found: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ``found`` with medians relative to the first network's, and without single times."""
    times = found["times"]
    all_ms = {name: np.array(each.pop("all_ms")) for name, each in times.items()}
    first = models[0]["name"]
    for name in times.keys() - {first}:
        ratio = ratio_of_medians(all_ms[name], all_ms[first])
        times[name]["relative"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return found


@contextmanager
def served(site: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Serve a folder on the loopback as Python's own server does, and yield its address."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    run_program(main)
