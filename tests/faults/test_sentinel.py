"""A primary that dies or freezes under load, and the replica that Sentinel puts in its place.

The figures are logged: `pytest -m soak tests/faults/test_sentinel.py -o log_cli=1
-o log_cli_level=INFO`.
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import httpx2
import pytest
import redis
import redis.asyncio
from msgspec import Struct
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from asyncinfer.jobs import TERMINAL, decode_record
from asyncinfer.repository import keys
from tests.faults.load_client import assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .replicated import Node, Replicated, replicated
from .services import Services, open_services

pytestmark = pytest.mark.soak

log = logging.getLogger(__name__)

QUEUE = "predict_queue"
FOLLOWED_WITHIN_SECONDS = 10.0
ANSWERED_WITHIN_SECONDS = 1.5
_CLIENTS = 4
_PACE_SECONDS = 0.02


class Asked(Struct):
    """One submit, as its client saw it."""

    at: float
    seconds: float
    status: int
    job_id: str
    value: float


class Load:
    """Clients that go on submitting, to a model whose answer is its input."""

    def __init__(self, url: str) -> None:
        self.asked: list[Asked] = []
        self.replicated: set[str] = set()
        """Acknowledged jobs that the replica was known to have."""
        self._url = url
        self._http = httpx2.AsyncClient(timeout=30)
        self._values = itertools.cycle(value / 8 for value in range(64))

    @property
    def acknowledged(self) -> dict[str, Asked]:
        return {one.job_id: one for one in self.asked if one.status == 202}

    @property
    def refused(self) -> list[Asked]:
        return [one for one in self.asked if one.status != 202]

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._submit_on()) for _ in range(_CLIENTS)]
            yield
            for one in clients:
                one.cancel()

    async def note_what_is_replicated(self, primary: Node) -> None:
        """Notes until the primary is gone. WAIT counts the replicas that have all that its own
        connection wrote, and so all that was written before."""
        client = redis.asyncio.Redis(
            port=primary.port, socket_timeout=1, retry=Retry(NoBackoff(), 0), max_connections=1
        )
        with contextlib.suppress(redis.RedisError):
            while True:
                known = set(self.acknowledged)
                await client.set("written", "1")
                if await client.wait(1, 500):
                    self.replicated |= known
                await asyncio.sleep(_PACE_SECONDS)
        await client.aclose()

    async def done_again(self) -> float:
        """When a job submitted after this call was done."""
        asked_at = time.monotonic()

        def taken() -> list[str]:
            return [job_id for job_id, one in self.acknowledged.items() if one.at > asked_at]

        async def done() -> bool:
            return (await self.get(taken()[0]))[0] == "completed"

        await eventually(lambda: bool(taken()), "a job is taken in", 30)
        await eventually(done, "it is done", 30)
        return time.monotonic()

    async def get(self, job_id: str) -> tuple[str, float | None]:
        """A job's status, or that it is absent, and its answer."""
        answer = await self._http.get(f"{self._url}/job/{job_id}")
        job = answer.json()
        if answer.status_code != 200:
            return ("absent" if answer.status_code == 404 else job["code"]), None
        if job["status"] != "completed":
            return job["status"], None
        return "completed", job["result"]["outputs"][0]["data"][0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _submit_on(self) -> None:
        while True:
            value, at = next(self._values), time.monotonic()
            answer = await self._http.post(f"{self._url}/predict", json={"data": [[value]]})
            seconds = time.monotonic() - at
            job_id = answer.json().get("job_id", "")
            self.asked.append(Asked(at, seconds, answer.status_code, job_id, value))
            await asyncio.sleep(_PACE_SECONDS)


class Scene(Struct):
    """An API and two workers that know the servers by their sentinels, and clients."""

    servers: Replicated
    services: Services
    workers: list[subprocess.Popen[bytes]]
    load: Load

    async def at_rest(self, primary: Node) -> None:
        """Stops the service; nothing of the load is left behind in Redis."""
        for one in self.workers:
            one.send_signal(signal.SIGTERM)
        await eventually(lambda: all(one.poll() == 0 for one in self.workers), "workers leave")
        self.services.close()
        assert_at_rest(primary.client, QUEUE)


@asynccontextmanager
async def opened(folder: Path, models: Path, **options: str) -> AsyncIterator[Scene]:
    environ = {"MODEL_DIR": str(models), "MODELS": "slow", "CONCURRENCY": "1"}
    with (
        replicated(folder, **options) as servers,
        open_services(folder, REDIS_URL=servers.url, **environ) as services,
    ):
        workers = [services.work(), services.work()]
        async with Load(services.serve()) as load:
            yield Scene(servers, services, workers, load)


@pytest.mark.parametrize("fault", ["killed, its replica behind", "frozen"])
async def test_a_fail_over_under_load_loses_nothing_that_was_replicated(
    fault: str, tmp_path: Path, zoo_models: Path
) -> None:
    async with opened(tmp_path, zoo_models) as scene:
        old, new, load = scene.servers.primary, scene.servers.replica, scene.load
        async with load.going_on():
            noting = asyncio.create_task(load.note_what_is_replicated(old))
            await eventually(lambda: len(load.replicated) > 200, "the load goes on", 20)
            if fault != "frozen":
                _leave_behind(new, old)
                ahead = len(load.acknowledged)
                await eventually(lambda: len(load.acknowledged) > ahead + 100, "it is behind")
            with scene.servers.failing_over():
                gone_at = time.monotonic()
                old.signal(signal.SIGSTOP if fault == "frozen" else signal.SIGKILL)
                followed_seconds = await load.done_again() - gone_at
            await noting
            both = len(load.asked)
            await eventually(lambda: len(_workers(new, load.asked[both:])) == 2, "both follow")

            back_at = time.monotonic()
            if fault == "frozen":
                old.signal(signal.SIGCONT)
            else:
                old.kill()
                old.start()
            await eventually(lambda: old.is_replica_of(new), "the old primary is a replica", 30)
            since = len(load.asked)
            await eventually(lambda: len(load.asked) > since + 50, "the load goes on")
        await eventually(lambda: _all_ended(new, load), "all that is known has ended", 30)
        found = {job_id: await load.get(job_id) for job_id in load.acknowledged}
        await scene.at_rest(new)

        lost = {job_id for job_id, (status, _) in found.items() if status == "absent"}
        _tell(fault, gone_at, followed_seconds, load, lost)
        assert followed_seconds < FOLLOWED_WITHIN_SECONDS
        assert {one.status for one in load.refused} <= {503}
        assert max(one.seconds for one in load.asked) < ANSWERED_WITHIN_SECONDS
        assert not [one for one in load.refused if one.at > back_at]
        assert not lost & load.replicated
        assert all(load.acknowledged[job_id].at < gone_at for job_id in lost)
        assert bool(lost) == (fault != "frozen")
        kept = {job_id: one for job_id, one in load.acknowledged.items() if job_id not in lost}
        assert {job_id: found[job_id] for job_id in kept} == {
            job_id: ("completed", one.value) for job_id, one in kept.items()
        }
        ended = transitions(new.client, QUEUE)
        assert {ended[job_id]["completed"] for job_id in kept} == {1}
        assert_one_end_each(new.client, QUEUE)


async def test_a_primary_without_its_replica_acknowledges_nothing_where_it_is_told_so(
    tmp_path: Path, zoo_models: Path
) -> None:
    bound = {"min_replicas_to_write": "1", "min_replicas_max_lag": "1"}
    async with opened(tmp_path, zoo_models, **bound) as scene:
        primary, replica, load = scene.servers.primary, scene.servers.replica, scene.load
        async with load.going_on():
            await eventually(lambda: len(load.acknowledged) > 50, "the load goes on")
            # Frozen, not killed: only its silence tells, as when the network is cut.
            replica.signal(signal.SIGSTOP)
            await eventually(lambda: len(load.refused) > 50, "submits are refused")
            alone = load.refused[0].at
            acknowledged = len([one for one in load.acknowledged.values() if one.at > alone])
            replica.signal(signal.SIGCONT)
            await load.done_again()
        await eventually(lambda: _all_ended(primary, load), "all has ended", 30)
        found = {job_id: await load.get(job_id) for job_id in load.acknowledged}
        await scene.at_rest(primary)

        assert acknowledged == 0
        assert {one.status for one in load.refused} == {503}
        assert max(one.seconds for one in load.asked) < ANSWERED_WITHIN_SECONDS
        assert found == {
            job_id: ("completed", one.value) for job_id, one in load.acknowledged.items()
        }


def _leave_behind(replica: Node, primary: Node) -> None:
    """Cuts the replica off, without a sentinel's notice: its password is refused from now on."""
    replica.client.config_set("masterauth", "wrong")
    primary.client.client_kill_filter(_type="replica")


def _workers(primary: Node, asked: list[Asked]) -> set[str | None]:
    """Who finished these jobs."""
    names = [keys.meta(one.job_id) for one in asked if one.status == 202]
    metas = primary.client.mget(names) if names else []
    return {decode_record(one).worker for one in metas if one} - {None}


def _all_ended(primary: Node, load: Load) -> bool:
    """Whether every acknowledged job has ended, but for those that the server never got."""
    statuses = primary.client.mget([keys.status(job_id) for job_id in load.acknowledged])
    return all(status is None or status.decode() in TERMINAL for status in statuses)


def _tell(fault: str, gone_at: float, followed: float, load: Load, lost: set[str]) -> None:
    answered_again = max((one.at + one.seconds for one in load.refused), default=gone_at)
    slowest = max(one.seconds for one in load.asked)
    log.info(
        "primary %s: submits taken again after %.1f s, a new job done after %.1f s; of %d "
        "acknowledged %d lost; %d refused, the slowest answer after %.2f s",
        *(fault, answered_again - gone_at, followed, len(load.acknowledged), len(lost)),
        *(len(load.refused), slowest),
    )
