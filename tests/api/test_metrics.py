"""GET /metrics of the API: its requests, and the queues in Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any, NamedTuple, cast

import httpx2
import pytest
import redis
from msgspec.structs import replace

from asyncinfer.api.app import Api, create_app
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.metrics_port import serve_metrics
from asyncinfer.monitoring.figures import decode_figures, encode_figures
from asyncinfer.monitoring.port import open_listener
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.faults.proxy import proxied
from tests.metrics import Scrape, promtool
from tests.queue_driver import QueueDriver, new_job

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    announce,
    assert_problem,
    client_of,
    hosted,
    raw_exchange,
    running_server,
    submit,
)
from .refusals import REFUSALS, refusing


class Measured(NamedTuple):
    """An API, and its metrics."""

    port: int
    client: httpx2.AsyncClient
    metrics: httpx2.AsyncClient

    async def scrape(self) -> Scrape:
        answer = await self.metrics.get("/metrics")
        assert answer.status_code == 200
        return Scrape(answer.text)

    async def new_scrape(self) -> Scrape:
        """A scrape that was begun after this call: the text of one serves for half a second."""
        before = (await self.scrape()).text
        found: list[Scrape] = []

        async def is_new() -> bool:
            found.append(await self.scrape())
            return found[-1].text != before

        await eventually(is_new, "the CPU time in the metrics has changed")
        return found[-1]


@asynccontextmanager
async def measured_api(
    config: ApiConfig, store_of_port: Store | None = None
) -> AsyncIterator[Measured]:
    """An API. With `store_of_port` another process than the API's reads Redis for the metrics, as
    that of `serve` does for several of them."""
    listener = open_listener("127.0.0.1", 0, "METRICS")
    with closing(listener):
        async with running_server(config) as (server, port):
            app = cast(Api, server.config.app)
            metrics_port = listener.getsockname()[1]
            async with (
                serve_metrics(listener, store_of_port or app.store, app.figures),
                client_of(port) as client,
                client_of(metrics_port) as metrics,
            ):
                yield Measured(port, client, metrics)


@pytest.fixture
async def measured(config: ApiConfig, store: Store) -> AsyncIterator[Measured]:
    """An API that serves iris (the default) and digits."""
    await announce(store, "iris", "digits", default="iris")
    async with hosted(measured_api(config)) as measured:
        yield measured


async def test_requests_are_counted_by_the_template_of_their_route(measured: Measured) -> None:
    job_id = await submit(measured.client)
    await measured.client.get(f"/job/{job_id}")
    await measured.client.get("/job/no-such-job-id")
    await measured.client.head("/models/iris")
    await measured.client.put("/jobs")
    await measured.client.get("/wp-admin/secret-path")
    found = await measured.scrape()

    count = "asyncinfer_request_seconds_count"
    for method, route, status in (
        ("POST", "/predict", "202"),
        ("GET", "/job/{id}", "200"),
        ("GET", "/job/{id}", "404"),
        ("HEAD", "/models/{model}", "200"),
        ("(other)", "/jobs", "405"),
    ):
        assert found(count, method=method, route=route, status=status, wait="no") == 1
    assert found("asyncinfer_refusals_total", code="job_not_found") == 1
    assert found("asyncinfer_refusals_total", code="method_not_allowed") == 1
    assert found("asyncinfer_refusals_total", code="route_not_found") == 1
    assert "secret-path" not in found.text
    assert job_id not in found.text
    assert found.labels(count, "wait") == {"no"}


async def test_a_request_that_waits_is_counted_apart(
    measured: Measured, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    prefer = {"prefer": "wait=20"}
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(submit_and_wait(measured.client, prefer))
        await eventually(lambda: server.llen(QUEUE) == 1, "the job waits")
        found = await measured.scrape()
        assert found("asyncinfer_waits_open") == 1
        assert found("asyncinfer_queue_waiting_jobs", model="iris", priority="normal") == 1
        await manual_worker.complete()
    await measured.client.get(f"/job/{waiting.result()}?wait=1")
    found = await measured.new_scrape()
    assert found("asyncinfer_waits_open") == 0
    waited = {"status": "200", "wait": "yes"}
    count = "asyncinfer_request_seconds_count"
    assert found(count, method="POST", route="/predict", **waited) == 1
    assert found(count, method="GET", route="/job/{id}", **waited) == 1


async def submit_and_wait(client: httpx2.AsyncClient, headers: dict[str, str]) -> str:
    reply = await client.post("/predict", json={"data": ROW}, headers=headers)
    assert reply.status_code == 200
    job_id: str = reply.json()["job_id"]
    return job_id


async def test_accepted_jobs_and_refusals_are_counted_also_of_bulk_lines(
    measured: Measured,
) -> None:
    key = {"idempotency-key": "once"}
    first = await submit(measured.client, headers=key)
    assert await submit(measured.client, headers=key) == first
    await measured.client.post("/predict/digits", json={"data": [[0.0] * 64]})
    lines = b'{"data": [[1, 2, 3, 4]]}\n{"data": [[1]]}\n{"data": [[1, 2, 3, 4]]}\n'
    bulk = await measured.client.post(
        "/predict", content=lines, headers={"content-type": "application/x-ndjson"}
    )
    assert len(bulk.text.splitlines()) == 3
    await measured.client.post("/predict", content=b"{")
    assert b"400" in await raw_exchange(measured.port, b"nonsense\r\n\r\n")
    found = await measured.scrape()

    assert found("asyncinfer_submits_total", model="iris") == 3
    assert found("asyncinfer_submits_total", model="digits") == 1
    assert found("asyncinfer_refusals_total", code="invalid_input") == 1
    assert found("asyncinfer_refusals_total", code="malformed_request") == 1


async def test_errors_that_have_not_occurred_are_counted_as_zero(measured: Measured) -> None:
    """Prometheus sees no increase in a series that begins with 1."""
    found = await measured.scrape()
    codes = found.labels("asyncinfer_refusals_total", "code")
    assert codes > REFUSALS.keys()
    assert found.labels("asyncinfer_redis_errors_total", "code") > REFUSALS.keys()
    assert codes > {"queue_full", "kept_full", "storage_full", "redis_unavailable"}
    assert "redis_unavailable" in found.labels("asyncinfer_redis_errors_total", "code")
    assert found.counters()["asyncinfer_refusals_total", frozenset({("code", "queue_full")})] == 0


async def test_each_queue_shows_its_jobs_age_backlog_and_workers(
    measured: Measured, store: Store, manual_worker: ManualWorker
) -> None:
    await announce_worker(store)
    await submit(measured.client)
    await manual_worker.claim()
    for options in ({"priority": "high"}, {"priority": "low"}, {"delay_seconds": 60}, {}, {}):
        body = {"data": ROW, "options": options}
        assert (await measured.client.post("/predict", json=body)).status_code == 202
    await measured.client.post("/predict/digits", json={"data": [[0.0] * 64]})
    await measured.client.post("/models/digits/pause")
    found = await measured.scrape()

    waiting = "asyncinfer_queue_waiting_jobs"
    assert [found(waiting, model="iris", priority=p) for p in ("high", "normal", "low")] == [
        *(1, 2, 1)
    ]
    iris = {"model": "iris"}
    assert found("asyncinfer_queue_delayed_jobs", **iris) == 1
    assert found("asyncinfer_queue_running_jobs", **iris) == 1
    assert found("asyncinfer_queue_backlog_seconds", **iris) == 4 * 0.5
    assert (found("asyncinfer_queue_workers", **iris), found("asyncinfer_queue_slots", **iris)) == (
        *(1, 4),
    )
    assert found("asyncinfer_queue_starved", **iris) == 0
    assert 0 <= found("asyncinfer_queue_oldest_age_seconds", **iris) < 60
    assert found("asyncinfer_queue_paused", model="digits") == 1
    assert found("asyncinfer_queue_workers", model="digits") == 0
    assert found("asyncinfer_workers", state="ready") == 1
    assert found("asyncinfer_redis_up") == 1
    assert found("asyncinfer_redis_memory_bytes") > 100_000


async def announce_worker(store: Store, **about: Any) -> None:
    said = {
        "concurrency": 4,
        "models": ["iris"],
        "state": "ready",
        "seconds_per_job": {"iris": 0.5},
    }
    await Announcements(store).announce_worker("w", said | about, ttl_seconds=60)


async def test_a_model_without_a_worker_whose_jobs_wait_is_starved(measured: Measured) -> None:
    await submit(measured.client)
    found = await measured.scrape()
    assert found("asyncinfer_queue_starved", model="iris") == 1
    assert found("asyncinfer_queue_workers", model="iris") == 0


async def test_dead_letters_are_shown(measured: Measured, manual_worker: ManualWorker) -> None:
    await submit(measured.client)
    body = {"code": "worker_lost", "message": "no"}
    await manual_worker.finish(await manual_worker.claim(), "dead", body)
    assert (await measured.scrape())("asyncinfer_queue_dead_jobs", model="iris") == 1


async def test_models_that_nobody_announced_share_one_label(
    measured: Measured, hands: QueueDriver
) -> None:
    for model in ("mystery-1", "mystery-2"):
        queue = keys.queue(QUEUE, model, "iris")
        await hands.submissions.submit_many(queue, [new_job(queue=queue)])
    found = await measured.scrape()
    waiting = "asyncinfer_queue_waiting_jobs"
    assert found(waiting, model="(other)", priority="normal") == 2
    assert found("asyncinfer_queue_starved", model="(other)") == 1
    assert "mystery" not in found.text


async def test_without_redis_the_api_still_shows_what_it_counts(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    async with (
        hosted(proxied(config.redis_url)) as proxy,
        measured_api(replace(config, redis_url=proxy.url)) as measured,
    ):
        await submit(measured.client)
        await proxy.down()
        assert (await measured.client.post("/predict", json={"data": ROW})).status_code == 503
        found = await measured.scrape()
        await proxy.up()
    assert found("asyncinfer_redis_up") == 0
    assert found("asyncinfer_submits_total", model="iris") == 1
    assert found("asyncinfer_redis_errors_total", code="redis_unavailable") >= 1
    assert found("asyncinfer_refusals_total", code="redis_unavailable") == 1
    assert not [name for name in found.names if name.startswith("asyncinfer_queue_")]


@pytest.mark.parametrize("code", REFUSALS)
async def test_while_redis_takes_no_jobs_the_metrics_say_so_and_count_why(
    code: str, measured: Measured, server: redis.Redis
) -> None:
    assert (await measured.scrape())("asyncinfer_accepting") == 1
    with refusing(server, *REFUSALS[code]):
        refused = await measured.client.post("/predict", json={"data": ROW})
        assert_problem(refused, 503, code)
        found = await measured.new_scrape()
    assert "asyncinfer_accepting" in found.names
    assert found("asyncinfer_accepting") == 0
    assert found("asyncinfer_redis_up") == 1
    assert found("asyncinfer_refusals_total", code=code) == 1
    assert found("asyncinfer_redis_errors_total", code=code) >= 1
    await submit(measured.client)
    assert (await measured.new_scrape())("asyncinfer_accepting") == 1


async def test_a_redis_that_may_lose_jobs_takes_none_by_the_metrics_and_the_log_says_why(
    measured: Measured, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    commands = (
        ("CONFIG", "SET", "maxmemory-policy", policy) for policy in ("allkeys-lru", "noeviction")
    )
    with refusing(server, *commands):
        found = await measured.scrape()
    assert (found("asyncinfer_accepting"), found("asyncinfer_redis_up")) == (0, 1)
    assert "redis_unavailable: This server evicts keys when full" in caplog.text


async def test_a_redis_whose_state_may_not_be_read_is_up_and_takes_no_jobs_by_the_metrics(
    measured: Measured, server: redis.Redis
) -> None:
    commands = (("ACL", "SETUSER", "default", right) for right in ("-info", "+info"))
    with refusing(server, *commands):
        found = await measured.scrape()
    assert (found("asyncinfer_accepting"), found("asyncinfer_redis_up")) == (0, 1)
    assert "asyncinfer_redis_memory_bytes" not in found.text


async def test_scrapes_at_the_same_time_share_one_text(measured: Measured) -> None:
    requests = (measured.metrics.get("/metrics") for _ in range(20))
    texts = {answer.text for answer in await asyncio.gather(*requests)}
    assert len(texts) == 1


@pytest.mark.system("promtool")
async def test_promtool_accepts_the_metrics_of_an_api(measured: Measured) -> None:
    await submit(measured.client)
    await measured.client.get("/no-route")
    promtool("check", "metrics", text=(await measured.scrape()).text)


async def test_the_port_has_nothing_but_metrics(measured: Measured) -> None:
    answer = await measured.metrics.get("/health")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "This port has /metrics."


async def test_an_api_process_can_send_its_figures_to_its_parent(config: ApiConfig) -> None:
    app = create_app(config)
    async with app.lifespan():
        figures = app.figures()
    assert decode_figures(encode_figures(figures)) == figures
