"""The id of a request, by which its answer, its log lines and its job are found."""

import random
import re
from collections.abc import Iterable
from typing import Final

from asyncinfer.api.http.messages import Header

_VALID: Final = re.compile(rb"[!-~]{1,128}")
_FIELD: Final = b"x-request-id"


def request_id_of(headers: Iterable[Header]) -> str:
    """The value of X-Request-ID if it is 1 to 128 visible ASCII characters, else a new one."""
    for name, value in headers:
        if name == _FIELD and _VALID.fullmatch(value):
            return value.decode("ascii")
    return f"{random.getrandbits(64):016x}"


def request_id_header(request_id: str) -> Header:
    """The header of the answer."""
    return (_FIELD, request_id.encode())
