"""A real API and a real worker in this event loop, whose spans a test reads from memory."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import redis
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import Span, SpanContext

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import AsyncClient
from asyncinfer.engine import Engine
from asyncinfer.jobs import Record, read_record
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.telemetry.tracing import Tracing
from asyncinfer.worker.models.engine_cache import CacheBounds, EngineCache
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.worker import Worker, WorkerConfig
from tests.api.harness import running
from tests.faults.harness import eventually


class Spans:
    """The spans that have ended, of all processes that a test has; each has a provider of its
    own."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()

    def provider(self, sampler: Sampler | None = None) -> TracerProvider:
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        return provider

    def tracing(self, sampler: Sampler | None = None) -> Tracing:
        return Tracing(self.provider(sampler))

    @contextmanager
    def caller(self, sampler: Sampler | None = None) -> Iterator[Span]:
        """A span of the program that calls the client, which is active in the block."""
        tracer = self.provider(sampler).get_tracer("caller")
        with tracer.start_as_current_span("caller") as span:
            yield span

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, word: str) -> list[ReadableSpan]:
        """The spans whose name begins with the word, in the order of their ends."""
        return [span for span in self.all() if span.name.split(" ")[0] == word]

    async def wait_for(self, word: str, count: int) -> list[ReadableSpan]:
        """Waits for so many spans of a name: a worker's come after the client has its answer."""
        await eventually(lambda: len(self.named(word)) == count, f"{count} spans {word!r}")
        return self.named(word)


class Service:
    """A running API and worker."""

    def __init__(self, client: AsyncClient, spans: Spans, server: redis.Redis) -> None:
        self.client = client
        self.spans = spans
        self._server = server

    def record_of(self, job_id: str) -> Record:
        meta: Any = self._server.get(keys.meta(job_id))
        record = read_record(meta)
        assert record is not None
        return record


@asynccontextmanager
async def running_worker(
    redis_url: str,
    policy: Policy,
    model_dir: Path,
    tracing: Tracing | None,
    models: tuple[str, ...],
) -> AsyncIterator[Worker]:
    """A worker that serves the models, the first as the default; drained at the end."""
    cache = EngineCache(partial(Engine.load, intra_op_threads=1), CacheBounds())
    library = Library(ModelSource(model_dir, models), cache)
    library.open()
    opened = Store.open(
        redis_url, queue_name="predict_queue", policy=policy, name="asyncinfer-worker"
    )
    async with opened as store:
        await store.claim_default_model(models[0])
        config = WorkerConfig(concurrency=1)
        worker = Worker(store, library, models[0], config, tracing=tracing)
        task = asyncio.create_task(worker.run())
        await eventually(lambda: set(library.table.names) >= set(models), "the models are served")
        await eventually(lambda: worker.why_not_ready() is None, "the worker is ready")
        yield worker
        worker.begin_drain()
        await task


class Deployment(msgspec.Struct, frozen=True):
    """Where a test's API and worker find what they need."""

    redis_url: str
    policy: Policy
    model_dir: Path
    server: redis.Redis

    @asynccontextmanager
    async def service(
        self,
        spans: Spans,
        api: Tracing | None,
        worker: Tracing | None,
        models: tuple[str, ...] = ("iris",),
    ) -> AsyncIterator[Service]:
        """An API and a worker with these tracings, None for one that makes no spans."""
        config = ApiConfig(redis_url=self.redis_url, policy=self.policy, tracing=api)
        started = running_worker(self.redis_url, self.policy, self.model_dir, worker, models)
        async with (
            started,
            running(config) as port,
            AsyncClient(f"http://127.0.0.1:{port}") as client,
        ):

            async def are_listed() -> bool:
                return set(models) <= {model.model for model in await client.models()}

            await eventually(are_listed, "the API lists the models")
            yield Service(client, spans, self.server)


def context_of(span: ReadableSpan | Span) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def parent_id(span: ReadableSpan) -> int | None:
    """The id of the parent, None of a span that begins a trace."""
    return span.parent.span_id if span.parent else None


def links_of(span: ReadableSpan) -> list[int]:
    """The ids of the spans that it links to."""
    return [link.context.span_id for link in span.links]


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})
