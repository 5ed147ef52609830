"""The web page for people: one file, which may load nothing but what it brings."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response


def add_page(app: FastAPI) -> None:
    """Add the page, at ``/``."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return Response(text, media_type="text/html", headers=headers)


def _policy(text: str) -> str:
    """Return a policy that lets the page's own style and script in, and asks this server alone."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash_of("script", text),
        "style-src": _hash_of("style", text),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash_of(tag: str, text: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
