"""The audit log: a line for each request that acts on or sees jobs across tenants."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from asyncinfer.api.http.messages import Request
from asyncinfer.errors import RequestError
from asyncinfer.schemas.requests import ALL_TENANTS
from asyncinfer.untrusted.printable import printable_json

_MAX_CHARACTERS: Final = 128

_log = logging.getLogger("asyncinfer.audit")


class Audit:
    """The outcome of a request, for its line; `audited` yields it."""

    def __init__(self) -> None:
        self.count = 0
        """Jobs that the request changed or showed; set it inside `audited`."""


@contextmanager
def audited(
    request: Request[Any], verb: str, criteria: Mapping[str, object], *, over_tenants: bool = False
) -> Iterator[Audit]:
    """Writes a line to the audit log when the block ends, also if it raises; no line if a caller
    stays within its tenant, unless the act is `over_tenants`, which means all tenants. `criteria`
    are what the jobs were selected by, by name; empty values are left out of the line."""
    audit, outcome = Audit(), "broken off"
    try:
        yield audit
        outcome = f"{audit.count} jobs"
    except RequestError as error:
        outcome = error.code
        raise
    finally:
        if request.reach.across or over_tenants:
            tenant = ALL_TENANTS if over_tenants else request.reach.tenant or ALL_TENANTS
            _write_line(request, verb, {"tenant": tenant, **criteria}, outcome)


def _write_line(
    request: Request[Any], verb: str, criteria: Mapping[str, object], outcome: str
) -> None:
    """Logs the act and `outcome`: how many jobs, the code of an error, or `broken off`."""
    _log.info(
        "%s by tenant=%s key=%s: %s: %s",
        verb,
        request.tenant,
        request.admission.shown_key or "none",
        " ".join(f"{name}={_text(value)}" for name, value in criteria.items() if value),
        outcome,
        extra={"request_id": request.request_id},
    )


def _text(value: object) -> str:
    """The value as JSON in printable characters, a string cut to 128: a name in a query may hold a
    line break or a control character."""
    shown = value[:_MAX_CHARACTERS] if isinstance(value, str) else value
    return printable_json(msgspec.json.encode(shown).decode())
