"""Fail-over: a primary that dies or freezes under load, and the replica that Sentinel promotes.

The measured times are logged: `pytest -m soak tests/faults/test_sentinel.py -o log_cli=1
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
SERVED_AGAIN_WITHIN_SECONDS = 10.0
ANSWERED_WITHIN_SECONDS = 1.5
_CLIENTS = 4
_PAUSE_SECONDS = 0.05


class SubmitReply(Struct):
    """A submit and its reply, as a client sees them."""

    at: float
    seconds: float
    status: int
    job_id: str
    value: float


class Load:
    """Clients that submit all the time, to a model whose result is its input."""

    def __init__(self, url: str) -> None:
        self.replies: list[SubmitReply] = []
        self.replicated: set[str] = set()
        """Acknowledged jobs that the replica is known to have."""
        self._url = url
        self._http = httpx2.AsyncClient(timeout=30)
        self._values = itertools.cycle(value / 8 for value in range(64))

    @property
    def acknowledged(self) -> dict[str, SubmitReply]:
        return {reply.job_id: reply for reply in self.replies if reply.status == 202}

    @property
    def refused(self) -> list[SubmitReply]:
        return [reply for reply in self.replies if reply.status != 202]

    @asynccontextmanager
    async def submitting(self) -> AsyncIterator[None]:
        """Meanwhile the clients submit all the time."""
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(self._submit_forever()) for _ in range(_CLIENTS)]
            yield
            for client in clients:
                client.cancel()

    async def record_replicated(self, primary: Node) -> None:
        """Adds to `replicated` until the primary is gone.

        WAIT counts the replicas that have all that its own connection wrote, and so all that was
        written before.
        """
        client = redis.asyncio.Redis(
            port=primary.port, socket_timeout=1, retry=Retry(NoBackoff(), 0), max_connections=1
        )
        with contextlib.suppress(redis.RedisError):
            while True:
                acknowledged = set(self.acknowledged)
                await client.set("written", "1")
                if await client.wait(1, 500):
                    self.replicated |= acknowledged
                await asyncio.sleep(_PAUSE_SECONDS)
        await client.aclose()

    async def wait_until_served(self) -> float:
        """Waits until a job that was submitted after this call is completed; returns the time."""
        began_at = time.monotonic()

        def accepted() -> list[str]:
            return [job_id for job_id, reply in self.acknowledged.items() if reply.at > began_at]

        async def is_completed() -> bool:
            return (await self.get(accepted()[0]))[0] == "completed"

        await eventually(lambda: bool(accepted()), "a job is accepted", 30)
        await eventually(is_completed, "it is completed", 30)
        return time.monotonic()

    async def get(self, job_id: str) -> tuple[str, float | None]:
        """A job's status and result; the status is "absent", or an error code, without a job."""
        response = await self._http.get(f"{self._url}/job/{job_id}")
        job = response.json()
        if response.status_code != 200:
            return ("absent" if response.status_code == 404 else job["code"]), None
        if job["status"] != "completed":
            return job["status"], None
        return "completed", job["result"]["outputs"][0]["data"][0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _submit_forever(self) -> None:
        while True:
            value, at = next(self._values), time.monotonic()
            response = await self._http.post(f"{self._url}/predict", json={"data": [[value]]})
            seconds = time.monotonic() - at
            job_id = response.json().get("job_id", "")
            self.replies.append(SubmitReply(at, seconds, response.status_code, job_id, value))
            await asyncio.sleep(_PAUSE_SECONDS)


class Service(Struct):
    """An API and two workers that find their Redis by its sentinels, and clients."""

    servers: Replicated
    services: Services
    workers: list[subprocess.Popen[bytes]]
    load: Load

    async def stop(self, primary: Node) -> None:
        """Stops the service; asserts that its queue in Redis is at rest."""
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        await eventually(
            lambda: all(worker.poll() == 0 for worker in self.workers), "both workers end"
        )
        self.services.close()
        assert_at_rest(primary.client, QUEUE)


@asynccontextmanager
async def running_service(folder: Path, models: Path, **options: str) -> AsyncIterator[Service]:
    environ = {"MODEL_DIR": str(models), "MODELS": "slow", "CONCURRENCY": "1"}
    with (
        replicated(folder, **options) as servers,
        open_services(folder, REDIS_URL=servers.url, **environ) as services,
    ):
        workers = [services.work(), services.work()]
        async with Load(services.serve()) as load:
            yield Service(servers, services, workers, load)


@pytest.mark.parametrize("fault", ["killed, its replica behind", "frozen"])
async def test_a_fail_over_under_load_loses_nothing_that_was_replicated(
    fault: str, tmp_path: Path, zoo_models: Path
) -> None:
    async with running_service(tmp_path, zoo_models) as service:
        old, new, load = service.servers.primary, service.servers.replica, service.load
        async with load.submitting():
            recording = asyncio.create_task(load.record_replicated(old))
            await eventually(lambda: len(load.replicated) > 200, "the load goes on", 20)
            if fault != "frozen":
                _cut_off(new, old)
                before = len(load.acknowledged)
                await eventually(
                    lambda: len(load.acknowledged) > before + 100, "the replica is behind"
                )
            with service.servers.failing_over():
                gone_at = time.monotonic()
                old.signal(signal.SIGSTOP if fault == "frozen" else signal.SIGKILL)
                served_again_seconds = await load.wait_until_served() - gone_at
            await recording
            before = len(load.replies)
            await eventually(
                lambda: len(_workers(new, load.replies[before:])) == 2, "both workers run jobs"
            )

            back_at = time.monotonic()
            if fault == "frozen":
                old.signal(signal.SIGCONT)
            else:
                old.kill()
                old.start()
            await eventually(lambda: old.is_replica_of(new), "the old primary is a replica", 30)
            count = len(load.replies)
            await eventually(lambda: len(load.replies) > count + 50, "the load goes on")
        await eventually(lambda: _all_ended(new, load), "all jobs in Redis have ended", 30)
        jobs = {job_id: await load.get(job_id) for job_id in load.acknowledged}
        await service.stop(new)

        lost = {job_id for job_id, (status, _) in jobs.items() if status == "absent"}
        _log_figures(fault, gone_at, served_again_seconds, load, lost)
        assert served_again_seconds < SERVED_AGAIN_WITHIN_SECONDS
        assert {reply.status for reply in load.refused} <= {503}
        assert max(reply.seconds for reply in load.replies) < ANSWERED_WITHIN_SECONDS
        assert not [reply for reply in load.refused if reply.at > back_at]
        assert not lost & load.replicated
        assert all(load.acknowledged[job_id].at < gone_at for job_id in lost)
        assert bool(lost) == (fault != "frozen")
        kept = {job_id: reply for job_id, reply in load.acknowledged.items() if job_id not in lost}
        assert {job_id: jobs[job_id] for job_id in kept} == {
            job_id: ("completed", reply.value) for job_id, reply in kept.items()
        }
        ended = transitions(new.client, QUEUE)
        assert {ended[job_id]["completed"] for job_id in kept} == {1}
        assert_one_end_each(new.client, QUEUE)


async def test_a_primary_that_requires_a_replica_acknowledges_nothing_without_it(
    tmp_path: Path, zoo_models: Path
) -> None:
    options = {"min_replicas_to_write": "1", "min_replicas_max_lag": "1"}
    async with running_service(tmp_path, zoo_models, **options) as service:
        primary, replica, load = service.servers.primary, service.servers.replica, service.load
        async with load.submitting():
            await eventually(lambda: len(load.acknowledged) > 50, "the load goes on")
            # Frozen, not killed: as when the network is cut, only its silence shows the fault.
            replica.signal(signal.SIGSTOP)
            await eventually(lambda: len(load.refused) > 50, "submits are refused")
            alone = load.refused[0].at
            acknowledged = len([reply for reply in load.acknowledged.values() if reply.at > alone])
            replica.signal(signal.SIGCONT)
            await load.wait_until_served()
        await eventually(lambda: _all_ended(primary, load), "all has ended", 30)
        jobs = {job_id: await load.get(job_id) for job_id in load.acknowledged}
        await service.stop(primary)

        assert acknowledged == 0
        assert {reply.status for reply in load.refused} == {503}
        assert max(reply.seconds for reply in load.replies) < ANSWERED_WITHIN_SECONDS
        assert jobs == {
            job_id: ("completed", reply.value) for job_id, reply in load.acknowledged.items()
        }


def _cut_off(replica: Node, primary: Node) -> None:
    """Stops the replication without the sentinels' notice: the replica's password is now wrong."""
    replica.client.config_set("masterauth", "wrong")
    primary.client.client_kill_filter(_type="replica")


def _workers(primary: Node, replies: list[SubmitReply]) -> set[str | None]:
    """The workers that finished these jobs."""
    names = [keys.meta(reply.job_id) for reply in replies if reply.status == 202]
    metas = primary.client.mget(names) if names else []
    return {decode_record(meta).worker for meta in metas if meta} - {None}


def _all_ended(primary: Node, load: Load) -> bool:
    """Whether every acknowledged job that the server has, has ended."""
    statuses = primary.client.mget([keys.status(job_id) for job_id in load.acknowledged])
    return all(status is None or status.decode() in TERMINAL for status in statuses)


def _log_figures(
    fault: str, gone_at: float, served_again_seconds: float, load: Load, lost: set[str]
) -> None:
    accepted_again_at = max((reply.at + reply.seconds for reply in load.refused), default=gone_at)
    slowest = max(reply.seconds for reply in load.replies)
    log.info(
        "primary %s: submits accepted again after %.1f s, a new job completed after %.1f s; of %d "
        "acknowledged jobs %d lost; %d submits refused, the slowest reply after %.2f s",
        *(fault, accepted_again_at - gone_at, served_again_seconds),
        *(len(load.acknowledged), len(lost)),
        *(len(load.refused), slowest),
    )
