"""Runs jobs as a worker's thread does: check, group, stack, run, split, render."""

from collections.abc import Sequence
from itertools import count

import msgspec
import numpy as np

from asyncinfer.engine import Engine, Stop
from asyncinfer.errors import ModelFailed
from asyncinfer.jobs import SCHEMA, Facts, Record
from asyncinfer.models.results import ClassResult, TensorsResult
from asyncinfer.models.signature import Signature
from asyncinfer.repository.claims import ClaimedJob
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, dims
from asyncinfer.worker import execution
from asyncinfer.worker.execution import Batch
from tests.zoo.reference import Outputs


class JobResult(msgspec.Struct, frozen=True):
    outputs: Outputs | None
    """None if the model refused the input."""
    jobs_in_run: int
    """The number of jobs in its run, this one included."""


def run_jobs(engine: Engine, jobs: Sequence[Feeds]) -> list[JobResult]:
    """Runs jobs as if one claim had taken all; returns the results in the order of `jobs`."""
    name = engine.signature.model
    claimed = [_claimed(name, feeds, f"{number:032x}") for number, feeds in zip(count(), jobs)]
    prepared = execution.prepare(claimed, _OnlyEngine({name: engine}), None)
    assert not prepared.refused, prepared.refused
    job_results: dict[str, JobResult] = {}
    waiting = list(prepared.batches)
    while waiting:
        batch = waiting.pop()
        try:
            results = execution.run(batch, Stop())
        except ModelFailed:
            # As in the worker: the run is halved until the job that fails is alone.
            if len(batch.jobs) > 1:
                waiting += batch.halves()
            else:
                job_results[batch.jobs[0].job_id] = JobResult(None, 1)
            continue
        job_results |= _results_of(batch, results)
    return [job_results[job.job_id] for job in claimed]


class _OnlyEngine(dict[str, Engine]):
    """Finds the only engine for every job, by its model's name or by model and version."""

    def __call__(self, model: object) -> Engine:
        (engine,) = self.values()
        return engine


def _results_of(batch: Batch, results: Sequence[bytes]) -> dict[str, JobResult]:
    signature = batch.engine.signature
    return {
        job.job_id: JobResult(read_result(result, signature), len(batch.jobs))
        for job, result in zip(batch.jobs, results, strict=True)
    }


def read_result(result: bytes, signature: Signature) -> Outputs:
    """The outputs of a stored result, packed or JSON; of a classifier with labels its scores."""
    if packing.is_packed(result):
        return packing.unpack(result)
    if not signature.labels:
        return {
            output.name: of_json(output.data, output.datatype, output.shape)
            for output in msgspec.json.decode(result, type=TensorsResult).outputs
        }
    rows = msgspec.json.decode(result, type=ClassResult | list[ClassResult])
    scores = [row.probabilities for row in ([rows] if isinstance(rows, ClassResult) else rows)]
    width = len(signature.labels)
    name = next(spec.name for spec in signature.outputs if dims(spec)[-1] == width)
    return {name: np.array(scores, np.float32)}


def of_json(data: Sequence[object], datatype: str, shape: Sequence[int]) -> Array:
    """A tensor from its flat JSON; the strings "NaN" and "Infinity" are floats."""
    dtype = DTYPES[datatype]
    if datatype in ("BYTES", "BOOL"):
        return np.array(data, dtype).reshape(shape)
    numbers = [float(number) if isinstance(number, str) else number for number in data]
    return np.array(numbers, dtype).reshape(shape)


def _claimed(model: str, feeds: Feeds, job_id: str) -> ClaimedJob:
    record = Record(SCHEMA, "q", model, "default", 0, payload="tensors", answer="tensors")
    return ClaimedJob(job_id, packing.pack(feeds), b"meta", record, Facts())
