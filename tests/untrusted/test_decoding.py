"""Decoders of untrusted bytes: no content makes them raise."""

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
from asyncinfer.repository.announcements import decode_worker_announcement
from asyncinfer.repository.inspect.cursors import (
    MAX_CURSOR_CHARACTERS,
    decode_cursor,
    encode_cursor,
)
from asyncinfer.repository.inspect.log import decode_ids, parse_changes
from asyncinfer.repository.stored_jobs import parse_inbox_entry
from asyncinfer.untrusted import decoding

NESTED_MSGPACK = b"\x91" * 20_000 + b"\x90"
NESTED_JSON = b"[" * 20_000 + b"]" * 20_000
READERS = {
    "record": lambda content: read_record(b"12345678" + content),
    "facts": decode_facts,
    "announcement of a worker": decode_worker_announcement,
    "announcement of a model": read_signature,
    "ids of a log": decode_ids,
    "entry of a log": lambda content: parse_changes("q", b"1-1", {b"submitted": content}),
    "notice of an end": lambda content: list(
        parse_inbox_entry({b"x": b"completed", b"\1x": content, b"\xff": content})
    ),
    "text": decoding.text,
    "name": decoding.name,
    "whole number": decoding.whole_number,
    "number": decoding.finite,
}
"""Every decoder, by the kind of bytes that it reads."""


@pytest.mark.parametrize("kind", READERS)
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
def test_no_bytes_make_a_decoder_raise(kind: str, content: bytes) -> None:
    READERS[kind](content)


@given(st.binary())
def test_decoded_text_can_be_carried_by_json(content: bytes) -> None:
    assert json.loads(msgspec.json.encode(decoding.text(content))) == decoding.text(content)


@given(st.integers() | st.floats())
def test_a_time_can_be_shown_in_an_answer_or_is_none(time_ms: float) -> None:
    shown = decoding.time(time_ms)
    assert shown is None or msgspec.json.encode(shown)


def test_the_first_and_the_last_time_that_an_answer_can_show() -> None:
    first_ms = -62_135_596_800_000
    assert decoding.time(first_ms) is not None
    assert decoding.time(decoding.MAX_TIME_MS) is not None
    assert decoding.time(first_ms - 1) is None
    assert decoding.time(decoding.MAX_TIME_MS + 1) is None


@pytest.mark.parametrize("content", [b"nan", b"inf", b"-inf", b"", b"x", b"1e999", b"\xff"])
def test_anything_but_a_finite_number_is_none(content: bytes) -> None:
    assert decoding.finite(content) is None


@pytest.mark.parametrize("content", [b"", b"-1", b"1.0", b" 1", b"1" * 20, b"\xb2"])
def test_anything_but_a_count_is_none(content: bytes) -> None:
    assert decoding.whole_number(content) is None


# --- cursors of clients ----------------------------------------------------------------------


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
def test_a_foreign_cursor_is_a_value_error(content: bytes) -> None:
    text = encode_cursor(msgspec.Raw(content)) if content else ""
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(text, Record)
    with pytest.raises(ValueError, match="cursor"):
        decode_cursor(text, Record, max_characters=1 << 20)


@given(st.text())
def test_no_text_makes_the_cursor_decoder_raise_another_error(text: str) -> None:
    try:
        decode_cursor(text, Record)
    except ValueError:
        return


def test_a_long_cursor_is_rejected_before_it_is_decoded() -> None:
    place: Any = ["x" * MAX_CURSOR_CHARACTERS]
    with pytest.raises(ValueError, match="characters"):
        decode_cursor(encode_cursor(place), list[str])


def test_a_position_over_hundreds_of_queues_is_accepted() -> None:
    read = {f"predict_queue:model-{number}": (1_700_000_000_000, 5, 9) for number in range(250)}
    assert decode_position(encode_cursor((1_700_000_000_000, read))).acknowledged == read


# --- log lines about them --------------------------------------------------------------------


def test_a_repeated_line_is_logged_once_and_other_lines_are_not_held_back(
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


def test_a_repeated_error_is_logged_with_one_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = LimitedLog(logging.getLogger("test"))
    for number in range(5):
        log.unexpected("It failed.", ValueError(number))
    assert [bool(record.exc_info) for record in caplog.records] == [True]
