"""What a thread does for a batch: check the inputs, stack them, run, split, render."""

import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec import Raw, Struct

from asyncinfer.engine import Engine, Stop, Stopped
from asyncinfer.errors import (
    AsyncinferError,
    InvalidInput,
    JobError,
    LaterRecord,
    ModelFailed,
    OutOfMemory,
    UnknownModel,
    UnreadableRecord,
)
from asyncinfer.models import batching, results
from asyncinfer.models.signature import Signature, data_input
from asyncinfer.models.validation import check_data, check_data_alike, check_inputs
from asyncinfer.repository.claims import ClaimedJob
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import Feeds

log = logging.getLogger(__name__)

_PAYLOADS: Final = frozenset({"json", "tensors"})


class Batch(Struct, frozen=True):
    """Jobs that share a run, with their inputs."""

    engine: Engine
    jobs: tuple[ClaimedJob, ...]
    inputs: tuple[Feeds, ...]
    rows: tuple[int, ...]

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches, to find out which half holds the job that fails."""
        middle = len(self.jobs) // 2
        return (
            Batch(self.engine, self.jobs[:middle], self.inputs[:middle], self.rows[:middle]),
            Batch(self.engine, self.jobs[middle:], self.inputs[middle:], self.rows[middle:]),
        )


class Prepared(Struct, frozen=True):
    """What a claim's jobs became: batches to run, and jobs that cannot run."""

    batches: tuple[Batch, ...]
    refused: tuple[tuple[ClaimedJob, AsyncinferError], ...]


class _Group(Struct, frozen=True):
    """Jobs whose inputs fit, and which may share a run."""

    jobs: list[ClaimedJob]
    inputs: list[Feeds]


class _Wrapped(Struct):
    """A stranger may store the request's body instead of its `data`."""

    data: Raw


Asked: TypeAlias = tuple[str | None, str | None]
"""A model, None where a stranger's job means a default that there is not; its version, or None."""


def asked(job: ClaimedJob, model_of_queue: str | None) -> Asked:
    """Which version of which model a job wants to run on; a stranger's means its queue's model."""
    return (job.record.model, job.record.version) if job.record else (model_of_queue, None)


def prepare(
    jobs: Sequence[ClaimedJob], engine_of: Callable[[Asked], Engine], model_of_queue: str | None
) -> Prepared:
    """Checks each job's input as the door did (strangers never met the door), and groups.

    `engine_of` raises UnknownModel.
    """
    refused: list[tuple[ClaimedJob, AsyncinferError]] = []
    wanted: dict[int, tuple[Engine, list[ClaimedJob]]] = {}
    for job in jobs:
        try:
            _check_readable(job)
            engine = engine_of(asked(job, model_of_queue))
        except (UnknownModel, UnreadableRecord) as error:
            refused.append((job, error))
        else:
            wanted.setdefault(id(engine), (engine, []))[1].append(job)
    batches: list[Batch] = []
    for engine, its_jobs in wanted.values():
        together = _ready_together(engine, its_jobs)
        groups = [together] if together else _grouped(engine, its_jobs, refused)
        for group in groups:
            batches += _bounded(engine, group)
    return Prepared(tuple(batches), tuple(refused))


def run(batch: Batch, stop: Stop) -> list[bytes]:
    """Each job's result as it is stored; raises ModelFailed, OutOfMemory or Stopped."""
    engine, record = batch.engine, batch.jobs[0].record
    try:
        outputs = engine.run(batching.stack(batch.inputs, engine.plan), stop)
        return results.render_results(
            outputs,
            batch.inputs,
            engine.signature,
            engine.plan,
            answer=record.answer if record else "json",
            wanted=record.outputs if record else (),
        )
    except (JobError, Stopped):
        raise
    except MemoryError as error:
        raise OutOfMemory("There was not enough memory for the batch.") from error
    except Exception as error:
        # One job's outputs may be what nothing here foresaw; its neighbours' are not.
        log.exception("A batch of %d jobs failed.", len(batch.jobs))
        raise ModelFailed("The outputs of the model could not be made a result.") from error


def _check_readable(job: ClaimedJob) -> None:
    if job.later_schema:
        raise LaterRecord(
            f"The job's record has schema {job.later_schema}, written by a later release of "
            "asyncinfer; a worker of that release runs it."
        )
    if job.meta and job.record is None:
        raise UnreadableRecord(
            "The job's record cannot be read by this release of asyncinfer; submit it again."
        )
    if job.record and job.record.payload not in _PAYLOADS:
        raise UnreadableRecord(
            f"The job's payload is written as {job.record.payload!r}, which this release of "
            "asyncinfer cannot read; upgrade its workers and retry the job."
        )


def _grouped(
    engine: Engine, jobs: Sequence[ClaimedJob], refused: list[tuple[ClaimedJob, AsyncinferError]]
) -> list[_Group]:
    """Jobs looked at one by one."""
    groups: dict[object, _Group] = {}
    for job in jobs:
        try:
            feeds = _feeds_of(job, engine)
        except InvalidInput as error:
            refused.append((job, error))
        else:
            group = groups.setdefault(_key(engine, job, feeds), _Group([], []))
            group.jobs.append(job)
            group.inputs.append(feeds)
    return list(groups.values())


def _ready_together(engine: Engine, jobs: Sequence[ClaimedJob]) -> _Group | None:
    """The usual case in one go, since a look at each input of its own is what a drain of small
    jobs takes longest for: all alike, all fit. None where each must be looked at."""
    if len(jobs) == 1 or engine.plan is None or None in engine.plan.inputs.values():
        return None
    first = jobs[0]
    kind = _kind(first)
    if first.record is None or any(_kind(job) != kind for job in jobs):
        return None
    try:
        inputs = _feeds_alike(jobs, first.record.payload, engine.signature)
    except (InvalidInput, packing.DamagedPayload):
        return None
    if inputs is None or batching.run_key(inputs[0], engine.plan) is None:
        return None
    return _Group(list(jobs), list(inputs))


def _kind(job: ClaimedJob) -> tuple[object, ...]:
    record = job.record
    return (record.payload, record.answer, record.outputs) if record else ()


def _feeds_alike(
    jobs: Sequence[ClaimedJob], payload: str, signature: Signature
) -> Sequence[Feeds] | None:
    data = [job.data for job in jobs]
    if payload == "tensors":
        feeds = packing.unpack_alike(data)
        if feeds:
            # They differ in nothing that is checked.
            check_inputs(feeds[0], signature)
        return feeds
    arrays = check_data_alike(data, signature)
    spec = data_input(signature)
    return [{spec.name: array} for array in arrays] if arrays and spec else None


def _feeds_of(job: ClaimedJob, engine: Engine) -> Feeds:
    if job.record and job.record.payload == "tensors":
        try:
            return check_inputs(packing.unpack(job.data), engine.signature)
        except packing.DamagedPayload as error:
            raise InvalidInput(f"The stored tensors are damaged: {error}.") from error
    array = check_data(_input_of(job), engine.signature)
    spec = data_input(engine.signature)
    assert spec is not None, "check_data refuses without one"
    return {spec.name: array}


def _input_of(job: ClaimedJob) -> bytes | Raw:
    if job.record or not job.data.lstrip().startswith(b"{"):
        return job.data
    try:
        return msgspec.json.decode(job.data, type=_Wrapped).data
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(
            'The stored input is neither a JSON array of rows nor {"data": [...]}.'
        ) from error


def _key(engine: Engine, job: ClaimedJob, feeds: Feeds) -> object:
    """Jobs share a run where this is equal: what goes in, and what is wanted of it."""
    key = None if engine.plan is None else batching.run_key(feeds, engine.plan)
    if key is None:
        return job.job_id
    record = job.record
    return (key, (record.answer, record.outputs) if record else ("json", ()))


def _bounded(engine: Engine, group: _Group) -> list[Batch]:
    """The runs that a group makes, each within what one may hold."""
    rows = [batching.rows_of(feeds, engine.plan) for feeds in group.inputs]
    sizes = [batching.bytes_of(feeds) for feeds in group.inputs]
    most = engine.signature
    most_jobs = most.max_batch_jobs or sys.maxsize
    most_rows = most.max_batch_rows or batching.MAX_RUN_ROWS
    starts = [0]
    its_rows = its_bytes = 0
    for at, (more_rows, more_bytes) in enumerate(zip(rows, sizes, strict=True)):
        its_rows, its_bytes = its_rows + more_rows, its_bytes + more_bytes
        is_full = (
            at - starts[-1] == most_jobs
            or its_rows > most_rows
            or its_bytes > batching.MAX_RUN_BYTES
        )
        if is_full and at > starts[-1]:
            starts.append(at)
            its_rows, its_bytes = more_rows, more_bytes
    return [
        Batch(
            engine,
            tuple(group.jobs[start:end]),
            tuple(group.inputs[start:end]),
            tuple(rows[start:end]),
        )
        for start, end in itertools.pairwise([*starts, len(rows)])
    ]
