"""The description of the server's addresses by OpenAPI 3.1, kept by hand beside them.

What a request for inference may hold comes from the messages themselves.
"""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from advmoe_deploy import __version__
from advmoe_deploy.serving.online.http.messages import Message

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_TRUTH: Schema = {"type": "boolean"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    """Return an object of these fields and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": [*required],
        "additionalProperties": False,
    }


def _schema(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_CLASS = {"label_id": _WHOLE, "label": _TEXT, "probability": _NUMBER}
_TENSOR = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
# One value of an image; of an image whose tokens are routed, one for each of them.
_PER_ROW: Schema = {"anyOf": [_NUMBER, _list({"anyOf": [_NUMBER, _list(_NUMBER)]})]}
_DURATION = _object({"count": _WHOLE, "ns": _WHOLE})

_SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": _TEXT}),
    "Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Live": _object({"live": _TRUTH}),
    "Ready": _object({"ready": _TRUTH}, name=_TEXT),
    "Model": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_TENSOR),
            "outputs": _list(_TENSOR),
        }
    ),
    "Config": {"type": "object", "required": ["name", "max_batch_size", "input", "output"]},
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _WHOLE,
                        "inference_count": _WHOLE,
                        "execution_count": _WHOLE,
                        "inference_stats": {
                            "type": "object",
                            "additionalProperties": _DURATION,
                        },
                        "batch_stats": _list({}),
                    }
                )
            )
        }
    ),
    "Inference": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": _list(
                _object(
                    {"name": _TEXT, "datatype": _TEXT, "shape": _list(_WHOLE)},
                    data=_list({"type": ["number", "string"]}),
                    parameters={"type": "object"},
                )
            ),
        },
        id=_TEXT,
    ),
    "Image": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            **_CLASS,
            "top": _list(_object(_CLASS)),
            "logit_margin": {"type": ["number", "null"]},
            "routes": _list(
                _object(
                    {
                        "layer": _TEXT,
                        "expert_ids": _PER_ROW,
                        "weights": _PER_ROW,
                        "margin": {"anyOf": [{"type": "null"}, _PER_ROW]},
                    }
                )
            ),
            "image": _object({"width": _WHOLE, "height": _WHOLE}),
            "timing_ms": _object({"read": _NUMBER, "decode": _NUMBER, "answer": _NUMBER}),
        }
    ),
    "Index": _list(
        _object({"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT}),
    ),
    "Loaded": _object(
        {
            "name": _TEXT,
            "versions": _list(_object({"version": _TEXT, "bundle": _TEXT, "changed": _TRUTH})),
        }
    ),
}

_JSON, _BYTES = "application/json", "application/octet-stream"
_STATUSES = {
    "400": "The request is malformed.",
    "401": "It shows no token, or another.",
    "403": "It comes from a page elsewhere, or is not allowed here.",
    "404": "There is no such model or version.",
    "408": "It took too long to come.",
    "409": "The bundle could not be loaded; what served before still does.",
    "413": "It is too large.",
    "415": "Its content is of a type that is not read.",
    "421": "The server is not called by that Host.",
    "501": "It is not offered.",
    "503": "Not ready, or overloaded: Retry-After says when to try again.",
}


def _operation(
    summary: str, answer: str, *errors: int, body: Schema | None = None, **more: Any
) -> Schema:
    """Return an operation that answers JSON of the schema ``answer``."""
    media = {} if not answer else {"content": {_JSON: {"schema": _schema(answer)}}}
    responses: Schema = {"200": {"description": "The answer.", **media}}
    for status in (400, 401, 403, 408, 421, *errors):
        responses[str(status)] = {
            "description": _STATUSES[str(status)],
            "content": {_JSON: {"schema": _schema("Error")}},
        }
    wanted = {} if body is None else {"requestBody": {"content": body}}
    return {"summary": summary, "responses": dict(sorted(responses.items())), **wanted, **more}


_READINESS: Schema = {
    "description": "Not ready.",
    "content": {_JSON: {"schema": _schema("Ready")}},
}
_TOP = {
    "name": "top",
    "in": "query",
    "description": "How many classes are told; 5, or all if they are fewer, unless said.",
    "schema": {"type": "integer", "minimum": 1},
}
_BINARY_HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "How many bytes of the body are JSON, where binary tensors follow.",
    "schema": _WHOLE,
}


def _ready(summary: str, *errors: int) -> Schema:
    operation = _operation(summary, "Ready", *errors)
    operation["responses"]["503"] = _READINESS
    return operation


def _of_model() -> dict[str, dict[str, Schema]]:
    """Return the operations on one model, by what follows its address."""
    infer = {
        _JSON: {"schema": _schema("Message")},
        _BYTES: {"schema": {"type": "string", "format": "binary"}},
    }
    image = {
        kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*", _BYTES)
    }
    return {
        "": {"get": _operation("Tensors, shapes and types.", "Model", 404)},
        "/ready": {"get": _ready("Whether the model answers.", 404)},
        "/config": {"get": _operation("The configuration, for Triton's tools.", "Config", 404)},
        "/stats": {"get": _operation("Requests and times.", "Statistics", 404)},
        "/infer": {
            "post": _operation(
                "Logits and routes of images.",
                "Inference",
                *(404, 413, 415, 503),
                body=infer,
                parameters=[_BINARY_HEADER],
            )
        },
        "/image": {
            "post": _operation(
                "Classes and experts of one image file.",
                "Image",
                *(404, 413, 415, 503),
                body=image,
                parameters=[_TOP],
            )
        },
    }


def _paths() -> dict[str, dict[str, Any]]:
    anything = {_JSON: {"schema": {"type": "object"}}}
    paths: dict[str, dict[str, Any]] = {
        "/v2": {"get": _operation("The server and its extensions.", "Server")},
        "/v2/health/live": {"get": _operation("Whether the server runs.", "Live")},
        "/v2/health/ready": {"get": _ready("Whether every model answers.")},
        "/v2/models/stats": {"get": _operation("Requests and times, of all.", "Statistics")},
        "/v2/repository/index": {
            "post": _operation("Names, versions and states.", "Index", 413, body=anything)
        },
        "/v2/repository/models/{name}/load": {
            "post": _operation(
                "The bundles of a name, loaded again.",
                "Loaded",
                *(404, 409, 413, 503),
                body=anything,
                parameters=[_parameter("name")],
            )
        },
        "/v2/repository/models/{name}/unload": {
            "post": _operation(
                "Refused: a server answers for what it was started with.",
                "",
                501,
                parameters=[_parameter("name")],
            )
        },
        "/v2/openapi.json": {"get": _operation("This description.", "")},
        "/metrics": {"get": _operation("Figures for Prometheus, as text.", "")},
        "/": {"get": _operation("The page for people, unless it is off.", "")},
    }
    for prefix, names in (
        ("/v2/models/{name}", ("name",)),
        ("/v2/models/{name}/versions/{version}", ("name", "version")),
    ):
        for suffix, operations in _of_model().items():
            own = {"parameters": [_parameter(name) for name in names]}
            paths[prefix + suffix] = own | operations
    return paths


def _parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}


def description() -> dict[str, Any]:
    """Return the description of every address."""
    message = Message.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = message.pop("$defs")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "advmoe serve",
            "version": __version__,
            "summary": "Open Inference Protocol, version 2, for robust mixture-of-experts models.",
        },
        "paths": _paths(),
        "components": {"schemas": {**_SCHEMAS, **parts, "Message": message}},
    }


def add_description(app: FastAPI) -> None:
    """Add the description, at ``/v2/openapi.json``."""
    text = json.dumps(description())

    @app.api_route("/v2/openapi.json", methods=["GET", "HEAD"])
    async def openapi() -> Response:
        return Response(text, media_type=_JSON)
