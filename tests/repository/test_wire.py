"""Commands reach Redis past redis-py's client, or through it where its parts have changed."""

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import redis
from redis.asyncio.connection import Connection, ConnectionPool

from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys, wire
from asyncinfer.repository.claims import ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.endpoint import Endpoint, close
from asyncinfer.repository.link import Link, new_link
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.faults.harness import eventually
from tests.queue_driver import Q, new_job


async def test_a_call_that_waits_for_a_bell_seldom_wakes_its_process(redis_url: str) -> None:
    link = Link(Endpoint.parse(redis_url).client("idle"))
    await link.ask(("PING",), 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    assert await link.ask(("BRPOP", "bell", 1), 2) is None

    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before <= 6
    await link.close()


async def test_a_reply_that_came_while_the_process_was_halted_is_read(redis_url: str) -> None:
    link = Link(Endpoint.parse(redis_url).client("halted"))
    assert await link.ask(("PING",), 0.6) == b"PONG"
    _halt(0.2)  # until the next check for silence is due

    call = asyncio.ensure_future(link.ask(("PING",), 0.6))
    await asyncio.sleep(0)  # it is sent
    _halt(0.7)

    assert await call == b"PONG"
    await link.close()


def _halt(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture(params=[True, False], ids=["directly", "through redis-py's client"])
async def either_store(
    request: pytest.FixtureRequest,
    redis_url: str,
    server: redis.Redis,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Store]:
    monkeypatch.setattr(wire, "is_as_expected", lambda: request.param)
    async with Store.open(redis_url, queue_name=Q, policy=policy, name="test") as store:
        assert isinstance(new_link(Endpoint.parse(redis_url).client("x")), Link) == request.param
        yield store


def test_redis_py_is_as_expected() -> None:
    assert wire.unexpected(Connection(), ConnectionPool) == []
    assert wire.is_as_expected()


def test_what_has_changed_in_redis_py_is_named() -> None:
    assert wire.unexpected(object(), object) == [
        *("_reader", "_writer", "connect", "disconnect", "make_connection")
    ]


async def test_a_connection_that_is_made_while_its_link_is_closed_is_closed_too(
    redis_url: str, server: redis.Redis
) -> None:
    client = Endpoint.parse(redis_url).client("late")
    link = Link(client)
    call = asyncio.ensure_future(link.ask(("PING",), 1))
    await asyncio.sleep(0)  # it has begun to connect

    await link.close()

    with pytest.raises(redis.ConnectionError):
        await call
    assert not [connection for connection in server.client_list() if connection["name"] == "late"]
    await close(client)


async def test_a_job_is_submitted_claimed_and_finished(
    either_store: Store, server: redis.Redis
) -> None:
    job = new_job()
    (reply,) = await Submissions(either_store).submit_many(Q, [job])
    assert (reply.verdict, reply.job_id) == ("ok", job.job_id)
    consumer = QueueConsumer(either_store, "worker")
    request = ClaimRequest((Q,), consumer.new_token(), is_holding=False, max_jobs=10)
    claim = (await consumer.claim(request)).claim
    assert claim is not None
    assert [(job.job_id, job.data) for job in claim.jobs] == [(job.job_id, job.data)]
    outcome = JobOutcome(job.job_id, "completed", b"[1]")
    verdicts, _ = await consumer.finish(claim, [outcome], last=True)
    assert verdicts == ["completed"]
    assert server.get(keys.result(job.job_id)) == b"[1]"


async def test_large_inputs_are_stored_as_they_are(
    either_store: Store, server: redis.Redis
) -> None:
    job = msgspec.structs.replace(new_job(), data=b"[%b]" % (b"1," * 100_000))
    await Submissions(either_store).submit_many(Q, [job])
    assert server.get(keys.data(job.job_id)) == job.data


async def test_tokens_and_entries_are_waited_for(either_store: Store, server: redis.Redis) -> None:
    connection = either_store.blocking_connection()
    assert await connection.pop(["a", "b"], 0.05) is None
    server.lpush("b", "1")
    assert await connection.pop(["a", "b"], 1) == "b"
    assert await connection.read({"s": b"0"}, 0.05) == []
    entry_id = server.xadd("s", {"field": "value", "other": ""})
    entries = [("s", entry_id, {b"field": b"value", b"other": b""})]
    assert await connection.read({"s": b"0", "t": b"0"}, 1) == entries
    server.delete("s")
    await connection.close()


async def test_keys_of_the_wrong_type_are_left_out(
    either_store: Store, server: redis.Redis
) -> None:
    connection = either_store.blocking_connection()
    server.set("text", "", ex=60)
    server.lpush("list", "1")
    assert await connection.pop(["text", "list"], 0.05) is None
    assert await connection.pop(["text", "list"], 0.05) == "list"
    await connection.close()


async def test_a_waiting_call_ends_when_its_connection_is_closed(
    either_store: Store, server: redis.Redis
) -> None:
    connection = either_store.blocking_connection()
    waiting = asyncio.ensure_future(connection.pop(["a"], 30))
    await eventually(lambda: server.info("clients")["blocked_clients"] == 1, "it waits")
    await connection.close()
    with pytest.raises(RedisUnavailable):
        await waiting


async def test_connections_that_the_server_closed_are_replaced(
    either_store: Store, server: redis.Redis
) -> None:
    for _ in range(3):
        assert await either_store.time_ms()
        server.client_kill_filter(_type="normal", skipme=True)


async def test_calls_at_once_get_their_own_replies(either_store: Store) -> None:
    async def ping(number: int) -> None:
        assert await either_store.command("ECHO", str(number)) == str(number).encode()

    async with asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(ping(number))


async def test_a_call_that_was_given_up_leaves_no_reply_for_another(either_store: Store) -> None:
    for number in range(20):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.0001 * number):
                await either_store.command("ECHO", "late")
        assert await either_store.command("ECHO", str(number)) == str(number).encode()
