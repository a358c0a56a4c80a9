"""What a thread does for a batch: check the inputs, stack them, run, split, render."""

import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec import Raw, Struct

from asyncinfer import batching, payloads, results
from asyncinfer.engine import Engine, Stop, Stopped
from asyncinfer.errors import (
    AsyncinferError,
    InvalidInput,
    JobError,
    ModelFailed,
    OutOfMemory,
    UnknownModel,
    UnreadableRecord,
)
from asyncinfer.models import check_data, check_inputs
from asyncinfer.repository.run import ClaimedJob
from asyncinfer.tensors import Feeds

log = logging.getLogger(__name__)

_MAX_ROWS: Final = 4096
_PAYLOADS: Final = frozenset({"json", "tensors"})


class Batch(Struct, frozen=True):
    """Jobs that share a run, with their inputs."""

    engine: Engine
    jobs: tuple[ClaimedJob, ...]
    inputs: tuple[Feeds, ...]

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches, to find out which half holds the job that fails."""
        middle = len(self.jobs) // 2
        return (
            Batch(self.engine, self.jobs[:middle], self.inputs[:middle]),
            Batch(self.engine, self.jobs[middle:], self.inputs[middle:]),
        )


class Prepared(Struct, frozen=True):
    """What a claim's jobs became: batches to run, and jobs that cannot run."""

    batches: tuple[Batch, ...]
    refused: tuple[tuple[ClaimedJob, AsyncinferError], ...]


class _Wrapped(Struct):
    """A stranger may store the request's body instead of its `data`."""

    data: Raw


Asked: TypeAlias = tuple[str | None, str | None]
"""A model, None where a stranger's job means a default that there is not; its version, or None."""


def asked(job: ClaimedJob, default_model: str | None) -> Asked:
    """Which version of which model a job wants to run on."""
    return (job.record.model, job.record.version) if job.record else (default_model, None)


def prepare(
    jobs: Sequence[ClaimedJob], engine_of: Callable[[Asked], Engine], default_model: str | None
) -> Prepared:
    """Checks each job's input as the door did (strangers never met the door), and groups.

    `engine_of` raises UnknownModel.
    """
    refused: list[tuple[ClaimedJob, AsyncinferError]] = []
    ready: list[tuple[Engine, ClaimedJob, Feeds]] = []
    for job in jobs:
        try:
            _check_readable(job)
            engine = engine_of(asked(job, default_model))
            ready.append((engine, job, _feeds_of(job, engine)))
        except (InvalidInput, UnknownModel, UnreadableRecord) as error:
            refused.append((job, error))
    return Prepared(tuple(_batches(ready)), tuple(refused))


def run(batch: Batch, stop: Stop) -> list[bytes]:
    """The result JSON of each job, in order; raises ModelFailed, OutOfMemory or Stopped."""
    counts = [batching.rows_of(one) for one in batch.inputs]
    try:
        outputs = batch.engine.run(batching.stack(batch.inputs), stop)
        return results.render_results(outputs, counts, batch.engine.signature)
    except (JobError, Stopped):
        raise
    except MemoryError as error:
        raise OutOfMemory("There was not enough memory for the batch.") from error
    except Exception as error:
        # One job's outputs may be what nothing here foresaw; its neighbours' are not.
        log.exception("A batch of %d jobs failed.", len(batch.jobs))
        raise ModelFailed("The outputs of the model could not be made a result.") from error


def _check_readable(job: ClaimedJob) -> None:
    if job.meta and job.record is None:
        raise UnreadableRecord(
            "The job's record cannot be read by this release of asyncinfer; submit it again."
        )
    if job.record and job.record.payload not in _PAYLOADS:
        raise UnreadableRecord(
            f"The job's payload is written as {job.record.payload!r}, which this release of "
            "asyncinfer cannot read; upgrade its workers and retry the job."
        )


def _feeds_of(job: ClaimedJob, engine: Engine) -> Feeds:
    if job.record and job.record.payload == "tensors":
        try:
            return check_inputs(payloads.unpack(job.data), engine.signature)
        except payloads.DamagedPayload as error:
            raise InvalidInput(f"The stored tensors are damaged: {error}.") from error
    array = check_data(_input_of(job), engine.signature)
    return {engine.signature.inputs[0].name: array}


def _input_of(job: ClaimedJob) -> bytes | Raw:
    if job.record or not job.data.lstrip().startswith(b"{"):
        return job.data
    try:
        return msgspec.json.decode(job.data, type=_Wrapped).data
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(
            'The stored input is neither a JSON array of rows nor {"data": [...]}.'
        ) from error


def _batches(ready: Sequence[tuple[Engine, ClaimedJob, Feeds]]) -> list[Batch]:
    """Groups what may share a run: one engine, equal dtypes and row shapes, bounded rows."""
    groups: dict[object, list[tuple[Engine, ClaimedJob, Feeds]]] = {}
    for engine, job, feeds in ready:
        alone = not engine.signature.batched
        key = (id(engine), job.job_id if alone else batching.run_key(feeds))
        groups.setdefault(key, []).append((engine, job, feeds))
    return [batch for group in groups.values() for batch in _bounded(group)]


def _bounded(group: Sequence[tuple[Engine, ClaimedJob, Feeds]]) -> list[Batch]:
    batches: list[list[tuple[Engine, ClaimedJob, Feeds]]] = [[]]
    rows = 0
    for one in group:
        count = batching.rows_of(one[2])
        if batches[-1] and rows + count > _MAX_ROWS:
            batches.append([])
            rows = 0
        batches[-1].append(one)
        rows += count
    return [
        Batch(part[0][0], tuple(job for _, job, _ in part), tuple(feeds for _, _, feeds in part))
        for part in batches
    ]
