"""Models whose results are large: a worker holds few results at a time, however many jobs wait."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnx
import pytest
import redis

from asyncinfer.jobs import SCHEMA, Record, new_id
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob, Submissions
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, claim_sizes, transitions
from tests.faults.model_folder import ModelClient
from tests.peak_memory import needs_proc, peak_bytes
from tests.zoo.model_builder import Dims, model, node, tensor

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers, Workers

QUEUE: Final = "predict_queue"
COPIES: Final = 1200
NUMBERS: Final = 500
"""With a job of so many numbers the result has 600,000: 2.4 MB of float32, and 12 MB of JSON."""

LIMIT_BYTES: Final = 160 << 20
"""What the runs may add to an idle worker: 24 results of 12 MB are 288 MB."""


def wide(columns: Dims) -> onnx.ModelProto:
    """Repeats each row; the columns of input and output are declared as given."""
    return model(
        [node("Tile", ["x", "repeats"], ["y"])],
        [tensor("x", ["batch", columns[0]])],
        [tensor("y", ["batch", columns[1]])],
        {"repeats": np.array([1, COPIES])},
    )


def wide_by_value() -> onnx.ModelProto:
    """Repeats a number as often as it says: neither shapes nor sizes of inputs tell how much."""
    return model(
        [
            node("ReduceMax", ["x"], ["most"], keepdims=0),
            node("Cast", ["most"], ["count"], to=onnx.TensorProto.INT64),
            node("Unsqueeze", ["count", "zero"], ["counts"]),
            node("Concat", ["one", "counts"], ["repeats"], axis=0),
            node("Tile", ["x", "repeats"], ["y"]),
        ],
        [tensor("x", ["batch", 1])],
        [tensor("y", ["batch", "m"])],
        {"zero": np.array([0]), "one": np.array([1])},
    )


def new_jobs(count: int, numbers: int) -> list[NewJob]:
    data = msgspec.json.encode([[0.1] * numbers])
    record = Record(SCHEMA, QUEUE, "wide", "default", 1)
    return [NewJob(new_id(1), QUEUE, data, record) for _ in range(count)]


@needs_proc
@pytest.mark.parametrize(
    ("columns", "first_numbers"),
    [
        pytest.param([NUMBERS, NUMBERS * COPIES], NUMBERS, id="declared"),
        pytest.param(["n", "m"], NUMBERS, id="open", marks=pytest.mark.soak),
        pytest.param(["n", "m"], 1, id="open, and small at first", marks=pytest.mark.soak),
    ],
)
async def test_many_jobs_with_large_results_are_not_held_at_once(
    columns: Dims,
    first_numbers: int,
    open_workers: OpenWorkers,
    tmp_path: Path,
    server: redis.Redis,
    store: Store,
) -> None:
    zoo.place(tmp_path / "m", "wide", wide(columns))
    jobs = [*new_jobs(1, first_numbers), *new_jobs(24, NUMBERS)]
    with open_workers(
        model_dir=str(tmp_path / "m"), models=("wide",), worker=WorkerConfig(concurrency=1)
    ) as workers:
        added_bytes = await _bytes_added_by(jobs, workers, server, store)
    assert min(server.strlen(f"job:{job.job_id}:result") for job in jobs[1:]) > 10 << 20
    assert added_bytes < LIMIT_BYTES, f"{added_bytes >> 20} MiB"
    logged = transitions(server, QUEUE)
    assert {logged[job.job_id]["processing"] for job in jobs} == {1}
    assert_at_rest(server, QUEUE)


async def _bytes_added_by(
    jobs: Sequence[NewJob], workers: Workers, server: redis.Redis, store: Store
) -> int:
    """How much more memory than idle a worker has at its peak, if it finds all the jobs waiting."""
    worker = workers.start()
    await eventually(lambda: worker.is_announced(server), "the worker is ready")
    idle_bytes = peak_bytes(worker.process.pid)
    worker.signal(signal.SIGSTOP)
    await Submissions(store).submit_many(QUEUE, jobs)
    worker.signal(signal.SIGCONT)
    await _wait_until_completed(server, jobs)
    added_bytes = peak_bytes(worker.process.pid) - idle_bytes
    assert await worker.stop() == 0
    return added_bytes


async def _wait_until_completed(server: redis.Redis, jobs: Sequence[NewJob]) -> None:
    names = [f"job:{job.job_id}:status" for job in jobs]
    done = [b"completed"] * len(names)
    await eventually(lambda: server.mget(names) == done, "all are completed", 120)


@pytest.mark.soak
@needs_proc
async def test_a_run_that_gives_more_than_was_expected_is_stored_in_parts(
    open_workers: OpenWorkers, tmp_path: Path, server: redis.Redis, store: Store
) -> None:
    zoo.place(tmp_path / "m", "wide", wide_by_value(), toml="[batching]\nenabled = true\n")
    record = Record(SCHEMA, QUEUE, "wide", "default", 1)
    values = [1.0] + 24 * [1_200_000.0]
    jobs = [NewJob(new_id(1), QUEUE, msgspec.json.encode([[value]]), record) for value in values]
    with open_workers(
        model_dir=str(tmp_path / "m"), models=("wide",), worker=WorkerConfig(concurrency=1)
    ) as workers:
        added_bytes = await _bytes_added_by(jobs, workers, server, store)
    assert min(server.strlen(f"job:{job.job_id}:result") for job in jobs[1:]) > 10 << 20
    # The outputs of that run have 115 MB, and all results together 290 MB.
    assert added_bytes < 240 << 20, f"{added_bytes >> 20} MiB"
    assert_at_rest(server, QUEUE)


@pytest.mark.soak
async def test_later_claims_of_large_results_are_small_so_that_other_slots_get_the_rest(
    open_workers: OpenWorkers, tmp_path: Path, server: redis.Redis, store: Store
) -> None:
    zoo.place(tmp_path / "m", "wide", wide([NUMBERS, NUMBERS * COPIES]))
    submissions = Submissions(store)
    with open_workers(
        model_dir=str(tmp_path / "m"), models=("wide",), worker=WorkerConfig(concurrency=1)
    ) as workers:
        worker = workers.start()
        for jobs in (new_jobs(1, NUMBERS), new_jobs(5, NUMBERS)):
            await submissions.submit_many(QUEUE, jobs)
            await _wait_until_completed(server, jobs)
        assert await worker.stop() == 0
    assert claim_sizes(server, QUEUE) == [1] * 6


@pytest.mark.soak
async def test_jobs_with_large_results_that_filled_a_batch_do_not_wait_for_others_again(
    open_workers: OpenWorkers, tmp_path: Path, server: redis.Redis, store: Store
) -> None:
    toml = "[batching]\nmax_wait_ms = 60000\nmax_jobs = 3\n"
    zoo.place(tmp_path / "m", "wide", wide([NUMBERS, NUMBERS * COPIES]), toml=toml)
    submissions = Submissions(store)
    with open_workers(
        model_dir=str(tmp_path / "m"), models=("wide",), worker=WorkerConfig(concurrency=1)
    ) as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "the worker is ready")
        for jobs in (new_jobs(3, NUMBERS), new_jobs(3, NUMBERS)):
            await submissions.submit_many(QUEUE, jobs)
            await _wait_until_completed(server, jobs)
        assert await worker.stop() == 0
    assert claim_sizes(server, QUEUE) == [3, 1, 1, 1]


@pytest.mark.soak
async def test_the_first_jobs_of_a_usual_model_share_one_run(
    open_workers: OpenWorkers,
    tmp_path: Path,
    store: Store,
    model_client: ModelClient,
) -> None:
    zoo.place(tmp_path / "m", "slow", zoo.mlp([1, 1000]))
    load_client = LoadClient(store)
    await load_client.submit([1.0] * 128)
    with open_workers(
        model_dir=str(tmp_path / "m"), models=("slow",), worker=WorkerConfig(concurrency=1)
    ) as workers:
        worker = workers.start()
        await load_client.wait_until_all_ended()

        async def are_announced() -> bool:
            return any(says.run_times for says in await model_client.announcements())

        await eventually(are_announced, "the times of its runs are announced")
        (says,) = await model_client.announcements()
        assert list(says.run_times["slow"]) == ["128"]
        assert await worker.stop() == 0
