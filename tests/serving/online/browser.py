"""A headless Chromium, driven through pipes by its own protocol."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
# Its ends of the pipes have to be the descriptors 3 and 4.
_START = 'exec "$0" --remote-debugging-pipe 3<&{} 4>&{} "$@"'
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


class Browser:
    """One page of a browser, and everything it complained of."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._commands, self._answers, self._count = commands, answers, 0
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            message = self._next()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message = json.loads(text)
        if message.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
            self.complaints.append(json.dumps(message["params"]))
        return message

    def open(self, url: str) -> None:
        """Go to ``url`` and wait until it is loaded."""
        self("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Return what the promise of ``script`` comes to."""
        found = self(
            "Runtime.evaluate",
            expression=f"(async () => {{{script}}})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write a PNG of the page."""
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Yield a browser whose files are in ``profile``; it ends with the block."""
    assert CHROMIUM is not None
    (its_input, commands), (answers, its_output) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [
            *("bash", "-c", _START.format(its_input, its_output), CHROMIUM),
            *(*_FLAGS, f"--user-data-dir={profile}", "about:blank"),
        ],
        pass_fds=(its_input, its_output),
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        with os.fdopen(commands, "wb") as out, os.fdopen(answers, "rb", buffering=0) as back:
            yield Browser(out, back)
    finally:
        process.terminate()
        process.wait()
