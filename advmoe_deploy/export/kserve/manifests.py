"""KServe's ServingRuntime and InferenceService of a bundle, for Kubernetes.

Two runtimes: ``advmoe serve`` over the bundle, and NVIDIA's Triton over the repository that
``advmoe export --format triton`` makes of it. Both speak the Open Inference Protocol, version 2,
over REST and gRPC. TLS is left to the mesh or the ingress.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.kserve.yaml_text import yaml_text
from advmoe_deploy.files import refuse_existing, write_output

ServingRuntime = Literal["advmoe", "triton"]
Values = dict[str, Any]

DIGEST = "advmoe-deploy/bundle-sha256"
# Where KServe's storage initializer puts what it fetched, and the ports of its own runtimes.
MODELS = "/mnt/models"
HTTP, GRPC = 8080, 9000
# Seconds: until load balancers have noticed, until what waits has begun, and for the rest.
DRAIN_S, TIMEOUT_S, REST_S = 10, 30, 10
_TOKEN = "/etc/advmoe"  # noqa: S105, RUF100 - where it lies
_LONGEST_NAME = 40  # with what KServe appends it is a part of host names, of 63 characters at most
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")
_IMAGE = re.compile(r"[a-z0-9][!-~]*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})")
# Users of the images: ours, of deploy/Dockerfile, and NVIDIA's "triton-server".
_USERS: dict[ServingRuntime, int] = {"advmoe": 10001, "triton": 1000}


def write_manifests(
    bundle: Bundle,
    out: Path,
    *,
    name: str,
    storage_uri: str,
    image: str,
    runtime: ServingRuntime = "advmoe",
    overwrite: bool = False,
) -> None:
    """Write the manifests of ``bundle`` to ``out``, one file of YAML.

    Args:
        bundle: an opened bundle; its digest becomes an annotation, so that pods are replaced where
            another one comes to the same place.
        out: the file to be.
        name: of service and model; letters, digits and hyphens of it are kept.
        storage_uri: where KServe fetches it: for ``advmoe`` the bundle, for ``triton`` the
            repository, which was written with ``--mount /mnt/models``.
        image: of the server, with its tag or digest; for ``triton`` NVIDIA's, or one made of it.
        runtime: what serves.
        overwrite: replace an ``out`` that is a file already.

    Raises:
        UsageError: ``out`` is in the way, or ``storage_uri`` or ``image`` are no such.
    """
    if not _URI.fullmatch(storage_uri):
        raise UsageError(
            f"--storage-uri '{storage_uri}' is no address that KServe fetches; write one such as "
            "s3://BUCKET/PATH or pvc://CLAIM/PATH"
        )
    if not _IMAGE.fullmatch(image) or image.endswith(":latest"):
        raise UsageError(
            f"--image '{image}' names no tag or digest that stays what it is; write one such as "
            "registry.example.org/advmoe-deploy:1.0"
        )
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name a file such as {out / 'kserve.yaml'}")
    refuse_existing(out, overwrite=overwrite)
    manifests = Manifests(kubernetes_name(name), bundle.identity, storage_uri, image, runtime)
    write_output(out, manifests.text().encode())


def kubernetes_name(text: str) -> str:
    """Return ``text`` as a label of RFC 1123 that begins with a letter, as KServe wants it."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    label = label if re.match("[a-z]", label) else f"model-{label}"
    return label[:_LONGEST_NAME].strip("-")


@dataclass(frozen=True)
class Manifests:
    """Values of the two manifests of a service; ``name`` is a label of RFC 1123."""

    name: str
    digest: str
    storage_uri: str
    image: str
    runtime: ServingRuntime

    def text(self) -> str:
        """Return the file's content."""
        return "\n".join(
            [f"# {line}" for line in _COMMENT[self.runtime].format(name=self.name).splitlines()]
            + [yaml_text(self.serving_runtime()) + "---", yaml_text(self.inference_service())]
        )

    def serving_runtime(self) -> Values:
        """Return the ServingRuntime: which image runs, how, and with which rights."""
        return {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "ServingRuntime",
            "metadata": {"name": self.name},
            "spec": {
                "supportedModelFormats": [{"name": self.runtime, "autoSelect": False}],
                "protocolVersions": ["v2", "grpc-v2"],
                "containers": [self._container()],
                "volumes": self._volumes(),
            },
        }

    def inference_service(self) -> Values:
        """Return the InferenceService: which model, how many pods, and how they end."""
        user = _USERS[self.runtime]
        return {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": self.name,
                "annotations": {
                    "serving.kserve.io/deploymentMode": "Standard",
                    DIGEST: self.digest,
                },
            },
            "spec": {
                "predictor": {
                    "annotations": {DIGEST: self.digest},
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": DRAIN_S + TIMEOUT_S + REST_S,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": user,
                        "runAsGroup": user,
                        "fsGroup": user,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "minReplicas": 1,
                    "maxReplicas": 4,
                    "scaleMetric": "cpu",
                    "scaleTarget": 75,
                    "containerConcurrency": 64,
                    "timeout": 2 * TIMEOUT_S,
                    "model": {
                        "modelFormat": {"name": self.runtime},
                        "runtime": self.name,
                        "protocolVersion": "v2",
                        "storageUri": self.storage_uri,
                    },
                }
            },
        }

    def _container(self) -> Values:
        names = [volume["name"] for volume in self._volumes()]
        resources = {"cpu": "1", "memory": "2Gi"}
        return {
            "name": "kserve-container",
            "image": self.image,
            "command": ["advmoe", "serve"] if self.runtime == "advmoe" else ["tritonserver"],
            "args": self._arguments(),
            "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108, RUF100 - a volume of its own
            "ports": [
                {"name": "http1", "containerPort": HTTP, "protocol": "TCP"},
                {"name": "h2c", "containerPort": GRPC, "protocol": "TCP"},
            ],
            "resources": {"requests": resources, "limits": resources},
            # Ready comes after loading and the golden images; before, the port does not answer.
            "startupProbe": _probe("ready", period=2, failures=150),
            "readinessProbe": _probe("ready", period=2, failures=2),
            "livenessProbe": _probe("live", period=10, failures=3),
            "securityContext": {
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": name, "mountPath": _MOUNTS[name]} for name in names],
        }

    def _arguments(self) -> list[str]:
        if self.runtime == "triton":
            return [
                f"--model-repository={MODELS}",
                f"--http-port={HTTP}",
                f"--grpc-port={GRPC}",
                f"--exit-timeout-secs={DRAIN_S + TIMEOUT_S}",
            ]
        options = {
            "--host": "0.0.0.0",  # noqa: S104, RUF100 - of the pod; who comes shows the token
            "--port": str(HTTP),
            "--grpc-port": str(GRPC),
            "--token-file": f"{_TOKEN}/token",
            "--drain": str(DRAIN_S),
            "--timeout": str(TIMEOUT_S),
        }
        return [f"{self.name}={MODELS}", *(word for option in options.items() for word in option)]

    def _volumes(self) -> list[Values]:
        scratch = {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}
        if self.runtime == "triton":
            return [scratch]
        # Read by its owner and, through fsGroup, by the server; by nobody else.
        secret = {"secretName": f"{self.name}-token", "defaultMode": 0o440}
        return [scratch, {"name": "token", "secret": secret}]


_MOUNTS = {"tmp": "/tmp", "token": _TOKEN}  # noqa: S108, RUF100


def _probe(what: str, *, period: int, failures: int) -> Values:
    return {
        "httpGet": {"path": f"/v2/health/{what}", "port": HTTP, "scheme": "HTTP"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 2,
    }


_MODE = """\
For KServe 0.16 and newer; before, the deploymentMode "Standard" was called "RawDeployment".
containerConcurrency counts in the mode "Knative" alone, which allows one port and no
securityContext of pods."""
_COMMENT: dict[ServingRuntime, str] = {
    "advmoe": f"""\
Made by 'advmoe export --format kserve'. Before it is applied, in the same namespace:
  openssl rand -hex 32 | kubectl create secret generic {{name}}-token --from-file=token=/dev/stdin
Requests show the token as 'Authorization: Bearer TOKEN'; TLS is the mesh's or the ingress's.
{_MODE}""",
    "triton": f"""\
Made by 'advmoe export --format kserve --server triton'. What lies at storageUri is made by
'advmoe export --format triton --mount {MODELS}'. Triton asks for no token: let the mesh or a
NetworkPolicy say who may reach {{name}}; TLS is theirs, too.
{_MODE}""",
}
