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
"""Fields that have a single value and that this server acts on. If a request has two of one, a
proxy in front may have checked one line and this server would act on the other."""


def read_fields(lines: Sequence[Header]) -> Mapping[bytes, bytes]:
    """The fields by name, which is in lower case as in `lines`; the lines of a list field are
    joined with commas. Raises InvalidHeader if a field that has a single value is sent twice."""
    fields = dict(lines)
    return fields if len(fields) == len(lines) else _join(lines)


def _join(lines: Sequence[Header]) -> Mapping[bytes, bytes]:
    """`read_fields` for lines of which some have the same name."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in lines:
        values.setdefault(name, []).append(value)
    # In the order in which they were sent: that of a set differs from process to process.
    for name, sent in values.items():
        if len(sent) > 1 and name in _SINGLE:
            raise InvalidHeader(f"`{name.decode()}` is sent more than once; send it once.")
    return {name: b", ".join(field_values) for name, field_values in values.items()}
