"""A client that submits values to a model and checks that each job returns its own value."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import redis

from asyncinfer.errors import RequestError
from asyncinfer.jobs import SCHEMA, TERMINAL, Options, Record, new_id
from asyncinfer.repository import keys
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.repository.submissions import NewJob, Submissions

from .harness import eventually

_ids = msgspec.msgpack.Decoder(list[str])


class _Tensor(msgspec.Struct):
    data: list[float]


class _Result(msgspec.Struct):
    outputs: list[_Tensor]


class LoadClient:
    """Submits to a model whose result is its input; records the value of each acknowledged job."""

    def __init__(self, store: Store, model: str = "slow", default_model: str = "slow") -> None:
        self.submissions = Submissions(store)
        self.operations = Operations(store)
        self.model = model
        self.queue = keys.queue(store.queue_name, model, default_model)
        self.acknowledged: dict[str, float] = {}

    def new_job(
        self, value: float, options: Options | None = None, inbox: str = "", rows: int = 1
    ) -> NewJob:
        now_ms = time.time_ns() // 1_000_000
        record = Record(
            SCHEMA, self.queue, self.model, "default", now_ms, options=options or Options()
        )
        data = msgspec.json.encode([[value]] * rows)
        return NewJob(new_id(now_ms), self.queue, data, record, inbox=inbox)

    async def submit(
        self, values: Iterable[float], options: Options | None = None, rows: int = 1
    ) -> list[str]:
        """Submits a job per value; returns the ids. Raises RequestError as `submit_many` does."""
        jobs = [(self.new_job(value, options, rows=rows), value) for value in values]
        for start in range(0, len(jobs), 256):
            part = jobs[start : start + 256]
            verdicts = await self.submissions.submit_many(self.queue, [job for job, _ in part])
            for (job, value), submitted in zip(part, verdicts, strict=True):
                assert submitted.verdict in ("ok", "exists"), submitted
                self.acknowledged[job.job_id] = value
        return [job.job_id for job, _ in jobs]

    async def try_submit(self, values: Iterable[float]) -> bool:
        """Submits; returns False, and records no job, if Redis did not acknowledge."""
        try:
            await self.submit(values)
        except RequestError:
            return False
        return True

    async def read(self, job_ids: Sequence[str] | None = None) -> list[StoredJob | None]:
        wanted = list(self.acknowledged) if job_ids is None else list(job_ids)
        stored: list[StoredJob | None] = []
        for start in range(0, len(wanted), 500):
            stored += await self.submissions.read_many(wanted[start : start + 500])
        return stored

    async def wait_until_all_ended(self, seconds: float = 30.0) -> list[StoredJob]:
        """Waits until every acknowledged job has ended; returns the jobs."""
        ended: list[StoredJob] = []

        async def done() -> bool:
            ended[:] = [
                stored for stored in await self.read() if stored and stored.status in TERMINAL
            ]
            return len(ended) == len(self.acknowledged)

        await eventually(done, "every acknowledged job has ended", seconds)
        return ended

    async def assert_all_completed(self, seconds: float = 30.0) -> None:
        """Asserts that every acknowledged job completes within `seconds`, with its own value."""
        for stored in await self.wait_until_all_ended(seconds):
            assert stored.status == "completed", (stored.job_id, stored.status, stored.error)
            assert result_value(stored) == self.acknowledged[stored.job_id]


def result_value(stored: StoredJob) -> float:
    """The only number in a completed job's result."""
    assert stored.result is not None
    return msgspec.json.decode(stored.result, type=_Result).outputs[0].data[0]


def transitions(client: redis.Redis, queue: str) -> dict[str, Counter[str]]:
    """How often each job entered each status, from the queue's log."""
    counts: dict[str, Counter[str]] = {}
    entries: list[tuple[bytes, dict[bytes, bytes]]] = client.xrange(keys.log(queue))  # type: ignore[assignment]
    for _, fields in entries:
        for status, packed in fields.items():
            for job_id in _ids.decode(packed):
                counts.setdefault(job_id, Counter())[status.decode()] += 1
    return counts


def claim_sizes(client: redis.Redis, queue: str) -> list[int]:
    """The number of jobs of each claim, from the queue's log."""
    entries: list[tuple[bytes, dict[bytes, bytes]]] = client.xrange(keys.log(queue))  # type: ignore[assignment]
    return [
        len(_ids.decode(fields[b"processing"])) for _, fields in entries if b"processing" in fields
    ]


def completed_in_order(client: redis.Redis, queue: str) -> list[str]:
    """Ids of the queue's completed jobs in order of completion, from its log."""
    entries: list[tuple[bytes, dict[bytes, bytes]]] = client.xrange(keys.log(queue))  # type: ignore[assignment]
    completed = (fields[b"completed"] for _, fields in entries if b"completed" in fields)
    return [job_id for packed in completed for job_id in _ids.decode(packed)]


def assert_one_end_each(client: redis.Redis, queue: str) -> None:
    """Asserts that no job in the queue's log ended twice."""
    for job_id, counts in transitions(client, queue).items():
        ends = sum(counts[status] for status in TERMINAL)
        assert ends <= 1, f"{job_id} ended {ends} times: {dict(counts)}"
