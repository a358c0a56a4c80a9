"""The envelope parser, on every kind of text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncinfer.api.inputs.envelope import read_envelope
from asyncinfer.errors import InvalidInput, RequestError
from asyncinfer.schemas.requests import RequestOptions

SPACE = st.text(" \t\r\n", max_size=3)
NUMBERS = st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=3)
VALUES = NUMBERS | st.text() | st.none() | st.dictionaries(st.sampled_from(["data", "x"]), NUMBERS)
KEYS = st.sampled_from(['"data"', '"options"', '"\\u0064ata"', '"opt\\u0069ons"'])


def refusal(body: bytes) -> RequestError | None:
    """The error that refuses the body, or None; any other exception fails the test."""
    try:
        read_envelope(body)
    except RequestError as error:
        return error
    return None


def assert_read_or_refused(body: bytes) -> None:
    error = refusal(body)
    assert error is None or error.status in (400, 422)


@given(st.binary() | st.text(alphabet='{}[]":,\\ dataoptions01.eu').map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    assert_read_or_refused(body)


@st.composite
def objects(draw: st.DrawFn) -> tuple[str, list[tuple[str, Any]]]:
    """A JSON object as text with its pairs in order; keys may be repeated."""
    pairs = draw(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4))
    members = []
    for key, value in pairs:
        value = {} if "opt" in key else value
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
        members.append((json.loads(key), f"{draw(SPACE)}{key}{draw(SPACE)}:{draw(SPACE)}{text}"))
    inside = f"{draw(SPACE)},".join(text for _, text in members)
    return f"{draw(SPACE)}{{{inside}{draw(SPACE)}}}{draw(SPACE)}", members


@pytest.mark.soak
@given(objects())
@settings(max_examples=40)
def test_a_repeated_key_is_always_seen(case: tuple[str, list[tuple[str, Any]]]) -> None:
    text, members = case
    names = [name for name, _ in members]
    body = text.encode("utf-8", "surrogatepass")
    # Half a surrogate pair is text to Python, but not valid Unicode.
    odd = "\\ud" in text or not _is_utf8(body)
    if odd or len(names) > len(set(names)) or "data" not in names:
        assert odd or refusal(body)
    else:
        asked = read_envelope(body)
        assert json.loads(asked.data) == json.loads(text)["data"]
        assert asked.options == RequestOptions()


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_name_is_shown_short_however_long_it_is() -> None:
    with pytest.raises(InvalidInput) as refused:
        read_envelope(b'{"' + b"x" * 1_000_000 + b'": 1}')
    assert len(refused.value.detail) < 500
