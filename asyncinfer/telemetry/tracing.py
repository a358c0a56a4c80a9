"""Spans by OpenTelemetry; imported only where TRACES is on."""

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    get_current_span,
    set_span_in_context,
)

from asyncinfer import __version__
from asyncinfer.jobs import TraceContext
from asyncinfer.processes.limited_log import LimitedLog

_log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["server", "internal", "consumer", "client"]
Attributes: TypeAlias = Mapping[str, str | int | float | bool]

_KINDS: Final = {
    "server": SpanKind.SERVER,
    "internal": SpanKind.INTERNAL,
    "consumer": SpanKind.CONSUMER,
    "client": SpanKind.CLIENT,
}
_CLOSE_SECONDS: Final = 2.0
"""How long the last spans may take to be exported when the process ends."""

_SDK_LOGGERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
)
"""They write several lines for each batch that cannot be exported."""


def open_tracing(service_name: str) -> "Tracing":
    """The tracing of this process, with an exporter for OTLP over HTTP; the `OTEL_*` variables say
    where to, and the rest. `service_name` is used where these name none. Connects to nothing."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    for name in _SDK_LOGGERS:
        logging.getLogger(name).addFilter(_LimitedLines(name))
    provider = TracerProvider(resource=_resource(service_name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _resource(service_name: str) -> Resource:
    """What all spans of this process say of it. The variables win over what is said here."""
    configured = OTELResourceDetector().detect().attributes
    own = {
        "service.name": service_name,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    return Resource.create({**own, **configured})


class Tracing:
    """Makes the spans of one process; they are exported by a thread of the provider. Threads may
    share it."""

    def __init__(self, provider: TracerProvider) -> None:
        """Takes over the provider, which it shuts down."""
        provider.sampler = _LinkSampler(provider.sampler)
        self._provider = provider
        self._tracer = provider.get_tracer("asyncinfer", __version__)

    def start(
        self,
        name: str,
        kind: Kind,
        *,
        parent: TraceContext | None,
        links: Sequence[TraceContext] = (),
        attributes: Attributes,
        start_ns: int | None = None,
    ) -> "ActiveSpan":
        """Begins a span, now or at a Unix time in ns; without a parent it begins a trace. The
        contexts must come from `trace_context.read`; `links` are to spans that are recorded."""
        span = self._tracer.start_span(
            name,
            _context(parent),
            _KINDS[kind],
            attributes,
            [Link(_span_context(link)) for link in links],
            start_ns,
        )
        return ActiveSpan(span)

    def close(self) -> None:
        """Exports the spans that are left and ends the thread for that; takes at most 2 s. Those
        that a collector does not take in that time are lost."""
        # The processor itself waits for up to half a minute while the collector is silent.
        closing = threading.Thread(target=self._provider.shutdown, name="end-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            _log.warning("The last spans could not be exported within %g s.", _CLOSE_SECONDS)


class ActiveSpan:
    """A span that has begun; a cheap one that records nothing if it is not sampled."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def context(self) -> TraceContext | None:
        """Its context for those that continue its trace; None if it is not sampled."""
        context = self._span.get_span_context()
        if not context.trace_flags.sampled:
            return None
        return TraceContext(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}",
            context.trace_state.to_header(),
        )

    def end(
        self, *, attributes: Attributes | None = None, error: str = "", end_ns: int | None = None
    ) -> None:
        """Ends the span, now or at a Unix time in ns. `error` is the code of what failed, empty for
        success: messages may quote what a client has sent."""
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(end_ns)


class _LinkSampler(Sampler):
    """Samples a span that begins a trace and has links if the sampler would sample a child of one
    of those: else the run of a batch were missing from the traces of its jobs."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        sample = self._sampler.should_sample
        if not links or get_current_span(parent_context).get_span_context().is_valid:
            return sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        for link in links:
            parent = set_span_in_context(NonRecordingSpan(link.context), Context())
            result = sample(parent, link.context.trace_id, name, kind, attributes, links)
            if result.decision is Decision.RECORD_AND_SAMPLE:
                return SamplingResult(Decision.RECORD_AND_SAMPLE, result.attributes)
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return self._sampler.get_description()


class _LimitedLines(logging.Filter):
    """Lets each kind of line of a logger pass once in 30 s, without its traceback."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._limited = LimitedLog(logging.getLogger(name))

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        return self._limited.may_write(str(record.msg))


def _context(parent: TraceContext | None) -> Context:
    """The context for a child of `parent`, or for a span that begins a trace."""
    if parent is None:
        return Context()
    return set_span_in_context(NonRecordingSpan(_span_context(parent)), Context())


def _span_context(context: TraceContext) -> SpanContext:
    """The same context as OpenTelemetry has it."""
    _, trace_id, span_id, flags = context.traceparent.split("-")
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([context.tracestate]),
    )
