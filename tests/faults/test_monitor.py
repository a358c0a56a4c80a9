"""Health and metrics on a worker's private port, from its start to its end."""

import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from asyncinfer.repository import keys
from asyncinfer.repository.inspect.queue_load import read_load
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient
from tests.ports import free_port

from .harness import assert_at_rest, eventually
from .processes import DurableServer, OpenWorkers


class Probe:
    """Probes a worker's health as a kubelet does, and reads its metrics as Prometheus does."""

    def __init__(self) -> None:
        self.port = free_port()

    async def status(self, path: str) -> int:
        """The HTTP status of a health route; 0 while no process listens."""
        return (await self._get(path))[0]

    async def detail(self) -> str:
        """The reason why the worker is not ready; empty if it is."""
        return (await self._get("ready"))[1]

    async def _get(self, path: str) -> tuple[int, str]:
        async with httpx2.AsyncClient(trust_env=False) as client:
            try:
                reply = await client.get(f"http://127.0.0.1:{self.port}/health/{path}")
            except httpx2.TransportError:
                return 0, ""
        return reply.status_code, reply.json().get("detail", "")

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """The metrics as Prometheus parses them: the value by name and labels."""
        async with httpx2.AsyncClient(trust_env=False) as client:
            reply = await client.get(f"http://127.0.0.1:{self.port}/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        }

    async def wait_until_not_ready(self, reason: str, seconds: float = 10.0) -> None:
        async def is_not_ready() -> bool:
            return reason in await self.detail()

        await eventually(is_not_ready, f"it is not ready, because of {reason!r}", seconds)

    async def wait_until_ready(self, seconds: float = 10.0) -> None:
        async def is_ready() -> bool:
            return await self.status("ready") == 200

        await eventually(is_ready, "it is ready", seconds)


@pytest.mark.soak
async def test_a_worker_is_ready_while_it_claims_and_not_while_it_drains(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    probe = Probe()
    with open_workers(worker=WorkerConfig(concurrency=1), monitor_port=probe.port) as workers:
        worker = workers.start()
        await probe.wait_until_ready()
        await load_client.submit([300.0])
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        worker.signal(signal.SIGTERM)
        await probe.wait_until_not_ready("drains")
        assert await probe.status("live") == 200
        assert await worker.wait_for_exit() == 0
        await load_client.assert_all_completed()
    assert_at_rest(server, load_client.queue)


async def test_prometheus_reads_the_models_of_a_worker_and_its_finished_jobs(
    open_workers: OpenWorkers, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    zoo.place(folder, "slow", zoo.slow(), toml="[batching]\nenabled = true\n")
    unbatched = "[batching]\nenabled = false\n"
    zoo.place(folder, "picky", zoo.picky(), version=7, toml=unbatched)
    zoo.place(folder, "broken", zoo.slow()).write_bytes(b"no model")
    probe = Probe()
    config = WorkerConfig(concurrency=1)
    options = {"model_dir": str(folder), "models": (), "default_model": "slow"}
    with open_workers(**options, worker=config, monitor_port=probe.port) as workers:  # type: ignore[arg-type]
        slow, picky = LoadClient(store, "slow"), LoadClient(store, "picky")
        await slow.submit([1.0] * 5)
        await picky.submit([9.0])
        worker = workers.start()
        await slow.assert_all_completed()
        await picky.wait_until_all_ended()
        metrics: dict[tuple[str, ...], float] = {}

        async def failed_job_is_counted() -> bool:
            metrics.update(await probe.metrics())
            return metrics.get(("asyncinfer_jobs_total", "model_failed", "picky", "failed")) == 1

        await eventually(failed_job_is_counted, "the failed job is counted", 5)
        assert await worker.stop() == 0
    assert metrics["asyncinfer_model_batched", "slow", "1"] == 1
    assert metrics["asyncinfer_model_batched", "picky", "7"] == 0
    (batching,) = (
        key[1] for key in metrics if key[0] == "asyncinfer_model_info" and key[2] == "picky"
    )
    assert batching.startswith("off: model.toml says so; ")
    assert metrics["asyncinfer_model_refused", "broken", "1"] == 1
    assert metrics[("asyncinfer_models_loaded",)] == 2
    assert metrics[("asyncinfer_models_loaded_bytes",)] > 0
    assert metrics["asyncinfer_model_loads_total", "slow", "loaded"] == 1
    assert metrics["asyncinfer_model_loads_total", "broken", "refused"] == 1
    loading = metrics["asyncinfer_model_load_seconds_sum", "slow"]
    assert 0 < metrics["asyncinfer_model_probe_seconds_sum", "slow"] < loading
    assert metrics["asyncinfer_run_seconds_count", "slow"] == 1
    assert 0.001 < metrics["asyncinfer_run_seconds_sum", "slow"] < 1
    assert metrics["asyncinfer_run_rows_sum", "slow"] == 5
    assert metrics["asyncinfer_run_rows_bucket", "4", "slow"] == 0
    assert metrics["asyncinfer_run_rows_bucket", "8", "slow"] == 1
    assert metrics["asyncinfer_job_wait_seconds_count", "slow"] == 5
    # They were submitted before the worker was started.
    assert metrics["asyncinfer_job_wait_seconds_sum", "slow"] > 5 * loading
    assert metrics["asyncinfer_jobs_total", "", "slow", "completed"] == 5
    assert metrics[("process_resident_memory_bytes",)] > 0
    assert_at_rest(server, slow.queue, picky.queue)


@pytest.mark.soak
async def test_a_worker_without_its_redis_is_live_and_not_ready(open_workers: OpenWorkers) -> None:
    probe = Probe()
    with open_workers(redis_url="unix:///nowhere/there.sock", monitor_port=probe.port) as workers:
        worker = workers.start()
        await probe.wait_until_not_ready("has not reached its Redis")
        assert await probe.status("live") == 200
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_the_measured_pace_is_still_known_after_its_worker_has_stopped(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=1, max_batch=1)) as workers:
        ids = await load_client.submit([40.0] * 5)
        worker = workers.start()
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    stored = await load_client.read(ids)
    run_times_ms = [
        job.record.finished_ms - job.record.started_ms
        for job in stored
        if job and job.record and job.record.finished_ms and job.record.started_ms
    ]
    assert len(run_times_ms) == 5
    measured = (await read_load(store, "slow", load_client.queue)).seconds_per_job
    assert measured == pytest.approx(sum(run_times_ms) / 5000, rel=0.2)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_that_lost_its_redis_is_not_ready_until_it_is_back(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    probe = Probe()
    with open_workers(redis_url=durable.url, monitor_port=probe.port) as workers:
        worker = workers.start()
        await probe.wait_until_ready()
        durable.kill()
        await probe.wait_until_not_ready("Redis has not answered", 30)
        assert await probe.status("live") == 200
        durable.start()
        await probe.wait_until_ready(20)
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_worker_whose_redis_answers_but_refuses_says_what_it_refuses(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    """A Redis that is looked for, though it answers, costs whoever was called the most time."""
    probe = Probe()
    server: Any = redis.Redis.from_url(durable.url)
    with open_workers(redis_url=durable.url, monitor_port=probe.port) as workers:
        worker = workers.start()
        await probe.wait_until_ready()
        server.replicaof("127.0.0.1", free_port())
        await probe.wait_until_not_ready("since it is a replica", 30)
        server.replicaof("NO", "ONE")
        await probe.wait_until_ready(20)
        assert await worker.stop() == 0
    server.close()


@pytest.mark.soak
async def test_a_worker_with_a_hung_slot_is_not_ready_while_its_other_slots_finish(
    open_workers: OpenWorkers, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    limits = "[limits]\ntimeout_seconds = 0.3\n"
    zoo.place(tmp_path / "m", "huge", zoo.huge_matmul(), toml=limits)
    zoo.place(tmp_path / "m", "slow", zoo.slow())
    probe = Probe()
    config = WorkerConfig(concurrency=2, hang_grace_seconds=0.2, prediction_timeout_seconds=60)
    options = {"model_dir": str(tmp_path / "m"), "models": (), "default_model": "slow"}
    with open_workers(**options, worker=config, monitor_port=probe.port) as workers:  # type: ignore[arg-type]
        slow, huge = LoadClient(store, "slow"), LoadClient(store, "huge")
        worker = workers.start()
        await probe.wait_until_ready(30)
        await slow.submit([2000.0])
        await eventually(lambda: server.hlen(keys.running(slow.queue)) == 1, "it runs")
        await huge.submit([zoo.TOO_BIG])
        await probe.wait_until_not_ready("would not stop")
        assert await worker.wait_for_exit(60) == EXIT_HUNG
        await slow.assert_all_completed()
