"""The work of a thread on claimed jobs: check and group inputs, run a batch, render results."""

import bisect
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
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
from asyncinfer.models.validation import check_data, check_inputs, check_uniform_data
from asyncinfer.repository.claims import ClaimedJob
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import Feeds

_log = logging.getLogger(__name__)

_PAYLOADS: Final = frozenset({"json", "tensors"})


class Batch(Struct, frozen=True):
    """Jobs that share a run, with the input tensors of each and its number of rows."""

    engine: Engine
    jobs: tuple[ClaimedJob, ...]
    inputs: tuple[Feeds, ...]
    rows: tuple[int, ...]

    def halves(self) -> "tuple[Batch, ...]":
        """The batch as two, in order, to find out which half holds the job that fails. Call it for
        two jobs or more."""
        return self.split(len(self.jobs) // 2)

    def split(self, jobs: int) -> "tuple[Batch, ...]":
        """The batch of the first `jobs`, at least one, and that of the others, if there are any."""
        if jobs >= len(self.jobs):
            return (self,)
        return tuple(
            Batch(self.engine, self.jobs[part], self.inputs[part], self.rows[part])
            for part in (slice(jobs), slice(jobs, None))
        )

    @property
    def row_input_bytes(self) -> int:
        """The size of the input of a row, the largest of its jobs."""
        sizes = map(batching.input_bytes, self.inputs)
        return max(size // max(rows, 1) for size, rows in zip(sizes, self.rows, strict=True))

    def split_to_rows(self, max_rows: int) -> "tuple[Batch, ...]":
        """As `split`, after as many jobs, at least one, as have `max_rows` rows together."""
        if sum(self.rows) <= max_rows:
            return (self,)
        ends = list(itertools.accumulate(max(rows, 1) for rows in self.rows))
        return self.split(max(1, bisect.bisect_right(ends, max_rows)))


class Prepared(Struct, frozen=True):
    """The jobs of a claim: in batches to run, and those that cannot run, with the reason."""

    batches: tuple[Batch, ...]
    refused: tuple[tuple[ClaimedJob, AsyncinferError], ...]


class _Group(Struct, frozen=True):
    """Jobs with valid inputs that may share a run."""

    jobs: list[ClaimedJob]
    inputs: list[Feeds]


class _RequestBody(Struct):
    """An external job may hold a whole request body instead of its `data`."""

    data: Raw


ModelRef: TypeAlias = tuple[str | None, str | None]
"""(model, version): model is None for an external job when no default model is set; version is
None for the default version."""


def requested_model(job: ClaimedJob, model_of_queue: str | None) -> ModelRef:
    """The model and version that a job's record names; without a record the model of its queue, in
    its default version."""
    return (job.record.model, job.record.version) if job.record else (model_of_queue, None)


def prepare(
    jobs: Sequence[ClaimedJob], engine_of: Callable[[ModelRef], Engine], model_of_queue: str | None
) -> Prepared:
    """Checks each job's record and input, and forms batches. `engine_of` gives the engine or raises
    UnknownModel; `model_of_queue` is the model of jobs without a record. Blocks while it decodes.

    The API has checked inputs too, but not those of external jobs. Never raises for a job: what is
    wrong with it is in `Prepared.refused`.
    """
    refused: list[tuple[ClaimedJob, AsyncinferError]] = []
    wanted: dict[int, tuple[Engine, list[ClaimedJob]]] = {}
    for job in jobs:
        try:
            _check_readable(job)
            engine = engine_of(requested_model(job, model_of_queue))
        except (UnknownModel, UnreadableRecord) as error:
            refused.append((job, error))
        else:
            wanted.setdefault(id(engine), (engine, []))[1].append(job)
    batches: list[Batch] = []
    for engine, engine_jobs in wanted.values():
        uniform = _group_if_uniform(engine, engine_jobs)
        groups = [uniform] if uniform else _group_each(engine, engine_jobs, refused)
        for group in groups:
            batches += _split_to_limits(engine, group)
    return Prepared(tuple(batches), tuple(refused))


def run(batch: Batch, stop: Stop, max_bytes: int = sys.maxsize) -> list[bytes]:
    """Runs a batch; returns the results of its first jobs as the bytes to store, in their order:
    of all, unless the first of them have `max_bytes` together. Blocks, so call it in a thread.
    Raises ModelFailed or OutOfMemory, which one of the jobs may have caused, or Stopped."""
    engine, record = batch.engine, batch.jobs[0].record
    try:
        outputs = engine.run(batching.stack(batch.inputs, engine.plan), stop)
        rendered = results.render_results(
            outputs,
            batch.inputs,
            engine.signature,
            engine.plan,
            answer=record.answer if record else "json",
            output_names=record.outputs if record else (),
        )
        return _first(rendered, max_bytes)
    except (JobError, Stopped):
        raise
    except MemoryError as error:
        raise OutOfMemory("There was not enough memory for the batch.") from error
    except Exception as error:
        # The batch is split then, so that one job with outputs that cannot be rendered does not
        # fail the others.
        _log.exception("A batch of %d jobs failed.", len(batch.jobs))
        raise ModelFailed("The outputs of the model could not be made a result.") from error


def _first(rendered: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """The results up to the one with which they have `max_bytes`; no more are rendered."""
    first: list[bytes] = []
    size = 0
    for result in rendered:
        first.append(result)
        size += len(result)
        if size >= max_bytes:
            break
    return first


def _check_readable(job: ClaimedJob) -> None:
    """Raises LaterRecord for a job of a later release, UnreadableRecord for a damaged record or an
    unknown payload format."""
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


def _group_each(
    engine: Engine, jobs: Sequence[ClaimedJob], refused: list[tuple[ClaimedJob, AsyncinferError]]
) -> list[_Group]:
    """Checks the inputs one by one, and returns groups of jobs that may share a run; adds jobs with
    invalid input to `refused`."""
    groups: dict[object, _Group] = {}
    for job in jobs:
        try:
            feeds = _feeds(job, engine)
        except InvalidInput as error:
            refused.append((job, error))
        else:
            group = groups.setdefault(_run_key(engine, job, feeds), _Group([], []))
            group.jobs.append(job)
            group.inputs.append(feeds)
    return list(groups.values())


def _group_if_uniform(engine: Engine, jobs: Sequence[ClaimedJob]) -> _Group | None:
    """Decodes and checks all inputs at once if they have the same shapes and are valid: the usual
    case, and far faster for many small jobs. None where each job must be checked by itself, also
    for a single job or a model without batching."""
    if len(jobs) == 1 or engine.plan is None or None in engine.plan.inputs.values():
        return None
    first = jobs[0]
    kind = _kind(first)
    if first.record is None or any(_kind(job) != kind for job in jobs):
        return None
    try:
        inputs = _uniform_feeds(jobs, first.record.payload, engine.signature)
    except (InvalidInput, packing.DamagedPayload):
        return None
    if inputs is None or batching.run_key(inputs[0], engine.plan) is None:
        return None
    return _Group(list(jobs), list(inputs))


def _kind(job: ClaimedJob) -> tuple[object, ...]:
    """What must be equal for jobs to be decoded together: payload format and wanted answer. Empty
    for a job without a record."""
    record = job.record
    return (record.payload, record.answer, record.outputs) if record else ()


def _uniform_feeds(
    jobs: Sequence[ClaimedJob], payload: str, signature: Signature
) -> Sequence[Feeds] | None:
    """The input tensors of each job, in order; None where they do not all have the same shapes.
    `payload` is the format of all.

    Raises InvalidInput or DamagedPayload.
    """
    data = [job.data for job in jobs]
    if payload == "tensors":
        feeds = packing.unpack_uniform(data)
        if feeds:
            # The others differ from the first in nothing that is checked.
            check_inputs(feeds[0], signature)
        return feeds
    arrays = check_uniform_data(data, signature)
    spec = data_input(signature)
    return [{spec.name: array} for array in arrays] if arrays and spec else None


def _feeds(job: ClaimedJob, engine: Engine) -> Feeds:
    """The checked input tensors of one job; raises InvalidInput, also for damaged tensors."""
    if job.record and job.record.payload == "tensors":
        try:
            return check_inputs(packing.unpack(job.data), engine.signature)
        except packing.DamagedPayload as error:
            raise InvalidInput(f"The stored tensors are damaged: {error}.") from error
    array = check_data(_data_json(job), engine.signature)
    spec = data_input(engine.signature)
    assert spec is not None, "check_data refuses without one"
    return {spec.name: array}


def _data_json(job: ClaimedJob) -> bytes | Raw:
    """The bytes of the JSON array of rows, which an external job may wrap as {"data": [...]}; the
    rows are not checked. Raises InvalidInput for an object that is not of this form."""
    if job.record or not job.data.lstrip().startswith(b"{"):
        return job.data
    try:
        return msgspec.json.decode(job.data, type=_RequestBody).data
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(
            'The stored input is neither a JSON array of rows nor {"data": [...]}.'
        ) from error


def _run_key(engine: Engine, job: ClaimedJob, feeds: Feeds) -> object:
    """A hashable key: jobs share a run if it is equal. It holds the shapes of the inputs and the
    wanted outputs; for a job that must run alone it is the job's id."""
    key = None if engine.plan is None else batching.run_key(feeds, engine.plan)
    if key is None:
        return job.job_id
    record = job.record
    return (key, (record.answer, record.outputs) if record else ("json", ()))


def _split_to_limits(engine: Engine, group: _Group) -> list[Batch]:
    """Splits a group, in order, into batches within the limits on jobs, rows and bytes of a run.
    A single job that exceeds a limit is a batch of its own."""
    rows = [batching.row_count(feeds, engine.plan) for feeds in group.inputs]
    sizes = [batching.input_bytes(feeds) for feeds in group.inputs]
    signature = engine.signature
    max_jobs = signature.max_batch_jobs or sys.maxsize
    max_rows = signature.max_batch_rows or batching.MAX_RUN_ROWS
    starts = [0]
    batch_rows = batch_bytes = 0
    for index, (job_rows, job_bytes) in enumerate(zip(rows, sizes, strict=True)):
        batch_rows, batch_bytes = batch_rows + job_rows, batch_bytes + job_bytes
        is_full = (
            index - starts[-1] == max_jobs
            or batch_rows > max_rows
            or batch_bytes > batching.MAX_RUN_BYTES
        )
        if is_full and index > starts[-1]:
            starts.append(index)
            batch_rows, batch_bytes = job_rows, job_bytes
    return [
        Batch(
            engine,
            tuple(group.jobs[start:end]),
            tuple(group.inputs[start:end]),
            tuple(rows[start:end]),
        )
        for start, end in itertools.pairwise([*starts, len(rows)])
    ]
