"""The settings of a process reach its parts."""

from typing import Final

from asyncinfer import settings
from asyncinfer.cli.serve import configuration
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
