"""Traces of inference requests by OpenTelemetry, which this module alone knows.

The spans of a request are made once it has ended, from times that are taken in any case.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from advmoe_deploy import __version__
from advmoe_deploy.errors import UsageError, missing_extra
from advmoe_deploy.serving.online.job import Times
from advmoe_deploy.serving.online.operations.requests import PARENT, Record
from advmoe_deploy.serving.online.protocol import short_line

# What the name of a request is to OpenTelemetry.
_WHAT = {"http": "url.path", "grpc": "rpc.method"}
# In the order in which a request goes through them.
_STAGES = ("read", "decode", "wait", "compute", "write")
_NAME = "advmoe"
# How long the end of the server waits for a collector to take the last spans.
_FLUSH_S = 3.0


class Traces:
    """A watcher that makes of each inference request a span, and of its stages those within."""

    def __init__(self, tracer: Any) -> None:
        """Take the library's ``tracer``."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer, self._trace, self._w3c = tracer, trace, TraceContextTextMapPropagator()

    def __call__(self, record: Record) -> None:
        """Make the spans of a request that has just ended."""
        if not record.infers:
            return
        ended = time.time_ns()
        began = ended - round(1e9 * record.seconds)
        parent = self._w3c.extract({PARENT: record.parent})
        kind, attributes = self._trace.SpanKind.SERVER, _attributes(record)
        span = self._tracer.start_span("infer", parent, kind, attributes, (), began)
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        if record.times is not None:
            self._stages(span, record.times, began)
        span.end(ended)

    def _stages(self, span: Any, times: Times, began: int) -> None:
        within = self._trace.set_span_in_context(span)
        for stage in _STAGES:
            if seconds := getattr(times, stage):
                part = self._tracer.start_span(stage, within, start_time=began)
                began += round(1e9 * seconds)
                part.end(began)


@contextmanager
def tracing() -> Iterator[Traces]:
    """Yield what traces; spans go where OpenTelemetry's own environment variables say.

    At the end the last ones are sent, for which nobody waits long.

    Raises:
        UsageError: a variable has a value that it cannot have.
        BackendUnavailableError: OpenTelemetry is not installed.
    """
    provider = _provider()
    try:
        yield Traces(provider.get_tracer("advmoe_deploy", __version__))
    finally:
        # The library waits longer for a collector that is away; its thread ends with the process.
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise missing_extra("opentelemetry-sdk", "otel") from None
    told = Resource.create()
    if str(told.attributes[SERVICE_NAME]).startswith("unknown_service"):
        told = told.merge(Resource({SERVICE_NAME: _NAME}))
    provider = TracerProvider(resource=told, shutdown_on_exit=False)
    try:
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise UsageError(f"OpenTelemetry: {error}; correct its environment variables") from None
    return provider


def _attributes(record: Record) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "network.protocol.name": record.protocol,
        "http.response.status_code": record.status,
        "advmoe.request_id": record.id,
        _WHAT[record.protocol]: short_line(record.name),
        "advmoe.images": record.images,
    }
    if record.model is not None:
        found |= {"advmoe.model": record.model.name, "advmoe.version": record.model.version}
        found["advmoe.engine"] = record.engine
    return found
