"""One log line for each thing that is done or seen over tenants."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from asyncinfer.api.http.messages import Request
from asyncinfer.errors import RequestError
from asyncinfer.schemas.requests import ALL_TENANTS
from asyncinfer.untrusted.printable import printable_json

_MOST_CHARACTERS: Final = 128

log = logging.getLogger("asyncinfer.audit")


class Audit:
    """What became of it."""

    def __init__(self) -> None:
        self.count = 0
        """Jobs that it changed or showed."""


@contextmanager
def audited(
    request: Request[Any], verb: str, meant: Mapping[str, object], *, over_tenants: bool = False
) -> Iterator[Audit]:
    """Leaves the line, also where it fails half way; none where a caller stays within its
    tenant. `meant` is what the jobs were chosen by."""
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
            _tell(request, verb, {"tenant": tenant, **meant}, outcome)


def _tell(request: Request[Any], verb: str, meant: Mapping[str, object], outcome: str) -> None:
    log.info(
        "%s by tenant=%s key=%s: %s: %s",
        verb,
        request.tenant,
        request.admission.shown_key or "none",
        " ".join(f"{name}={_text(value)}" for name, value in meant.items() if value),
        outcome,
    )


def _text(value: object) -> str:
    """As JSON: a name in a query may hold a line break or a control character."""
    shown = value[:_MOST_CHARACTERS] if isinstance(value, str) else value
    return printable_json(msgspec.json.encode(shown).decode())
