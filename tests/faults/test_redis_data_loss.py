"""A Redis that restarts empty, or with an older dump, or that loses one of its keys."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx2
import msgspec
import pytest
import redis
from msgspec import Struct

from asyncinfer.jobs import SCHEMA, Record, new_id
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob, Submissions
from tests import zoo

from .harness import assert_bounded, eventually, eventually_sync
from .processes import DurableServer
from .replicated import replicated
from .services import Services, open_services

N = "predict_queue"
SERVED_WITHIN_SECONDS = 5.0
ENDED_WITHIN_SECONDS = 15.0
IRIS = [[5.1, 3.5, 1.4, 0.2]]
DIGITS = [[0.0] * 64]
PATHS = {"/predict": IRIS, "/predict/iris": IRIS, "/predict/digits": DIGITS}
_SHORT_TIMES = {"LEASE_SECONDS": "2", "REAP_SECONDS": "0.3", "CONCURRENCY": "1"}
_PAUSE_SECONDS = 0.05


class SubmitReply(Struct):
    """A submit and its reply, as a client sees them."""

    at: float
    path: str
    status: int
    body: dict[str, Any]
    retry_after: str | None

    @property
    def job_id(self) -> str:
        return str(self.body["job_id"])


class Clients:
    """A client for each path to a model; each submits jobs all the time."""

    def __init__(self, url: str, *paths: str) -> None:
        self._paths = paths or tuple(PATHS)
        self.replies: list[SubmitReply] = []
        self.streams = 0
        """The number of event streams that have begun."""
        self.http = httpx2.AsyncClient(base_url=url, timeout=60)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def submit(self, path: str, **options: Any) -> SubmitReply:
        body = {"data": PATHS[path], "options": options}
        at = time.monotonic()
        response = await self.http.post(path, json=body)
        retry_after = response.headers.get("retry-after")
        reply = SubmitReply(at, path, response.status_code, response.json(), retry_after)
        self.replies.append(reply)
        return reply

    async def status(self, job_id: str) -> str:
        """A job's status; "gone" if the API has no such job, "unknown" if it cannot tell."""
        reply = await self.http.get(f"/job/{job_id}")
        if reply.status_code in (404, 410):
            return "gone"
        return str(reply.json().get("status")) if reply.status_code == 200 else "unknown"

    async def has_status(self, job_id: str, status: str) -> bool:
        return await self.status(job_id) == status

    @contextlib.asynccontextmanager
    async def submitting(self) -> AsyncIterator[None]:
        """Meanwhile each client submits jobs all the time."""
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._submit_forever(path)) for path in self._paths]
            yield
            for client in clients:
                client.cancel()

    async def wait_until_served(self, within_seconds: float) -> None:
        """Waits until a job that was submitted to each path after this call has completed."""
        began_at = time.monotonic()
        for path in self._paths:
            await eventually(partial(self._has_completed, path, began_at), path, within_seconds)

    async def run_one_each(self) -> None:
        """Submits a job to each path until it is accepted, and waits until it has completed."""
        for path in self._paths:
            began_at = time.monotonic()
            await eventually(partial(self._is_accepted, path), path)
            await eventually(partial(self._has_completed, path, began_at), path)

    async def events(self, path: str, until: str | None) -> list[str]:
        """The names of a stream's events up to `until`, or to the end of the stream."""
        names: list[str] = []
        async with self.http.stream("GET", path) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if line.startswith("event: "):
                    names.append(line.removeprefix("event: "))
                    self.streams += names[-1] == "snapshot"
                    if names[-1] == until:
                        break
        return names

    async def submit_slow(self, milliseconds: float) -> str:
        ids: list[str] = []

        async def is_accepted() -> bool:
            reply = await self.http.post("/predict/slow", json={"data": [[milliseconds]]})
            if reply.status_code == 202:
                ids.append(str(reply.json()["job_id"]))
            else:
                assert reply.json()["code"] == "model_loading", reply.text
            return bool(ids)

        # Other models are served while it is still being loaded.
        await eventually(is_accepted, "a job of the slow model is accepted", 20)
        return ids[0]

    async def wait_until_ended(self, within_seconds: float = ENDED_WITHIN_SECONDS) -> None:
        """Waits until every accepted job has completed, or the API says that it is gone."""
        open_jobs = {reply.job_id for reply in self.replies if reply.status == 202}

        async def none_is_open() -> bool:
            for job_id in list(open_jobs):
                if await self.status(job_id) not in ("completed", "gone"):
                    return False
                open_jobs.discard(job_id)
            return True

        await eventually(none_is_open, "all jobs are completed or gone", within_seconds)

    def assert_refused_only_with_retry_after(self) -> None:
        """Asserts that each refusal was a 503 with Retry-After: no client made a mistake."""
        for reply in self.replies:
            assert reply.status == 202 or (reply.status == 503 and reply.retry_after), reply

    async def _is_accepted(self, path: str) -> bool:
        return (await self.submit(path)).status == 202

    async def _has_completed(self, path: str, since: float) -> bool:
        """Whether the last job that was accepted after `since` has completed."""
        for reply in reversed(self.replies):
            if reply.path == path and reply.status == 202 and reply.at > since:
                return await self.status(reply.job_id) == "completed"
        return False

    async def _submit_forever(self, path: str) -> None:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                await self.submit(path)
            await asyncio.sleep(_PAUSE_SECONDS)


class Service(Struct):
    """An API and workers that do not have the same models, on one Redis."""

    url: str
    server: redis.Redis
    services: Services

    @property
    def is_announced(self) -> bool:
        return _is_announced(self.server)


@contextlib.contextmanager
def _running_service(
    folder: Path,
    redis_url: str,
    server: redis.Redis,
    models: Path,
    models_of_workers: tuple[str, ...] = ("iris,digits", "digits"),
) -> Iterator[Service]:
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(models), **_SHORT_TIMES}
    with open_services(folder, **environ) as services:
        for names in models_of_workers:
            services.work("--models", names, "--default-model", "iris")
        url = services.serve()
        eventually_sync(lambda: _workers(server) == len(models_of_workers), "all workers run", 20)
        yield Service(url, server, services)


def _is_announced(server: redis.Redis) -> bool:
    """Whether Redis has the default model, the models and the queues again."""
    with contextlib.suppress(redis.RedisError):
        return (
            server.get(keys.default_model(N)) == b"iris"
            and {b"iris", b"digits"} <= set(server.smembers(keys.models(N)))
            and bool(server.sismember(keys.queues(N), f"{N}:digits"))
        )
    return False


def _has_status(server: redis.Redis, job_id: str, status: bytes) -> bool:
    return server.get(keys.status(job_id)) == status


def _have_logged_default(service: Service, default: str, count: int) -> bool:
    """Whether `count` processes have logged that `default` is the default model now."""
    return service.services.log.count(f"Redis names {default!r} as the default model") == count


def _workers(server: redis.Redis) -> int:
    return sum(1 for _ in server.scan_iter(keys.worker(N, "*"), count=1000))


@pytest.fixture(scope="module")
def service(
    redis_url: str, shipped_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Shared by the tests of this file; each test leaves all models served."""
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    folder = tmp_path_factory.mktemp("data-loss")
    with _running_service(folder, redis_url, client, shipped_models) as service:
        yield service
    assert_bounded(client)
    client.close()


async def _assert_served_after(service: Service, fault: Callable[[], object]) -> None:
    async with Clients(service.url) as clients:
        async with clients.submitting():
            await clients.wait_until_served(30)
            fault()
            fault_at = time.monotonic()
            await eventually(
                lambda: service.is_announced, "all is announced again", SERVED_WITHIN_SECONDS
            )
            await clients.wait_until_served(fault_at + SERVED_WITHIN_SECONDS - time.monotonic())
        await clients.wait_until_ended()
        clients.assert_refused_only_with_retry_after()


@pytest.mark.soak
async def test_an_emptied_redis_is_served_again_within_5_s(service: Service) -> None:
    await _assert_served_after(service, service.server.flushall)


@pytest.mark.soak
@pytest.mark.parametrize("key", [keys.default_model(N), keys.models(N)])
async def test_a_redis_that_lost_a_key_is_served_again_within_5_s(
    service: Service, key: str
) -> None:
    await _assert_served_after(service, lambda: service.server.delete(key))


@pytest.mark.soak
async def test_a_delayed_job_is_run_although_the_list_of_queues_is_lost(service: Service) -> None:
    async with Clients(service.url) as clients:
        job_id = (await clients.submit("/predict/digits", delay_seconds=0.5)).job_id
        service.server.delete(keys.queues(N))
        completed = partial(clients.has_status, job_id, "completed")
        await eventually(completed, "it has completed", SERVED_WITHIN_SECONDS)


@pytest.mark.soak
async def test_a_job_in_the_queue_of_another_default_model_is_run(
    service: Service, redis_url: str
) -> None:
    """An API that knows no default model adds it there."""
    service.server.sadd(keys.queues(N), f"{N}:iris")
    async with Store.open(redis_url, queue_name=N, policy=Policy(), name="test") as store:
        submissions = Submissions(store)
        record = Record(SCHEMA, f"{N}:iris", "iris", "default", 0)
        job = NewJob(new_id(0), record.queue, msgspec.json.encode(IRIS), record)
        await submissions.submit_many(job.queue, [job])
        service.server.set(keys.data("external"), msgspec.json.encode(DIGITS))
        service.server.set(keys.status("external"), "pending")
        service.server.lpush(f"{N}:digits", "external")
        for job_id in (job.job_id, "external"):
            completed = partial(_has_status, service.server, job_id, b"completed")
            await eventually(completed, f"{job_id} has completed", SERVED_WITHIN_SECONDS)


@pytest.mark.soak
async def test_waits_and_event_streams_end_or_go_on_when_redis_is_emptied(service: Service) -> None:
    async with Clients(service.url) as clients, asyncio.timeout(20):
        await clients.run_one_each()
        gone = (await clients.submit("/predict", delay_seconds=600)).job_id
        waiting_get = asyncio.create_task(clients.http.get(f"/job/{gone}?wait=60"))
        waiting_post = asyncio.create_task(
            clients.http.post(
                "/predict",
                json={"data": IRIS, "options": {"delay_seconds": 600}},
                headers={"Prefer": "wait=60"},
            )
        )
        job_events = asyncio.create_task(clients.events(f"/job/{gone}/events", until=None))
        all_events = asyncio.create_task(clients.events("/events", until="completed"))
        await eventually(
            lambda: service.server.zcard(keys.delayed(N)) == 2 and clients.streams == 2,
            "all four wait",
        )
        service.server.flushall()
        assert (await waiting_get).status_code == 404
        posted = await waiting_post
        assert (posted.status_code, posted.json()["status"]) == (202, "pending")
        assert await clients.status(posted.json()["job_id"]) == "gone"
        assert (await job_events)[0] == "snapshot"
        await clients.run_one_each()
        assert "completed" in await all_events


@pytest.mark.soak
async def test_another_default_model_in_redis_is_adopted_by_all(service: Service) -> None:
    async with Clients(service.url, "/predict/iris", "/predict/digits") as clients:
        for name, before in (("digits", "iris"), ("iris", "digits")):
            async with clients.submitting():
                await clients.wait_until_served(30)
                service.server.set(keys.default_model(N), name)
                await eventually(
                    partial(_have_logged_default, service, name, 3), "all have adopted it"
                )
                await clients.wait_until_served(SERVED_WITHIN_SECONDS)
            await clients.wait_until_ended()
            assert f"this worker had {before!r} from DEFAULT_MODEL" in service.services.log


# --- every key, restarts and fail-over -------------------------------------------------------

_KEYS = (
    *(keys.default_versions(N), keys.workers(N), keys.model(N, "iris"), keys.model(N, "digits")),
    *(keys.pace(N, "iris"), keys.out_of_place(N), keys.repair_gate(N)),
    *(
        key(queue)
        for queue in (N, f"{N}:digits")
        for key in (
            *(keys.wake, keys.bytes_waiting, keys.seq, keys.log, keys.log_marks, keys.control),
            *(keys.swept, keys.hold, keys.reap_gate, keys.deadlines, keys.stale_entries),
        )
    ),
)


@pytest.mark.soak
@pytest.mark.parametrize("key", _KEYS)
async def test_any_shared_key_may_be_lost(service: Service, key: str) -> None:
    await _assert_served_after(service, lambda: service.server.delete(key))


@pytest.mark.soak
@pytest.mark.parametrize("key", ["worker:*", "inbox:*"])
async def test_the_keys_of_each_process_may_be_lost(service: Service, key: str) -> None:
    def delete() -> None:
        for name in service.server.scan_iter(f"{{{{{N}}}}}:{key}", count=1000):
            service.server.delete(name)

    await _assert_served_after(service, delete)


@pytest.mark.soak
@pytest.mark.parametrize("restarts", ["empty", "with an older dump"])
async def test_a_redis_that_restarts_empty_or_with_an_older_dump_is_served_within_5_s(
    restarts: str, without_aof: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    """With an older dump, a job that its worker has finished since is running again."""
    models = tmp_path / "models"
    shutil.copytree(shipped_models, models)
    zoo.place(models, "slow", zoo.slow(), toml="[limits]\ntimeout_seconds = 60\n")
    client = redis.Redis.from_url(without_aof.url)
    models_of_workers = ("iris,digits,slow", "digits")
    with _running_service(tmp_path, without_aof.url, client, models, models_of_workers) as service:
        async with Clients(service.url) as clients:
            async with clients.submitting():
                await clients.wait_until_served(30)
                slow = await clients.submit_slow(1000)
                await eventually(partial(_has_status, client, slow, b"processing"), "runs")
                if restarts == "with an older dump":
                    without_aof.dump()
                await eventually(partial(_has_status, client, slow, b"completed"), "it ran")
                await clients.wait_until_served(30)
                without_aof.kill()
                without_aof.start()
                restarted_at = time.monotonic()
                if restarts == "with an older dump":
                    assert client.get(keys.status(slow)) == b"processing"
                await eventually(
                    lambda: service.is_announced, "all is announced again", SERVED_WITHIN_SECONDS
                )
                await clients.wait_until_served(
                    restarted_at + SERVED_WITHIN_SECONDS - time.monotonic()
                )
            await clients.wait_until_ended()
            status = "gone" if restarts == "empty" else "completed"
            await eventually(
                partial(clients.has_status, slow, status), f"the old job is {status}", 120
            )
            clients.assert_refused_only_with_retry_after()
        assert service.services.log.count("WARNING") < 100, "an outage is not logged over and over"
    client.close()


@pytest.mark.soak
async def test_a_fail_over_to_an_empty_replica_is_served_again(
    shipped_models: Path, tmp_path: Path
) -> None:
    with (
        replicated(tmp_path) as servers,
        _running_service(tmp_path, servers.url, servers.primary.client, shipped_models) as service,
    ):
        async with Clients(service.url) as clients:
            async with clients.submitting():
                await clients.wait_until_served(30)
                with servers.failing_over():
                    servers.replica.client.replicaof("no", "one")
                    servers.replica.client.flushall()
                    servers.primary.kill()
                    await eventually(
                        lambda: _is_announced(servers.replica.client), "all is announced again", 30
                    )
                await clients.wait_until_served(SERVED_WITHIN_SECONDS)
            await clients.wait_until_ended()
            clients.assert_refused_only_with_retry_after()


@pytest.mark.soak
async def test_workers_with_one_model_each_exchange_queues_when_the_default_model_changes(
    without_aof: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(without_aof.url)
    with _running_service(
        tmp_path, without_aof.url, client, shipped_models, ("iris", "digits")
    ) as service:
        async with Clients(service.url, "/predict/iris", "/predict/digits") as clients:
            for name in ("digits", "iris"):
                async with clients.submitting():
                    await clients.wait_until_served(30)
                    client.set(keys.default_model(N), name)
                    await eventually(
                        partial(_have_logged_default, service, name, 3), "all have adopted it"
                    )
                    await clients.wait_until_served(SERVED_WITHIN_SECONDS)
                await clients.wait_until_ended()
    client.close()
