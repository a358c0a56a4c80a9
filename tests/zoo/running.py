"""Jobs through what a worker's thread does: check, group, stack, run, split, render."""

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
from tests.zoo.bare import Answers


class Served(msgspec.Struct, frozen=True):
    """What became of one job."""

    answers: Answers | None
    """None where the model refused the input."""
    beside: int
    """How many jobs were in its run, itself included."""


def serve(engine: Engine, jobs: Sequence[Feeds]) -> list[Served]:
    """What each job gets when all are claimed at once, in the order of `jobs`."""
    name = engine.signature.model
    claimed = [_claimed(name, feeds, f"{number:032x}") for number, feeds in zip(count(), jobs)]
    prepared = execution.prepare(claimed, _Only({name: engine}), None)
    assert not prepared.refused, prepared.refused
    served: dict[str, Served] = {}
    waiting = list(prepared.batches)
    while waiting:
        batch = waiting.pop()
        try:
            results = execution.run(batch, Stop())
        except ModelFailed:
            # As the worker does: the culprit is looked for, and fails alone.
            if len(batch.jobs) > 1:
                waiting += batch.halves()
            else:
                served[batch.jobs[0].job_id] = Served(None, 1)
            continue
        served |= _read(batch, results)
    return [served[job.job_id] for job in claimed]


class _Only(dict[str, Engine]):
    """The engine of every job: by its model's name, or by model and version."""

    def __call__(self, asked: object) -> Engine:
        (engine,) = self.values()
        return engine


def _read(batch: Batch, results: Sequence[bytes]) -> dict[str, Served]:
    signature = batch.engine.signature
    return {
        job.job_id: Served(read_result(result, signature), len(batch.jobs))
        for job, result in zip(batch.jobs, results, strict=True)
    }


def read_result(result: bytes, signature: Signature) -> Answers:
    """The outputs in a stored result, packed or JSON; of a labelled classifier its scores."""
    if packing.is_packed(result):
        return packing.unpack(result)
    if not signature.labels:
        return {
            one.name: of_json(one.data, one.datatype, one.shape)
            for one in msgspec.json.decode(result, type=TensorsResult).outputs
        }
    rows = msgspec.json.decode(result, type=ClassResult | list[ClassResult])
    scores = [one.probabilities for one in ([rows] if isinstance(rows, ClassResult) else rows)]
    width = len(signature.labels)
    name = next(spec.name for spec in signature.outputs if dims(spec)[-1] == width)
    return {name: np.array(scores, np.float32)}


def of_json(data: Sequence[object], datatype: str, shape: Sequence[int]) -> Array:
    """A tensor from its flat JSON; "NaN" and "Infinity" are numbers where numbers are meant."""
    dtype = DTYPES[datatype]
    if datatype in ("BYTES", "BOOL"):
        return np.array(data, dtype).reshape(shape)
    numbers = [float(one) if isinstance(one, str) else one for one in data]
    return np.array(numbers, dtype).reshape(shape)


def _claimed(model: str, feeds: Feeds, job_id: str) -> ClaimedJob:
    record = Record(SCHEMA, "q", model, "default", 0, payload="tensors", answer="tensors")
    return ClaimedJob(job_id, packing.pack(feeds), b"meta", record, Facts())
