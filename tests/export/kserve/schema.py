"""Schema of the fields that our manifests use, strict: whatever it does not name is a mistake.

Facts of KServe's API (serving.kserve.io v1alpha1 and v1beta1) and of Kubernetes', in our own words.
"""

from typing import Any

Schema = dict[str, Any]
NAME = r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi)?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def closed(needed: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": [*needed],
        "additionalProperties": False,
    }


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


PROBE = closed(
    ("httpGet",),
    httpGet=closed(("path", "port"), path=TEXT, port=COUNT, scheme={"enum": ["HTTP", "HTTPS"]}),
    periodSeconds=COUNT,
    failureThreshold=COUNT,
    timeoutSeconds=COUNT,
)
RESOURCES = closed(("cpu", "memory"), cpu=QUANTITY, memory=QUANTITY)
CONTAINER = closed(
    ("name", "image"),
    name={"const": "kserve-container"},
    image=TEXT,
    command=several(TEXT),
    args=several(TEXT),
    env=several(closed(("name",), name=TEXT, value=TEXT)),
    ports=several(
        closed(
            ("containerPort",),
            name={"enum": ["http1", "h2c"]},
            containerPort=COUNT,
            protocol={"enum": ["TCP"]},
        )
    ),
    resources=closed(requests=RESOURCES, limits=RESOURCES),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    securityContext=closed(
        runAsNonRoot=FLAG,
        readOnlyRootFilesystem=FLAG,
        allowPrivilegeEscalation=FLAG,
        capabilities=closed(drop=several(TEXT)),
    ),
    volumeMounts=several(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
SERVING_RUNTIME = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "serving.kserve.io/v1alpha1"},
    kind={"const": "ServingRuntime"},
    metadata=closed(("name",), name={"type": "string", "pattern": NAME}),
    spec=closed(
        ("containers",),
        supportedModelFormats=several(closed(("name",), name=TEXT, version=TEXT, autoSelect=FLAG)),
        protocolVersions=several({"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}),
        containers=several(CONTAINER),
        volumes=several(
            closed(
                ("name",),
                name=TEXT,
                emptyDir=closed(sizeLimit=QUANTITY),
                secret=closed(("secretName",), secretName=TEXT, defaultMode=COUNT),
            )
        ),
    ),
)
INFERENCE_SERVICE = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "serving.kserve.io/v1beta1"},
    kind={"const": "InferenceService"},
    metadata=closed(("name",), name={"type": "string", "pattern": NAME}, annotations=TEXTS),
    spec=closed(
        ("predictor",),
        predictor=closed(
            ("model",),
            annotations=TEXTS,
            automountServiceAccountToken=FLAG,
            terminationGracePeriodSeconds=COUNT,
            securityContext=closed(
                runAsNonRoot=FLAG,
                runAsUser=COUNT,
                runAsGroup=COUNT,
                fsGroup=COUNT,
                seccompProfile=closed(("type",), type={"enum": ["RuntimeDefault"]}),
            ),
            minReplicas=COUNT,
            maxReplicas=COUNT,
            scaleMetric={"enum": ["cpu", "memory", "concurrency", "rps"]},
            scaleTarget=COUNT,
            containerConcurrency=COUNT,
            timeout=COUNT,
            model=closed(
                ("modelFormat",),
                modelFormat=closed(("name",), name=TEXT, version=TEXT),
                runtime=TEXT,
                protocolVersion={"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                storageUri=TEXT,
            ),
        ),
    ),
)


def strict(schema: Any) -> Any:
    """Return an OpenAPI schema of a custom resource, in which no unknown field passes.

    Kubernetes drops such fields silently, unless it is asked to validate strictly.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    open_ = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_:
        made.setdefault("additionalProperties", False)
    return made
