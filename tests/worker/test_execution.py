"""Preparing claimed jobs: many alike are decoded together, and come out as each would alone."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncinfer.engine import Engine
from asyncinfer.jobs import SCHEMA, Facts, Record
from asyncinfer.models.folder import single_file_model
from asyncinfer.repository.claims import ClaimedJob
from asyncinfer.tensors import packing
from asyncinfer.worker import execution
from tests import zoo


@cache
def _engine() -> Engine:
    """A model of four numbers a row, whose jobs share runs."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        path.write_bytes(zoo.mlp([4, 4]).SerializeToString())
        return Engine.load(single_file_model(path), intra_op_threads=1)


def _job(number: int, rows: Sequence[Sequence[float]], payload: str, answer: str) -> ClaimedJob:
    record = Record(SCHEMA, "predict_queue", "m", "default", 0, payload=payload, answer=answer)
    (spec,) = _engine().signature.inputs
    data = msgspec.json.encode(rows)
    if payload == "tensors":
        data = packing.pack({spec.name: np.array(rows, np.float32)})
    return ClaimedJob(str(number), data, b"meta", record, Facts())


def _prepared(jobs: Sequence[ClaimedJob]) -> dict[str, object]:
    """By job its input as nested lists, or why it is refused."""
    prepared = execution.prepare(jobs, lambda _: _engine(), "m")
    inputs: dict[str, object] = {
        job.job_id: {name: array.tolist() for name, array in feeds.items()}
        for batch in prepared.batches
        for job, feeds in zip(batch.jobs, batch.inputs, strict=True)
    }
    return inputs | {job.job_id: error.detail for job, error in prepared.refused}


_rows = st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=2)
_same_shape = st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=1)
_wrong_shape = st.just([[1.0, 2.0]])


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.lists(_same_shape, min_size=2, max_size=6)
    | st.lists(_same_shape | _rows | _wrong_shape, min_size=2, max_size=6),
    payloads=st.sampled_from([["json"], ["tensors"], ["json", "tensors"]]),
)
def test_jobs_are_prepared_together_as_each_is_alone(
    inputs: list[list[list[float]]], payloads: list[str]
) -> None:
    jobs = [
        _job(number, rows, payloads[number % len(payloads)], "json")
        for number, rows in enumerate(inputs)
    ]

    together = _prepared(jobs)

    assert together == {job_id: said for job in jobs for job_id, said in _prepared([job]).items()}
    assert together.keys() == {job.job_id for job in jobs}
