"""The settings of a process reach its parts."""

from typing import Final

import pytest
import redis

from asyncinfer import settings
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.serve.leftovers import LeftoverCleaner
from asyncinfer.repository.policy import Policy

POLICY: Final = {
    "JOB_TTL": "61",
    "FAILED_TTL": "62",
    "KEEP_INPUT": "true",
    "MAX_QUEUE": "63",
    "MAX_QUEUE_BYTES": "6400",
    "LEASE_SECONDS": "6.5",
    "REAP_SECONDS": "0.66",
    "MAX_DELIVERIES": "67",
}


def test_each_setting_of_jobs_is_a_rule_of_the_store() -> None:
    assert configuration.policy(settings.read(POLICY, {})) == Policy(
        job_ttl_seconds=61,
        failed_ttl_seconds=62,
        keep_input=True,
        max_queue=63,
        max_queue_bytes=6400,
        lease_seconds=6.5,
        reap_seconds=0.66,
        max_deliveries=67,
    )


async def test_the_parent_of_several_api_processes_leaves_it_to_them_to_log_that_redis_is_full(
    server: redis.Redis, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.config_set("maxmemory", 1)
    found = settings.read({"REDIS_URL": redis_url, "API_PROCESSES": "2"}, {})
    await LeftoverCleaner(found).before_worker(redis_url)
    assert [record.message for record in caplog.records if record.name == "asyncinfer.redis"] == []
