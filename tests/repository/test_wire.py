"""Commands reach Redis past redis-py's client, or through it where its parts have changed."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool

from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys, wire
from asyncinfer.repository.claims import ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.endpoint import Endpoint, close
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.queue_driver import Q, new_job


@pytest.fixture(params=[True, False], ids=["directly", "through redis-py's client"])
async def either_store(
    request: pytest.FixtureRequest, redis_url: str, server: redis.Redis, policy: Policy
) -> AsyncIterator[Store]:
    endpoint = msgspec.structs.replace(Endpoint.parse(redis_url), is_direct=request.param)
    store = Store(endpoint, Q, policy, name="test", call_seconds=1.0)
    assert isinstance(store.redis.connection_pool, wire.Pool) == request.param
    yield store
    await close(store.redis)


def test_redis_py_is_as_expected() -> None:
    assert list(wire.unexpected(AbstractConnection, ConnectionPool)) == []


def test_our_pool_uses_no_name_of_redis_pys() -> None:
    ours = vars(wire.Pool()).keys() - vars(ConnectionPool()).keys()
    assert ours == {"_ready", "_lent", "_is_closed"}
    assert not ours & set(dir(ConnectionPool))


async def test_a_connection_that_is_made_while_its_pool_is_closed_is_closed_too(
    redis_url: str, server: redis.Redis
) -> None:
    client = Endpoint.parse(redis_url).client("late", reply_seconds=None)
    call = asyncio.ensure_future(wire.exchange(client, ("PING",)))
    await asyncio.sleep(0)  # it has begun to connect

    await close(client)

    with pytest.raises(redis.ConnectionError):
        await call
    assert not [connection for connection in server.client_list() if connection["name"] == "late"]


def test_what_has_changed_in_redis_py_is_named() -> None:
    class ChangedConnection:
        is_connected = True

        async def connect(self) -> None: ...
        async def disconnect(self) -> None: ...
        def pack_command(self, *args: Any) -> None: ...
        async def send_packed_command(self, command: bytes) -> None: ...

    found = [text.partition(" has ")[2] for text in wire.unexpected(ChangedConnection, object)]
    assert found == [
        "no ChangedConnection.send_packed_command(b'', False).",
        "no ChangedConnection.read_response().",
        "no object.make_connection().",
        "no object.get_connection().",
        "no object.release(None).",
        "no object.disconnect(False).",
        "no ChangedConnection.can_read().",
    ]


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


async def test_a_waiting_call_ends_when_its_connection_is_closed(either_store: Store) -> None:
    connection = either_store.blocking_connection()
    waiting = asyncio.ensure_future(connection.pop(["a"], 30))
    await asyncio.sleep(0.1)
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


def test_the_public_way_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    wire.log_unexpected(["redis-py 99 has no Connection.read_response()."])
    wire.log_unexpected([])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "redis-py 99 has no Connection.read_response()." in record.getMessage()
