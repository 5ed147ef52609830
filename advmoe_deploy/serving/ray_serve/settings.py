"""Settings of the Ray Serve application, as ``serve run`` and configuration files give them."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from advmoe_deploy.plan import ExpertsStep, Plan
from advmoe_deploy.serving.online.limits import COPIES_OF_JSON, Limits
from advmoe_deploy.specs import Frozen

SERVER, ROUTER = "server", "router"
ANY_HOST = "*"
# Of a deployment's requests, those that wait where they were made.
MOST_QUEUED = 256


class Settings(Frozen):
    """Settings of an application.

    Attributes:
        bundle: what ``advmoe export`` wrote, under the same path on every machine.
        name: of the model; by default that of its family.
        signed_by: public key of whoever must have signed the bundle.
        threads: of the engine of one replica.
        batch: images that a replica of the router takes together; an expert takes as many rows as
            these images can have.
        delay_ms: how long such a batch waits for more.
        at_once: images that a replica of the server has on their way, in several batches.
        queue: images that wait in a replica of the server; more are answered 503.
        memory: MiB of bodies and images that wait there.
        timeout: seconds until a request's computation begins, and again until it ends.
        hosts: by which names requests may call the server beside those of the loopback; ``*`` is
            any, which needs a token or ``insecure``.
        token_file: a file, closed to others, with the token that requests have to show.
        insecure: let everybody in who reaches the server, without a token. Over gRPC, which Ray
            offers on every interface if at all, nobody else comes in without one.
        deployments: options of Ray Serve by name of deployment, such as
            ``{"router.expert-0": {"num_replicas": 2}}``.
    """

    bundle: Path
    name: str | None = None
    signed_by: Path | None = None
    threads: int = Field(1, ge=1)
    batch: int = Field(64, ge=1)
    delay_ms: float = Field(2.0, ge=0)
    at_once: int = Field(512, ge=1)
    queue: int = Field(4096, ge=1)
    memory: int = Field(512, ge=1)
    timeout: float = Field(30.0, gt=0)
    hosts: tuple[str, ...] = ()
    token_file: Path | None = None
    insecure: bool = False
    deployments: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("bundle", "signed_by", "token_file")
    @classmethod
    def _whole_path(cls, path: Path | None) -> Path | None:
        return path and path.resolve()  # replicas have working directories of their own

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.at_once > MOST_QUEUED * self.batch:
            raise ValueError(
                f"at_once={self.at_once} is more than {MOST_QUEUED} batches of {self.batch}, as "
                "many as may wait; lower at_once or raise batch"
            )
        if ANY_HOST in self.hosts and self.token_file is None and not self.insecure:
            raise ValueError(
                "hosts '*' lets other machines in; ask for a token (token_file), or let everybody "
                "in (insecure)"
            )
        return self

    @property
    def limits(self) -> Limits:
        """The limits of one replica of the server.

        Raises:
            UsageError: they do not fit together.
        """
        return Limits(
            max_images=min(self.queue, Limits.max_images),
            max_body=min((self.memory << 20) // COPIES_OF_JSON, Limits.max_body),
            batch=self.at_once,
            delay_s=self.delay_ms / 1000,
            queue=self.queue,
            memory=self.memory << 20,
            timeout_s=self.timeout,
        )


def expert_names(plan: Plan) -> list[str]:
    """Return the segments of ``plan`` that get a deployment of their own, the experts'."""
    return [name for step in plan.steps if isinstance(step, ExpertsStep) for name in step.segments]


def most_rows(plan: Plan, images: int) -> int:
    """Return how many rows so many images can have for one expert."""
    return images * max((route.tokens or 1 for route in plan.routes), default=1)
