"""The decoders of what Redis holds: no content makes them raise."""

import json
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.api.live.position import decode_position
from asyncinfer.jobs import Record, decode_facts, read_record
from asyncinfer.models.signature import read_signature
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.announcements import worker_says
from asyncinfer.repository.inspect.cursors import MOST_CHARACTERS, decode_cursor, encode_cursor
from asyncinfer.repository.inspect.log import changes_in, ids_in
from asyncinfer.repository.stored_jobs import noticed
from asyncinfer.untrusted import decoding

NESTED_MSGPACK = b"\x91" * 20_000 + b"\x90"
NESTED_JSON = b"[" * 20_000 + b"]" * 20_000
READERS = {
    "record": lambda content: read_record(b"12345678" + content),
    "facts": decode_facts,
    "announcement of a worker": worker_says,
    "announcement of a model": read_signature,
    "ids of a log": ids_in,
    "entry of a log": lambda content: changes_in("q", b"1-1", {b"submitted": content}),
    "notice of an end": lambda content: list(
        noticed({b"x": b"completed", b"\1x": content, b"\xff": content})
    ),
    "text": decoding.text,
    "name": decoding.name,
    "whole number": decoding.whole_number,
    "number": decoding.finite,
}
"""Every decoder, by what it reads."""


@pytest.mark.parametrize("what", READERS)
@given(
    st.binary(max_size=60)
    | st.sampled_from(
        [
            *(
                NESTED_MSGPACK,
                NESTED_JSON,
                b"9" * 5000,
                b"9" * 5000 + b" x",
                b"\xdd\xff\xff\xff\xff",
            ),
            *(b'{"model":' + NESTED_JSON + b"}", b"\x81\xa1w" + NESTED_MSGPACK, b"\xff" * 9),
        ]
    )
)
def test_no_bytes_make_a_decoder_raise(what: str, content: bytes) -> None:
    READERS[what](content)


@given(st.binary())
def test_text_is_such_as_json_can_carry(content: bytes) -> None:
    assert json.loads(msgspec.json.encode(decoding.text(content))) == decoding.text(content)


@given(st.integers() | st.floats())
def test_a_time_is_one_that_an_answer_can_show_or_none(time_ms: float) -> None:
    shown = decoding.time(time_ms)
    assert shown is None or msgspec.json.encode(shown)


def test_the_first_and_the_last_time_that_an_answer_can_show() -> None:
    first_ms = -62_135_596_800_000
    assert [decoding.time(one) is None for one in (first_ms, decoding.LAST_MS)] == [False, False]
    assert [decoding.time(one) for one in (first_ms - 1, decoding.LAST_MS + 1)] == [None, None]


@pytest.mark.parametrize("content", [b"nan", b"inf", b"-inf", b"", b"x", b"1e999", b"\xff"])
def test_what_is_no_finite_number_is_none(content: bytes) -> None:
    assert decoding.finite(content) is None


@pytest.mark.parametrize("content", [b"", b"-1", b"1.0", b" 1", b"1" * 20, b"\xb2"])
def test_what_is_no_count_is_none(content: bytes) -> None:
    assert decoding.whole_number(content) is None


# --- what clients hand back ------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"\x94\x00\x00\x00" + NESTED_MSGPACK,
        b"\xcf" + b"\xff" * 8,
        b"\x93\xcf" + b"\xff" * 8,
        b"\xff",
        b"",
    ],
    ids=["nested", "huge number", "wrong types", "no msgpack", "nothing"],
)
def test_a_cursor_that_was_not_ours_is_a_value_error(content: bytes) -> None:
    text = encode_cursor(msgspec.Raw(content)) if content else ""
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(text, Record)
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(text, Record, most_characters=1 << 20)


@given(st.text())
def test_no_text_makes_the_decoder_of_cursors_raise_anything_else(text: str) -> None:
    try:
        decode_cursor(text, Record)
    except ValueError:
        return


def test_a_long_cursor_is_refused_before_it_is_decoded() -> None:
    place: Any = ["x" * MOST_CHARACTERS]
    with pytest.raises(ValueError, match="characters"):
        decode_cursor(encode_cursor(place), list[str])


def test_a_position_over_hundreds_of_queues_is_taken() -> None:
    told = {f"predict_queue:model-{number}": (1_700_000_000_000, 5, 9) for number in range(250)}
    assert decode_position(encode_cursor((1_700_000_000_000, told))).told == told


# --- what the log says of it -----------------------------------------------------------------


def test_a_line_comes_once_in_a_while_and_others_beside_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = LimitedLog(logging.getLogger("test"), pause_seconds=3600)
    for _ in range(5):
        log.warning("a key is damaged")
        log.error("another one is")
    assert [record.message for record in caplog.records] == ["a key is damaged", "another one is"]
    often = LimitedLog(logging.getLogger("test"), pause_seconds=0)
    for _ in range(2):
        often.warning("again")
    assert [record.message for record in caplog.records][2:] == ["again", "again"]


def test_a_fault_that_comes_again_and_again_has_one_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = LimitedLog(logging.getLogger("test"))
    for number in range(5):
        log.unexpected("It failed.", ValueError(number))
    assert [bool(record.exc_info) for record in caplog.records] == [True]
