"""The model repository extension: what there is, and bundles that are loaded again."""

import json
from typing import Any

from fastapi import FastAPI, Request

from advmoe_deploy.serving.online.http.packing import UnreadError
from advmoe_deploy.serving.online.models import Models
from advmoe_deploy.serving.online.operations.reload import (
    Reloader,
    load_on_request,
    refuse_unload,
)
from advmoe_deploy.serving.online.protocol import RefusedError

_BODY_BYTES = 4096


def add_repository(app: FastAPI, models: Models, reloader: Reloader | None) -> None:
    """Add the addresses below ``/v2/repository``; without ``reloader`` nothing is loaded."""

    @app.post("/v2/repository/index")
    async def index(request: Request) -> list[dict[str, str]]:
        ready = (await _object(request)).get("ready", False)
        if not isinstance(ready, bool):
            raise RefusedError('the body is no JSON object such as {"ready": true}')
        return models.index(ready_only=ready)

    @app.post("/v2/repository/models/{name}/load")
    async def load(name: str, request: Request) -> dict[str, Any]:
        parameters = (await _object(request)).get("parameters")
        fresh = await load_on_request(models, reloader, name, parameters)
        changed = {each.model.version for each in fresh}
        versions = [
            {
                "version": each.model.version,
                "bundle": each.model.identity,
                "changed": each.model.version in changed,
            }
            for each in models.of(name)
        ]
        return {"name": name, "versions": versions}

    @app.post("/v2/repository/models/{name}/unload")
    async def unload(name: str) -> None:  # noqa: ARG001, RUF100 - part of the address
        refuse_unload()


async def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object that the body is; of nothing, an empty one."""
    text = b""
    async for piece in request.stream():
        text += piece
        if len(text) > _BODY_BYTES:
            raise UnreadError(f"the body exceeds the limit of {_BODY_BYTES} bytes", 413)
    try:
        asked = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise RefusedError("the body is no JSON object")
    return asked
