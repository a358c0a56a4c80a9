"""Fixtures of the tests of webhooks: a queue, and a receiver."""

from collections.abc import Iterator

import pytest
import redis

from asyncinfer.repository.store import Store
from tests.certificates import Authority
from tests.queue_driver import QueueDriver
from tests.tracebacks import no_traceback as no_traceback
from tests.webhooks.receiver import Receiver, receiver


@pytest.fixture
def hands(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The authority, which OpenSSL takes for the only one of the system."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    return authority


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as server:
        yield server
