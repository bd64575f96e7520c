"""Spans of OpenTelemetry: of a request, and under it of queue, trunk and tail. The extra ``otel`` has what it needs.

They are made when the request has ended, from the times that are taken anyway: a request without tracing pays nothing.
"""

import logging
import time
from collections.abc import Iterator

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from service.answers import BatchRun, Classified

logger = logging.getLogger(__name__)

PROPAGATED = (b"traceparent", b"tracestate")


class Spans:
    """Makes the spans of requests.

    Args:
        provider: by default one that sends them where the SDK's own ``OTEL_*`` variables say.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider or _provider()
        self._tracer = self._provider.get_tracer("ig-defense")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_s = time.time() - time.perf_counter()

    def begin(self, scope: Scope, headers: dict[bytes, bytes]) -> Span:
        """The span of a request that has just come, in its caller's trace."""
        given = {name.decode(): headers[name].decode("latin-1") for name in PROPAGATED if name in headers}
        return self._tracer.start_span(
            f"{scope['method']} /{scope['path'].strip('/').partition('/')[0]}",
            self._propagator.extract(given),
            SpanKind.SERVER,
            {"http.request.method": scope["method"], "igd.request_id": scope["state"]["request_id"]},
            start_time=self._ns(scope["state"]["arrived_at"]),
        )

    def trace_id(self, span: Span) -> str:
        """Its trace's id, 32 hex digits."""
        return trace.format_trace_id(span.get_span_context().trace_id)

    def end(self, span: Span, status: int, classified: Classified | None) -> None:
        """End a request's span now, with those of its stages under it."""
        if span.is_recording():
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            if classified:
                self._add_stages(span, classified)
        span.end(self._ns(time.perf_counter()))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _add_stages(self, span: Span, classified: Classified) -> None:
        parent = trace.set_span_in_context(span, Context())
        for batch in classified.distinct_batches:
            attributes: dict[str, str | int] = {"igd.batch": batch.id, "igd.batch_size": batch.size}
            for name, began_at, ended_at in _stages(batch, classified.queued_at):
                stage = self._tracer.start_span(name, parent, attributes=attributes, start_time=self._ns(began_at))
                stage.end(self._ns(ended_at))

    def _ns(self, moment: float) -> int:
        """Nanoseconds of Unix time of a moment on perf_counter's clock."""
        return int(1e9 * (self._epoch_s + moment))


def _stages(batch: BatchRun, queued_at: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end; a batch begins with its trunk and ends with its tail."""
    trunk_s, tail_s = batch.stage_seconds["trunk"], batch.stage_seconds["tail"]
    yield "queue", queued_at, batch.began_at
    yield "trunk", batch.began_at, batch.began_at + trunk_s
    yield "tail", batch.ended_at - tail_s, batch.ended_at


def _provider() -> TracerProvider:
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "ig-defense"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
