"""Commands as they are written to Redis."""

from typing import Any

import pytest
from hiredis import pack_command

from asyncinfer.repository.link import pack_in_pieces

LARGE = bytes(1 << 20)


@pytest.mark.parametrize(
    "command",
    [
        ("PING",),
        ("SET", "key", "é", "EX", 60),
        ("FCALL", "name", 2, "a", "b", b"", LARGE, b"\x00\r\n", LARGE),
        ("SET", "key", 0.5),
    ],
)
def test_the_pieces_of_a_command_are_what_a_library_packs(command: tuple[Any, ...]) -> None:
    assert b"".join(pack_in_pieces(command)) == pack_command(command)


def test_a_large_value_is_not_copied() -> None:
    assert any(piece is LARGE for piece in pack_in_pieces(("SET", "key", LARGE)))
