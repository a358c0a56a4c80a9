"""Packed tensors are unpacked unchanged, and damaged payloads are recognised."""

import contextlib
import struct
import tracemalloc

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=4), st.integers(0, 99))
def test_tensors_of_every_datatype_and_rank_are_unpacked_unchanged(
    specs: list[tuple[str, tuple[int, ...]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for index, (datatype, shape) in enumerate(specs):
        values = rng.integers(0, 2**7, shape)
        if datatype == "BYTES":
            texts = np.array([f"é{value}" for value in values.ravel()], dtype=object)
            tensors[f"t{index}"] = texts.reshape(shape)
        else:
            tensors[f"t{index}"] = np.asarray(values).astype(DTYPES[datatype])

    packed = packing.pack(tensors)
    unpacked = packing.unpack(packed)

    assert packing.is_packed(packed)
    assert list(unpacked) == list(tensors)
    for name, array in tensors.items():
        assert unpacked[name].dtype == array.dtype
        assert unpacked[name].shape == array.shape
        np.testing.assert_array_equal(unpacked[name], array)


def test_nonfinite_numbers_are_unpacked_unchanged() -> None:
    nonfinite = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    half = nonfinite.astype(ml_dtypes.bfloat16)

    unpacked = packing.unpack(packing.pack({"nonfinite": nonfinite, "half": half}))

    assert unpacked["nonfinite"].tobytes() == nonfinite.tobytes()
    assert unpacked["half"].tobytes() == half.tobytes()


def test_an_array_that_is_not_contiguous_is_stored_in_row_major_order() -> None:
    array = np.arange(12, dtype=np.int64).reshape(3, 4).T

    np.testing.assert_array_equal(packing.unpack(packing.pack({"x": array}))["x"], array)


def test_a_damaged_payload_is_never_read_as_tensors() -> None:
    whole = packing.pack(
        {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.array(["a", "bc"], object)}
    )

    for size in range(len(whole)):
        with pytest.raises(packing.DamagedPayload):
            packing.unpack(whole[:size])
    with pytest.raises(packing.DamagedPayload):
        packing.unpack(whole + b"x")


@pytest.mark.parametrize(
    "shape", [(0, 2**62, 2**62), (0, 2**40, 2**40), (0, *[2] * 60), (0, *[1] * 64)]
)
def test_an_empty_tensor_of_an_impossible_shape_is_damage(shape: tuple[int, ...]) -> None:
    header = msgspec.msgpack.encode([["x", "FP32", shape, 0]])
    payload = struct.pack("<cI", packing.TAG, len(header)) + header

    with pytest.raises(packing.DamagedPayload):
        packing.unpack(payload + bytes(-len(payload) % 16))


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_are_a_damaged_payload(noise: bytes) -> None:
    with contextlib.suppress(packing.DamagedPayload):
        packing.unpack(packing.TAG + noise)


def test_payloads_with_the_same_header_are_unpacked_together() -> None:
    rng = np.random.default_rng(0)
    jobs: list[dict[str, Array]] = [
        {"x": rng.normal(size=(2, 3)).astype(np.float32), "n": rng.integers(0, 9, (2,))}
        for _ in range(5)
    ]

    read = packing.unpack_uniform([packing.pack(job) for job in jobs])

    assert read is not None
    for job, unpacked in zip(jobs, read, strict=True):
        assert list(unpacked) == list(job)
        for name, array in job.items():
            np.testing.assert_array_equal(unpacked[name], array)


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((3, 2), np.float32)},
        {"x": np.zeros((2, 3), np.float64)},
        {"y": np.zeros((2, 3), np.float32)},
        {"x": np.zeros((2, 3), np.float32), "y": np.zeros(1, np.float32)},
    ],
)
def test_payloads_with_different_headers_are_not_unpacked_together(other: dict[str, Array]) -> None:
    payload = packing.pack({"x": np.zeros((2, 3), np.float32)})

    assert packing.unpack_uniform([payload, packing.pack(other)]) is None
    assert packing.unpack_uniform([payload, payload[:-1]]) is None


def test_strings_and_booleans_are_not_unpacked_together() -> None:
    for array in (np.array(["a"], object), np.array([True])):
        payload = packing.pack({"x": array})

        assert packing.unpack_uniform([payload, payload]) is None


def test_short_strings_take_little_more_memory_than_their_bytes_while_they_are_packed() -> None:
    """One body of 16 MiB has four million empty strings."""
    strings = [""] * 100_000
    tracemalloc.start()
    try:
        packed = packing.pack_strings(strings)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packing.unpack_strings(memoryview(packed), max_count=len(strings)) == strings
    assert peak_bytes < 4 * len(packed)
