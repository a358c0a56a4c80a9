"""Fixtures: one who does by hand what the processes around Redis do."""

import pytest
import redis

from asyncinfer.repository.store import Store
from tests.queue_driver import QueueDriver


@pytest.fixture
def hands(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)
