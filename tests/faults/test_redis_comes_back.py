"""Redis that comes back empty, or as it was some time ago, or without one of its keys."""

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
SETTLED_WITHIN_SECONDS = 15.0
IRIS = [[5.1, 3.5, 1.4, 0.2]]
DIGITS = [[0.0] * 64]
PATHS = {"/predict": IRIS, "/predict/iris": IRIS, "/predict/digits": DIGITS}
_BRISK = {"LEASE_SECONDS": "2", "REAP_SECONDS": "0.3", "CONCURRENCY": "1"}
_PACE_SECONDS = 0.05


class Asked(Struct):
    """One submit, as its client saw it."""

    at: float
    path: str
    status: int
    body: dict[str, Any]
    retry_after: str | None

    @property
    def job_id(self) -> str:
        return str(self.body["job_id"])


class Clients:
    """One client for each way to a model, who go on submitting."""

    def __init__(self, url: str, *paths: str) -> None:
        self._paths = paths or tuple(PATHS)
        self.asked: list[Asked] = []
        self.streams = 0
        """How many streams have begun."""
        self.http = httpx2.AsyncClient(base_url=url, timeout=60)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def submit(self, path: str, **options: Any) -> Asked:
        body = {"data": PATHS[path], "options": options}
        at = time.monotonic()
        reply = await self.http.post(path, json=body)
        one = Asked(at, path, reply.status_code, reply.json(), reply.headers.get("retry-after"))
        self.asked.append(one)
        return one

    async def status(self, job_id: str) -> str:
        """A job's status, or "gone"."""
        reply = await self.http.get(f"/job/{job_id}")
        if reply.status_code in (404, 410):
            return "gone"
        return str(reply.json().get("status")) if reply.status_code == 200 else "unknown"

    async def is_so(self, job_id: str, status: str) -> bool:
        return await self.status(job_id) == status

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._submit_on(path)) for path in self._paths]
            yield
            for one in clients:
                one.cancel()

    async def served(self, within_seconds: float) -> None:
        """A job submitted to each model from now on completes."""
        began_at = time.monotonic()
        for path in self._paths:
            await eventually(partial(self._done, path, began_at), path, within_seconds)

    async def served_each(self) -> None:
        """One job of each model is taken in and completes."""
        for path in self._paths:
            began_at = time.monotonic()
            await eventually(partial(self._taken, path), path)
            await eventually(partial(self._done, path, began_at), path)

    async def events(self, path: str, until: str | None) -> list[str]:
        """The names of a stream's events until one comes, or until it ends."""
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

        async def is_taken() -> bool:
            reply = await self.http.post("/predict/slow", json={"data": [[milliseconds]]})
            if reply.status_code == 202:
                ids.append(str(reply.json()["job_id"]))
            else:
                assert reply.json()["code"] == "model_loading", reply.text
            return bool(ids)

        # The models before it are served while it is loaded.
        await eventually(is_taken, "the slow model takes a job", 20)
        return ids[0]

    async def settled(self, within_seconds: float = SETTLED_WITHIN_SECONDS) -> None:
        """Every job that was accepted has completed, or is plainly gone."""
        open_jobs = {one.job_id for one in self.asked if one.status == 202}

        async def none_is_open() -> bool:
            for job_id in list(open_jobs):
                if await self.status(job_id) not in ("completed", "gone"):
                    return False
                open_jobs.discard(job_id)
            return True

        await eventually(none_is_open, "all jobs are completed or gone", within_seconds)

    def assert_refused_for_a_moment_only(self) -> None:
        """No client was told that it made a mistake, and each that was refused when to retry."""
        for one in self.asked:
            assert one.status == 202 or (one.status == 503 and one.retry_after), one

    async def _taken(self, path: str) -> bool:
        return (await self.submit(path)).status == 202

    async def _done(self, path: str, since: float) -> bool:
        for one in reversed(self.asked):
            if one.path == path and one.status == 202 and one.at > since:
                return await self.status(one.job_id) == "completed"
        return False

    async def _submit_on(self, path: str) -> None:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                await self.submit(path)
            await asyncio.sleep(_PACE_SECONDS)


class Scene(Struct):
    """A service on a Redis: an API, and workers that do not have the same models."""

    url: str
    server: redis.Redis
    services: Services

    @property
    def is_whole(self) -> bool:
        return _is_whole(self.server)


@contextlib.contextmanager
def _opened(
    folder: Path,
    redis_url: str,
    server: redis.Redis,
    models: Path,
    crew: tuple[str, ...] = ("iris,digits", "digits"),
) -> Iterator[Scene]:
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(models), **_BRISK}
    with open_services(folder, **environ) as services:
        for its_models in crew:
            services.work("--models", its_models, "--default-model", "iris")
        url = services.serve()
        eventually_sync(lambda: _workers(server) == len(crew), "all work", 20)
        yield Scene(url, server, services)


def _is_whole(server: redis.Redis) -> bool:
    """Whether it has all that it knew of the models."""
    with contextlib.suppress(redis.RedisError):
        return (
            server.get(keys.default_model(N)) == b"iris"
            and {b"iris", b"digits"} <= set(server.smembers(keys.models(N)))
            and bool(server.sismember(keys.queues(N), f"{N}:digits"))
        )
    return False


def _has_status(server: redis.Redis, job_id: str, status: bytes) -> bool:
    return server.get(keys.status(job_id)) == status


def _told_of(scene: Scene, default: str, count: int) -> bool:
    """Whether so many processes have logged that this is the default model now."""
    return scene.services.log.count(f"Redis names {default!r} as the default model") == count


def _workers(server: redis.Redis) -> int:
    return sum(1 for _ in server.scan_iter(keys.worker(N, "*"), count=1000))


@pytest.fixture(scope="module")
def scene(
    redis_url: str, shipped_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """Shared by the tests of this file: each leaves it served."""
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    with _opened(tmp_path_factory.mktemp("back"), redis_url, client, shipped_models) as it:
        yield it
    assert_bounded(client)
    client.close()


async def _is_served_after(scene: Scene, fault: Callable[[], object]) -> None:
    async with Clients(scene.url) as clients:
        async with clients.going_on():
            await clients.served(30)
            fault()
            fault_at = time.monotonic()
            await eventually(lambda: scene.is_whole, "Redis is whole", SERVED_WITHIN_SECONDS)
            await clients.served(fault_at + SERVED_WITHIN_SECONDS - time.monotonic())
        await clients.settled()
        clients.assert_refused_for_a_moment_only()


async def test_an_emptied_redis_is_served_again_within_5_s(scene: Scene) -> None:
    await _is_served_after(scene, scene.server.flushall)


@pytest.mark.parametrize("key", [keys.default_model(N), keys.models(N)])
async def test_a_redis_that_lost_a_key_is_served_again_within_5_s(scene: Scene, key: str) -> None:
    await _is_served_after(scene, lambda: scene.server.delete(key))


async def test_a_delayed_job_is_run_although_the_list_of_queues_is_lost(scene: Scene) -> None:
    async with Clients(scene.url) as clients:
        await clients.submit("/predict/digits", delay_seconds=0.5)
        scene.server.delete(keys.queues(N))
        await clients.settled(SERVED_WITHIN_SECONDS)


async def test_a_job_runs_wherever_it_was_put(scene: Scene, redis_url: str) -> None:
    """As it was put there by an API that knew no default model."""
    scene.server.sadd(keys.queues(N), f"{N}:iris")
    async with Store.open(redis_url, queue_name=N, policy=Policy(), name="test") as store:
        submissions = Submissions(store)
        record = Record(SCHEMA, f"{N}:iris", "iris", "default", 0)
        job = NewJob(new_id(0), record.queue, msgspec.json.encode(IRIS), record)
        await submissions.submit_many(job.queue, [job])
        scene.server.set(keys.data("stranger"), msgspec.json.encode(DIGITS))
        scene.server.set(keys.status("stranger"), "pending")
        scene.server.lpush(f"{N}:digits", "stranger")
        for job_id in (job.job_id, "stranger"):
            completed = partial(_has_status, scene.server, job_id, b"completed")
            await eventually(completed, f"{job_id} has completed", SERVED_WITHIN_SECONDS)


async def test_waits_and_streams_end_or_go_on_when_redis_was_emptied(scene: Scene) -> None:
    async with Clients(scene.url) as clients, asyncio.timeout(20):
        await clients.served_each()
        gone = (await clients.submit("/predict", delay_seconds=600)).job_id
        waits = asyncio.create_task(clients.http.get(f"/job/{gone}?wait=60"))
        posts = asyncio.create_task(
            clients.http.post(
                "/predict",
                json={"data": IRIS, "options": {"delay_seconds": 600}},
                headers={"Prefer": "wait=60"},
            )
        )
        its_events = asyncio.create_task(clients.events(f"/job/{gone}/events", until=None))
        all_events = asyncio.create_task(clients.events("/events", until="completed"))
        await eventually(
            lambda: scene.server.zcard(keys.delayed(N)) == 2 and clients.streams == 2, "all wait"
        )
        scene.server.flushall()
        assert (await waits).status_code == 404
        taken = await posts
        assert (taken.status_code, taken.json()["status"]) == (202, "pending")
        assert await clients.status(taken.json()["job_id"]) == "gone"
        assert (await its_events)[0] == "snapshot"
        await clients.served_each()
        assert "completed" in await all_events


@pytest.mark.soak
async def test_another_default_model_in_redis_is_adopted_by_all(scene: Scene) -> None:
    async with Clients(scene.url, "/predict/iris", "/predict/digits") as clients:
        for name, before in (("digits", "iris"), ("iris", "digits")):
            async with clients.going_on():
                await clients.served(30)
                scene.server.set(keys.default_model(N), name)
                await eventually(partial(_told_of, scene, name, 3), "all have adopted it")
                await clients.served(SERVED_WITHIN_SECONDS)
            await clients.settled()
            assert f"this worker had {before!r} from DEFAULT_MODEL" in scene.services.log


# --- the whole of it -------------------------------------------------------------------------

_KEYS = (
    *(keys.default_versions(N), keys.workers(N), keys.model(N, "iris"), keys.model(N, "digits")),
    *(keys.pace(N, "iris"), keys.out_of_place(N), keys.repair_gate(N)),
    *(
        of(queue)
        for queue in (N, f"{N}:digits")
        for of in (
            *(keys.wake, keys.bytes_waiting, keys.seq, keys.log, keys.log_marks, keys.control),
            *(keys.swept, keys.hold, keys.reap_gate, keys.deadlines, keys.stale_entries),
        )
    ),
)


@pytest.mark.soak
@pytest.mark.parametrize("key", _KEYS)
async def test_any_shared_key_may_be_lost(scene: Scene, key: str) -> None:
    await _is_served_after(scene, lambda: scene.server.delete(key))


@pytest.mark.soak
@pytest.mark.parametrize("key", ["worker:*", "inbox:*"])
async def test_what_a_process_says_of_itself_may_be_lost(scene: Scene, key: str) -> None:
    def lose() -> None:
        for name in scene.server.scan_iter(f"{{{{{N}}}}}:{key}", count=1000):
            scene.server.delete(name)

    await _is_served_after(scene, lose)


@pytest.mark.soak
@pytest.mark.parametrize("comes_back", ["empty", "as it was"])
async def test_a_redis_that_is_started_again_is_served_within_5_s_whatever_it_kept(
    comes_back: str, forgetful: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    """With an older dump, a job is back in the hands of a worker who has finished it since."""
    models = tmp_path / "models"
    shutil.copytree(shipped_models, models)
    zoo.place(models, "slow", zoo.slow())
    client = redis.Redis.from_url(forgetful.url)
    crew = ("iris,digits,slow", "digits")
    with _opened(tmp_path, forgetful.url, client, models, crew) as scene:
        async with Clients(scene.url) as clients:
            async with clients.going_on():
                await clients.served(30)
                slow = await clients.submit_slow(1000)
                await eventually(partial(_has_status, client, slow, b"processing"), "runs")
                if comes_back == "as it was":
                    forgetful.dump()
                await eventually(partial(_has_status, client, slow, b"completed"), "it ran")
                await clients.served(30)
                forgetful.kill()
                forgetful.start()
                back_at = time.monotonic()
                if comes_back == "as it was":
                    assert client.get(keys.status(slow)) == b"processing"
                await eventually(lambda: scene.is_whole, "Redis is whole", SERVED_WITHIN_SECONDS)
                await clients.served(back_at + SERVED_WITHIN_SECONDS - time.monotonic())
            await clients.settled()
            became = "completed" if comes_back == "as it was" else "gone"
            await eventually(partial(clients.is_so, slow, became), f"the old job is {became}")
            clients.assert_refused_for_a_moment_only()
        assert scene.services.log.count("WARNING") < 100, "an outage is no flood"
    client.close()


@pytest.mark.soak
async def test_a_fail_over_to_an_empty_replica_is_served_again(
    shipped_models: Path, tmp_path: Path
) -> None:
    with (
        replicated(tmp_path) as servers,
        _opened(tmp_path, servers.url, servers.primary.client, shipped_models) as scene,
    ):
        async with Clients(scene.url) as clients:
            async with clients.going_on():
                await clients.served(30)
                with servers.failing_over():
                    servers.replica.client.replicaof("no", "one")
                    servers.replica.client.flushall()
                    servers.primary.kill()
                    await eventually(lambda: _is_whole(servers.replica.client), "it is whole", 30)
                await clients.served(SERVED_WITHIN_SECONDS)
            await clients.settled()
            clients.assert_refused_for_a_moment_only()


@pytest.mark.soak
async def test_workers_of_one_model_each_swap_their_queues_when_the_default_changes(
    forgetful: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(forgetful.url)
    with _opened(tmp_path, forgetful.url, client, shipped_models, ("iris", "digits")) as scene:
        async with Clients(scene.url, "/predict/iris", "/predict/digits") as clients:
            for name in ("digits", "iris"):
                async with clients.going_on():
                    await clients.served(30)
                    client.set(keys.default_model(N), name)
                    await eventually(partial(_told_of, scene, name, 3), "all have adopted it")
                    await clients.served(SERVED_WITHIN_SECONDS)
                await clients.settled()
    client.close()
