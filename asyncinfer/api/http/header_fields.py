"""The header fields of a request by name (RFC 9110, 5.3)."""

from collections.abc import Mapping, Sequence
from typing import Final

from asyncinfer.api.http.messages import Header
from asyncinfer.errors import InvalidHeader

_SINGLE: Final = frozenset(
    {
        b"authorization",
        b"content-length",
        b"content-type",
        b"host",
        b"idempotency-key",
        b"inference-header-content-length",
        b"last-event-id",
        b"origin",
        b"x-api-key",
    }
)
"""Fields that are no list and that something here acts on. Of two lines, a proxy in front may have
checked the one and we would act on the other."""


def read_fields(lines: Sequence[Header]) -> Mapping[bytes, bytes]:
    """Raises InvalidHeader when a field that has one value has two lines; the lines of a list are
    joined."""
    fields = dict(lines)
    return fields if len(fields) == len(lines) else _joined(lines)


def _joined(lines: Sequence[Header]) -> Mapping[bytes, bytes]:
    values: dict[bytes, list[bytes]] = {}
    for name, value in lines:
        values.setdefault(name, []).append(value)
    for name in values.keys() & _SINGLE:
        if len(values[name]) > 1:
            raise InvalidHeader(f"`{name.decode()}` is sent more than once; send it once.")
    return {name: b", ".join(several) for name, several in values.items()}
