"""A job whose worker is lost: its next delivery is in the same trace."""

from pathlib import Path

import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import AsyncClient
from asyncinfer.repository.policy import Policy
from tests.api.harness import running
from tests.telemetry.harness import Spans, attributes_of, context_of, parent_id, running_worker

from .harness import eventually
from .processes import OpenWorkers


async def test_the_next_delivery_of_a_lost_workers_job_is_in_its_trace_with_its_number(
    open_workers: OpenWorkers,
    policy: Policy,
    redis_url: str,
    zoo_models: Path,
    server: redis.Redis,
) -> None:
    spans = Spans()
    config = ApiConfig(redis_url=redis_url, policy=policy, tracing=spans.tracing())
    with open_workers(policy=policy) as workers:
        doomed = workers.start(die_at="running")
        await eventually(lambda: doomed.is_announced(server), "the worker has its model")
        async with running(config) as port, AsyncClient(f"http://127.0.0.1:{port}") as client:
            with spans.caller() as caller:
                job = await client.submit([[1.0]], "slow")
            await eventually(doomed.has_ended, "the worker dies")
            async with running_worker(redis_url, policy, zoo_models, spans.tracing(), ("slow",)):
                await job.result()
                await spans.wait_for("finish", 1)

    (submit,) = spans.named("POST")
    assert parent_id(submit) == context_of(caller).span_id
    for word in ("queued", "run", "finish"):
        (span,) = spans.named(word)
        assert parent_id(span) == context_of(submit).span_id
        assert attributes_of(span)["asyncinfer.job.delivery"] == 2
