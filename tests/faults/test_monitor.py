"""What a worker says of itself on its private port, from its start to its end."""

import signal
from pathlib import Path

import httpx2
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from asyncinfer.repository import keys
from asyncinfer.repository.inspect.queue_load import load
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer
from tests.serving import free_port

from .harness import assert_at_rest, eventually
from .processes import DurableServer, OpenCrew
from .test_time_outs import TOO_BIG


class Probe:
    """What a kubelet does."""

    def __init__(self) -> None:
        self.port = free_port()

    async def status(self, path: str) -> int:
        """0 while nothing listens."""
        return (await self._ask(path))[0]

    async def detail(self) -> str:
        """Why it is not ready; empty when it is."""
        return (await self._ask("ready"))[1]

    async def _ask(self, path: str) -> tuple[int, str]:
        async with httpx2.AsyncClient(trust_env=False) as client:
            try:
                reply = await client.get(f"http://127.0.0.1:{self.port}/health/{path}")
            except httpx2.TransportError:
                return 0, ""
        return reply.status_code, reply.json().get("detail", "")

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """What Prometheus makes of it: the value by name and labels."""
        async with httpx2.AsyncClient(trust_env=False) as client:
            reply = await client.get(f"http://127.0.0.1:{self.port}/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        }

    async def finds(self, word: str, seconds: float = 10.0) -> None:
        async def found() -> bool:
            return word in await self.detail()

        await eventually(found, f"it is not ready, because of {word!r}", seconds)

    async def finds_it_ready(self, seconds: float = 10.0) -> None:
        async def found() -> bool:
            return await self.status("ready") == 200

        await eventually(found, "it is ready", seconds)


async def test_a_worker_is_ready_while_it_claims_and_not_while_it_drains(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    probe = Probe()
    with crew(worker=WorkerConfig(concurrency=1), monitor_port=probe.port) as workers:
        worker = workers.hire()
        await probe.finds_it_ready()
        await customer.submit([300.0])
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 1, "it runs")
        worker.signal(signal.SIGTERM)
        await probe.finds("drains")
        assert await probe.status("live") == 200
        assert await worker.left() == 0
        await customer.all_completed()
    assert_at_rest(server, customer.queue)


async def test_prometheus_reads_what_a_worker_serves_and_did(
    crew: OpenCrew, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    zoo.place(folder, "slow", zoo.slow(), toml="[batching]\nenabled = true\n")
    alone = "[batching]\nenabled = false\n"
    zoo.place(folder, "picky", zoo.picky(), version=7, toml=alone)
    zoo.place(folder, "broken", zoo.slow()).write_bytes(b"no model")
    probe = Probe()
    config = WorkerConfig(concurrency=1)
    terms = {"model_dir": str(folder), "models": (), "default_model": "slow"}
    with crew(**terms, worker=config, monitor_port=probe.port) as workers:  # type: ignore[arg-type]
        slow, picky = Customer(store, "slow"), Customer(store, "picky")
        await slow.submit([1.0] * 5)
        await picky.submit([9.0])
        worker = workers.hire()
        await slow.all_completed()
        await picky.all_ended()
        read: dict[tuple[str, ...], float] = {}

        async def counted() -> bool:
            read.update(await probe.metrics())
            return read["asyncinfer_jobs_total", "failed"] == 1

        await eventually(counted, "all is counted", 5)
        assert await worker.stop() == 0
    assert read["asyncinfer_model_batched", "slow", "1"] == 1
    assert read["asyncinfer_model_batched", "picky", "7"] == 0
    (why,) = (one[1] for one in read if one[0] == "asyncinfer_model_info" and one[2] == "picky")
    assert why.startswith("off: model.toml says so; ")
    assert read["asyncinfer_model_refused", "broken", "1"] == 1
    assert read[("asyncinfer_models_loaded",)] == 2
    assert read["asyncinfer_run_seconds_count", "slow", "8"] == 1
    assert 0.001 < read["asyncinfer_run_seconds_sum", "slow", "8"] < 1
    assert read["asyncinfer_jobs_total", "completed"] == 5
    assert read[("process_resident_memory_bytes",)] > 0
    assert_at_rest(server, slow.queue, picky.queue)


@pytest.mark.soak
async def test_a_worker_without_its_redis_lives_and_is_not_ready(crew: OpenCrew) -> None:
    probe = Probe()
    with crew(redis_url="unix:///nowhere/there.sock", monitor_port=probe.port) as workers:
        worker = workers.hire()
        await probe.finds("has not reached its Redis")
        assert await probe.status("live") == 200
        assert await worker.stop() == 0


async def test_the_pace_that_a_worker_measured_outlives_it(
    crew: OpenCrew, customer: Customer, server: redis.Redis, store: Store
) -> None:
    with crew(worker=WorkerConfig(concurrency=1, max_batch=1)) as workers:
        ids = await customer.submit([40.0] * 5)
        worker = workers.hire()
        await customer.all_completed()
        assert await worker.stop() == 0
    stored = await customer.read(ids)
    took_ms = [
        one.record.finished_ms - one.record.started_ms
        for one in stored
        if one and one.record and one.record.finished_ms and one.record.started_ms
    ]
    assert len(took_ms) == 5
    measured = (await load(store, "slow", customer.queue)).seconds_per_job
    assert measured == pytest.approx(sum(took_ms) / 5000, rel=0.2)
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_worker_that_lost_its_redis_is_not_ready_until_it_is_back(
    crew: OpenCrew, durable: DurableServer
) -> None:
    probe = Probe()
    with crew(redis_url=durable.url, monitor_port=probe.port) as workers:
        worker = workers.hire()
        await probe.finds_it_ready()
        durable.kill()
        await probe.finds("Redis has not answered", 30)
        assert await probe.status("live") == 200
        durable.start()
        await probe.finds_it_ready(20)
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_worker_with_a_wedged_slot_is_not_ready_while_others_finish(
    crew: OpenCrew, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    limits = "[limits]\ntimeout_seconds = 0.3\n"
    zoo.place(tmp_path / "m", "huge", zoo.huge_matmul(), toml=limits)
    zoo.place(tmp_path / "m", "slow", zoo.slow())
    probe = Probe()
    config = WorkerConfig(concurrency=2, hang_grace_seconds=0.2, prediction_timeout_seconds=60)
    terms = {"model_dir": str(tmp_path / "m"), "models": (), "default_model": "slow"}
    with crew(**terms, worker=config, monitor_port=probe.port) as workers:  # type: ignore[arg-type]
        customers = [Customer(store, "slow"), Customer(store, "huge")]
        worker = workers.hire()
        await probe.finds_it_ready(30)
        await customers[0].submit([2000.0])
        await customers[1].submit([TOO_BIG])
        await probe.finds("would not stop")
        assert await worker.left(60) == EXIT_HUNG
        await customers[0].all_completed()
