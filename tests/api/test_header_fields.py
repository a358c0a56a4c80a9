"""The header fields of a request by name."""

import itertools

import pytest

from asyncinfer.api.http.header_fields import read_fields
from asyncinfer.errors import InvalidHeader

SINGLE = (b"authorization", b"content-type", b"host", b"idempotency-key", b"x-api-key")


def test_of_several_fields_that_are_sent_twice_the_first_is_named() -> None:
    for first, second in itertools.permutations(SINGLE, 2):
        lines = [(first, b"a"), (second, b"b"), (second, b"c"), (first, b"d")]
        with pytest.raises(InvalidHeader, match=f"`{first.decode()}` is sent more than once"):
            read_fields(lines)


def test_lines_of_a_list_are_joined_in_their_order() -> None:
    assert read_fields([(b"prefer", b"a"), (b"host", b"h"), (b"prefer", b"b")]) == {
        b"prefer": b"a, b",
        b"host": b"h",
    }
