"""Webhooks of a real service to real receivers, while processes, Redis and receivers fail."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import redis

from asyncinfer.client import Client, verify_webhook
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import DeliveryState, read_state
from asyncinfer.webhooks.answers import TRY_SECONDS
from asyncinfer.webhooks.sender import LEASE_SECONDS
from tests.certificates import Authority
from tests.docs.markdown import page
from tests.ports import free_port
from tests.webhooks.receiver import Received, Receiver, Reply, receiver
from tests.webhooks.sending import SECRETS, is_signed, secrets_file

from .harness import eventually_sync
from .processes import DurableServer
from .services import Services, open_services

pytestmark = pytest.mark.soak

Q: Final = "predict_queue"
ROW: Final = [[5.1, 3.5, 1.4, 0.2]]
JSON: Final = {"content-type": "application/json"}


class Hooked:
    """A service with one worker, whose webhooks go to receivers with certificates of an own
    authority."""

    def __init__(
        self, folder: Path, services: Services, server: DurableServer, authority: Authority
    ) -> None:
        self.folder = folder
        self.services = services
        self.server = server
        self.authority = authority
        self.url = ""

    def submit(self, hook: str, **options: Any) -> str:
        """Submits a job with a webhook; returns its id."""
        body = {"data": ROW, "options": {"webhook": {"url": hook, **options}}}
        reply = httpx2.post(f"{self.url}/predict", json=body, timeout=10)
        assert reply.status_code == 202, reply.text
        return str(reply.json()["job_id"])

    def submit_many(self, count: int, hook: str) -> list[str]:
        line = json.dumps({"data": ROW, "options": {"webhook": {"url": hook}}})
        reply = httpx2.post(
            f"{self.url}/predict",
            content="\n".join([line] * count),
            headers={"content-type": "application/x-ndjson"},
            timeout=60,
        )
        return [json.loads(answer)["job_id"] for answer in reply.text.splitlines()]

    def left(self) -> int:
        """How many deliveries are to come."""
        with contextlib.closing(redis.Redis.from_url(self.server.url)) as client:
            count: Any = client.zcard(keys.outbox(Q))
        return int(count)

    def wait_until_quiet(self, seconds: float = 60.0) -> None:
        def is_quiet() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return self.left() == 0
            return False

        eventually_sync(is_quiet, "nothing is left to deliver", seconds)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def hook(authority: Authority) -> Iterator[Receiver]:
    with receiver(authority.server_context("localhost")) as server:
        yield server


@contextlib.contextmanager
def hooked(
    tmp_path: Path, server: DurableServer, authority: Authority, *allow: str
) -> Iterator[Hooked]:
    """A service that may call the receivers at `allow` (`host:port`)."""
    secrets = secrets_file(tmp_path, f"default * {SECRETS[0]}")
    environ = {
        "REDIS_URL": server.url,
        "SSL_CERT_FILE": str(authority.certificate),
        "WEBHOOK_SECRETS": str(secrets),
        "WEBHOOK_ALLOW": ",".join(allow),
    }
    with open_services(tmp_path, **environ) as services:
        running = Hooked(tmp_path, services, server, authority)
        services.work()
        running.url = services.serve()
        yield running


@pytest.fixture
def service(
    tmp_path: Path, durable: DurableServer, authority: Authority, hook: Receiver
) -> Iterator[Hooked]:
    with hooked(tmp_path, durable, authority, hook.address) as running:
        yield running


def check(request: Received, job_id: str, event: str = "completed") -> None:
    assert request.webhook_id == f"msg_{job_id}_1_{event}"
    assert is_signed(request, SECRETS[0])
    assert verify_webhook(SECRETS[0], request.headers, request.body)["data"]["job_id"] == job_id


def test_a_webhook_arrives_within_a_second_of_its_jobs_end(service: Hooked, hook: Receiver) -> None:
    service.submit(hook.url())
    hook.wait_for(1)
    waits_seconds: list[float] = []
    for count in range(2, 12):
        job_id = service.submit(hook.url())
        hook.wait_for(count)
        request = hook.requests[-1]
        check(request, job_id)
        ended = httpx2.get(f"{service.url}/job/{job_id}").json()["finished_at"]
        assert request.event["timestamp"] == ended
        began = float(request.headers["webhook-timestamp"])
        waits_seconds.append(began - _seconds(ended))
    # A busy machine may delay some.
    assert statistics.median(waits_seconds) < 1.0, waits_seconds
    service.wait_until_quiet()


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def test_a_webhook_survives_the_kill_of_its_sender(service: Hooked, hook: Receiver) -> None:
    """The API is killed between the POST and the note of its answer."""

    def kill(_: Received) -> Reply:
        hook.behave = lambda _: Reply()
        service.services.members[-1].kill()
        return Reply()

    hook.behave = kill
    job_id = service.submit(hook.url(), metadata={"order": 7})
    hook.wait_for(1)
    service.url = service.services.serve()
    eventually_sync(lambda: len(hook.requests) == 2, "it is sent again", LEASE_SECONDS + 10)
    service.wait_until_quiet()
    first, second = hook.requests
    check(first, job_id)
    check(second, job_id)
    assert first.body == second.body
    assert state(service, job_id).outcome == "delivered"


def state(service: Hooked, job_id: str) -> DeliveryState:
    """What is noted of a job's delivery."""
    with contextlib.closing(redis.Redis.from_url(service.server.url)) as client:
        packed: Any = client.hget(keys.webhook(Q, job_id), "1_completed")
    return read_state(packed)


def test_webhooks_survive_a_restart_of_redis(service: Hooked, hook: Receiver) -> None:
    def restart(_: Received) -> Reply:
        hook.behave = lambda _: Reply()
        service.server.kill()
        service.server.start()
        return Reply()

    with contextlib.closing(redis.Redis.from_url(service.server.url)) as client:
        client.config_set("appendfsync", "always")  # else the last second may be lost
    hook.behave = restart
    job_ids = service.submit_many(50, hook.url())

    def told() -> set[str]:
        return {request.webhook_id for request in hook.requests}

    # At first nothing is left to deliver, since no job has ended.
    eventually_sync(lambda: len(told()) >= 50, "all are told", LEASE_SECONDS + 30)
    service.wait_until_quiet(LEASE_SECONDS + 30)
    assert told() == {f"msg_{job_id}_1_completed" for job_id in job_ids}
    bodies = {(request.webhook_id, request.body) for request in hook.requests}
    assert len(bodies) == 50


def test_an_emptied_redis_invents_no_webhook(service: Hooked, hook: Receiver) -> None:
    def empty(_: Received) -> Reply:
        hook.behave = lambda _: Reply()
        with contextlib.closing(redis.Redis.from_url(service.server.url)) as client:
            client.flushall()
        return Reply()

    hook.behave = empty
    before = service.submit_many(20, hook.url())
    hook.wait_for(1)
    job_ids: list[str] = []

    def accepted() -> bool:
        with contextlib.suppress(AssertionError):
            job_ids.append(service.submit(hook.url()))
        return bool(job_ids)

    eventually_sync(accepted, "the model is announced again")
    wanted = f"msg_{job_ids[0]}_1_completed"
    eventually_sync(
        lambda: any(each.webhook_id == wanted for each in hook.requests), "later ones are told"
    )
    service.wait_until_quiet()
    known = {f"msg_{job_id}_1_completed" for job_id in (*before, *job_ids)}
    assert {request.webhook_id for request in hook.requests} <= known
    assert "Traceback" not in service.services.log


class Telling:
    """Runs so many jobs and waits until their ends are told."""

    def __init__(self, service: Hooked, hook: Receiver, count: int) -> None:
        self._before = self._seen = len(hook.requests)
        self.seconds = 0.0
        """How long that took."""
        self.longest_gap_seconds = 0.0
        """How long no webhook came meanwhile."""
        self._hook = hook
        began = self._last_at = time.monotonic()
        service.submit_many(count, hook.url())
        eventually_sync(lambda: self._told() >= count, "all arrive", 120)
        self.seconds = time.monotonic() - began

    def _told(self) -> int:
        now, seen = time.monotonic(), len(self._hook.requests)
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - self._last_at)
        if seen > self._seen:
            self._seen, self._last_at = seen, now
        return seen - self._before


def test_a_receiver_that_hangs_delays_no_other(
    tmp_path: Path, durable: DurableServer, authority: Authority, hook: Receiver
) -> None:
    release = threading.Event()
    tls = authority.server_context("127.0.0.1")
    with receiver(tls) as hanging:
        hanging.behave = lambda _: (release.wait(120), Reply())[1]
        allow = (hook.address, f"127.0.0.1:{hanging.port}")
        with hooked(tmp_path, durable, authority, *allow) as service:
            alone = Telling(service, hook, 1000)
            service.wait_until_quiet()
            stuck = service.submit_many(1000, hanging.url(host="127.0.0.1"))
            hanging.wait_for(1)
            beside = Telling(service, hook, 1000)
            # One that waits for a try which hangs waits for 15 s; a busy machine slows all.
            assert beside.longest_gap_seconds < alone.longest_gap_seconds + TRY_SECONDS / 2
            assert beside.seconds < 4 * alone.seconds + TRY_SECONDS
            assert len(hanging.requests) < 20
            eventually_sync(lambda: service.left() == len(stuck), "all are noted")
            release.set()
    assert len({each.webhook_id for each in hook.requests}) == 2000


def test_a_webhook_is_not_sent_without_trust_in_the_certificate(
    tmp_path: Path, durable: DurableServer, authority: Authority
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    with (
        receiver(stranger.server_context("localhost")) as hook,
        hooked(tmp_path, durable, authority, hook.address) as service,
    ):
        job_id = service.submit(hook.url())
        eventually_sync(lambda: bool(state(service, job_id).attempts), "the failure is noted")
        assert state(service, job_id).attempts[0].error == "tls_failed"
        assert not hook.requests


def test_the_receiver_of_the_page_prints_what_it_is_told(
    tmp_path: Path, durable: DurableServer, authority: Authority
) -> None:
    (program,) = page("webhooks.md").section("Receive one").texts("python")
    (asked,) = page("webhooks.md").section("Ask for one").texts("json")
    port = free_port()
    environ = {**os.environ, "PORT": str(port), "WEBHOOK_SECRET": SECRETS[0]}
    shown = subprocess.Popen(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        with hooked(tmp_path, durable, authority, f"localhost:{port}") as service:
            body = re.sub(r"https://[^\"]*", f"http://localhost:{port}/", asked)
            reply = httpx2.post(f"{service.url}/predict", content=body, headers=JSON)
            assert reply.status_code == 202, reply.text
            assert shown.stdout
            line = shown.stdout.readline()
    finally:
        shown.kill()
        shown.communicate()
    assert line.startswith("job.completed {'order': 4711} {")
    assert "setosa" in line


# --- groups ----------------------------------------------------------------------------------


def close_group(service: Hooked, hook: Receiver, group: str) -> None:
    url = f"{service.url}/group/{group}/close"
    reply = httpx2.post(url, json={"webhook": {"url": hook.url()}}, timeout=10)
    assert reply.status_code == 200, reply.text


def submit_group(service: Hooked, group: str, count: int, **options: Any) -> None:
    line = json.dumps({"data": ROW, "options": {"group": group, **options}})
    content = "\n".join([line] * count)
    headers = {"content-type": "application/x-ndjson"}
    reply = httpx2.post(f"{service.url}/predict", content=content, headers=headers, timeout=60)
    assert reply.text.count('"pending"') == count, reply.text


def test_the_end_of_a_group_is_told_once_though_apis_are_killed(
    service: Hooked, hook: Receiver
) -> None:
    """Two APIs follow five groups; the one is killed again and again, and started anew."""
    doomed = len(service.services.members)
    first_url = service.url
    service.services.serve()
    for number in range(5):
        group = f"night-{number}"
        submit_group(service, group, 200)
        submit_group(service, group, 20, ttl_seconds=1)
        close_group(service, hook, group)
        service.services.members[doomed].kill()
        service.services.members[doomed].wait()
        service.services.serve()
        service.services.members[doomed] = service.services.members.pop()
    service.wait_until_quiet()
    hook.wait_for(5)
    service.wait_until_quiet()
    assert service.url == first_url
    told = [request.event["data"] for request in hook.requests]
    assert {data["group"] for data in told} == {f"night-{number}" for number in range(5)}
    assert len({request.webhook_id for request in hook.requests}) == 5
    for data in told:
        assert data["jobs"] == 220
        assert data["counts"]["completed"] + data["counts"]["expired"] == 220


def test_a_group_that_ended_while_no_api_lived_is_told_by_the_next_one(
    service: Hooked, hook: Receiver
) -> None:
    worker, api = service.services.members
    worker.send_signal(signal.SIGSTOP)
    submit_group(service, "g", 50)
    close_group(service, hook, "g")
    api.kill()
    worker.send_signal(signal.SIGCONT)
    with contextlib.closing(redis.Redis.from_url(service.server.url)) as client:
        queue: Any = client
        unfinished = (keys.delayed(Q), Q, keys.running(Q))
        eventually_sync(lambda: not queue.exists(*unfinished), "all jobs have ended")
    assert hook.requests == []
    service.url = service.services.serve()
    (request,) = hook.wait_for(1)
    assert request.event["data"]["counts"]["completed"] == 50


def test_an_emptied_redis_tells_of_no_group(service: Hooked, hook: Receiver) -> None:
    submit_group(service, "g", 5, delay_seconds=60)
    close_group(service, hook, "g")
    with contextlib.closing(redis.Redis.from_url(service.server.url)) as client:
        client.flushall()
    eventually_sync(lambda: _predicts(service), "the model is announced again")
    submit_group(service, "g", 5)
    close_group(service, hook, "g")
    (request,) = hook.wait_for(1)
    assert request.event["data"]["counts"]["completed"] == 5


def _predicts(service: Hooked) -> bool:
    return httpx2.post(f"{service.url}/predict", json={"data": ROW}, timeout=10).status_code == 202


def test_a_map_with_a_webhook_is_told_when_it_is_done(service: Hooked, hook: Receiver) -> None:
    with Client(service.url) as client:
        results = client.map(
            ROW * 1000, "iris", batch=10, webhook={"url": hook.url()}, progress=False
        )
        assert len(list(results)) == 1000
    (request,) = hook.wait_for(1)
    assert is_signed(request, SECRETS[0])
    data = verify_webhook(SECRETS[0], request.headers, request.body)["data"]
    assert (data["group"], data["counts"]["completed"]) == (results.group, 100)
