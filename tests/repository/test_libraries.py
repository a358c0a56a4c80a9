"""The library of an older release is deleted once no process names it, and never before."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys
from asyncinfer.repository.libraries import UNUSED_ROUNDS, Libraries
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import library
from asyncinfer.repository.store import Store
from tests.faults.proxy import proxied
from tests.queue_driver import Q, QueueDriver
from tests.restricted_user import without_commands

OLD = "asyncinfer_0123456789abcdef"
FOREIGN = "analytics"


def text_of(name: str) -> str:
    return f"#!lua name={name}\nredis.register_function('{name}_f', function() return 1 end)"


@pytest.fixture
def loaded(server: redis.Redis) -> Iterator[Any]:
    """A server with the library of this release, one of an older release, and another program's."""
    client: Any = server
    client.function_flush("SYNC")
    for text in (library().text, text_of(OLD), text_of(FOREIGN)):
        client.function_load(text)
    yield client
    client.function_flush("SYNC")


@pytest.fixture
async def other(redis_url: str, server: redis.Redis) -> AsyncIterator[Libraries]:
    """The libraries as another process of this release sees them."""
    async with Store.open(redis_url, queue_name=Q, policy=Policy(), name="other") as store:
        yield Libraries(store)


def name_old(server: redis.Redis, text: str) -> None:
    """What a process of the older release does in each of its rounds."""
    server.hset(keys.libraries(Q), OLD, text)


def libraries_on(server: Any) -> set[str]:
    return {bytes(entry[1]).decode() for entry in server.function_list()}


async def test_a_library_that_no_process_names_any_more_is_deleted(
    loaded: Any, store: Store
) -> None:
    name_old(loaded, "1")
    libraries = Libraries(store)
    for _ in range(UNUSED_ROUNDS):
        assert await libraries.tidy() == []
    assert libraries_on(loaded) == {library().name, OLD, FOREIGN}
    assert await libraries.tidy() == [OLD]
    assert libraries_on(loaded) == {library().name, FOREIGN}
    assert loaded.hkeys(keys.libraries(Q)) == [library().name.encode()]


async def test_the_library_of_a_living_process_is_kept(loaded: Any, store: Store) -> None:
    libraries = Libraries(store)
    for number in range(5 * UNUSED_ROUNDS):
        # Its rounds are late by nearly all that it has.
        if number % UNUSED_ROUNDS == 0:
            name_old(loaded, str(number))
        assert await libraries.tidy() == []
    assert OLD in libraries_on(loaded)


async def test_an_outage_in_which_no_process_can_name_its_library_deletes_none(
    loaded: Any, redis_url: str
) -> None:
    name_old(loaded, "1")
    async with (
        proxied(redis_url) as proxy,
        Store.open(proxy.url, queue_name=Q, policy=Policy(), name="cut") as store,
    ):
        libraries = Libraries(store)
        assert await libraries.tidy() == []
        await proxy.down()
        for _ in range(2 * UNUSED_ROUNDS):
            with pytest.raises(RedisUnavailable):
                await libraries.tidy()
        await proxy.up()
        assert await libraries.tidy() == []
    assert OLD in libraries_on(loaded)


async def test_of_several_processes_one_deletes_a_library(
    loaded: Any, store: Store, other: Libraries
) -> None:
    name_old(loaded, "1")
    here = Libraries(store)
    for _ in range(UNUSED_ROUNDS):
        assert await here.tidy() == await other.tidy() == []
    assert [await here.tidy(), await other.tidy()] == [[OLD], []]


@pytest.mark.parametrize("name", [FOREIGN, "asyncinfer_", "asyncinfer_x*", "\xff"])
async def test_nothing_else_is_deleted_whatever_the_key_names(
    name: str, loaded: Any, store: Store
) -> None:
    loaded.hset(keys.libraries(Q), name.encode("latin-1"), "1")
    libraries = Libraries(store)
    for _ in range(2 * UNUSED_ROUNDS):
        assert await libraries.tidy() == []
    assert libraries_on(loaded) == {library().name, OLD, FOREIGN}


async def test_a_process_whose_library_was_deleted_loads_it_with_its_next_call(
    loaded: Any, hands: QueueDriver
) -> None:
    await hands.submit_one()
    loaded.function_delete(library().name)
    assert await hands.finish_for_verdicts(await hands.claim_jobs()) == ["completed"]
    assert library().name in libraries_on(loaded)


async def test_a_process_that_calls_once_names_its_library(loaded: Any, hands: QueueDriver) -> None:
    """Nobody else may know it: a command of another release, from another machine."""
    loaded.function_flush("SYNC")
    await hands.submit_one()
    assert loaded.hkeys(keys.libraries(Q)) == [library().name.encode()]


async def test_a_key_of_another_type_and_full_memory_keep_the_libraries(
    loaded: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    libraries = Libraries(store)
    loaded.set(keys.libraries(Q), "x")
    assert await libraries.tidy() == []
    assert "libraries of older releases stay" in caplog.text
    assert keys.libraries(Q) in caplog.text
    loaded.delete(keys.libraries(Q))
    loaded.config_set("maxmemory", "1mb")
    try:
        assert await libraries.tidy() == []
    finally:
        loaded.config_set("maxmemory", "0")


async def test_a_user_who_may_not_delete_functions_leaves_them_with_a_line_in_the_log(
    loaded: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    name_old(loaded, "1")
    with without_commands(loaded, redis_url, "function|delete") as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            libraries = Libraries(store)
            for _ in range(2 * UNUSED_ROUNDS):
                assert await libraries.tidy() == []
    (line,) = caplog.messages
    assert OLD in line
    assert OLD in libraries_on(loaded)


async def test_a_process_whose_functions_are_refused_names_no_library(
    loaded: Any, redis_url: str
) -> None:
    with without_commands(loaded, redis_url, "fcall") as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            await QueueDriver(store, loaded).submit_one()
            assert await Libraries(store).tidy() == []
    assert not loaded.exists(keys.libraries(Q))
