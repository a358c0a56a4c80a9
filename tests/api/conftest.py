"""Fixtures: a real API on a real socket with announced models, and a worker run by hand."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api_keys import entry_of
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.faults.proxy import proxied
from tests.queue_driver import QueueDriver
from tests.tracebacks import no_traceback as no_traceback

from .harness import KEYS, ManualWorker, ProxiedApi, announce, client_of, hosted, running

_BOTH_WAYS = ("test_http_shapes", "test_express")
"""Modules whose tests run with and without the short way in the default suite; those of the others
run without it in the soak."""

_WITHOUT_SOAK = "not soak and not by_hand"
"""The selection of the default suite."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test of an API with the short way of a submit, and with the ordinary one alone."""
    if "has_short_way" in metafunc.fixturenames:
        is_sampled = metafunc.module.__name__.rpartition(".")[2] in _BOTH_WAYS
        ordinary = pytest.param(False, id="ordinary", marks=() if is_sampled else pytest.mark.soak)
        ways = [pytest.param(True, id="express")]
        # A thousand tests that are only made to be left out take each process a second.
        if is_sampled or metafunc.config.option.markexpr != _WITHOUT_SOAK:
            ways.append(ordinary)
        metafunc.parametrize("has_short_way", ways, scope="session")


@pytest.fixture
def config(redis_url: str, policy: Policy, has_short_way: bool) -> ApiConfig:
    return ApiConfig(redis_url=redis_url, policy=policy, express=has_short_way)


@pytest.fixture
async def api(config: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API that serves iris (the default) and digits."""
    await announce(store, "iris", "digits", default="iris")
    async with hosted(running(config)) as port, client_of(port) as client:
        yield client


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A file of `KEYS`."""
    path = tmp_path / "keys"
    path.write_text("\n".join(entry_of(*words).line() for words in KEYS))
    return path


@pytest.fixture
async def two_tenant_port(config: ApiConfig, store: Store, key_file: Path) -> AsyncIterator[int]:
    """The port of an API with the tenants of `KEYS`."""
    await announce(store, "iris", default="iris")
    async with hosted(running(msgspec.structs.replace(config, api_keys=key_file))) as port:
        yield port


@pytest.fixture
def hands(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)


@pytest.fixture
def manual_worker(store: Store) -> ManualWorker:
    return ManualWorker(store)


@pytest.fixture
async def proxied_api(config: ApiConfig, store: Store) -> AsyncIterator[ProxiedApi]:
    """An API that serves iris and reaches Redis through a proxy that can cut the connection."""
    await announce(store, "iris", default="iris")
    async with hosted(proxied(config.redis_url)) as proxy:
        away = msgspec.structs.replace(config, redis_url=proxy.url)
        async with hosted(running(away)) as port:
            yield ProxiedApi(port, proxy)
            proxy.restore()


async def _client_with_key(port: int, key: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(port, **{"x-api-key": key}) as client:
        yield client


@pytest.fixture
async def alice(two_tenant_port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async for client in _client_with_key(two_tenant_port, "alice"):
        yield client


@pytest.fixture
async def bob(two_tenant_port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async for client in _client_with_key(two_tenant_port, "bob"):
        yield client


@pytest.fixture
async def ops(two_tenant_port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async for client in _client_with_key(two_tenant_port, "ops"):
        yield client
